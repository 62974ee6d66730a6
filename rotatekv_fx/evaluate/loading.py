"""Models and tokenizers as a user names them: a local folder or a hub id."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rotatekv_fx.api import restore
from rotatekv_fx.errors import InputError, StateError

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model(name: str, dtype: str = "auto", device: str = "cpu") -> PreTrainedModel:
    """The causal language model `name`, in evaluation mode.

    Args:
        name: a local folder or a hub id.
        dtype: one of `DTYPES`; "auto" takes the checkpoint's.
        device: what `torch.device` accepts.

    Raises:
        InputError: the dtype or device is unknown or absent, the folder holds no model, or the model is
            no causal language model, cannot be read, or lacks weights.
    """
    target = _device(device)
    if dtype not in DTYPES:
        raise InputError(f"The dtype is {dtype!r}; use one of {', '.join(DTYPES)}.")
    location = _location(name)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            location, dtype=dtype if dtype == "auto" else getattr(torch, dtype), output_loading_info=True
        )
    except Exception as error:  # a damaged or foreign checkpoint can fail in any way
        raise InputError(
            f"Cannot load {name} as a causal language model; give the folder or hub id of one: "
            f"{_first_line(error)}"
        ) from error
    model, found = loaded
    with contextlib.suppress(StateError):  # saved after transform(): commands transform it as they are told
        restore(model)
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise InputError(
            f"{name} lacks {len(missing)} weights of a {type(model).__name__}, {missing[0]} among them; "
            "give a complete checkpoint of a decoder."
        )
    model.eval().to(target)
    if not _is_causal(model):
        raise InputError(f"{name} is an encoder: its tokens see later ones. Give a decoder.")
    return model


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer saved beside the model `name`.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    location = _location(name)
    try:
        return AutoTokenizer.from_pretrained(location)
    except Exception as error:  # as for models
        raise InputError(
            f"Cannot load the tokenizer of {name}; save one beside the model: {_first_line(error)}"
        ) from error


def check_context(model: PreTrainedModel, tokens: int) -> None:
    """Refuse sequences that are longer than the model's configuration allows.

    Raises:
        InputError: `tokens` is above `max_position_embeddings`.
    """
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise InputError(
            f"{tokens} tokens were asked for, but the model takes at most {limit}; ask for fewer."
        )


def _location(name: str) -> str:
    """`name` as transformers takes it; a path that is no model folder is refused before any network call."""
    path = Path(name)
    if name and path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"The folder {name} holds no config.json; give a folder with a saved model.")
        return name
    if path.is_file():
        raise InputError(f"{name} is a file; give the folder that holds the model.")
    parts = name.split("/")
    hub_id = len(parts) <= 2 and all(parts) and "\\" not in name and not name.startswith((".", "~"))
    if not hub_id or Path(parts[0]).is_dir():
        raise InputError(f"There is no folder {name!r}; give the folder of a model, or a hub id.")
    return name


@torch.inference_mode()
def _is_causal(model: PreTrainedModel) -> bool:
    """Whether a token leaves earlier logits alone; some encoders load as causal language models."""
    ids = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 2]], device=model.device)
    first, second = model(input_ids=ids).logits[:, :-1].float()
    return bool((first - second).abs().max() <= 1e-3 * first.abs().max())


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"The device {name!r} cannot be used; give cpu, cuda or cuda:1: {_first_line(error)}"
        ) from error
    return device


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"

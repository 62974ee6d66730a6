"""A continuation that a model writes, and the bytes of the cache it ran on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rotatekv_fx import cache_nbytes
from rotatekv_fx.evaluate.loading import check_context
from rotatekv_fx.evaluate.memory import KVShape, bits_per_element, sixteen_bit_nbytes
from rotatekv_fx.evaluate.text import encode, start_tokens
from rotatekv_fx.naming import cache_of


def continue_greedily(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sites: Sequence[KVShape],
    prompt: str,
    new_tokens: int,
) -> dict[str, Any]:
    """Continue `prompt` by at most `new_tokens` tokens.

    Args:
        model: transformed or not.
        sites: its attention sites, which size the 16-bit cache that the bytes are compared with.

    Returns:
        Figures for a JSON file. `cache_tokens` is one less than the sequence: the last is not fed back.

    Raises:
        InputError: prompt and continuation are longer than the model's configuration allows.
    """
    ids = torch.tensor([[*start_tokens(tokenizer), *encode(tokenizer, prompt)]], device=model.device)
    check_context(model, ids.shape[1] + new_tokens)
    begin = time.perf_counter()
    output = model.generate(  # type: ignore[operator]  # of a mixin that PreTrainedModel does not declare
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
    )
    seconds = time.perf_counter() - begin
    new = output.sequences[0, ids.shape[1] :]
    cache, tokens = cache_of(output), output.sequences.shape[1] - 1
    return {
        "continuation": tokenizer.decode(new, skip_special_tokens=True),
        "new_tokens": new.tolist(),
        "cache_tokens": tokens,
        "cache_bytes": cache_nbytes(cache),
        "cache_bytes_16bit": sixteen_bit_nbytes(sites, tokens),
        "bits_per_element": bits_per_element(cache, sites, tokens),
        "seconds": seconds,
    }

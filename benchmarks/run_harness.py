"""A transformed model in EleutherAI's evaluation harness, as an ordinary Hugging Face model.

    python -m benchmarks.run_harness MODEL --task lambada_openai --recipe none --recipe centered

Needs the extra `harness`. Tasks are the harness's own, which load their data from the hub, or those of YAML
files in --include. One sequence at a time by default: the harness pads without a mask, and a padding token
could then take the place of an exact one.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rotatekv_fx import RotateKVConfig, calibrate, transform
from rotatekv_fx.errors import InputError
from rotatekv_fx.evaluate import (
    CALIBRATION_CONTEXT,
    CALIBRATION_WINDOWS,
    cut_windows,
    encode,
    load_model,
    load_tokenizer,
    read_text,
    start_tokens,
)


def harness_scores(
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    include: Path | None = None,
    limit: int | None = None,
    batch: int = 1,
) -> dict[str, dict[str, Any]]:
    """Each model's metrics of each task, {name: {task: {metric: value}}}.

    Args:
        models: by name, transformed or not.
        tasks: names that the harness knows, or those of YAML files in `include`.
        limit: documents of each task, at most.
        batch: sequences at a time.

    Raises:
        InputError: lm_eval is not installed.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError("The harness is not installed; pip install 'rotatekv-fx[harness]'.") from error
    manager = TaskManager(include_path=None if include is None else str(include))
    found = {}
    for name, model in models.items():
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
        scores = simple_evaluate(wrapped, tasks=list(tasks), limit=limit, task_manager=manager)
        found[name] = {task: scores["results"][task] for task in tasks}
    return found


def main(
    model: Annotated[str, typer.Argument(help="Folder of a model, or a hub id.")],
    task: Annotated[list[str], typer.Option(help="Task of the harness; may be given again.")],
    recipe: Annotated[list[str], typer.Option(help="How the cache is stored; may be given again.")] = [  # noqa: B006
        "centered"
    ],
    bits: Annotated[int, typer.Option(help="Bits of a code.")] = 2,
    window: Annotated[int | None, typer.Option(help="Recent tokens kept exact; else the recipe's.")] = None,
    calibration_text: Annotated[
        Path | None, typer.Option(help="Text to calibrate on. Without it, the model writes its own.")
    ] = None,
    include: Annotated[Path | None, typer.Option(help="Folder with YAML files of tasks.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task, at most.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "auto",
    device: Annotated[str, typer.Option(help="Where the model runs.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Write the scores here, as JSON.")] = None,
) -> None:
    """Run the tasks on the untransformed model and on a transformed copy for each recipe."""
    loaded, tokenizer = load_model(model, dtype, device), load_tokenizer(model)
    windows = None
    if calibration_text is not None:
        ids = encode(tokenizer, read_text(calibration_text))
        windows = cut_windows(ids, CALIBRATION_CONTEXT, start_tokens(tokenizer))[:CALIBRATION_WINDOWS]
    calibration = calibrate(loaded, windows)
    models = {"untransformed": loaded}
    for name in recipe:
        config = RotateKVConfig(
            recipe=name, key_bits=bits, value_bits=bits, window=window, keep_originals=False
        )
        models[name] = transform(copy.deepcopy(loaded), config, calibration)
    scores = harness_scores(models, tokenizer, task, include, limit, batch)
    print(json.dumps(scores, indent=1, default=str))
    if out is not None:
        out.write_text(json.dumps(scores, indent=1, default=str) + "\n")


if __name__ == "__main__":
    typer.run(main)

"""Whether the exported graph says what torch says: greedy tokens, and perplexity, on the reference model.

    python -m benchmarks.onnx_quality

Greedy tokens part where a number falls on the other side of a rounding, and then stay apart. How much comes
of rounding alone is shown by a control: torch against itself with its embedding changed by 1e-7. All start
from the same prompts, read in one piece; perplexity is of windows read in one piece and in pieces.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime
import torch
import transformers
import typer
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from rotatekv_fx import RotateKVConfig, calibrate, export_onnx, transform
from rotatekv_fx.evaluate import (
    CALIBRATION_CONTEXT,
    CALIBRATION_WINDOWS,
    WindowScore,
    cut_windows,
    encode,
    load_model,
    load_tokenizer,
    read_text,
    score,
    start_tokens,
)
from rotatekv_fx.evaluate.perplexity import means
from rotatekv_fx.export.generation import Decoder
from rotatekv_fx.naming import cache_argument

HERE = Path(__file__).resolve().parent
RECIPES = ("centered", "paper")
CONTEXT, PIECE = 1024, 256
CHANGE = 1e-7  # of the embedding in the control, relative

Advance = Callable[[int], None]
Models = tuple[PreTrainedModel, PreTrainedModel]  # the transformed model and the control


def greedy_in_torch(model: PreTrainedModel, prompts: Tensor, tokens: int) -> Tensor:
    """[B, tokens] behind the prompts [B, S]."""
    written = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return written[:, prompts.shape[1] :]


def greedy_in_graph(decoder: Decoder, prompts: Tensor, tokens: int) -> Tensor:
    """The same from the graph."""
    steps = decoder.generate(prompts.tolist(), tokens, eos=[], chunk=prompts.shape[1])
    return torch.from_numpy(np.stack(list(steps), 1))


def changed(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose embedding differs by 1e-7."""
    other = copy.deepcopy(model)
    weight = other.get_input_embeddings().weight.data
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    weight.mul_(1 + CHANGE * noise)
    return other


def agreed(one: Tensor, other: Tensor) -> list[int]:
    """How many tokens of each row are alike before the first that differs."""
    return (one == other).long().cumprod(1).sum(1).tolist()


@torch.inference_mode()
def logits_in_torch(model: PreTrainedModel, window: Tensor, piece: int) -> Tensor:
    """[T, V] of a window [1, T], read in pieces."""
    cache = DynamicCache(config=model.config)
    held = {cache_argument(model): cache}
    read = [model(input_ids=part, **held).logits[0] for part in window.split(piece, 1)]
    return torch.cat(read).float()


def logits_in_graph(decoder: Decoder, window: Tensor, piece: int) -> Tensor:
    """The same from the graph."""
    cache = decoder.cache(*window.shape)
    parts = [part.numpy() for part in window.split(piece, 1)]
    return torch.from_numpy(np.concatenate([cache.step(p, logits_at=range(p.shape[1]))[0] for p in parts]))


def compare_tokens(
    models: Models, decoder: Decoder, prompts: Tensor, tokens: int, advance: Advance
) -> dict[str, Any]:
    """Tokens alike before graph and torch part, and before the control and torch do, for each prompt."""
    found = []
    for prompt in prompts.split(1):
        written, control = (greedy_in_torch(model, prompt, tokens) for model in models)
        graph = greedy_in_graph(decoder, prompt, tokens)
        found.append([*agreed(written, graph), *agreed(written, control)])
        advance(1)
    graphs, controls = (list(row) for row in zip(*found, strict=True))
    return {"tokens": tokens, "onnxruntime": graphs, "control": controls}


def compare_perplexity(
    models: Models, decoder: Decoder, windows: list[Tensor], advance: Advance
) -> list[dict[str, Any]]:
    """Perplexity of torch, of the control and of the graph, and their divergence from torch, in one piece and
    in several.
    """
    rows: list[dict[str, Any]] = []
    for piece in (CONTEXT, PIECE):
        scores: dict[str, list[WindowScore]] = {"torch": [], "control": [], "onnxruntime": []}
        for window in windows:
            exact, control = (logits_in_torch(model, window, piece) for model in models)
            for each, logits in zip(
                scores.values(), (exact, control, logits_in_graph(decoder, window, piece)), strict=True
            ):
                each.append(score(exact[:-1], logits[:-1], window[0, 1:]))
            advance(1)
        rows += [{"run": name, "tokens_a_piece": piece, **means(each)} for name, each in scores.items()]
    return rows


def main(
    out: Annotated[Path, typer.Option(help="File for the figures.")] = HERE / "results/onnx_quality.json",
    model: Annotated[Path, typer.Option(help="Folder of a model.")] = HERE / "reference_model",
    text: Annotated[Path, typer.Option(help="Text to read.")] = HERE / "data/wikitext-2-raw-test.txt",
    calibration_text: Annotated[Path, typer.Option(help="Text to calibrate on.")] = HERE
    / "data/calibration.txt",
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of 256 tokens.")] = 8,
    tokens: Annotated[int, typer.Option(min=1, help="Greedy tokens behind each.")] = 200,
    windows: Annotated[int, typer.Option(min=1, help="Windows of 1,024 tokens.")] = 6,
) -> None:
    """Export the model with each recipe, and compare graph and torch."""
    loaded, tokenizer = load_model(str(model), "float32"), load_tokenizer(str(model))
    start = start_tokens(tokenizer)
    of_calibration = cut_windows(encode(tokenizer, read_text(calibration_text)), CALIBRATION_CONTEXT, start)
    calibration = calibrate(loaded, of_calibration[:CALIBRATION_WINDOWS], progress=lambda done, total: None)
    read = cut_windows(encode(tokenizer, read_text(text)), CONTEXT, start, least=max(prompts, windows))
    beginnings = torch.cat([window[:, :PIECE] for window in read[:prompts]])
    rows: list[dict[str, Any]] = []
    steps = len(RECIPES) * (1 + prompts + 2 * windows)
    with typer.progressbar(length=steps, label="Comparing") as bar, tempfile.TemporaryDirectory() as folder:
        for recipe in RECIPES:
            config = RotateKVConfig(recipe=recipe, keep_originals=False)
            packed = transform(copy.deepcopy(loaded), config, calibration)
            export_onnx(packed, Path(folder) / recipe)
            decoder = Decoder(Path(folder) / recipe)
            bar.update(1)
            models = (packed, changed(packed))
            greedy = compare_tokens(models, decoder, beginnings, tokens, bar.update)
            perplexity = compare_perplexity(models, decoder, read[:windows], bar.update)
            rows.append({"recipe": recipe, "greedy": greedy, "perplexity": perplexity})
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    figures = {"rows": rows, "versions": {**versions, "onnxruntime": onnxruntime.__version__}}
    out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print(f"{row['recipe']}: {row['greedy']}")
        for one in row["perplexity"]:
            print(
                f"  {one['run']:12} {one['tokens_a_piece']:5} tokens a piece  "
                f"perplexity {one['perplexity']:.2f}  KL {one['kl']:.5f}  same argmax {one['agreement']:.1%}"
            )


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    typer.run(main)

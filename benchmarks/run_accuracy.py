"""Accuracy of every method on the reference model, as data and figures.

    python -m benchmarks.run_accuracy --out benchmarks/results

Parts: rate (loss against bits per element), tasks (word problems and recall, paired with 16 bit), long (1,024
tokens written on each cache) and outliers (key channels, step by step). A part's figures replace those of its
last run in accuracy.json.
"""

from __future__ import annotations

import copy
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rotatekv_fx import Calibration, RotateKVConfig, calibrate, inspect_model, transform
from rotatekv_fx.errors import InputError
from rotatekv_fx.evaluate import (
    cut_windows,
    encode,
    evaluate,
    load_model,
    load_tokenizer,
    read_text,
    start_tokens,
)
from rotatekv_fx.evaluate.baselines import evaluate_caches, kivi_cache, quantized_cache
from rotatekv_fx.evaluate.comparison import compare_on_tasks
from rotatekv_fx.evaluate.long_generation import long_generation
from rotatekv_fx.evaluate.outliers import key_outliers
from rotatekv_fx.evaluate.plots import plot_outliers, plot_rate, plot_recall
from rotatekv_fx.evaluate.reasoning import word_problem_cases
from rotatekv_fx.evaluate.recall import recall_cases

HERE = Path(__file__).resolve().parent
CONTEXT = 1024
CALIBRATION_WINDOWS = 12
LENGTHS = (700, 1100, 1500, 1900)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
WINDOW = 64
UNTRANSFORMED = "16 bit"


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    windows: int
    cases: int  # of each task
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    texts: int
    new_tokens: int
    bits: tuple[int, ...]


FULL = Sizes(24, 200, LENGTHS, DEPTHS, 4, 1024, (2, 3, 4))
QUICK = Sizes(2, 4, (300, 500), (0.0, 1.0), 2, 32, (2,))


@dataclass(frozen=True)
class Bench:
    """What every part reads."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    calibration: Calibration
    calibration_windows: list[Tensor]
    windows: list[Tensor]
    filler: str
    sizes: Sizes

    def transformed(self, config: RotateKVConfig) -> PreTrainedModel:
        """A transformed copy of the model."""
        return transform(copy.deepcopy(self.model), config, self.calibration)


def config_of(recipe: str, bits: int = 2, window: int = 0) -> RotateKVConfig:
    """A recipe's settings; a window has no slack, which a figure of bits would count."""
    return RotateKVConfig(
        recipe=recipe, key_bits=bits, value_bits=bits, window=window, slack=0, keep_originals=False
    )


def measure_rate(bench: Bench) -> dict[str, Any]:
    """KL, agreement and perplexity of each method at each of its widths.

    KIVI has 2 and 4 bits, as published. With recent tokens exact, KIVI and QuantizedCache are fed token by
    token, since all queries of one forward would read the same keys; on the first quarter of the windows.
    """
    rows: list[dict[str, Any]] = []
    for recipe, window in (("rtn", 0), ("quarot", 0), ("paper", 0), ("centered", 0), *windowed()):
        for bits in bench.sizes.bits:
            config = config_of(recipe, bits, window)
            figures = evaluate(bench.model, {config: bench.transformed(config)}, bench.windows)
            rows.append(named(f"{recipe}, window {window}" if window else recipe, figures["rows"][0]))
    untransformed = figures["untransformed_perplexity"]
    sites = inspect_model(bench.model).sites
    for group in (32, 128):
        for bits in (b for b in bench.sizes.bits if b != 3):
            makers = {"kivi": partial(kivi_cache, bench.model, bits, group)}
            row = evaluate_caches(bench.model, makers, bench.windows, sites)[0]
            rows.append(named(f"kivi g{group}", {**row, "key_bits": bits, "value_bits": bits}))
    few = bench.windows[: -(-len(bench.windows) // 4)]
    makers = {
        f"kivi g32, residual {WINDOW}": partial(kivi_cache, bench.model, 2, 32, WINDOW),
        **installed_quantized_caches(bench.model),
    }
    stepped = evaluate_caches(bench.model, makers, few, sites, step=1)
    return {
        "untransformed_perplexity": untransformed,
        "rows": rows,
        "token_by_token": [named(row["recipe"], row) for row in stepped],
    }


def windowed() -> Iterator[tuple[str, int]]:
    """Recipes with a recent window."""
    yield from (("paper", WINDOW), ("centered", WINDOW))


def installed_quantized_caches(model: PreTrainedModel) -> dict[str, Callable[[], Any]]:
    """transformers' own cache with each backend that is installed."""
    found = {}
    for backend in ("quanto", "hqq"):
        make = partial(quantized_cache, model, backend, 2, 64, WINDOW)
        try:
            make()
        except InputError as error:
            print(error)
        else:
            found[f"QuantizedCache {backend} g64, residual {WINDOW}"] = make
    return found


def named(method: str, row: Mapping[str, Any]) -> dict[str, Any]:
    print(
        f"{method:36} {row['bits_per_element']:6.2f} bits  KL {row['kl']:.4f}  "
        f"same argmax {row['agreement']:.1%}  perplexity {row['perplexity']:.2f}",
        flush=True,
    )
    return {"method": method, **row}


def measure_tasks(bench: Bench) -> dict[str, Any]:
    """Word problems and recall in 16 bit, and with recipes that have a window: the same cases for all."""
    sizes, tokenizer = bench.sizes, bench.tokenizer
    each = -(-sizes.cases // (len(sizes.lengths) * len(sizes.depths)))
    problems = word_problem_cases(tokenizer, sizes.cases, sizes.lengths)
    facts = recall_cases(tokenizer, bench.filler, sizes.lengths, sizes.depths, each)
    models = {UNTRANSFORMED: bench.model}
    for recipe, window in windowed():
        models[f"{recipe}, window {window}"] = bench.transformed(config_of(recipe, 2, window))
    figures = compare_on_tasks(models, tokenizer, problems, facts, batch=20)
    for task, rows in figures.items():
        for row in rows:
            low, high = row["difference"]["interval"]
            print(
                f"{task:14} {row['recipe']:22} {row['right']}/{row['cases']}  "
                f"{row['difference']['points']:+.1f} points ({low:+.1f} to {high:+.1f})",
                flush=True,
            )
    return figures


def measure_long(bench: Bench) -> list[dict[str, Any]]:
    """Text written on each cache, after 16 tokens of different windows."""
    configs = {
        "rtn": config_of("rtn"),
        "paper": config_of("paper"),
        **{f"{recipe}, window {window}": config_of(recipe, 2, window) for recipe, window in windowed()},
    }
    prompts = [window[:, :16] for window in bench.calibration_windows[: bench.sizes.texts]]
    rows = []
    for name in (UNTRANSFORMED, *configs):
        writer = bench.transformed(configs[name]) if name in configs else bench.model
        rows += long_generation(bench.model, {name: writer}, prompts, bench.sizes.new_tokens)
        print(
            f"long {name:22} perplexity {rows[-1]['perplexity']:.2f}, distinct {rows[-1]['distinct']:.3f}",
            flush=True,
        )
    return rows


def measure_outliers(bench: Bench) -> dict[str, Any]:
    """Key outliers of both published and own recipe, on the calibration text."""
    few = bench.calibration_windows[:4]
    return {
        recipe: key_outliers(bench.model, config_of(recipe), bench.calibration, few)
        for recipe in ("paper", "centered")
    }


PARTS: dict[str, Callable[[Bench], Any]] = {
    "rate": measure_rate,
    "tasks": measure_tasks,
    "long": measure_long,
    "outliers": measure_outliers,
}
ALL_PARTS = list(PARTS)


def draw(part: str, figures: Any, out: Path) -> None:
    """The figures of one part, beside accuracy.json."""
    if part == "rate":
        plot_rate(figures["rows"], figures["untransformed_perplexity"], out / "rate.png")
    elif part == "tasks":
        shown = (UNTRANSFORMED, f"centered, window {WINDOW}")
        places = {row["recipe"]: row["places"] for row in figures["recall"] if row["recipe"] in shown}
        plot_recall(places, out / "recall.png")
    elif part == "outliers":
        for recipe, rows in figures.items():
            plot_outliers(rows, f"Key outliers, recipe {recipe}", out / f"outliers_{recipe}.png")


def load(model: Path, text: Path, calibration_text: Path, sizes: Sizes, context: int, device: str) -> Bench:
    """Load and calibrate."""
    loaded, tokenizer = load_model(str(model), "float32", device), load_tokenizer(str(model))
    start = start_tokens(tokenizer)
    filler = read_text(calibration_text)
    ids = encode(tokenizer, read_text(text))
    calibration_windows = cut_windows(encode(tokenizer, filler), context, start)[:CALIBRATION_WINDOWS]
    windows = cut_windows(ids, context, start, least=sizes.windows)[: sizes.windows]
    calibration = calibrate(loaded, calibration_windows, progress=lambda done, total: None)
    return Bench(loaded, tokenizer, calibration, calibration_windows, windows, filler, sizes)


def main(
    out: Annotated[Path, typer.Option(help="Folder for accuracy.json and the figures.")] = HERE / "results",
    part: Annotated[list[str], typer.Option(help="What to measure; may be given again.")] = ALL_PARTS,
    quick: Annotated[bool, typer.Option(help="A few cases: shows that it runs, proves nothing.")] = False,
    model: Annotated[Path, typer.Option(help="Folder of a model.")] = HERE / "reference_model",
    text: Annotated[Path, typer.Option(help="Text to predict.")] = HERE / "data" / "wikitext-2-raw-test.txt",
    calibration_text: Annotated[
        Path, typer.Option(help="Text to calibrate on, and the running text that facts are put in.")
    ] = HERE / "data" / "calibration.txt",
    context: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = CONTEXT,
    device: Annotated[str, typer.Option(help="Where the model runs.")] = "cpu",
) -> None:
    """Measure, write accuracy.json, and draw."""
    unknown = set(part) - set(PARTS)
    if unknown:
        raise typer.BadParameter(f"there is no part {sorted(unknown)[0]!r}; use {', '.join(PARTS)}.")
    sizes = QUICK if quick else FULL
    bench = load(model, text, calibration_text, sizes, context, device)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "accuracy.json"
    kept = json.loads(file.read_text()) if file.exists() else {}
    for name in part:
        begin = time.perf_counter()
        figures = PARTS[name](bench)
        kept[name] = {
            "figures": figures,
            "settings": {**vars(sizes), "context": context, "device": device, "quick": quick},
            "seconds": time.perf_counter() - begin,
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
        }
        file.write_text(json.dumps(kept, indent=1) + "\n")
        draw(name, figures, out)


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    typer.run(main)

"""Accuracy of every method on the reference model, as data and figures.

    python -m benchmarks.run_accuracy --out benchmarks/results

Parts: rate (loss against bits per element), checks (keys alone, self-generated calibration, static layers,
bits with slack and at 32k tokens), tasks (word problems and recall, paired with 16 bit), long (1,024 tokens
written on each cache) and outliers (key channels, step by step). A part's figures replace those of its last
run in accuracy.json.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import transformers
import typer
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, StaticCache

from rotatekv_fx import Calibration, RotateKVConfig, calibrate, inspect_model, report, transform
from rotatekv_fx.errors import InputError, RotateKVError
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
from rotatekv_fx.evaluate.memory import bits_per_element
from rotatekv_fx.evaluate.outliers import key_outliers
from rotatekv_fx.evaluate.perplexity import score
from rotatekv_fx.evaluate.plots import plot_outliers, plot_rate, plot_recall
from rotatekv_fx.evaluate.reasoning import word_problem_cases
from rotatekv_fx.evaluate.recall import recall_cases
from rotatekv_fx.naming import cache_argument

HERE = Path(__file__).resolve().parent
CONTEXT = 1024
CALIBRATION_WINDOWS = 12
LENGTHS = (700, 1100, 1500, 1900)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
WINDOW = 64
UNTRANSFORMED = "16 bit"
STRICT = ("rtn", "quarot", "paper", "centered", "compensated")


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


FULL = Sizes(24, 200, LENGTHS, DEPTHS, 24, 1024, (2, 3, 4))
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

    KIVI has 2 and 4 bits, as published; so has QuantizedCache here. With recent tokens exact, both are fed
    token by token, since all queries of one forward would read the same keys.
    """
    rows: list[dict[str, Any]] = []
    for recipe, window in (*((recipe, 0) for recipe in STRICT), *windowed()):
        for bits in bench.sizes.bits:
            config = config_of(recipe, bits, window)
            figures = evaluate(bench.model, {config: bench.transformed(config)}, bench.windows)
            rows.append(named(f"{recipe}, window {window}" if window else recipe, figures["rows"][0]))
    sites = inspect_model(bench.model).sites
    for bits in (b for b in bench.sizes.bits if b != 3):
        strict = {f"kivi g{group}": partial(kivi_cache, bench.model, bits, group) for group in (32, 128)}
        recent = {
            f"kivi g32, window {WINDOW}": partial(kivi_cache, bench.model, bits, 32, WINDOW),
            **installed_quantized_caches(bench.model, bits),
        }
        for makers, window, step in ((strict, 0, None), (recent, WINDOW, 1)):
            for row in evaluate_caches(bench.model, makers, bench.windows, sites, step, batch=24):
                widths = {"key_bits": bits, "value_bits": bits, "window": window}
                rows.append(named(row["recipe"], {**row, **widths}))
    return {"untransformed_perplexity": figures["untransformed_perplexity"], "rows": rows}


def windowed() -> Iterator[tuple[str, int]]:
    """Recipes with a recent window."""
    yield from ((recipe, WINDOW) for recipe in ("paper", "centered", "compensated"))


def installed_quantized_caches(model: PreTrainedModel, bits: int) -> dict[str, Callable[[], Any]]:
    """transformers' own cache with each backend that is installed."""
    found = {}
    for backend in ("quanto", "hqq"):
        make = partial(quantized_cache, model, backend, bits, 64, WINDOW)
        try:
            make()
        except InputError as error:
            print(error)
        else:
            found[f"QuantizedCache {backend} g64, window {WINDOW}"] = make
    return found


def measure_checks(bench: Bench) -> dict[str, Any]:
    """Recipe `centered`, 2 bits: what the table of methods doesn't show."""
    window0, window64 = config_of("centered"), config_of("centered", window=WINDOW)
    variants = {
        "window 0": (window0, bench.calibration),
        "keys alone (values at 8 bits)": (dataclasses.replace(window0, value_bits=8), bench.calibration),
        f"window {WINDOW}": (window64, bench.calibration),
        f"window {WINDOW}, slack 32": (dataclasses.replace(window64, slack=32), bench.calibration),
        "window 0, calibrated on its own text": (window0, calibrate(bench.model)),
        "window 0, 4 heads a rotation": (dataclasses.replace(window0, head_group=4), bench.calibration),
        "window 0, 32 mean channels": (dataclasses.replace(window0, mean_channels=32), bench.calibration),
    }
    rows = []
    for name, (config, calibration) in variants.items():
        packed = transform(copy.deepcopy(bench.model), config, calibration)
        row = evaluate(bench.model, {config: packed}, bench.windows)["rows"][0]
        rows.append(named(name, {**row, "kl_first_12": fmean(row["per_window"]["kl"][:12])}))
    layers = [static_layers(bench, config) for config in (window0, window64)]
    return {"rows": rows, "static_layers": layers, "bits_at_32768": bits_when_long(bench, window64)}


@torch.inference_mode()
def static_layers(bench: Bench, config: RotateKVConfig) -> dict[str, Any]:
    """KL of the first windows on dynamic and on static layers, and the largest gap between their logits."""
    packed = bench.transformed(config)
    kl: dict[str, list[float]] = {"dynamic": [], "static": []}
    gap = 0.0
    for window in bench.windows[:4]:
        ids = window.to(bench.model.device)
        reference = bench.model(input_ids=ids).logits[0, :-1].float()
        read = {}
        for kind in kl:
            room = {"config": packed.config, "max_cache_len": ids.shape[1]}
            cache = StaticCache(**room) if kind == "static" else DynamicCache(config=packed.config)
            read[kind] = packed(input_ids=ids, **{cache_argument(packed): cache}).logits[0, :-1].float()
            kl[kind].append(score(reference, read[kind], ids[0, 1:]).kl)
        gap = max(gap, (read["static"] - read["dynamic"]).abs().max().item())
    print(f"window {config.window}: KL dynamic {fmean(kl['dynamic']):.5f}, static {fmean(kl['static']):.5f}")
    return {"window": config.window, "kl": kl, "largest_logit_gap": gap}


@torch.inference_mode()
def bits_when_long(bench: Bench, config: RotateKVConfig, tokens: int = 32768) -> dict[str, float]:
    """Bits an element of static layers allocated for that many tokens, without slack and with 32."""
    found = {}
    for slack in (0, 32):
        packed = bench.transformed(dataclasses.replace(config, slack=slack))
        cache = StaticCache(config=packed.config, max_cache_len=tokens)
        ids = bench.windows[0][:, :128].to(bench.model.device)
        packed(input_ids=ids, **{cache_argument(packed): cache})
        found[f"slack {slack}"] = bits_per_element(cache, report(packed).sites, tokens)
    print(f"bits an element at {tokens} tokens, window {config.window}: {found}")
    return found


def named(method: str, row: Mapping[str, Any]) -> dict[str, Any]:
    print(
        f"{method:38} {row['bits_per_element']:6.2f} bits  KL {row['kl']:.4f}  "
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
    with typer.progressbar(length=len(models) * (len(problems) + len(facts)), label="Answering") as bar:
        figures = compare_on_tasks(
            models, tokenizer, problems, facts, 20, progress=lambda done, _: bar.update(done - bar.pos)
        )
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
        "paper": config_of("paper"),
        **{f"{recipe}, window {window}": config_of(recipe, 2, window) for recipe, window in windowed()},
    }
    prompts = [window[:, :16] for window in bench.windows[: bench.sizes.texts]]
    rows = []
    for name in (UNTRANSFORMED, *configs):
        writer = bench.transformed(configs[name]) if name in configs else bench.model
        rows += long_generation(bench.model, {name: writer}, prompts, bench.sizes.new_tokens)
        print(
            f"long {name:22} perplexity {rows[-1]['perplexity']:.2f}, "
            f"divergence {rows[-1]['divergence']:.3f}, distinct {rows[-1]['distinct']:.3f}",
            flush=True,
        )
    return rows


def measure_outliers(bench: Bench) -> dict[str, Any]:
    """Key outliers of the published and of our default recipe, on the calibration text."""
    few = bench.calibration_windows[:4]
    return {
        recipe: key_outliers(bench.model, config_of(recipe), bench.calibration, few)
        for recipe in ("paper", "centered")
    }


PARTS: dict[str, Callable[[Bench], Any]] = {
    "rate": measure_rate,
    "checks": measure_checks,
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
    longest = getattr(loaded.config, "max_position_embeddings", context)
    if context > longest:
        raise InputError(
            f"windows of {context} tokens, and the model takes {longest}; use a smaller --context."
        )
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
    try:
        bench = load(model, text, calibration_text, sizes, context, device)
    except RotateKVError as error:
        raise SystemExit(str(error)) from None
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

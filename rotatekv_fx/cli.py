"""The `rotatekv` command. What it prints is also data: every command takes `--json FILE`."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import logging
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rotatekv_fx import (
    Calibration,
    RotateKVConfig,
    calibrate,
    export_onnx,
    inspect_model,
    recipes,
    report,
    transform,
)
from rotatekv_fx.collect import generate_windows
from rotatekv_fx.errors import InputError, RotateKVError
from rotatekv_fx.evaluate import (
    CALIBRATION_CONTEXT,
    CALIBRATION_WINDOWS,
    CalibrationSource,
    check_context,
    comparison_table,
    continue_greedily,
    cut_windows,
    encode,
    evaluate,
    load_model,
    load_tokenizer,
    read_text,
    side_by_side,
    start_tokens,
    tasks_table,
)
from rotatekv_fx.evaluate.comparison import compare_on_tasks
from rotatekv_fx.evaluate.outliers import key_outliers
from rotatekv_fx.evaluate.plots import plot_outliers
from rotatekv_fx.evaluate.reasoning import NEW_TOKENS as WORKED_TOKENS
from rotatekv_fx.evaluate.reasoning import word_problem_cases
from rotatekv_fx.evaluate.recall import recall_cases
from rotatekv_fx.export.onnx import check_export

_BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"  # in a checkout; not part of a wheel
_RECIPES = list(dict.fromkeys(["none", "paper", RotateKVConfig.recipe]))  # compared if none is named
_DEMO_PROMPT_CHARACTERS = 3000
_TASK_RECIPES = [RotateKVConfig.recipe]
_TASK_LENGTHS, _TASK_DEPTHS = [700, 1900], [0.0, 0.5, 1.0]
_OUTLIER_WINDOWS = 4

_out = Console()
_err = Console(stderr=True)
_UsageError: Any = typer.BadParameter.__mro__[
    1
]  # click's, or the copy of it that newer versions of typer carry

app = typer.Typer(
    help="A packed 2-bit KV cache for Hugging Face decoders, made by a graph pass.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a model, or a hub id.")]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: the checkpoint's.")]
Device = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1, ...")]
CalibrationFile = Annotated[
    Path | None, typer.Option("--calibration", metavar="FILE", help="What `rotatekv calibrate` saved.")
]
CalibrationText = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Text to calibrate on. Without either, the model writes its own."),
]
Text = Annotated[Path, typer.Option(metavar="FILE", help="Text to predict.")]
Context = Annotated[int, typer.Option(min=2, help="Tokens of a window, its start token included.")]
Windows = Annotated[int, typer.Option(min=1, help="Consecutive windows of the text.")]
NewTokens = Annotated[int, typer.Option(min=1, help="Tokens to write, at most.")]
Bits = Annotated[int | None, typer.Option(help="Bits of a code, of keys and values: 2, 3, 4 or 8.")]
KeyBits = Annotated[int | None, typer.Option(help="Bits of a key's code, where they differ.")]
ValueBits = Annotated[int | None, typer.Option(help="Bits of a value's code, where they differ.")]
Window = Annotated[int | None, typer.Option(help="Recent tokens kept exact; if not given, the recipe's.")]
GroupSize = Annotated[
    int | None, typer.Option(help="Channels that share a scale; if not given, 128 or what fits.")
]
Sinks = Annotated[int, typer.Option(help="Largest activations that name exact tokens; 0 for none.")]


@app.command("inspect")
def inspect_command(
    model: Model,
    plots: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Draw key outliers, step by step of --recipe, there.")
    ] = None,
    recipe: Annotated[str, typer.Option(help="Whose steps --plots shows.")] = RotateKVConfig.recipe,
    calibration_text: CalibrationText = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    json_file: JsonFile = None,
) -> None:
    """Show which attention modules match, and why others do not. Nothing is transformed."""
    _check_output(json_file)
    if plots is None and calibration_text is not None:
        raise InputError("--calibration-text serves --plots; add --plots DIR, or leave it out.")
    configs, source = _configs([recipe]), CalibrationSource.open(text=calibration_text)
    loaded = _load_model(model, dtype, device)
    with _err.status("Capturing the attention modules"):
        found = inspect_model(loaded)
    _out.print(found.table())
    figures: dict[str, Any] = {"model": model, "report": found.as_dict()}
    if plots is not None:
        figures["key_outliers"] = _draw_outliers(loaded, load_tokenizer(model), configs[0], source, plots)
    _write_json(json_file, figures)


@app.command("calibrate")
def calibrate_command(
    model: Model,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the statistics go (safetensors).")],
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text to read. Without it, the model writes its own.")
    ] = None,
    windows: Annotated[
        int | None, typer.Option(min=1, help=f"Windows of text ({CALIBRATION_WINDOWS} by default).")
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=2, help=f"Tokens of a window ({CALIBRATION_CONTEXT} by default).")
    ] = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    json_file: JsonFile = None,
) -> None:
    """Collect the statistics that recipes need, once for all of them, and save them."""
    _check_output(out)
    _check_output(json_file)
    if text is None and (windows is not None or context is not None):
        raise InputError("--windows and --context say how --text is read; add --text, or leave them out.")
    source = CalibrationSource.open(text=text)
    loaded, tokenizer = _load(model, dtype, device)
    context, windows = context or CALIBRATION_CONTEXT, windows or CALIBRATION_WINDOWS
    with _progress("Calibrating") as advance:
        statistics, origin = source.collect(loaded, tokenizer, context, windows, advance)
    statistics.save(out)
    _print_line(f"Calibration: {_describe(origin)}. Saved {escape(str(out))}, {out.stat().st_size:,} bytes.")
    _write_json(json_file, {"model": model, "file": str(out), "calibration": origin})


@app.command("eval")
def eval_command(
    model: Model,
    text: Text,
    recipe: Annotated[
        list[str], typer.Option(help="How the cache is stored; may be given again.")
    ] = _RECIPES,
    bits: Bits = None,
    key_bits: KeyBits = None,
    value_bits: ValueBits = None,
    window: Window = None,
    group_size: GroupSize = None,
    sinks: Sinks = RotateKVConfig.sinks,
    context: Context = 1024,
    windows: Windows = 24,
    calibration: CalibrationFile = None,
    calibration_text: CalibrationText = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    json_file: JsonFile = None,
) -> None:
    """Compare recipes with the untransformed model: KL divergence, equal argmaxes, perplexity, bits."""
    _check_output(json_file)
    configs = _configs(recipe, bits, key_bits, value_bits, window, group_size, sinks)
    contents, source = read_text(text), CalibrationSource.open(calibration, calibration_text)
    loaded, tokenizer = _load(model, dtype, device)
    check_context(loaded, context)
    cut = cut_windows(encode(tokenizer, contents), context, start_tokens(tokenizer), least=windows)[:windows]
    statistics, origin = _calibrate(source, configs, loaded, tokenizer, context)
    figures = _compare(loaded, _transformed(loaded, configs, statistics), cut)
    _write_json(
        json_file,
        {
            "model": model,
            "text": str(text),
            "calibration": origin,
            "context": context,
            "windows": windows,
            "start_token": tokenizer.bos_token_id,
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "device": device,
            **figures,
        },
    )


@app.command("eval-tasks")
def eval_tasks_command(
    model: Model,
    text: Annotated[Path, typer.Option(metavar="FILE", help="Running text that facts are put in.")],
    recipe: Annotated[
        list[str], typer.Option(help="How the cache is stored; may be given again.")
    ] = _TASK_RECIPES,
    bits: Bits = None,
    key_bits: KeyBits = None,
    value_bits: ValueBits = None,
    window: Window = None,
    group_size: GroupSize = None,
    sinks: Sinks = RotateKVConfig.sinks,
    cases: Annotated[int, typer.Option(min=1, help="Cases of each task, at least.")] = 40,
    length: Annotated[
        list[int], typer.Option(min=100, help="Tokens of a prompt; may be given again.")
    ] = _TASK_LENGTHS,
    depth: Annotated[
        list[float], typer.Option(min=0, max=1, help="Share of the text before the fact; may be given again.")
    ] = _TASK_DEPTHS,
    seed: Annotated[int, typer.Option(help="Of the cases.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 8,
    calibration: CalibrationFile = None,
    calibration_text: CalibrationText = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    json_file: JsonFile = None,
) -> None:
    """Word problems and recalled facts: answers on packed caches, paired with the untransformed model's.

    The bundled model was trained on both; another model may solve neither.
    """
    _check_output(json_file)
    configs = _configs(recipe, bits, key_bits, value_bits, window, group_size, sinks)
    filler, source = read_text(text), CalibrationSource.open(calibration, calibration_text)
    loaded, tokenizer = _load(model, dtype, device)
    check_context(loaded, max(length) + WORKED_TOKENS)
    problems = word_problem_cases(tokenizer, cases, length, seed)
    facts = recall_cases(tokenizer, filler, length, depth, -(-cases // (len(length) * len(depth))), seed)
    statistics, origin = _calibrate(source, configs, loaded, tokenizer, CALIBRATION_CONTEXT)
    candidates = _transformed(loaded, configs, statistics)
    models = {"untransformed": loaded, **{config.recipe: one for config, one in candidates.items()}}
    with _progress("Answering") as advance:
        figures = compare_on_tasks(models, tokenizer, problems, facts, batch, advance)
    _out.print(tasks_table(figures))
    _write_json(
        json_file,
        {
            "model": model,
            "text": str(text),
            "calibration": origin,
            "configs": [dataclasses.asdict(config) for config in configs],
            "seed": seed,
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "device": device,
            **figures,
        },
    )


@app.command("generate")
def generate_command(
    model: Model,
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(metavar="FILE", help="The same, from a file.")] = None,
    recipe: Annotated[str, typer.Option(help="How the cache is stored.")] = RotateKVConfig.recipe,
    bits: Bits = None,
    key_bits: KeyBits = None,
    value_bits: ValueBits = None,
    window: Window = None,
    group_size: GroupSize = None,
    sinks: Sinks = RotateKVConfig.sinks,
    calibration: CalibrationFile = None,
    calibration_text: CalibrationText = None,
    max_new_tokens: NewTokens = 64,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    json_file: JsonFile = None,
) -> None:
    """Continue a prompt greedily on the packed cache, and compare its bytes with a 16-bit cache's."""
    _check_output(json_file)
    (config,) = configs = _configs([recipe], bits, key_bits, value_bits, window, group_size, sinks)
    if (prompt is None) == (prompt_file is None):
        raise InputError("Give the prompt once, as --prompt TEXT or as --prompt-file FILE.")
    text = read_text(prompt_file) if prompt_file is not None else prompt
    if not text:
        raise InputError("The prompt is empty; give some text to continue.")
    source = CalibrationSource.open(calibration, calibration_text)
    loaded, tokenizer = _load(model, dtype, device)
    statistics, origin = _calibrate(source, configs, loaded, tokenizer, CALIBRATION_CONTEXT)
    with _err.status("Transforming"):
        transform(loaded, config, statistics)
    with _err.status("Generating"):
        figures = continue_greedily(loaded, tokenizer, report(loaded).sites, text, max_new_tokens)
    _print_line(f"[dim]{escape(text)}[/dim]{escape(figures['continuation'])}\n")
    _print_line(
        f"Cache of {figures['cache_tokens']} tokens: {figures['cache_bytes']:,} bytes "
        f"({figures['bits_per_element']:.2f} bits an element). "
        f"At 16 bits an element: {figures['cache_bytes_16bit']:,} bytes."
    )
    _write_json(
        json_file,
        {
            "model": model,
            "config": dataclasses.asdict(config),
            "calibration": origin,
            "prompt": text,
            **figures,
        },
    )


@app.command("export-onnx")
def export_onnx_command(
    model: Model,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="New folder for the graph.")],
    recipe: Annotated[str, typer.Option(help="How the cache is stored.")] = RotateKVConfig.recipe,
    bits: Bits = None,
    key_bits: KeyBits = None,
    value_bits: ValueBits = None,
    window: Window = None,
    group_size: GroupSize = None,
    sinks: Sinks = RotateKVConfig.sinks,
    calibration: CalibrationFile = None,
    calibration_text: CalibrationText = None,
    opset: Annotated[int, typer.Option(help="ONNX operator set of the graph.")] = 23,
    json_file: JsonFile = None,
) -> None:
    """Write a model with a packed cache as an ONNX graph, in float32, and check it in onnxruntime."""
    _check_output(json_file)
    (config,) = configs = _configs([recipe], bits, key_bits, value_bits, window, group_size, sinks)
    check_export(folder, opset)
    source = CalibrationSource.open(calibration, calibration_text)
    loaded, tokenizer = _load(model, "float32", "cpu")
    statistics, origin = _calibrate(source, configs, loaded, tokenizer, CALIBRATION_CONTEXT)
    with _err.status("Transforming"):
        transform(loaded, config, statistics)
    with _err.status("Exporting, which takes a minute or more"):
        path = export_onnx(loaded, folder, tokenizer=tokenizer, opset=opset)
    sizes = {file.name: file.stat().st_size for file in sorted(path.parent.iterdir())}
    _print_line(f"Wrote {escape(str(path))}, {sizes[path.name]:,} bytes; its logits are the model's.")
    _write_json(
        json_file,
        {
            "model": model,
            "config": dataclasses.asdict(config),
            "calibration": origin,
            "folder": str(folder),
            "opset": opset,
            "files": sizes,
        },
    )


@app.command("demo")
def demo_command(
    model: Annotated[str, typer.Option(help="Folder of a model, or a hub id.")] = str(
        _BENCHMARKS / "reference_model"
    ),
    text: Text = _BENCHMARKS / "data" / "wikitext-2-raw-test.txt",
    calibration_text: CalibrationText = _BENCHMARKS / "data" / "calibration.txt",
    prompt: Annotated[
        str | None, typer.Option(help="Text to continue; by default, how --text begins.")
    ] = None,
    max_new_tokens: NewTokens = 48,
    context: Context = 1024,
    windows: Windows = 6,
    dtype: Dtype = "auto",
    json_file: JsonFile = None,
) -> None:
    """Show it all on the bundled model: what matches, both caches' text and bytes, and what is lost."""
    _check_output(json_file)
    configs = _configs(_RECIPES)
    contents, source = read_text(text), CalibrationSource.open(text=calibration_text)
    loaded, tokenizer = _load(model, dtype, "cpu")
    check_context(loaded, context)
    cut = cut_windows(encode(tokenizer, contents), context, start_tokens(tokenizer), least=windows)[:windows]
    statistics, origin = _calibrate(source, configs, loaded, tokenizer, context)
    candidates = _transformed(loaded, configs, statistics)
    prompt = prompt or _first_sentences(contents, _DEMO_PROMPT_CHARACTERS)
    packed = configs[-1]
    found = report(candidates[packed])
    _out.print(found.table())
    models = {
        f"{8 * loaded.dtype.itemsize}-bit cache (untransformed)": loaded,
        f"{packed.key_bits}-bit cache (recipe {packed.recipe})": candidates[packed],
    }
    with _err.status("Generating"):
        continuations = {
            title: continue_greedily(a_model, tokenizer, found.sites, prompt, max_new_tokens)
            for title, a_model in models.items()
        }
    _print_line(f"\nPrompt: ... [dim]{escape(' '.join(prompt.split())[-65:])}[/dim]")
    _out.print(side_by_side(continuations))

    figures = _compare(loaded, candidates, cut)
    _write_json(
        json_file,
        {
            "model": model,
            "report": found.as_dict(),
            "calibration": origin,
            "prompt": prompt,
            "continuations": continuations,
            **figures,
        },
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, `sys.argv` by default.

    Returns:
        The exit code: 0; 2 for what the user can mend, told in one message on stderr; 130 when interrupted.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        code = typer.main.get_command(app).main(arguments, prog_name="rotatekv", standalone_mode=False)
    except RotateKVError as error:
        return _fail(str(error))
    except _UsageError as error:
        command = "rotatekv" if error.ctx is None else error.ctx.command_path
        message = error.format_message()
        return _fail(f"{message}{'' if message.endswith(('.', '?')) else '.'} See {command} --help.")
    except OSError as error:
        return _fail(f"{error.filename or 'System error'}: {error.strerror or error}")
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    if code == 130:
        return _fail("Interrupted.", code)
    return code or 0


def _fail(message: str, code: int = 2) -> int:
    _err.print(f"rotatekv: {message}", markup=False, highlight=False, soft_wrap=True)
    return code


def _configs(
    names: Sequence[str],
    bits: int | None = None,
    key_bits: int | None = None,
    value_bits: int | None = None,
    window: int | None = None,
    group_size: int | None = None,
    sinks: int = RotateKVConfig.sinks,
) -> list[RotateKVConfig]:
    """A config for each recipe. No command restores a model, so none keeps a second copy of its weights."""
    bits = RotateKVConfig.key_bits if bits is None else bits
    for name in names:
        recipes.get(name)  # refuses an unknown one
    return [
        RotateKVConfig(
            recipe=name,
            key_bits=bits if key_bits is None else key_bits,
            value_bits=bits if value_bits is None else value_bits,
            window=window,
            group_size=group_size,
            sinks=sinks,
            keep_originals=False,
        )
        for name in dict.fromkeys(names)
    ]


def _check_output(path: Path | None) -> None:
    """Refuse a file that cannot be written, before the long work and not after it."""
    if path is None:
        return
    folder = path.absolute().parent
    if not folder.is_dir():
        raise InputError(f"Cannot write {path}: there is no folder {folder}. Create it first.")
    if path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise InputError(f"Cannot write {path}: name a file that can be written.")


def _write_json(path: Path | None, figures: Mapping[str, Any]) -> None:
    """Write a command's figures, and the versions that they come from."""
    if path is None:
        return
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    path.write_text(json.dumps({**figures, "versions": versions}, indent=2) + "\n", encoding="utf-8")


def _load_model(name: str, dtype: str, device: str) -> PreTrainedModel:
    with _err.status(f"Loading {escape(name)}"):
        return load_model(name, dtype, device)


def _load(name: str, dtype: str, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return _load_model(name, dtype, device), load_tokenizer(name)


def _calibrate(
    source: CalibrationSource,
    configs: Sequence[RotateKVConfig],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
) -> tuple[Calibration | None, dict[str, Any] | None]:
    """Statistics and their origin, for the recipes that need any."""
    if not any(recipes.get(config.recipe).needs_calibration for config in configs):
        return None, None
    with _progress("Calibrating") as advance:
        statistics, origin = source.collect(model, tokenizer, context, CALIBRATION_WINDOWS, advance)
    _print_line(f"Calibration: {_describe(origin)}.")
    return statistics, origin


def _transformed(
    model: PreTrainedModel, configs: Sequence[RotateKVConfig], statistics: Calibration | None
) -> dict[RotateKVConfig, PreTrainedModel]:
    """A transformed copy of `model` for each config."""
    with _err.status("Transforming"):
        candidates = {config: copy.deepcopy(model) for config in configs}
        for config, candidate in candidates.items():
            transform(candidate, config, statistics)
        return candidates


def _compare(
    model: PreTrainedModel,
    candidates: Mapping[RotateKVConfig, PreTrainedModel],
    windows: Sequence[Tensor],
) -> dict[str, Any]:
    with _progress("Evaluating") as advance:
        figures = evaluate(model, candidates, windows, advance)
    _out.print(comparison_table(figures))
    return figures


def _draw_outliers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: RotateKVConfig,
    source: CalibrationSource,
    folder: Path,
) -> list[dict[str, Any]]:
    """Key outliers on a few windows of the calibration text, or of text that the model writes."""
    if source.text is None:
        windows = [window[None] for window in generate_windows(model)]
    else:
        ids = encode(tokenizer, source.text)
        windows = cut_windows(ids, CALIBRATION_CONTEXT, start_tokens(tokenizer))[:CALIBRATION_WINDOWS]
    with _progress("Calibrating") as advance:
        statistics = calibrate(model, windows, progress=advance)
    rows = key_outliers(model, config, statistics, windows[:_OUTLIER_WINDOWS])
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"outliers_{config.recipe}.png"
    plot_outliers(rows, f"Key outliers, recipe {config.recipe}", file)
    _print_line(f"Wrote {escape(str(file))}.")
    return rows


def _first_sentences(text: str, characters: int) -> str:
    """How `text` begins, up to the last full stop within `characters`, or cut there if there is none."""
    head = text[:characters]
    return head[: head.rfind(". ") + 1] or head


def _describe(origin: Mapping[str, Any]) -> str:
    if origin["source"] == "text":
        return escape(
            f"{origin['windows']} windows of {origin['context']} tokens of {Path(origin['file']).name}"
        )
    if origin["source"] == "file":
        return escape(f"read from {Path(origin['file']).name}")
    return "text that the model wrote"


def _print_line(text: str) -> None:
    _out.print(text, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, if that is a terminal, as a function of (done, total)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_err, transient=True, disable=not _err.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


if __name__ == "__main__":
    raise SystemExit(main())

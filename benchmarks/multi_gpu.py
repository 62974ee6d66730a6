"""One model on two devices: split by layers (accelerate's device_map) and by heads (tensor parallelism).

    python -m benchmarks.multi_gpu --out benchmarks/results

Numbers must be those of one device, whose calibration serves them all, up to rounding. How far rounding
alone takes them, the part "rounding" shows: one device again, its weights changed by their last bit. Takes
about four minutes on a machine with two GPUs, most of them spent on compiling kernels; with --device cpu the
tensor-parallel part runs on two CPU processes. Writes multi_gpu.json after each part, with the reason where
a part failed. device_map needs accelerate.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import transformers
import typer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import rotatekv_fx
from rotatekv_fx import Calibration, RotateKVConfig
from rotatekv_fx.naming import cache_of

HERE = Path(__file__).resolve().parent
MODEL = HERE / "reference_model"
PROMPT, NEW, BATCH = 300, 32, 2
CALIBRATION_WINDOWS, CALIBRATION_LENGTH = 4, 512
# Two KV heads a process: what stays within two heads is the same on one device and on two.
WITHIN_TWO_HEADS = {"head_group": 2, "group_size": 128}
RECIPES: dict[str, RotateKVConfig] = {
    "none": RotateKVConfig(recipe="none"),
    "quarot, 2 bits": RotateKVConfig(recipe="quarot", window=0, group_size=128),
    "centered, 8 bits": RotateKVConfig(key_bits=8, value_bits=8, window=16, **WITHIN_TWO_HEADS),
    "centered, 2 bits": RotateKVConfig(window=16, **WITHIN_TWO_HEADS),
}
CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
}
CALIBRATION = "calibration.safetensors"
LONGEST = 300  # seconds that the tensor-parallel processes may take: compiling kernels takes most of it
Found = dict[str, Any]


def texts() -> tuple[Tensor, list[Tensor]]:
    """Prompts [BATCH, PROMPT], and calibration windows."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)

    def ids(name: str) -> Tensor:
        text = (HERE / "data" / name).read_text(encoding="utf-8")[:60_000]
        return tokenizer(text, return_tensors="pt").input_ids[0]

    prompts = ids("wikitext-2-raw-test.txt")[: BATCH * PROMPT].view(BATCH, PROMPT)
    windows = ids("calibration.txt")[: CALIBRATION_WINDOWS * CALIBRATION_LENGTH]
    return prompts, list(windows.split(CALIBRATION_LENGTH))


def measure(
    load: Callable[[], PreTrainedModel], device: torch.device, file: Path
) -> Iterator[tuple[str, Found]]:
    """Tokens on both caches, first logits and bytes of the cache: untransformed, and with each recipe.

    The calibration is read from `file`; the first to come makes it.
    """
    prompts, windows = texts()
    prompts, model = prompts.to(device), load()
    yield "untransformed", _run(model, prompts)
    if not file.is_file():
        rotatekv_fx.calibrate(model, windows, progress=lambda done, total: None).save(file)
    calibration = Calibration.load(file)
    for name, config in RECIPES.items():
        rotatekv_fx.transform(model, config, None if config.recipe == "none" else calibration)
        merged = len(rotatekv_fx.report(model).sites[0].merged)
        yield name, {**_run(model, prompts), "merged": merged}
        rotatekv_fx.restore(model)


@torch.no_grad()
def _run(model: PreTrainedModel, prompts: Tensor) -> Found:
    start, tokens, margins = time.perf_counter(), {}, {}
    for name, options in CACHES.items():
        output = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )
        tokens[name] = [" ".join(map(str, row)) for row in output.sequences[:, PROMPT:].tolist()]
        best, second = torch.stack(output.logits, 1).float().topk(2).values.unbind(-1)
        margins[name] = (best - second).tolist()
    return {
        "tokens": tokens,
        "margins": margins,
        "logits": output.logits[0].float().cpu().tolist(),
        "cache_bytes": rotatekv_fx.cache_nbytes(cache_of(output)),
        "seconds": round(time.perf_counter() - start, 2),
    }


def compare(found: Found, one: Found) -> list[Found]:
    """A row for each recipe: tokens, whether they are one device's, and how far the first logits are.

    Sequences that part from one device's have the number of the first other token, and by how much (nats) one
    device preferred its own there to the second best.
    """
    rows = []
    for name, result in found.items():
        a, b = (torch.tensor(r["logits"]) for r in (result, one[name]))
        rows.append(
            {
                "recipe": name,
                "tokens_equal": {c: result["tokens"][c] == one[name]["tokens"][c] for c in CACHES},
                "partings": {c: list(_partings(result, one[name], c)) for c in CACHES},
                "logits_error": float((a - b).norm() / b.norm()),
                "cache_bytes": result["cache_bytes"],
                "merged_projections": result.get("merged"),
                "seconds": result["seconds"],
                "tokens": result["tokens"],
            }
        )
    return rows


def _partings(result: Found, one: Found, cache: str) -> Iterator[tuple[int, float]]:
    rows = zip(result["tokens"][cache], one["tokens"][cache], one["margins"][cache], strict=True)
    for found, expected, margins in rows:
        pairs = zip(found.split(), expected.split(), strict=True)
        step = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if step is not None:
            yield step, margins[step]


def on_one(device: torch.device) -> PreTrainedModel:
    """The whole model on one device."""
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).to(device).eval()


@torch.no_grad()
def nudged(device: torch.device) -> PreTrainedModel:
    """The same, with weights changed at random by a rounding of float32."""
    model = on_one(torch.device("cpu"))
    torch.manual_seed(0)
    for weight in model.parameters():
        weight.mul_(1 + torch.finfo(weight.dtype).eps / 2 * torch.randn_like(weight))
    return model.to(device)


def split_by_layers() -> PreTrainedModel:
    """The first layers on one GPU, the others on the next."""
    if importlib.util.find_spec("accelerate") is None:
        raise RuntimeError("device_map needs accelerate, which is not installed; pip install accelerate.")
    model = AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=torch.float32, device_map="auto", max_memory={0: "55MB", 1: "4GB"}
    )
    places = {str(place) for place in model.hf_device_map.values()}
    if len(places) != 2 or places & {"cpu", "disk"}:
        raise RuntimeError(f"device_map='auto' did not use both GPUs: {model.hf_device_map}")
    return model


def split_by_heads(folder: Path = MODEL) -> PreTrainedModel:
    """This process's part of every layer.

    transformers asks for accelerate here, and uses nothing of it: each process has one device.
    """
    asks = "transformers.integrations.accelerate.is_accelerate_available"
    with mock.patch(asks, return_value=True):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, tp_plan="auto")


def worker(folder: Path, device: str) -> None:
    """One process of the tensor-parallel part; writes what it found so far after each recipe."""
    rank = int(os.environ["LOCAL_RANK"])
    place = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(place)
    found: Found = {}
    try:
        for name, result in measure(split_by_heads, place, folder / CALIBRATION):
            found[name] = result
            (folder / f"found.{rank}").write_text(json.dumps(found), encoding="utf-8")
    except Exception as error:
        (folder / f"error.{rank}").write_text(_spelled(error), encoding="utf-8")
        os._exit(1)  # at once: the other process waits for this one
    torch.distributed.destroy_process_group()


def by_heads(device: str, folder: Path) -> Iterator[tuple[str, Found]]:
    """Run two processes under torchrun; what the first one found. `folder` holds one device's calibration.

    Raises:
        RuntimeError: a process failed.
    """
    failed = ""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", __spec__.name]
    arguments = ["--out", str(folder), "--device", device, "--part", str(folder)]
    process = subprocess.Popen(
        [sys.executable, *command, *arguments], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        _, said = process.communicate(timeout=LONGEST)
        failed = said[-2000:] if process.returncode else ""
    except subprocess.TimeoutExpired:
        failed = f"not finished after {LONGEST} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
    file = folder / "found.0"
    yield from json.loads(file.read_text(encoding="utf-8") if file.is_file() else "{}").items()
    errors = [f"{f.name}: {f.read_text(encoding='utf-8')}" for f in sorted(folder.glob("error.*"))]
    if errors or failed:
        raise RuntimeError("; ".join(errors) or failed)


def _spelled(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main(
    out: Annotated[Path, typer.Option(help="folder that receives multi_gpu.json")],
    device: Annotated[str, typer.Option(help="cuda (two GPUs) or cpu (tensor parallelism only)")] = "cuda",
    part: Annotated[Path | None, typer.Option(help="used by the processes that this one starts")] = None,
) -> None:
    """Compare two devices with one."""
    transformers.logging.set_verbosity_error()
    if part is not None:
        worker(part, device)
        return
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if device == "cuda" and len(gpus) < 2:
        raise SystemExit(f"{len(gpus)} GPUs found, two are needed; --device cpu runs tensor parallelism.")
    out.mkdir(parents=True, exist_ok=True)
    first = torch.device(device, 0) if device == "cuda" else torch.device(device)
    packages = ("torch", "transformers", "triton", "accelerate")
    report: Found = {
        "device": gpus[:2] if device == "cuda" else "CPU",
        "versions": {package: _version(package) for package in packages},
        "prompt": PROMPT,
        "new_tokens": NEW,
        "batch": BATCH,
    }
    one: Found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / CALIBRATION
        ways: dict[str, Callable[[], Iterator[tuple[str, Found]]]] = {
            "one_device": lambda: measure(lambda: on_one(first), first, file),
            "tensor_parallel": lambda: by_heads(device, folder),
            "rounding": lambda: measure(lambda: nudged(first), first, file),
        }
        if device == "cuda":
            ways["device_map"] = lambda: measure(split_by_layers, first, file)
        for way, find in ways.items():
            found, error = one if way == "one_device" else {}, None
            try:
                for recipe, result in find():
                    found[recipe] = result
            except Exception as failure:  # the other ways are still of interest
                error = _spelled(failure)
            rows = compare({recipe: result for recipe, result in found.items() if recipe in one}, one)
            report[way] = {"error": error, "rows": rows}
            (out / "multi_gpu.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            shown = (f"{r['recipe']}: {r['logits_error']:.1e}, parts at {r['partings']}" for r in rows)
            print(way, error or "", *shown, sep="\n ")
    raise typer.Exit(int(any(report[way]["error"] for way in ways)))


if __name__ == "__main__":
    typer.run(main)

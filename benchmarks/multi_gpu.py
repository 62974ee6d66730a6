"""One model on two devices: split by layers (accelerate's device_map) and by heads (tensor parallelism).

    python -m benchmarks.multi_gpu --out benchmarks/results

Tokens must be those of one device. Takes about two minutes on a machine with two GPUs; with --device cpu the
tensor-parallel part runs on two CPU processes. Writes multi_gpu.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import rotatekv_fx
from rotatekv_fx import RotateKVConfig

HERE = Path(__file__).resolve().parent
MODEL = HERE / "reference_model"
PROMPT, NEW, BATCH = 300, 32, 2
CALIBRATION_WINDOWS, CALIBRATION_LENGTH = 4, 512
# Two KV heads a process: what stays within two heads is the same on one device and on two.
WITHIN_TWO_HEADS = {"head_group": 2, "group_size": 128}
RECIPES: dict[str, RotateKVConfig] = {
    "none": RotateKVConfig(recipe="none"),
    "centered, 8 bits": RotateKVConfig(key_bits=8, value_bits=8, window=16, **WITHIN_TWO_HEADS),
    "centered, 2 bits": RotateKVConfig(window=16, **WITHIN_TWO_HEADS),
}
CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
}
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


def measure(load: Callable[[], PreTrainedModel], device: torch.device) -> Found:
    """Tokens on both caches, first logits and bytes of the cache: untransformed, and with each recipe."""
    prompts, windows = texts()
    prompts, model = prompts.to(device), load()
    results = {"untransformed": _run(model, prompts)}
    for name, config in RECIPES.items():
        calibration = None
        if config.recipe != "none":
            calibration = rotatekv_fx.calibrate(model, windows, progress=lambda done, total: None)
        rotatekv_fx.transform(model, config, calibration)
        results[name] = _run(model, prompts)
        results[name]["merged"] = len(rotatekv_fx.report(model).sites[0].merged)
        rotatekv_fx.restore(model)
    return results


@torch.no_grad()
def _run(model: PreTrainedModel, prompts: Tensor) -> Found:
    start, tokens = time.perf_counter(), {}
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
        tokens[name] = output.sequences[:, PROMPT:].tolist()
    return {
        "tokens": tokens,
        "logits": output.logits[0].float().cpu().tolist(),
        "cache_bytes": rotatekv_fx.cache_nbytes(output.past_key_values),
        "seconds": round(time.perf_counter() - start, 2),
    }


def compare(found: Found, one: Found) -> list[Found]:
    """A row for each recipe: whether tokens are those of one device, and how far the first logits are."""
    rows = []
    for name, result in found.items():
        a, b = (torch.tensor(r["logits"]) for r in (result, one[name]))
        rows.append(
            {
                "recipe": name,
                "tokens_equal": {c: result["tokens"][c] == one[name]["tokens"][c] for c in CACHES},
                "logits_error": float((a - b).norm() / b.norm()),
                "cache_bytes": result["cache_bytes"],
                "merged_projections": result.get("merged"),
                "seconds": result["seconds"],
            }
        )
    return rows


def on_one(device: torch.device) -> PreTrainedModel:
    """The whole model on one device."""
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).to(device).eval()


def split_by_layers() -> PreTrainedModel:
    """The first layers on one GPU, the others on the next."""
    model = AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=torch.float32, device_map="auto", max_memory={0: "55MB", 1: "4GB"}
    )
    if len(set(model.hf_device_map.values())) < 2:
        raise RuntimeError(f"device_map='auto' used one device only: {model.hf_device_map}")
    return model


def split_by_heads() -> PreTrainedModel:
    """This process's part of every layer."""
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, tp_plan="auto")


def worker(file: Path, device: str) -> None:
    """One process of the tensor-parallel part; the first one writes what it found."""
    rank = int(os.environ["LOCAL_RANK"])
    place = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(place)
    found = measure(split_by_heads, place)
    if rank == 0:
        file.write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.destroy_process_group()


def by_heads(out: Path, device: str) -> Found:
    """Run two processes under torchrun and read what the first one found."""
    file = out / "tensor_parallel.part.json"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", __spec__.name]
    arguments = ["--out", str(out), "--device", device, "--part", str(file)]
    subprocess.run([sys.executable, *command, *arguments], check=True, timeout=300)
    found = json.loads(file.read_text(encoding="utf-8"))
    file.unlink()
    return found


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
    out.mkdir(parents=True, exist_ok=True)
    first = torch.device(device, 0) if device == "cuda" else torch.device(device)
    one = measure(lambda: on_one(first), first)
    ways: Mapping[str, Callable[[], Found]] = {
        "device_map": lambda: measure(split_by_layers, first),
        "tensor_parallel": lambda: by_heads(out, device),
    }
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    report: Found = {
        "device": name,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "prompt": PROMPT,
        "new_tokens": NEW,
        "batch": BATCH,
        "one_device": compare(one, one),
    }
    for way, find in ways.items():
        if way == "device_map" and device != "cuda":
            continue
        try:
            report[way] = compare(find(), one)
        except Exception as error:  # the other way is still of interest
            report[way] = {"error": f"{type(error).__name__}: {error}"}
        (out / "multi_gpu.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(way, json.dumps(report[way], indent=1), flush=True)


if __name__ == "__main__":
    typer.run(main)

"""A whole decoder with random weights on one GPU: 16 bit as transformers ships it, and the packed cache.

    python -m benchmarks.end_to_end --out benchmarks/results

The 16-bit model runs as shipped, and with the best attention that 16 bit has: cuDNN on grouped heads, without
the mask that makes transformers copy keys and values for each query head. These and ours have a static cache,
compiled, on CUDA graphs; transformers' QuantizedCache, which allows neither, is timed beside them. Caches are
filled directly, then decode steps are timed; prefill is timed apart, on one prompt; the largest batch is
tried, a step of it, uncompiled. Weights and texts are random, so nothing is said about accuracy here:
`benchmarks.decode` compares outputs, and `benchmarks.run_accuracy` models.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import transformers
import typer
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, Qwen3Config, StaticCache

import rotatekv_fx
from rotatekv_fx.errors import InputError
from rotatekv_fx.evaluate.baselines import quantized_cache
from rotatekv_fx.naming import cache_argument

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_COMMON = {
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "use_cache": True,
}
SHAPES = {
    "llama-3-8b": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, **_COMMON,
    ),
    "llama-2-7b": LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_attention_heads=32,
        num_key_value_heads=32, head_dim=128, **_COMMON,
    ),
    "qwen3-8b": Qwen3Config(
        vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, **{**_COMMON, "num_hidden_layers": 36},
    ),
    "tiny": LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=256, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, **{**_COMMON, "num_hidden_layers": 2},
    ),
}  # fmt: skip


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA on grouped heads over the whole buffer; query heads of a KV head are rows of one product."""
    if query.shape[2] == 1:
        rows = query.view(query.shape[0], key.shape[1], -1, query.shape[3])
        out = F.scaled_dot_product_attention(rows, key, value, scale=scaling).view(query.shape)
    else:
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("grouped", grouped_attention)  # transformers makes no mask for it


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds(function: Callable[[], object], repeats: int) -> float:
    """Mean time of a call, after the device has finished all."""
    synchronize()
    begin = time.perf_counter()
    for _ in range(repeats):
        function()
    synchronize()
    return (time.perf_counter() - begin) / repeats


def build(config: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()


@torch.no_grad()
def filled(model: torch.nn.Module, batch: int, context: int, room: int) -> StaticCache:
    """A static cache that says it holds `context` tokens, filled with random ones."""
    cache = StaticCache(config=model.config, max_cache_len=context + room)
    prompt = torch.ones(batch, 2, dtype=torch.long, device=DEVICE)
    model(prompt, **{cache_argument(model): cache})
    for layer in cache.layers:
        if getattr(layer, "keys", None) is not None:
            layer.keys.normal_()
            layer.values.normal_()
        else:
            for codes, scale, offset in layer.history.parts:
                codes.random_(0, 256)
                scale.fill_(0.5)
                offset.fill_(-0.75)
            for (exact,) in layer.recent.parts:
                exact.normal_()
            layer.recent.counted(context)
            layer.history.counted(context - layer.window)
        layer.cumulative_length.fill_(context)
    return cache


@torch.no_grad()
def decode(
    model: torch.nn.Module, cache: StaticCache, batch: int, context: int, steps: int
) -> dict[str, float]:
    """Compile one step, warm it up, and time others."""
    torch._dynamo.reset()
    compiled = torch.compile(model, mode="reduce-overhead" if DEVICE == "cuda" else "default", fullgraph=True)
    token = torch.ones(batch, 1, dtype=torch.long, device=DEVICE)
    place = torch.full((1, 1), context, dtype=torch.long, device=DEVICE)
    held = {cache_argument(model): cache}

    def step() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        logits = compiled(token, **held, position_ids=place, logits_to_keep=1).logits
        token.copy_(logits[:, -1].argmax(-1, keepdim=True))
        place.add_(1)

    begin = time.perf_counter()
    for _ in range(4):
        step()
    synchronize()
    compiling = time.perf_counter() - begin
    before = torch.cuda.memory_allocated() if DEVICE == "cuda" else 0
    spent = seconds(step, steps)
    after = torch.cuda.memory_allocated() if DEVICE == "cuda" else 0
    return {
        "tokens_per_second": batch / spent,
        "milliseconds_a_step": spent * 1e3,
        "compile_seconds": compiling,
        "cache_gigabytes": rotatekv_fx.cache_nbytes(cache) / 1e9,
        "memory_grown_while_decoding": after - before,
    }


@torch.no_grad()
def prefill_seconds(model: torch.nn.Module, context: int) -> float:
    """Time of one prompt on an empty static cache, the second of two."""
    prompt = torch.randint(3, model.config.vocab_size, (1, context), device=DEVICE)

    def once() -> None:
        cache = StaticCache(config=model.config, max_cache_len=context + 64)
        model(prompt, **{cache_argument(model): cache}, logits_to_keep=1)

    once()
    return min(seconds(once, 1) for _ in range(2))


@torch.no_grad()
def measure_quantized_cache(model: torch.nn.Module, batch: int, context: int, steps: int) -> dict[str, Any]:
    """transformers' QuantizedCache, which cannot be compiled, where its HQQ is installed."""
    row: dict[str, Any] = {"cache": "QuantizedCache, HQQ, 2 bits", "batch": batch, "context": context}
    try:
        cache = quantized_cache(model)
    except InputError as error:
        return row | {"not_measured": str(error)}
    config = model.config
    shape = batch, config.num_key_value_heads, context, config.head_dim
    cache.update(*(torch.randn(shape, device=DEVICE, dtype=model.dtype) for _ in range(2)), 0)
    for layer in range(1, config.num_hidden_layers):  # quantizing takes seconds a layer
        cache.layers[layer] = copy.deepcopy(cache.layers[0])
    token = torch.ones(batch, 1, dtype=torch.long, device=DEVICE)

    def step() -> None:
        model(token, **{cache_argument(model): cache}, logits_to_keep=1)

    step()
    spent = seconds(step, steps)
    return row | {"tokens_per_second": batch / spent, "milliseconds_a_step": spent * 1e3}


@contextlib.contextmanager
def freed() -> Iterator[None]:
    try:
        yield
    finally:
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


@torch.no_grad()
def largest_batch(model: torch.nn.Module, context: int, bytes_a_sequence: float) -> int:
    """Sequences of `context` tokens with which a decode step runs: the largest number tried that does."""
    if DEVICE != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info()
    batch = int(free // bytes_a_sequence)
    while batch:
        with contextlib.suppress(torch.OutOfMemoryError), freed():
            cache = filled(model, batch, context, 16)
            token = torch.ones(batch, 1, dtype=torch.long, device=DEVICE)
            place = torch.full((1, 1), context, dtype=torch.long, device=DEVICE)
            model(token, **{cache_argument(model): cache}, position_ids=place, logits_to_keep=1)
            torch.cuda.synchronize()
            return batch
        cache = None
        batch -= max(1, batch // 50)
    return 0


def measure(
    model: torch.nn.Module, name: str, batch: int, context: int, steps: int, prompt: int, largest: bool = True
) -> dict[str, Any]:
    row: dict[str, Any] = {"cache": name, "batch": batch, "context": context, "prompt": prompt}
    with freed():
        row["prefill_seconds"] = prefill_seconds(model, prompt)
    with freed():
        cache = filled(model, batch, context, steps + 16)
        row |= decode(model, cache, batch, context, steps)
        del cache
    torch._dynamo.reset()
    with freed():
        pass
    if largest:
        row["largest_batch"] = largest_batch(model, context, row["cache_gigabytes"] * 1e9 / batch)
    return row


def main(
    out: Annotated[Path, typer.Option(help="folder that receives end_to_end_SHAPE.json")] = Path(
        "benchmarks/results"
    ),
    shape: Annotated[str, typer.Option(help=", ".join(SHAPES))] = "llama-3-8b",
    layers: Annotated[int, typer.Option(min=0, help="cut the model short; 0 takes all layers")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="sequences")] = 16,
    context: Annotated[int, typer.Option(min=128, help="tokens that the caches hold")] = 32768,
    prompt: Annotated[int, typer.Option(min=1, help="tokens of the prompt whose prefill is timed")] = 32768,
    steps: Annotated[int, typer.Option(min=1, help="tokens decoded while the time is taken")] = 32,
) -> None:
    """Measure one shape and write end_to_end_SHAPE.json."""
    if shape not in SHAPES:
        raise typer.BadParameter(f"{shape!r} is no shape; use {', '.join(SHAPES)}.")
    if DEVICE == "cpu" and shape != "tiny":
        raise SystemExit(f"no GPU found, and {shape} needs one; --shape tiny runs on a CPU.")
    logging.basicConfig(level=logging.ERROR)
    config = SHAPES[shape]
    if layers:
        config.num_hidden_layers = layers
    model = build(config)
    report: dict[str, Any] = {
        "shape": shape,
        "layers": config.num_hidden_layers,
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rows": [],
    }
    out.mkdir(parents=True, exist_ok=True)

    def keep(row: dict[str, Any]) -> None:
        """Write what is known so far: a run takes minutes."""
        report["rows"].append(row)
        (out / f"end_to_end_{shape}.json").write_text(json.dumps(report, indent=1) + "\n")
        print(json.dumps(row), flush=True)

    # as shipped it copies keys and values for each query head: the next row's largest batch is larger
    keep(measure(model, "16 bit, as shipped", batch, context, steps, prompt, largest=False))
    model.set_attn_implementation("grouped")
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if DEVICE == "cuda" else contextlib.nullcontext():
        keep(measure(model, "16 bit, cuDNN on grouped heads", batch, context, steps, prompt))
    model.set_attn_implementation("sdpa")
    with freed():
        keep(measure_quantized_cache(model, batch, context, min(steps, 4)))
    begin = time.perf_counter()
    text = torch.randint(3, config.vocab_size, (1, 512), device=DEVICE)
    calibration = rotatekv_fx.calibrate(model, [text])
    rotatekv_fx.transform(model, rotatekv_fx.RotateKVConfig(keep_originals=False), calibration)
    report["transform_seconds"] = time.perf_counter() - begin
    report["lowered"] = dict(rotatekv_fx.report(model).sites[0].lowered)
    keep(measure(model, "centered, 2 bits, window 64", batch, context, steps, prompt))


if __name__ == "__main__":
    typer.run(main)

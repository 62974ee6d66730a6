"""Decode attention on a GPU: the packed cache against 16-bit SDPA, in one run, by CUDA graph.

    python -m benchmarks.decode --out benchmarks/results

The timed region of ours is query transform, append, attention and combine; of SDPA, attention alone. Each
sequence has a cache of its own, and short contexts rotate through copies until they are past the L2 cache;
what a model has just made (query, new key and value, count) is one for all copies, here as for SDPA.
Every row's output is first compared with the fp32 reference on the same codes; a row that is off has no time.
Recipe `centered` is measured, or with `--recipe paper` that one, whose keys are rotated back and turned by
RoPE while they are read.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import triton
import typer
from torch.nn.attention import SDPBackend, sdpa_kernel

from rotatekv_fx.cache.before_rope import in_places
from rotatekv_fx.cache.keymap import reach_of
from rotatekv_fx.kernels import tuning
from rotatekv_fx.kernels.attention import reference
from rotatekv_fx.kernels.attention.before_rope import decode_before_rope
from rotatekv_fx.kernels.attention.triton import decode
from rotatekv_fx.kernels.held import Held, Scoring
from rotatekv_fx.recipes.base import hadamard

WINDOW, SLACK, SINKS, PAIRS, HEAD_GROUP = 64, 32, 20, 32, 4
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
ERROR_LIMIT = 0.01


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sequences, query and KV heads, tokens, channels of a head."""

    batch: int
    query_heads: int
    heads: int
    context: int
    dim: int = 128

    @property
    def bytes16(self) -> int:
        return 4 * self.batch * self.heads * self.context * self.dim


def packed_arguments(shape: Shape) -> list[object]:
    """Arguments of `decode` for a filled cache of random codes: recipe `centered`, 2 bits, head_group 1."""
    b, h, d, held, bits = shape.batch, shape.heads, shape.dim, shape.context - WINDOW + 1, 2
    device = torch.device("cuda")
    group = 128
    unit = max(1, group // d)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=device)

    history = []
    for low, high in ((0.4, 0.8), (0.3, 0.6)):
        groups = h * d // group
        scale = (torch.rand(b, groups, held, device=device) * (high - low) + low).half()
        history += [
            torch.randint(0, 256, (b, groups, held, group * bits // 8), dtype=torch.uint8, device=device),
            scale,
            (-1.5 * scale + 0.05 * randn(b, groups, held)).half(),
        ]
    recent = [randn(b, h, WINDOW + SLACK, d).bfloat16() for _ in range(2)]
    tokens = torch.arange(SINKS, device=device, dtype=torch.int32).expand(b, -1).contiguous()
    sinks = [randn(b, h, SINKS, d).bfloat16(), randn(b, h, SINKS, d).bfloat16(), tokens]
    history[1][:, :, :SINKS] *= -1
    matrix = torch.stack([torch.linalg.qr(randn(unit * d, unit * d))[0] for _ in range(h // unit)])
    mean, angles = randn(h // unit, 2 * PAIRS, unit * d), 10000.0 ** -(torch.arange(PAIRS).double() / PAIRS)
    rotation = torch.cat([randn(h, d, unit * d) / math.sqrt(d), randn(h, d, 2 * PAIRS) / d], -1)
    steps = torch.arange(tuning.TABLE_TOKENS).double()[:, None] * angles
    key_map = [
        matrix, mean, rotation, angles.to(device),
        torch.cat([steps.cos(), steps.sin()], -1).half().to(device), reach_of(rotation, unit * d),
    ]  # fmt: skip
    query = randn(b, shape.query_heads, 1, d).bfloat16()
    key, value = randn(b, h, 1, d).bfloat16(), randn(b, h, 1, d).bfloat16()
    count = torch.tensor(shape.context - 1, device=device)
    held = Held(
        history, recent, sinks, key_map, count.view(1, 1).clone(), count, 0, bits, bits, group, group,
        0.7, 0.7, "midpoint", WINDOW, False,
    )  # fmt: skip
    return [query, key, value, held, Scoring(None, 0, 0, d**-0.5, 0.0, None)]


def paper_arguments(shape: Shape) -> list[object]:
    """Arguments of `decode_before_rope` for a filled cache of random codes: recipe `paper`, 2 bits."""
    b, h, d, bits, group = shape.batch, shape.heads, shape.dim, 2, 128
    device = torch.device("cuda")

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=device)

    history = []
    for _ in range(2):
        sizes = (b, h * d // group, shape.context)
        history += [
            torch.randint(0, 256, (*sizes, group * bits // 8), dtype=torch.uint8, device=device),
            (torch.rand(sizes, device=device) * 0.4 + 0.4).half(),
            torch.randint(1, 3, sizes, dtype=torch.int16, device=device),
        ]
    tokens = torch.arange(SINKS, device=device, dtype=torch.int32).expand(b, -1).contiguous()
    sinks = [randn(b, h, SINKS, d).bfloat16(), randn(b, h, SINKS, d).bfloat16(), tokens]
    history[1][:, :, :SINKS] *= -1
    theta = 500000.0 ** -(torch.arange(d // 2).double() / (d // 2))
    partner = (torch.arange(d) + d // 2) % d
    key_map = [
        torch.randperm(h * d, device=device).int()[None],
        hadamard(d).float().sign() / 16,
        hadamard(HEAD_GROUP).float() * 16 / d**0.5,
        *in_places(partner, torch.ones(d), torch.cat([-theta, theta])),
    ]
    count = torch.tensor(shape.context - 1, device=device)
    held = Held(
        history, [], sinks, [t.to(device) for t in key_map], count.view(1, 1).clone(), count, 0, bits, bits,
        group, group, 0.8, 0.8, "zero_point", 0, False,
    )  # fmt: skip
    new = [randn(b, n, 1, d).bfloat16() for n in (shape.query_heads, h, h)]
    return [*new, held, Scoring(None, 0, 0, d**-0.5, 0.0, None)]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Arguments of a recipe's op, its reference and kernels, settings, and the shapes to measure."""

    arguments: Callable[[Shape], list[object]]
    plain: Callable[..., torch.Tensor]
    run: Callable[..., torch.Tensor]
    settings: dict[str, int]
    sweeps: dict[str, list[Shape]]


LARGE = [Shape(1, 32, 8, 131072), Shape(16, 32, 8, 32768), Shape(64, 32, 8, 8192), Shape(8, 32, 32, 8192)]
RECIPES = {
    "centered": Recipe(
        packed_arguments,
        reference.decode,
        decode,
        {"window": WINDOW, "slack": SLACK, "sinks": SINKS, "position_pairs": PAIRS, "head_group": 1},
        {
            "main": LARGE,
            "context": [Shape(1, 32, 8, 1024 << i) for i in range(9)],
            "batch 8k": [Shape(b, 32, 8, 8192) for b in (1, 2, 4, 8, 16, 32, 64, 128)],
            "batch 32k": [Shape(b, 32, 8, 32768) for b in (1, 2, 4, 8, 16, 32)],
            "heads": [Shape(16, 32, h, 8192) for h in (32, 8, 4)],
        },
    ),
    "paper": Recipe(
        paper_arguments,
        reference.decode_before_rope,
        decode_before_rope,
        {"window": 0, "sinks": SINKS, "head_group": HEAD_GROUP},
        {"main": LARGE},
    ),
}


def error_of(arguments: list, recipe: Recipe) -> float:
    """Relative RMS error of the first sequence's output, against the fp32 reference on the same codes."""
    query, key, value, held, scoring = arguments
    history, recent, sinks = (
        [t[:1].clone() for t in group] for group in (held.history, held.recent, held.sinks)
    )
    first = dataclasses.replace(held, history=history, recent=recent, sinks=sinks)
    expected = recipe.plain(query[:1].float(), key[:1], value[:1], first, scoring)
    actual = recipe.run(*arguments)[:1].float()
    return float((actual - expected).norm() / expected.norm())


def seconds(functions: list[Callable[[], object]], repeats: int = 7) -> float:
    """Median time of one function, the list replayed as one CUDA graph."""
    for function in functions:
        function()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        functions[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for function in functions:
            function()
    graph.replay()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1000 / len(functions))
    return statistics.median(times)


def sdpa_seconds(shape: Shape, copies: int) -> dict[str, float]:
    """Time of each SDPA backend, queries as they are and with those of a KV head as rows."""
    b, h, d, repeats = shape.batch, shape.heads, shape.dim, shape.query_heads // shape.heads
    caches = [
        [torch.randn(b, h, shape.context, d, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        for _ in range(copies)
    ]
    query = torch.randn(b, shape.query_heads, 1, d, device="cuda", dtype=torch.bfloat16)
    times = {}
    for name, backend in BACKENDS.items():
        forms = {"": (query, repeats > 1)}
        if repeats > 1:
            forms[" rows"] = (query.view(b, h, repeats, d), False)
        for suffix, (q, gqa) in forms.items():
            try:
                with sdpa_kernel(backend):
                    times[name + suffix] = seconds(
                        [
                            lambda q=q, k=k, v=v, gqa=gqa: F.scaled_dot_product_attention(
                                q, k, v, enable_gqa=gqa
                            )
                            for k, v in caches
                        ]
                    )
            except RuntimeError:  # the backend does not take this shape
                continue
    return times


def flashinfer_seconds(shape: Shape, copies: int) -> float:
    """Time of FlashInfer's decode attention on a paged cache."""
    import flashinfer

    b, h, d, page = shape.batch, shape.heads, shape.dim, 16
    pages = shape.context // page
    indptr = torch.arange(b + 1, device="cuda", dtype=torch.int32) * pages
    indices = torch.arange(b * pages, device="cuda", dtype=torch.int32)
    last = torch.full((b,), page, device="cuda", dtype=torch.int32)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(256 << 20, dtype=torch.uint8, device="cuda"),
        "HND",
        use_cuda_graph=True,
        use_tensor_cores=shape.query_heads // h >= 4,
        paged_kv_indptr_buffer=indptr.clone(),
        paged_kv_indices_buffer=indices.clone(),
        paged_kv_last_page_len_buffer=last.clone(),
    )
    kind = torch.bfloat16
    wrapper.plan(indptr, indices, last, shape.query_heads, h, d, page, q_data_type=kind, kv_data_type=kind)
    query = torch.randn(b, shape.query_heads, d, device="cuda", dtype=kind)
    size = b * pages, 2, h, page, d
    caches = [torch.randn(size, device="cuda", dtype=kind) for _ in range(copies)]
    return seconds([lambda c=c: wrapper.run(query, c) for c in caches])


@functools.cache
def without_flashinfer() -> str:
    """Why FlashInfer is not measured, or nothing: it may not be installed, and it is compiled on the spot."""
    try:
        for query_heads in (32, 8):  # with and without tensor cores
            flashinfer_seconds(Shape(1, query_heads, 8, 1024), 1)
    except Exception as error:  # a compiler fails in many ways
        return f"{type(error).__name__}: {error}"[:300]
    return ""


def copies_for(nbytes: int) -> int:
    """Caches to rotate through, so that their bytes pass three times the L2 cache."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(64, -(-3 * cache // nbytes)))


def on_cache_of(others: list, arguments: list) -> list[object]:
    """The same step on another cache."""
    query, key, value, held, scoring = arguments
    held = dataclasses.replace(others[3], count=held.count, position=held.position)
    return [query, key, value, held, scoring]


def measure(shape: Shape, recipe: Recipe) -> dict[str, object]:
    """One row: times, error, and bytes a second."""
    torch.manual_seed(0)
    packed_bytes = shape.bytes16 * 2.25 / 16
    row: dict[str, object] = dataclasses.asdict(shape)
    arguments = recipe.arguments(shape)
    row["error"] = error_of(arguments, recipe)
    if row["error"] < ERROR_LIMIT:
        copies = range(copies_for(int(packed_bytes)) - 1)
        runs = [arguments] + [on_cache_of(recipe.arguments(shape), arguments) for _ in copies]
        ours = seconds([lambda a=a: recipe.run(*a) for a in runs])
        row |= {"microseconds": ours * 1e6, "packed_terabytes_per_second": packed_bytes / ours / 1e12}
        del runs
    del arguments
    torch.cuda.empty_cache()
    times = sdpa_seconds(shape, copies_for(shape.bytes16))
    torch.cuda.empty_cache()
    row["sdpa_microseconds"] = {k: v * 1e6 for k, v in times.items()}
    if not without_flashinfer():
        row["flashinfer_microseconds"] = flashinfer_seconds(shape, copies_for(shape.bytes16)) * 1e6
        torch.cuda.empty_cache()
    best = min(times, key=times.__getitem__)
    row["best_sdpa"] = best
    row["sdpa_terabytes_per_second"] = shape.bytes16 / times[best] / 1e12
    if "microseconds" in row:
        row["speedup"] = times[best] * 1e6 / row["microseconds"]
    torch.cuda.empty_cache()
    return row


def report_of(recipe: str) -> dict[str, object]:
    """What a report begins with, once it is sure that the recipe is known and that there is a GPU."""
    if recipe not in RECIPES:
        raise typer.BadParameter(f"{recipe!r} is not measured here; use {' or '.join(RECIPES)}.")
    if not torch.cuda.is_available():
        raise SystemExit("no GPU found: the kernels are measured on one.")
    return {
        "gpu": torch.cuda.get_device_properties(0).name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "recipe": recipe,
        "settings": RECIPES[recipe].settings,
    }


def main(
    out: Annotated[Path, typer.Option(help="folder that receives decode_RECIPE.json")],
    recipe: Annotated[str, typer.Option(help=" or ".join(RECIPES))] = "centered",
) -> None:
    """Measure all shapes of a recipe, each once, and write decode_RECIPE.json after each."""
    report = report_of(recipe)
    report |= {"cudnn": torch.backends.cudnn.version(), "flashinfer_not_measured": without_flashinfer()}
    rows = report["rows"] = []
    out.mkdir(parents=True, exist_ok=True)
    measured: dict[Shape, dict[str, object]] = {}
    for name, shapes in RECIPES[recipe].sweeps.items():
        for shape in shapes:
            row = measured[shape] = measured.get(shape) or measure(shape, RECIPES[recipe])
            rows.append({"sweep": name, **row})
            (out / f"decode_{recipe}.json").write_text(json.dumps(report, indent=1) + "\n")
            print(
                f"{name:10} B{shape.batch} {shape.query_heads}/{shape.heads} {shape.context}: "
                f"{row.get('microseconds', math.nan):.1f} us, error {row['error']:.2e}, {row['best_sdpa']} "
                f"{min(row['sdpa_microseconds'].values()):.1f} us, x{row.get('speedup', math.nan):.2f}, "
                f"FlashInfer {row.get('flashinfer_microseconds', math.nan):.1f} us",
                flush=True,
            )


if __name__ == "__main__":
    typer.run(main)

"""The Triton kernels of decode attention against the plain reference: interpreted on a CPU, and on a GPU."""

import dataclasses
import math
import os

import pytest
import torch

from rotatekv_fx.cache.keymap import reach_of
from rotatekv_fx.kernels.attention import reference
from rotatekv_fx.kernels.held import Held, Scoring
from rotatekv_fx.kernels.quantize.reference import packed_bytes
from rotatekv_fx.kernels.tuning import TABLE_TOKENS

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float32 if INTERPRETED else torch.bfloat16  # the interpreter truncates to bfloat16

CASES = {
    "grouped": {},
    "one query head": {"query_heads": 2},
    "sixteen query heads": {"query_heads": 32},
    "queries of unlike sizes": {"sizes": (-12.0, 0.5)},
    "queries along a column": {"along": True},
    "3 bits, queries along a column": {"along": True, "bits": (3, 3)},
    "six sequences": {"batch": 6, "length": 130, "capacity": 144},
    "dim 64, heads share a group": {"dim": 64, "query_heads": 8},
    "dim 96": {"dim": 96, "heads": 4, "query_heads": 8},
    "dim 256": {"dim": 256, "query_heads": 4},
    "heads mixed": {"head_group": 2},
    "3 bits": {"bits": (3, 3)},
    "4 and 8 bits": {"bits": (4, 8)},
    "8 and 4 bits": {"bits": (8, 4)},
    "group 64": {"group": 64},
    "group 32": {"group": 32, "bits": (2, 4)},
    "zero points": {"scheme": "zero_point", "pairs": 0},
    "a window of one token": {"window": 1},
    "no window": {"window": 0},
    "no window, no sinks": {"window": 0, "sinks": 0},
    "no window, single": {"window": 0, "dtype": torch.float32},
    "softcap": {"softcap": 5.0},
    "sink logits": {"logits": True},
    "left padding": {"padding": (0, 70)},
    "left padding, a mask that is added": {"padding": (0, 70), "added": torch.float32, "softcap": 5.0},
    "left padding, added in bfloat16": {"padding": (0, 70), "added": torch.bfloat16},
    "left padding, added in half": {"padding": (0, 70), "added": torch.float16, "window": 0},
    "sliding": {"sliding": 96, "capacity": 80, "wraps": True, "length": 201},
    "short": {"length": 20},
    "first token": {"length": 0, "sinks": 0},
    "counted": {"counted": True},
    "half": {"dtype": torch.float16},
    "single": {"dtype": torch.float32},
}


def empty_layer(
    g, dim, heads, batch, length, capacity, ring, sinks, bits, group, scheme, dtype
):  # fmt: skip
    """Keys and values of `length` tokens and one more, and tensors of a layer that has none of them but its
    sinks: history, recent, sinks.
    """
    exact = torch.float16 if dtype is torch.float32 else dtype
    history = []
    for b in bits:
        groups = heads * dim // group
        history += [
            torch.full((batch, groups, capacity, packed_bytes(group, b)), 0xA5, dtype=torch.uint8),
            torch.full((batch, groups, capacity), float("nan"), dtype=torch.float16),
            torch.full((batch, groups, capacity), float("nan")).to(
                torch.float16 if scheme == "midpoint" else torch.int16
            ),
        ]
    recent = (
        [torch.full((batch, heads, ring, dim), float("nan"), dtype=exact) for _ in range(2)] if ring else []
    )
    tokens = max(length, 1)
    keys = (torch.randn(batch, heads, tokens + 1, dim, generator=g) + 0.3).to(dtype)
    values = torch.randn(batch, heads, tokens + 1, dim, generator=g).to(dtype)
    store = []
    if sinks:
        chosen = torch.stack([torch.randperm(tokens, generator=g)[:sinks] for _ in range(batch)]).int()
        chosen[0, -1] = -1
        at = chosen.clamp(min=0).long()[:, None, :, None].expand(-1, heads, -1, dim)
        store = [keys.gather(2, at).to(exact), values.gather(2, at).to(exact), chosen]
    return keys, values, history, recent, store


def padding_mask(padding, batch, columns, added=None):
    """Hides the first tokens of each sequence, as many as `padding` says; None without padding. A mask to be
    added, of dtype `added`, says something of the others too.
    """
    if not padding:
        return None
    mask = torch.ones(batch, columns, dtype=torch.bool)
    for b, count in enumerate(padding):
        mask[b, :count] = False
    if added is None:
        return mask
    bias = torch.randn(mask.shape, generator=torch.Generator().manual_seed(3)).to(added)
    return bias.masked_fill(~mask, torch.finfo(added).min)


def build(
    dim=128, heads=2, query_heads=8, batch=2, length=300, capacity=320, window=64, slack=8, sinks=6,
    bits=(2, 2), group=128, head_group=1, scheme="midpoint", pairs=16, softcap=0.0, logits=False, padding=(),
    added=None, sliding=0, wraps=False, counted=False, dtype=DTYPE, sizes=(0.0, 0.0), along=False,
    seed=0,
):  # fmt: skip
    """Arguments of `decode` for a cache of `length` tokens, filled by the reference: query, key, value,
    Held, Scoring.
    """
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    unit = math.lcm(head_group, *(group // math.gcd(group, dim) for _ in range(2)))
    units, channels = heads // unit, unit * dim
    blocks = [
        torch.linalg.qr(randn(head_group * dim, head_group * dim))[0] for _ in range(heads // head_group)
    ]
    per_unit = unit // head_group
    matrix = torch.stack([torch.block_diag(*blocks[u * per_unit : (u + 1) * per_unit]) for u in range(units)])
    angles = torch.zeros(pairs, dtype=torch.float64)
    angles[: pairs // 2] = 10000.0 ** -(torch.arange(pairs // 2, dtype=torch.float64) / max(1, pairs // 2))
    cos_part, sin_part = (randn(heads, pairs, dim) * 0.5 for _ in range(2))
    flat = torch.zeros(units, 2 * pairs, channels)
    rotation = torch.zeros(heads, dim, channels + 2 * pairs)
    for h in range(heads):
        u, at = h // unit, h % unit * dim
        flat[u, :pairs, at : at + dim], flat[u, pairs:, at : at + dim] = cos_part[h], sin_part[h]
        rotation[h, :, :channels] = torch.linalg.inv(matrix[u])[:, at : at + dim].T
        rotation[h, :, channels : channels + pairs] = cos_part[h].T
        rotation[h, :, channels + pairs :] = sin_part[h].T
    steps = torch.arange(TABLE_TOKENS, dtype=torch.float64)[:, None] * angles
    key_map = [
        matrix, flat @ matrix, rotation, angles,
        torch.cat([steps.cos(), steps.sin()], -1).half(), reach_of(rotation, channels),
    ]  # fmt: skip
    ring = window + slack if window else 0
    keys, values, history, recent, store = empty_layer(
        g, dim, heads, batch, length, capacity, ring, sinks, bits, group, scheme, dtype
    )
    shift = (7 - 10 * torch.arange(batch))[:, None]
    held = Held(
        history, recent, store, key_map, shift + length - 1, None, 0, *bits, group, group, 0.7, 0.8, scheme,
        window, wraps,
    )  # fmt: skip
    if length:
        reference.extend(keys[:, :, :length], values[:, :, :length], held)
    mask = padding_mask(padding, batch, length + 1, added)
    held = dataclasses.replace(
        held, position=shift + length, count=torch.tensor(length) if counted else None,
        number=0 if counted else length,
    )  # fmt: skip
    query = randn(batch, query_heads, 1, dim) * torch.logspace(*sizes, query_heads)[:, None, None]
    if along:  # the first column of their head's matrix, as long as any: its number is at its bound
        query = rotation[:, :, 0].repeat_interleave(query_heads // heads, 0)[None, :, None].expand_as(query)
    return [
        query.to(dtype), keys[:, :, length : length + 1],
        values[:, :, length : length + 1], held,
        Scoring(mask, 0, sliding, dim**-0.5, softcap, randn(query_heads) if logits else None),
    ]  # fmt: skip


def copied(x, device="cpu"):
    if isinstance(x, torch.Tensor):
        return x.to(device, copy=True)
    if isinstance(x, Held | Scoring):
        return type(x)(*copied(list(vars(x).values()), device))
    return [copied(y, device) for y in x] if isinstance(x, list) else x


def relative(actual, expected):
    difference = (actual.float().cpu() - expected.float()).square().mean().sqrt()
    return float(difference / expected.float().square().mean().sqrt())


QUICK = (
    "grouped",
    "queries of unlike sizes",
    "3 bits, queries along a column",
    "dim 64, heads share a group",
    "3 bits",
    "left padding",
    "sliding",
    "first token",
)


def marked(cases, quick):
    """Names of cases; those that are not `quick` take long under the interpreter."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in cases]


needs_kernels = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU, or TRITON_INTERPRET=1"
)


@needs_kernels
@pytest.mark.gpu
@pytest.mark.parametrize("name", marked(CASES, QUICK))
def test_decode_matches_the_reference(name):
    from rotatekv_fx.kernels.attention import triton as kernels

    arguments = build(**CASES[name])
    expected_arguments, actual_arguments = copied(arguments), copied(arguments, DEVICE)
    expected = reference.decode(expected_arguments[0].float(), *expected_arguments[1:])
    actual = kernels.decode(*actual_arguments)
    assert not actual.isnan().any()
    assert relative(actual, expected) < (3e-3 if actual.dtype is torch.bfloat16 else 1.5e-3)
    for now, wanted in zip(actual_arguments[3].recent, expected_arguments[3].recent, strict=True):
        torch.testing.assert_close(now.cpu(), wanted, rtol=0, atol=0, equal_nan=True)
    for now, wanted in zip(actual_arguments[3].history, expected_arguments[3].history, strict=True):
        same = (now.cpu() == wanted) | (now.cpu().float().isnan() & wanted.float().isnan())
        assert same.float().mean() > 0.999


@needs_kernels
@pytest.mark.gpu
@pytest.mark.parametrize("name", marked(["grouped", "heads mixed", "six sequences", "dim 256"], ["grouped"]))
def test_keys_may_be_transformed_before_the_rest(name, monkeypatch):
    from rotatekv_fx.kernels import tuning

    choice = tuning.decode_choice
    monkeypatch.setattr(
        tuning, "decode_choice",
        lambda *args: dataclasses.replace(choice(*args), turns_first=True, turn_columns=32),
    )  # fmt: skip
    test_decode_matches_the_reference(name)


needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


@needs_kernels
@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("new", [1, 40, 90])
@pytest.mark.parametrize("dim, window", [(128, 64), (64, 64), (128, 0)])
def test_extend_matches_the_reference(new, dim, window):
    from rotatekv_fx.kernels.quantize import triton as kernels

    arguments = build(dim=dim, window=window, length=100, capacity=208)
    _, key, value, held, *_ = arguments
    g = torch.Generator().manual_seed(1)
    key, value = (torch.randn(*x.shape[:2], new, x.shape[3], generator=g).to(x.dtype) for x in (key, value))
    held = dataclasses.replace(held, position=held.position + new - 1)
    expected, actual = copied([key, value, held]), copied([key, value, held], DEVICE)
    reference.extend(*expected)
    kernels.extend(*actual)
    for now, wanted in zip(actual[2].recent, expected[2].recent, strict=True):
        torch.testing.assert_close(now.cpu(), wanted, rtol=0, atol=0, equal_nan=True)
    for now, wanted in zip(actual[2].history, expected[2].history, strict=True):
        same = (now.cpu() == wanted) | (now.cpu().float().isnan() & wanted.float().isnan())
        assert same.float().mean() > 0.999


@needs_gpu
@pytest.mark.gpu
def test_a_cache_past_two_gigabytes():
    from rotatekv_fx.kernels.attention import triton as kernels

    small = copied(build(batch=1, heads=8, query_heads=8, capacity=320), DEVICE)
    query, key, value, held, *rest = small
    sequences, capacity = 65, 131072

    def many(x):
        return x.expand(sequences, *x.shape[1:]).contiguous()

    large_history = []
    for part in held.history:
        large = torch.zeros(
            sequences, part.shape[1], capacity, *part.shape[3:], dtype=part.dtype, device=DEVICE
        )
        large[-1, :, : part.shape[2]] = part[0]
        large_history.append(large)
    assert large_history[0].nbytes > 2**31
    large_held = dataclasses.replace(
        held, history=large_history, recent=[*map(many, held.recent)], sinks=[*map(many, held.sinks)]
    )
    large = [*map(many, (query, key, value)), large_held, *rest]
    expected = kernels.decode(*small)
    assert relative(kernels.decode(*large)[-1:], expected.cpu()) < 3e-3
    leaving = held.number - held.window + 1  # what the step quantized, rounded alike but for close calls
    for now, wanted in zip(large_history, held.history, strict=True):
        now, wanted = now[-1, :, : wanted.shape[2]], wanted[0]
        assert (now == wanted).float().mean() > 0.7  # NaN where nothing is held
        if now.dtype is torch.uint8:
            assert (now[:, leaving] == wanted[:, leaving]).float().mean() > 0.9
        else:
            torch.testing.assert_close(now[:, leaving], wanted[:, leaving], rtol=5e-3, atol=1e-3)


def compiled_kernels():
    """How many times each kernel of a decoding step was compiled."""
    from rotatekv_fx.kernels.attention import triton as kernels
    from rotatekv_fx.kernels.quantize import triton as quantize_kernels

    every = (quantize_kernels.step_kernel, kernels.decode_kernel, kernels.finish_kernel)
    return [sum(len(caches[0]) for caches in kernel.device_caches.values()) for kernel in every]


@needs_gpu
@pytest.mark.gpu
def test_lengths_share_compiled_kernels():
    from rotatekv_fx.kernels.attention import triton as kernels

    counts = []
    for length in (100, 16, 129, 257, 300):
        kernels.decode(*copied(build(length=length, sinks=6), DEVICE))
        counts.append(compiled_kernels())
    assert min(counts[0]) > 0
    assert all(count == counts[0] for count in counts)


@needs_gpu
@pytest.mark.gpu
def test_a_growing_cache_is_compiled_for_few_sizes():
    from rotatekv_fx.kernels.attention import triton as kernels

    before = compiled_kernels()
    for power in range(5, 18):
        for capacity in (1 << power, 3 << power - 1):
            arguments = build(batch=1, heads=8, query_heads=32, length=31, capacity=capacity, softcap=7.0)
            kernels.decode(*copied(arguments, DEVICE))
    added = [now - then for now, then in zip(compiled_kernels(), before, strict=True)]
    assert added[1] > 0
    assert all(count <= 3 for count in added)


@needs_gpu
@pytest.mark.gpu
def test_a_graph_replays_what_eager_computes():
    from rotatekv_fx.kernels.attention import triton as kernels

    arguments = copied(build(counted=True), DEVICE)
    eager, captured = copied(arguments, DEVICE), copied(arguments, DEVICE)
    expected = kernels.decode(*eager)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = kernels.decode(*captured)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(actual, expected)
    after, wanted_after = ([*a[3].history, *a[3].recent] for a in (captured, eager))
    for now, wanted in zip(after, wanted_after, strict=True):
        torch.testing.assert_close(now, wanted, rtol=0, atol=0, equal_nan=True)

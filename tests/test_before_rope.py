"""Decode attention over keys stored before RoPE: the reference against the general path, the kernels against
the reference (interpreted on a CPU, and on a GPU), and whole models.
"""

import copy
import dataclasses

import pytest
import torch
import zoo
from test_decode_kernel import (
    DEVICE,
    DTYPE,
    copied,
    empty_layer,
    marked,
    needs_gpu,
    needs_kernels,
    padding_mask,
    relative,
)
from transformers import DynamicCache

import rotatekv_fx as rk
from rotatekv_fx import ops  # noqa: F401  (registers the ops)
from rotatekv_fx.cache import before_rope
from rotatekv_fx.cache.layers import PackedLayer
from rotatekv_fx.errors import ConfigError
from rotatekv_fx.kernels import tuning
from rotatekv_fx.kernels.attention import reference
from rotatekv_fx.kernels.held import Held, Scoring
from rotatekv_fx.recipes.base import hadamard

rotatekv = torch.ops.rotatekv

CASES = {
    "grouped": {},
    "two units": {"heads": 4, "head_group": 2},
    "one head a rotation": {"heads": 2, "head_group": 1},
    "sixteen query heads": {"query_heads": 64},
    "six sequences": {"batch": 6, "length": 70, "capacity": 80},
    "dim 64, heads share a group": {"dim": 64},
    "3-bit values": {"bits": (2, 3)},
    "4 and 8 bits": {"bits": (4, 8)},
    "8 and 4 bits": {"bits": (8, 4)},
    "group 64": {"group": 64},
    "dim 32, group 128": {"dim": 32},
    "three groups": {"dim": 64, "heads": 6, "head_group": 2},
    "midpoints": {"scheme": "midpoint"},
    "window": {"window": 24, "slack": 4},
    "no sinks": {"sinks": 0},
    "partners that are no neighbours": {"turned": 96},
    "partners that are no neighbours, dim 64": {"turned": 48, "dim": 64},
    "partial RoPE": {"turned": 32},
    "softcap": {"softcap": 5.0},
    "sink logits": {"logits": True},
    "left padding": {"padding": (0, 50)},
    "left padding, a mask that is added": {"padding": (0, 50), "added": torch.float32, "softcap": 5.0},
    "sliding": {"sliding": 60, "capacity": 60, "wraps": True, "length": 101},
    "sliding, window": {"sliding": 60, "capacity": 52, "wraps": True, "length": 101, "window": 9, "slack": 1},
    "first token": {"length": 0, "sinks": 0},
    "counted": {"counted": True},
    "half": {"dtype": torch.float16},
    "single": {"dtype": torch.float32},
}
QUICK = (
    "grouped",
    "two units",
    "dim 64, heads share a group",
    "3-bit values",
    "window",
    "left padding",
    "sliding",
    "partners that are no neighbours, dim 64",
)


def build(
    dim=128, heads=4, query_heads=None, batch=2, length=100, capacity=112, window=0, slack=0, sinks=6,
    bits=(2, 2), group=128, head_group=4, scheme="zero_point", softcap=0.0, logits=False, padding=(),
    added=None, sliding=0, wraps=False, counted=False, turned=None, dtype=DTYPE, seed=0,
):  # fmt: skip
    """Arguments of `decode_before_rope` for a cache of `length` tokens: query, key, value, Held,
    Scoring.
    """
    g = torch.Generator().manual_seed(seed)
    query_heads, turned = query_heads or 2 * heads, turned or dim

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    matrix = hadamard(dim).float().sign() / 8
    mixing = (torch.linalg.qr(randn(head_group, head_group))[0] * 8 / dim**0.5).contiguous()
    half = turned // 2
    theta = 10000.0 ** -(torch.arange(half).double() / half)
    still = torch.arange(turned, dim)
    partner = torch.cat([torch.arange(half, turned), torch.arange(half), still])
    angles = torch.cat([-theta, theta, 0.0 * still.double()])
    key_map = [
        torch.randperm(heads * dim, generator=g).int()[None], matrix, mixing,
        *before_rope.in_places(partner, torch.full((dim,), 1.1), angles),
    ]  # fmt: skip
    ring = window + slack if window else 0
    keys, values, history, recent, store = empty_layer(
        g, dim, heads, batch, length, capacity, ring, sinks, bits, group, scheme, dtype
    )
    shift = (7 - 10 * torch.arange(batch))[:, None]
    held = Held(
        history, recent, store, key_map, shift + length, None, 0, *bits, group, group, 0.8, 0.8, scheme,
        window, wraps,
    )  # fmt: skip
    for number in range(length):
        reference.decode_before_rope(
            torch.zeros(batch, query_heads, 1, dim), *(x[:, :, number : number + 1] for x in (keys, values)),
            dataclasses.replace(held, number=number), Scoring(None, 0, 0, 1.0, 0.0, None),
        )  # fmt: skip
    mask = padding_mask(padding, batch, length + 1, added)
    held = dataclasses.replace(
        held, count=torch.tensor(length) if counted else None, number=0 if counted else length
    )
    return [
        randn(batch, query_heads, 1, dim).to(dtype), keys[:, :, length : length + 1],
        values[:, :, length : length + 1], held,
        Scoring(mask, 0, sliding, dim**-0.5, softcap, randn(query_heads) if logits else None),
    ]  # fmt: skip


def flat(arguments):
    """As the op takes them: what a layer holds, one by one."""
    return [y for x in arguments for y in (vars(x).values() if isinstance(x, Held | Scoring) else [x])]


def small(**changes):
    changes = {
        "dim": 32,
        "batch": 1,
        "length": 20,
        "capacity": 21,
        "group": 32,
        "dtype": torch.float32,
    } | changes
    return build(**changes)


@pytest.mark.parametrize("head_group", [1, 4])
def test_the_reference_gives_what_the_general_path_gives(head_group):
    """Codes read back, sinks restored, reordered and rotated back, turned by RoPE, and attended to."""
    arguments = small(head_group=head_group, padding=(3,), sinks=4)
    query, key, value, held, scoring = arguments
    places, matrix, mixing, axis, size, angles, _ = held.key_map
    places, axis = places[0].long(), axis[0].long()
    order = places.view(4, -1)[:, axis].flatten()  # of channels: exchanging bits is its own inverse
    angles = angles[axis]
    actual = rotatekv.decode_before_rope(*flat(arguments))
    parts = held.history[0], held.history[1].abs(), held.history[2]
    keys = rotatekv.dequantize(*parts, 2, 32, 4, torch.float32, places)
    values = rotatekv.dequantize(*held.history[3:], 2, 32, 4, torch.float32)
    exact_keys, exact_values, tokens = held.sinks
    keys = rotatekv.restore_sinks(keys, exact_keys, tokens.long())
    values = rotatekv.restore_sinks(values, exact_values, tokens.long())
    keys = rotatekv.rotate(keys, torch.kron(mixing, matrix)[None], torch.argsort(order), True)
    turn = (held.position - 20 + torch.arange(21)).double().T * angles[16:]
    cos, sin = (torch.cat([x, x], -1).float() for x in (turn.cos(), turn.sin()))
    swapped = torch.cat([-keys[..., 16:], keys[..., :16]], -1)
    keys = size * (keys * cos + swapped * sin)
    expected = rotatekv.attend(
        query, keys, values, scoring.mask[:, None, None], scoring.scale, scoring.softcap, None, True
    )
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("changes", [{}, {"counted": True}, {"window": 8, "slack": 2}])
def test_opcheck(changes):
    arguments = small(**changes)
    for x in [*arguments[3].history, *arguments[3].recent]:
        x.nan_to_num_(0.0) if x.is_floating_point() else None
    torch.library.opcheck(rotatekv.decode_before_rope.default, tuple(flat(arguments)))


def test_a_key_map_of_the_other_op_is_refused():
    arguments = small()
    arguments[3] = dataclasses.replace(arguments[3], key_map=arguments[3].key_map[:6])
    with pytest.raises(ConfigError, match="decode_before_rope: key_map has 6 tensors; use 7"):
        rotatekv.decode_before_rope(*flat(arguments))


@needs_kernels
@pytest.mark.gpu
@pytest.mark.parametrize("name", marked(CASES, QUICK))
def test_the_kernels_match_the_reference(name):
    compare(build(**CASES[name]))


@needs_kernels
@pytest.mark.gpu
def test_matrices_that_shared_memory_cannot_keep(monkeypatch):
    monkeypatch.setattr(tuning, "SCORE_RESIDENT", 0)
    compare(build(group=64))


def compare(arguments):
    """The kernels' result, and what they store, with the reference's."""
    from rotatekv_fx.kernels.attention import before_rope as kernels

    expected_arguments, actual_arguments = copied(arguments), copied(arguments, DEVICE)
    expected = reference.decode_before_rope(expected_arguments[0].float(), *expected_arguments[1:])
    actual = kernels.decode_before_rope(*actual_arguments)
    assert not actual.isnan().any()
    assert relative(actual, expected) < (3e-3 if actual.dtype is torch.bfloat16 else 1.5e-3)
    for kind in ("history", "recent"):
        after, wanted_after = (getattr(a[3], kind) for a in (actual_arguments, expected_arguments))
        for now, wanted in zip(after, wanted_after, strict=True):
            torch.testing.assert_close(now.cpu(), wanted, rtol=0, atol=0, equal_nan=True)


@needs_kernels
@pytest.mark.gpu
def test_a_bad_key_shows_in_its_sequence():
    from rotatekv_fx.kernels.attention import before_rope as kernels

    arguments = build(heads=2, head_group=2, dim=64)
    expected = kernels.decode_before_rope(*copied(arguments, DEVICE))
    arguments[1][0, 1, 0, 5] = float("nan")
    actual = kernels.decode_before_rope(*copied(arguments, DEVICE))
    assert actual[0].isnan().all()
    assert torch.equal(actual[1], expected[1])


@needs_gpu
@pytest.mark.gpu
def test_lengths_share_compiled_kernels():
    from rotatekv_fx.kernels.attention import before_rope as kernels

    def compiled():
        return sum(len(caches[0]) for caches in kernels.score_kernel.device_caches.values())

    counts = []
    for length in (100, 16, 65, 1):
        kernels.decode_before_rope(*copied(build(length=length, sinks=1), DEVICE))
        counts.append(compiled())
    assert counts[0] > 0
    assert counts == counts[:1] * len(counts)


@needs_gpu
@pytest.mark.gpu
def test_a_graph_replays_what_eager_computes():
    from rotatekv_fx.kernels.attention import before_rope as kernels

    arguments = copied(build(counted=True), DEVICE)
    eager, captured = copied(arguments, DEVICE), copied(arguments, DEVICE)
    expected = kernels.decode_before_rope(*eager)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = kernels.decode_before_rope(*captured)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(actual, expected)
    for now, wanted in zip(captured[3].history, eager[3].history, strict=True):
        torch.testing.assert_close(now, wanted, rtol=0, atol=0, equal_nan=True)


# Whole models: decoding by the op gives what reading everything back gives.

MODELS = {
    "llama": ("llama", {}),
    "llama, window": ("llama", {"window": 6, "slack": 2}),
    "heads of their own norm": ("qwen3", {}),
    "two kinds of RoPE, sliding": ("gemma3_text", {}),
    "partial RoPE": ("gpt_neox", {}),
    "RoPE of 24 of 32 channels": ("gpt_neox", {"rotary_pct": 0.75}),
    "interleaved RoPE": ("cohere", {}),
    "soft-cap, a mask that is added": ("gemma2", {}),
    "the same, stored after RoPE": ("gemma2", {"recipe": "centered", "window": 6, "slack": 2}),
}


@pytest.mark.parametrize("name", MODELS)
def test_decoding_by_the_op_gives_the_logits_of_the_general_path(name, monkeypatch):
    architecture, settings = MODELS[name]
    recipe = settings.get("recipe", "paper")
    op_name = "decode_before_rope" if recipe == "paper" else "decode"
    if "rotary_pct" in settings:
        model = zoo.build(architecture, **settings)
        packed = zoo.transformed(model, "paper", zoo.calibrated(model), sinks=4)
        assert packed.gpt_neox.layers[0].attention.rotatekv.before_rope_table.shape[1] == 2 * 32
    else:
        packed = zoo.packed(architecture, **{"recipe": recipe, "layers": 2, "sinks": 4, **settings})
    assert all(op_name in site.lowered for site in rk.report(packed).sites)
    ids, mask = zoo.prompt(length=24)
    longer = torch.cat([mask, mask.new_ones(len(ids), 8)], 1)
    new = torch.randint(1, 50, (len(ids), 8), generator=torch.Generator().manual_seed(3))
    calls = []
    op = getattr(rotatekv, op_name)

    def logits():
        cache, found = DynamicCache(config=packed.config), []
        packed(ids, attention_mask=mask, position_ids=zoo.positions_of(mask), past_key_values=cache)
        for step in range(8):
            seen = longer[:, : 25 + step]
            found.append(
                packed(
                    new[:, step : step + 1], attention_mask=seen, past_key_values=cache,
                    position_ids=zoo.positions_of(seen)[:, -1:],
                ).logits
            )  # fmt: skip
        return torch.cat(found, 1)

    def counting(*args):
        calls.append(1)
        return op(*args)

    with torch.no_grad():
        monkeypatch.setattr(rotatekv, op_name, counting)
        by_the_op = logits()
        assert len(calls) == 16
        monkeypatch.setattr(PackedLayer, "decodes", lambda *_: False)
        assert zoo.relative(by_the_op, logits()) < 1e-4
        assert len(calls) == 16


def test_a_transformed_model_moves():
    """The op's tensors follow the model, also where two modules share one."""
    model = copy.deepcopy(zoo.packed("llama", "paper", sinks=4))
    ids = zoo.prompt(padding=(0, 0, 0))[0]
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        model._apply(torch.clone)
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected)

"""The ops on packed layers: registration, tracing, what they refuse, and that prompts may be cut anywhere."""

import dataclasses

import pytest
import torch
from test_decode_kernel import build, copied

from rotatekv_fx import ops  # noqa: F401  (registers the ops)
from rotatekv_fx.cache import keymap
from rotatekv_fx.errors import ConfigError
from rotatekv_fx.kernels import tuning
from rotatekv_fx.kernels.attention import reference
from rotatekv_fx.kernels.held import Held, Scoring

rotatekv = torch.ops.rotatekv
SMALL = {
    "dim": 32, "heads": 2, "query_heads": 4, "batch": 1, "capacity": 24, "window": 8, "slack": 2, "sinks": 2,
    "group": 32, "pairs": 16, "dtype": torch.float32,
}  # fmt: skip


def small(**changes):
    """Arguments of `decode` on a small layer, with zeros where the buffers are empty."""

    def clean(x):
        if isinstance(x, Held | Scoring):
            return type(x)(*clean(list(vars(x).values())))
        if isinstance(x, list):
            return [clean(y) for y in x]
        return x.nan_to_num(0.0) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    return clean(build(**{**SMALL, "length": 20, **changes}))


def new_tokens(count, *like):
    """The same random tokens in every run, in numbers that the fp16 ring holds exactly: otherwise those that
    went through it become other codes.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = [(*x.shape[:2], count, x.shape[3]) for x in like]
    return [torch.randn(shape, generator=generator).half().float() for shape in shapes]


def extending(arguments, new=3):
    """Arguments of `extend` for some new tokens on the layer of `decode`'s arguments."""
    _, key, value, held, _ = arguments
    return [*new_tokens(new, key, value), dataclasses.replace(held, position=held.position + new - 1)]


def prefilling(arguments, new=3):
    """Arguments of `prefill` for some new tokens on the layer of `decode`'s arguments."""
    query, key, value, held, scoring = arguments
    held = dataclasses.replace(held, position=held.position + new - 1)
    return [*new_tokens(new, query, key, value), held, scoring.scale]


def flat(arguments):
    """As the ops take them: what a layer holds, one by one."""
    return [y for x in arguments for y in (vars(x).values() if isinstance(x, Held | Scoring) else [x])]


def buffers(arguments):
    """What an op writes, of `decode`'s arguments."""
    return [*arguments[3].history, *arguments[3].recent]


CALLS = {
    "decode": lambda: small(),
    "decode, counted": lambda: small(counted=True),
    "decode, no window": lambda: small(window=0, capacity=32),
    "extend": lambda: extending(small()),
    "prefill": lambda: prefilling(small()),
}


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    torch.library.opcheck(getattr(rotatekv, name.partition(",")[0]).default, tuple(flat(CALLS[name]())))


def test_a_compiled_step_writes_the_buffers_themselves():
    torch._dynamo.reset()
    eager = small(counted=True)
    traced = copied(eager)
    addresses = [t.data_ptr() for t in traced[3].history]
    run = torch.compile(lambda *a: rotatekv.decode(*a) * 2.0, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        assert torch.equal(run(*flat(traced)), rotatekv.decode(*flat(eager)) * 2.0)
        for arguments in (eager, traced):
            arguments[3].count.add_(1)
            arguments[3].position.add_(1)
    assert [t.data_ptr() for t in traced[3].history] == addresses
    assert all(torch.equal(a, b) for a, b in zip(buffers(traced), buffers(eager), strict=True))


@pytest.mark.parametrize("window", [0, 8])
def test_tokens_one_by_one_give_the_buffers_of_one_prompt(window):
    at_once = small(length=0, sinks=0, window=window, capacity=32)
    one_by_one = copied(at_once)
    whole = extending(at_once, new=20)
    reference.extend(*whole)
    for token in range(20):
        part = extending(one_by_one, new=1)
        place = whole[2].position - 19 + token
        part = [*(x[:, :, token : token + 1] for x in whole[:2]), dataclasses.replace(part[2], number=token)]
        part[2] = dataclasses.replace(part[2], position=place)
        reference.extend(*part)
    for a, b in zip(buffers(at_once), buffers(one_by_one), strict=True):
        torch.testing.assert_close(a, b)


REFUSED = {
    "two tokens": ({1: torch.zeros(1, 2, 2, 32), 2: torch.zeros(1, 2, 2, 32)}, {}, "give one new token"),
    "history": ({}, {"history": []}, "history has 0 tensors; use 6"),
    "key map": ({}, {"key_map": []}, "key_map has 0 tensors; use 6"),
    "bits": ({}, {"key_bits": 5}, "bits is 5"),
    "group": ({}, {"key_group": 24}, "group 24 does not divide 64 channels"),
    "window as long as the ring": ({}, {"window": 10}, "the ring has 10 slots for a window of 10"),
    "query heads": ({0: torch.zeros(1, 3, 1, 32)}, {}, "3 query heads for 2 KV heads"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name):
    changes, of_layer, message = REFUSED[name]
    arguments = small()
    arguments[3] = dataclasses.replace(arguments[3], **of_layer)
    for index, value in changes.items():
        arguments[index] = value
    with pytest.raises(ConfigError, match=message):
        rotatekv.decode(*flat(arguments))


def test_prefill_takes_no_ring():
    arguments = prefilling(small())
    arguments[3] = dataclasses.replace(arguments[3], wraps=True)
    with pytest.raises(ConfigError, match="the history wraps"):
        rotatekv.prefill(*flat(arguments))


def test_the_table_is_as_long_as_the_longest_tile():
    assert keymap.TABLE_TOKENS == tuning.TABLE_TOKENS


def test_no_rotated_query_passes_its_norm_times_the_reach():
    g = torch.Generator().manual_seed(0)
    rotation = torch.randn(3, 16, 20, generator=g) * torch.logspace(-3, 2, 20)
    reach = keymap.reach_of(rotation, 12)
    longest = rotation[:, :, :12].norm(dim=1).argmax(-1)
    query = torch.cat([torch.randn(3, 64, 16, generator=g), rotation[range(3), :, longest][:, None]], 1)
    share = (query @ rotation[:, :, :12]).abs().amax(-1) / (query.norm(dim=-1) * reach[:, None])
    assert (share <= 1.0).all()
    assert (share[:, -1] > 0.999).all()

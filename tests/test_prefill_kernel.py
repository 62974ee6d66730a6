"""Attention of a prompt over a packed layer: the Triton path against the plain reference."""

import dataclasses

import pytest
import torch
from test_decode_kernel import DEVICE, build, copied, marked, needs_kernels, relative

from rotatekv_fx.kernels.prefill import reference

CASES = {
    "fresh": {"length": 0, "sinks": 0},
    "on a history": {"length": 150},
    "on less than a window": {"length": 30},
    "no window": {"length": 100, "window": 0},
    "no window, fresh": {"length": 0, "window": 0, "sinks": 0},
    "dim 64, heads share a group": {"length": 80, "dim": 64, "query_heads": 8},
    "3 and 4 bits": {"length": 80, "bits": (3, 4)},
    "heads mixed": {"length": 80, "head_group": 2},
    "zero points": {"length": 80, "scheme": "zero_point", "pairs": 0},
    "dim 96": {"length": 80, "dim": 96, "heads": 4, "query_heads": 8},
    "dim 256": {"length": 80, "dim": 256, "query_heads": 4},
    "group 32": {"length": 80, "group": 32},
    "half": {"length": 80, "dtype": torch.float16},
    "single": {"length": 80, "dtype": torch.float32},
}


def arguments_of(new, **case):
    """Arguments of the op `prefill` for `new` tokens after those of `test_decode_kernel.build`."""
    found = build(capacity=480, **case)
    query, key, value, held, scoring = found
    generator = torch.Generator().manual_seed(5)

    def like(x):
        shape = (*x.shape[:2], new, x.shape[3])
        return torch.randn(shape, generator=generator).to(x.dtype)

    in_tokens = like(query).transpose(1, 2).contiguous().transpose(1, 2)  # as a projection's result lies
    held = dataclasses.replace(held, position=held.position + new - 1)
    return [in_tokens, like(key), like(value), held, scoring.scale]


@needs_kernels
@pytest.mark.gpu
@pytest.mark.parametrize("name", marked(CASES, ("fresh", "on a history")))
def test_prefill_matches_the_reference(name, monkeypatch):
    """Attention on the same codes: one that a rounding tipped over may change the output by a percent."""
    from rotatekv_fx.kernels.prefill import triton as kernels

    arguments = arguments_of(130, **CASES[name])
    expected_arguments, actual_arguments = copied(arguments), copied(arguments, DEVICE)
    held = actual_arguments[3]
    ids = torch.cat([held.position - 1, held.position], 1)
    actual_arguments[3] = dataclasses.replace(held, position=ids[:, -1:])  # the last of a row, as in models
    actual = kernels.prefill(*actual_arguments)
    codes = copied(actual_arguments[3].history)
    expected_arguments[3] = dataclasses.replace(expected_arguments[3], history=codes)
    with monkeypatch.context() as patch:
        patch.setattr(reference, "extend", lambda *_: None)
        expected = reference.prefill(expected_arguments[0].float(), *expected_arguments[1:])
    assert relative(actual, expected) < (6e-3 if actual.dtype is torch.bfloat16 else 2e-3)
    plain = arguments[3]
    reference.extend(*arguments[1:4])
    for now, wanted in zip(codes, plain.history, strict=True):
        same = (now == wanted) | (now.float().isnan() & wanted.float().isnan())
        assert same.float().mean() > 0.998
    for now, wanted in zip(actual_arguments[3].recent, plain.recent, strict=True):
        torch.testing.assert_close(now.cpu(), wanted, rtol=0, atol=0, equal_nan=True)

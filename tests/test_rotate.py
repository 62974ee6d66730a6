"""The op `rotate`, against plain loops."""

import numpy as np
import pytest
import torch

from rotatekv_fx import ops  # noqa: F401  (registers the ops)
from rotatekv_fx.errors import ConfigError
from rotatekv_fx.recipes.base import hadamard

rotate = torch.ops.rotatekv.rotate


def rotate_by_loops(x, matrix, order, inverse):
    """Token by token, block by block, in float64."""
    x, matrix = x.double().numpy(), matrix.double().numpy()
    batch, heads, tokens, dim = x.shape
    m = matrix.shape[-1]
    out = np.empty_like(x)
    for b in range(batch):
        for s in range(tokens):
            flat = np.concatenate([x[b, h, s] for h in range(heads)])
            if inverse and order is not None:
                undone = np.empty_like(flat)
                for to, source in enumerate(order.tolist()):
                    undone[source] = flat[to]
                flat = undone
            for block in range(len(flat) // m):
                turn = matrix[block if len(matrix) > 1 else 0]
                flat[block * m : (block + 1) * m] = flat[block * m : (block + 1) * m] @ turn
            if not inverse and order is not None:
                flat = np.array([flat[source] for source in order.tolist()])
            out[b, :, s] = flat.reshape(heads, dim)
    return torch.from_numpy(out)


def relative_rms(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


# (batch, heads, tokens, dim, blocks in the matrix, m): blocks of several heads, of part of one, across heads.
SHAPES = [
    (2, 4, 5, 8, 1, 32),
    (2, 4, 5, 8, 2, 16),
    (1, 4, 3, 8, 1, 16),
    (3, 2, 1, 12, 6, 4),
    (2, 3, 7, 10, 5, 6),
    (1, 1, 2, 65, 1, 65),
]


@pytest.mark.parametrize("with_order", [False, True])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_rotate_matches_loops(shape, inverse, with_order):
    batch, heads, tokens, dim, blocks, m = shape
    torch.manual_seed(0)
    x = torch.randn(batch, heads, tokens, dim)
    matrix = torch.randn(blocks, m, m)
    order = torch.randperm(heads * dim) if with_order else None
    out = rotate(x, matrix, order, inverse)
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    assert relative_rms(out, rotate_by_loops(x, matrix, order, inverse)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rotate_is_undone_by_the_inverse(dtype):
    torch.manual_seed(1)
    x = torch.randn(2, 4, 9, 24, dtype=dtype)
    matrix = torch.linalg.qr(torch.randn(2, 48, 48, dtype=torch.float64)).Q
    order = torch.randperm(96)
    turned = rotate(x, matrix, order, False)
    assert relative_rms(turned, x.double()) > 0.5  # it did turn
    back = rotate(turned, matrix.mT.contiguous(), order, True)
    assert back.dtype == dtype
    assert relative_rms(back, x.double()) < {torch.float32: 1e-6, torch.float16: 1e-3}.get(dtype, 6e-3)


def test_rotate_computes_in_fp32_for_16_bit_inputs_and_under_autocast():
    torch.manual_seed(2)
    x, matrix = torch.randn(1, 4, 6, 32).to(torch.bfloat16), torch.randn(1, 128, 128)
    exact = rotate_by_loops(x, matrix, None, False)
    # One rounding to bf16 at the end and no other; a value close to a tie may round the other way.
    assert relative_rms(rotate(x, matrix, None, False), exact.to(torch.bfloat16).double()) < 2e-4
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative_rms(rotate(x.float(), matrix, None, False), exact) < 1e-6


def test_rotate_keeps_a_nan_in_its_token():
    x = torch.randn(2, 2, 3, 8)
    clean = rotate(x, hadamard(16)[None], None, False)
    x[1, 0, 2, 5] = torch.nan
    dirty = rotate(x, hadamard(16)[None], None, False)
    hit = torch.zeros(2, 2, 3, 8, dtype=torch.bool)
    hit[1, :, 2] = True
    assert dirty[hit].isnan().all()
    assert torch.equal(dirty[~hit], clean[~hit])


@pytest.mark.parametrize(
    ("matrix", "order", "message"),
    [
        (torch.zeros(1, 8, 4), None, r"\[1, 8, 4\]"),
        (torch.zeros(3, 8, 8), None, r"\[3, 8, 8\]"),
        (torch.zeros(1, 24, 24), None, "64 channels"),
        (torch.zeros(64, 64), None, "use 3 dimensions"),
        (torch.zeros(1, 64, 64), torch.arange(63), "63 and 64"),
        (torch.zeros(1, 64, 64), torch.arange(64).int(), "int32"),
    ],
)
def test_rotate_refuses_what_does_not_fit(matrix, order, message):
    with pytest.raises(ConfigError, match=message):
        rotate(torch.zeros(1, 4, 2, 16), matrix, order, False)

"""Rounding with error feedback: against a loop over single numbers, and what it is for."""

from __future__ import annotations

import copy

import pytest
import torch

from rotatekv_fx import RotateKVConfig, calibrate, transform
from rotatekv_fx.errors import ConfigError
from rotatekv_fx.evaluate import cut_windows, encode, evaluate, load_tokenizer, read_text
from rotatekv_fx.recipes.base import ChannelTransform
from rotatekv_fx.recipes.centered import feedback

ops = torch.ops.rotatekv


def costs(blocks, size, seed=0):
    """Symmetric positive definite M [blocks, size, size], far from a multiple of the identity."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(blocks, size, size, generator=generator, dtype=torch.float64)
    spread = torch.logspace(0, -2, size, dtype=torch.float64)
    q = torch.linalg.qr(factor).Q
    return q @ torch.diag(spread) @ q.mT


def unit_upper(matrices):
    upper = torch.linalg.cholesky(matrices, upper=True)
    return upper / upper.diagonal(dim1=-2, dim2=-1)[..., None]


def read_back(x, bits, group, clip):
    codes = ops.quantize(x, bits, group, clip, "midpoint")
    return ops.dequantize(*codes, bits, group, x.shape[1], torch.float32), codes


@pytest.mark.parametrize(("bits", "clip"), [(2, 0.7), (3, 0.875), (4, 1.0)])
def test_codes_are_those_of_a_loop_over_single_numbers(bits, clip):
    x = torch.randn(1, 2, 3, 8, generator=torch.Generator().manual_seed(1))
    u = unit_upper(costs(2, 8))
    aims = ops.compensate(x, u.float(), bits, 16, clip)
    read, (_, scale, offset) = read_back(aims, bits, 16, clip)
    _, plain_scale, plain_offset = read_back(x, bits, 16, clip)[1]
    assert torch.equal(scale, plain_scale) and torch.equal(offset, plain_offset)
    for token in range(3):
        step, low = float(scale[0, 0, token]), float(offset[0, 0, token])
        row = x[0, :, token].flatten()
        for head in range(2):
            errors = [0.0] * 8
            for i in range(7, -1, -1):
                exact = float(x[0, head, token, i])
                aim = exact - sum(float(u[head, i, j]) * errors[j] for j in range(i + 1, 8))
                aim = exact if exact in (float(row.min()), float(row.max())) else aim
                errors[i] = low + step * max(0, min(2**bits - 1, round((aim - low) / step))) - exact
            found = read[0, head, token] - x[0, head, token]
            torch.testing.assert_close(found, torch.tensor(errors), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_cost_less(dtype):
    x = torch.randn(2, 4, 50, 32, generator=torch.Generator().manual_seed(2)).to(dtype)
    matrices = costs(4, 32)
    aims = ops.compensate(x, unit_upper(matrices).float(), 2, 128, 0.7)

    def cost(read):
        e = (read - x.float()).double()
        return torch.einsum("bhsd,hde,bhse->", e, matrices, e).item()

    assert cost(read_back(aims, 2, 128, 0.7)[0]) < 0.8 * cost(read_back(x, 2, 128, 0.7)[0])


def test_nothing_to_make_up_for_changes_nothing():
    x = torch.randn(1, 2, 5, 16)
    assert torch.equal(ops.compensate(x, torch.eye(16).expand(2, -1, -1).contiguous(), 2, 32, 0.7), x)


def test_constant_groups_and_nans_stay_their_own():
    x = torch.randn(1, 2, 3, 16)
    x[0, :, 0] = 1.5
    x[0, 0, 1, 3] = float("nan")
    read, _ = read_back(ops.compensate(x, unit_upper(costs(2, 16)).float(), 2, 16, 0.7), 2, 16, 0.7)
    assert torch.equal(read[0, :, 0], torch.full((2, 16), 1.5))
    assert read[0, 1].isfinite().all() and read[0, :, 2].isfinite().all()


def test_feedback_of_another_shape_is_refused():
    with pytest.raises(ConfigError, match=r"feedback has shape \[3, 16, 16\] for 32 channels"):
        ops.compensate(torch.randn(1, 2, 3, 16), torch.eye(16).repeat(3, 1, 1), 2, 32, 0.7)


def test_feedback_is_that_of_errors_before_the_transform():
    """|U e|^2 weighted by D is the cost of the error that e becomes when the transform is undone."""
    weight, matrix = costs(2, 6), torch.randn(2, 6, 6, dtype=torch.float64)
    transform = ChannelTransform(matrix, torch.linalg.inv(matrix))
    u = feedback(transform, weight)
    e = torch.randn(2, 6, dtype=torch.float64)
    undone = (e[:, None] @ transform.inverse)[:, 0]
    expected = torch.einsum("hd,hde,he->h", undone, weight, undone)
    cost = transform.inverse @ weight @ transform.inverse.mT
    d = torch.linalg.cholesky(cost, upper=True).diagonal(dim1=-2, dim2=-1).square()
    found = (d * torch.einsum("hij,hj->hi", u, e).square()).sum(1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    assert feedback(transform, torch.zeros(2, 6, 6, dtype=torch.float64)) is None


def test_recipe_loses_less_than_centered_at_the_same_bits(reference_model, repository):
    tokenizer = load_tokenizer(str(repository / "benchmarks" / "reference_model"))
    text = read_text(repository / "benchmarks" / "data" / "calibration.txt")
    windows = cut_windows(encode(tokenizer, text[:60000]), 512, [1])
    calibration = calibrate(reference_model, windows[:6], progress=lambda done, total: None)
    rows = {}
    for recipe in ("centered", "compensated"):
        config = RotateKVConfig(recipe=recipe, window=0, head_group=1, keep_originals=False)
        packed = transform(copy.deepcopy(reference_model), config, calibration)
        (rows[recipe],) = evaluate(reference_model, {config: packed}, windows[8:10])["rows"]
    assert rows["compensated"]["kl"] < 0.85 * rows["centered"]["kl"]
    assert rows["compensated"]["bits_per_element"] == rows["centered"]["bits_per_element"]

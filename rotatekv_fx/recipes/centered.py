"""Recipe `centered`: keys are stored after RoPE, with their calibrated mean removed before it.

Most of a key's outlier energy is a constant per-channel mean before RoPE. Without it, what is left can be
rotated after RoPE, where the inverse folds into the query; the mean's share of a score depends on the
position alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rotatekv_fx.calibration import LayerStatistics
from rotatekv_fx.config import RotateKVConfig
from rotatekv_fx.recipes.base import (
    ChannelTransform,
    LayerPlan,
    LayerShape,
    hadamard,
    quantizers,
    register,
    rotated_heads,
    window_of,
)

HEAD_GROUP = 1  # mixing 4 heads gains 5% of KL on the reference model, and costs the decode kernel more
MEAN_SHARE = 0.999  # of the mean's query-weighted energy that the position term carries
# Share of a group's range that the codes span, by bits: best on text used for neither calibration nor test.
CLIP = {2: 0.7, 3: 0.875, 4: 0.95, 8: 1.0}
EIGENVALUE_FLOOR = 1e-6  # relative to the largest


class CenteredRecipe:
    """Mean removed before RoPE, a whitening rotation after it, midpoint codes, sinks and a recent window."""

    name = "centered"
    needs_calibration = True
    needs_linear_rope = True
    default_window = 64
    power = 0.25  # of the energies that `whitening` divides by
    compensates = False  # whether codes make up for one another's errors

    def plan(
        self, shape: LayerShape, config: RotateKVConfig, statistics: LayerStatistics | None
    ) -> LayerPlan:
        """Transforms and quantizers of one layer.

        Keys: y = T^T R_n (k - mu) over G heads, T = blockdiag(A_h) (H_G kron I). A_h minimises the expected
            error of
        scores under equal noise per channel: S_q^(1/2) U L^(-1/4) H, with S_q^(1/2) S_k S_q^(1/2) = U L U^T.
        Values: the same with W = sum Wo^T Wo in the place of S_q.

        Raises:
            ConfigError: head_group or group_size does not divide.
        """
        assert statistics is not None
        mean = kept_mean(statistics, config.mean_channels)[shape.own]  # channels chosen for all heads alike
        statistics = statistics.of_heads(shape.own)
        heads = rotated_heads(config.head_group, HEAD_GROUP, shape.kv_heads)
        query = statistics.query_second / statistics.kept
        pairs = zip(centered_second(statistics, mean), query, strict=True)
        key = _across_heads(torch.stack([whitening(*pair, self.power) for pair in pairs]), heads)
        value_mean = statistics.value_sum / statistics.kept
        value_covariance = (
            statistics.value_second / statistics.kept - value_mean[:, :, None] * value_mean[:, None]
        )
        pairs = zip(value_covariance, statistics.value_weight, strict=True)
        matrix = torch.stack([whitening(*pair, self.power) for pair in pairs])
        value = ChannelTransform(matrix, torch.linalg.inv(matrix))
        key_quantizer, value_quantizer = quantizers(config, shape, CLIP, "midpoint")
        return LayerPlan(
            center=mean,
            key=key,
            value=value,
            key_feedback=feedback(key, query) if self.compensates else None,
            value_feedback=feedback(value, statistics.value_weight) if self.compensates else None,
            key_quantizer=key_quantizer,
            value_quantizer=value_quantizer,
            sinks=config.sinks,
            window=window_of(self, config),
            slack=config.slack,
        )


def kept_mean(statistics: LayerStatistics, limit: int) -> Tensor:
    """The mean [Hkv, D] restricted to the channel pairs that the position term carries.

    The fewest pairs that hold 99.9% of sum |mu|^2 E|q|^2 in every head, and at most `limit` channels; the
    rest of the mean stays in the codes.
    """
    partner = statistics.partner
    query = (statistics.query_second / statistics.kept).diagonal(dim1=-2, dim2=-1)
    energy = statistics.key_mean.square() * (query if bool(query.any()) else torch.ones_like(query))
    pair = energy + torch.where(partner == torch.arange(len(partner)), 0, energy[:, partner])
    share = (pair / pair.sum(1, keepdim=True).clamp(min=1e-300)).amax(0)  # [D], equal for both of a pair
    first = torch.arange(len(partner)) <= partner
    order = torch.argsort(torch.where(first, share, -1.0), descending=True)[: int(first.sum())]
    covered = torch.cumsum(pair[:, order], 1) / pair[:, order].sum(1, keepdim=True).clamp(min=1e-300)
    count = int((covered.amin(0) < MEAN_SHARE).sum()) + 1
    chosen: list[int] = []
    for channel in order[:count].tolist():
        both = {channel, int(partner[channel])}
        if len(chosen) + len(both) <= limit:
            chosen += both
    mask = torch.zeros(len(partner), dtype=torch.float64)
    mask[chosen] = 1.0
    return statistics.key_mean * mask


def centered_second(statistics: LayerStatistics, mean: Tensor) -> Tensor:
    """Second moment [Hkv, D, D] of R_n (k - mean), from sums that do not depend on the mean.

    With R_n mean = a mean + b mean[partner]: E[(Rk)(R mean)^T] and E[(R mean)(R mean)^T] follow from the sums
    of (Rk) a^T, (Rk) b^T, a a^T, a b^T and b b^T.
    """
    swapped = mean[:, statistics.partner]
    cross = statistics.key_a * mean[:, None, :] + statistics.key_b * swapped[:, None, :]
    aa, ab, bb = statistics.turns
    outer = (
        aa * mean[:, :, None] * mean[:, None]
        + ab * mean[:, :, None] * swapped[:, None]
        + ab.mT * swapped[:, :, None] * mean[:, None]
        + bb * swapped[:, :, None] * swapped[:, None]
    )
    return (statistics.key_second - cross - cross.mT + outer) / statistics.kept


def whitening(covariance: Tensor, weight: Tensor, power: float = 0.25) -> Tensor:
    """A = W^(1/2) U L^(-power) H with W^(1/2) C W^(1/2) = U L U^T: x @ A spreads C's energy evenly over
    channels.

    Args:
        covariance: [D, D] of what is stored; weight: [D, D] of what it is multiplied with. Zeros give H
            alone.
        power: 1/4 is best where each channel is rounded by itself, 1/2 leaves all directions alike.
    """
    rotation = hadamard(covariance.shape[0])
    if not bool(weight.any()) or not bool(covariance.any()):
        return rotation
    root = _power(weight, 0.5)
    values, vectors = _floored_eigh(root @ covariance @ root)
    return root @ vectors @ torch.diag(values**-power) @ rotation


def feedback(transform: ChannelTransform, weight: Tensor) -> Tensor | None:
    """U of the op `compensate` for what `transform` makes of heads whose errors e cost e^T weight e.

    Args:
        transform: of blocks of whole heads.
        weight: [Hkv, D, D]; zeros, unknown, give None.

    Returns:
        [n, m, m], as many blocks as the transform has.
    """
    if not bool(weight.any()):
        return None
    matrices = torch.stack([_power(one, 1.0) if bool(one.any()) else one for one in weight])
    per_block = matrices.split(transform.inverse.shape[-1] // weight.shape[-1])
    blocks = []
    for inverse, group in zip(transform.inverse, per_block, strict=True):
        cost = inverse @ torch.block_diag(*group) @ inverse.mT
        floor = EIGENVALUE_FLOOR * cost.diagonal().mean() * torch.eye(len(cost), dtype=cost.dtype)
        upper = torch.linalg.cholesky(cost + floor, upper=True)
        blocks.append(upper / upper.diagonal()[:, None])
    return torch.stack(blocks)


def _power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = _floored_eigh(matrix)
    return vectors @ torch.diag(values**exponent) @ vectors.mT


def _floored_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return values.clamp(min=float(values[-1]) * EIGENVALUE_FLOOR), vectors


def _across_heads(per_head: Tensor, heads: int) -> ChannelTransform:
    """[Hkv, D, D] matrices, then a Hadamard across groups of heads: [Hkv / G, G D, G D]."""
    dim = per_head.shape[-1]
    mix = torch.kron(hadamard(heads), torch.eye(dim, dtype=torch.float64))
    blocks = [torch.block_diag(*group) @ mix for group in per_head.split(heads)]
    inverses = [mix.mT @ torch.block_diag(*torch.linalg.inv(group)) for group in per_head.split(heads)]
    return ChannelTransform(torch.stack(blocks), torch.stack(inverses))


register(CenteredRecipe())

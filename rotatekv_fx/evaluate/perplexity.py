"""How far transformed models are from the model they were made of: KL divergence, argmaxes, perplexity.

A quantizer can lower the perplexity below the untransformed model's while the distribution moves away, so the
mean KL divergence of the next-token distributions comes first. Every window runs through the model with a
fresh cache, so what is measured is the cache that `generate` uses.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from rotatekv_fx import RotateKVConfig, report
from rotatekv_fx.cache import PackedLayer
from rotatekv_fx.errors import StateError
from rotatekv_fx.evaluate.memory import bits_per_element
from rotatekv_fx.naming import cache_of

_CHUNK = 128  # positions compared at a time; bounds the temporaries of a large vocabulary


@dataclasses.dataclass(frozen=True)
class WindowScore:
    """One window's means over its predicted positions: `nll` and `kl` in nats, `agreement` in [0, 1]."""

    nll: float
    kl: float
    agreement: float


def score(reference: Tensor, candidate: Tensor, targets: Tensor) -> WindowScore:
    """Compare two models' predictions of one window.

    Args:
        reference, candidate: logits [T, V] of the untransformed and of the other model.
        targets: the ids [T] that followed.

    Raises:
        StateError: the candidate's loss is not finite.
    """
    nll = kl = agreement = 0.0
    chunks = zip(reference.split(_CHUNK), candidate.split(_CHUNK), targets.split(_CHUNK), strict=True)
    for p_logits, q_logits, target in chunks:
        log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
        terms = log_p.exp() * (log_p - log_q)
        kl += terms.masked_fill(log_p.isneginf(), 0.0).sum(dtype=torch.float64).item()  # 0 log 0 = 0
        nll -= log_q.gather(-1, target[:, None]).sum(dtype=torch.float64).item()
        agreement += (p_logits.argmax(-1) == q_logits.argmax(-1)).sum().item()
    count = len(targets)
    if not math.isfinite(nll):
        raise StateError(f"A window's mean loss is {nll / count}; evaluate the model in float32.")
    return WindowScore(nll / count, kl / count, agreement / count)


def evaluate(
    model: PreTrainedModel,
    candidates: Mapping[RotateKVConfig, PreTrainedModel],
    windows: Sequence[Tensor],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Score transformed models against `model`, which is left as it is.

    Windows are the outer loop: of all the logits, those of one window are held at a time.

    Args:
        model: the untransformed causal language model.
        candidates: transformed copies of it, each by its config.
        windows: ids [1, T], all of one length.
        progress: called with (windows done, windows in all).

    Returns:
        {"untransformed_perplexity", "rows"}, a row for each candidate. A row's `kl` (nats), `agreement` and
        `perplexity` are over all predictions, `tokens` in number; `per_window` has them apart;
        `bits_per_element` counts every byte of the cache after a window; `seconds` are those of its forwards
        and comparisons.

    Raises:
        StateError: a model's loss is not finite.
    """
    losses: list[float] = []
    scores: dict[RotateKVConfig, list[WindowScore]] = {config: [] for config in candidates}
    bits: dict[RotateKVConfig, list[float]] = {config: [] for config in candidates}
    seconds = dict.fromkeys(candidates, 0.0)
    recent = dict.fromkeys(candidates, 0)
    for done, window in enumerate(windows, 1):
        ids = window.to(model.device)
        targets = ids[0, 1:]
        reference, _ = _predict(model, ids)
        losses.append(nn.functional.cross_entropy(reference, targets).item())
        for config, candidate in candidates.items():
            begin = time.perf_counter()
            logits, cache = _predict(candidate, ids)
            scores[config].append(score(reference, logits, targets))
            seconds[config] += time.perf_counter() - begin
            recent[config] = max(
                layer.spec.window for layer in cache.layers if isinstance(layer, PackedLayer)
            )
            bits[config].append(bits_per_element(cache, report(candidate).sites, ids.shape[1]))
        if progress is not None:
            progress(done, len(windows))
    predictions = sum(window.shape[1] - 1 for window in windows)
    return {
        "untransformed_perplexity": math.exp(fmean(losses)),
        "rows": [
            {
                **_stored(config, model.dtype),
                "window": recent[config],
                "bits_per_element": fmean(bits[config]),
                **means(scores[config]),
                "tokens": predictions,
                "seconds": seconds[config],
            }
            for config in candidates
        ],
    }


@torch.inference_mode()
def _predict(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Cache]:
    """Logits [T-1, V] of every next token in float32, and the cache that the forward filled."""
    output = model(input_ids=ids, use_cache=True)
    return output.logits[0, :-1].float(), cache_of(output)


def _stored(config: RotateKVConfig, dtype: torch.dtype) -> dict[str, Any]:
    """How the cache is stored; recipe "none" keeps the model's dtype, whatever bits its config names."""
    exact = 8 * dtype.itemsize if config.recipe == "none" else None
    return {
        "recipe": config.recipe,
        "key_bits": exact or config.key_bits,
        "value_bits": exact or config.value_bits,
    }


def means(windows: Sequence[WindowScore]) -> dict[str, Any]:
    """A row's means over windows of one length, and the windows apart."""
    per_window = {
        "nll": [window.nll for window in windows],
        "kl": [window.kl for window in windows],
        "agreement": [window.agreement for window in windows],
    }
    return {
        "perplexity": math.exp(fmean(per_window["nll"])),
        "kl": fmean(per_window["kl"]),
        "agreement": fmean(per_window["agreement"]),
        "per_window": {"perplexity": [math.exp(nll) for nll in per_window["nll"]], **per_window},
    }

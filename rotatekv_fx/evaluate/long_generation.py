"""Long generation: does text that a model writes on its packed cache stay as likely and as varied as its own?

Errors of a quantized cache feed on themselves when a model reads what it wrote. Text is sampled at
temperature 1, since greedy text of small models soon repeats itself on any cache; the untransformed model
judges it. Perplexities of sampled texts spread widely, as their subjects do. The divergence does not: by how
much the judge's loss on a text is above that of its writer, an estimate of KL(writer || judge).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rotatekv_fx.errors import InputError
from rotatekv_fx.evaluate.loading import check_context
from rotatekv_fx.naming import cache_argument, cache_of

NGRAM = 4


@torch.inference_mode()
def long_generation(
    model: PreTrainedModel,
    writers: Mapping[str, PreTrainedModel],
    prompts: Sequence[Tensor],
    new_tokens: int = 1024,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Let each writer continue the prompts, and judge what it wrote.

    Args:
        model: the untransformed model, the judge.
        writers: by name; the untransformed model among them gives the figures to compare with.
        prompts: ids [1, T], all of one length; each is continued once, to the full length (past end tokens).

    Returns:
        A row for each writer: `perplexity` of its text under `model`, `divergence` in nats a token, both with
        a 95% normal interval over prompts (None of one) and again of the last quarter alone, and `distinct`,
        the share of different 4-grams.

    Raises:
        InputError: there are no prompts, or prompt and text are longer than the model allows.
    """
    if not prompts:
        raise InputError("There are no prompts to continue; give at least 1.")
    ids = torch.cat(list(prompts)).to(model.device)
    check_context(model, ids.shape[1] + new_tokens)
    return [
        {"recipe": name, **_judge(model, writer, ids, new_tokens, seed)} for name, writer in writers.items()
    ]


def _judge(
    model: PreTrainedModel, writer: PreTrainedModel, prompts: Tensor, new_tokens: int, seed: int
) -> dict[str, Any]:
    text = write(writer, prompts, new_tokens, seed)
    losses = torch.stack([_losses(model, row, new_tokens) for row in text])
    gaps = losses - torch.stack([_losses(writer, row, new_tokens) for row in text])
    last = new_tokens // 4
    return {
        "texts": len(text),
        "new_tokens": new_tokens,
        "perplexity": math.exp(losses.mean().item()),
        "interval": _interval(losses, math.exp),
        "last_quarter_perplexity": math.exp(losses[:, -last:].mean().item()),
        "divergence": gaps.mean().item(),
        "divergence_interval": _interval(gaps),
        "last_quarter_divergence": gaps[:, -last:].mean().item(),
        "distinct": fmean(distinct(row[-new_tokens:].tolist()) for row in text),
    }


def _interval(losses: Tensor, scale: Callable[[float], float] = float) -> list[float] | None:
    """Mean of [texts, tokens] less and plus 1.96 standard errors over texts."""
    per_text = losses.mean(1).tolist()
    if len(per_text) < 2:
        return None
    mean, half = fmean(per_text), 1.96 * stdev(per_text) / math.sqrt(len(per_text))
    return [scale(mean - half), scale(mean + half)]


def write(writer: PreTrainedModel, prompts: Tensor, new_tokens: int, seed: int = 0) -> Tensor:
    """Sample [B, new_tokens] tokens after prompts [B, T], and return both, [B, T + new_tokens]."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return writer.generate(  # type: ignore[operator]  # of a mixin that PreTrainedModel does not declare
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=new_tokens,
            eos_token_id=None,
            pad_token_id=0,
        )


def _losses(model: PreTrainedModel, text: Tensor, new_tokens: int) -> Tensor:
    """Negative log-likelihood of each of the last `new_tokens` tokens of [N], in nats.

    The prompt is read first and the rest on its cache, as when it was written: a packed cache chooses its
    sinks from the prompt.
    """
    prompt = text[None, :-new_tokens]
    first = model(input_ids=prompt, use_cache=True)
    cache = {cache_argument(model): cache_of(first)}
    rest = model(input_ids=text[None, -new_tokens:], **cache).logits[0, :-1]
    logits = torch.cat([first.logits[0, -1:], rest]).float()
    return torch.nn.functional.cross_entropy(logits, text[-new_tokens:], reduction="none")


def distinct(tokens: Sequence[int], size: int = NGRAM) -> float:
    """Different n-grams of `size` tokens over all of them; 1 where none repeats."""
    grams = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    return len(set(grams)) / max(1, len(grams))

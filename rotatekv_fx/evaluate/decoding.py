"""Cases of a task, answered by greedy decoding in left-padded batches, and how two models' answers differ."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rotatekv_fx.errors import InputError
from rotatekv_fx.evaluate.loading import check_context
from rotatekv_fx.evaluate.tasks import Case
from rotatekv_fx.evaluate.text import encode, start_tokens

Find = Callable[[str], str | None]
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Answers:
    """Which cases a model answers exactly, in the cases' order."""

    correct: tuple[bool, ...]

    def summary(self) -> dict[str, Any]:
        """Counts, accuracy in percent, and its 95% Wilson score interval."""
        right, cases = sum(self.correct), len(self.correct)
        return {
            "right": right,
            "cases": cases,
            "accuracy": 100 * right / cases,
            "interval": wilson(right, cases),
        }

    def minus(self, other: Answers) -> dict[str, Any]:
        """Paired difference of accuracies, in points, with a 95% normal interval over cases.

        Raises:
            InputError: the other model answered another number of cases.
        """
        if len(other.correct) != len(self.correct):
            raise InputError(
                f"{len(self.correct)} and {len(other.correct)} cases were answered; a paired difference "
                "needs the same cases for both."
            )
        gaps = [int(a) - int(b) for a, b in zip(self.correct, other.correct, strict=True)]
        count, mean = len(gaps), sum(gaps) / len(gaps)
        variance = sum((gap - mean) ** 2 for gap in gaps) / max(1, count - 1)
        half = 1.96 * math.sqrt(variance / count)
        return {
            "points": 100 * mean,
            "interval": [100 * (mean - half), 100 * (mean + half)],
            "won": gaps.count(1),
            "lost": gaps.count(-1),
        }


def wilson(right: int, cases: int) -> list[float]:
    """95% score interval of a proportion, in percent (E. B. Wilson, 1927)."""
    z = 1.96
    share, weight = right / cases, z * z / cases
    middle = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / cases + weight / (4 * cases)) / (1 + weight)
    return [100 * max(0.0, middle - half), 100 * min(1.0, middle + half)]


@torch.inference_mode()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: Sequence[Case],
    find: Find,
    new_tokens: int,
    batch: int = 8,
    progress: Progress | None = None,
) -> Answers:
    """Continue each case's prompt to the end of its line and compare what `find` reads with its answer.

    Args:
        model: transformed or not; batches are left-padded.
        batch: cases of a step; neighbours of like length cost least padding.

    Raises:
        InputError: there are no cases, or one is too long for the model.
    """
    if not cases:
        raise InputError("There are no cases to answer; ask for at least 1.")
    ids = [[*start_tokens(tokenizer), *encode(tokenizer, case.prompt)] for case in cases]
    check_context(model, max(map(len, ids)) + new_tokens)
    pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    order = sorted(range(len(cases)), key=lambda i: len(ids[i]))
    correct = [False] * len(cases)
    for first in range(0, len(order), batch):
        chosen = order[first : first + batch]
        width = max(len(ids[i]) for i in chosen)
        rows = torch.tensor([[pad] * (width - len(ids[i])) + ids[i] for i in chosen], device=model.device)
        real = torch.tensor([[0] * (width - len(ids[i])) + [1] * len(ids[i]) for i in chosen])
        output = model.generate(  # type: ignore[operator]  # of a mixin that PreTrainedModel does not declare
            rows,
            attention_mask=real.to(model.device),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=pad,
            stop_strings="\n",
            tokenizer=tokenizer,
        )
        for i, text in zip(chosen, tokenizer.batch_decode(output[:, width:]), strict=True):
            correct[i] = find(text) == cases[i].answer
        if progress is not None:
            progress(min(first + batch, len(order)), len(order))
    return Answers(tuple(correct))

"""Fact recall: does a model still find a code that it read, at several depths and lengths of the text?"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rotatekv_fx.evaluate.decoding import Answers, Progress, answer
from rotatekv_fx.evaluate.tasks import Case, code_found, filler_sentences, recall_case
from rotatekv_fx.evaluate.text import encode

NEW_TOKENS = 10


def recall_cases(
    tokenizer: PreTrainedTokenizerBase,
    filler: str,
    lengths: Sequence[int],
    depths: Sequence[float],
    each: int,
    seed: int = 0,
) -> list[Case]:
    """`each` cases of every length and depth.

    Args:
        filler: running text that the facts are put in.

    Raises:
        InputError: the filler has too few sentences.
    """
    rng, sentences = random.Random(f"recall {seed}"), filler_sentences(filler)
    return [
        recall_case(rng, sentences, length, lambda text: len(encode(tokenizer, text)), depth)
        for length, depth, _ in product(lengths, depths, range(each))
    ]


def recall(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: Sequence[Case],
    batch: int = 8,
    progress: Progress | None = None,
) -> Answers:
    """Which codes a model recalls.

    Raises:
        InputError: there are no cases, or one is too long for the model.
    """
    return answer(model, tokenizer, cases, code_found, NEW_TOKENS, batch, progress)


def by_place(cases: Sequence[Case], answers: Answers) -> list[dict[str, Any]]:
    """Counts and accuracy for every length and depth, in order."""
    places: dict[tuple[int, float | None], list[bool]] = {}
    for case, correct in zip(cases, answers.correct, strict=True):
        places.setdefault((case.length, case.depth), []).append(correct)
    return [
        {"length": length, "depth": depth, **Answers(tuple(correct)).summary()}
        for (length, depth), correct in places.items()
    ]

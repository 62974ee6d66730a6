"""Two tasks with exact answers: word problems with worked steps, and facts to recall from running text.

The bundled model was trained on text of these forms (its card says so); cases are drawn anew from a seed.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable, Sequence

from rotatekv_fx.errors import InputError

_FACTS = 4  # of a case of recall


def _words(text: str) -> list[str]:
    return text.split()


NAMES = _words(
    "Anna Ben Clara David Emma Frank Grace Henry Ivy Jack Kate Leo Mia Noah Olive Paul Quinn Rosa Sam "
    "Tina Uma Victor Wendy Xena Yara Zane"
)
ITEMS = _words(
    "apples books coins stamps marbles pencils cards shells cookies flowers tickets stones balloons "
    "buttons candles eggs keys lemons ropes spoons"
)
CITIES = _words(
    "Paris London Berlin Madrid Rome Vienna Prague Dublin Oslo Athens Lisbon Warsaw Cairo Tokyo Delhi "
    "Lima Quito Boston Denver Seattle"
)
COLORS = _words("red blue green yellow white black purple orange silver golden")

_SENTENCE_CHARACTERS = range(41, 200)
_DOUBLE_AT_MOST = 90

CountTokens = Callable[[str], int]


@dataclasses.dataclass(frozen=True)
class Case:
    """A prompt with an exact answer.

    Attributes:
        prompt: ends where the model goes on.
        answer: what `found` must give for the continuation.
        depth: where in the filler the fact stands, from 0 (start) to 1, or None.
        length: tokens asked for.
    """

    prompt: str
    answer: str
    length: int
    depth: float | None = None


def word_problem(rng: random.Random) -> tuple[str, str, int]:
    """A word problem of two to four steps: question, worked steps up to "#### total", total."""
    name, item, total = rng.choice(NAMES), rng.choice(ITEMS), rng.randint(5, 60)
    said, worked = [f"{name} has {total} {item}."], []
    for _ in range(rng.randint(2, 4)):
        sentence, step, total = _change(rng, name, item, total)
        said.append(sentence)
        worked.append(step)
    question = f"Question: {' '.join(said)} How many {item} does {name} have now?\nAnswer: "
    return question, f"{' '.join(worked)} #### {total}\n", total


def _change(rng: random.Random, name: str, item: str, total: int) -> tuple[str, str, int]:
    """One thing that happens to `total` items: its sentence, its worked step, and the new total."""
    kind, count = rng.choice(("buy", "give", "double", "friend", "packs")), rng.randint(2, 20)
    if (kind == "give" and count >= total) or (kind == "double" and total > _DOUBLE_AT_MOST):
        kind = "buy"
    match kind:
        case "give":
            return (
                f"{name} gives away {count} {item}.",
                f"{total} - {count} = {total - count}.",
                total - count,
            )
        case "double":
            return f"Then the number of {item} doubles.", f"{total} * 2 = {2 * total}.", 2 * total
        case "packs":
            bags = rng.randint(2, 5)
            more = bags * count
            return (
                f"{name} finds {bags} bags with {count} {item} each.",
                f"{bags} * {count} = {more}. {total} + {more} = {total + more}.",
                total + more,
            )
        case "friend":
            friend = rng.choice([other for other in NAMES if other != name])
            sentence = f"{friend} brings {count} {item} for {name}."
        case _:
            sentence = f"{name} buys {count} more {item}."
    return sentence, f"{total} + {count} = {total + count}.", total + count


def word_problem_case(rng: random.Random, length: int, tokens: CountTokens) -> Case:
    """A problem after as many worked ones as fit `length` tokens."""
    question, _, total = word_problem(rng)
    prompt, used = question, tokens(question)
    while True:
        earlier = "".join(word_problem(rng)[:2])
        used += tokens(earlier)
        if used > length:
            return Case(prompt, str(total), length)
        prompt = earlier + prompt


def recall_case(
    rng: random.Random,
    sentences: Sequence[str],
    length: int,
    tokens: CountTokens,
    depth: float | None = None,
) -> Case:
    """Facts among about `length` tokens of running text, and a question for one of them.

    Args:
        sentences: filler, of `filler_sentences`; a run of them from a random place is used.
        depth: share of the filler before the fact asked for; None puts it anywhere.
    """
    known: dict[str, str] = {}
    while len(known) < _FACTS:
        key = f"{rng.choice(COLORS)} {rng.choice(ITEMS).removesuffix('s')} in {rng.choice(CITIES)}"
        known.setdefault(key, str(rng.randint(10000, 99999)))
    stated = {key: f"The code of the {key} is {value}." for key, value in known.items()}
    asked = rng.choice(list(known))
    end = f"\nQuestion: What is the code of the {asked}?\nAnswer: The code of the {asked} is"
    left = length - tokens(end) - sum(tokens(fact) for fact in stated.values())
    text, at = [], rng.randrange(len(sentences))
    while (left := left - tokens(sentences[at])) > 0:
        text.append(sentences[at])
        at = (at + 1) % len(sentences)
    target = None if depth is None else round(depth * len(text))
    for key in known:
        if key != asked:
            text.insert(rng.randint(0, len(text)), stated[key])
    if target is None:
        target = rng.randint(0, len(text))
    else:
        target = _after_filler(text, target, set(stated.values()))
    text.insert(target, stated[asked])
    return Case(" ".join(text) + end, known[asked], length, depth)


def _after_filler(text: Sequence[str], count: int, facts: set[str]) -> int:
    """Index in `text` after `count` sentences that are no facts."""
    filler = [i for i, sentence in enumerate(text) if sentence not in facts]
    return filler[count - 1] + 1 if count else 0


def filler_sentences(text: str) -> list[str]:
    """Sentences of a running text, 41 to 199 characters long and starting with a capital.

    Raises:
        InputError: there are fewer than 10.
    """
    pieces = (piece.strip() for piece in text.replace("\n", " ").split(". "))
    found = [f"{p}." for p in pieces if len(p) in _SENTENCE_CHARACTERS and p[0].isupper()]
    if len(found) < 10:
        raise InputError(
            f"The filler text has {len(found)} sentences of 41 to 199 characters; give one with at least 10."
        )
    return found


def total_found(continuation: str) -> str | None:
    """The number after "####" of the first problem that a continuation works, if it gets there."""
    found = re.match(r"[^\n]*?#### (\d+)", continuation)
    return found and found[1]


def code_found(continuation: str) -> str | None:
    """The number that a continuation starts with, if it does."""
    found = re.match(r"\s*(\d+)", continuation)
    return found and found[1]

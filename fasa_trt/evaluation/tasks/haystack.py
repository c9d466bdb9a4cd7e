"""Long texts with a few lines hidden in them, cut to a number of tokens."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache

from fasa_trt.calibrate.corpus import bundled_files
from fasa_trt.evaluation.model import EvalModel
from fasa_trt.evaluation.tasks.base import too_short


def hidden_prompt(
    task: str, model: EvalModel, ask: tuple[str, str], needles: Sequence[str], context: int, answer: int,
    rng: random.Random,
) -> tuple[list[int], list[int]]:  # fmt: skip
    """Tokens of a document with the needles in it, and of what comes after: together with `answer` tokens at most
    `context`. ask: wording before and after the text. Raises FasaError for a context that is too short."""
    before, after = ask
    head, tail = model.prompt(before, after)
    room = context - len(head) - len(tail) - answer
    text = hide(lambda text: len(model.encode(text)), needles, room, rng) if room > 0 else None
    if text is None:
        raise too_short(task, context)
    return model.prompt(before + text, after)


def hide(
    count: Callable[[str], int], needles: Sequence[str], length: int, rng: random.Random, kind: str = "prose"
) -> str | None:
    """Bundled text of at most `length` tokens with each needle as a line of its own, in their order, spread over it.

    count: tokens of a text. kind: prose or source. None where the needles alone are longer.
    """
    left = length - count("".join(f"{needle}\n" for needle in needles)) - len(needles)
    if left < 0:
        return None
    lines = filler(kind)
    start, body = rng.randrange(len(lines)), list[str]()
    while left > 0:
        line = lines[(start + len(body)) % len(lines)]
        left -= count(line) + 1  # lines that meet may make one token more than they make apart
        body.append(line)
    if body:
        body.pop()
    places = sorted(rng.randrange(len(body) + 1) for _ in needles)
    for place, needle in reversed(list(zip(places, needles, strict=True))):
        body.insert(place, f"{needle}\n")
    return "".join(body)


@cache
def filler(kind: str) -> tuple[str, ...]:
    """Lines of the bundled text that are not empty, with their newlines."""
    text = "\n".join(file.read_text(encoding="utf-8") for file in bundled_files(kind))
    return tuple(f"{line}\n" for line in text.split("\n") if line.strip())


@cache
def words() -> tuple[str, ...]:
    """Lower-case words of 5 to 9 letters in the bundled prose, sorted."""
    found = {word.lower() for line in filler("prose") for word in line.split() if word.isascii() and word.isalpha()}
    return tuple(sorted(word for word in found if 5 <= len(word) <= 9))

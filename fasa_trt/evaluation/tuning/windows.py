"""The text that loss is measured on: windows to search on, and as many others that are held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fasa_trt.calibrate.corpus import Encode, iter_documents, token_windows
from fasa_trt.calibrate.recall import recall_document
from fasa_trt.core.errors import FasaError

STEPS = 128  # decode steps at the end of a window, at most a quarter of it
SHORTEST = 256  # tokens of a window
TOKENS_PER_NOTE = 64
FIRST_SEED = 2_000_000  # calibration makes its recall documents from small seeds


@dataclass(frozen=True)
class ScoredWindow:
    """prompt: read densely. steps: tokens decoded after it, one by one. scored: for each of steps[1:], whether its
    loss counts."""

    prompt: Sequence[int]
    steps: Sequence[int]
    scored: Sequence[bool]


def tuning_windows(
    encode: Encode, prefix: Sequence[int], text: Path | None, *, length: int, count: int, seed: int
) -> tuple[list[ScoredWindow], list[ScoredWindow]]:
    """Up to `count` windows of at most `length` tokens to search on, and up to as many held-out ones; none overlap.

    prefix: the tokenizer's BOS. text: whose last tokens are scored. None takes the bundled text, and every second
    window becomes source code with notes, followed by questions about them, of which the answers alone are scored.
    Raises FasaError when the text does not fill two windows, or they are too short.
    """
    if length < SHORTEST:
        raise FasaError(f"windows of {length} tokens are too short to tune on", hint=f"--length {SHORTEST} or more")
    plain = count if text is not None else (count + 1) // 2
    found = token_windows(encode, iter_documents(text), length - len(prefix), 2 * plain, seed)
    if len(found) < 2:
        raise FasaError(
            f"the text fills one window of {length} tokens, tuning needs one more that is held out",
            hint="give more --text or lower --length",
        )
    half, steps = len(found) // 2, min(STEPS, length // 4)
    windows = [_plain([*prefix, *window.tolist()], steps) for window in found[: 2 * half]]
    asked = count - plain
    first = FIRST_SEED + 2 * asked * seed
    recall = [_recall(encode, prefix, length, steps, seed=first + number) for number in range(2 * asked)]
    return windows[:half] + recall[:asked], windows[half:] + recall[asked:]


def _plain(tokens: list[int], steps: int) -> ScoredWindow:
    split = len(tokens) - steps - 1  # the first step is given, so that each scored token is predicted in one
    return ScoredWindow(tokens[:split], tokens[split:], [True] * steps)


def _recall(encode: Encode, prefix: Sequence[int], length: int, steps: int, *, seed: int) -> ScoredWindow:
    room = length - len(prefix) - steps
    document = recall_document(encode, length=room, notes=min(33, length // TOKENS_PER_NOTE), seed=seed)
    tokens: list[int] = []
    scored: list[bool] = []
    for question in document.questions:
        line, asked = list(encode(f"{question.prompt}{question.answer}\n")), list(encode(question.prompt))
        if tokens and len(tokens) + len(line) > steps:
            break
        same = next((i for i, (a, b) in enumerate(zip(line, asked, strict=False)) if a != b), len(asked))
        tokens += line
        scored += [False] * same + [True] * (len(line) - same)
    return ScoredWindow([*prefix, *encode(document.text)], tokens[:steps], scored[1:steps])

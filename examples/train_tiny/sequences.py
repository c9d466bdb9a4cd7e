"""Training and evaluation sequences: plain code, and code with notes, recalls and copies between its lines.

All work is on token ids: a sequence has an exact length, and every token its own loss weight.
"""

from __future__ import annotations

import math
import string
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from examples.train_tiny.corpus import BOS
from fasa_trt.calibrate.recall import note_line

FIRST, INNER, LAST = 1, 2, 3
COPY_FREE = 5  # tokens of a copied line before the model can know that it is a copy


class Sample(NamedTuple):
    """tokens int64, loss weights float32, answer marks int8 (0, or the place in an answer); all [length]."""

    tokens: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]
    answers: npt.NDArray[np.int8]


class Line(NamedTuple):
    """One inserted line: token ids with weights and answer marks."""

    tokens: list[int]
    weights: list[float]
    answers: list[int]


class Insertion(NamedTuple):
    """A line, where it goes in the code, and its rank among lines at the same place: notes before recalls."""

    position: int
    rank: int
    line: Line


class SequenceGenerator:
    """Draws sequences from an array of token ids (uint16 [tokens]). text_weight: of code in the loss."""

    def __init__(
        self, code: npt.NDArray[Any], seed: int, tokenizer: Path, *, keys: int = 20_000, text_weight: float = 1.0
    ) -> None:
        loaded = Tokenizer.from_file(str(tokenizer))

        def encode(text: str) -> list[int]:
            return list(loaded.encode(text, add_special_tokens=False).ids)

        self.code, self.text_weight = code, text_weight
        self.rng = np.random.default_rng(seed)
        self.vocab_size = loaded.get_vocab_size()
        (self.newline,) = encode("\n")
        self.note, self.recall, self.equals = encode("# note"), encode("# recall"), encode(" = ")
        self.hash = encode("#")
        self.digits = np.array([encode(digit)[0] for digit in string.digits])
        letters, rng = string.ascii_lowercase, self.rng
        names = {"".join(letters[i] for i in rng.integers(0, 26, rng.integers(4, 7))) for _ in range(keys)}
        spaced = [" " + name for name in sorted(names)]
        self.keys = [list(key.ids) for key in loaded.encode_batch(spaced, add_special_tokens=False)]
        # The pieces must encode as they do in running text.
        line = self._recall_line(encode(" qzxvb"), np.array([9, 0, 2, 1, 0]), asked=False)
        assert line.tokens == encode(note_line("qzxvb", "90210"))

    def training(self, length: int) -> Sample:
        """Plain code (45 %), or code with notes."""
        if self.rng.random() < 0.45:
            return self.plain(length)
        return self.noted(length, copies=int(self.rng.integers(0, max(2, length // 2000 + 1))))

    def noted(self, length: int, *, copies: int) -> Sample:
        """Code with up to length/64 notes and about as many recalls."""
        rng = self.rng
        most = max(6, min(64, length // 64))
        few = rng.random() < 0.4
        notes = int(round(math.exp(rng.uniform(0, math.log(most)))) if few else rng.integers(1, most + 1))
        recalls = int(rng.integers(8, max(10, min(64, length // 56)) + 1))
        return self.recalls(length, notes, recalls, copies=copies, tail_tokens=int(rng.integers(200, 700)))

    def plain(self, length: int) -> Sample:
        tokens = np.concatenate([[BOS], self._code(length - 1)])
        return Sample(tokens, np.full(length, self.text_weight, np.float32), np.zeros(length, np.int8))

    def repeated(self, length: int) -> Sample:
        """Random tokens, over and over: nothing teaches sooner to look back by content. Marked as one answer.

        Short periods, the easiest, are as frequent as long ones.
        """
        period = int(math.exp(self.rng.uniform(math.log(8), math.log(length // 2))))
        block = self.rng.integers(2, self.vocab_size, period)
        tokens = np.concatenate([[BOS], np.resize(block, length - 1)])
        known = np.arange(length) > period + COPY_FREE
        answers = np.where(known, INNER, 0).astype(np.int8)
        return Sample(tokens, np.where(known, 0.5, 0).astype(np.float32), answers)

    def recalls(
        self,
        length: int,
        notes: int,
        recalls: int,
        *,
        copies: int = 0,
        tail: float = 0.5,
        tail_tokens: int = 400,
        unique: bool = False,
    ) -> Sample:
        """Code with notes, recalls of them further down, and pairs of equal random lines.

        tail: share of the recalls that stand within the last `tail_tokens` tokens.
        unique: ask for each note at most once.
        """
        rng = self.rng
        keys = rng.choice(len(self.keys), notes, replace=False)
        values = rng.integers(0, 10, (notes, 5))
        asked = rng.permutation(notes)[:recalls] if unique else rng.integers(0, notes, recalls)
        noted = [self._recall_line(self.keys[k], v, asked=False) for k, v in zip(keys, values, strict=True)]
        recalled = [self._recall_line(self.keys[keys[note]], values[note], asked=True) for note in asked]
        pairs = [self._copied_line() for _ in range(copies)]
        inserted = noted + recalled + [line for pair in pairs for line in pair]
        code = self._code(length - 1 - sum(len(line.tokens) for line in inserted))

        starts = np.concatenate([[0], np.nonzero(code == self.newline)[0] + 1])
        tail_from = max(len(code) - tail_tokens, len(code) // 2)
        tail_line = min(int(np.searchsorted(starts, tail_from)), len(starts) - 1)
        note_lines = rng.integers(0, max(1, tail_line if tail >= 1 else int(len(starts) * 0.95)), notes)

        items = [Insertion(int(starts[at]), 0, line) for at, line in zip(note_lines, noted, strict=True)]
        for note, line in zip(asked, recalled, strict=True):
            earliest = max(note_lines[note], tail_line) if rng.random() < tail else note_lines[note]
            items.append(Insertion(int(starts[rng.integers(earliest, len(starts))]), 1, line))
        for original, copy in pairs:
            first, second = np.sort(rng.integers(0, len(starts), 2))
            items += [Insertion(int(starts[first]), 0, original), Insertion(int(starts[second]), 2, copy)]
        rng.shuffle(items)
        items.sort(key=lambda item: (item.position, item.rank))
        return weave(code, items, self.text_weight)

    def _code(self, length: int) -> npt.NDArray[np.int64]:
        start = int(self.rng.integers(0, len(self.code) - length))
        return self.code[start : start + length].astype(np.int64)

    def _recall_line(self, key: list[int], value: npt.NDArray[np.int64], *, asked: bool) -> Line:
        """A note (weightless but for its form), or a recall, whose answer weighs most."""
        head = [*(self.recall if asked else self.note), *key]
        tokens = [*head, *self.equals, *(int(self.digits[digit]) for digit in value), self.newline]
        equals = len(self.equals)
        weights = [0.0] * len(head) + [0.2] * equals + [5.0 if asked else 0.0] * 5 + [0.2]
        marks = [FIRST, INNER, INNER, INNER, LAST] if asked else [0] * 5
        return Line(tokens, weights, [0] * (len(head) + equals) + marks + [0])

    def _copied_line(self) -> tuple[Line, Line]:
        """A comment of 20 to 40 random tokens, twice: the second is learnt from."""
        count = int(self.rng.integers(20, 41))
        content = self.rng.integers(2, self.vocab_size, count)
        content[content == self.newline] = 300
        tokens = [*self.hash, *content.tolist(), self.newline]
        nothing = [0] * len(tokens)
        learnt = [0.0] * COPY_FREE + [2.0] * (len(tokens) - COPY_FREE)
        return Line(tokens, [0.0] * len(tokens), nothing), Line(tokens, learnt, nothing)


def weave(text: npt.NDArray[np.int64], items: list[Insertion], weight: float) -> Sample:
    """<bos> and the text, of this weight, with the lines in it; items are in the order of their positions."""
    tokens, weights, answers = [np.array([BOS])], [np.full(1, weight)], [np.zeros(1)]

    def add_text(start: int, end: int) -> None:
        tokens.append(text[start:end])
        weights.append(np.full(end - start, weight))
        answers.append(np.zeros(end - start))

    done = 0
    for position, _, line in items:
        add_text(done, position)
        done = position
        tokens.append(np.array(line.tokens))
        weights.append(np.array(line.weights))
        answers.append(np.array(line.answers))
    add_text(done, len(text))
    return Sample(
        np.concatenate(tokens).astype(np.int64),
        np.concatenate(weights).astype(np.float32),
        np.concatenate(answers).astype(np.int8),
    )

"""The mixes of sequences that are trained on, each sequence with the kind that it is."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from examples.train_tiny.sequences import Sample, SequenceGenerator
from examples.train_tiny.settings import SHORTEST_TASK, Mix
from examples.train_tiny.tasks import TASKS, TEXT_WEIGHT, TaskGenerator

KINDS = ("text", "recall", "copy", *TASKS)
SHARES = (0.18, 0.22, 0.08, 0.14, 0.1, 0.08, 0.08, 0.06, 0.06)  # of the kinds, in the mix `tasks`
SHORT_SHARES = (0.25, 0.0, 0.75)  # where sequences are shorter than SHORTEST_TASK


class Kinded(NamedTuple):
    """kind: index in KINDS."""

    kind: int
    sample: Sample


class Sequences:
    """Draws sequences of a mix. work: what `corpus.prepare` wrote. part: train or val."""

    def __init__(self, work: Path, mix: Mix, seed: int, part: str = "train") -> None:
        code = np.load(work / f"{part}.npy", mmap_mode="r")
        weight = text_weight(mix)
        self.code = SequenceGenerator(code, seed, work / "tok.json", text_weight=weight)
        self.tasks: TaskGenerator | None = None
        if mix == "tasks":
            prose = np.load(work / f"prose-{part}.npy", mmap_mode="r")
            self.prose = SequenceGenerator(prose, seed + 1, work / "tok.json", keys=1, text_weight=weight)
            self.tasks = TaskGenerator(prose, code, seed + 2, work)

    def reseed(self, seed: int) -> None:
        """From here on as if drawn anew, with the names that there are."""
        self.code.rng = np.random.default_rng(seed)
        if self.tasks is not None:
            self.prose.rng, self.tasks.rng = np.random.default_rng(seed + 1), np.random.default_rng(seed + 2)

    def training(self, length: int) -> Kinded:
        """A sequence of exactly `length` tokens."""
        if self.tasks is None:
            sample = self.code.training(length)
            return Kinded(int(sample.answers.any()), sample)
        shares = SHARES if length > SHORTEST_TASK else SHORT_SHARES
        kind = int(self.code.rng.choice(len(shares), p=shares))
        if KINDS[kind] == "text":
            return Kinded(kind, (self.code if self.code.rng.random() < 0.6 else self.prose).plain(length))
        if KINDS[kind] == "recall":
            return Kinded(kind, self.code.noted(length, copies=min(8, 1 + length // 500)))
        if KINDS[kind] == "copy":
            return Kinded(kind, self.code.repeated(length))
        return Kinded(kind, self.tasks.training(KINDS[kind], length))


def text_weight(mix: Mix) -> float:
    """Of a token of code or prose in the loss."""
    return TEXT_WEIGHT if mix == "tasks" else 1.0

"""Recall accuracy and perplexity on held-out code."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from examples.train_tiny.sequences import FIRST_DIGIT, Sample, SequenceGenerator

Kind = Literal["single", "multi", "plain"]
Forward = Callable[[Tensor], Tensor]
"""Token ids int64 [batch, length] -> logits [batch, length, vocab]."""


@dataclass(frozen=True)
class Evaluation:
    """Held-out documents and how to run them. work: the folder that `corpus.prepare` wrote."""

    work: Path
    device: torch.device
    batch_tokens: int

    def documents(self, kind: Kind, count: int, length: int, seed: int) -> list[Sample]:
        """single: one note and its recall; multi: 33 notes, 8 recalls; plain: code alone."""
        code = np.load(self.work / "val.npy", mmap_mode="r")
        generator = SequenceGenerator(code, seed, self.work / "tok.json")
        if kind == "plain":
            return [generator.plain(length) for _ in range(count)]
        if kind == "single":
            return [generator.recalls(length, 1, 1, tail=1.0, tail_tokens=250) for _ in range(count)]
        return [generator.recalls(length, 33, 8, tail=1.0, tail_tokens=350, unique=True) for _ in range(count)]

    @torch.no_grad()
    def recall(self, forward: Forward, kind: Kind, count: int, length: int, seed: int = 7) -> float:
        """Share of answers of which every digit is the most likely one (what greedy decoding would give)."""
        right = total = 0
        for tokens, answers in self._batches(self.documents(kind, count, length, seed), length):
            hit = forward(tokens).argmax(-1)[:, :-1] == tokens[:, 1:]
            row, position = (answers[:, 1:] == FIRST_DIGIT).nonzero(as_tuple=True)
            whole = torch.stack([hit[row, position + digit] for digit in range(5)], 1).all(1)
            right += int(whole.sum())
            total += len(whole)
        return right / total

    @torch.no_grad()
    def perplexity(self, forward: Forward, count: int, length: int, seed: int = 11) -> float:
        """Of plain held-out code."""
        total, tokens_seen = 0.0, 0
        for tokens, _ in self._batches(self.documents("plain", count, length, seed), length):
            scores = forward(tokens)[:, :-1].float().flatten(0, 1)
            targets = tokens[:, 1:].flatten()
            total += float(F.cross_entropy(scores, targets, reduction="sum"))
            tokens_seen += len(targets)
        return math.exp(total / tokens_seen)

    def _batches(self, documents: list[Sample], length: int) -> list[tuple[Tensor, Tensor]]:
        size = max(1, self.batch_tokens // length)
        tokens = torch.from_numpy(np.stack([document.tokens for document in documents]))
        answers = torch.from_numpy(np.stack([document.answers for document in documents]))
        return [
            (tokens[i : i + size].to(self.device), answers[i : i + size].to(self.device))
            for i in range(0, len(documents), size)
        ]


def evaluate_checkpoint(evaluation: Evaluation, folder: Path, lengths: list[int], count: int) -> dict[str, float]:
    """The saved checkpoint, as transformers runs it: what its users will see."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    torch.nn.Module.to(model, evaluation.device)

    def forward(tokens: Tensor) -> Tensor:
        return model(tokens, use_cache=False).logits

    results: dict[str, float] = {}
    for length in lengths:
        results[f"perplexity@{length}"] = evaluation.perplexity(forward, max(8, count // 4), length)
        results[f"single@{length}"] = evaluation.recall(forward, "single", count, length, seed=12)
        results[f"multi@{length}"] = evaluation.recall(forward, "multi", max(1, count // 2), length, seed=12)
    return results

"""What the trained model can do on held-out text: recall, RULER's tasks, perplexity; all with full attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from examples.train_tiny.corpus import EOS
from examples.train_tiny.mix import Sequences
from examples.train_tiny.sequences import FIRST, Sample
from examples.train_tiny.settings import SHORTEST_TASK, Settings
from examples.train_tiny.tasks import TASKS

Kind = Literal["single", "multi", "code", "prose"]
Forward = Callable[[Tensor], Tensor]
"""Token ids int64 [batch, length] -> logits [batch, length, vocab]."""
LONGEST_ANSWER = 100  # tokens


@dataclass(frozen=True)
class Evaluation:
    """Held-out documents and how to run them."""

    settings: Settings
    device: torch.device

    @cached_property
    def _sequences(self) -> Sequences:
        return Sequences(self.settings.work, self.settings.mix, seed=7, part="val")

    def documents(self, kind: Kind, count: int, length: int, seed: int) -> list[Sample]:
        """single: one note and its recall; multi: 33 notes, 8 recalls; code, prose: nothing else."""
        self._sequences.reseed(seed)
        code = self._sequences.code
        if kind in ("code", "prose"):
            return [(code if kind == "code" else self._sequences.prose).plain(length) for _ in range(count)]
        if kind == "single":
            return [code.recalls(length, 1, 1, tail=1.0, tail_tokens=250) for _ in range(count)]
        notes = min(33, length // 60)
        return [code.recalls(length, notes, 8, tail=1.0, tail_tokens=350, unique=True) for _ in range(count)]

    @torch.no_grad()
    def recall(self, forward: Forward, kind: Kind, count: int, length: int, seed: int = 7) -> float:
        """Share of answers of which every digit is the most likely one (what greedy decoding would give)."""
        right = total = 0
        for tokens, answers in self._batches(self.documents(kind, count, length, seed), length):
            hit = forward(tokens).argmax(-1)[:, :-1] == tokens[:, 1:]
            row, position = (answers[:, 1:] == FIRST).nonzero(as_tuple=True)
            whole = torch.stack([hit[row, position + digit] for digit in range(5)], 1).all(1)
            right += int(whole.sum())
            total += len(whole)
        return right / total

    @torch.no_grad()
    def perplexity(self, forward: Forward, kind: Kind, count: int, length: int, seed: int = 11) -> float:
        """Of plain held-out code or prose."""
        total, tokens_seen = 0.0, 0
        for tokens, _ in self._batches(self.documents(kind, count, length, seed), length):
            scores = forward(tokens)[:, :-1].float().flatten(0, 1)
            targets = tokens[:, 1:].flatten()
            total += float(F.cross_entropy(scores, targets, reduction="sum"))
            tokens_seen += len(targets)
        return math.exp(total / tokens_seen)

    def task(self, model: Any, task: str, count: int, length: int, seed: int = 12) -> float:
        """Mean share of what an answer must contain that greedy answers do contain. model: of transformers."""
        self._sequences.reseed(seed)
        generator = self._sequences.tasks
        assert generator is not None  # the mix has tasks
        asked = [generator.prompt(task, length - LONGEST_ANSWER) for _ in range(count)]
        size = max(1, 4 * self.settings.batch_tokens // length)
        score = 0.0
        for start in range(0, count, size):
            prompts = np.stack([prompt for prompt, _ in asked[start : start + size]])
            answers = greedy(model, torch.from_numpy(prompts).to(self.device), LONGEST_ANSWER)
            for ids, (_, wanted) in zip(answers, asked[start : start + size], strict=True):
                text = generator.decode(ids)
                score += sum(word in text for word in wanted) / len(wanted)
        return score / count

    def _batches(self, documents: list[Sample], length: int) -> list[tuple[Tensor, Tensor]]:
        size = max(1, self.settings.batch_tokens // length)
        tokens = torch.from_numpy(np.stack([document.tokens for document in documents]))
        answers = torch.from_numpy(np.stack([document.answers for document in documents]))
        return [
            (tokens[i : i + size].to(self.device), answers[i : i + size].to(self.device))
            for i in range(0, len(documents), size)
        ]


@torch.inference_mode()
def greedy(model: Any, prompts: Tensor, limit: int) -> list[list[int]]:
    """Most likely continuations of at most `limit` tokens, without the <eos> that ends them.

    prompts: int64 [batch, length], all of one length. Without an attention mask transformers builds none either,
    which at 16k tokens would not fit.
    """
    out = model(prompts, use_cache=True, logits_to_keep=1)
    columns: list[Tensor] = []
    running = torch.ones(len(prompts), dtype=torch.bool, device=prompts.device)
    while True:
        token = out.logits[:, -1].argmax(-1)
        columns.append(token)
        running &= token != EOS
        if len(columns) == limit or not running.any():
            break
        out = model(token[:, None], past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
    rows = torch.stack(columns, 1).tolist()
    return [row[: row.index(EOS)] if EOS in row else row for row in rows]


def evaluate_checkpoint(evaluation: Evaluation) -> dict[str, float]:
    """The saved checkpoint, as transformers runs it: what its users will see. Keys are `<measure>@<length>`."""
    from transformers import AutoModelForCausalLM

    settings = evaluation.settings
    dtype = torch.float32 if settings.cpu else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(settings.output, dtype=dtype).eval()
    torch.nn.Module.to(model, evaluation.device)

    def forward(tokens: Tensor) -> Tensor:
        return model(tokens, use_cache=False).logits

    count, documents = settings.eval_documents, max(2, settings.eval_documents // 4)
    results: dict[str, float] = {}
    shortest, *longer = (stage.length for stage in settings.stages if stage.length >= SHORTEST_TASK)
    tasks = settings.mix == "tasks"
    for length in (2 * shortest, *longer):
        results[f"perplexity@{length}"] = evaluation.perplexity(forward, "code", documents, length)
        results[f"single@{length}"] = evaluation.recall(forward, "single", count, length, seed=12)
        results[f"multi@{length}"] = evaluation.recall(forward, "multi", max(1, count // 2), length, seed=12)
        if tasks:
            results[f"perplexity_prose@{length}"] = evaluation.perplexity(forward, "prose", documents, length)
            results |= {f"{task}@{length}": evaluation.task(model, task, count, length) for task in TASKS}
        print(
            " ".join(f"{name} {value:.3f}" for name, value in results.items() if name.endswith(f"@{length}")),
            flush=True,
        )
    return results

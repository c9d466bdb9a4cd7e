"""Long generation: how far a method follows dense greedy decoding.

The method is fed the dense continuation and predicts each next token. Until its first difference that is its own
greedy generation, so where it would leave the dense one is exact, without generating again for every method.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fasa_trt.calibrate.corpus import bundled_files, token_windows
from fasa_trt.evaluation.attention import Traffic
from fasa_trt.evaluation.methods.base import Method
from fasa_trt.evaluation.model import EvalModel
from fasa_trt.evaluation.tasks.base import Batch, Document, Question, Task, TaskSettings, too_short

NEW_TOKENS = 1024
PIECE = 128  # tokens whose distributions are held at once


class LongGeneration(Task):
    """score: share of the continuation before the first difference. agreement: share of all its tokens that the method
    would choose too. divergence: Kullback-Leibler, from dense, nats a token."""

    name: ClassVar[str] = "generation"
    summary: ClassVar[str] = f"{NEW_TOKENS} tokens: share before the first difference from dense, agreement, divergence"
    metric: ClassVar[str] = "same_prefix"
    asks: ClassVar[bool] = False
    solved: ClassVar[float | None] = None

    def documents(self, model: EvalModel, context: int, settings: TaskSettings) -> list[Document]:
        new = settings.new_tokens or min(NEW_TOKENS, context // 2)
        room = context - new - len(model.prefix)
        if room < 32:
            raise too_short(self.name, context)
        texts = (file.read_text(encoding="utf-8") for file in bundled_files("source"))
        windows = token_windows(model.encode, texts, room, settings.samples, settings.seed)
        return [
            Document(str(i), [*model.prefix, *window[:-1].tolist()], (Question("", window[-1:].tolist(), (), new),))
            for i, window in enumerate(windows)
        ]

    def prepare(self, batch: Batch) -> tuple[list[list[int]], Tensor]:
        """The dense continuations, which do not stop at an end token, and their log-probabilities [B, N, V], float16
        in the main memory."""
        branch = batch.cache.branch()
        logits = batch.decoder.feed(branch, batch.rows, batch.decoder.dense, Traffic())
        rows: list[list[int]] = [[] for _ in batch.questions]
        kept: list[Tensor] = []
        for _ in range(batch.questions[0].max_new_tokens):
            kept.append(torch.log_softmax(logits, -1).half().cpu())
            best = logits.argmax(-1).tolist()
            for row, token in zip(rows, best, strict=True):
                row.append(token)
            logits = batch.decoder.feed(branch, [[token] for token in best], batch.decoder.dense, Traffic())
        return rows, torch.stack(kept, dim=1)

    def measure(self, batch: Batch, method: Method) -> list[dict[str, Any]]:
        wanted, dense = batch.reference
        branch, traffic = batch.cache.branch(), Traffic()
        selectors = batch.decoder.start(branch, method)
        rows = [[*prompt, *new[:-1]] for prompt, new in zip(batch.rows, wanted, strict=True)]
        same, nats = [], []
        for start in range(0, dense.shape[1], PIECE):
            piece = [row[start : start + PIECE] for row in rows]
            got = torch.log_softmax(batch.decoder.feed(branch, piece, selectors, traffic, every=True), -1)
            reference = dense[:, start : start + PIECE].to(got.device).float()
            tokens = torch.tensor([row[start : start + PIECE] for row in wanted], device=got.device)
            same.append(got.argmax(-1) == tokens)
            nats.append((reference.exp() * (reference - got)).sum(-1))
        divergence = torch.cat(nats, 1).mean(1).tolist()
        return [
            {
                "score": _leading(row) / len(row),
                "exact": all(row),
                "agreement": sum(row) / len(row),
                "divergence": divergence[i],
                "kv_share": round(traffic.share, 5),
            }
            for i, row in enumerate(torch.cat(same, 1).tolist())
        ]


def _leading(row: list[bool]) -> int:
    """How many of its first entries are true."""
    return row.index(False) if False in row else len(row)

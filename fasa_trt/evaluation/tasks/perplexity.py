"""Perplexity of a text's last tokens, decoded one by one after a dense look at all before them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch

from fasa_trt.calibrate.corpus import bundled_files, iter_documents, token_windows
from fasa_trt.core.errors import FasaError
from fasa_trt.evaluation.attention import Traffic
from fasa_trt.evaluation.methods.base import Method
from fasa_trt.evaluation.model import EvalModel
from fasa_trt.evaluation.tasks.base import Batch, Document, Question, Task, TaskSettings, too_short

SCORED = 256  # tokens


class PerplexityOfCode(Task):
    name: ClassVar[str] = "perplexity_code"
    summary: ClassVar[str] = f"of the last {SCORED} tokens of bundled source code"
    metric: ClassVar[str] = "perplexity"
    asks: ClassVar[bool] = False
    solved: ClassVar[float | None] = None

    def documents(self, model: EvalModel, context: int, settings: TaskSettings) -> list[Document]:
        scored = min(SCORED, context // 4)
        if scored < 16:
            raise too_short(self.name, context)
        room = context - len(model.prefix)
        windows = token_windows(model.encode, self.texts(settings), room, settings.samples, settings.seed)
        found = []
        for number, window in enumerate(windows):
            tokens = [*model.prefix, *window.tolist()]
            split = len(tokens) - scored - 1  # the first of them is given, so that each scored one is predicted
            found.append(Document(str(number), tokens[:split], (Question("", tokens[split:]),)))
        return found

    def texts(self, settings: TaskSettings) -> Iterator[str]:
        return (file.read_text(encoding="utf-8") for file in bundled_files("source"))

    def measure(self, batch: Batch, method: Method) -> list[dict[str, Any]]:
        branch, traffic = batch.cache.branch(), Traffic()
        selectors = batch.decoder.start(branch, method)
        rows = batch.rows
        logits = batch.decoder.feed(branch, [row[:-1] for row in rows], selectors, traffic, every=True)
        records = []
        for row, scores in zip(rows, logits, strict=True):
            wanted = torch.tensor(row[1:], device=scores.device)
            loss = torch.nn.functional.cross_entropy(scores[: len(wanted)], wanted)
            records.append({"score": math.exp(float(loss)), "kv_share": round(traffic.share, 5)})
        return records

    def aggregate(self, records: Sequence[dict[str, Any]]) -> float:
        """Of all tokens together: records have equally many."""
        return math.exp(sum(math.log(record["score"]) for record in records) / len(records))


class PerplexityOfProse(PerplexityOfCode):
    name: ClassVar[str] = "perplexity_prose"
    summary: ClassVar[str] = f"of the last {SCORED} tokens of bundled prose"

    def texts(self, settings: TaskSettings) -> Iterator[str]:
        return (file.read_text(encoding="utf-8") for file in bundled_files("prose"))


class PerplexityOfText(PerplexityOfCode):
    name: ClassVar[str] = "perplexity_text"
    summary: ClassVar[str] = f"of the last {SCORED} tokens of windows of --text"

    def check(self, settings: TaskSettings) -> None:
        if settings.text is None:
            raise FasaError(f"{self.name} needs a text", hint="--text FILE, folder or .jsonl")

    def texts(self, settings: TaskSettings) -> Iterator[str]:
        self.check(settings)
        return iter_documents(settings.text)

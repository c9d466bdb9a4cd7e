"""Crosses tasks with methods: every document is read once, and every method goes on from there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from fasa_trt.core.errors import FasaError
from fasa_trt.evaluation.decoder import Decoder
from fasa_trt.evaluation.methods.base import Method
from fasa_trt.evaluation.model import EvalModel
from fasa_trt.evaluation.results import Results
from fasa_trt.evaluation.tasks.base import Batch, Document, Question, Task, TaskSettings

ASK = ("auto", "decode", "prefill")
READ_TOKENS = 1 << 16  # of documents that are read in one pass, unless one alone is longer
BATCH_TOKENS = {"cpu": 1 << 16, "cuda": 1 << 20}  # columns of a batch's cache, at most

Unit = list[tuple[Document, tuple[Question, ...]]]
"""Documents, and which of their questions are asked together."""


@dataclass(frozen=True)
class EvalPlan:
    """methods: with their budgets, dense first. contexts: tokens. ask: whether questions are decoded or belong to the
    prompt; auto leaves it to the task. batch_tokens: columns of a batch's cache; None for what the device holds."""

    tasks: Sequence[Task]
    methods: Sequence[Method]
    contexts: Sequence[int]
    settings: TaskSettings
    ask: str = "auto"
    batch_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.ask not in ASK:
            raise FasaError(f"unknown way to ask {self.ask!r}", hint=f"one of {', '.join(ASK)}")
        for task in self.tasks:
            task.check(self.settings)

    def check_contexts(self, max_seq_len: int) -> None:
        """Raises FasaError for contexts that are longer than the model's positions reach."""
        if not self.contexts or min(self.contexts) < 1 or max(self.contexts) > max_seq_len:
            raise FasaError(
                f"contexts of {', '.join(map(str, self.contexts)) or 'no'} tokens are not possible",
                hint=f"1 to {max_seq_len}, which this model was made for",
            )

    def check(self, model: EvalModel) -> None:
        """Raises FasaError for contexts or methods that the model cannot do."""
        self.check_contexts(model.max_seq_len)
        for method in self.methods:
            layer = next((i for i in range(method.dense_layers, model.num_layers) if model.sparse[i]), None)
            if layer is not None:
                method.selector(model, layer)

    def points(self) -> Iterator[tuple[Task, int]]:
        for task in self.tasks:
            for context in self.contexts if task.grid else (max(self.contexts),):
                yield task, context


def run(model: EvalModel, plan: EvalPlan, results: Results, progress: Callable[[str, int, int], None]) -> None:
    """Adds what is missing to `results`, which are saved whatever happens.

    progress: called with (task and context, done, total). Raises FasaError when a task has no documents, a method
    does not suit the model, memory runs out, or results cannot be written.
    """
    plan.check(model)
    decoder = Decoder(model)
    budget = plan.batch_tokens or batch_tokens(model)
    try:
        for task, context in plan.points():
            documents = task.documents(model, context, plan.settings)
            units = list(units_of(documents, budget))
            for number, unit in enumerate(units):
                stage, total = f"{task.name} {context}", len(units) * len(plan.methods)
                missing = [m for m in plan.methods if not _is_done(results, task, context, unit, m)]
                done = (number + 1) * len(plan.methods) - len(missing)
                progress(stage, done, total)
                batch = read(decoder, task, unit, plan.ask) if missing else None
                for more, method in enumerate(missing, start=1):
                    assert batch is not None
                    found = task.measure(batch, method)
                    results.add(_records(model, task, context, unit, method, found))
                    progress(stage, done + more, total)
        results.complete = True
    finally:
        results.save()


def batch_tokens(model: EvalModel) -> int:
    """Cache columns, all rows together, that fit into the device's memory with room to work."""
    most = BATCH_TOKENS.get(model.device.type, BATCH_TOKENS["cpu"])
    if model.device.type != "cuda":
        return most
    free, _ = torch.cuda.mem_get_info(model.device)
    token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * model.model.dtype.itemsize
    return max(1, min(most, int(free / (4 * token))))  # keys, values, and as much again for what methods keep


def units_of(documents: Sequence[Document], columns: int) -> Iterator[Unit]:
    """Documents in batches whose rows (questions), all as wide as the widest, take at most `columns`, or are one."""
    unit: Unit = []
    rows, width, tokens = 0, 0, 0
    for document in documents:
        own = len(document.tokens) + max(question.room for question in document.questions)
        size = max(1, columns // own)
        for start in range(0, len(document.questions), size):
            asked = document.questions[start : start + size]
            full = (rows + len(asked)) * max(width, own) > columns or tokens + len(document.tokens) > READ_TOKENS
            if unit and full:
                yield unit
                unit, rows, width, tokens = [], 0, 0, 0
            unit.append((document, asked))
            rows, width, tokens = rows + len(asked), max(width, own), tokens + len(document.tokens)
    if unit:
        yield unit


def read(decoder: Decoder, task: Task, unit: Unit, ask: str) -> Batch:
    """Reads the documents densely, and the questions too unless they are to be decoded."""
    questions = [question for _, asked in unit for question in asked]
    longest = max(len(document.tokens) for document, _ in unit)
    capacity = longest + max(len(q.tokens) for q in questions) + max(q.max_new_tokens for q in questions)
    cache = decoder.prefill([document.tokens for document, _ in unit], capacity)
    cache = cache.repeat([len(asked) for _, asked in unit])
    prefilled = task.asks and (ask == "prefill" or (ask == "auto" and not task.late))
    first = decoder.read_on(cache, [question.tokens for question in questions]) if prefilled else None
    batch = Batch(decoder, cache, questions, first)
    return dataclasses.replace(batch, reference=task.prepare(batch))


def _budget(method: Method) -> int | None:
    return method.budget if method.uses_budget else None


def _is_done(results: Results, task: Task, context: int, unit: Unit, method: Method) -> bool:
    return all(
        results.has(task.name, context, document.id, question.id, method.label, _budget(method))
        for document, asked in unit
        for question in asked
    )


def _records(
    model: EvalModel, task: Task, context: int, unit: Unit, method: Method, found: Sequence[dict[str, object]]
) -> Iterator[dict[str, object]]:
    pairs = [(document, question) for document, asked in unit for question in asked]
    for (document, question), record in zip(pairs, found, strict=True):
        yield {
            "task": task.name,
            "group": document.group,
            "context": context,
            "document": document.id,
            "question": question.id,
            "method": method.label,
            "budget": _budget(method),
            **method.facts(model),
            "tokens_read": len(document.tokens),
            **question.facts,
            **({"answers": list(question.answers)} if question.answers else {}),
            **record,
        }

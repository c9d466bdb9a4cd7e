"""LongBench, its English and code data sets, from .jsonl files in the format of THUDM/LongBench.

Source: "LongBench: A Bilingual, Multitask Benchmark for Long Context Understanding", arXiv 2308.14508; prompts,
lengths of answers and metrics after its repository's config/ and metrics.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from fasa_trt.core.errors import FasaError
from fasa_trt.evaluation import metrics
from fasa_trt.evaluation.model import EvalModel
from fasa_trt.evaluation.tasks.base import Document, Question, TaskSettings
from fasa_trt.evaluation.tasks.files import FileTask, data_folder, field, fitted, records

_SHORT = "Answer the question based on the given passages. Only give me the answer and do not output any other words."
_PASSAGES = f"{_SHORT}\n\nThe following are given passages.\n{{context}}\n\n{_SHORT}\n\nQuestion: {{input}}\nAnswer:"
_PHRASE = "as concisely as you can, using a single phrase if possible. Do not provide any explanation."
_SCIENCE = (
    "as concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based "
    'on the information in the article, write "unanswerable". If the question is a yes/no question, answer "yes", '
    '"no", or "unanswerable". Do not provide any explanation.'
)


@dataclass(frozen=True)
class DataSet:
    """prompt: with {context} and perhaps {input}. new_tokens: of an answer. metric: of one answer. chat: in a chat
    template, which few-shot and code tasks go without. first_line: only that of the answer counts."""

    prompt: str
    new_tokens: int
    metric: Callable[[str, str], float] | None
    chat: bool = True
    first_line: bool = False


DATA_SETS = {
    "narrativeqa": DataSet(
        "You are given a story, which can be either a novel or a movie script, and a question. Answer the question "
        f"{_PHRASE}\n\nStory: {{context}}\n\nNow, answer the question based on the story {_PHRASE}\n\n"
        "Question: {input}\n\nAnswer:",
        128, metrics.qa_f1,
    ),
    "qasper": DataSet(
        f"You are given a scientific article and a question. Answer the question {_SCIENCE}\n\nArticle: {{context}}\n\n"
        f" Answer the question based on the above article {_SCIENCE}\n\nQuestion: {{input}}\n\nAnswer:",
        128, metrics.qa_f1,
    ),
    "multifieldqa_en": DataSet(
        "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question based on the "
        "above text, only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:",
        64, metrics.qa_f1,
    ),
    "hotpotqa": DataSet(_PASSAGES, 32, metrics.qa_f1),
    "2wikimqa": DataSet(_PASSAGES, 32, metrics.qa_f1),
    "musique": DataSet(_PASSAGES, 32, metrics.qa_f1),
    "gov_report": DataSet(
        "You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\n{context}"
        "\n\nNow, write a one-page summary of the report.\n\nSummary:",
        512, metrics.rouge_l,
    ),
    "qmsum": DataSet(
        "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one "
        "or more sentences.\n\nTranscript:\n{context}\n\nNow, answer the query based on the above meeting transcript "
        "in one or more sentences.\n\nQuery: {input}\nAnswer:",
        512, metrics.rouge_l,
    ),
    "multi_news": DataSet(
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n{context}\n\nNow, write "
        "a one-page summary of all the news.\n\nSummary:",
        512, metrics.rouge_l,
    ),
    "trec": DataSet(
        "Please determine the type of the question below. Here are some examples of questions.\n\n{context}\n{input}",
        64, None, chat=False, first_line=True,
    ),
    "triviaqa": DataSet(
        "Answer the question based on the given passage. Only give me the answer and do not output any other words. "
        "The following are some examples.\n\n{context}\n\n{input}",
        32, metrics.qa_f1, chat=False, first_line=True,
    ),
    "samsum": DataSet(
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}\n\n{input}",
        128, metrics.rouge_l, chat=False, first_line=True,
    ),
    "passage_count": DataSet(
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully read "
        "these paragraphs and determine how many unique paragraphs there are after removing duplicates. In other "
        "words, how many non-repeating paragraphs are there in total?\n\n{context}\n\nPlease enter the final count of "
        "unique paragraphs after removing duplicates. The output format should only contain the number, such as 1, 2, "
        "3, and so on.\n\nThe final answer is: ",
        32, metrics.count,
    ),
    "passage_retrieval_en": DataSet(
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the abstract "
        "is from.\n\n{context}\n\nThe following is an abstract.\n\n{input}\n\nPlease enter the number of the paragraph "
        'that the abstract is from. The answer format must be like "Paragraph 1", "Paragraph 2", etc.\n\nThe answer '
        "is: ",
        32, metrics.retrieval,
    ),
    "lcc": DataSet(
        "Please complete the code given below. \n{context}Next line of code:\n", 64, metrics.code_similarity, chat=False
    ),
    "repobench-p": DataSet(
        "Please complete the code given below. \n{context}{input}Next line of code:\n", 64, metrics.code_similarity,
        chat=False,
    ),
}  # fmt: skip


class LongBench(FileTask):
    name: ClassVar[str] = "longbench"
    summary: ClassVar[str] = "NAME.jsonl of its English data sets in --data"
    metric: ClassVar[str] = "LongBench's"

    def documents(self, model: EvalModel, context: int, settings: TaskSettings) -> list[Document]:
        folder = data_folder(self.name, settings)
        files = [f for f in sorted(folder.rglob("*.jsonl")) if f.stem.removesuffix("_e") in DATA_SETS]
        if not files:
            raise FasaError(f"no LongBench files in {folder}", hint=f"such as {', '.join(list(DATA_SETS)[:4])}.jsonl")
        return [
            self._document(model, context, file, number, record)
            for file in files
            for number, record in enumerate(records(file, settings.samples))
        ]

    def _document(self, model: EvalModel, context: int, file: Path, number: int, record: dict[str, Any]) -> Document:
        name = file.stem.removesuffix("_e")
        data_set = DATA_SETS[name]
        before, after = data_set.prompt.split("{context}")
        text, question = str(field(record, file, "context")), after.replace("{input}", str(record.get("input", "")))
        if data_set.chat:
            tokens, end = model.prompt(before + text, question)
        else:
            tokens, end = [*model.prefix, *model.encode(before + text)], model.encode(question)
        tokens, cut = fitted(model, tokens, context - len(end) - data_set.new_tokens)
        facts = {"set": name, "classes": record.get("all_classes") or [], **({"truncated": True} if cut else {})}
        answers = tuple(str(answer) for answer in field(record, file, "answers"))
        made = Question("", end, answers, data_set.new_tokens, facts)
        return Document(f"{file.stem}/{number}", tokens, (made,), group=file.stem)

    def score(self, question: Question, prediction: str) -> float:
        """The best of the answers."""
        data_set = DATA_SETS[question.facts["set"]]
        text = prediction.lstrip("\n").split("\n")[0] if data_set.first_line else prediction
        if data_set.metric is None:
            return max(metrics.classification(text, answer, question.facts["classes"]) for answer in question.answers)
        return max(data_set.metric(text, answer) for answer in question.answers)

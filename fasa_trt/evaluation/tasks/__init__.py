"""The tasks by name. To add one: a file here with a `Task`, and a place in TASKS."""

from __future__ import annotations

from fasa_trt.core.errors import FasaError
from fasa_trt.evaluation.tasks.aime import Aime
from fasa_trt.evaluation.tasks.base import Task
from fasa_trt.evaluation.tasks.common_words import CommonWords
from fasa_trt.evaluation.tasks.copying import Copying
from fasa_trt.evaluation.tasks.generation import LongGeneration
from fasa_trt.evaluation.tasks.longbench import LongBench
from fasa_trt.evaluation.tasks.niah import MultiKey, MultiQuery, MultiValue
from fasa_trt.evaluation.tasks.perplexity import PerplexityOfCode, PerplexityOfProse, PerplexityOfText
from fasa_trt.evaluation.tasks.qa import QuestionAnswering
from fasa_trt.evaluation.tasks.recall import Recall
from fasa_trt.evaluation.tasks.ruler_files import RulerFiles
from fasa_trt.evaluation.tasks.variables import VariableTracking

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        PerplexityOfCode(), PerplexityOfProse(), PerplexityOfText(), Recall(), Copying(), MultiKey(), MultiValue(),
        MultiQuery(), VariableTracking(), CommonWords(), QuestionAnswering(), LongGeneration(), LongBench(),
        RulerFiles(), Aime(),
    )
}  # fmt: skip


def parse_tasks(text: str) -> list[Task]:
    """The tasks of "perplexity_code,recall". Raises FasaError."""
    wanted = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    unknown = [name for name in wanted if name not in TASKS]
    if unknown or not wanted:
        what = f"unknown task {unknown[0]!r}" if unknown else "no tasks to evaluate"
        raise FasaError(what, hint=f"one of {', '.join(TASKS)}")
    return [TASKS[name] for name in wanted]

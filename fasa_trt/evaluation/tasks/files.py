"""Public data sets in their own formats, from files below `--data`: LongBench, RULER, AIME."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from fasa_trt.core.errors import FasaError
from fasa_trt.evaluation.model import EvalModel
from fasa_trt.evaluation.tasks.base import Task, TaskSettings


class FileTask(Task):
    """A task whose documents are files below `--data`."""

    solved: ClassVar[float | None] = None
    grid: ClassVar[bool] = False

    def check(self, settings: TaskSettings) -> None:
        data_folder(self.name, settings)


def data_folder(task: str, settings: TaskSettings) -> Path:
    """Raises FasaError where no folder was given or it is not there."""
    if settings.data is None:
        raise FasaError(f"{task} needs its data", hint="--data DIR, a folder with its .jsonl files")
    if not settings.data.is_dir():
        raise FasaError(f"no such folder: {settings.data}")
    return settings.data


def records(file: Path, limit: int) -> Iterator[dict[str, Any]]:
    """Up to `limit` JSON objects of a .jsonl file. Raises FasaError for what is not one."""
    number = 0
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate((line for line in lines if line.strip()), start=1):
                if number > limit:
                    return
                found = json.loads(line)
                if not isinstance(found, dict):
                    raise ValueError("not an object")
                yield found
    except (OSError, ValueError) as error:  # a wrong encoding, too, is a ValueError
        raise FasaError(f"{file}, record {number}: {error}", hint="one JSON object a line, UTF-8") from None


def field(record: dict[str, Any], file: Path, *names: str) -> Any:
    """The first of the fields that a record has. Raises FasaError where it has none."""
    for name in names:
        if record.get(name) is not None:
            return record[name]
    raise FasaError(f"{file}: a record without {' or '.join(names)}", hint="is this the data set's own format?")


def fitted(model: EvalModel, tokens: list[int], room: int) -> tuple[list[int], bool]:
    """A document cut in its middle to `room` tokens, as LongBench does it; and whether it was."""
    if room < 16:
        raise FasaError(f"a question and its answer leave {room} tokens for the document", hint="raise --contexts")
    if len(tokens) <= room:
        return tokens, False
    return [*tokens[: room // 2], *tokens[len(tokens) - (room - room // 2) :]], True

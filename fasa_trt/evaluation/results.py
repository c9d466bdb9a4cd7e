"""What an evaluation found: a record for each question and method, in one file that is whole at any time."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fasa_trt.core.atomic import write_bytes
from fasa_trt.core.errors import FasaError
from fasa_trt.evaluation.tasks import TASKS

SCHEMA = 1
FILE = "results.json"
SAVE_EVERY = 5.0  # seconds
KEY = ("task", "context", "document", "question", "method", "budget")


@dataclass
class Results:
    """path: of the file; None to keep everything in memory. config: the resolved settings, which a run that goes on
    must share. environment: machine and versions. records: see `add`."""

    path: Path | None
    config: dict[str, Any]
    environment: dict[str, Any]
    records: list[dict[str, Any]] = field(default_factory=list)
    complete: bool = False
    _known: set[tuple[Any, ...]] = field(default_factory=set)
    _saved: float = 0.0

    @classmethod
    def open(
        cls, directory: Path | None, config: dict[str, Any], environment: dict[str, Any], *, force: bool = False
    ) -> Results:
        """New results, or the ones in `directory` to go on with.

        Raises FasaError when it holds results of other settings, or something that is no results; unless `force`.
        """
        if directory is None:
            return cls(None, config, environment)
        path = directory / FILE
        if directory.exists() and not directory.is_dir():
            raise FasaError(f"{directory} is not a directory", hint="choose another -o")
        if force or not path.exists():
            return cls(path, config, environment)
        found = read_results(path)
        different = sorted(key for key in {*config, *found["config"]} if config.get(key) != found["config"].get(key))
        if different:
            raise FasaError(
                f"{path} holds results of other settings ({', '.join(different)})",
                hint="choose another -o, or start over with --force",
            )
        results = cls(path, config, environment)
        results._take(found["records"])
        return results

    def has(self, task: str, context: int, document: str, question: str, method: str, budget: int | None) -> bool:
        return (task, context, document, question, method, budget) in self._known

    def add(self, records: Iterable[dict[str, Any]]) -> None:
        """Records with all of KEY, `score`, `kv_share`, and what else a task or method tells. Saves now and then."""
        self._take(records)
        if time.monotonic() - self._saved > SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Raises FasaError when the file cannot be written."""
        if self.path is not None:
            write_bytes(self.path, (json.dumps(self.to_json(), indent=1) + "\n").encode())
        self._saved = time.monotonic()

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "complete": self.complete,
            "config": self.config,
            "environment": self.environment,
            "rows": rows_of(self.records),
            "records": self.records,
        }

    def _take(self, records: Iterable[dict[str, Any]]) -> None:
        for record in records:
            self.records.append(record)
            self._known.add(tuple(record[name] for name in KEY))


def read_results(path: Path) -> dict[str, Any]:
    """Raises FasaError unless `path` is a results file of this schema."""
    try:
        found = json.loads(path.read_text("utf-8"))
        if found["schema"] != SCHEMA:
            raise FasaError(f"{path} has results of schema {found['schema']}, not {SCHEMA}", hint="choose another -o")
        for record in found["records"]:
            _ = tuple(record[name] for name in KEY), float(record["score"]), float(record["kv_share"])
        _ = dict(found["config"])
    except OSError as error:
        raise FasaError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise FasaError(f"{path} is not a results file", hint="choose another -o, or replace it with --force") from None
    return dict(found)


def rows_of(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each task (and data set), context, method and budget, in order of appearance.

    score: the task's aggregate. dense_score: that of full attention. solved: whether dense solves the task at all.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        key = (record["task"], record.get("group", ""), record["context"], record["method"], record["budget"])
        groups.setdefault(key, []).append(record)
    scores = {key: TASKS[key[0]].aggregate(found) for key, found in groups.items()}
    rows = []
    for key, found in groups.items():
        task, group, context, method, budget = key
        dense, least = scores.get((task, group, context, "dense", None)), TASKS[task].solved
        rows.append(
            {
                "task": f"{task}/{group}" if group else task,
                "context": context,
                "method": method,
                "budget": budget,
                "n_tip": found[0].get("n_tip"),
                "metric": TASKS[task].metric,
                "score": scores[key],
                "dense_score": dense,
                "solved": None if least is None or dense is None else dense >= least,
                "kv_share": sum(record["kv_share"] for record in found) / len(found),
                "samples": len(found),
            }
        )
    return rows

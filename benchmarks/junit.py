"""Reads pytest's JUnit reports."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree


@dataclass(frozen=True)
class Case:
    """A test. file: dotted, as "tests.plugins.test_append"; outcome: passed, failed or skipped."""

    file: str
    name: str
    outcome: str
    seconds: float

    @property
    def id(self) -> str:
        """As pytest takes it on its command line."""
        return f"{self.file.replace('.', '/')}.py::{self.name}"


def cases_of(report: Path) -> Iterator[Case]:
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            outcome = "failed"
        else:
            outcome = "passed" if case.find("skipped") is None else "skipped"
        yield Case(case.get("classname") or "", case.get("name") or "", outcome, float(case.get("time") or 0))

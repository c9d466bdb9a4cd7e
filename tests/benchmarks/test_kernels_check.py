"""What the sanitizer is given to run. Needs no GPU: skipped tests are collected, too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.common import ROOT
from benchmarks.kernels_check import (
    NOT_FOR_RACECHECK,
    SMALL,
    TESTS,
    counts,
    is_clean,
    kept,
    progress,
    sanitize,
    selection,
)


def test_every_line_names_a_few_tests() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", TESTS, "-k", selection("memcheck")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    names = [line.split("::")[1] for line in done.stdout.splitlines() if "::" in line]
    for words in SMALL:
        assert 1 <= sum(all(word in name for word in words) for name in names) <= 20, words
    assert len(names) <= 64


def test_racecheck_leaves_some_out() -> None:
    for words in NOT_FOR_RACECHECK:
        left_out = " and ".join(words)
        assert left_out in selection("memcheck") and left_out not in selection("racecheck")
    assert selection("racecheck").count(" or ") == selection("memcheck").count(" or ") - len(NOT_FOR_RACECHECK)


def test_every_process_must_be_clean() -> None:
    assert is_clean("0 errors") and is_clean("0 hazards displayed (0 errors, 0 warnings)")
    assert not is_clean("10 errors") and not is_clean("1 hazard displayed (1 error, 0 warnings)")


STAND_IN = """#!/usr/bin/env python3
import sys, time
print("tests/plugins/test_append.py::test_a PASSED [ 1%]")
print("tests/plugins/test_append.py::test_b", flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a script")
def test_a_tool_that_takes_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(STAND_IN)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = sanitize("racecheck", 3)
    assert found["clean"] is None
    assert found["summary"].startswith("did not finish within 3 s: 1 tests passed, at last tests/plugins/test_append")
    assert found["summary"].endswith("test_b")


def test_nothing_was_begun() -> None:
    assert progress("") == "0 tests passed, at last no test begun"


def test_counts_by_file(tmp_path: Path) -> None:
    cases = """
        <testcase classname="tests.plugins.test_decode" name="a"/>
        <testcase classname="tests.plugins.test_decode" name="b"><failure message="x"/></testcase>
        <testcase classname="tests.plugins.test_append" name="c"><skipped message="no GPU"/></testcase>
        <testcase classname="tests.plugins.test_append" name="d"/>
    """
    (tmp_path / "tests.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    found = counts(tmp_path / "tests.xml")
    assert (found["cases"], found["passed"], found["failed"], found["skipped"]) == (3, 2, 1, 1)
    assert found["failures"] == ["b"]
    assert found["files"]["test_append"] == {"cases": 1, "passed": 1, "failed": 0, "skipped": 1}
    assert list(found["files"]) == ["test_append", "test_decode"]


def test_parts_of_a_check_belong_to_one_commit(tmp_path: Path) -> None:
    file, facts = tmp_path / "check.json", {"commit": "abc", "gpu": "Example"}
    assert kept(file, facts) == {}
    file.write_text(json.dumps({**facts, "cases": 3}))
    assert kept(file, facts) == {**facts, "cases": 3}
    assert kept(file, {**facts, "commit": "abd"}) == {} == kept(file, {**facts, "gpu": "Other"})
    file.write_text("{")
    assert kept(file, facts) == {}

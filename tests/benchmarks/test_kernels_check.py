"""What the sanitizer is given to run. Needs no GPU: skipped tests are collected, too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.common import ROOT
from benchmarks.kernels_check import NOT_FOR_RACECHECK, SMALL, TESTS, counts, kept, selection


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

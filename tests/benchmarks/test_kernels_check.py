"""What a check of the kernels records. Needs no GPU."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.kernels_check import counts, kept


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

"""What a JUnit report says of its tests."""

from __future__ import annotations

from pathlib import Path

from benchmarks.junit import Case, cases_of


def test_cases(tmp_path: Path) -> None:
    report = tmp_path / "tests.xml"
    report.write_text(
        """<testsuites><testsuite>
        <testcase classname="tests.plugins.test_decode" name="a[1-x]" time="1.5"><system-out/></testcase>
        <testcase classname="tests.plugins.test_decode" name="b"><failure message="x"/></testcase>
        <testcase classname="tests.plugins.test_decode" name="c"><error message="x"/></testcase>
        <testcase classname="tests.plugins.test_append" name="d"><skipped message="no GPU"/></testcase>
        </testsuite></testsuites>"""
    )
    cases = list(cases_of(report))
    assert cases[0] == Case("tests.plugins.test_decode", "a[1-x]", "passed", 1.5)
    assert cases[0].id == "tests/plugins/test_decode.py::a[1-x]"
    assert [case.outcome for case in cases] == ["passed", "failed", "failed", "skipped"]

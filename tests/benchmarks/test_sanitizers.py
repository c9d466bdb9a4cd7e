"""What the sanitizers are given to run, and what is made of their reports. Needs no GPU.

A stand-in takes the place of compute-sanitizer and of the pytest that it would start.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import sanitizers
from benchmarks.common import ROOT
from benchmarks.deadline import GIVEN_UP
from benchmarks.junit import cases_of
from benchmarks.sanitizers import NOT_FOR_RACECHECK, SMALL, chosen_tests, is_clean, sanitize, selection
from fasa_trt.core.errors import FasaError

posix = pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a script")


def test_every_line_names_a_few_tests() -> None:
    names = [test.split("::")[1] for test in chosen_tests("memcheck")]
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


# Passes as many tests as STAND_IN_PASSES says, then its time is up; the log has what it was given.
STAND_IN = """#!/usr/bin/env python3
import os, sys
from xml.sax.saxutils import quoteattr
tests = [argument for argument in sys.argv if "::" in argument]
passed = tests[: int(os.environ["STAND_IN_PASSES"])]
report = next(argument for argument in sys.argv if argument.startswith("--junitxml=")).split("=")[1]
cases = [(test.split(".py::")[0].replace("/", "."), test.split("::")[1]) for test in passed]
with open(report, "w") as file:
    lines = [f'<testcase classname="{file}" name={quoteattr(name)} time="1.5"/>' for file, name in cases]
    file.write("<testsuites><testsuite>" + "".join(lines) + "</testsuite></testsuites>")
with open(os.environ["STAND_IN_LOG"], "a") as log:
    log.write(os.environ["CUDA_VISIBLE_DEVICES"] + " " + ",".join(tests) + "\\n")
print("========= RACECHECK SUMMARY:", os.environ.get("STAND_IN_SUMMARY", "0 hazards displayed (0 errors, 0 warnings)"))
sys.exit(2 if len(passed) < len(tests) else 0)
"""
TESTS = [f"tests/plugins/test_append.py::test_a[{case}]" for case in ("1", "2-x", "3", "4", "5")]


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(STAND_IN)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("STAND_IN_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("STAND_IN_PASSES", "9")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setattr(sanitizers, "chosen_tests", lambda tool: TESTS)
    return tmp_path / "log"


@posix
def test_gpus_share_the_tests(log: Path) -> None:
    found = sanitize("racecheck", 60)
    assert sorted(log.read_text().splitlines()) == [f"4 {','.join(TESTS[::2])}", f"7 {','.join(TESTS[1::2])}"]
    assert found["clean"] is True and found["passed"] == 5 and found["unfinished"] == []
    assert found["summary"] == "0 hazards displayed (0 errors, 0 warnings)"
    assert found["tests"] == dict.fromkeys(TESTS, 1.5)
    assert len(found["left_out"]) == len(NOT_FOR_RACECHECK)


@posix
def test_what_was_left_comes_next(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_PASSES", "1")
    first = sanitize("racecheck", 60)
    assert first["clean"] is None and first["passed"] == 2 and first["unfinished"] == TESTS[2:]
    log.unlink()
    monkeypatch.setenv("STAND_IN_PASSES", "9")
    second = sanitize("racecheck", 60, first)
    assert sorted(log.read_text().splitlines()) == [f"4 {TESTS[2]},{TESTS[4]}", f"7 {TESTS[3]}"]
    assert second["clean"] is True and second["passed"] == 5 and second["seconds"] > first["seconds"]
    log.unlink()
    assert sanitize("racecheck", 60, second)["clean"] is True
    assert len(log.read_text().splitlines()) == 2  # from the beginning


@posix
def test_a_hazard_is_no_time_out(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_SUMMARY", "1 hazard displayed (1 error, 0 warnings)")
    found = sanitize("racecheck", 60)
    assert found["clean"] is False and found["tests"] == {}
    assert found["summary"] == "1 hazard displayed (1 error, 0 warnings)"


@posix
def test_a_run_without_a_single_test_is_wrong(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_PASSES", "0")
    assert sanitize("racecheck", 60)["clean"] is False


@posix
def test_a_test_that_does_not_end(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = f"#!/usr/bin/env python3\nprint('{TESTS[0]} PASSED\\n{TESTS[1]} Timeout (0:02:00)!')\n"
    (log.parent / "compute-sanitizer").write_text(tool)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    found = sanitize("racecheck", 60)
    assert found["clean"] is None and found["unfinished"] == TESTS
    assert f"{TESTS[1]} took more than {sanitizers.GRACE} s beyond the deadline" in found["summary"]


@posix
def test_a_tool_that_does_not_end(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (log.parent / "compute-sanitizer").write_text("#!/usr/bin/env python3\nimport time\ntime.sleep(60)\n")
    monkeypatch.setattr(sanitizers, "GRACE", 0)
    found = sanitize("racecheck", 1)
    assert found["clean"] is None and found["unfinished"] == TESTS
    assert found["summary"] == "racecheck took more than 0 s beyond the deadline"


def test_no_sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sanitizers, "chosen_tests", lambda tool: TESTS)
    with pytest.raises(FasaError, match="compute-sanitizer does not start"):
        sanitize("memcheck", 60)


def test_the_deadline_ends_pytest_in_good_order(tmp_path: Path) -> None:
    tests = tmp_path / "test_some.py"
    tests.write_text("def test_one(): pass\ndef test_two(): pass\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "benchmarks.deadline",
        "--rootdir",
        str(tmp_path),
        str(tests),
    ]
    report = tmp_path / "tests.xml"
    run = [*command, "--deadline=0", f"--junitxml={report}"]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "the time is up" in done.stdout and "1 passed" in done.stdout
    assert [case.id for case in cases_of(report) if case.outcome == "passed"] == ["test_some.py::test_one"]
    assert "2 passed" in subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout


def test_a_test_that_goes_on_is_given_up(tmp_path: Path) -> None:
    tests = tmp_path / "test_some.py"
    tests.write_text("import time\ndef test_endless():\n    while True: time.sleep(1)\n")
    command = [sys.executable, "-m", "pytest", "-v", "-p", "benchmarks.deadline", "--deadline=0", "--grace=2"]
    done = subprocess.run([*command, "--rootdir", str(tmp_path), str(tests)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "::test_endless" in done.stdout
    assert GIVEN_UP in done.stderr and "in test_endless" in done.stderr

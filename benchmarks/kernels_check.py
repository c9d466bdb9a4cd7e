"""Correctness of the CUDA kernels on this GPU: the tests that need one, and part of them under compute-sanitizer.

python -m benchmarks.kernels_check --output benchmarks/results/h200/kernels-check.json
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from benchmarks.common import ROOT, run_facts, write_result
from fasa_trt.core.errors import FasaError

TESTS = "tests/plugins"
TOOLS = ("memcheck", "racecheck", "synccheck")
# Of the prefill kernel for compute capability 9.0. Under racecheck it finds no hazard but computes something else, with
# FlashInfer's own producer as with ours: it gives registers back (setmaxnreg), which the tool does not expect.
LONG_PROMPTS = ("test_prefill_of_long_prompts", "2-1-128-dtype0")
# So many rows that no cluster shares one. Racecheck, which did not finish within 150 s with them, sees a few in
# test_ragged_batch.
MANY_ROWS = ("test_within_the_budget", "sum-8-256")
NOT_FOR_RACECHECK = (LONG_PROMPTS, MANY_ROWS)
# Every kernel, with few and short sequences. A test is among them whose name has all the words of a line.
SMALL = (
    ("test_ragged_batch", "dtype0"),  # decode: every label kind and reduction, and rows within the budget
    ("test_within_the_budget", "sum-2-1024"),  # of several chunks
    MANY_ROWS,
    ("test_heads_of_prefixes", "dtype1", "2-9"),  # float16, and two columns of query heads
    ("test_heads[", "sum-3-3-96"),  # head_dim 96
    ("test_every_format", "sampled", "int8-24-12-9"),  # two columns of query heads, and two rows of blocks
    ("test_every_format", "sampled", "int4-16-8-4"),  # two KV heads in a tile
    ("test_more_heads_than_a_warp_has_lanes", "5-7"),
    ("test_cluster", "30000-256-sum-int4"),
    ("test_budget", "sum-5000-4096"),  # the longest lists
    ("test_pool_layout", "int4-1-8"),
    ("test_equal_scores", "700-sum"),  # ties
    ("test_repeated_scores", "20001-3-int4"),  # so many that lists overflow
    ("test_labels_among_other_things", "24-True"),
    ("test_softcap", "sum"),
    ("test_decode_with_a_softcap", "300"),  # dense, with a window
    ("test_decode_of_head_groups", "2-2-96"),
    ("test_prefill_of_a_mixed_batch", "64-dtype0"),
    ("test_prefill_of_a_mixed_batch", "96-dtype1"),
    LONG_PROMPTS,
    ("test_rotation", "16-dtype0"),  # append
    ("test_norms_come_before",),
    ("test_nothing_else_is_written",),
    ("test_decode[", "int4-8-64-3-sum"),  # labels in a head of the pool
    ("test_append_to_the_second_pool", "int8-24"),
)


def selection(tool: str) -> str:
    """The tests for a tool as pytest's -k takes them."""
    chosen = [words for words in SMALL if tool != "racecheck" or words not in NOT_FOR_RACECHECK]
    return " or ".join(f"({' and '.join(words)})" for words in chosen)


def run_tests(jobs: int) -> dict[str, Any]:
    """Counts of all tests that need a GPU, in all and by file, and what failed."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "tests.xml"
        pytest = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", TESTS, f"--junitxml={report}"]
        subprocess.run([*pytest, *(["-n", str(jobs)] if jobs > 1 else [])], cwd=ROOT)
        if not report.is_file():
            raise FasaError("pytest did not get as far as a report", hint=f"python -m pytest {TESTS} says why")
        return counts(report)


def counts(report: Path) -> dict[str, Any]:
    """Of a JUnit report. `cases` are those that ran."""
    files: dict[str, Counter[str]] = {}
    failures = []
    for case in ElementTree.parse(report).iter("testcase"):
        outcome = outcome_of(case)
        files.setdefault((case.get("classname") or "").split(".")[-1], Counter())[outcome] += 1
        if outcome == "failed":
            failures.append(case.get("name"))
    total = sum(files.values(), Counter[str]())
    return {**_figures(total), "failures": failures, "files": {name: _figures(files[name]) for name in sorted(files)}}


def outcome_of(case: ElementTree.Element) -> str:
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    return "skipped" if case.find("skipped") is not None else "passed"


def _figures(outcomes: Counter[str]) -> dict[str, int]:
    passed, failed = outcomes["passed"], outcomes["failed"]
    return {"cases": passed + failed, "passed": passed, "failed": failed, "skipped": outcomes["skipped"]}


def sanitize(tool: str, timeout: float) -> dict[str, Any]:
    """One tool over the small tests. Only the kernels of this project's library are instrumented: their mangled names
    have its namespace in them, also those of FlashInfer's templates, whose arguments are of it. In one process, with
    nothing beside it: others on the GPU, even few, make it several times slower than they could help."""
    pytest = [sys.executable, "-m", "pytest", "-v", "-x", TESTS, "-k", selection(tool), "-p", "no:cacheprovider"]
    sanitizer = ["compute-sanitizer", "--target-processes", "all", "--tool", tool, "--kernel-name", "kns=fasa"]
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "tests.xml"
        command = [*sanitizer, "--error-exitcode", "9", *pytest]
        start = time.perf_counter()
        try:
            done = subprocess.run(
                [*command, f"--junitxml={report}"], cwd=ROOT, capture_output=True, text=True, timeout=timeout
            )
        except subprocess.TimeoutExpired as expired:
            done_so_far = progress((expired.stdout or b"").decode(errors="replace"))
            return {"clean": None, "summary": f"did not finish within {timeout:.0f} s: {done_so_far}"}
        except OSError as error:
            return {"clean": None, "summary": f"compute-sanitizer does not start: {error.strerror}"}
        files = counts(report)["files"] if report.is_file() else {}
    text = done.stdout + done.stderr
    summaries = sorted(set(re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", text)))  # of each process
    tests = re.findall(r"^.*(?:passed|failed).* in .*$", text, re.MULTILINE)
    return {
        "clean": done.returncode == 0 and bool(tests) and bool(summaries) and all(map(is_clean, summaries)),
        "left_out": [" ".join(words) for words in NOT_FOR_RACECHECK] if tool == "racecheck" else [],
        "summary": "; ".join(summaries) or text[-500:],
        "tests": tests[-1].strip("= ") if tests else None,
        "files": {name: figures["passed"] for name, figures in files.items()},
        "seconds": round(time.perf_counter() - start, 1),
    }


def progress(output: str) -> str:
    """How far pytest -v got, from what it printed."""
    lines = [line for line in output.splitlines() if f"{TESTS}/" in line]
    last = lines[-1].strip() if lines else "no test begun"
    return f"{sum(' PASSED' in line for line in lines)} tests passed, at last {last}"


def is_clean(summary: str) -> bool:
    """Of what a tool says at the end of a process: "0 errors", "0 hazards displayed (0 errors, 0 warnings)"."""
    return bool(re.match(r"0 (errors|hazards)\b", summary))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the result")
    parser.add_argument("--commit", help="of the kernels, where this is not a git checkout")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for each sanitizer tool")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the tests, but not a sanitizer's")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=("tests", *TOOLS),
        default=("tests", *TOOLS),
        help="part of it; the rest is kept from the output file where that is of the same commit and GPU",
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: no CUDA GPU here (run this on the machine whose GPU is to be checked)")
    facts = run_facts()
    facts.update(commit=arguments.commit or facts["commit"], gpu=torch.cuda.get_device_name(), torch=torch.__version__)
    record = {**kept(arguments.output, facts), **facts}
    sanitizer = record.pop("sanitizer", {})
    for part in arguments.only:
        if part == "tests":
            record.update(run_tests(arguments.jobs))
            print({key: record[key] for key in ("cases", "passed", "failed", "skipped", "failures")}, flush=True)
        else:
            sanitizer[part] = sanitize(part, arguments.timeout)
            print(part, sanitizer[part], flush=True)
        write_result(arguments.output, {**record, "sanitizer": sanitizer})
    if record.get("failed") or not all(found["clean"] for found in sanitizer.values()):
        sys.exit("error: not all checks are clean")


def kept(output: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """The record at `output` where it says the same of the kernels and the GPU; nothing otherwise."""
    try:
        record: dict[str, Any] = json.loads(output.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    same = all(record.get(key) == facts[key] for key in ("commit", "gpu")) and facts["commit"] != "unknown"
    return record if same else {}


if __name__ == "__main__":
    main()

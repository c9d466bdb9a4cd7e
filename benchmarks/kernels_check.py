"""Correctness of the CUDA kernels on this GPU: the tests that need one, and part of them under compute-sanitizer.

python -m benchmarks.kernels_check --output benchmarks/results/h200/kernels-check.json

Racecheck takes long. It stops when its --timeout is over, and `--only racecheck` goes on with the tests that it left.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, run_facts, write_result
from benchmarks.junit import cases_of
from benchmarks.sanitizers import TESTS, TOOLS, sanitize
from fasa_trt.core.errors import FasaError
from fasa_trt.plugins import library
from fasa_trt.runtime.machine import architecture


def compile_kernels() -> None:
    """For all head_dims, unless the cache has them, so that no test does it, let alone under a sanitizer."""
    library.load(architecture(torch.cuda.get_device_capability()))


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
    for case in cases_of(report):
        files.setdefault(case.file.split(".")[-1], Counter())[case.outcome] += 1
        if case.outcome == "failed":
            failures.append(case.name)
    total = sum(files.values(), Counter[str]())
    return {**_figures(total), "failures": failures, "files": {name: _figures(files[name]) for name in sorted(files)}}


def _figures(outcomes: Counter[str]) -> dict[str, int]:
    passed, failed = outcomes["passed"], outcomes["failed"]
    return {"cases": passed + failed, "passed": passed, "failed": failed, "skipped": outcomes["skipped"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the result")
    parser.add_argument("--commit", help="of the kernels, where this is not a git checkout")
    parser.add_argument("--timeout", type=float, default=600, help="seconds after which a sanitizer stops")
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
    try:
        compile_kernels()
        for part in arguments.only:
            if part == "tests":
                record.update(run_tests(arguments.jobs))
                print({key: record[key] for key in ("cases", "passed", "failed", "skipped", "failures")}, flush=True)
            else:
                sanitizer[part] = sanitize(part, arguments.timeout, sanitizer.get(part))
                print(part, {**sanitizer[part], "tests": "..."}, flush=True)
            write_result(arguments.output, {**record, "sanitizer": sanitizer})
    except FasaError as error:
        sys.exit(f"error: {error}")
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

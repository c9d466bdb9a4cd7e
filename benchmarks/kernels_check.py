"""Correctness of the CUDA kernels on this GPU: the test suite, and part of it under compute-sanitizer.

python -m benchmarks.kernels_check --output benchmarks/results/h200/kernels-check.json
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from benchmarks.common import ROOT, run_facts, write_result

TOOLS = ("memcheck", "racecheck", "synccheck")
SMALL = "ragged_batch or pool_layout or rotation or labels_are"  # every kernel, short sequences


def run_tests(directory: Path) -> dict[str, Any]:
    """Counts of the whole suite and what failed."""
    report = directory / "tests.xml"
    subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/plugins", f"--junitxml={report}"], cwd=ROOT)
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "cases": len(cases) - skipped,
        "passed": len(cases) - skipped - len(failed),
        "failed": len(failed),
        "skipped": skipped,
        "failures": failed,
    }


def sanitize(tool: str, timeout: float) -> dict[str, Any]:
    """One tool over the small tests; only this project's kernels are instrumented."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "tests/plugins", "-k", SMALL, "-p", "no:cacheprovider"]
    command = ["compute-sanitizer", "--tool", tool, "--kernel-name", "kns=fasa", "--error-exitcode", "9", *pytest]
    start = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"clean": None, "summary": f"did not finish within {timeout:.0f} s"}
    text = done.stdout + done.stderr
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", text)
    tests = re.findall(r"^.*(?:passed|failed).* in .*$", text, re.MULTILINE)
    return {
        "clean": done.returncode == 0 and bool(summaries) and bool(tests),
        "summary": summaries[-1] if summaries else text[-500:],
        "tests": tests[-1].strip() if tests else None,
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the result")
    parser.add_argument("--commit", help="of the kernels, where this is not a git checkout")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for each sanitizer tool")
    arguments = parser.parse_args()
    facts = run_facts()
    with tempfile.TemporaryDirectory() as directory:
        tests = run_tests(Path(directory))
    print(tests, flush=True)
    sanitizer = {}
    for tool in TOOLS:
        sanitizer[tool] = sanitize(tool, arguments.timeout)
        print(tool, sanitizer[tool], flush=True)
    result = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, **tests, "sanitizer": sanitizer}
    write_result(arguments.output, {**facts, "commit": arguments.commit or facts["commit"], **result})
    if tests["failed"] or not all(found["clean"] for found in sanitizer.values()):
        sys.exit("error: not all checks are clean")


if __name__ == "__main__":
    main()

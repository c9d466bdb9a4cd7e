"""compute-sanitizer over small tests of the CUDA kernels: which tests, how they are run, and what is found."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT
from benchmarks.deadline import GIVEN_UP
from benchmarks.junit import cases_of
from fasa_trt.core.errors import FasaError

TESTS = "tests/plugins"
TOOLS = ("memcheck", "racecheck", "synccheck")
# Of the prefill kernel for compute capability 9.0. Under racecheck it finds no hazard but computes something else, with
# FlashInfer's own producer as with ours: it gives registers back (setmaxnreg), which the tool does not expect.
LONG_PROMPTS = ("test_prefill_of_long_prompts", "2-1-128-dtype0")
NOT_FOR_RACECHECK = (LONG_PROMPTS,)
# Every kernel, with few and short sequences. A test is among them whose name has all the words of a line.
SMALL = (
    ("test_ragged_batch", "dtype0"),  # decode: every label kind and reduction, and rows within the budget
    ("test_within_the_budget", "sum-2-1024"),  # of several chunks
    ("test_within_the_budget", "sum-8-256"),  # so many rows that no cluster shares one
    ("test_heads_of_prefixes", "dtype1", "2-9"),  # float16, and two columns of query heads
    ("test_heads[", "sum-3-3-96"),  # head_dim 96
    ("test_every_format", "sampled", "int8-24-12-9"),  # two columns of query heads, and two rows of blocks
    ("test_every_format", "sampled", "int4-16-8-4"),  # two KV heads in a tile
    ("test_more_heads_than_a_warp_has_lanes", "5-7"),
    ("test_cluster", "30000-256-sum-int4"),
    ("test_budget", "sum-5000-4096"),  # the longest lists
    ("test_pool_layout", "int4-1-8"),
    ("test_equal_scores", "400-sum"),  # ties
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
# Seconds that the last test of a process may take beyond the deadline before it is given up; so many more, and the
# tool itself is.
GRACE = 60


def selection(tool: str) -> str:
    """The tests for a tool as pytest's -k takes them."""
    chosen = [words for words in SMALL if tool != "racecheck" or words not in NOT_FOR_RACECHECK]
    return " or ".join(f"({' and '.join(words)})" for words in chosen)


def chosen_tests(tool: str) -> list[str]:
    """Their ids."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", TESTS, "-k", selection(tool)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if "::" in line]
    if done.returncode or not found:
        raise FasaError("pytest finds no test for the sanitizers", hint=f"{' '.join(command[:-1])} '{command[-1]}'")
    return found


@dataclass
class Run:
    """What one process of a tool found. tests: seconds of those that passed; none where the tool did not report."""

    summary: str
    wrong: bool = False
    tests: dict[str, float] = field(default_factory=dict)


def sanitize(tool: str, timeout: float, before: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """One tool over the small tests, for at most about `timeout` seconds.

    Each GPU takes a share of them, in one process and with nothing beside it: others on the GPU, even few, make it
    several times slower than they could help, and to start one takes a tool up to 20 s. What is left when the time is
    up is for the next call, which gets as `before` what this one returns: `clean` is None until no test is left, and
    False once anything is wrong.
    """
    start = time.perf_counter()
    earlier = before if before and before.get("clean") is None else {}
    passed: dict[str, float] = dict(earlier.get("tests", {}))
    summaries = {earlier["summary"]} if passed else set()
    tests = chosen_tests(tool)
    left = [test for test in tests if test not in passed]
    gpus = visible_gpus()
    shares = [share for number in range(len(gpus)) if (share := left[number :: len(gpus)])]
    with ThreadPoolExecutor(len(gpus)) as pool:
        runs = list(pool.map(lambda gpu, share: run_share(tool, share, gpu, timeout), gpus, shares))
    for run in runs:
        passed.update(run.tests)
    unfinished = [test for test in tests if test not in passed]
    return {
        "clean": False if any(run.wrong for run in runs) else None if unfinished else True,
        "left_out": [" ".join(words) for words in NOT_FOR_RACECHECK] if tool == "racecheck" else [],
        "summary": "; ".join(sorted(summaries | {run.summary for run in runs})),
        "passed": len(passed),
        "unfinished": unfinished,
        "seconds": round(earlier.get("seconds", 0.0) + time.perf_counter() - start, 1),
        "tests": {test: passed[test] for test in tests if test in passed},
    }


def visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(gpu) for gpu in range(max(1, torch.cuda.device_count()))]


def run_share(tool: str, tests: Sequence[str], gpu: str, timeout: float) -> Run:
    """One process of a tool. Only the kernels of this project's library are instrumented: their mangled names have its
    namespace in them, also those of FlashInfer's templates, whose arguments are of it."""
    sanitizer = ["compute-sanitizer", "--target-processes", "all", "--tool", tool, "--kernel-name", "kns=fasa"]
    pytest = [sys.executable, "-m", "pytest", "-v", "-x", "-p", "no:cacheprovider", "-p", "benchmarks.deadline"]
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "tests.xml"
        options = [f"--deadline={timeout}", f"--grace={GRACE}", f"--junitxml={report}"]
        try:
            done = subprocess.run(
                [*sanitizer, "--error-exitcode", "9", *pytest, *options, *tests], cwd=ROOT, capture_output=True,
                text=True, timeout=timeout + 2 * GRACE, env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return Run(f"{tool} took more than {2 * GRACE} s beyond the deadline")
        except OSError as error:
            raise FasaError(
                f"compute-sanitizer does not start: {error.strerror}",
                hint="it comes with CUDA's toolkit; add it to PATH",
            ) from error
        cases = cases_of(report) if report.is_file() else ()
        passed = {case.id: case.seconds for case in cases if case.outcome == "passed"}
    text = done.stdout + done.stderr
    if GIVEN_UP in text:
        started = [test for test in tests if test in text]
        return Run(f"{started[-1] if started else 'pytest'} took more than {GRACE} s beyond the deadline")
    summaries = sorted(set(re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", text)))  # of each process
    if done.returncode in (0, 2) and passed and summaries and all(map(is_clean, summaries)):  # 2: the time was up
        return Run("; ".join(summaries), tests=passed)
    failed = re.findall(r"^(?:FAILED|ERROR) .*::.*", text, re.MULTILINE)
    return Run("; ".join([*summaries, *failed]) or text[-500:], wrong=True)


def is_clean(summary: str) -> bool:
    """Of what a tool says at the end of a process: "0 errors", "0 hazards displayed (0 errors, 0 warnings)"."""
    return bool(re.match(r"0 (errors|hazards)\b", summary))

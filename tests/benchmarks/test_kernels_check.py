"""What the sanitizer is given to run. Needs no GPU: skipped tests are collected, too."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.common import ROOT
from benchmarks.kernels_check import SMALL, TESTS, selection


def test_every_line_names_a_few_tests() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", TESTS, "-k", selection()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    names = [line.split("::")[1] for line in done.stdout.splitlines() if "::" in line]
    for words in SMALL:
        assert 1 <= sum(all(word in name for word in words) for name in names) <= 16, words
    assert len(names) <= 64

"""A pytest plugin: once the time is up, no further test starts, and pytest ends in good order, its reports written.
Where the last test goes on beyond that for too long, the process ends, with what it was at in its error output.

python -m pytest -p benchmarks.deadline --deadline 300 --grace 60
"""

from __future__ import annotations

import faulthandler
import math
import os
import time

import pytest

GIVEN_UP = "Timeout ("  # what faulthandler says first
_START = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--deadline", type=float, default=math.inf, metavar="SECONDS", help="no test starts after these")
    parser.addoption(
        "--grace", type=float, default=math.inf, metavar="SECONDS", help="that the last test may take then"
    )


def pytest_configure(config: pytest.Config) -> None:
    last = config.getoption("deadline") + config.getoption("grace")
    if math.isfinite(last):
        # A copy: pytest keeps for itself what tests write to standard error, but not yet.
        faulthandler.dump_traceback_later(last, exit=True, file=os.dup(2))


def pytest_unconfigure() -> None:
    faulthandler.cancel_dump_traceback_later()


def pytest_runtest_teardown(item: pytest.Item) -> None:
    if time.monotonic() - _START > item.config.getoption("deadline"):
        item.session.shouldstop = "the time is up"

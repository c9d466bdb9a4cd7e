"""A pytest plugin: once the time is up, no further test starts, and pytest ends in good order, its reports written.

python -m pytest -p benchmarks.deadline --deadline 300
"""

from __future__ import annotations

import math
import time

import pytest

_START = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--deadline", type=float, default=math.inf, metavar="SECONDS", help="no test starts after these")


def pytest_runtest_teardown(item: pytest.Item) -> None:
    if time.monotonic() - _START > item.config.getoption("deadline"):
        item.session.shouldstop = "the time is up"

"""Runs the command line inside the test process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from fasa_trt.cli.main import main


@dataclass(frozen=True)
class Result:
    status: int
    out: str
    err: str

    def refused(self, *words: str) -> None:
        """Asserts one clear line on stderr that has all of `words`, nothing on stdout, and exit status 1."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        assert self.status == 1
        assert self.out == ""
        assert "Traceback" not in self.err
        for word in words:
            assert word in lines[0], lines[0]


Cli = Callable[..., Result]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["fasa-trt", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        captured = capsys.readouterr()
        return Result(status, captured.out, captured.err)

    return run

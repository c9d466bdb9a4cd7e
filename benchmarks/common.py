"""What the benchmarks share: facts about a run, result files, a command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from fasa_trt.bench.record import machine_facts
from fasa_trt.cli.console import say
from fasa_trt.core.atomic import write_bytes
from fasa_trt.core.errors import FasaError
from fasa_trt.export.engine import versions

ROOT = Path(__file__).resolve().parent.parent
SAMPLE_MODEL = ROOT / "examples" / "models" / "fasa-tiny"


def run_facts() -> dict[str, Any]:
    """What a reader needs to judge or repeat a run: commit, time, versions, processor, other load on it."""
    return {"commit": commit(), "versions": versions(), **machine_facts()}


def commit() -> str:
    """The checked-out commit, with "+dirty" when any file but a result differs from it; "unknown" outside git."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + ("+dirty" if _git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_result(path: Path, content: dict[str, Any]) -> None:
    """Writes a result file at once or not at all. Raises FasaError when it cannot be written."""
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())
    say(f"recorded {path}")


def main(script: Callable[..., None]) -> None:
    """Runs a script's command line. Exit status 0 done, 1 an error or a missed target, 130 interrupted."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' own would tear into ours
    app = typer.Typer(rich_markup_mode="rich", add_completion=False, pretty_exceptions_enable=False)
    app.command()(script)
    try:
        app()
    except FasaError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True, encoding="utf-8"
    ).stdout.strip()

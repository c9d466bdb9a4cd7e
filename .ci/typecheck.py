"""Type-checks the project under its import names: python .ci/typecheck.py [mypy options]

mypy finds a package by its path, but `export/` is imported as `fasa_trt.export`. So this lays out
build/typecheck the way an installed package looks, with links to the sources, runs mypy there, and reports
the paths of the sources.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MIRROR = ROOT / "build" / "typecheck"
STAGES = ("calibrate", "export", "plugins")  # as in setup.py
ALONGSIDE = ("tests", "examples", "benchmarks")  # checked too, but not installed


def link(source: Path, target: Path) -> None:
    """Make `target` stand for `source`: a link, or a copy where the system forbids links (Windows)."""
    try:
        target.symlink_to(source, target_is_directory=source.is_dir())
    except OSError:
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copy2(source, target)


def lay_out() -> list[str]:
    """Build the mirror and return what to check in it."""
    shutil.rmtree(MIRROR, ignore_errors=True)
    package = MIRROR / "fasa_trt"
    package.mkdir(parents=True)
    for source in (ROOT / "fasa_trt").iterdir():
        if source.name != "__pycache__":
            link(source, package / source.name)
    for name in STAGES:
        if (ROOT / name).is_dir():
            link(ROOT / name, package / name)
    present = [name for name in ALONGSIDE if any((ROOT / name).rglob("*.py"))]
    for name in present:
        link(ROOT / name, MIRROR / name)
    return ["fasa_trt", *present]


def main() -> int:
    mypy = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
    cache = ["--cache-dir", str(ROOT / ".mypy_cache")]
    result = subprocess.run(
        [*mypy, *cache, *sys.argv[1:], *lay_out()],
        cwd=MIRROR,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONUTF8": "1"},
    )
    in_package = re.compile(rf"^fasa_trt[/\\]({'|'.join(STAGES)})(?=[/\\])", re.MULTILINE)
    print(in_package.sub(r"\1", result.stdout), end="")
    return result.returncode


if __name__ == "__main__":
    sys.exit(main())

"""What `fasa-trt export` does, in a process that tells its peak memory on stdout when it is done.

It asks the kernel for this process's own figure: the one that a parent gets to see (ru_maxrss) counts the parent's
memory at the time of the fork as well.
"""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from fasa_trt.cli.export import export
from fasa_trt.core.errors import FasaError


def peak_bytes() -> int:
    """The largest resident memory of this process so far; mapped files count, the page cache does not."""
    for line in Path("/proc/self/status").read_text("utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


if __name__ == "__main__":
    app = typer.Typer()
    app.command()(export)
    try:
        app(standalone_mode=False)
    except FasaError as error:
        sys.exit(f"error: {error}")
    print(peak_bytes())

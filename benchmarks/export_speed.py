"""Export of a large checkpoint: time against copying the same files, and peak memory.

python -m benchmarks.export_speed --check
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from benchmarks.common import ROOT, main, run_facts, write_result
from benchmarks.synthetic import SHAPES, Shape, write_checkpoint
from fasa_trt.bench.cpu import random_profile
from fasa_trt.bench.record import summary
from fasa_trt.cli.console import human_bytes, out, progress, say
from fasa_trt.core.checkpoint import open_checkpoint
from fasa_trt.core.errors import FasaError

DEFAULT_OUTPUT = "benchmarks/results/cpu/export.json"
PEAK_LIMIT = 4 << 30
TIME_LIMIT = 2.0  # times a copy
DISK_FACTOR = 2.5  # free disk that a shape asks for, in its own size: itself, one copy or export, and some air


@dataclass(frozen=True)
class Run:
    """One timed copy or export, until its bytes are on the disk. peak_bytes: resident memory, of an export."""

    kind: Literal["copy", "export"]
    seconds: float
    flush_seconds: float
    output_bytes: int
    peak_bytes: int | None = None


def export_speed(
    shape: Annotated[
        str, typer.Option(help=f"auto | {' | '.join(SHAPES)}. auto: the largest that the disk has room for.")
    ] = "auto",
    rounds: Annotated[int, typer.Option(min=1, help="Each runs copy, export, export, copy.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the weights and the profile.")] = 0,
    work: Annotated[
        Path | None, typer.Option(help="Folder on the disk to measure.", show_default="the system's temporary one")
    ] = None,
    output: Annotated[Path, typer.Option(help="Result file.", show_default=DEFAULT_OUTPUT)] = ROOT / DEFAULT_OUTPUT,
    check: Annotated[
        bool, typer.Option("--check", help=f"Exit with 1 above 4 GiB of memory or {TIME_LIMIT:g}x a copy's time.")
    ] = False,
) -> None:
    """Measure [bold]fasa-trt export[/] on a synthetic bfloat16 checkpoint of a large model's shape.

    Writes the checkpoint (random weights, shards of 4.7 GB), then copies its shards and exports it to bfloat16 ONNX,
    in turns. Every run begins with the shards out of the page cache and ends when its output is on the disk. The
    export is a process of its own, from the start of its interpreter, with a profile of random rankings: fingerprint
    and permutation of the query and key weights are part of it. All files are deleted again, also after Ctrl-C.

    Example: python -m benchmarks.export_speed --shape llama-3.2-3b --output export-3b.json
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the files go away then, too
    if sys.platform != "linux":
        raise FasaError("this benchmark reads a process's peak memory from /proc", hint="run it on Linux")
    facts = run_facts()
    name = choose_shape(shape, free_bytes(work))
    with tempfile.TemporaryDirectory(prefix="fasa-export-", dir=work) as directory:
        runs = measure(SHAPES[name], Path(directory).resolve(), rounds, seed)
    result = {"benchmark": "export_speed", **facts, "shape": name, "seed": seed, **conclude(SHAPES[name], runs)}
    show(result)
    write_result(output, result)
    if check and not result["met"]:
        raise typer.Exit(1)


def free_bytes(work: Path | None) -> int:
    folder = Path(tempfile.gettempdir()) if work is None else work
    if not folder.is_dir():
        raise FasaError(f"no such folder: {folder}", hint="make it, or choose another --work")
    return shutil.disk_usage(folder).free


def choose_shape(wanted: str, free: int) -> str:
    """The name of a shape that `free` bytes of disk have room for. Raises FasaError when there is none."""
    if wanted != "auto" and wanted not in SHAPES:
        raise FasaError(f"unknown shape {wanted!r}", hint=f"auto or one of {', '.join(SHAPES)}")
    for name in SHAPES if wanted == "auto" else [wanted]:
        needed = int(DISK_FACTOR * SHAPES[name].nbytes)
        if needed <= free:
            return name
        say(f"[yellow]no room for {name}[/]: {human_bytes(needed)} of disk needed, {human_bytes(free)} free")
    raise FasaError("not enough free disk", hint="choose a --work folder on a larger disk, or a smaller --shape")


def measure(shape: Shape, directory: Path, rounds: int, seed: int) -> list[Run]:
    """Copies and exports in turns, each kind as often first as last."""
    source, profile, target = directory / "checkpoint", directory / "profile.safetensors", directory / "output"
    with progress() as report:
        shards = write_checkpoint(shape, source, seed=seed, progress=lambda *done: report("write", *done))
        random_profile(open_checkpoint(source), seed).save(profile)
        runs: list[Run] = []
        order: list[Literal["copy", "export"]] = ["copy", "export", "export", "copy"]
        for kind in order * rounds:
            report("measure", len(runs), 4 * rounds)
            target.mkdir()
            drop_from_page_cache(shards)
            runs.append(copy(shards, target) if kind == "copy" else export(source, profile, target))
            shutil.rmtree(target)
        report("measure", len(runs), len(runs))
    return runs


def copy(shards: Iterable[Path], target: Path) -> Run:
    started = time.perf_counter()
    for shard in shards:
        shutil.copyfile(shard, target / shard.name)
    return finished("copy", started, target)


def export(source: Path, profile: Path, target: Path) -> Run:
    """Raises FasaError with the exporter's last words when it fails."""
    options = ["--model", source, "--profile", profile, "--output", target / "model.onnx", "--dtype", "bfloat16"]
    started = time.perf_counter()
    # The process is killed when waiting for it is interrupted.
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.export_worker", *map(str, options)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        raise FasaError(f"the export ended with status {done.returncode}: {''.join(last)}")
    return finished("export", started, target, int(done.stdout))


def finished(kind: Literal["copy", "export"], started: float, target: Path, peak: int | None = None) -> Run:
    """Waits until what lies in `target` is on the disk."""
    written = time.perf_counter()
    files = list(target.iterdir())
    for file in files:
        with file.open("rb+") as stream:
            os.fsync(stream.fileno())
    now = time.perf_counter()
    return Run(kind, now - started, now - written, sum(file.stat().st_size for file in files), peak)


def drop_from_page_cache(files: Iterable[Path]) -> None:
    """So that they are read from the disk."""
    for file in files:
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def conclude(shape: Shape, runs: list[Run]) -> dict[str, Any]:
    copies, exports = ([run.seconds for run in runs if run.kind == kind] for kind in ("copy", "export"))
    peak = max(run.peak_bytes or 0 for run in runs)
    ratio = summary(exports)["median"] / summary(copies)["median"]
    return {
        "weight_bytes": shape.nbytes,
        "page_cache": "source dropped before every run, output flushed within it",
        "copy_seconds": summary(copies),
        "export_seconds": summary(exports),
        "ratio": ratio,
        "peak_bytes": peak,
        "targets": {"ratio": TIME_LIMIT, "peak_bytes": PEAK_LIMIT},
        "met": ratio <= TIME_LIMIT and peak < PEAK_LIMIT,
        "runs": [asdict(run) for run in runs],
    }


def show(result: dict[str, Any]) -> None:
    table = Table("", "seconds", "of a copy", "peak memory", title=f"{result['shape']}, bfloat16, cold page cache")
    table.add_row(f"copy {human_bytes(result['weight_bytes'])}", f"{result['copy_seconds']['median']:.1f}", "1.00", "")
    peak = human_bytes(result["peak_bytes"])
    table.add_row("export", f"{result['export_seconds']['median']:.1f}", f"{result['ratio']:.2f}", peak)
    table.add_row("target", "", f"<= {TIME_LIMIT:.2f}", f"< {human_bytes(PEAK_LIMIT)}")
    out.print(table)
    out.print("targets met" if result["met"] else "[red]targets missed[/]")


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main(export_speed)

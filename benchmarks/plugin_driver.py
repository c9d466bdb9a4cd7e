"""The TensorRT plugin on this GPU without TensorRT: its place is taken by a driver that calls the plugin as it would.

python -m benchmarks.plugin_driver --commit SHA --output benchmarks/results/h200/plugin-driver.json

The cases are those of `tests/plugins/tensorrt/cases.py`: scripted in-flight batching, captured graphs, several shapes
of attention, and the sample model token for token. Needs torch with CUDA, transformers and a C++ compiler; nvcc and
FlashInfer's headers too, unless --library names a plugin library with kernels for head_dim 64 and 128.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from fasa_trt.core.atomic import write_bytes
from fasa_trt.core.errors import FasaError
from fasa_trt.plugins import library
from fasa_trt.runtime.machine import architecture
from tests.plugins.tensorrt.cases import CASES, DTYPES, HEAD_DIMS, Case
from tests.plugins.tensorrt.driver import Driver, compile_driver

Save = Callable[[dict[str, Any]], None]


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)  # tensors are small: threads would wait for each other more than they would compute
    try:
        record = measure(arguments, lambda record: save(arguments.output, record))
    except FasaError as error:
        sys.exit(f"error: {error}")
    print(f"{record['passed']} passed, {record['failed']} failed; recorded {arguments.output}")
    if record["failed"] or record["unfinished"]:
        sys.exit(1)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file, rewritten after every case")
    parser.add_argument("--commit", default="unknown", help="of the plugin's sources")
    parser.add_argument("--library", type=Path, help="libfasa_trt_plugin*.so; compiled for this GPU otherwise")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument(
        "--timeout", type=float, default=120, help="seconds for each case; the process ends beyond that"
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: for a library whose kernels run on the host"
    )
    return parser.parse_args()


def measure(arguments: argparse.Namespace, keep: Save) -> dict[str, Any]:
    """Runs the chosen cases in every data type. Raises FasaError where they cannot be run at all."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise FasaError("no CUDA GPU here", hint="run this on the machine whose GPU is to be checked")
    if arguments.library is not None and not arguments.library.is_file():
        raise FasaError(f"there is no library {arguments.library}")
    chosen = {
        f"{name}, {dtype}": (case, DTYPES[dtype])
        for name, case in CASES.items()
        for dtype in DTYPES
        if arguments.only in f"{name}, {dtype}"
    }
    if not chosen:
        raise FasaError(f"no case has {arguments.only!r} in its name", hint=f"for example {next(iter(CASES))!r}")
    plugin = arguments.library.resolve() if arguments.library else build()
    with tempfile.TemporaryDirectory() as directory:
        driver = Driver(compile_driver(Path(directory), None, "-Wno-error"), plugin)
        return run(driver, chosen, arguments.device, facts(arguments, plugin), keep, arguments.timeout)


def build() -> Path:
    """For this GPU, with every head_dim of the cases; compiled where the cache has none."""

    def report(source: str, done: int, total: int) -> None:
        print(f"compiled {done}/{total}: {source}", flush=True)

    gpu = architecture(torch.cuda.get_device_capability())
    return library.find(gpu, HEAD_DIMS, plugin=True) or library.build_plugin(gpu, HEAD_DIMS, progress=report)


def facts(arguments: argparse.Namespace, plugin: Path) -> dict[str, Any]:
    on_gpu = arguments.device == "cuda"
    return {
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "driver": driver_version() if on_gpu else None,
        "torch": torch.__version__,
        "commit": arguments.commit,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "library": plugin.name,
        "dtypes": list(DTYPES),
    }


def driver_version() -> str:
    """Of the GPU's driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.split()[0] if done.stdout.split() else "unknown"


def run(
    driver: Driver,
    chosen: Mapping[str, tuple[Case, torch.dtype]],
    device: str,
    known: Mapping[str, Any],
    keep: Save,
    timeout: float,
) -> dict[str, Any]:
    """The record, which `keep` gets after every case, too. `unfinished`: cases that were not run, or in the middle of
    which the process ended."""
    cases: list[dict[str, Any]] = []
    for number, (name, (case, dtype)) in enumerate(chosen.items(), 1):
        keep(record_of(known, cases, list(chosen)[number - 1 :]))
        errors = sys.__stderr__ or sys.stderr
        faulthandler.dump_traceback_later(timeout, exit=True, file=errors)  # also where a kernel never ends
        outcome = attempt(name, case, driver, dtype, device)
        faulthandler.cancel_dump_traceback_later()
        cases.append(outcome)
        verdict = "ok    " if outcome["passed"] else "FAILED"
        print(f"[{number:2}/{len(chosen)}] {verdict} {outcome['seconds']:5.1f} s  {name}", flush=True)
        if not outcome["passed"]:
            print(f"        {outcome['error']}", flush=True)
        if device == "cuda" and not usable():
            print("error: the GPU's context is lost, the other cases are not run", flush=True)
            break
    record = record_of(known, cases, list(chosen)[len(cases) :])
    keep(record)
    return record


def attempt(name: str, case: Case, driver: Driver, dtype: torch.dtype, device: str) -> dict[str, Any]:
    start, found, error = time.perf_counter(), {}, None
    try:
        found = case(driver, dtype, device)
    except Exception as reason:  # one case says nothing of the others
        error = f"{type(reason).__name__}: {reason}".splitlines()[0]
    seconds = round(time.perf_counter() - start, 2)
    outcome = {"name": name, "passed": error is None, "seconds": seconds, **found}
    return outcome if error is None else {**outcome, "error": error}


def usable() -> bool:
    """Whether the GPU still answers; after an illegal address it does not."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def record_of(known: Mapping[str, Any], cases: list[dict[str, Any]], unfinished: list[str]) -> dict[str, Any]:
    failures = [f"{case['name']}: {case['error']}" for case in cases if not case["passed"]]
    return {
        **known,
        "passed": len(cases) - len(failures),
        "failed": len(failures),
        "failures": failures,
        "unfinished": unfinished,
        "cases": list(cases),
    }


def save(path: Path, record: Mapping[str, Any]) -> None:
    write_bytes(path, (json.dumps(record, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()

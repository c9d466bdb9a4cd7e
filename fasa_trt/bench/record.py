"""Records of benchmark runs: the facts that a reader needs to judge one, and the rule that runs do not mix.

A record is JSON: facts at the top, with the run's id, and rows of measurements. Figures of two runs are never put into
one ratio: another run may have had another clock, another load, another library.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import uuid
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fasa_trt.core.atomic import write_bytes
from fasa_trt.core.errors import FasaError
from fasa_trt.runtime.machine import nvcc_version, package_version

PACKAGES = ("torch", "transformers", "onnxruntime", "triton")


def new_record(benchmark: str, commit: str | None = None) -> dict[str, Any]:
    """The facts of a run that starts now. commit: of the sources, where the caller knows it."""
    import torch

    facts: dict[str, Any] = {
        "benchmark": benchmark,
        "run_id": uuid.uuid4().hex,
        "commit": commit or "unknown",
        "versions": {"python": platform.python_version(), **_versions()},
        **machine_facts(),
    }
    return {**facts, **gpu_facts()} if torch.cuda.is_available() else facts


def machine_facts() -> dict[str, Any]:
    """Time, processor, and other load on it."""
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def require_gpu() -> None:
    """Raises FasaError without a CUDA GPU."""
    import torch

    if not torch.cuda.is_available():
        raise FasaError("no CUDA GPU here", hint="run this on the machine whose GPU is to be measured")


def gpu_facts() -> dict[str, Any]:
    import torch

    return {
        "gpu": torch.cuda.get_device_name(),
        "gpu_memory": torch.cuda.get_device_properties(0).total_memory,
        "driver": _driver_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nvcc": nvcc_version(),
        "flashinfer": package_version("flashinfer", "flashinfer-python"),
    }


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and extremes of `samples`, in their unit."""
    low, middle, high = statistics.quantiles(samples, method="inclusive") if len(samples) > 1 else [samples[0]] * 3
    return {"median": middle, "quartile_1": low, "quartile_3": high, "min": min(samples), "max": max(samples)}


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Writes a record at once or not at all. Raises FasaError when it cannot be written."""
    write_bytes(path, (json.dumps(record, indent=2) + "\n").encode())


def read_record(path: Path) -> dict[str, Any]:
    """Raises FasaError unless `path` is a record of one run: its rows must all carry its id."""
    try:
        record = json.loads(path.read_text("utf-8"))
        known = (str(record["benchmark"]), str(record["run_id"]))
    except OSError as error:
        raise FasaError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError):
        raise FasaError(f"{path} is not a record of a benchmark", hint="fasa-trt bench writes them") from None
    strangers = {str(row.get("run_id", known[1])) for row in record.get("rows", ())} - {known[1]}
    if strangers:
        raise FasaError(
            f"{path} mixes runs {known[1][:8]} and {min(strangers)[:8]}: their times cannot be compared",
            hint="measure all rows in one run",
        )
    return dict(record)


def require_one_run(records: Sequence[dict[str, Any]]) -> None:
    """Raises FasaError for records of several runs."""
    runs = sorted({str(record["run_id"]) for record in records})
    if len(runs) > 1:
        raise FasaError(
            f"these records are of {len(runs)} runs ({', '.join(run[:8] for run in runs)}): their times cannot be "
            "compared",
            hint="report one run at a time",
        )


def _versions() -> dict[str, str]:
    found = {package: package_version(package) for package in PACKAGES}
    return {package: version for package, version in found.items() if version is not None}


def _driver_version() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None

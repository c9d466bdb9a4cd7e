"""The CUDA kernels on one GPU, against the fastest dense attention of the same run.

python -m benchmarks.kernels --output benchmarks/results/h200/kernels.json
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import main, run_facts, write_result
from fasa_trt.core.errors import FasaError

SECTIONS = ("rows", "crossover", "topk", "prefill")


def kernels(
    output: Annotated[Path | None, typer.Option(help="Result file, rewritten after every section.")] = None,
    only: Annotated[str | None, typer.Option(help=f"Some of {','.join(SECTIONS)}.", show_default="all")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few shapes, few repeats: does it run at all?")] = False,
    commit: Annotated[str | None, typer.Option(help="Of the kernels, where this is not a git checkout.")] = None,
) -> None:
    """Time the CUDA kernels: FASA's decode step against the fastest dense decode attention, and what belongs to it.

    Llama-3.1-8B's attention (32 query heads on 8 KV heads, head_dim 128), bfloat16, budget 256; microseconds per layer
    and step, medians of CUDA-graph replays over several caches, so that the L2 cache cannot serve the next step. Dense
    kernels are torch's SDPA, FlashInfer's where it is installed, and this project's; each is checked before it is
    timed.

    [bold]rows[/]: label kinds and reductions. [bold]crossover[/]: contexts from 512 on, by batch. [bold]topk[/]:
    selection alone. [bold]prefill[/]: dense prefill.

    Example: python -m benchmarks.kernels --output kernels.json --only rows,crossover
    """
    sections = chosen(only)
    import torch

    from benchmarks.kernels import dense, timing
    from benchmarks.kernels.crossover import crossover
    from benchmarks.kernels.prefill import prefill
    from benchmarks.kernels.rows import rows
    from benchmarks.kernels.topk import topk

    if not torch.cuda.is_available():
        raise FasaError("no CUDA GPU here", hint="run this on the machine whose GPU is to be measured")
    repeats = 5 if quick else 30
    facts = run_facts()
    result: dict[str, Any] = {
        "benchmark": "kernels",
        **facts,
        "commit": commit or facts["commit"],
        **gpu_facts(),
        "quick": quick,
        "bandwidth": round(timing.bandwidth()),
    }
    print(f"{result['gpu']}, {result['bandwidth'] / 1e12:.2f} TB/s", flush=True)
    torch.cuda.empty_cache()
    known, result["missing"] = dense.usable() if {"rows", "crossover"} & set(sections) else ({}, {})
    table = (known, result["bandwidth"])
    run: dict[str, Callable[[], Any]] = {
        "rows": lambda: rows(*table, quick=quick, repeats=repeats),
        "crossover": lambda: {"crossover": crossover(*table, quick=quick, repeats=min(repeats, 15))},
        "topk": lambda: {"topk": topk(quick=quick, repeats=repeats)},
        "prefill": lambda: {"prefill": prefill(quick=quick, repeats=min(repeats, 15))},
    }
    for section in sections:
        start = time.perf_counter()
        result.update(run[section]())
        torch.cuda.empty_cache()
        result.setdefault("seconds", {})[section] = round(time.perf_counter() - start, 1)
        print(f"{section}: {result['seconds'][section]} s", flush=True)
        if output:
            write_result(output, result)


def chosen(only: str | None) -> tuple[str, ...]:
    """The sections that --only names, in their usual order. Raises FasaError for others."""
    if only is None:
        return SECTIONS
    names = {name.strip() for name in only.split(",")}
    if names - set(SECTIONS):
        unknown = ", ".join(sorted(names - set(SECTIONS)))
        raise FasaError(f"no such section: {unknown!r}", hint=f"some of {','.join(SECTIONS)}")
    return tuple(name for name in SECTIONS if name in names)


def gpu_facts() -> dict[str, Any]:
    import torch

    from fasa_trt.runtime.machine import nvcc_version, package_version

    memory = torch.cuda.get_device_properties(0).total_memory
    return {
        "gpu": torch.cuda.get_device_name(),
        "gpu_memory": memory,
        "driver": driver_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nvcc": nvcc_version(),
        "flashinfer": package_version("flashinfer", "flashinfer-python"),
    }


def driver_version() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


if __name__ == "__main__":
    main(kernels)

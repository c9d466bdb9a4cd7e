"""All sections of the kernel benchmark, in one run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from fasa_trt.bench.record import new_record, require_gpu
from fasa_trt.core.errors import FasaError

SECTIONS = ("rows", "crossover", "topk", "prefill")


def run_kernels(
    sections: tuple[str, ...], *, quick: bool, commit: str | None, write: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """The record of a run; `write` gets what there is of it after every section. commit: of the kernels.

    Raises FasaError without a GPU.
    """
    require_gpu()
    from fasa_trt.bench.kernels import dense, rows, timing, topk
    from fasa_trt.bench.kernels.crossover import crossover
    from fasa_trt.bench.kernels.prefill import prefill

    repeats = 5 if quick else 30
    result = {**new_record("kernels", commit), "quick": quick, "bandwidth": round(timing.bandwidth())}
    print(f"{result['gpu']}, {result['bandwidth'] / 1e12:.2f} TB/s", flush=True)
    torch.cuda.empty_cache()
    known, result["missing"] = dense.usable() if {"rows", "crossover"} & set(sections) else ({}, {})
    table = (known, result["bandwidth"])
    run: dict[str, Callable[[], Any]] = {
        "rows": lambda: rows.rows(*table, quick=quick, repeats=repeats),
        "crossover": lambda: {"crossover": crossover(*table, quick=quick, repeats=min(repeats, 15))},
        "topk": lambda: {"topk": topk.topk(quick=quick, repeats=repeats)},
        "prefill": lambda: {"prefill": prefill(quick=quick, repeats=min(repeats, 15))},
    }
    for section in sections:
        start = time.perf_counter()
        result.update(run[section]())
        torch.cuda.empty_cache()
        result.setdefault("seconds", {})[section] = round(time.perf_counter() - start, 1)
        print(f"{section}: {result['seconds'][section]} s", flush=True)
        write(result)
    # Last, because the profiler slows what is timed behind it in the same process.
    stages: dict[str, Callable[[], None]] = {
        "rows": lambda: rows.add_stages(result["rows"]),
        "topk": lambda: topk.add_stages(result["topk"]["rows"]),
    }
    for section in sections:
        if section in stages:
            try:
                stages[section]()
            except dense.FAILURES as reason:
                print(f"{section}: stages left out: {dense.one_line(reason)}", flush=True)
            torch.cuda.empty_cache()
            write(result)
    return result


def chosen(only: str | None) -> tuple[str, ...]:
    """The sections that --only names, in their usual order. Raises FasaError for others."""
    if only is None:
        return SECTIONS
    names = {name.strip() for name in only.split(",")}
    if names - set(SECTIONS):
        unknown = ", ".join(sorted(names - set(SECTIONS)))
        raise FasaError(f"no such section: {unknown!r}", hint=f"some of {','.join(SECTIONS)}")
    return tuple(name for name in SECTIONS if name in names)

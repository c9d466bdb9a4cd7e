"""The main table: FASA with every label kind and reduction against the fastest dense kernel, shape by shape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from operator import itemgetter
from typing import Any

from fasa_trt.bench.kernels.cache import Paged, fitting
from fasa_trt.bench.kernels.dense import FAILURES, Kernel, dense_us, one_line
from fasa_trt.bench.kernels.fasa import BUDGET, Variant, decode_calls
from fasa_trt.bench.kernels.timing import median, replay_us, stages_us
from fasa_trt.core.spec import REDUCTIONS, SparseSpec

SHAPES = ((4096, 1), (8192, 16), (32768, 1), (32768, 8), (32768, 32), (131072, 1), (131072, 8))
QUICK_SHAPES = ((32768, 8), (131072, 1))
VARIANTS = (Variant("int4", 32), Variant("int8", 32), Variant("fp8", 32), Variant("prefix", 16), Variant("prefix", 24))
REDUCTION_SHAPES = ((32768, 1), (32768, 8), (131072, 8))
OTHER_REDUCTIONS = tuple(reduction for reduction in REDUCTIONS if reduction != SparseSpec.reduction)


def variants_of(context: int, batch: int) -> Iterator[Variant]:
    yield from VARIANTS
    if (context, batch) in REDUCTION_SHAPES:
        yield from (Variant("int4", 32, reduction) for reduction in OTHER_REDUCTIONS)


def rows(kernels: Mapping[str, Kernel], bandwidth: float, *, quick: bool, repeats: int) -> dict[str, Any]:
    """{"rows": one for each shape and variant, "dense": raw samples of each shape}."""
    found: list[dict[str, Any]] = []
    dense: list[dict[str, Any]] = []
    for context, batch in QUICK_SHAPES if quick else SHAPES:
        paged = fitting(context, batch)
        if paged is None:
            continue
        samples = dense_us(paged, kernels, repeats)
        dense.append({"context": context, "batch": batch, "copies": len(paged.pools), "samples": samples})
        for variant in variants_of(context, batch):
            try:
                row = {**row_of(paged, variant, bandwidth, repeats), **fastest(samples)}
            except FAILURES as reason:
                print(f"{context:7d} x {batch:3d} {variant}: left out: {one_line(reason)}", flush=True)
                continue
            found.append(row)
            print(describe(row), flush=True)
        del paged
    return {"rows": found, "dense": dense}


def add_stages(found: Iterable[dict[str, Any]]) -> None:
    """Adds to rows, which lie together by shape, what their steps spend in each kernel: "stages_us"."""
    for (context, batch), alike in groupby(found, key=itemgetter("context", "batch")):
        paged = fitting(context, batch)
        if paged is None:
            continue
        variants = {(each.labels, each.n_tip, each.reduction): each for each in variants_of(context, batch)}
        for row in alike:
            name = (row["labels"], row["n_tip"], row["reduction"])
            row["stages_us"] = stages_us(decode_calls(paged, variants[name]))
            print(f"{context:7d} x {batch:3d} {' '.join(map(str, name))}: {row['stages_us']}", flush=True)
        del paged


def fastest(samples: Mapping[str, list[float]]) -> dict[str, Any]:
    """The dense figures of a row; none where no dense kernel ran."""
    if not samples:
        return {"dense_us": None, "dense_kernel": None}
    name = min(samples, key=lambda name: median(samples[name]))
    return {"dense_us": median(samples[name]), "dense_kernel": name}


def row_of(paged: Paged, variant: Variant, bandwidth: float, repeats: int) -> dict[str, Any]:
    """FASA's figures."""
    samples = replay_us(decode_calls(paged, variant), repeats)
    limit = variant.bytes_of(paged.context, paged.batch) / bandwidth * 1e6
    return {
        "context": paged.context,
        "batch": paged.batch,
        "dtype": "bfloat16",
        "labels": variant.labels,
        "n_tip": variant.n_tip,
        "reduction": variant.reduction,
        "budget": BUDGET,
        "fasa_us": median(samples),
        "limit_us": round(limit, 3),
        "limit_share": round(limit / median(samples), 3),
        "fasa_samples": samples,
    }


def describe(row: Mapping[str, Any]) -> str:
    dense = "no dense kernel" if row["dense_us"] is None else f"dense {row['dense_us']:7.1f} ({row['dense_kernel']})"
    ratio = "" if row["dense_us"] is None else f", {row['dense_us'] / row['fasa_us']:5.2f}x"
    return (
        f"{row['context']:7d} x {row['batch']:3d} {row['labels']:>6} n_tip {row['n_tip']} {row['reduction']}: {dense}, "
        f"fasa {row['fasa_us']:6.1f}, limit {row['limit_us']:6.1f} ({row['limit_share']:.0%}){ratio}"
    )

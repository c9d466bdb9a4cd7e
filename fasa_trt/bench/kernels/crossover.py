"""From which context on FASA is faster than the fastest dense kernel, for each batch size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fasa_trt.bench.kernels.cache import fitting
from fasa_trt.bench.kernels.dense import FAILURES, Kernel, dense_us, one_line
from fasa_trt.bench.kernels.fasa import Variant, decode_calls
from fasa_trt.bench.kernels.rows import fastest
from fasa_trt.bench.kernels.timing import median, replay_us

BATCHES = (1, 4, 16, 32, 64)
CONTEXTS = tuple(512 << step for step in range(9))  # 512 .. 128k
QUICK_BATCHES, QUICK_CONTEXTS = (1, 16), CONTEXTS[2:6]
VARIANT = Variant("int4", 32)


def crossover(kernels: Mapping[str, Kernel], bandwidth: float, *, quick: bool, repeats: int) -> dict[str, Any]:
    """{"points": one for each batch and context, "from": {batch: context}}. auto_us: with the library's own choice
    between dense and sparse."""
    points: list[dict[str, Any]] = []
    for batch in QUICK_BATCHES if quick else BATCHES:
        for context in QUICK_CONTEXTS if quick else CONTEXTS:
            paged = fitting(context, batch)
            if paged is None:
                continue
            samples = dense_us(paged, kernels, repeats)
            try:
                fasa = replay_us(decode_calls(paged, VARIANT), repeats)
                auto = replay_us(decode_calls(paged, VARIANT, dense_below=-1), repeats)
            except FAILURES as reason:
                print(f"{context:7d} x {batch:3d}: left out: {one_line(reason)}", flush=True)
                continue
            point = {
                "context": context,
                "batch": batch,
                **fastest(samples),
                "fasa_us": median(fasa),
                "auto_us": median(auto),
                "limit_us": round(VARIANT.bytes_of(context, batch) / bandwidth * 1e6, 3),
                "dense_samples": samples,
                "fasa_samples": fasa,
                "auto_samples": auto,
            }
            points.append(point)
            print(
                f"{context:7d} x {batch:3d}: dense {point['dense_us']} ({point['dense_kernel']}), "
                f"fasa {point['fasa_us']:.1f}, auto {point['auto_us']:.1f}",
                flush=True,
            )
            del paged
    lengths = {str(batch): crossover_length(points, batch) for batch in sorted({point["batch"] for point in points})}
    return {"labels": VARIANT.labels, "n_tip": VARIANT.n_tip, "from": lengths, "points": points}


def crossover_length(points: Iterable[Mapping[str, Any]], batch: int) -> int | None:
    """The context from which FASA is faster for good; None where it is not at the longest measured."""
    found = None
    mine = (point for point in points if point["batch"] == batch and point["dense_us"] is not None)
    for point in sorted(mine, key=lambda point: point["context"], reverse=True):
        if point["fasa_us"] >= point["dense_us"]:
            break
        found = int(point["context"])
    return found

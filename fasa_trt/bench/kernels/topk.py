"""What selection costs: FlashInfer's and torch's top-k alone, beside all of FASA's step but its score pass.

FASA's kernel selects and attends at once, so its time cannot be taken apart: it stands beside kernels that only select.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fasa_trt.bench.kernels.cache import KV_HEADS, fitting, normal
from fasa_trt.bench.kernels.dense import FAILURES, one_line
from fasa_trt.bench.kernels.fasa import BUDGET, Variant, decode_calls
from fasa_trt.bench.kernels.timing import Calls, median, replay_us, stages_us

SHAPES = ((32768, 1), (32768, 8), (131072, 1), (131072, 8))  # of KV_HEADS rows a sequence
COPIES = 8


def topk(*, quick: bool, repeats: int) -> dict[str, Any]:
    found = []
    for context, batch in SHAPES[:1] if quick else SHAPES:
        row: dict[str, Any] = {"rows": KV_HEADS * batch, "length": context, "k": BUDGET, "kernels": {}, "without": {}}
        for name, calls in selections(row["rows"], context).items():
            try:
                samples = replay_us(calls(), repeats)
                row["kernels"][name] = {"us": median(samples), "samples": samples}
            except FAILURES as reason:
                row["without"][name] = one_line(reason)
        found.append(row)
        print({**row, "kernels": {name: kernel["us"] for name, kernel in row["kernels"].items()}}, flush=True)
    return {"note": __doc__, "rows": found}


def add_stages(found: Iterable[dict[str, Any]]) -> None:
    """Adds to rows what each way spends in its kernels, and FASA in all but its score pass, by the profiler."""
    for row in found:
        for name, calls in selections(row["rows"], row["length"]).items():
            if name in row["kernels"]:
                row["kernels"][name]["stages_us"] = stages_us(calls())
        paged = fitting(row["length"], row["rows"] // KV_HEADS)
        if paged is not None:
            row["fasa_select_and_attend_us"] = select_and_attend_us(stages_us(decode_calls(paged, Variant("int4", 32))))
        del paged


def selections(rows: int, length: int) -> dict[str, Callable[[], Calls]]:
    """Ways to find the BUDGET largest of each row, among random numbers."""

    def scores(dtype: torch.dtype) -> list[Tensor]:
        return [normal(rows, length, dtype=dtype) for _ in range(COPIES)]

    def flashinfer(dtype: torch.dtype, **options: Any) -> Calls:
        from flashinfer import top_k

        return [partial(top_k, score, BUDGET, **options) for score in scores(dtype)]

    def plain(dtype: torch.dtype) -> Calls:
        return [partial(torch.topk, score, BUDGET, sorted=False) for score in scores(dtype)]

    ours = {"deterministic": True, "tie_break": 1}  # equal scores go to the lower position, as in FASA
    return {
        "FlashInfer top_k float32": partial(flashinfer, torch.float32),
        "FlashInfer top_k float16": partial(flashinfer, torch.float16),
        "FlashInfer top_k float16, deterministic, lower index first": partial(flashinfer, torch.float16, **ours),
        "torch.topk float32": partial(plain, torch.float32),
    }


def select_and_attend_us(stages: dict[str, float]) -> float:
    """All kernels of a step but those of its score pass."""
    return round(sum(time for name, time in stages.items() if "score" not in name), 2)

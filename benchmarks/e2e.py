"""Whole decode steps on one GPU, dense against FASA.

python -m benchmarks.e2e --commit SHA --output benchmarks/results/h200/e2e.json
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import commit as checked_out
from benchmarks.common import main, write_result
from fasa_trt.bench.shapes import SHAPES
from fasa_trt.cli import options as opt


def e2e(
    output: Annotated[Path | None, typer.Option(help="Result file, rewritten after every row.")] = None,
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "llama-3.1-8b",
    dense_layers: opt.DenseLayers = None,
    quick: Annotated[bool, typer.Option("--quick", help="One point, few repeats: does it run at all?")] = False,
    commit: Annotated[str | None, typer.Option(help="Of the kernels, where this is not a git checkout.")] = None,
) -> None:
    """Time whole decode steps: FASA against the fastest dense decode attention of the same run.

    A model of that shape with random bfloat16 weights; each step is one CUDA graph with everything in it: norms,
    projections, the cache's update, attention, MLP, output layer and argmax. Both sides differ in attention alone.

    Example: python -m benchmarks.e2e --output e2e.json
    """
    from fasa_trt.bench.record import new_record, require_gpu

    require_gpu()
    import torch

    from fasa_trt.bench.e2e import POINTS, run_e2e
    from fasa_trt.bench.shapes import config_of
    from fasa_trt.bench.weights import random_weights
    from fasa_trt.cli.bench import sparse_spec
    from fasa_trt.core.spec import SparseSpec

    def write(result: dict[str, Any]) -> None:
        if output:
            write_result(output, result)

    start = time.perf_counter()
    weights = random_weights(config_of(shape), device=torch.device("cuda"), dtype=torch.bfloat16)
    points, repeats = (POINTS[2:3], 5) if quick else (POINTS, 30)
    record = {**new_record("e2e", commit or checked_out()), "weights": "random"}
    run_e2e(record, shape, weights, points, sparse_spec(SparseSpec.budget, dense_layers), repeats=repeats, write=write)
    print(f"{time.perf_counter() - start:.0f} s in all", flush=True)


if __name__ == "__main__":
    main(e2e)

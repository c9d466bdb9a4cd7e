"""The CUDA kernels on one GPU, against the fastest dense attention of the same run.

python -m benchmarks.kernels --output benchmarks/results/h200/kernels.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import commit as checked_out
from benchmarks.common import main, write_result
from fasa_trt.bench.kernels.run import SECTIONS, chosen, run_kernels


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

    def write(result: dict[str, Any]) -> None:
        if output:
            write_result(output, result)

    run_kernels(chosen(only), quick=quick, commit=commit or checked_out(), write=write)


if __name__ == "__main__":
    main(kernels)

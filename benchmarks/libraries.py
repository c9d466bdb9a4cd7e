"""Builds of the kernel library against each other on one GPU: does a change pay?

python -m benchmarks.libraries before.so after.so --points 32768x1,131072x8 --labels int4,prefix
"""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.common import main, run_facts, write_result
from fasa_trt.bench import e2e
from fasa_trt.bench.kernels import dense
from fasa_trt.bench.kernels.cache import DEVICE, DTYPE, Paged, fitting
from fasa_trt.bench.kernels.fasa import Variant, decode_calls
from fasa_trt.bench.kernels.timing import Calls, median, replay_us
from fasa_trt.bench.linears import Choice, fastest_linears
from fasa_trt.bench.record import require_gpu
from fasa_trt.bench.shapes import config_of
from fasa_trt.bench.weights import Weights, random_weights
from fasa_trt.core.errors import FasaError
from fasa_trt.core.labels import LABEL_KINDS
from fasa_trt.core.spec import SparseSpec
from fasa_trt.plugins import library as builds
from fasa_trt.plugins.torch import ops

REPEATS = 20  # replays of a graph, each time that a library has its turn
KINDS = (*LABEL_KINDS, "dense")
Turns = dict[str, list[float]]


@contextmanager
def loaded(library: Path) -> Iterator[None]:
    """The operators call that library, whatever they would build or find. Raises FasaError when it is none."""
    try:
        kernels = ctypes.CDLL(str(library.resolve()))
    except OSError as error:
        raise FasaError(f"cannot load {library}: {error}", hint="name libraries of fasa-trt plugin build") from None
    usual = builds.load
    builds.load = lambda architecture, head_dims=(): kernels
    ops.library.cache_clear()
    try:
        yield
    finally:
        builds.load = usual
        ops.library.cache_clear()


def libraries(
    files: Annotated[list[Path], typer.Argument(help="Libraries for head_dim 128; the first is compared with.")],
    points: Annotated[str, typer.Option(help="CONTEXTxBATCH, separated by commas.")] = "32768x1,32768x8,131072x8",
    labels: Annotated[str, typer.Option(help=f"Some of {','.join(KINDS)}; dense is dense decode.")] = "int4,prefix",
    reduction: Annotated[str, typer.Option(help="How query heads share a token set.")] = SparseSpec.reduction,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every library.")] = 3,
    whole_steps: Annotated[bool, typer.Option("--whole-steps", help="Steps of a Llama-3.1-8B shape, too.")] = False,
    output: Annotated[Path | None, typer.Option(help="Result file.")] = None,
) -> None:
    """Time builds of the kernel library in turns, over the same caches: figures of different runs do not compare.

    Microseconds of a decode step's attention, medians of CUDA-graph replays, the best turn of each library, and how far
    its results are from the first one's. Whole steps are in milliseconds, with this project's dense attention.

    Example: python -m benchmarks.libraries before.so after.so --labels int4 --whole-steps
    """
    shapes, kinds = parsed(points), labels.split(",")
    if set(kinds) - set(KINDS):
        raise FasaError(f"no such labels: {sorted(set(kinds) - set(KINDS))}", hint=f"some of {','.join(KINDS)}")
    require_gpu()
    record: dict[str, Any] = {**run_facts(), "gpu": torch.cuda.get_device_name(), "libraries": list(map(str, files))}
    record["rows"] = []
    for context, batch in shapes:
        paged = fitting(context, batch)
        for kind in kinds if paged else ():
            assert paged is not None
            turns, errors = compared(files, calls_of(paged, kind, reduction), rounds)
            record["rows"].append(reported(context, batch, kind, turns, errors))
        del paged
    if whole_steps:
        weights = random_weights(config_of("llama-3.1-8b"), device=torch.device(DEVICE), dtype=DTYPE)
        linears = {batch: fastest_linears(weights, batch, REPEATS // 2) for batch in {batch for _, batch in shapes}}
        for context, batch in shapes:
            for kind, turns in steps(files, weights, linears[batch], context, batch, rounds).items():
                record["rows"].append(reported(context, batch, kind, turns, []))
    if output:
        write_result(output, record)


def parsed(points: str) -> list[tuple[int, int]]:
    """Raises FasaError for anything but CONTEXTxBATCH."""
    try:
        return [(int(context), int(batch)) for context, batch in (point.split("x") for point in points.split(","))]
    except ValueError:
        raise FasaError(f"points are not {points!r}", hint="CONTEXTxBATCH, such as 32768x1,131072x8") from None


def calls_of(paged: Paged, kind: str, reduction: str) -> Calls:
    if kind == "dense":
        return dense.calls_of(dense.fasa_dense, paged)
    return decode_calls(paged, Variant(kind, 16 if kind == "prefix" else 32, reduction))


def compared(files: list[Path], calls: Calls, rounds: int) -> tuple[Turns, list[float]]:
    """Microseconds by library, one for each of its turns; largest differences from the first library's results."""
    turns: Turns = {str(file): [] for file in files}
    results = []
    for file in files:
        with loaded(file):
            results.append(torch.stack([call().float() for call in calls[:4]]))
    for _ in range(rounds):
        for file in files:
            with loaded(file):
                turns[str(file)].append(round(median(replay_us(calls, REPEATS)), 3))
    return turns, [float((result - results[0]).abs().max()) for result in results]


def steps(
    files: list[Path], weights: Weights, linears: Choice, context: int, batch: int, rounds: int
) -> dict[str, Turns]:
    """Milliseconds of whole steps, dense and with FASA, by library. linears: for this batch size."""
    spec = SparseSpec().resolve(
        head_dim=weights.head_dim, num_layers=len(weights.layers), max_seq_len=context, quantised=True
    )
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] - e2e.SPARE
    buffers = e2e.buffers_of(weights, context, batch, spec, free)
    if not buffers:
        raise FasaError(f"no memory for whole steps at {context} x {batch}", hint="a smaller context or batch")
    found: dict[str, Turns] = {kind: {str(file): [] for file in files} for kind in ("dense step", "step")}
    kernels = {"fasa dense": dense.fasa_dense}
    for _ in range(rounds):
        for file in files:
            with loaded(file):
                row = e2e.measure(weights, context, batch, buffers, spec, kernels, linears, REPEATS)
            found["dense step"][str(file)].append(row["dense_ms"])
            found["step"][str(file)].append(row["fasa_ms"])
    return found


def reported(context: int, batch: int, kind: str, turns: Turns, errors: list[float]) -> dict[str, Any]:
    """The row of a comparison, after printing it."""
    best = {name: min(samples) for name, samples in turns.items()}
    first = next(iter(best.values()))
    shown = ", ".join(
        f"{Path(name).name} {value:.2f} ({value / first - 1:+.1%}, +-{statistics.pstdev(turns[name]):.2f})"
        for name, value in best.items()
    )
    print(f"{context:7d} x {batch:3d} {kind:>10}: {shown}", flush=True)
    return {"context": context, "batch": batch, "kind": kind, "best": best, "turns": turns, "off_by": errors}


if __name__ == "__main__":
    main(libraries)

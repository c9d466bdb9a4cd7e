"""How fast the memory serves pieces of rows: what bounds the score pass over key prefixes, apart from that pass.

python -m benchmarks.pieces --output benchmarks/results/h200/pieces.json
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.common import main, write_result
from fasa_trt.bench.kernels.timing import Calls, median, replay_us
from fasa_trt.bench.record import new_record, require_gpu
from fasa_trt.core.errors import FasaError
from fasa_trt.plugins.library import SUFFIX
from fasa_trt.plugins.toolchain import WINDOWS, find_nvcc, run_nvcc

SOURCE = Path(__file__).with_suffix(".cu")
# Of a pool for one layer: blocks of 64 tokens, keys and then values of 8 heads, 256 bytes a row. A unit: 8 rows.
HEADS, OCTETS, ROW = 8, 8, 256
UNITS_IN_A_BLOCK = 2 * HEADS * OCTETS
SEQUENCES, BLOCKS = 8, 2048  # a sequence: 128k tokens
WARPS = 8  # a block of threads
NONE = -1
Order = Callable[[Tensor, int, int], Tensor]


def keys_of(table: Tensor) -> Tensor:
    """int32 [sequences, blocks, heads, octets]: units of the keys of the blocks in `table`, [sequences, blocks]."""
    within = torch.arange(HEADS * OCTETS, dtype=torch.int32, device=table.device).view(HEADS, OCTETS)
    return (table.int() * UNITS_IN_A_BLOCK)[:, :, None, None] + within


def padded(units: Tensor, multiple: int) -> Tensor:
    """With NONE at the end of the last dim, so that it is a multiple of that."""
    return torch.nn.functional.pad(units, (0, -units.shape[-1] % multiple), value=NONE)


def dealt(streams: Tensor, depth: int) -> Tensor:
    """[blocks of threads, units] in the order of time -> [steps, blocks of threads, warps, depth], NONE at the end."""
    steps = padded(streams, WARPS * depth).view(len(streams), -1, WARPS, depth)
    return steps.transpose(0, 1).contiguous()


def in_parts(streams: Tensor, parts: int, together: int) -> Tensor:
    """[rows, units] -> [rows * parts, units of a part], NONE at the end. together: so many units are not cut apart."""
    return padded(streams, parts * together).view(len(streams) * parts, -1)


def head_by_head(keys: Tensor, threads: int, depth: int) -> Tensor:
    """As the score pass does: a block of threads has a part of one head of a sequence."""
    rows = keys.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    return dealt(in_parts(rows, threads // len(rows), OCTETS), depth)


def all_heads(keys: Tensor, threads: int, depth: int) -> Tensor:
    """A block of threads has a part of a sequence, and reads a block of the cache with each step or two."""
    rows = keys.flatten(1)
    return dealt(in_parts(rows, threads // len(rows), HEADS * OCTETS), depth)


def all_heads_by_address(keys: Tensor, threads: int, depth: int) -> Tensor:
    """The same, but neighbours are read by the warps at the same time, not by one warp one after the other."""
    return by_address(all_heads(keys, threads, depth))


def everybody(keys: Tensor, threads: int, depth: int) -> Tensor:
    """All blocks of threads are at neighbouring blocks of one sequence at the same time."""
    return padded(keys.flatten(), threads * WARPS * depth).view(-1, threads, WARPS, depth)


def everybody_by_address(keys: Tensor, threads: int, depth: int) -> Tensor:
    return by_address(everybody(keys, threads, depth))


def anyhow(keys: Tensor, threads: int, depth: int) -> Tensor:
    """Units at random."""
    return everybody(shuffled(keys.flatten()), threads, depth)


def shuffled(some: Tensor) -> Tensor:
    generator = torch.Generator(some.device).manual_seed(0)
    return some[torch.randperm(len(some), generator=generator, device=some.device)]


def by_address(steps: Tensor) -> Tensor:
    """Deals the units of each step to the warps one by one."""
    return steps.transpose(2, 3).contiguous().view(steps.shape)


ORDERS: tuple[Order, ...] = (
    head_by_head, all_heads, all_heads_by_address, everybody, everybody_by_address, anyhow,
)  # fmt: skip
# Bytes of a row, blocks of threads a multiprocessor, units that a warp has on their way.
SHAPES = (
    (64, 2, 8), (64, 2, 4), (64, 1, 8), (64, 1, 4), (64, 2, 16), (64, 4, 8), (32, 2, 8), (128, 2, 4), (256, 2, 2),
)  # fmt: skip


def compiled(folder: Path) -> ctypes.CDLL:
    """The kernel, for the GPU that is here. Raises FasaError when it cannot be compiled."""
    target = folder / f"pieces{SUFFIX}"
    options = ["-O3", "-std=c++17", "-shared", "-arch=native", *([] if WINDOWS else ["-Xcompiler", "-fPIC"])]
    run_nvcc(find_nvcc(), SOURCE.name, *options, SOURCE, "-o", target)
    return ctypes.CDLL(str(target))


def read(kernel: ctypes.CDLL, pool: Tensor, units: Tensor, row_bytes: int) -> None:
    steps, threads, _, depth = units.shape
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (pool, units)]
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    status = kernel.read_pieces_of(*pointers, steps, row_bytes, depth, threads, stream)
    if status:
        raise FasaError(f"the kernel does not start: CUDA error {status}")


def measured(kernel: ctypes.CDLL, repeats: int) -> Iterator[dict[str, Any]]:
    """A row for each order and shape, of 32k and of 128k tokens of 8 sequences, whose blocks are shuffled or not."""
    device = torch.device("cuda")
    pool = torch.zeros(SEQUENCES * BLOCKS * UNITS_IN_A_BLOCK, 8, ROW, dtype=torch.uint8, device=device)
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    numbers = torch.arange(SEQUENCES * BLOCKS, device=device)
    for blocks, is_shuffled, order in product((BLOCKS // 4, BLOCKS), (True, False), ORDERS):
        # Pools that are read in turns, so that the L2 cache has nothing of the next one.
        tables = (shuffled(numbers) if is_shuffled else numbers).view(-1, SEQUENCES, blocks)
        keys = [keys_of(table) for table in tables]
        for row_bytes, together, depth in SHAPES:
            lists = [order(each, together * multiprocessors, depth) for each in keys]
            calls: Calls = [partial(read, kernel, pool, units, row_bytes) for units in lists]
            samples = replay_us(calls, repeats)
            pieces, time = SEQUENCES * blocks * HEADS * OCTETS * 8, median(samples)
            yield {
                "order": order.__name__, "context": 64 * blocks, "batch": SEQUENCES, "shuffled": is_shuffled,
                "row_bytes": row_bytes, "blocks_of_threads": together, "depth": depth, "us": time,
                "pieces_per_ns": round(pieces / time / 1e3, 2), "tb_per_s": round(pieces * row_bytes / time / 1e6, 3),
                "samples": samples,
            }  # fmt: skip


def pieces(
    output: Annotated[Path, typer.Option(help="Result file.")],
    commit: Annotated[str | None, typer.Option(help="Of the sources, where this is not a git checkout.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Replays of each.")] = 10,
) -> None:
    """Time reading the first bytes of every key row of a paged pool, in several orders.

    Microseconds, medians of CUDA-graph replays. Nothing is scored and nothing written: this is the pattern alone.

    Example: python -m benchmarks.pieces --output pieces.json
    """
    require_gpu()
    record = {**new_record("pieces", commit), "rows": []}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows keeps a library that is loaded
        for row in measured(compiled(Path(folder)), repeats):
            record["rows"].append(row)
            print({key: value for key, value in row.items() if key != "samples"}, flush=True)
    write_result(output, record)


if __name__ == "__main__":
    main(pieces)

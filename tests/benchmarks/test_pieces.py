"""In which order pieces are read, and that the kernel that reads them compiles. Needs no GPU."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import pieces
from benchmarks.pieces import HEADS, NONE, OCTETS, ORDERS, SHAPES, SOURCE, UNITS_IN_A_BLOCK, WARPS, Order, keys_of
from fasa_trt.core.errors import FasaError
from fasa_trt.plugins.toolchain import find_nvcc


def test_units_of_keys() -> None:
    keys = keys_of(torch.tensor([[3, 0]]))
    assert keys.shape == (1, 2, HEADS, OCTETS)
    assert keys[0, 0, 2, 5] == 3 * UNITS_IN_A_BLOCK + 2 * OCTETS + 5
    assert sorted(keys[0, 1].flatten().tolist()) == list(range(HEADS * OCTETS)), "values follow"


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.__name__)
@pytest.mark.parametrize(("threads", "depth"), [(132, 8), (264, 4), (264, 16)])
def test_every_unit_is_read_once(order: Order, threads: int, depth: int) -> None:
    keys = keys_of(torch.randperm(8 * 37).view(8, 37))
    steps = order(keys, threads, depth)
    assert steps.shape[1] <= threads and steps.shape[2:] == (WARPS, depth) and steps.is_contiguous()
    read = steps.flatten()[steps.flatten() != NONE]
    assert torch.equal(read.sort().values, keys.flatten().sort().values)


def test_who_reads_what() -> None:
    keys = keys_of(torch.arange(8 * 40).view(8, 40))
    ours = pieces.head_by_head(keys, 128, 8)  # two parts of each head
    assert torch.equal(ours[0, 2, 3], keys[0, 3, 1]), "a warp has a head of a block"
    assert torch.equal(ours[1, 3, 0], keys[0, 20 + 8, 1])
    whole = pieces.all_heads(keys, 16, 8)
    assert torch.equal(whole[2, 1], keys[0, 20 + 2])
    neighbours = pieces.all_heads_by_address(keys, 16, 8)
    assert torch.equal(neighbours[2, 1], keys[0, 20 + 2].flatten().view(8, 8).T)
    assert torch.equal(pieces.everybody(keys, 16, 8)[1, 5], keys.flatten(0, 1)[16 + 5])


def test_the_kernel_compiles(tmp_path: Path) -> None:
    try:
        nvcc = find_nvcc()
    except FasaError as error:
        pytest.skip(str(error))
    command = [str(nvcc), "-std=c++17", "-arch=sm_80", "-cubin", str(SOURCE), "-o", str(tmp_path / "pieces.cubin")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {depth for _, _, depth in SHAPES} <= {2, 4, 8, 16}, "what the kernel was compiled for"

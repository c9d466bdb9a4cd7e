"""Padding, rows and slots of a forward pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fasa_trt.core.errors import FasaError
from fasa_trt.runtime.torch.step import Step, padding_of


def test_a_prefill_with_padding() -> None:
    step = Step(columns=4, past=0, padding=np.array([0, 3]))
    index, row, slot = step.packed
    assert step.padded
    assert index.tolist() == [0, 1, 2, 3, 7]
    assert row.tolist() == [0, 0, 0, 0, 1]
    assert slot.tolist() == [0, 1, 2, 3, 0]
    assert (step.lengths.tolist(), step.new.tolist()) == ([4, 1], [4, 1])


def test_a_chunk_that_is_padding_for_one_row() -> None:
    first, second = (Step(columns=2, past=past, padding=np.array([0, 3])) for past in (0, 2))
    assert (first.lengths.tolist(), first.new.tolist()) == ([2, 0], [2, 0])
    assert (second.lengths.tolist(), second.new.tolist()) == ([4, 1], [2, 1])
    assert second.packed[2].tolist() == [2, 3, 0]


def test_a_decode_step_on_a_device() -> None:
    step = Step(columns=1, past=9, padding=np.array([0, 3]))
    assert not step.padded
    found = step.on(torch.device("cpu"))
    assert step.on(torch.device("cpu")) is found
    assert found.position.tolist() == [9, 6] and found.lengths.tolist() == [10, 7]
    assert found.index.dtype == torch.int64 and found.query_lengths.dtype == found.sequence.dtype == torch.int32


def test_masks() -> None:
    assert padding_of(None, 2, 3).tolist() == [0, 0]
    assert padding_of(torch.tensor([[1, 1, 1], [0, 0, 1]]), 2, 3).tolist() == [0, 2]
    assert padding_of(torch.zeros(1, 3, dtype=torch.bool), 1, 3).tolist() == [3]
    for mask in (torch.tensor([[1, 1, 0]]), torch.tensor([[1, 0, 1]])):
        with pytest.raises(FasaError, match="after the first real one"):
            padding_of(mask, 1, 3)
    with pytest.raises(FasaError, match="must be \\[1, 4\\]"):
        padding_of(torch.ones(1, 3), 1, 4)

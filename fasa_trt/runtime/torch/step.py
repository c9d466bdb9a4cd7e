"""What one forward pass adds to the cache, row by row of the batch, without the padding."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fasa_trt.core.errors import FasaError


@dataclass(frozen=True)
class Step:
    """A forward pass of `columns` tokens a row, after `past` of them. padding: int64 [batch], how many of all columns
    are padding, always the first ones; a row's token in column c has slot c - padding in the cache."""

    columns: int
    past: int
    padding: NDArray[np.int64]

    @property
    def batch(self) -> int:
        return len(self.padding)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """int64 [batch]: cached tokens after this pass."""
        return np.maximum(self.past + self.columns - self.padding, 0)

    @cached_property
    def new(self) -> NDArray[np.int64]:
        """int64 [batch]: tokens that this pass adds."""
        return np.minimum(self.lengths, self.columns)

    @property
    def padded(self) -> bool:
        """Whether this pass has columns of padding."""
        return bool((self.new < self.columns).any())

    @cached_property
    def packed(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Of the N real tokens, row by row, int64 [N] each: index into the flattened [batch * columns], row, slot."""
        row, column = np.nonzero(np.arange(self.columns) >= (self.columns - self.new)[:, None])
        return row * self.columns + column, row, self.past + column - self.padding[row]

    def on(self, device: torch.device) -> DeviceStep:
        """Made once, for all layers."""
        if device not in self._devices:
            self._devices[device] = DeviceStep.of(self, device)
        return self._devices[device]

    @cached_property
    def _devices(self) -> dict[torch.device, DeviceStep]:
        return {}


@dataclass(frozen=True)
class DeviceStep:
    """The arrays of a step as the kernels take them: index int64 [N], all others int32; see `Step.packed`."""

    index: Tensor
    sequence: Tensor
    position: Tensor
    query_lengths: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, step: Step, device: torch.device) -> DeviceStep:
        index, row, slot = step.packed

        def int32(array: NDArray[Any]) -> Tensor:
            return torch.from_numpy(array.astype(np.int32)).to(device)

        return cls(torch.from_numpy(index).to(device), int32(row), int32(slot), int32(step.new), int32(step.lengths))


def padding_of(mask: Tensor | None, batch: int, total: int) -> NDArray[np.int64]:
    """int64 [batch]: leading columns that `mask` [batch, total] rules out; zeros without one.

    Raises FasaError for masks that are not of padding on the left.
    """
    if mask is None:
        return np.zeros(batch, np.int64)
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape != (batch, total):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise FasaError(
            f"attention_mask must be [{batch}, {total}], one column for each cached or new token, not {shape}",
            hint="FASA is causal attention: pass the tokenizer's mask, or none",
        )
    real = mask.cpu().numpy() != 0
    padding = total - real.sum(axis=1, dtype=np.int64)
    if (real != (np.arange(total) >= padding[:, None])).any():
        raise FasaError(
            "attention_mask rules out tokens after the first real one", hint='tokenizer.padding_side = "left"'
        )
    return np.asarray(padding, np.int64)

"""From the logits in GPU memory to tokens: on the GPU with torch where torch has CUDA, else on the host.

The rules are those of `sampling.distribution`, and the only chance is the draw's number, so both give the same tokens
but for rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fasa_trt.core.errors import FasaError
from fasa_trt.runtime.device_memory import Device
from fasa_trt.runtime.sampling import NOT_FINITE, Draw, choose

if TYPE_CHECKING:
    import torch


class Sampler(Protocol):
    name: str

    def __call__(self, rows: NDArray[np.int32], draws: Sequence[Draw]) -> list[int]:
        """A token, or NOT_FINITE, for each of the ascending `rows` of the logits. Waits for the stream."""


class HostSampler:
    """Copies the rows that are asked for to the host."""

    name = "host"

    def __init__(self, device: Device, logits: int, shape: tuple[int, int]) -> None:
        self._device, self._logits = device, logits
        self._host = device.pinned(shape, np.float32)

    def __call__(self, rows: NDArray[np.int32], draws: Sequence[Draw]) -> list[int]:
        for first, count in _runs(rows):
            self._device.download(self._host[first : first + count], self._logits + first * self._host[0].nbytes)
        self._device.synchronize()
        return [choose(self._host[row], draw) for row, draw in zip(rows, draws, strict=True)]


class TorchSampler:
    """Works on the logits where they are; only the tokens come to the host."""

    name = "gpu (torch)"

    def __init__(self, device: Device, logits: int, shape: tuple[int, int]) -> None:
        import torch

        self._device, self._torch = device, torch
        self._stream = torch.cuda.ExternalStream(device.stream)
        self._logits = torch.as_tensor(_CudaArray(logits, shape), device="cuda")

    def __call__(self, rows: NDArray[np.int32], draws: Sequence[Draw]) -> list[int]:
        torch = self._torch
        if not draws:
            self._device.synchronize()
            return []
        try:
            with torch.cuda.stream(self._stream):
                tokens: list[int] = choose_tokens(self._logits[torch.as_tensor(rows, device="cuda")], draws).tolist()
        except RuntimeError as error:  # out of memory, or a fault of a kernel before it
            raise FasaError(f"sampling failed on the GPU: {str(error).splitlines()[0]}") from None
        return tokens


def choose_tokens(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """`sampling.choose` for logits [L, vocab] float32 and L draws, on the logits' device; int64 [L]."""
    import torch

    best = logits.argmax(-1)
    if any(draw.sampling.temperature for draw in draws):
        best = torch.where(
            _column(logits, [d.sampling.temperature for d in draws])[:, 0] > 0, _drawn(logits, draws), best
        )
    finite = torch.isfinite(logits.amax(-1))
    return torch.where(finite, best, torch.full_like(best, NOT_FINITE))


def _drawn(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    import torch

    settings = [draw.sampling for draw in draws]
    vocab = logits.shape[-1]
    temperature = _column(logits, [s.temperature or 1.0 for s in settings])
    top_k = _column(logits, [float(s.top_k or vocab) for s in settings])
    top_p = _column(logits, [s.top_p if s.top_p < 1 else 2.0 for s in settings])  # 2: rounding cuts nothing off
    min_p = _column(logits, [s.min_p for s in settings])
    uniform = _column(logits, [draw.uniform for draw in draws])
    ranked, order = logits.double().sort(dim=-1, descending=True, stable=True)
    weights = ((ranked - ranked[:, :1]) / temperature).exp()
    weights = weights.where(torch.arange(vocab, device=logits.device) < top_k, 0.0)
    weights = weights / weights.sum(-1, keepdim=True)
    weights = weights.where(weights.cumsum(-1).roll(1, -1).index_fill(-1, order.new_zeros(1), 0.0) < top_p, 0.0)
    weights = weights.where(weights >= min_p * weights[:, :1], 0.0)
    below = weights.cumsum(-1)
    at = (below / below[:, -1:] <= uniform).sum(-1, keepdim=True).clamp(max=vocab - 1)
    return order.gather(-1, at)[:, 0]


def _column(logits: torch.Tensor, values: Sequence[float]) -> torch.Tensor:
    import torch

    return torch.tensor(values, dtype=torch.float64).to(logits.device, non_blocking=True)[:, None]


def new_sampler(device: Device, logits: int, shape: tuple[int, int]) -> Sampler:
    """For float32 logits [rows, vocab] at an address in GPU memory."""
    import torch

    return TorchSampler(device, logits, shape) if torch.cuda.is_available() else HostSampler(device, logits, shape)


class _CudaArray:
    """Tells torch of memory that it does not own: https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html"""

    def __init__(self, pointer: int, shape: tuple[int, int]) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": shape,
            "typestr": "<f4",
            "data": (pointer, False),
            "version": 3,
        }


def _runs(rows: NDArray[np.int32]) -> list[tuple[int, int]]:
    """Ascending numbers as (first, count) of neighbours."""
    if not len(rows):
        return []
    parts = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
    return [(int(part[0]), len(part)) for part in parts]

"""Contextual agreement as the paper defines it, in float64, and the devices that are tested."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def by_definition(true_top: NDArray[np.int64], logits: NDArray[np.float64], k: int) -> float:
    """The expected |TopK(a) & TopK(b)| / K where equal logits are ordered at random."""
    k = min(k, len(logits))
    edge = np.sort(logits)[::-1][k - 1]
    above = set(np.flatnonzero(logits > edge).tolist())
    at_edge = set(np.flatnonzero(logits == edge).tolist())
    wanted = set(true_top[:k].tolist())
    return (len(wanted & above) + len(wanted & at_edge) * (k - len(above)) / len(at_edge)) / k

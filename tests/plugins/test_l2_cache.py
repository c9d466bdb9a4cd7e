"""The L2 cache that is set aside for scores. Needs a GPU and nvcc."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch

from fasa_trt.plugins.torch.ops import library
from fasa_trt.runtime.machine import cuda_driver
from tests.plugins.paged import Case, make_case

pytestmark = pytest.mark.gpu
PERSISTING = 6  # CU_LIMIT_PERSISTING_L2_CACHE_SIZE


class Limit:
    """Bytes that are set aside on the current device."""

    def __init__(self) -> None:
        self.driver = cuda_driver()

    def get(self) -> int:
        value = ctypes.c_size_t()
        assert self.driver.cuCtxGetLimit(ctypes.byref(value), PERSISTING) == 0
        return value.value

    def set(self, value: int) -> None:
        torch.cuda.synchronize()
        assert self.driver.cuCtxSetLimit(PERSISTING, ctypes.c_size_t(value)) == 0


@pytest.fixture
def limit() -> Iterator[Limit]:
    torch.zeros(1, device="cuda")
    found = Limit()
    before = found.get()
    yield found
    found.set(before)


def reserve(case: Case) -> int:
    return int(library(case.q.device, case.q.shape[-1]).fasa_reserve_l2())


def test_the_first_use_of_the_library_sets_it_aside() -> None:
    make_case([300]).run()
    assert Limit().get() > 0


def test_it_is_raised_and_never_lowered(limit: Limit) -> None:
    case = make_case([300])
    limit.set(0)
    assert limit.get() == 0
    assert reserve(case) == 0
    raised = limit.get()
    assert 0 < raised <= torch.cuda.get_device_properties(0).L2_cache_size // 2
    limit.set(raised + (4 << 20))
    more = limit.get()
    assert more > raised
    assert reserve(case) == 0
    assert limit.get() == more


@pytest.mark.parametrize("kind", ["int4", "prefix"])
@pytest.mark.parametrize("reduction", ["sum", "mean_softmax"])
def test_results_do_not_depend_on_it(limit: Limit, kind: str, reduction: str) -> None:
    case = make_case([9001, 300, 5000], kind=kind, reduction=reduction, seed=1)
    with_room = case.run()
    limit.set(0)
    assert torch.equal(case.run(), with_room)
    limit.set(1 << 20)  # for a part of the scores
    assert torch.equal(case.run(), with_room)

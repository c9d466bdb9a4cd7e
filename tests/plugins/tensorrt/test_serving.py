"""Steps of in-flight batching against the reference: on a GPU with the kernels, elsewhere with loops in their place."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import plugin_driver
from tests.plugins.tensorrt.cases import CASES, DTYPES, MIXES, start
from tests.plugins.tensorrt.conftest import require_compiler
from tests.plugins.tensorrt.driver import Driver, compile_driver


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def player(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The driver's code. One set of headers will do: `test_plugin.py` tells whether the other is the same."""
    require_compiler()
    return compile_driver(tmp_path_factory.mktemp("player"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors are small: threads would wait for each other more than they would compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def library_for(request: pytest.FixtureRequest, device: str) -> Path:
    if device == "cpu":
        found: Path = request.getfixturevalue("cpu_library")
        return found
    return plugin_driver.build()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_case(request: pytest.FixtureRequest, player: ctypes.CDLL, device: str, case: str, dtype: str) -> None:
    facts = CASES[case](Driver(player, library_for(request, device)), DTYPES[dtype], device)
    assert facts["worst"] <= 1
    assert facts["choices"] or case == "fasa-tiny, dense"


SPOIL = {
    "keys": ("not rotated", (0, 0)),
    "values": ("not cached as they came", (1, 0)),
    "labels": ("labels are not those of the keys", (0, -1)),
    "scales": ("scales are not those of the keys", (1, -1)),
    "an old value": ("has changed", None),
    "output": ("off by", None),
}


@pytest.mark.parametrize("what", SPOIL)
def test_what_is_wrong_is_found(player: ctypes.CDLL, cpu_library: Path, what: str) -> None:
    """After a step, before its check."""
    message, place = SPOIL[what]
    serving, inputs = start(Driver(player, cpu_library), MIXES["int4"], torch.bfloat16, "cpu")
    serving.attend(serving.step({"a": 20}, ""), 0, inputs[0].qkv(20))
    step, qkv = serving.step({"b": 9}, "a"), inputs[0].qkv(10)
    call = serving.call(step, 0, qkv, ())
    call.launch()
    if place is not None:
        kind, head = place
        serving.pools.data[0][:, :, kind, head] += 1
    elif what == "output":
        call.out[3, 1, 7] += 0.1
    else:
        block = serving.pools.sequences["a"].blocks[0][0]
        serving.pools.data[0][block, 0, 1, 1, 3] += 1
    with pytest.raises(AssertionError, match=message):
        serving.check(step, 0, call, qkv, ())

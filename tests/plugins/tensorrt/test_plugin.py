"""What a builder asks of the plugin, without a GPU: of the real library, and of the plugin over stand-in kernels."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.plugins.tensorrt.driver import (
    BF16,
    BUILD,
    FIELD_FLOAT,
    FIELD_INT32,
    FIELD_INT64,
    FLOAT,
    HALF,
    INT32,
    RUNTIME,
    Driver,
    Layer,
    Plugin,
    Tensors,
)
from tests.plugins.tensorrt.layers import DENSE, SPARSE, tensors

LAYERS: dict[str, Layer] = {
    "sparse": SPARSE,
    "dense": DENSE,
    "normed": {**SPARSE, "has_qk_norm": 1},
    "labels": {**SPARSE, "label_kind": 1},
    "softmax": {**SPARSE, "reduction": 3},
}


@pytest.fixture(params=["plugin_library", "stub_library"])
def either(request: pytest.FixtureRequest, driver_code: ctypes.CDLL) -> Driver:
    return Driver(driver_code, request.getfixturevalue(request.param))


def created(driver: Driver, values: Layer, phase: int = BUILD) -> Plugin:
    plugin = driver.create(values, phase)
    assert plugin is not None
    return plugin


def test_the_creator_tells_what_it_makes(either: Driver) -> None:
    assert either.count == 1
    assert either.creator_texts() == ["FasaAttention", "1", "ai.fasa", "PLUGIN CREATOR_V3ONE"]
    expected = {name: FIELD_FLOAT if isinstance(value, float) else FIELD_INT32 for name, value in SPARSE.items()}
    assert either.field_types() == expected


@pytest.mark.parametrize("layer", LAYERS)
def test_a_plugin_answers_all_that_a_builder_asks(either: Driver, layer: str) -> None:
    plugin, of = created(either, LAYERS[layer]), tensors(LAYERS[layer])
    names = ["PLUGIN", "PLUGIN_V3ONE_CORE", "PLUGIN_V3ONE_BUILD", "PLUGIN_V3ONE_RUNTIME"]
    assert plugin.texts() == ["FasaAttention", "1", "ai.fasa", *names]
    assert either.library.num_outputs(plugin.pointer) == 1
    assert plugin.output_type([HALF, HALF]) == HALF
    assert plugin.output_type([BF16, BF16]) == BF16
    assert plugin.output_is_like_q(of.inputs)
    assert plugin.call("configure", of) == 0
    assert plugin.call("workspace", of) >= 600 * 8 * 128 * 2
    assert plugin.call("change_shapes", tensors(LAYERS[layer], tokens=9, seqs=3, pools=1, max_blocks=7)) == 0


@pytest.mark.parametrize("layer", LAYERS)
def test_fields_survive_a_plan(either: Driver, layer: str) -> None:
    """Also in a clone and in one attached to a context, after the first is gone."""
    plugin = created(either, LAYERS[layer])
    assert plugin.values() == pytest.approx(LAYERS[layer])
    clone = plugin.clone()
    del plugin
    attached = clone.attach()
    del clone
    assert attached.values() == pytest.approx(LAYERS[layer])
    again = either.create_from(attached.serialised(), RUNTIME)
    assert again is not None
    assert again.values() == pytest.approx(LAYERS[layer])
    of = tensors(LAYERS[layer])
    assert again.call("workspace", of) == attached.call("workspace", of)


@pytest.mark.parametrize("layer", ["sparse", "normed"])
@pytest.mark.parametrize("dtype", [HALF, BF16])
def test_formats(either: Driver, layer: str, dtype: int) -> None:
    plugin, of = created(either, LAYERS[layer]), tensors(LAYERS[layer], dtype=dtype)
    for position in range(of.inputs + 1):
        assert plugin.supports(position, of)
        assert not plugin.supports(position, of, layout=1)
        for other in {FLOAT, HALF, INT32, BF16} - {of.types[position]} - ({HALF, BF16} if position == 0 else set()):
            types = [*of.types[:position], other, *of.types[position + 1 :]]
            assert not plugin.supports(position, Tensors(of.shapes, types))


def test_optional_and_wide_attributes(either: Driver) -> None:
    optional = ("label_kind", "reduction", "window", "dense_below", "has_qk_norm", "softcap", "norm_eps")
    values: dict[str, Any] = {name: value for name, value in SPARSE.items() if name not in optional}
    values["budget"] = (64, FIELD_INT64)
    found = created(either, values).values()
    assert found == pytest.approx({**SPARSE, "dense_below": -1, "norm_eps": 1e-6})


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"scale": None}, "scale is missing"),
    "unknown": ({"butget": 3}, "unknown attribute butget"),
    "type": ({"budget": 64.0}, "budget must be an integer"),
    "float type": ({"scale": 1}, "scale must be a float32"),
    "range": ({"tokens_per_block": 256}, "tokens_per_block is 256, not in 8..128"),
    "wide": ({"budget": (1 << 40, FIELD_INT64)}, "budget is 1099511627776, not in"),
    "power of two": ({"tokens_per_block": 24}, "tokens_per_block must be a power of two"),
    "head_dim": ({"head_dim": 80}, "no kernels for head_dim 80"),
    "group": ({"num_q_heads": 7}, "num_q_heads must be 1 to 16 times num_kv_heads"),
    "label_kind": ({"label_kind": 4}, "label_kind is 4, not in 0..3"),
    "labels": ({"label_kind": 2, "n_tip": 64, "num_kv_heads": 4}, "must fit into a row of the pool: 512 bytes"),
    "labels of a dense layer": ({"label_kind": 1, "n_tip": 0}, "a dense layer has no labels"),
    "n_tip": ({"n_tip": 12}, "n_tip must be 8, 16, 24, 32, 48 or 64"),
    "n_tip 40": ({"n_tip": 40}, "n_tip must be 8, 16, 24, 32, 48 or 64"),
    "window": ({"window": 100}, "a layer with a window must be dense"),
    "budget": ({"budget": 8}, "budget must be 16 to 4096"),
    "recent": ({"recent": 0}, "recent at least 1"),
    "forced": ({"sink": 60}, "sink + recent within the budget"),
    "nan": ({"scale": float("nan")}, "scale must be a finite number"),
    "tokens": ({"max_num_tokens": 1 << 23}, "must stay below 2^32"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_attributes_are_refused_in_one_line(either: Driver, capfd: pytest.CaptureFixture[str], case: str) -> None:
    changes, message = WRONG[case]
    values = {name: value for name, value in {**SPARSE, **changes}.items() if value is not None}
    assert either.create(values) is None
    error = capfd.readouterr().err
    assert error.startswith("[fasa] FasaAttention: cannot create layer: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("position", [0, 1, 3, 7, 10, 11, 12])
def test_shapes_that_do_not_fit_are_refused(either: Driver, capfd: pytest.CaptureFixture[str], position: int) -> None:
    plugin, of = created(either, SPARSE), tensors(SPARSE, tokens=9, seqs=3, pools=1, max_blocks=7)
    shapes = [tuple(shape) for shape in of.shapes]
    shapes[position] = (*shapes[position][:-1], shapes[position][-1] + 1, *[1] * (position == 10))
    assert plugin.call("configure", Tensors(shapes, of.types)) != 0
    assert f"input {position} has a shape" in capfd.readouterr().err
    assert plugin.call("configure", tensors({**SPARSE, "has_qk_norm": 1})) != 0
    assert "takes 13 inputs and 1 output, not 15 and 1" in capfd.readouterr().err


def test_workspace_grows_with_the_limits(driver: Driver) -> None:
    of = tensors(SPARSE)

    def size(**changes: int) -> int:
        return created(driver, {**SPARSE, **changes}).call("workspace", of)

    assert size(max_seq_len=100_000) > size(max_seq_len=10_000) > size()
    assert size(max_num_tokens=6000) > size()
    assert size(max_batch_size=256, max_seq_len=100_000) > 10 * size(max_seq_len=100_000)
    assert size(reduction=2) > size(reduction=0)


def test_building_runs_nothing(either: Driver) -> None:
    """A builder that times the layer binds no host tensors that could be read."""
    of = tensors(SPARSE, tokens=9, seqs=3, pools=1, max_blocks=7)
    assert created(either, SPARSE, BUILD).attach().enqueue(of, [0] * 13, 0, 0) == 0


def test_the_library_needs_neither_cuda_nor_tensorrt(plugin_library: Path) -> None:
    """It loads in a process of its own, with all symbols resolved."""
    code = f"import ctypes, os; ctypes.CDLL({str(plugin_library)!r}, mode=os.RTLD_NOW).getCreators"
    subprocess.run([sys.executable, "-c", code], check=True)
    listed = subprocess.run(["ldd", plugin_library], capture_output=True, text=True, check=True).stdout
    assert "not found" not in listed
    assert "cudart" not in listed
    assert "nvinfer" not in listed

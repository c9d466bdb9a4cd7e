"""Reading what any writer may have written, and refusing what no writer should have."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save_file

from fasa_trt.core.errors import FasaError
from fasa_trt.core.safetensors_file import stored_tensors

WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "F8_E4M3": 1}
Stored = dict[str, tuple[str, tuple[int, ...], bytes]]
in_place = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)


def encode(tensors: Stored, *, metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file by the letter of the format."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    at = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    return framed(json.dumps(header).encode()) + b"".join(data for *_, data in tensors.values())


def framed(header: bytes) -> bytes:
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


@st.composite
def stored(draw: st.DrawFn, dtypes: tuple[str, ...] = ("F64", "F32", "F16", "BF16")) -> Stored:
    result: Stored = {}
    for name in draw(st.lists(st.text(min_size=1, max_size=8), max_size=4, unique=True)):
        dtype = draw(st.sampled_from(dtypes))
        shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
        size = WIDTHS[dtype] * math.prod(shape)
        result[name] = dtype, shape, draw(st.binary(min_size=size, max_size=size))
    result.pop("__metadata__", None)
    return result


@in_place
@given(stored(), st.none() | st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2))
def test_every_bit_arrives(tmp_path: Path, tensors: Stored, metadata: dict[str, str] | None) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(encode(tensors, metadata=metadata))
    found = {tensor.name: tensor for tensor in stored_tensors(file)}
    assert found.keys() == tensors.keys()
    for name, (dtype, shape, data) in tensors.items():
        tensor = found[name]
        assert (tensor.dtype, tensor.shape, tensor.nbytes) == (dtype, shape, len(data))
        array = tensor.read()
        assert array.shape == shape and array.tobytes() == data


@in_place
@given(stored(), st.integers(1, 6).map(lambda n: 8 * n))
def test_pieces_make_up_the_whole(tmp_path: Path, tensors: Stored, size: int) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(encode(tensors))
    for tensor in stored_tensors(file):
        pieces = [piece.copy() for piece in tensor.pieces(size)]
        assert all(piece.ndim == 1 and piece.nbytes <= size for piece in pieces)
        assert len(pieces) == max(1, -(-tensor.nbytes // size))
        assert b"".join(piece.tobytes() for piece in pieces) == tensor.read().tobytes()


@pytest.mark.parametrize(
    ("dtype", "numpy_dtype"),
    [("F64", np.float64), ("F32", np.float32), ("F16", np.float16), ("BF16", ml_dtypes.bfloat16)],
)
def test_values_that_the_library_wrote(dtype: str, numpy_dtype: Any, tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(size=(3, 5)).astype(numpy_dtype)
    save_file({"a": array, "b": array.T.copy()}, tmp_path / "model.safetensors")
    found = {tensor.name: tensor for tensor in stored_tensors(tmp_path / "model.safetensors")}
    assert found["a"].dtype == dtype
    got: NDArray[Any] = found["a"].read()
    assert got.dtype == numpy_dtype
    np.testing.assert_array_equal(got.astype(np.float64), array.astype(np.float64))
    np.testing.assert_array_equal(found["b"].read().astype(np.float64), array.T.astype(np.float64))


def test_bfloat16_values(tmp_path: Path) -> None:
    """0x3F80 is 1, 0xC020 is -2.5, 0x7F80 is infinity; little-endian."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(encode({"x": ("BF16", (3,), bytes.fromhex("803f20c0807f"))}))
    (tensor,) = stored_tensors(file)
    assert tensor.read().astype(np.float32).tolist() == [1.0, -2.5, math.inf]


def test_what_is_read_may_be_written_to(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(encode({"x": ("F32", (2,), bytes(8))}))
    (tensor,) = stored_tensors(file)
    tensor.read()[0] = 1
    assert tensor.read().tolist() == [0, 0]


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I64"])
def test_quantised_tensor(dtype: str, tmp_path: Path) -> None:
    """It is listed, since nothing may need it, and refused when it is read."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(encode({"w": (dtype, (4,), bytes(4 * WIDTHS[dtype]))}))
    (tensor,) = stored_tensors(file)
    assert (tensor.dtype, tensor.shape, tensor.nbytes) == (dtype, (4,), 4 * WIDTHS[dtype])
    with pytest.raises(FasaError, match=f"tensor w of model.safetensors is stored as {dtype} .*quantised"):
        tensor.read()


def refuse(file: Path) -> str:
    with pytest.raises(FasaError) as caught:
        list(stored_tensors(file))
    message = str(caught.value)
    assert str(file) in message and "download it again" in message and "\n" not in message
    return message


GOOD = encode({"a": ("F32", (2, 3), bytes(24)), "b": ("F16", (5,), bytes(10))})


@in_place
@given(st.integers(0, len(GOOD) - 1))
def test_truncated_anywhere(tmp_path: Path, size: int) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(GOOD[:size])
    refuse(file)


@in_place
@given(st.binary(max_size=200))
def test_garbage(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(data)
    refuse(file)


def entry(**changes: Any) -> bytes:
    return json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        GOOD + b"more",
        (1 << 62).to_bytes(8, "little") + b"{}",
        framed(b"not json"),
        framed(b"[]"),
        framed(b'{"x": 1}') + bytes(8),
        framed(entry(data_offsets=[0, 1 << 40])) + bytes(8),
        framed(entry(data_offsets=[8, 0])) + bytes(8),
        framed(entry(data_offsets=[-8, 0])) + bytes(8),
        framed(entry(data_offsets=[4, 12])) + bytes(12),
        framed(entry(shape=[3])) + bytes(8),
        framed(entry(shape=[-2])) + bytes(8),
        framed(entry(shape=[1 << 62, 1 << 62])) + bytes(8),
        framed(entry(dtype="F31")) + bytes(8),
        framed(entry(dtype="F64")) + bytes(8),
    ],
)
def test_header_that_lies(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(data)
    refuse(file)


def test_overlapping_tensors(tmp_path: Path) -> None:
    one = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    file = tmp_path / "model.safetensors"
    file.write_bytes(framed(json.dumps({"x": one, "y": one}).encode()) + bytes(8))
    refuse(file)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    refuse(tmp_path / "nowhere.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    refuse(tmp_path / "folder.safetensors")


def test_file_that_shrinks_or_goes_after_it_was_opened(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(GOOD)
    tensors = list(stored_tensors(file))
    file.write_bytes(GOOD[:-1])
    assert tensors[0].read().shape == (2, 3)
    with pytest.raises(FasaError, match="model.safetensors ends inside tensor b .*download"):
        tensors[1].read()
    file.unlink()
    with pytest.raises(FasaError, match="cannot read .*model.safetensors"):
        tensors[0].read()

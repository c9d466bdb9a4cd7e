"""Plays TensorRT for the plugin library, through `driver.cpp`."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasa_trt.core.errors import FasaError
from fasa_trt.plugins.library import TENSORRT
from fasa_trt.plugins.toolchain import TOOLKIT, find_nvcc

HERE = Path(__file__).resolve().parent
COMPILER = shutil.which("c++") or shutil.which("g++")
BUILD, RUNTIME = 0, 1  # nvinfer1::TensorRTPhase
FLOAT, HALF, INT32, BF16, INT64 = 0, 1, 3, 7, 8  # nvinfer1::DataType
FIELD_FLOAT, FIELD_INT32, FIELD_INT64 = 1, 5, 10  # nvinfer1::PluginFieldType


class Field(Structure):
    _fields_ = (("name", c_char_p), ("data", c_void_p), ("type", c_int32), ("length", c_int32))


class Fields(Structure):
    _fields_ = (("count", c_int32), ("fields", POINTER(Field)))


Layer = Mapping[str, Any]  # attributes: int, float, or (value, PluginFieldType)


def cuda_include() -> Path | None:
    """The folder of CUDA's headers; None where there is none."""
    try:
        roots = [find_nvcc().resolve().parent.parent, TOOLKIT]
    except FasaError:
        roots = [TOOLKIT]
    return next((root / "include" for root in roots if (root / "include" / "cuda_runtime_api.h").is_file()), None)


def compile_shared(target: Path, sources: Sequence[Path], *options: str) -> Path:
    """A shared library, compiled by the host's compiler; of our own sources any warning is an error."""
    command = [
        str(COMPILER), "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror",
        f"-I{TENSORRT}", "-isystem", str(cuda_include()), *options, *map(str, sources), "-o", str(target), "-ldl",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def compile_cpu_library(folder: Path) -> Path:
    """The plugin over kernels that are loops of the host."""
    sources = [HERE / "kernels_on_cpu.cpp", *sorted(TENSORRT.glob("*.cpp"))]
    return compile_shared(folder / "plugin.so", sources, "-O2", "-DFASA_HAS_64=1", "-DFASA_HAS_128=1")


def compile_driver(folder: Path, headers: Path | None = None, *options: str) -> ctypes.CDLL:
    """The driver, against the headers of TensorRT in a folder, else against ours."""
    official = ["-DFASA_TENSORRT_HEADERS=1", "-isystem", str(headers)] if headers else []
    target = compile_shared(
        folder / f"driver{bool(headers)}.so", [HERE / "driver.cpp"], "-fvisibility=default", *official, *options
    )
    library = ctypes.CDLL(str(target))
    pointers = ("load", "create", "clone", "attach")
    for name in pointers:
        getattr(library, name).restype = c_void_p
    for name in ("creator_text", "plugin_text"):
        getattr(library, name).restype = c_char_p
    for name in ("field_names", "serialised"):
        getattr(library, name).restype = POINTER(Fields)
    for name in ("supports", "output_is_like_q"):
        getattr(library, name).restype = ctypes.c_bool
    library.workspace.restype = ctypes.c_size_t
    return library


@dataclass(frozen=True)
class Tensors:
    """Shapes and types of a plugin's inputs and, last, its output."""

    shapes: Sequence[Sequence[int]]
    types: Sequence[int]

    @property
    def inputs(self) -> int:
        return len(self.shapes) - 1

    def arguments(self) -> tuple[object, ...]:
        numbers = [number for shape in self.shapes for number in (len(shape), *shape, *[0] * (8 - len(shape)))]
        return c_int32(self.inputs), (c_int64 * len(numbers))(*numbers), (c_int32 * len(self.types))(*self.types)


class Plugin:
    """A plugin object; destroyed with the Python object."""

    def __init__(self, library: ctypes.CDLL, pointer: int) -> None:
        self.library, self.pointer = library, c_void_p(pointer)

    def __del__(self) -> None:
        self.library.destroy(self.pointer)

    def texts(self) -> list[str]:
        return [self.library.plugin_text(self.pointer, what).decode() for what in range(7)]

    def clone(self) -> Plugin:
        return Plugin(self.library, self.library.clone(self.pointer))

    def attach(self) -> Plugin:
        return Plugin(self.library, self.library.attach(self.pointer))

    def serialised(self) -> Fields:
        found: Fields = self.library.serialised(self.pointer).contents
        return found

    def values(self) -> dict[str, int | float]:
        """What the serialised fields hold."""
        kinds: dict[int, Any] = {FIELD_FLOAT: c_float, FIELD_INT32: c_int32}
        fields = self.serialised()
        found = (fields.fields[i] for i in range(fields.count))
        return {field.name.decode(): ctypes.cast(field.data, POINTER(kinds[field.type]))[0] for field in found}

    def supports(self, position: int, tensors: Tensors, layout: int = 0) -> bool:
        return bool(self.library.supports(self.pointer, c_int32(position), *tensors.arguments(), c_int32(layout)))

    def call(self, name: str, tensors: Tensors) -> int:
        """configure, change_shapes: 0 for success; workspace: bytes."""
        return int(getattr(self.library, name)(self.pointer, *tensors.arguments()))

    def output_type(self, types: Sequence[int]) -> int:
        return int(self.library.output_type(self.pointer, (c_int32 * len(types))(*types), len(types)))

    def output_is_like_q(self, inputs: int) -> bool:
        return bool(self.library.output_is_like_q(self.pointer, inputs))

    def enqueue(
        self, tensors: Tensors, pointers: Sequence[int], out: int, workspace: int, stream: int | None = None
    ) -> int:
        array = (c_void_p * len(pointers))(*pointers)
        return int(
            self.library.enqueue(
                self.pointer, *tensors.arguments(), array, c_void_p(out), c_void_p(workspace), c_void_p(stream)
            )
        )


class Driver:
    """A plugin library as TensorRT sees it."""

    def __init__(self, library: ctypes.CDLL, plugin_library: Path) -> None:
        self.library, self.path = library, plugin_library
        count = c_int32()
        found = library.load(str(plugin_library).encode(), ctypes.byref(count))
        assert found, f"cannot load {plugin_library}"
        self.creators, self.count = c_void_p(found), count.value

    def creator_texts(self) -> list[str]:
        """Name, version, namespace and interface of the first creator."""
        return [self.library.creator_text(self.creators, 0, what).decode() for what in range(4)]

    def field_types(self) -> dict[str, int]:
        found: Fields = self.library.field_names(self.creators, 0).contents
        return {found.fields[i].name.decode(): found.fields[i].type for i in range(found.count)}

    def create(self, values: Layer, phase: int = BUILD) -> Plugin | None:
        """A plugin of these attributes; None where the creator refuses them."""
        keep: list[Any] = []
        fields = (Field * len(values))()
        for field, (name, value) in zip(fields, values.items(), strict=True):
            if isinstance(value, tuple):
                number, kind = value
                data: Any = {FIELD_INT64: c_int64, FIELD_INT32: c_int32, FIELD_FLOAT: c_float}[kind](number)
            else:
                kind = FIELD_FLOAT if isinstance(value, float) else FIELD_INT32
                data = c_float(value) if isinstance(value, float) else c_int32(value)
            keep.append(data)
            field.name, field.type, field.length = name.encode(), kind, 1
            field.data = ctypes.cast(ctypes.pointer(data), c_void_p)
        return self.create_from(Fields(len(values), fields), phase)

    def create_from(self, fields: Fields, phase: int = BUILD) -> Plugin | None:
        pointer = self.library.create(self.creators, 0, ctypes.byref(fields), phase)
        return Plugin(self.library, pointer) if pointer else None

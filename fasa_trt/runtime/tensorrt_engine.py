"""A TensorRT plan of the plugin lowering, checked and loaded: TensorRT and TensorRT for RTX alike."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fasa_trt.core.contract import INPUTS, LOGITS
from fasa_trt.core.engine_dir import EngineDirectory
from fasa_trt.core.errors import FasaError
from fasa_trt.plugins import plugin_library
from fasa_trt.runtime.device_memory import Device
from fasa_trt.runtime.machine import architecture

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}  # of targets
ENGINE_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT32": "int32", "INT64": "int64"}


@dataclass(frozen=True)
class Plan:
    """trt: TensorRT's Python module. engine: its ICudaEngine. log: what it complained of. workspace: GPU memory that
    all contexts share, as address and bytes."""

    trt: Any
    engine: Any
    log: Any
    workspace: tuple[int, int]
    plugin: str

    def new_context(self, addresses: Mapping[str, int]) -> Any:
        """An execution context over the shared memory, with these addresses bound. Raises FasaError."""
        context = self.engine.create_execution_context(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise FasaError(f"TensorRT makes no execution context: {self.log.reason()}")
        context.set_device_memory(*self.workspace)
        for index in range(self.engine.num_io_tensors):
            name = self.engine.get_tensor_name(index)
            if not context.set_tensor_address(name, addresses[name]):
                raise FasaError(f"TensorRT does not take the memory of {name}: {self.log.reason()}")
        return context

    def enqueue(self, context: Any, shapes: Mapping[str, tuple[int, ...]], stream: int) -> None:
        """Puts one step on the stream. Raises FasaError."""
        for name, shape in shapes.items():
            if tuple(context.get_tensor_shape(name)) != shape and not context.set_input_shape(name, shape):
                raise FasaError(f"TensorRT does not take {name} of shape {list(shape)}: {self.log.reason()}")
        if not context.execute_async_v3(stream):
            raise FasaError(f"TensorRT cannot run this step: {self.log.reason()}")


def load_plan(directory: EngineDirectory, device: Device) -> Plan:
    """Loads the plugin library and the plan. Raises FasaError when anything does not fit: the version of TensorRT, the
    GPU, its memory, the plugin, the plan's bindings."""
    trt = import_tensorrt(directory.target)
    check_version(directory, trt)
    check_gpu(directory, device)
    plugin = load_plugin(directory, device, trt)
    log = _new_log(trt)
    runtime = trt.Runtime(log)
    try:
        engine = runtime.deserialize_cuda_engine(np.memmap(directory.model_file, np.uint8, "r"))
    except Exception as error:  # the bindings raise where they cannot read the buffer
        log.lines.append(str(error) or type(error).__name__)
        engine = None
    if engine is None:
        raise FasaError(f"TensorRT cannot load {directory.model_file}: {log.reason()}", hint="build the engine again")
    check_bindings(directory, engine)
    size = int(engine.device_memory_size_v2)
    return Plan(trt, engine, log, (device.allocate(max(size, 1), "the engine's working memory"), size), plugin)


def import_tensorrt(target: str) -> Any:
    module = MODULES[target]
    hint = f'pip install "fasa-trt[{target}]"'
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise FasaError(f"{target} is not installed: no Python package {error.name}", hint=hint) from None
    except (ImportError, OSError) as error:
        raise FasaError(f"{target} does not load: {str(error).splitlines()[0]}", hint=hint) from None


def check_version(directory: EngineDirectory, trt: Any) -> None:
    """A plan loads only in the version that built it."""
    built = directory.manifest.get("tensorrt", {}).get("builder_version")
    if built is not None and built != trt.__version__:
        raise FasaError(
            f"{directory.path} was built with {directory.target} {built}, here is {trt.__version__}",
            hint=f"pip install {directory.target}=={built}, or build the engine again",
        )


def check_gpu(directory: EngineDirectory, device: Device) -> None:
    built, here = directory.manifest.get("tensorrt", {}).get("architecture"), architecture(device.compute_capability)
    if built is not None and built != here:
        raise FasaError(
            f"{directory.path} was built for GPU architecture sm_{built}, this GPU is sm_{here}",
            hint="build it again on this machine, or with --arch",
        )
    size, free = directory.model_file.stat().st_size, device.free_bytes
    if size > free:
        raise FasaError(
            f"the weights take {size / 2**30:.1f} GiB, the GPU has {free / 2**30:.1f} GiB free",
            hint="end other programs on this GPU, or use a larger one",
        )


def load_plugin(directory: EngineDirectory, device: Device, trt: Any) -> str:
    """The path of the library, which is registered afterwards."""
    head_dim = int(directory.config["pretrained_config"]["head_size"])
    gpu = architecture(device.compute_capability)
    file = plugin_library.find(head_dim, gpu)
    if file is None:
        raise FasaError(
            f"the plugin library for sm_{gpu} and head_dim {head_dim} is not built",
            hint=f"fasa-trt plugin build --kind tensorrt --arch {gpu} --head-dim {head_dim}",
        )
    built, name, version = directory.manifest.get("plugin", {}), *plugin_library.CREATOR[:2]
    if built.get("version", version) != version:
        raise FasaError(
            f"{directory.path} needs version {built['version']} of {name}, this is version {version}",
            hint="build the engine again",
        )
    plugin_library.load(trt, file)
    return str(file)


def check_bindings(directory: EngineDirectory, engine: Any) -> None:
    names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
    known = {binding.name: binding for binding in (*INPUTS.values(), LOGITS) if binding.fasa}
    if LOGITS.name not in names or not names <= known.keys():
        strange = ", ".join(sorted(names - known.keys())) or f"no {LOGITS.name}"
        raise FasaError(
            f"{directory.model_file} is no FASA engine of the plugin lowering: it has {strange}",
            hint="build the engine again",
        )
    for name in sorted(names):
        dtype = engine.get_tensor_dtype(name).name
        if ENGINE_DTYPES.get(dtype) != known[name].dtype:
            raise FasaError(
                f"{directory.model_file} has {name} of type {dtype}, not {known[name].dtype}",
                hint="build the engine again",
            )


def _new_log(trt: Any) -> Any:
    """An ILogger that keeps errors, so that they can be told in one line. TensorRT's are classes only at run time."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.lines.append(message)

        def reason(self) -> str:
            lines, self.lines = self.lines, []
            return lines[0].strip().splitlines()[0] if lines and lines[0].strip() else "it gives no reason"

    return Log()

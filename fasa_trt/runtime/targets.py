"""Which targets this machine can build for and run, and what each one still needs."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fasa_trt.core.contract import TRTLLM_TENSORRT, TRTLLM_VERSION
from fasa_trt.runtime import machine

# Fastest first: `default_target` takes the first that works here.
PREFERENCE = ("tensorrt-llm", "tensorrt", "tensorrt-rtx", "onnxruntime")
# As in pyproject.toml.
MINIMUM = {"onnxruntime": (1, 24), "tensorrt_rtx": (1, 7), "tensorrt": (10, 14), "cuda.bindings": (12, 8)}


@dataclass(frozen=True)
class Target:
    """needs: one sentence for each thing that is missing, with the way to get it; empty when nothing is."""

    name: str
    can_build: bool
    can_run: bool
    needs: tuple[str, ...] = ()


def targets(cuda: machine.Cuda | None = None) -> list[Target]:
    """All targets, the embedded default first. cuda: of this machine, asked for when not given."""
    cuda = machine.cuda() if cuda is None else cuda
    return [_onnxruntime(), _tensorrt_rtx(cuda), _tensorrt(cuda), _tensorrt_llm(cuda)]


def default_target(known: list[Target] | None = None) -> str:
    """The fastest target that this machine can both build and run; onnxruntime when none can."""
    by_name = {target.name: target for target in known or targets()}
    able = (name for name in PREFERENCE if by_name[name].can_build and by_name[name].can_run)
    return next(able, "onnxruntime")


def runs_tensorrt_rtx(compute_capability: tuple[int, int]) -> bool:
    """Whether engines of TensorRT for RTX, built as this project builds them, run on such a GPU.

    https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/inference-library/cpu-engines.html
    """
    return compute_capability in ((8, 0), (8, 6), (8, 9)) or compute_capability >= (12, 0)


def _onnxruntime() -> Target:
    missing = _missing("onnxruntime", ("onnxruntime", "onnxruntime-gpu"), "pip install --upgrade fasa-trt")
    exporter = all(machine.package_version(module, name) for module, name in (("onnx", "onnx"), ("onnx_ir", "onnx-ir")))
    needs = () if exporter else ("to build: onnx and onnx-ir: pip install --upgrade fasa-trt",)
    return Target("onnxruntime", exporter, not missing, (*needs, *missing))


def _tensorrt_rtx(cuda: machine.Cuda) -> Target:
    """Builds without a GPU, and without the plugin library in the standard lowering, which it does not run."""
    missing = _missing("tensorrt_rtx", ("tensorrt-rtx",), 'pip install "fasa-trt[tensorrt-rtx]"')
    needs = (*missing, *_rtx_gpu_needs(cuda), *_plugin_needs(cuda, "to run"), *_bindings_needs())
    return Target("tensorrt-rtx", not missing, not needs, needs)


def _tensorrt(cuda: machine.Cuda) -> Target:
    both = (
        *_missing("tensorrt", ("tensorrt",), 'pip install "fasa-trt[tensorrt]"'),
        *_gpu_needs(cuda),
        *_plugin_needs(cuda),
    )
    needs = (*both, *_bindings_needs())
    return Target("tensorrt", not both, not needs, needs)


def _tensorrt_llm(cuda: machine.Cuda) -> Target:
    both = (*_exact_tensorrt_needs(), *_gpu_needs(cuda), *_plugin_needs(cuda))
    needs = (*both, *_trtllm_needs())
    return Target("tensorrt-llm", not both, not needs, needs)


def _missing(
    module: str, distributions: tuple[str, ...], command: str, purpose: str = "to build and run"
) -> tuple[str, ...]:
    version = machine.package_version(module, *distributions)
    wanted = ".".join(map(str, MINIMUM[module]))
    if version is None:
        return (f"{purpose}: {distributions[0]} {wanted} or newer: {command}",)
    if version != "unknown" and _numbers(version)[:2] < MINIMUM[module]:
        return (f"{purpose}: {distributions[0]} {wanted} or newer, not {version}: {command}",)
    return ()


def _exact_tensorrt_needs() -> tuple[str, ...]:
    """TensorRT-LLM loads plans of the TensorRT that it was made with alone."""
    version = machine.package_version("tensorrt", "tensorrt")
    if version is not None and (version == "unknown" or _numbers(version)[: len(TRTLLM_TENSORRT)] == TRTLLM_TENSORRT):
        return ()
    wanted = ".".join(map(str, TRTLLM_TENSORRT))
    found = "" if version is None else f", not {version}"
    return (f'to build and run: tensorrt {wanted}, no other{found}: pip install "tensorrt=={wanted}.*"',)


def _trtllm_needs() -> tuple[str, ...]:
    version = machine.package_version("tensorrt_llm", "tensorrt-llm")
    if version is not None and (version == "unknown" or _numbers(version)[:2] == TRTLLM_VERSION[:2]):
        return ()
    wanted = ".".join(map(str, TRTLLM_VERSION))
    found = "" if version is None else f", not {version}, which runs no engines of this kind"
    return (f'to run: tensorrt-llm {wanted}{found}: pip install "fasa-trt[trtllm]", or its container',)


def _bindings_needs() -> tuple[str, ...]:
    return _missing("cuda.bindings", ("cuda-bindings",), "pip install cuda-bindings", "to run")


def _plugin_needs(cuda: machine.Cuda, purpose: str = "to build and run") -> tuple[str, ...]:
    """The library of the FasaAttention plugin, for the first GPU; what lacks a GPU is said elsewhere."""
    from fasa_trt.plugins import library, plugin_library

    if not cuda.gpus:
        return ()
    architecture = machine.architecture(cuda.gpus[0].compute_capability)
    lacking = [plugin_library.missing(head_dim, architecture) for head_dim in library.HEAD_DIMS]
    # One head_dim that is there serves the models that have it.
    return () if None in lacking else (f"{purpose}: the plugin library: {lacking[0]}",)


def _gpu_needs(cuda: machine.Cuda) -> tuple[str, ...]:
    if cuda.version is None:
        return ("to build and run: an NVIDIA GPU; no CUDA driver is installed here",)
    return () if cuda.gpus else ("to build and run: an NVIDIA GPU; the CUDA driver shows none here",)


def _rtx_gpu_needs(cuda: machine.Cuda) -> tuple[str, ...]:
    """What TensorRT for RTX lacks to run on the GPU that programs use unless told otherwise, the first."""
    wanted = "to run: a GPU of compute capability 8.0, 8.6, 8.9, or 12.0 and newer"
    if cuda.version is None:
        return (f"{wanted}; no CUDA driver is installed here",)
    if not cuda.gpus:
        return (f"{wanted}; the CUDA driver shows none here",)
    gpu = cuda.gpus[0]
    if not runs_tensorrt_rtx(gpu.compute_capability):
        return (f"{wanted}; {gpu.name} has {gpu.compute_capability[0]}.{gpu.compute_capability[1]}",)
    return ()


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))

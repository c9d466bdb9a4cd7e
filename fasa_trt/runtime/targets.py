"""Which targets this machine can build for and run, and what each one still needs."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fasa_trt.runtime import machine

# Fastest first: `default_target` takes the first that works here.
PREFERENCE = ("tensorrt-llm", "tensorrt", "tensorrt-rtx", "onnxruntime")
RUNNABLE = ("onnxruntime",)  # targets that this version has a backend for
MINIMUM = {"onnxruntime": (1, 24), "tensorrt_rtx": (1, 7)}  # as in pyproject.toml
LATER = "comes with the plugin-and-engine release (extra fasa-trt[{}]): this version can neither build nor run it"


@dataclass(frozen=True)
class Target:
    """needs: one sentence for each thing that is missing, with the way to get it; empty when nothing is."""

    name: str
    can_build: bool
    can_run: bool
    needs: tuple[str, ...] = ()


def targets(cuda: machine.Cuda | None = None) -> list[Target]:
    """All targets, the embedded default first. cuda: of this machine, asked for when not given."""
    return [
        _onnxruntime(),
        _tensorrt_rtx(machine.cuda() if cuda is None else cuda),
        Target("tensorrt", False, False, (LATER.format("tensorrt"),)),
        Target("tensorrt-llm", False, False, (LATER.format("trtllm"),)),
    ]


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
    missing = _missing("tensorrt_rtx", ("tensorrt-rtx",), 'pip install "fasa-trt[tensorrt-rtx]"')
    needs = (*missing, *_gpu_needs(cuda))
    if "tensorrt-rtx" not in RUNNABLE:
        needs += ("to run: a later version; this one builds such engines and runs onnxruntime ones only",)
    return Target("tensorrt-rtx", not missing, not needs, needs)


def _missing(module: str, distributions: tuple[str, ...], command: str) -> tuple[str, ...]:
    version = machine.package_version(module, *distributions)
    wanted = ".".join(map(str, MINIMUM[module]))
    if version is None:
        return (f"to build and run: {distributions[0]} {wanted} or newer: {command}",)
    if version != "unknown" and tuple(map(int, re.findall(r"\d+", version)[:2])) < MINIMUM[module]:
        return (f"to build and run: {distributions[0]} {wanted} or newer, not {version}: {command}",)
    return ()


def _gpu_needs(cuda: machine.Cuda) -> tuple[str, ...]:
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

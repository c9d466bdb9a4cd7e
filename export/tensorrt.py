"""ONNX to a TensorRT plan, with TensorRT for RTX or TensorRT: their Python interfaces agree in all that is used here.

The network is strongly typed: every tensor keeps the dtype that the exporter gave it. In the standard lowering cache
tensors are updated in place, so a runtime must bind each `present.*` output to the buffer of its input.
"""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fasa_trt.core.atomic import write_bytes
from fasa_trt.core.contract import Range
from fasa_trt.core.errors import FasaError
from fasa_trt.export.build_log import BuildProgress, Progress, interruptible, new_log, new_monitor
from fasa_trt.export.parser_link import library_directory, link_parser_library
from fasa_trt.export.timing_cache import keep_timing_cache, timing_cache_file, use_timing_cache
from fasa_trt.plugins.plugin_library import load as load_plugin

Flavour = Literal["tensorrt_rtx", "tensorrt"]
PREFILL_CHUNK = 256  # tokens; enough to keep a GPU busy, and scores of chunk x capacity still fit beside the weights
MAX_BUDGET = 3840  # limit of TensorRT's TopK layer
DTYPE_NAMES = {"float": "float32", "half": "float16", "bf16": "bfloat16"}  # TensorRT's, in the words of this project
# https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/inference-library/cpu-engines.html
RTX_ARCHITECTURES = ("80", "86", "89", "120")


@dataclass(frozen=True)
class Product:
    """What a flavour is called, and the first version that this project builds with.

    times: whether a build times kernels on the GPU, and so builds for that GPU alone.
    """

    title: str
    extra: str
    minimum: tuple[int, int]
    times: bool


PRODUCTS: Mapping[str, Product] = {
    "tensorrt_rtx": Product("TensorRT for RTX", "tensorrt-rtx", (1, 7), times=False),
    "tensorrt": Product("TensorRT", "tensorrt", (10, 14), times=True),  # for the plugin lowering, which needs opset 20
}


def standard_ranges(max_batch_size: int, max_seq_len: int, prefill_chunk: int = PREFILL_CHUNK) -> dict[str, Range]:
    """The optimisation profile of a graph of the standard lowering, exported with `fixed_capacity=True`.

    Each step feeds up to `prefill_chunk` tokens a row: longer prompts are fed in chunks. Working memory on the GPU
    grows with max_batch_size * prefill_chunk * max_seq_len. That of the plugin lowering: `EngineLimits.ranges`.
    """
    chunk = min(prefill_chunk, max_seq_len)
    return {
        # What an engine does most is to decode a full batch; kernels tuned for many rows also do for few.
        "batch": (1, max_batch_size, max_batch_size),
        "tokens": (1, 1, chunk),
        "logit_tokens": (1, 1, chunk),
    }


def build_plan(
    onnx_file: Path,
    plan_file: Path,
    *,
    flavour: Flavour,
    ranges: Mapping[str, Range],
    plugin: Path | None = None,
    architecture: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Builds `onnx_file`, its weights beside it, and writes `plan_file`.

    ranges: [smallest, tuned for, largest] of each dynamic dimension, by the names that the exporter gave them. plugin:
    the library of the plugin lowering's nodes. architecture: compute capability, "89" for 8.9, of the GPU that it is
    for; None for whatever TensorRT takes by itself: the GPU here, or for TensorRT for RTX all that it knows. progress:
    called with the percentage done and 100, perhaps from another thread; an exception that it raises stops the build.

    Returns facts for the manifest: builder, builder_version, architecture, build_seconds, plan_bytes, the ranges as
    `profile`, the [name, dtype, shape] of inputs and outputs, and TensorRT's warnings.

    Raises FasaError when the flavour is not installed or too old, the plugin cannot be loaded, the model cannot be
    parsed or built, or the plan cannot be written.
    """
    if not onnx_file.is_file():
        raise FasaError(f"no such ONNX model: {onnx_file}", hint="make one with fasa-trt export")
    trt, product = load_tensorrt(flavour), PRODUCTS[flavour]
    if plugin is not None:
        load_plugin(trt, plugin)
    started = time.monotonic()
    log = new_log(trt)
    builder = _new_builder(trt, log)
    network, parser = parse(trt, builder, log, onnx_file)
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # who asks for float32 means it
    config.add_optimization_profile(_profile(builder, network, ranges, onnx_file))
    if architecture is not None and not product.times:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{architecture}"), 0)
    timings = timing_cache_file(trt, architecture) if product.times else None
    if timings is not None:
        use_timing_cache(config, timings)
    monitor = new_monitor(trt, BuildProgress(progress))
    config.progress_monitor = monitor
    with interruptible(monitor):
        plan = builder.build_serialized_network(network, config)
    bindings = _bindings(network)
    del parser  # owns the weights that the network points to, so it lives until here
    monitor.raise_interruption()
    # TensorRT only warns when sizes within the profile cannot run, and may report errors from which it recovers.
    problems = log.errors if plan is None else [warning for warning in log.warnings if "not self-consistent" in warning]
    if plan is None or problems:
        raise FasaError(f"{product.title} cannot build {onnx_file}: {_first_line(*problems)}")
    write_bytes(plan_file, plan)  # a buffer: written from where TensorRT left it
    lost = None if timings is None else keep_timing_cache(config, timings)
    return {
        "builder": flavour,
        "builder_version": trt.__version__,
        "architecture": architecture,
        "build_seconds": round(time.monotonic() - started, 1),
        "plan_bytes": int(plan.nbytes),
        "profile": {name: list(span) for name, span in ranges.items()},
        "bindings": bindings,
        "warnings": [*log.warnings, *([lost] if lost else [])],
    }


def load_tensorrt(flavour: Flavour, exact: tuple[int, ...] | None = None) -> Any:
    """The Python module of `flavour`, ready to parse. exact: the only version that will do, as far as it goes. Raises
    FasaError when it is missing, broken, too old, or not that one."""
    product = PRODUCTS[flavour]
    wanted = ".".join(map(str, exact or product.minimum))
    hint = f'pip install "fasa-trt[{product.extra}]"'
    if exact is not None:
        hint = f'pip install "{product.extra}=={wanted}.*"'
    try:
        trt = importlib.import_module(flavour)
    except ModuleNotFoundError as error:
        raise FasaError(f"{product.title} is not installed: no Python package {error.name}", hint=hint) from None
    except (ImportError, OSError) as error:  # a shared library is missing or does not fit
        raise FasaError(f"{product.title} does not load: {_first_line(str(error))}", hint=hint) from None
    version = tuple(int(part) for part in re.findall(r"\d+", trt.__version__))
    if exact is not None and version[: len(exact)] != exact:
        raise FasaError(f"{product.title} {trt.__version__} will not do: {wanted} is needed", hint=hint)
    if version[:2] < product.minimum:
        raise FasaError(f"{product.title} {trt.__version__} is too old: {wanted} is needed", hint=f"{hint} --upgrade")
    if flavour == "tensorrt_rtx":
        link_parser_library(library_directory())
    return trt


def _new_builder(trt: Any, log: Any) -> Any:
    try:
        return trt.Builder(log)
    except TypeError:  # what the bindings make of a constructor that fails
        title = PRODUCTS[trt.__name__].title
        raise FasaError(
            f"{title} cannot start: {_first_line(*log.errors)}", hint="it builds on the GPU that the engine is for"
        ) from None


def parse(trt: Any, builder: Any, log: Any, onnx_file: Path) -> tuple[Any, Any]:
    """The network of `onnx_file`, and the parser, which must outlive the build. Raises FasaError."""
    # TensorRT 10 needs the flag; TensorRT 11 and TensorRT for RTX know no other networks and ignore it.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx_file)):  # from the file: its weights are looked for beside it
        title = PRODUCTS[trt.__name__].title
        raise FasaError(f"{title} cannot parse {onnx_file}: {_parser_message(parser, log.errors)}")
    return network, parser


def _profile(builder: Any, network: Any, ranges: Mapping[str, Range], onnx_file: Path) -> Any:
    """Ranges for the dynamic dimensions of all inputs, found by the names that the exporter gave them."""
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        sizes: list[Range] = []
        for axis, size in enumerate(tensor.shape):
            name = tensor.get_dimension_name(axis)
            if size < 0 and name not in ranges:
                raise FasaError(
                    f"{onnx_file} leaves dimension {axis} ({name or 'unnamed'}) of {tensor.name} open, "
                    "but TensorRT needs its size",
                    hint="export it for this target",
                )
            sizes.append(ranges[name] if size < 0 else (size, size, size))
        if -1 in tuple(tensor.shape):
            profile.set_shape(tensor.name, *zip(*sizes, strict=True))
    return profile


def _bindings(network: Any) -> dict[str, list[list[Any]]]:
    """[name, dtype, shape] of every input and output, -1 for sizes that change."""

    def described(tensor: Any) -> list[Any]:
        dtype = str(tensor.dtype).rpartition(".")[2].lower()
        return [tensor.name, DTYPE_NAMES.get(dtype, dtype), list(tensor.shape)]

    return {
        "inputs": [described(network.get_input(index)) for index in range(network.num_inputs)],
        "outputs": [described(network.get_output(index)) for index in range(network.num_outputs)],
    }


def _parser_message(parser: Any, logged: list[str]) -> str:
    if not parser.num_errors:
        return _first_line(*logged)
    error = parser.get_error(0)
    where = " ".join(part for part in (error.node_operator(), error.node_name()) if part)
    return f"{where}: {_first_line(error.desc())}" if where else _first_line(error.desc())


def _first_line(*messages: str) -> str:
    """One line of the first message, without places in TensorRT's own sources."""
    line = (messages[0].strip() if messages else "").partition("\n")[0]
    return re.sub(r"\s*In \w+ at /.*", "", line).strip() or "it gives no reason"

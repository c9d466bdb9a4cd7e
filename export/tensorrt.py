"""ONNX to a TensorRT plan, with TensorRT for RTX or TensorRT: their Python interfaces agree in all that is used here.

The network is strongly typed: every tensor keeps the dtype that the exporter gave it. Cache tensors are updated in
place, so a runtime must bind each `present.*` output to the buffer of its input.
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
from fasa_trt.core.errors import FasaError
from fasa_trt.export.build_log import BuildProgress, Progress, interruptible, new_log, new_monitor
from fasa_trt.export.parser_link import library_directory, link_parser_library

Flavour = Literal["tensorrt_rtx", "tensorrt"]
Range = tuple[int, int, int]  # smallest, tuned for, largest
PREFILL_CHUNK = 256  # tokens; enough to keep a GPU busy, and scores of chunk x capacity still fit beside the weights
MAX_BUDGET = 3840  # limit of TensorRT's TopK layer


@dataclass(frozen=True)
class Product:
    """What a flavour is called, and the first version that can build the standard lowering."""

    title: str
    extra: str
    minimum: tuple[int, int]


PRODUCTS: Mapping[str, Product] = {
    "tensorrt_rtx": Product("TensorRT for RTX", "tensorrt-rtx", (1, 7)),
    # Parses TensorScatter, RMSNormalization and RotaryEmbedding: https://github.com/onnx/onnx-tensorrt/pull/1048
    "tensorrt": Product("TensorRT", "tensorrt", (10, 15)),
}


def build_plan(
    onnx_file: Path,
    plan_file: Path,
    *,
    flavour: Flavour,
    max_batch_size: int,
    max_seq_len: int,
    prefill_chunk: int = PREFILL_CHUNK,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Builds `onnx_file` (exported with `fixed_capacity=True`, its weights beside it) and writes `plan_file`.

    The plan takes 1 to max_batch_size rows, of which each step feeds 1 to min(prefill_chunk, max_seq_len) tokens and
    returns as many logits: longer prompts are fed in chunks. Its working memory on the GPU grows with
    max_batch_size * prefill_chunk * max_seq_len. progress: called with the percentage done and 100, perhaps from
    another thread; an exception that it raises stops the build.

    Returns facts for the manifest: builder, builder_version, build_seconds, plan_bytes, the [smallest, tuned for,
    largest] size of each dynamic dimension as `profile`, and TensorRT's warnings.

    Raises FasaError when the flavour is not installed or too old, the model cannot be parsed or built, or the plan
    cannot be written.
    """
    chunk = min(prefill_chunk, max_seq_len)
    if max_batch_size < 1 or chunk < 1:
        raise FasaError(
            f"{max_batch_size} rows with {chunk} tokens a step are not possible", hint="at least 1 of each is needed"
        )
    if not onnx_file.is_file():
        raise FasaError(f"no such ONNX model: {onnx_file}", hint="make one with fasa-trt export")
    trt = load_tensorrt(flavour)
    started = time.monotonic()
    ranges: dict[str, Range] = {
        # What an engine does most is to decode a full batch; kernels tuned for many rows also do for few.
        "batch": (1, max_batch_size, max_batch_size),
        "tokens": (1, 1, chunk),
        "logit_tokens": (1, 1, chunk),
    }
    log = new_log(trt)
    builder = trt.Builder(log)
    network, parser = parse(trt, builder, log, onnx_file)
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # who asks for float32 means it
    config.add_optimization_profile(_profile(builder, network, ranges, onnx_file))
    monitor = new_monitor(trt, BuildProgress(progress))
    config.progress_monitor = monitor
    with interruptible(monitor):
        plan = builder.build_serialized_network(network, config)
    del parser  # owns the weights that the network points to, so it lives until here
    monitor.raise_interruption()
    # TensorRT only warns when sizes within the profile cannot run, and may report errors from which it recovers.
    problems = log.errors if plan is None else [warning for warning in log.warnings if "not self-consistent" in warning]
    if plan is None or problems:
        raise FasaError(f"{PRODUCTS[flavour].title} cannot build {onnx_file}: {_first_line(*problems)}")
    write_bytes(plan_file, plan)  # a buffer: written from where TensorRT left it
    return {
        "builder": flavour,
        "builder_version": trt.__version__,
        "build_seconds": round(time.monotonic() - started, 1),
        "plan_bytes": int(plan.nbytes),
        "profile": {name: list(span) for name, span in ranges.items()},
        "warnings": log.warnings,
    }


def load_tensorrt(flavour: Flavour) -> Any:
    """The Python module of `flavour`, ready to parse. Raises FasaError when it is missing, broken, or too old."""
    product = PRODUCTS[flavour]
    hint = f'pip install "fasa-trt[{product.extra}]"'
    try:
        trt = importlib.import_module(flavour)
    except ModuleNotFoundError as error:
        raise FasaError(f"{product.title} is not installed: no Python package {error.name}", hint=hint) from None
    except (ImportError, OSError) as error:  # a shared library is missing or does not fit
        raise FasaError(f"{product.title} does not load: {_first_line(str(error))}", hint=hint) from None
    version = tuple(int(part) for part in re.findall(r"\d+", trt.__version__)[:2])
    if version < product.minimum:
        wanted = ".".join(map(str, product.minimum))
        raise FasaError(f"{product.title} {trt.__version__} is too old: {wanted} is needed", hint=f"{hint} --upgrade")
    if flavour == "tensorrt_rtx":
        link_parser_library(library_directory())
    return trt


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
                    hint="export the model with fixed_capacity=True",
                )
            sizes.append(ranges[name] if size < 0 else (size, size, size))
        if -1 in tuple(tensor.shape):
            profile.set_shape(tensor.name, *zip(*sizes, strict=True))
    return profile


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

"""Triton's model configuration as dataclasses, written in protobuf's text format.

Fields have the names and the nesting of `ModelConfig` in Triton's model_config.proto
(https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto), so that one rule writes all:
None and empty tuples are left out, tuples are repeated fields, dictionaries are maps, enums are bare words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any


class DataType(Enum):
    BOOL = "TYPE_BOOL"
    UINT64 = "TYPE_UINT64"
    INT32 = "TYPE_INT32"
    FP16 = "TYPE_FP16"
    FP32 = "TYPE_FP32"
    BF16 = "TYPE_BF16"
    STRING = "TYPE_STRING"


class Kind(Enum):
    CPU = "KIND_CPU"
    GPU = "KIND_GPU"


@dataclass(frozen=True)
class Shape:
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Input:
    """dims: without the batch dimension; -1 for any size. reshape: what the backend sees instead of dims."""

    name: str
    data_type: DataType
    dims: tuple[int, ...] = (1,)
    optional: bool | None = None
    reshape: Shape | None = None
    allow_ragged_batch: bool | None = None


@dataclass(frozen=True)
class Output:
    name: str
    data_type: DataType
    dims: tuple[int, ...] = (1,)


@dataclass(frozen=True)
class InstanceGroup:
    """count: instances on each of `gpus`, or in all for Kind.CPU."""

    count: int
    kind: Kind
    gpus: tuple[int, ...] = ()


@dataclass(frozen=True)
class TransactionPolicy:
    """decoupled: whether a request may be answered by any number of responses."""

    decoupled: bool


@dataclass(frozen=True)
class QueuePolicy:
    max_queue_size: int


@dataclass(frozen=True)
class DynamicBatching:
    preferred_batch_size: tuple[int, ...] = ()
    max_queue_delay_microseconds: int | None = None
    default_queue_policy: QueuePolicy | None = None


@dataclass(frozen=True)
class Parameter:
    string_value: str


@dataclass(frozen=True)
class Step:
    """Of an ensemble. Maps go from the model's tensors to the ensemble's."""

    model_name: str
    input_map: Mapping[str, str]
    output_map: Mapping[str, str]
    model_version: int = -1


@dataclass(frozen=True)
class EnsembleScheduling:
    step: tuple[Step, ...]


@dataclass(frozen=True)
class ModelConfig:
    """max_batch_size 0: requests have no batch dimension. Either `backend` or `platform` is given."""

    name: str
    backend: str | None = None
    platform: str | None = None
    max_batch_size: int = 0
    input: tuple[Input, ...] = ()
    output: tuple[Output, ...] = ()
    instance_group: tuple[InstanceGroup, ...] = ()
    model_transaction_policy: TransactionPolicy | None = None
    dynamic_batching: DynamicBatching | None = None
    ensemble_scheduling: EnsembleScheduling | None = None
    parameters: Mapping[str, Parameter] = field(default_factory=dict)

    def to_text(self) -> str:
        """The content of config.pbtxt."""
        return "".join(f"{line}\n" for line in _lines(self, ""))


def parameters(**values: object) -> dict[str, Parameter]:
    """Of a model: None is left out, booleans are written as TensorRT-LLM and Triton's samples write them."""
    texts = {True: "true", False: "false"}
    return {
        name: Parameter(texts[value] if isinstance(value, bool) else str(value))
        for name, value in values.items()
        if value is not None
    }


def _lines(message: Any, indent: str) -> Iterator[str]:
    for each in fields(message):
        value = getattr(message, each.name)
        if isinstance(value, Mapping):
            for key, item in value.items():
                yield f"{indent}{each.name} {{"
                yield f"{indent}  key: {_scalar(key)}"
                yield from _field("value", item, indent + "  ")
                yield f"{indent}}}"
        else:
            for item in value if isinstance(value, tuple) else (value,):
                yield from _field(each.name, item, indent)


def _field(name: str, value: Any, indent: str) -> Iterator[str]:
    if value is None:
        return
    if hasattr(value, "__dataclass_fields__"):
        yield f"{indent}{name} {{"
        yield from _lines(value, indent + "  ")
        yield f"{indent}}}"
    else:
        yield f"{indent}{name}: {_scalar(value)}"


def _scalar(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, str):  # bytes beyond printable ASCII as octal escapes
        plain = (chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\{byte:03o}" for byte in value.encode())
        return f'"{"".join(plain)}"'
    return str(value)

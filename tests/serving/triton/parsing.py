"""Configurations as Triton's own schema reads them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest


def parse(text: str) -> Any:
    """A ModelConfig. Raises when a field's name or value is not of Triton's schema."""
    pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed")
    schema = import_module("tritonclient.grpc.model_config_pb2")
    return import_module("google.protobuf.text_format").Parse(text, schema.ModelConfig())


def type_code(name: str) -> int:
    """The number of a data type."""
    return int(import_module("tritonclient.grpc.model_config_pb2").DataType.Value(name))

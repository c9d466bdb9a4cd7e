"""Frequency-aware sparse attention (FASA) for TensorRT: calibrate, export, build, serve."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fasa_trt.runtime.generate import Engine, load
    from fasa_trt.runtime.sampling import Sampling

__all__ = ["Engine", "Sampling", "__version__", "load"]
__version__ = version("fasa-trt")

_HOMES = {
    "Engine": "fasa_trt.runtime.generate",
    "load": "fasa_trt.runtime.generate",
    "Sampling": "fasa_trt.runtime.sampling",
}


def __getattr__(name: str) -> Any:
    """Loads the runtime only when it is asked for, so that `fasa-trt --help` answers at once."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

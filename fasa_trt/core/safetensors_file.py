"""Where each tensor of a safetensors checkpoint lies on disk, and reading one at a time.

The `safetensors` library maps whole files into memory; this reads exactly one tensor's bytes, so that exporting a
70B checkpoint needs the memory of its largest tensor and not of a shard.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from fasa_trt.core.errors import FasaError

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor on disk: `nbytes` bytes from `offset` of `file`, row-major, little-endian."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def read(self) -> NDArray[Any]:
        """The whole tensor. Raises FasaError for a dtype that is not a plain float."""
        if self.dtype not in DTYPES:
            raise FasaError(
                f"tensor {self.name} of {self.file.name} is stored as {self.dtype}",
                hint="quantised checkpoints are not supported; use the float16, bfloat16 or float32 original",
            )
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            data = bytearray(self.nbytes)
            if stream.readinto(data) != self.nbytes:
                raise FasaError(f"{self.file} ends inside tensor {self.name}", hint="download the file again")
        return np.frombuffer(data, DTYPES[self.dtype]).reshape(self.shape)


def stored_tensors(file: Path) -> Iterator[StoredTensor]:
    """Every tensor of one safetensors file. Raises FasaError when the file is truncated or corrupt."""
    try:
        with safe_open(file, framework="numpy"):  # checks header, offsets and the file's length
            pass
        with file.open("rb") as stream:
            header_size = int.from_bytes(stream.read(8), "little")
            header: dict[str, Any] = json.loads(stream.read(header_size))
    except (SafetensorError, ValueError, OSError) as error:
        raise FasaError(
            f"{file} is not a readable safetensors file: {error}", hint="it may be truncated; download it again"
        ) from None
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            yield StoredTensor(file, name, entry["dtype"], tuple(entry["shape"]), 8 + header_size + start, end - start)

"""Where each tensor of a safetensors checkpoint lies on disk, and reading one at a time.

The `safetensors` library maps whole files into memory; this reads exactly one tensor's bytes, or a few at a time, so
that a 70B checkpoint can be exported in as little memory as a small one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
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
# Files copied in pieces of this size take as long as the system's own copy. Whole tensors, or pieces of 4 MiB, took
# three times as long (Linux 6.18, ext4): memory fresh from the system and large writes both cost more than copying.
PIECE_BYTES = 256 << 10


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
        """The whole tensor. Raises FasaError for a dtype that is not a plain float, and when the file is gone."""
        (whole,) = self.pieces(max(self.nbytes, 1))
        return whole.reshape(self.shape)

    def rows(self, start: int, stop: int) -> StoredTensor:
        """Indices start to stop of the first axis."""
        row = self.nbytes // self.shape[0]
        shape = (stop - start, *self.shape[1:])
        return replace(self, shape=shape, offset=self.offset + start * row, nbytes=(stop - start) * row)

    def pieces(self, size: int = PIECE_BYTES) -> Iterator[NDArray[Any]]:
        """The elements in their order, flat, in pieces of at most `size` bytes, a multiple of 8. All pieces lie in the
        same memory: each lasts until the next. Raises FasaError as `read` does."""
        if self.dtype not in DTYPES:
            raise FasaError(
                f"tensor {self.name} of {self.file.name} is stored as {self.dtype}",
                hint="quantised checkpoints are not supported; use the float16, bfloat16 or float32 original",
            )
        buffer = memoryview(bytearray(min(size, self.nbytes)))
        try:
            with self.file.open("rb") as stream:
                stream.seek(self.offset)
                for start in range(0, max(self.nbytes, 1), size):
                    piece = buffer[: self.nbytes - start]
                    if stream.readinto(piece) != len(piece):
                        raise FasaError(f"{self.file} ends inside tensor {self.name}", hint="download the file again")
                    yield np.frombuffer(piece, DTYPES[self.dtype])
        except OSError as error:
            raise FasaError(f"cannot read {self.file}: {error.strerror or error}") from None


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

"""Weights on their way from the checkpoint into the engine: cast, fused, permuted; at most one of them in memory.

Attention does not change when the head dims of q and k are permuted alike. Per KV head, the rows of the query and key
projections (and their biases and norms) are ordered so that the dominant frequency chunks come first and the two dims
of a chunk lie side by side. A key's leading dims are then its *label*: all that scoring needs, in one contiguous run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from fasa_trt.core.checkpoint import Checkpoint
from fasa_trt.core.errors import FasaError
from fasa_trt.core.safetensors_file import PIECE_BYTES
from fasa_trt.export.graph import DTYPES, NUMPY_DTYPES, Ops
from fasa_trt.export.plan import LayerPlan

Array = NDArray[Any]
Pieces = Iterable[Array]  # the elements of a tensor in their order; each may only last until the next


def cast(array: Array, dtype: np.dtype[Any]) -> Array:
    """`array` in `dtype`; bfloat16 to float32 by shifting bits, several times faster than an element-wise cast."""
    if array.dtype == ml_dtypes.bfloat16 and dtype == np.float32:
        return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return array.astype(dtype, copy=False)


class Initializer(ir.LazyTensor):
    """A weight that is read, cast and written in small pieces when the graph is saved (see `PIECE_BYTES`)."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: str, pieces: Callable[[], Pieces]) -> None:
        self._pieces, self._target = pieces, NUMPY_DTYPES[dtype]

        def evaluate() -> ir.TensorProtocol:
            whole = np.concatenate([np.array(piece) for piece in self._cast_pieces()])
            return ir.tensor(whole.reshape(shape), name=name)

        super().__init__(evaluate, dtype=DTYPES[dtype], shape=ir.Shape(shape), name=name)

    def tofile(self, file: BinaryIO) -> None:
        for piece in self._cast_pieces():
            data = piece.view(np.uint8).data
            for start in range(0, len(data), PIECE_BYTES):
                file.write(data[start : start + PIECE_BYTES])

    def _cast_pieces(self) -> Pieces:
        """Flat and contiguous."""
        return (np.ascontiguousarray(cast(piece, self._target)).reshape(-1) for piece in self._pieces())


class Weights:
    """Turns tensors of a checkpoint into initializers of a graph, to be read when the graph is saved."""

    def __init__(self, checkpoint: Checkpoint, ops: Ops) -> None:
        self.checkpoint = checkpoint
        self.ops = ops
        self._known: dict[str, ir.Value] = {}

    def has(self, name: str) -> bool:
        return name in self.checkpoint.tensors

    def lazy(
        self, name: str, shape: tuple[int, ...], pieces: Callable[[], Pieces], dtype: str | None = None
    ) -> ir.Value:
        """An initializer whose data `pieces` makes at the moment it is written."""
        if name not in self._known:
            self._known[name] = self.ops.initializer(Initializer(name, shape, dtype or self.ops.dtype, pieces))
        return self._known[name]

    def stored(self, name: str) -> ir.Value:
        """A tensor of the checkpoint as it is."""
        tensor = self.checkpoint.tensor(name)
        return self.lazy(name, tensor.shape, tensor.pieces)

    def norm(self, name: str, offset: float) -> ir.Value:
        """A norm's weight, always float32: it multiplies a float32 activation."""
        tensor = self.checkpoint.tensor(name)
        return self.lazy(
            name, tensor.shape, lambda: [cast(tensor.read(), np.dtype(np.float32)) + np.float32(offset)], "float32"
        )

    def qkv(self, plan: LayerPlan, kind: str) -> ir.Value | None:
        """The fused projection of a layer, `kind` "weight" [Hkv*(G+2)*d, hidden] or "bias" [Hkv*(G+2)*d].

        Rows run per KV head: its G query heads, its key, its value. None for a bias that the checkpoint lacks.
        """
        prefix = f"model.layers.{plan.index}.self_attn."
        fused = self.has(f"{prefix}qkv_proj.weight")
        names = [f"{prefix}qkv_proj.{kind}"] if fused else [f"{prefix}{x}_proj.{kind}" for x in "qkv"]
        if kind == "bias" and not any(self.has(name) for name in names):
            return None
        stored = [self.checkpoint.tensor(name) for name in names]
        heads, kv_heads, head_dim = self.checkpoint.num_heads, self.checkpoint.num_kv_heads, self.checkpoint.head_dim
        rows = (heads + 2 * kv_heads) * head_dim
        if sum(tensor.shape[0] for tensor in stored) != rows:
            raise FasaError(
                f"{names[0]} does not have the {rows} rows that config.json asks for",
                hint="the checkpoint is not of its config",
            )

        bounds = [0, heads * head_dim, (heads + kv_heads) * head_dim, rows]
        queries, keys, values = [stored[0].rows(*span) for span in pairwise(bounds)] if fused else stored
        group = heads // kv_heads

        def pieces() -> Pieces:  # a KV head at a time: little memory, used again and again
            dims = plan.dims()
            for g in range(kv_heads):
                parts = ((queries, group * head_dim), (keys, head_dim), (values, head_dim))
                arrays = [part.rows(g * height, (g + 1) * height).read() for part, height in parts]
                yield group_qkv(arrays, group, 1, head_dim, None if dims is None else dims[g : g + 1])

        return self.lazy(f"{prefix}qkv.{kind}", (rows, *stored[0].shape[1:]), pieces)

    def head_norm(
        self,
        plan: LayerPlan,
        which: str,
        offset: float,
        *,
        shape: tuple[int, ...] | None = None,
        dtype: str = "float32",
    ) -> tuple[ir.Value, bool] | None:
        """The weight of `q_norm` or `k_norm`, [Hkv, heads per KV head, d] in baked order or these elements as `shape`,
        and whether the norm spans all heads (OLMo 2) rather than each by itself; None where there is no such norm."""
        name = f"model.layers.{plan.index}.self_attn.{which}_norm.weight"
        if not self.has(name):
            return None
        kv_heads, head_dim = self.checkpoint.num_kv_heads, self.checkpoint.head_dim
        per_group = self.checkpoint.num_heads // kv_heads if which == "q" else 1
        tensor = self.checkpoint.tensor(name)
        spans_heads = tensor.shape[0] != head_dim

        def read() -> Array:
            weight = cast(tensor.read(), np.dtype(np.float32)) + np.float32(offset)
            full = np.broadcast_to(
                weight.reshape((-1, per_group, head_dim) if spans_heads else (1, 1, head_dim)),
                (kv_heads, per_group, head_dim),
            )
            dims = plan.dims()
            return full if dims is None else np.take_along_axis(full, dims[:, None, :], axis=2)

        shape = shape or (kv_heads, per_group, head_dim)
        return self.lazy(f"{name}.baked", shape, lambda: [read()], dtype), spans_heads


def group_qkv(
    arrays: Sequence[Array], heads: int, kv_heads: int, head_dim: int, dims: NDArray[np.int64] | None
) -> Array:
    """Rows [q heads, k heads, v heads] of head_dim each, regrouped per KV head as [G queries, key, value].

    arrays: [rows, ...], the three projections or one that holds them all; (heads + 2 kv_heads) * head_dim rows in sum.
    dims: int64 [kv_heads, head_dim] or None, the source dim of each baked dim of queries and keys.
    Returns [(heads + 2 kv_heads) * head_dim, ...].
    """
    rest = arrays[0].shape[1:]
    rows = [head for array in arrays for head in array.reshape(-1, head_dim, *rest)]
    group = heads // kv_heads
    result = np.empty((kv_heads, group + 2, head_dim, *rest), arrays[0].dtype)
    for g in range(kv_heads):
        queries_and_key = [*range(g * group, (g + 1) * group), heads + g]
        for position, head in enumerate(queries_and_key):
            result[g, position] = rows[head] if dims is None else rows[head][dims[g]]
        result[g, group + 1] = rows[heads + kv_heads + g]
    return result.reshape(-1, *rest)

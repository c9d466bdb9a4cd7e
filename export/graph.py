"""Writing ONNX nodes as function calls: `ops.MatMul(a, b)` appends a node and returns its output."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

OPSET = 24  # the first with TensorScatter
PLUGIN_OPSET = 20  # the last that TensorRT 10.14 parses
IR_VERSIONS = {OPSET: 11, PLUGIN_OPSET: 10}

DTYPES: dict[str, ir.DataType] = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}
NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


class Ops:
    """The nodes of one graph or of one branch inside it.

    Value names and constants are shared by a graph and its branches: ONNX wants names unique across both, and a
    constant in the outer graph is not evaluated again whenever the branch runs.

    dtype: name of the dtype that activations and weights have.
    """

    def __init__(self, dtype: str, *, parent: Ops | None = None) -> None:
        self.dtype = dtype
        self._tape = ir.tape.Tape()
        self._root: Ops = parent._root if parent else self
        if parent is None:
            self._serial = itertools.count()
            self._constants: dict[tuple[bytes, str, tuple[int, ...]], ir.Value] = {}
            self.initializers: list[ir.Value] = []

    @property
    def nodes(self) -> Sequence[ir.Node]:
        return self._tape.nodes

    def __getattr__(self, op_type: str) -> Callable[..., Any]:
        if not op_type[0].isupper():
            raise AttributeError(op_type)

        def append(*inputs: ir.Value | None, outputs: int = 1, **attributes: Any) -> Any:
            values = self._append(op_type, inputs, attributes, outputs)
            return values[0] if outputs == 1 else values

        return append

    def foreign(self, domain: str, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """The output of an op that ONNX does not define; the model must import `domain`."""
        return self._append(op_type, inputs, attributes, 1, domain)[0]

    def _append(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, Any],
        outputs: int,
        domain: str = "",
    ) -> Sequence[ir.Value]:
        name = f"{op_type}_{next(self._root._serial)}"
        values = self._tape.op_multi_out(op_type, inputs, attributes, num_outputs=outputs, name=name, domain=domain)
        for index, value in enumerate(values):
            value.name = name if outputs == 1 else f"{name}_{index}"
        return values

    def initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        """Registers a named tensor, perhaps a lazy one, as a weight of the outer graph."""
        value = self._tape.initializer(tensor)
        self._root.initializers.append(value)
        return value

    def const(self, value: Any, dtype: str | None = None) -> ir.Value:
        """A small constant; integers are int64 and floats have the graph's dtype unless said otherwise."""
        array = np.asarray(value)
        if array.dtype.kind == "i":
            array = array.astype(np.int64)
        elif array.dtype.kind == "f":
            array = array.astype(NUMPY_DTYPES[dtype or self.dtype])
        key = (array.tobytes(), str(array.dtype), array.shape)
        known = self._root._constants
        if key not in known:
            known[key] = self.initializer(ir.tensor(array, name=f"const_{len(known)}"))
        return known[key]

    def to_float32(self, value: ir.Value) -> ir.Value:
        return value if self.dtype == "float32" else self.Cast(value, to=ir.DataType.FLOAT)

    def from_float32(self, value: ir.Value) -> ir.Value:
        return value if self.dtype == "float32" else self.Cast(value, to=DTYPES[self.dtype])

    def cond(
        self, condition: ir.Value, then: Callable[[Ops], ir.Value], otherwise: Callable[[Ops], ir.Value]
    ) -> ir.Value:
        """`If` with one float output; only the taken side is evaluated. Both must have the same shape."""
        return self.If(condition, then_branch=self._branch(then), else_branch=self._branch(otherwise))

    def _branch(self, body: Callable[[Ops], ir.Value]) -> ir.Graph:
        ops = Ops(self.dtype, parent=self)
        result = ops.Identity(body(ops))  # a branch must return a value of its own
        result.dtype = DTYPES[self.dtype]
        return ir.Graph([], [result], nodes=ops.nodes, name=f"branch_{next(self._root._serial)}")

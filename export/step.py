"""What all layers share in one step of the standard lowering: its inputs, and positions and masks made of them."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import onnx_ir as ir

from fasa_trt.core.spec import SAMPLE_EVERY, SAMPLE_RUN, SparseSpec
from fasa_trt.export.graph import Ops
from fasa_trt.export.plan import LayerPlan

INT64 = ir.DataType.INT64
FAR = 1e30  # score of forced tokens; its negative hides tokens and, unlike infinity, never makes a NaN


class Step:
    """Values of the outer graph, each written when it is first asked for.

    Rows are the sequences of a batch. Each owns its slots of the cache: `left_padding` unused ones, then one token a
    slot; a token's position is its slot minus the padding.
    """

    def __init__(self, ops: Ops, spec: SparseSpec) -> None:
        self._ops, self._spec = ops, spec
        self.input_ids = ir.val("input_ids", dtype=INT64, shape=["batch", "tokens"])
        self.cache_position = ir.val("cache_position", dtype=INT64, shape=["batch"])
        self.left_padding = ir.val("left_padding", dtype=INT64, shape=["batch"])
        self.logit_index = ir.val("logit_index", dtype=INT64, shape=["batch", "logit_tokens"])
        self.sparse = ir.val("sparse", dtype=ir.DataType.BOOL, shape=[])
        self.inputs = [self.input_ids, self.cache_position, self.left_padding, self.logit_index, self.sparse]
        self.any_cache: ir.Value | None = None  # one cache tensor, to read the capacity from
        self._angles: dict[tuple[bytes, bytes], tuple[ir.Value, ir.Value]] = {}
        self._masks: dict[int | None, ir.Value] = {}
        shape = ops.Shape(self.input_ids)
        self.batch_1, self.tokens_1 = (ops.Gather(shape, ops.const([axis]), axis=0) for axis in (0, 1))
        self.batch, self.tokens = ops.Squeeze(self.batch_1), ops.Squeeze(self.tokens_1)  # the same as scalars
        offsets = ops.Range(ops.const(0), self.tokens, ops.const(1))
        self._slots = ops.Add(ops.Unsqueeze(self.cache_position, ops.const([1])), offsets)  # [batch, tokens]
        self._positions = ops.Sub(self._slots, ops.Unsqueeze(self.left_padding, ops.const([1])))
        self.one_token = ops.Equal(self.tokens, ops.const(1))
        length = ops.Sub(ops.Add(self.cache_position, ops.const([1])), self.left_padding)  # after a decode step
        may_be_sparse = ops.And(self.one_token, self.sparse)
        row_sparse = ops.And(may_be_sparse, ops.Greater(length, ops.const([spec.budget])))
        self.row_sparse = ops.Reshape(row_sparse, ops.const([-1, 1, 1, 1, 1]))
        count = ops.ReduceSum(ops.Cast(row_sparse, to=INT64), keepdims=0)
        self.any_sparse = ops.Greater(count, ops.const(0))
        self.any_dense = ops.Less(count, self.batch)

    def logit_rows(self) -> ir.Value:
        """int64 [batch, logit_tokens], rows of the flat activations."""
        ops = self._ops
        starts = ops.Mul(ops.Range(ops.const(0), self.batch, ops.const(1)), self.tokens)
        return ops.Add(self.logit_index, ops.Unsqueeze(starts, ops.const([1])))

    def cos_sin(self, plan: LayerPlan) -> tuple[ir.Value, ir.Value]:
        """cos and sin [batch * kv_heads, tokens, F] in the baked order of each KV head."""
        assert plan.rotary is not None
        ops = self._ops
        inv_freq, scale = plan.rotary.inv_freq, plan.rotary.scale
        key = (inv_freq.tobytes(), scale.tobytes())
        if key not in self._angles:  # layers share the angles and differ in their order
            position = ops.Unsqueeze(ops.Cast(self._positions, to=ir.DataType.FLOAT), ops.const([2]))
            angle = ops.Mul(position, ops.const(inv_freq, "float32"))
            factor = ops.const(scale, "float32")
            cos, sin = (ops.from_float32(ops.Mul(f(angle), factor)) for f in (ops.Cos, ops.Sin))
            self._angles[key] = cos, sin
        flat = ops.Concat(ops.const([-1]), self.tokens_1, ops.const([len(inv_freq)]), axis=0)
        order = ops.const(plan.order)
        cos, sin = (
            ops.Reshape(ops.Transpose(ops.Gather(x, order, axis=2), perm=[0, 2, 1, 3]), flat) for x in self._angles[key]
        )
        return cos, sin

    @cached_property
    def _capacity(self) -> ir.Value:
        """int64 scalar."""
        assert self.any_cache is not None
        return self._ops.Squeeze(self._ops.Shape(self.any_cache, start=2, end=3))

    @cached_property
    def _slot_numbers(self) -> ir.Value:
        """int64 [capacity]."""
        return self._ops.Range(self._ops.const(0), self._capacity, self._ops.const(1))

    def mask(self, window: int | None) -> ir.Value:
        """float32 [batch, 1, 1, tokens, capacity], added to scores: 0 for slots that a new token sees, else -FAR."""
        if window not in self._masks:
            ops = self._ops
            slot = self._slot_numbers
            query = ops.Unsqueeze(self._slots, ops.const([1, 2, 4]))
            start = ops.Unsqueeze(self.left_padding, ops.const([1, 2, 3, 4]))
            seen = ops.And(ops.LessOrEqual(slot, query), ops.GreaterOrEqual(slot, start))
            if window is not None:
                seen = ops.And(seen, ops.Greater(slot, ops.Sub(query, ops.const([window]))))
            self._masks[window] = ops.Where(seen, ops.const(0.0, "float32"), ops.const(-FAR, "float32"))
        return self._masks[window]

    @cached_property
    def candidates(self) -> tuple[ir.Value, ir.Value, ir.Value]:
        """For a decode step, [batch, 1, 1, capacity]: visible slots; those that compete by score; the others' score."""
        ops = self._ops
        slot = self._slot_numbers
        start, end = (ops.Unsqueeze(x, ops.const([1, 2, 3])) for x in (self.left_padding, self.cache_position))
        visible = ops.And(ops.LessOrEqual(slot, end), ops.GreaterOrEqual(slot, start))
        is_sink = ops.Less(slot, ops.Add(start, ops.const([self._spec.sink])))
        is_recent = ops.Greater(slot, ops.Sub(end, ops.const([self._spec.recent])))
        forced = ops.And(visible, ops.Or(is_sink, is_recent))
        score = ops.Where(forced, ops.const(FAR, "float32"), ops.const(-FAR, "float32"))
        return visible, ops.And(visible, ops.Not(forced)), score

    @cached_property
    def sample(self) -> tuple[ir.Value, ir.Value]:
        """For a decode step, [batch, 1, 1, n]: slots of the tokens that `sampled` of core/reference.py takes, and
        whether each counts. n depends on the capacity alone; what a row does not fill repeats its last slot."""
        ops, period = self._ops, SAMPLE_RUN * SAMPLE_EVERY
        run = ops.const(SAMPLE_RUN)
        start, end = (ops.Unsqueeze(x, ops.const([1, 2, 3])) for x in (self.left_padding, self.cache_position))
        last_run = ops.Div(ops.Sub(end, start), run)
        last_two = ops.Add(start, ops.Mul(ops.Max(ops.Sub(last_run, ops.const(1)), ops.const(0)), run))
        periods = ops.Div(ops.Add(self._capacity, ops.const(period - 1)), ops.const(period))
        number = ops.Range(ops.const(0), ops.Mul(periods, run), ops.const(1))
        regular = ops.Add(start, ops.Add(number, ops.Mul(ops.Div(number, run), ops.const(period - SAMPLE_RUN))))
        beyond = ops.Add(end, ops.const(1))  # also for regular runs that are among the last two
        regular = ops.Where(ops.Less(regular, last_two), regular, beyond)
        slots = ops.Concat(regular, ops.Add(last_two, ops.const(np.arange(2 * SAMPLE_RUN))), axis=3)
        counts = ops.LessOrEqual(slots, end)
        return ops.Where(counts, slots, end), counts

"""The standard lowering: FASA attention in plain ONNX, for onnxruntime and for TensorRT's parser.

The cache is a set of tensors [batch, kv_heads, capacity, width] that `TensorScatter` updates in place; the label dims
of the keys are a tensor of their own, so that scoring reads them without a copy. Each row of the batch owns its slots:
`left_padding` unused ones, then one token a slot. A token's position is its slot minus the padding.

Per layer and step, rows longer than the budget take the sparse branch when one token is decoded, all others the dense
one; a branch that no row needs is not evaluated. So a row within its budget has exactly the dense result, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import onnx_ir as ir

from fasa_trt.core.spec import SparseSpec
from fasa_trt.export.decoder import Context
from fasa_trt.export.graph import DTYPES, Ops
from fasa_trt.export.plan import LayerPlan

INT64 = ir.DataType.INT64
FAR = 1e30  # score of forced tokens; its negative hides tokens and, unlike infinity, never makes a NaN


class StandardAttention:
    """Attention over a cache of fixed capacity.

    Graph inputs: input_ids int64 [batch, tokens]; cache_position int64 [batch], the slot of each row's first new
    token; left_padding int64 [batch]; logit_index int64 [batch, logit_tokens], columns whose logits are wanted;
    sparse bool [], false switches sparsity off; then the cache. Outputs: the cache again, as `present.*`.

    capacity: slots per row, or None to leave it to the runtime (onnxruntime; TensorRT needs a number).
    portable: express row gathers by GatherElements, for TensorRT's parser, instead of the cheaper GatherND.
    """

    def __init__(self, context: Context, spec: SparseSpec, *, capacity: int | None, portable: bool) -> None:
        self.context, self.spec, self.portable = context, spec, portable
        self.capacity: int | str = "capacity" if capacity is None else capacity
        checkpoint = context.checkpoint
        self.kv_heads, self.head_dim = checkpoint.num_kv_heads, checkpoint.head_dim
        self.group = checkpoint.num_heads // self.kv_heads
        self.input_ids = ir.val("input_ids", dtype=INT64, shape=["batch", "tokens"])
        self.cache_position = ir.val("cache_position", dtype=INT64, shape=["batch"])
        self.left_padding = ir.val("left_padding", dtype=INT64, shape=["batch"])
        self.logit_index = ir.val("logit_index", dtype=INT64, shape=["batch", "logit_tokens"])
        self.sparse = ir.val("sparse", dtype=ir.DataType.BOOL, shape=[])
        self._past: list[ir.Value] = []
        self._present: list[ir.Value] = []
        self._prepare(context.ops)

    @property
    def inputs(self) -> Sequence[ir.Value]:
        return [
            self.input_ids, self.cache_position, self.left_padding, self.logit_index, self.sparse, *self._past
        ]  # fmt: skip

    @property
    def outputs(self) -> Sequence[ir.Value]:
        return self._present

    def logit_rows(self) -> ir.Value:
        ops = self.context.ops
        starts = ops.Mul(ops.Range(ops.const(0), self._batch, ops.const(1)), self._tokens)
        return ops.Add(self.logit_index, ops.Unsqueeze(starts, ops.const([1])))

    def layer(self, plan: LayerPlan, qkv: ir.Value) -> ir.Value:
        ops = self.context.ops
        q, k, v = self._rotated_qkv(ops, plan, qkv)
        widths = [self.head_dim]
        if plan.sparse:
            widths = [width for width in (plan.label_dims, self.head_dim - plan.label_dims) if width]
        parts = [k] if len(widths) == 1 else list(ops.Split(k, ops.const(widths), axis=-1, outputs=2))
        names = ["key_label", "key_rest"] if plan.sparse else ["key"]
        keys = [
            self._append(ops, f"{name}.{plan.index}", part, width)
            for name, part, width in zip(names, parts, widths, strict=False)
        ]
        values = self._append(ops, f"value.{plan.index}", v, self.head_dim)
        if plan.sparse:
            dense = ops.cond(self._any_dense, lambda o: self._dense(o, plan, q, keys, values), self._zeros)
            chosen = ops.cond(self._any_sparse, lambda o: self._focused(o, plan, q, keys, values), self._zeros)
            out = ops.Where(self._row_sparse, chosen, dense)
        else:
            out = self._dense(ops, plan, q, keys, values)
        out = ops.Transpose(out, perm=[0, 3, 1, 2, 4])  # [batch, tokens, kv_heads, group, head_dim]
        return ops.Reshape(out, ops.const([-1, self.kv_heads * self.group * self.head_dim]))

    def _prepare(self, ops: Ops) -> None:
        """What all layers share: positions, masks, and which rows may be sparse."""
        shape = ops.Shape(self.input_ids)
        self._batch_1 = ops.Gather(shape, ops.const([0]), axis=0)
        self._tokens_1 = ops.Gather(shape, ops.const([1]), axis=0)
        self._batch, self._tokens = ops.Squeeze(self._batch_1), ops.Squeeze(self._tokens_1)
        self._out_shape = ops.Concat(
            self._batch_1, ops.const([self.kv_heads, self.group]), self._tokens_1, ops.const([self.head_dim]), axis=0
        )
        offsets = ops.Range(ops.const(0), self._tokens, ops.const(1))
        self._slots = ops.Add(ops.Unsqueeze(self.cache_position, ops.const([1])), offsets)  # [batch, tokens]
        self._positions = ops.Sub(self._slots, ops.Unsqueeze(self.left_padding, ops.const([1])))
        length = ops.Sub(ops.Add(self.cache_position, ops.const([1])), self.left_padding)  # of a decode step
        self._one_token = ops.Equal(self._tokens, ops.const(1))
        may_be_sparse = ops.And(self._one_token, self.sparse)
        row_sparse = ops.And(may_be_sparse, ops.Greater(length, ops.const([self.spec.budget])))
        self._row_sparse = ops.Reshape(row_sparse, ops.const([-1, 1, 1, 1, 1]))
        count = ops.ReduceSum(ops.Cast(row_sparse, to=INT64), keepdims=0)
        self._any_sparse = ops.Greater(count, ops.const(0))
        self._any_dense = ops.Less(count, self._batch)
        self._angles: dict[tuple[bytes, bytes], tuple[ir.Value, ir.Value]] = {}
        self._masks: dict[int | None, ir.Value] = {}

    def _rotated_qkv(self, ops: Ops, plan: LayerPlan, qkv: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Scaled queries [batch, kv_heads, group, tokens, d]; keys and values [batch, kv_heads, tokens, d]."""
        group, head_dim = self.group, self.head_dim
        shape = ops.Concat(self._batch_1, self._tokens_1, ops.const([self.kv_heads, group + 2, head_dim]), axis=0)
        x = ops.Reshape(qkv, shape)
        q, k, v = ops.Split(x, ops.const([group, 1, 1]), axis=3, outputs=3)
        q, k = self._head_norm(ops, plan, "q", q), self._head_norm(ops, plan, "k", k)
        x = ops.Transpose(ops.Concat(q, k, axis=3), perm=[0, 2, 3, 1, 4])
        if plan.rotary is not None:
            cos, sin = self._cos_sin(ops, plan)
            flat = ops.Concat(ops.const([-1, group + 1]), self._tokens_1, ops.const([head_dim]), axis=0)
            back = ops.Concat(
                self._batch_1, ops.const([self.kv_heads, group + 1]), self._tokens_1, ops.const([head_dim]), axis=0
            )
            x = ops.Reshape(ops.RotaryEmbedding(ops.Reshape(x, flat), cos, sin, interleaved=1), back)
        q, k = ops.Split(x, ops.const([group, 1]), axis=2, outputs=2)
        q = ops.Mul(q, ops.const(self.context.multipliers.attention))
        v = ops.Transpose(ops.Squeeze(v, ops.const([3])), perm=[0, 2, 1, 3])
        return q, ops.Squeeze(k, ops.const([2])), v

    def _head_norm(self, ops: Ops, plan: LayerPlan, which: str, x: ir.Value) -> ir.Value:
        """The q or k norm of [batch, tokens, kv_heads, heads, d] where the checkpoint has one."""
        baked = self.context.weights.head_norm(plan, which, self.context.architecture.norm_offset)
        if baked is None:
            return x
        weight, spans_heads = baked
        eps = float(self.context.checkpoint.config.rms_norm_eps)
        x = ops.to_float32(x)
        if spans_heads:
            x = ops.RMSNormalization(x, weight, axis=2, epsilon=eps)
        else:
            unit = ops.const(np.ones(self.head_dim), "float32")
            x = ops.Mul(ops.RMSNormalization(x, unit, axis=-1, epsilon=eps), weight)
        return ops.from_float32(x)

    def _cos_sin(self, ops: Ops, plan: LayerPlan) -> tuple[ir.Value, ir.Value]:
        """cos and sin [batch * kv_heads, tokens, F] in the baked order of each KV head."""
        assert plan.rotary is not None
        inv_freq, scale = plan.rotary.inv_freq, plan.rotary.scale
        key = (inv_freq.tobytes(), scale.tobytes())
        if key not in self._angles:  # layers share the angles and differ in their order
            position = ops.Unsqueeze(ops.Cast(self._positions, to=ir.DataType.FLOAT), ops.const([2]))
            angle = ops.Mul(position, ops.const(inv_freq, "float32"))
            factor = ops.const(scale, "float32")
            cos, sin = (ops.from_float32(ops.Mul(f(angle), factor)) for f in (ops.Cos, ops.Sin))
            self._angles[key] = cos, sin
        flat = ops.Concat(ops.const([-1]), self._tokens_1, ops.const([len(inv_freq)]), axis=0)
        order = ops.const(plan.order)
        cos, sin = (
            ops.Reshape(ops.Transpose(ops.Gather(x, order, axis=2), perm=[0, 2, 1, 3]), flat) for x in self._angles[key]
        )
        return cos, sin

    def _append(self, ops: Ops, name: str, new: ir.Value, width: int) -> ir.Value:
        """Writes `new` [batch, kv_heads, tokens, width] into its cache tensor and returns all of it."""
        dtype, shape = DTYPES[ops.dtype], ir.Shape(["batch", self.kv_heads, self.capacity, width])
        past = ir.val(name, dtype=dtype, shape=shape)
        present: ir.Value = ops.TensorScatter(past, new, self.cache_position, axis=2)
        present.name, present.dtype, present.shape = f"present.{name}", dtype, shape
        self._past.append(past)
        self._present.append(present)
        return present

    def _slot_numbers(self, ops: Ops) -> ir.Value:
        """int64 [capacity], made once from any cache tensor."""
        capacity = ops.Squeeze(ops.Shape(self._past[0], start=2, end=3))
        return ops.Range(ops.const(0), capacity, ops.const(1))

    def _mask(self, window: int | None) -> ir.Value:
        """float32 [batch, 1, 1, tokens, capacity], added to scores: 0 for slots that a new token sees, else -FAR."""
        if window not in self._masks:
            ops = self.context.ops
            slot = self._slot_numbers(ops)
            query = ops.Unsqueeze(self._slots, ops.const([1, 2, 4]))
            start = ops.Unsqueeze(self.left_padding, ops.const([1, 2, 3, 4]))
            seen = ops.And(ops.LessOrEqual(slot, query), ops.GreaterOrEqual(slot, start))
            if window is not None:
                seen = ops.And(seen, ops.Greater(slot, ops.Sub(query, ops.const([window]))))
            self._masks[window] = ops.Where(seen, ops.const(0.0, "float32"), ops.const(-FAR, "float32"))
        return self._masks[window]

    def _zeros(self, ops: Ops) -> ir.Value:
        return ops.Expand(ops.const(0.0), self._out_shape)

    def _dense(self, ops: Ops, plan: LayerPlan, q: ir.Value, keys: Sequence[ir.Value], values: ir.Value) -> ir.Value:
        """All visible tokens; [batch, kv_heads, group, tokens, d]."""
        mask = self._mask(plan.window)
        if plan.window is not None and not self.portable:
            keys, values, mask = self._inside_window(ops, plan.window, keys, values, mask)
        rows = ops.Reshape(q, ops.const([0, self.kv_heads, -1, self.head_dim]))
        scores = self._capped(ops, ops.to_float32(self._products(ops, plan, rows, keys)))
        split = ops.Concat(ops.const([0, self.kv_heads, self.group]), self._tokens_1, ops.const([-1]), axis=0)
        scores = ops.Add(ops.Reshape(scores, split), mask)
        merged = ops.Concat(ops.const([0, self.kv_heads, -1]), ops.Shape(scores, start=4, end=5), axis=0)
        weights = ops.from_float32(ops.Softmax(ops.Reshape(scores, merged), axis=-1))
        return ops.Reshape(ops.MatMul(weights, values), self._out_shape)

    def _products(self, ops: Ops, plan: LayerPlan, rows: ir.Value, keys: Sequence[ir.Value]) -> ir.Value:
        """rows [.., n, d] times the keys, which may lie in two parts; [.., n, capacity]."""

        def in_parts(o: Ops) -> ir.Value:
            widths = [plan.label_dims, self.head_dim - plan.label_dims]
            parts = o.Split(rows, o.const(widths), axis=-1, outputs=2)
            return o.Add(*(o.MatMul(part, _transposed(o, key)) for part, key in zip(parts, keys, strict=True)))

        def joined(o: Ops) -> ir.Value:
            return o.MatMul(rows, _transposed(o, o.Concat(*keys, axis=-1)))

        if len(keys) == 1:
            return ops.MatMul(rows, _transposed(ops, keys[0]))
        if self.portable:
            return in_parts(ops)
        # One token: a copy of the keys would cost more than the product. Many: a second pass over the scores would.
        return ops.cond(self._one_token, in_parts, joined)

    def _inside_window(
        self, ops: Ops, window: int, keys: Sequence[ir.Value], values: ir.Value, mask: ir.Value
    ) -> tuple[list[ir.Value], ir.Value, ir.Value]:
        """The slots that some token of the step can see: window + tokens of them, plus how far the rows are apart."""
        first = ops.Sub(ops.ReduceMin(self.cache_position, keepdims=1), ops.const([window - 1]))
        first = ops.Max(first, ops.const([0]))
        last = ops.Add(ops.ReduceMax(self.cache_position, keepdims=1), self._tokens_1)

        def cut(x: ir.Value, axis: int) -> ir.Value:
            return ops.Slice(x, first, last, ops.const([axis]))

        return [cut(key, 2) for key in keys], cut(values, 2), cut(mask, 4)

    def _focused(self, ops: Ops, plan: LayerPlan, q: ir.Value, keys: Sequence[ir.Value], values: ir.Value) -> ir.Value:
        """FASA: the `budget` best tokens alone; [batch, kv_heads, group, 1, d]. One new token per row."""
        if self.portable:  # TensorRT works out the shapes of both branches, whichever runs: they must fit any step
            q = ops.Slice(q, ops.const([0]), ops.const([1]), ops.const([3]))
        rows = ops.Reshape(q, ops.const([0, self.kv_heads, self.group, self.head_dim]))
        chosen = self._select(ops, plan, rows, keys[0])
        parts = [self._gather(ops, key, chosen) for key in keys]
        picked = parts[0] if len(parts) == 1 else ops.Concat(*parts, axis=-1)
        if self._token_sets > 1:
            rows = ops.Unsqueeze(rows, ops.const([3]))
        scores = self._capped(ops, ops.to_float32(ops.MatMul(rows, _transposed(ops, picked, self._token_sets > 1))))
        weights = ops.from_float32(ops.Softmax(scores, axis=-1))
        out = ops.MatMul(weights, self._gather(ops, values, chosen))
        if self.portable:
            out = ops.Reshape(out, ops.const([0, self.kv_heads, self.group, 1, self.head_dim]))
            return ops.Expand(out, self._out_shape)
        return ops.Reshape(out, self._out_shape)

    @property
    def _token_sets(self) -> int:
        """Token sets per KV head."""
        return self.group if self.spec.reduction == "per_head" else 1

    def _select(self, ops: Ops, plan: LayerPlan, rows: ir.Value, label: ir.Value) -> ir.Value:
        """int64 [batch, kv_heads, token sets, budget]: chosen slots. Ties go to the lower one, as TopK promises."""
        scored = ops.Slice(rows, ops.const([0]), ops.const([plan.label_dims]), ops.const([3]))
        if self.spec.reduction == "sum":  # the sum of the group's scores is the score of its summed query
            scored = ops.ReduceSum(scored, ops.const([2]), keepdims=1)
        scores = ops.to_float32(ops.MatMul(scored, _transposed(ops, label)))
        hidden = ops.const(-FAR, "float32")
        visible, free, forced = self._candidates
        if self.spec.reduction in ("mean_softmax", "max_softmax"):
            scores = ops.Softmax(ops.Where(visible, scores, hidden), axis=-1)
            combine = ops.ReduceMean if self.spec.reduction == "mean_softmax" else ops.ReduceMax
            scores = combine(scores, ops.const([2]), keepdims=1)
        comparable = ops.And(free, ops.Greater(scores, hidden))  # false for NaN, which ranks last
        scores = ops.Where(comparable, scores, forced)
        return ops.TopK(scores, ops.const([self.spec.budget]), axis=-1, sorted=0, outputs=2)[1]

    def _gather(self, ops: Ops, cache: ir.Value, chosen: ir.Value) -> ir.Value:
        """Rows of a cache tensor: [batch, kv_heads, (token sets,) budget, width]."""
        sets, budget = self._token_sets, self.spec.budget
        if not self.portable:
            shape = [0, self.kv_heads, budget, 1] if sets == 1 else [0, self.kv_heads, sets, budget, 1]
            return ops.GatherND(cache, ops.Reshape(chosen, ops.const(shape)), batch_dims=2)
        width = int(cache.shape[3])  # type: ignore[index,arg-type]
        index = ops.Reshape(chosen, ops.const([0, self.kv_heads, sets * budget, 1]))
        picked = ops.GatherElements(cache, ops.Expand(index, ops.const([1, 1, 1, width])), axis=2)
        return picked if sets == 1 else ops.Reshape(picked, ops.const([0, self.kv_heads, sets, budget, width]))

    @cached_property
    def _candidates(self) -> tuple[ir.Value, ir.Value, ir.Value]:
        """For a decode step, [batch, 1, 1, capacity]: visible slots; those that compete by score; the others' score."""
        ops = self.context.ops
        slot = self._slot_numbers(ops)
        start, end = (ops.Unsqueeze(x, ops.const([1, 2, 3])) for x in (self.left_padding, self.cache_position))
        visible = ops.And(ops.LessOrEqual(slot, end), ops.GreaterOrEqual(slot, start))
        is_sink = ops.Less(slot, ops.Add(start, ops.const([self.spec.sink])))
        is_recent = ops.Greater(slot, ops.Sub(end, ops.const([self.spec.recent])))
        forced = ops.And(visible, ops.Or(is_sink, is_recent))
        score = ops.Where(forced, ops.const(FAR, "float32"), ops.const(-FAR, "float32"))
        return visible, ops.And(visible, ops.Not(forced)), score

    def _capped(self, ops: Ops, scores: ir.Value) -> ir.Value:
        softcap = self.context.multipliers.attention_softcap
        if not softcap:
            return scores
        cap = ops.const(np.float32(softcap), "float32")
        return ops.Mul(ops.Tanh(ops.Div(scores, cap)), cap)


def _transposed(ops: Ops, x: ir.Value, batched: bool = False) -> ir.Value:
    """The last two axes swapped, of a tensor of rank 4 (5 when `batched`)."""
    return ops.Transpose(x, perm=[0, 1, 2, 4, 3] if batched else [0, 1, 3, 2])

"""The standard lowering: FASA attention in plain ONNX, for onnxruntime and for TensorRT's parser.

The cache is a set of tensors [batch, kv_heads, capacity, width] that `TensorScatter` updates in place; the label dims
of the keys are a tensor of their own, so that scoring reads them without a copy.

Per layer and step, rows longer than the budget take the sparse branch when one token is decoded, all others the dense
one; a branch that no row needs is not evaluated. So a row within its budget has exactly the dense result, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from fasa_trt.core.spec import SparseSpec
from fasa_trt.export.decoder import Context
from fasa_trt.export.graph import DTYPES, Ops
from fasa_trt.export.plan import LayerPlan
from fasa_trt.export.step import FAR, Step


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
        self.step = Step(context.ops, spec)
        self.input_ids = self.step.input_ids
        self._out_shape = self._shape(self.group)
        self._past: list[ir.Value] = []
        self._present: list[ir.Value] = []

    @property
    def inputs(self) -> Sequence[ir.Value]:
        return [*self.step.inputs, *self._past]

    @property
    def outputs(self) -> Sequence[ir.Value]:
        return self._present

    def logit_rows(self) -> ir.Value:
        return self.step.logit_rows()

    @property
    def logit_dims(self) -> Sequence[str]:
        return ["batch", "logit_tokens"]

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
            dense = ops.cond(self.step.any_dense, lambda o: self._dense(o, plan, q, keys, values), self._zeros)
            chosen = ops.cond(self.step.any_sparse, lambda o: self._focused(o, plan, q, keys, values), self._zeros)
            out = ops.Where(self.step.row_sparse, chosen, dense)
        else:
            out = self._dense(ops, plan, q, keys, values)
        out = ops.Transpose(out, perm=[0, 3, 1, 2, 4])  # [batch, tokens, kv_heads, group, head_dim]
        return ops.Reshape(out, ops.const([-1, self.kv_heads * self.group * self.head_dim]))

    def _rotated_qkv(self, ops: Ops, plan: LayerPlan, qkv: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Scaled queries [batch, kv_heads, group, tokens, d]; keys and values [batch, kv_heads, tokens, d]."""
        group, head_dim = self.group, self.head_dim
        shape = ops.Concat(
            self.step.batch_1, self.step.tokens_1, ops.const([self.kv_heads, group + 2, head_dim]), axis=0
        )
        x = ops.Reshape(qkv, shape)
        q, k, v = ops.Split(x, ops.const([group, 1, 1]), axis=3, outputs=3)
        q, k = self._head_norm(ops, plan, "q", q), self._head_norm(ops, plan, "k", k)
        x = ops.Transpose(ops.Concat(q, k, axis=3), perm=[0, 2, 3, 1, 4])
        if plan.rotary is not None:
            cos, sin = self.step.cos_sin(plan)
            flat = ops.Concat(ops.const([-1, group + 1]), self.step.tokens_1, ops.const([head_dim]), axis=0)
            back = self._shape(group + 1)
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

    def _append(self, ops: Ops, name: str, new: ir.Value, width: int) -> ir.Value:
        """Writes `new` [batch, kv_heads, tokens, width] into its cache tensor and returns all of it."""
        dtype, shape = DTYPES[ops.dtype], ir.Shape(["batch", self.kv_heads, self.capacity, width])
        past = ir.val(name, dtype=dtype, shape=shape)
        present: ir.Value = ops.TensorScatter(past, new, self.step.cache_position, axis=2)
        present.name, present.dtype, present.shape = f"present.{name}", dtype, shape
        self._past.append(past)
        self.step.any_cache = past
        self._present.append(present)
        return present

    def _shape(self, heads: int) -> ir.Value:
        """int64 [5] of [batch, kv_heads, heads, tokens, head_dim]."""
        ops = self.context.ops
        heads_dims = ops.const([self.kv_heads, heads])
        return ops.Concat(self.step.batch_1, heads_dims, self.step.tokens_1, ops.const([self.head_dim]), axis=0)

    def _zeros(self, ops: Ops) -> ir.Value:
        return ops.Expand(ops.const(0.0), self._out_shape)

    def _dense(self, ops: Ops, plan: LayerPlan, q: ir.Value, keys: Sequence[ir.Value], values: ir.Value) -> ir.Value:
        """All visible tokens; [batch, kv_heads, group, tokens, d]."""
        mask = self.step.mask(plan.window)
        if plan.window is not None and not self.portable:
            keys, values, mask = self._inside_window(ops, plan.window, keys, values, mask)
        rows = ops.Reshape(q, ops.const([0, self.kv_heads, -1, self.head_dim]))
        scores = self._capped(ops, ops.to_float32(self._products(ops, plan, rows, keys)))
        split = ops.Concat(ops.const([0, self.kv_heads, self.group]), self.step.tokens_1, ops.const([-1]), axis=0)
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
        return ops.cond(self.step.one_token, in_parts, joined)

    def _inside_window(
        self, ops: Ops, window: int, keys: Sequence[ir.Value], values: ir.Value, mask: ir.Value
    ) -> tuple[list[ir.Value], ir.Value, ir.Value]:
        """The slots that some token of the step can see: window + tokens of them, plus how far the rows are apart."""
        first = ops.Sub(ops.ReduceMin(self.step.cache_position, keepdims=1), ops.const([window - 1]))
        first = ops.Max(first, ops.const([0]))
        last = ops.Add(ops.ReduceMax(self.step.cache_position, keepdims=1), self.step.tokens_1)

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
            scores = ops.MatMul(scored, _transposed(ops, label))
        else:  # the large factor on the left: onnxruntime would first copy a right one into another order
            scores = _transposed(ops, ops.MatMul(label, _transposed(ops, scored)))
        scores = ops.to_float32(scores)
        hidden = ops.const(-FAR, "float32")
        visible, free, forced = self.step.candidates
        if self.spec.reduction in ("mean_softmax", "max_softmax"):
            scores = ops.Softmax(ops.Where(visible, scores, hidden), axis=-1)
            combine = ops.ReduceMean if self.spec.reduction == "mean_softmax" else ops.ReduceMax
            scores = combine(scores, ops.const([2]), keepdims=1)
        elif self.spec.reduction == "sampled_softmax":
            powers = ops.Exp(ops.Sub(scores, self._sampled_normaliser(ops, scores)))
            scores = ops.ReduceSum(powers, ops.const([2]), keepdims=1)
        comparable = ops.And(free, ops.Greater(scores, hidden))  # false for NaN, which ranks last
        if self.spec.reduction == "sampled_softmax":
            # Not in logs as in the reference: on a CPU, logarithms would take as long as the rest of this. Instead,
            # tokens that exceed a normaliser by 68 or more tie, below the forced ones.
            scores = ops.Min(scores, ops.const(FAR / 2, "float32"))
        scores = ops.Where(comparable, scores, forced)
        return ops.TopK(scores, ops.const([self.spec.budget]), axis=-1, sorted=0, outputs=2)[1]

    def _sampled_normaliser(self, ops: Ops, scores: ir.Value) -> ir.Value:
        """float32 [batch, kv_heads, group, 1]: log of the sum of exponentials of the sampled scores that are finite."""
        slots, counts = self.step.sample
        picked = ops.GatherElements(scores, ops.Expand(slots, ops.const([1, self.kv_heads, self.group, 1])), axis=3)
        finite = ops.Less(ops.Abs(picked), ops.const(FAR, "float32"))
        picked = ops.Where(ops.And(counts, finite), picked, ops.const(-FAR, "float32"))
        peak = ops.ReduceMax(picked, ops.const([3]), keepdims=1)
        total = ops.ReduceSum(ops.Exp(ops.Sub(picked, peak)), ops.const([3]), keepdims=1)
        return ops.Add(peak, ops.Log(total))

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

    def _capped(self, ops: Ops, scores: ir.Value) -> ir.Value:
        softcap = self.context.multipliers.attention_softcap
        if not softcap:
            return scores
        cap = ops.const(np.float32(softcap), "float32")
        return ops.Mul(ops.Tanh(ops.Div(scores, cap)), cap)


def _transposed(ops: Ops, x: ir.Value, batched: bool = False) -> ir.Value:
    """The last two axes swapped, of a tensor of rank 4 (5 when `batched`)."""
    return ops.Transpose(x, perm=[0, 1, 2, 4, 3] if batched else [0, 1, 3, 2])

"""The plugin lowering: one `FasaAttention` node a layer, with TensorRT-LLM's engine bindings (`core/contract.py`).

Tokens are packed, [tokens] of all sequences one after another. The node normalises and rotates queries and keys, writes
keys and values into the paged pool and attends, as `plugins/tensorrt` executes it; it knows positions from the
bindings, so the graph needs none. Everything else is opset 20, which TensorRT 10.14 parses.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from fasa_trt.core.checkpoint import Checkpoint
from fasa_trt.core.contract import FASA_INPUTS, LOGITS, EngineLimits, padded_vocab
from fasa_trt.core.errors import FasaError
from fasa_trt.core.labels import LABEL_KINDS, LabelKind
from fasa_trt.core.profile import Profile
from fasa_trt.core.spec import REDUCTION_CODES, SparseSpec
from fasa_trt.export.decoder import Context, build_decoder, new_context, rms_norm
from fasa_trt.export.graph import DTYPES, PLUGIN_OPSET
from fasa_trt.export.onnx_model import Exported, Progress, write_onnx
from fasa_trt.export.plan import LayerPlan, plan_layers
from fasa_trt.export.plugin_limits import check_kernels, pool_kv_heads
from fasa_trt.plugins.plugin_library import CREATOR

OP_TYPE, VERSION, DOMAIN = CREATOR
DENSE_AUTO = -1  # as in plugins/kernels/fasa.h
NODE_BINDINGS = (
    "sequence_length",
    "context_lengths",
    "host_context_lengths",
    "host_request_types",
    "host_past_key_value_lengths",
    "kv_cache_block_offsets",
    "host_kv_cache_pool_pointers",
    "host_kv_cache_pool_mapping",
)


class PluginAttention:
    """Attention as a node of the plugin.

    Graph inputs: `FASA_INPUTS`. No outputs besides the logits: the cache is the runtime's, in the pool.

    labels: where sparse layers find the labels of tokens; see `plugin_limits.py`. dense_below: length up to which
    sequences are attended whole even beyond the budget; DENSE_AUTO lets the kernels judge.
    """

    def __init__(
        self,
        context: Context,
        spec: SparseSpec,
        limits: EngineLimits,
        layers: Sequence[LayerPlan],
        *,
        labels: LabelKind = "prefix",
        dense_below: int = DENSE_AUTO,
    ) -> None:
        self.context, self.spec, self.limits, self.labels, self.dense_below = context, spec, limits, labels, dense_below
        checkpoint = context.checkpoint
        self.heads, self.kv_heads, self.head_dim = checkpoint.num_heads, checkpoint.num_kv_heads, checkpoint.head_dim
        self._pool_heads = pool_kv_heads(self.kv_heads, layers, labels)
        self._bindings = {
            binding.name: ir.val(
                binding.name,
                dtype=ir.DataType[binding.dtype.upper()],
                shape=ir.Shape(binding.shape_of(layers=len(layers))),
            )
            for binding in FASA_INPUTS
        }

    @property
    def inputs(self) -> Sequence[ir.Value]:
        return list(self._bindings.values())

    @property
    def outputs(self) -> Sequence[ir.Value]:
        return []

    @property
    def input_ids(self) -> ir.Value:
        return self._bindings["input_ids"]

    @property
    def logit_dims(self) -> Sequence[str]:
        return [str(LOGITS.shape[0])]

    def logit_rows(self) -> ir.Value:
        """The runtime's running sums count from 1."""
        ops = self.context.ops
        ends = ops.Cast(self._bindings["last_token_ids"], to=ir.DataType.INT64)
        return ops.Sub(ends, ops.const([1]))

    def layer(self, plan: LayerPlan, qkv: ir.Value) -> ir.Value:
        ops, group = self.context.ops, self.heads // self.kv_heads
        x = ops.Reshape(qkv, ops.const([-1, self.kv_heads, group + 2, self.head_dim]))
        parts = ops.Split(x, ops.const([group, 1, 1]), axis=2, outputs=3)
        widths = [heads * self.head_dim for heads in (self.heads, self.kv_heads, self.kv_heads)]
        q, k, v = (ops.Reshape(part, ops.const([-1, width])) for part, width in zip(parts, widths, strict=True))
        (q, q_norm), (k, k_norm) = self._norm(plan, "q", q, self.heads), self._norm(plan, "k", k, self.kv_heads)
        norms = [norm for norm in (q_norm, k_norm) if norm is not None]
        if len(norms) == 1:
            raise FasaError(f"layer {plan.index} normalises only one of queries and keys, the plugin both or neither")
        bindings = [self._bindings[name] for name in NODE_BINDINGS]
        out = ops.foreign(
            DOMAIN, OP_TYPE, q, k, v, *self._tables(plan), *bindings, *norms, **self._attributes(plan, bool(norms))
        )
        out.dtype, out.shape = DTYPES[ops.dtype], ir.Shape(["tokens", widths[0]])
        return out

    def _norm(self, plan: LayerPlan, which: str, x: ir.Value, heads: int) -> tuple[ir.Value, ir.Value | None]:
        """`x` [tokens, heads * head_dim] and the weight [heads, head_dim] of a norm over each head, for the node; a
        norm over all heads is written into the graph, before the node."""
        ops, weights, offset = self.context.ops, self.context.weights, self.context.architecture.norm_offset
        name = f"model.layers.{plan.index}.self_attn.{which}_norm.weight"
        if not weights.has(name):
            return x, None
        if self.context.checkpoint.tensor(name).shape == (self.head_dim,):
            found = weights.head_norm(plan, which, offset, shape=(heads, self.head_dim), dtype=ops.dtype)
            assert found is not None
            return x, found[0]
        found = weights.head_norm(plan, which, offset, shape=(heads * self.head_dim,))
        assert found is not None
        eps = float(self.context.checkpoint.config.rms_norm_eps)
        return ops.from_float32(rms_norm(ops, ops.to_float32(x), found[0], eps)), None

    def _tables(self, plan: LayerPlan) -> tuple[ir.Value, ir.Value]:
        """Radians per position and the factor on cos and sin, float32 [kv_heads, head_dim / 2], in baked order."""
        ops, shape = self.context.ops, (self.kv_heads, self.head_dim // 2)
        if plan.rotary is None:  # turned by 0
            return ops.const(np.zeros(shape), "float32"), ops.const(np.ones(shape), "float32")
        tables = (plan.rotary.inv_freq[plan.order], plan.rotary.scale[plan.order])
        return ops.const(tables[0], "float32"), ops.const(tables[1], "float32")

    def _attributes(self, plan: LayerPlan, has_qk_norm: bool) -> dict[str, int | float | str]:
        spec, limits, multipliers = self.spec, self.limits, self.context.multipliers
        return {
            "plugin_namespace": DOMAIN,
            "plugin_version": VERSION,
            "layer_index": plan.index,
            "num_q_heads": self.heads,
            "num_kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "tokens_per_block": limits.tokens_per_block,
            "num_layers": self._pool_heads.count(self._pool_heads[plan.index]),  # of the layer's pool
            "label_kind": LABEL_KINDS[self.labels] if plan.sparse else LABEL_KINDS["prefix"],
            "n_tip": plan.n_tip,
            "budget": spec.budget,
            "sink": spec.sink,
            "recent": spec.recent,
            "reduction": REDUCTION_CODES[spec.reduction],
            "scale": float(multipliers.attention),
            "softcap": float(multipliers.attention_softcap or 0.0),
            "window": plan.window or 0,
            "norm_eps": float(self.context.checkpoint.config.rms_norm_eps),
            "dense_below": self.dense_below,
            "has_qk_norm": int(has_qk_norm),
            "max_num_tokens": limits.max_num_tokens,
            "max_batch_size": limits.max_batch_size,
            "max_seq_len": limits.max_seq_len,
        }


def build_plugin_model(context: Context, attention: PluginAttention, layers: Sequence[LayerPlan]) -> ir.Model:
    """The whole model as ONNX, without function bodies: TensorRT's parser would prefer them to the plugin."""
    model = build_decoder(context, attention, layers)
    model.opset_imports[DOMAIN] = int(VERSION)
    return model


def export_plugin_onnx(
    checkpoint: Checkpoint,
    profile: Profile | None,
    spec: SparseSpec,
    path: Path,
    *,
    dtype: str,
    limits: EngineLimits,
    labels: LabelKind = "prefix",
    dense_below: int = DENSE_AUTO,
    progress: Progress | None = None,
) -> Exported:
    """Writes `path` and `path` + ".data" for an engine on one GPU.

    spec: resolved. dtype: float16 or bfloat16, of weights, activations and cache. Without a profile every layer is
    dense. Weights are read one at a time while they are written.

    Raises FasaError for a model or a choice that no kernel can execute, a profile of another model, or a full or
    unwritable disk.
    """
    layers = plan_layers(checkpoint, profile, spec, max_seq_len=limits.max_seq_len)
    sparse = any(plan.sparse for plan in layers)
    check_kernels(checkpoint, spec, limits, dtype=dtype, labels=labels, sparse=sparse)
    context = new_context(checkpoint, dtype, PLUGIN_OPSET)
    attention = PluginAttention(context, spec, limits, layers, labels=labels, dense_below=dense_below)
    model = build_plugin_model(context, attention, layers)
    vocab = padded_vocab(int(checkpoint.config.vocab_size))
    assert tuple(model.graph.outputs[0].shape or ()) == LOGITS.shape_of(vocab_padded=vocab)
    write_onnx(model, path, progress)
    return Exported(path, layers)

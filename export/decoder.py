"""The decoder graph, written from a config and a plan: everything but attention itself, which a lowering supplies.

Activations between layers are flat, [tokens of all sequences, hidden]; only attention tells sequences apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir

from fasa_trt.core.checkpoint import Checkpoint
from fasa_trt.core.errors import FasaError
from fasa_trt.export.architectures import Architecture, Multipliers, architecture_of, multipliers_of
from fasa_trt.export.bake import Weights
from fasa_trt.export.graph import IR_VERSIONS, OPSET, Ops
from fasa_trt.export.plan import LayerPlan

RMS_OPSET = 23  # the first with RMSNormalization


@dataclass(frozen=True)
class Context:
    """What every part of the graph needs to know of the model."""

    checkpoint: Checkpoint
    architecture: Architecture
    multipliers: Multipliers
    ops: Ops
    weights: Weights
    opset: int

    def norm(self, x: ir.Value, name: str) -> ir.Value:
        """RMS norm over the last axis, in float32 as the checkpoints were trained."""
        weight = self.weights.norm(name, self.architecture.norm_offset)
        eps = float(self.checkpoint.config.rms_norm_eps)
        ops = self.ops
        x = ops.to_float32(x)
        if self.opset < RMS_OPSET:
            return ops.from_float32(rms_norm(ops, x, weight, eps))
        return ops.from_float32(ops.RMSNormalization(x, weight, axis=-1, epsilon=eps))

    def linear(self, x: ir.Value, name: str) -> ir.Value:
        """x [rows, in] times the checkpoint's [out, in] weight, plus its bias where it has one."""
        inputs = [x, self.weights.stored(f"{name}.weight")]
        if self.weights.has(f"{name}.bias"):
            inputs.append(self.weights.stored(f"{name}.bias"))
        return self.ops.Gemm(*inputs, transB=1)

    def scaled(self, x: ir.Value, factor: float) -> ir.Value:
        return x if factor == 1.0 else self.ops.Mul(x, self.ops.const(factor))


class Attention(Protocol):
    """A lowering: how attention and its cache are expressed."""

    @property
    def inputs(self) -> Sequence[ir.Value]: ...

    @property
    def outputs(self) -> Sequence[ir.Value]: ...

    @property
    def input_ids(self) -> ir.Value: ...

    def layer(self, plan: LayerPlan, qkv: ir.Value) -> ir.Value:
        """From the fused projection [rows, Hkv*(G+2)*d] to attention's output [rows, heads*d]."""

    def logit_rows(self) -> ir.Value:
        """int64 [*logit_dims], the rows of the flat activations whose logits are wanted."""

    @property
    def logit_dims(self) -> Sequence[str]:
        """Names of the logits' dims before the vocabulary."""


def build_decoder(context: Context, attention: Attention, layers: Sequence[LayerPlan]) -> ir.Model:
    """The whole model as ONNX, its weights not yet read.

    Raises FasaError when the checkpoint lacks a tensor or uses an activation that the exporter does not know.
    """
    ops, weights, architecture = context.ops, context.weights, context.architecture
    ids = ops.Reshape(attention.input_ids, ops.const([-1]))
    x = ops.Gather(weights.stored("model.embed_tokens.weight"), ids, axis=0)
    x = context.scaled(x, context.multipliers.embedding)
    for plan in layers:
        prefix = f"model.layers.{plan.index}."

        def norm(value: ir.Value, name: str | None, prefix: str = prefix) -> ir.Value:
            return value if name is None else context.norm(value, f"{prefix}{name}.weight")

        qkv = _projection(context, plan, norm(x, architecture.attention_norm))
        y = context.linear(attention.layer(plan, qkv), f"{prefix}self_attn.o_proj")
        y = norm(y, architecture.after_attention_norm)
        x = ops.Add(x, context.scaled(y, context.multipliers.residual))
        y = _mlp(context, f"{prefix}mlp.", norm(x, architecture.mlp_norm))
        y = norm(y, architecture.after_mlp_norm)
        x = ops.Add(x, context.scaled(y, context.multipliers.residual))
    logits = _logits(context, x, attention)
    outputs = [logits, *attention.outputs]
    graph = ir.Graph(
        list(attention.inputs),
        outputs,
        nodes=ops.nodes,
        initializers=ops.initializers,
        opset_imports={"": context.opset},
        name=f"fasa_{context.checkpoint.config.model_type}",
    )
    return ir.Model(graph, ir_version=IR_VERSIONS[context.opset], producer_name="fasa-trt")


def new_context(checkpoint: Checkpoint, dtype: str, opset: int = OPSET) -> Context:
    ops = Ops(dtype)
    architecture, multipliers = architecture_of(checkpoint), multipliers_of(checkpoint)
    return Context(checkpoint, architecture, multipliers, ops, Weights(checkpoint, ops), opset)


def rms_norm(ops: Ops, x: ir.Value, weight: ir.Value, eps: float) -> ir.Value:
    """RMS norm of a float32 `x` over its last axis, for opsets without RMSNormalization."""
    mean = ops.ReduceMean(ops.Mul(x, x), ops.const([-1]), keepdims=1)
    root = ops.Sqrt(ops.Add(mean, ops.const(eps, "float32")))
    return ops.Mul(ops.Div(x, root), weight)


def _projection(context: Context, plan: LayerPlan, x: ir.Value) -> ir.Value:
    weight, bias = context.weights.qkv(plan, "weight"), context.weights.qkv(plan, "bias")
    return context.ops.Gemm(x, weight, *([] if bias is None else [bias]), transB=1)


def _mlp(context: Context, prefix: str, x: ir.Value) -> ir.Value:
    ops = context.ops
    if context.weights.has(f"{prefix}gate_up_proj.weight"):
        gate, up = ops.Split(context.linear(x, f"{prefix}gate_up_proj"), axis=-1, num_outputs=2, outputs=2)
    else:
        gate, up = context.linear(x, f"{prefix}gate_proj"), context.linear(x, f"{prefix}up_proj")
    return context.linear(ops.Mul(_activation(context, gate), up), f"{prefix}down_proj")


def _activation(context: Context, x: ir.Value) -> ir.Value:
    ops, name = context.ops, context.multipliers.activation
    match name:
        case "silu" | "swish":
            return ops.Mul(x, ops.Sigmoid(x))
        case "gelu_pytorch_tanh":
            return ops.Gelu(x, approximate="tanh")
        case "gelu":
            return ops.Gelu(x)
    raise FasaError(f"activation {name!r} is not supported", hint="supported: silu, gelu, gelu_pytorch_tanh")


def _logits(context: Context, x: ir.Value, attention: Attention) -> ir.Value:
    """Logits float32 [*logit_dims, vocab] of the chosen rows alone."""
    ops, config, rows = context.ops, context.checkpoint.config, attention.logit_rows()
    flat = ops.Gather(x, ops.Reshape(rows, ops.const([-1])), axis=0)
    flat = context.norm(flat, "model.norm.weight")
    tied = config.tie_word_embeddings or not context.weights.has("lm_head.weight")
    logits = context.linear(flat, "model.embed_tokens" if tied else "lm_head")
    logits = context.scaled(logits, context.multipliers.logits)
    softcap = context.multipliers.logits_softcap
    if softcap:
        cap = ops.const(np.float32(softcap))
        logits = ops.Mul(ops.Tanh(ops.Div(logits, cap)), cap)
    shape = ops.Concat(ops.Shape(rows), ops.const([int(config.vocab_size)]), axis=0)
    result: ir.Value = ops.Reshape(ops.to_float32(logits), shape)
    result.name, result.dtype = "logits", ir.DataType.FLOAT
    result.shape = ir.Shape([*attention.logit_dims, int(config.vocab_size)])
    return result

"""Engines made from random checkpoints, and the model that they must agree with."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.masking_utils import eager_mask

from fasa_trt.core.checkpoint import Checkpoint, open_checkpoint
from fasa_trt.core.engine_dir import EngineDirectory
from fasa_trt.core.profile import Profile
from fasa_trt.core.reference import decode, importance, select
from fasa_trt.core.spec import SparseSpec
from fasa_trt.export.onnx_model import export_onnx
from fasa_trt.export.plan import LayerPlan
from fasa_trt.runtime.onnxruntime import OnnxRuntimeBackend
from tests.models import make_model

MAX_SEQ_LEN = 128
Array = NDArray[Any]


def random_profile(checkpoint: Checkpoint, seed: int = 0) -> Profile:
    """A profile whose rankings are random and differ between KV heads and layers."""
    rng = np.random.default_rng(seed)
    shape = (checkpoint.num_layers, checkpoint.num_heads, checkpoint.head_dim // 2)
    return Profile(
        agreement=rng.random((1, *shape), np.float32),
        spread=rng.random(shape, np.float32),
        ks=(64,),
        num_kv_heads=checkpoint.num_kv_heads,
        fingerprint=checkpoint.fingerprint,
    )


@dataclass
class Planned:
    """A random model: its checkpoint, what was planned for its export, and transformers' model."""

    checkpoint: Checkpoint
    layers: list[LayerPlan]
    spec: SparseSpec
    model: Any

    def logits(self, tokens: Array) -> Array:
        """transformers' logits [B, T, vocab] of whole sequences."""
        with torch.no_grad():
            result: Array = self.model(torch.from_numpy(tokens)).logits.numpy()
        return result


@dataclass
class Exported(Planned):
    """The same, exported."""

    backend: OnnxRuntimeBackend


def backend_of(
    directory: Path, work: Path, spec: SparseSpec, *, with_profile: bool = True, seed: int = 0
) -> tuple[Checkpoint, list[LayerPlan], OnnxRuntimeBackend]:
    """Exports the checkpoint `directory` into `work`, in float32 and with a random profile or none."""
    checkpoint = open_checkpoint(directory)
    spec = spec.resolve(head_dim=checkpoint.head_dim, num_layers=checkpoint.num_layers, max_seq_len=MAX_SEQ_LEN)
    profile = random_profile(checkpoint, seed) if with_profile else None
    path = work / "model.onnx"
    exported = export_onnx(checkpoint, profile, spec, path, dtype="float32", max_seq_len=MAX_SEQ_LEN)
    engine = EngineDirectory(
        work,
        {
            "pretrained_config": {"dtype": "float32"},
            "build_config": {"max_seq_len": MAX_SEQ_LEN, "max_batch_size": 8},
            "fasa": {"target": "onnxruntime", "model_file": path.name, "sparse": spec.to_json()},
        },
        {},
    )
    return checkpoint, exported.layers, OnnxRuntimeBackend(engine, threads=1)


def export(
    variant: str, work: Path, spec: SparseSpec, *, with_profile: bool = True, seed: int = 0, **overrides: Any
) -> Exported:
    """Makes a random checkpoint of `variant`, exports it and loads both sides."""
    directory = make_model(variant, work / "checkpoint", seed=seed, **overrides)
    checkpoint, layers, backend = backend_of(directory, work, spec, with_profile=with_profile, seed=seed)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    return Exported(checkpoint, layers, spec, model, backend)


def reference_steps(exported: Exported, tokens: Array, start: int) -> tuple[Array, Array]:
    """What sparse decode should give: logits [B, T - start, vocab] after a dense prefill of `start` columns, and bool
    [B, T - start], false from the step on where a row met scores so close that float32 may choose otherwise."""
    steps, comparable = [], []
    fine = np.ones(len(tokens), bool)
    with torch.no_grad(), fasa_reference(exported) as near_ties:
        past = exported.model(torch.from_numpy(tokens[:, :start]), use_cache=True).past_key_values
        for t in range(start, tokens.shape[1]):
            out = exported.model(torch.from_numpy(tokens[:, t : t + 1]), past_key_values=past)
            steps.append(out.logits.numpy())
            fine = fine & ~np.isin(np.arange(len(tokens)), list(near_ties))
            comparable.append(fine)
    return np.concatenate(steps, axis=1), np.stack(comparable, axis=1)


@contextlib.contextmanager
def fasa_reference(exported: Exported) -> Iterator[set[int]]:
    """Makes the transformers model decode with `core/reference.py`; steps of more than one token stay dense.

    Yields the rows of the batch that met a near tie so far.
    """
    model, layers, spec = exported.model, exported.layers, exported.spec
    near_ties: set[int] = set()

    def attention(
        module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, softcap: Any = None, **rest: Any
    ) -> tuple[Any, None]:
        plan = layers[module.layer_idx]
        if query.shape[2] > 1 or not plan.sparse:
            eager = sys.modules[type(module).__module__].eager_attention_forward
            if softcap is not None:
                rest["softcap"] = softcap
            return eager(module, query, key, value, mask, scaling=scaling, **rest)[0], None
        dims = plan.dims()
        assert dims is not None
        batch, heads, _, head_dim = query.shape
        kv_heads = key.shape[1]
        q = query.double().numpy().reshape(batch, kv_heads, heads // kv_heads, head_dim)
        k, v = key.double().numpy(), value.double().numpy()
        out = np.empty_like(q)
        for b, g in np.ndindex(batch, kv_heads):
            label = dims[g, : plan.label_dims]
            out[b, g] = decode(q[b, g], k[b, g], v[b, g], label, spec, scaling, softcap)
            if len(k[b, g]) > spec.budget and has_near_tie(q[b, g], k[b, g], label, spec, scaling):
                near_ties.add(b)
        return torch.from_numpy(out.reshape(batch, 1, heads, head_dim)).to(query.dtype), None

    AttentionInterface.register("fasa_reference", attention)
    AttentionMaskInterface.register("fasa_reference", eager_mask)
    previous = model.config._attn_implementation
    model.config._attn_implementation = "fasa_reference"
    try:
        yield near_ties
    finally:
        model.config._attn_implementation = previous


def has_near_tie(q: Array, k: Array, dims: Array, spec: SparseSpec, scale: float) -> bool:
    """Whether the last chosen and the first rejected token differ by no more than float32 rounding."""
    for scores in importance(q, k, dims, scale, spec.reduction):
        chosen = select(scores[None], spec.budget, spec.sink, spec.recent)[0]
        free = chosen[(chosen >= spec.sink) & (chosen < len(k) - spec.recent)]
        rejected = np.setdiff1d(np.arange(len(k)), chosen)
        if len(free) and scores[free].min() - scores[rejected].max() < 1e-5 * np.abs(scores).max():
            return True
    return False


def prefill(backend: OnnxRuntimeBackend, tokens: Array, *, chunk: int = 1 << 20, sparse: bool = True) -> Array:
    """Starts over, feeds tokens [B, T] in chunks and returns logits [B, T, vocab]."""
    batch, length = tokens.shape
    backend.allocate(batch)
    zero = np.zeros(batch, np.int64)
    parts = []
    for start in range(0, length, chunk):
        piece = tokens[:, start : start + chunk]
        every = np.tile(np.arange(piece.shape[1]), (batch, 1))
        parts.append(backend.step(piece, zero + start, zero, every, sparse=sparse))
    return np.concatenate(parts, axis=1)


def decode_steps(backend: OnnxRuntimeBackend, tokens: Array, start: int, *, sparse: bool = True) -> Array:
    """Feeds columns start.. of tokens [B, T] one at a time; logits [B, T - start, vocab]."""
    batch, length = tokens.shape
    zero = np.zeros(batch, np.int64)
    last = np.zeros((batch, 1), np.int64)
    steps = [backend.step(tokens[:, t : t + 1], zero + t, zero, last, sparse=sparse) for t in range(start, length)]
    return np.concatenate(steps, axis=1)


def relative(got: Array, wanted: Array) -> float:
    """Largest difference, relative to the largest wanted value."""
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())

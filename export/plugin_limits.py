"""What the CUDA kernels can execute (`plugins/kernels/fasa.h`), checked before anything is exported for them.

Labels, by which a decode step scores the cached tokens, are read from the first dims of the key rows ("prefix"), or
from quantised copies. TensorRT-LLM has no place for the copies but the pool itself, so a sparse layer then declares one
KV head more, its *label head*: of each token, the K row holds the labels of all KV heads, the V row their scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from fasa_trt.core.checkpoint import Checkpoint
from fasa_trt.core.contract import EngineLimits
from fasa_trt.core.errors import FasaError
from fasa_trt.core.labels import SCALE_BYTES, LabelKind, label_bytes
from fasa_trt.core.spec import SparseSpec, usual_n_tip
from fasa_trt.export.plan import LayerPlan

READABLE: tuple[LabelKind, ...] = get_args(LabelKind)  # by the plugin
DTYPES = ("float16", "bfloat16")
ITEM_BYTES = 2  # of both
HEAD_DIMS = (64, 96, 128, 256)
N_TIPS = (8, 16, 24, 32, 48, 64)
BUDGETS = (16, 4096)
MAX_SPARSE_HEADS, MAX_KV_HEADS, MAX_GROUP = 128, 32, 16
MAX_ELEMENTS = 1 << 32  # of a step's queries, exclusive


def nearest_n_tip(n_tip: int, head_dim: int) -> int:
    """The count of frequency chunks closest to `n_tip` that a kernel has; the larger of two that are equally close."""
    possible = [known for known in N_TIPS if 2 * known <= head_dim]
    return min(possible, key=lambda known: (abs(known - n_tip), -known))


def default_labels(num_kv_heads: int, head_dim: int, n_tip: int | None) -> LabelKind:
    """4-bit labels where the plugin reads them and those of `n_tip` chunks (None: the default) fit into a label head;
    else the prefix of the keys."""
    chosen = _wanted_n_tip("int4", head_dim) if n_tip is None else n_tip
    return "int4" if "int4" in READABLE and fits_label_head("int4", chosen, num_kv_heads, head_dim) else "prefix"


def default_n_tip(labels: LabelKind, num_kv_heads: int, head_dim: int) -> int:
    """3/8 of the chunks of a prefix (24 with head_dim 128); of quantised labels, which are smaller, half of them (32),
    or as many as fit into a label head."""
    wanted = _wanted_n_tip(labels, head_dim)
    if labels == "prefix":
        return wanted
    return max(
        (n for n in N_TIPS if n <= wanted and fits_label_head(labels, n, num_kv_heads, head_dim)), default=wanted
    )


def _wanted_n_tip(labels: LabelKind, head_dim: int) -> int:
    return nearest_n_tip(usual_n_tip(head_dim, quantised=labels != "prefix"), head_dim)


def pool_kv_heads(num_kv_heads: int, layers: Sequence[LayerPlan], labels: LabelKind) -> list[int]:
    """KV heads that each layer has in the pool, its label head included."""
    return [num_kv_heads + (labels != "prefix" and plan.sparse) for plan in layers]


def fits_label_head(labels: LabelKind, n_tip: int, num_kv_heads: int, head_dim: int) -> bool:
    """Whether the labels, and the scales, of a token's KV heads fit into one row of `head_dim` 16-bit elements."""
    row = head_dim * ITEM_BYTES
    return num_kv_heads * max(label_bytes(labels, n_tip), SCALE_BYTES) <= row


def check_kernels(
    checkpoint: Checkpoint, spec: SparseSpec, limits: EngineLimits, *, dtype: str, labels: LabelKind, sparse: bool
) -> None:
    """Raises FasaError when the kernels cannot execute the model or the choice. sparse: whether any layer is."""
    if dtype not in DTYPES:
        raise FasaError(f"the plugin does not compute in {dtype}", hint=f"--dtype {' or '.join(DTYPES)}")
    if labels not in READABLE:
        raise FasaError(f"the plugin does not read {labels} labels", hint=f"it reads {', '.join(READABLE)}")
    heads, kv_heads, head_dim = checkpoint.num_heads, checkpoint.num_kv_heads, checkpoint.head_dim
    otherwise = "build for onnxruntime instead"
    if head_dim not in HEAD_DIMS:
        known = ", ".join(map(str, HEAD_DIMS))
        raise FasaError(f"the plugin has no kernel for heads of {head_dim} dims", hint=f"it has {known}; {otherwise}")
    if kv_heads > MAX_KV_HEADS or heads > MAX_GROUP * kv_heads or (sparse and heads > MAX_SPARSE_HEADS):
        raise FasaError(
            f"the plugin has no kernel for {heads} query heads and {kv_heads} KV heads",
            hint=f"at most {MAX_SPARSE_HEADS} and {MAX_KV_HEADS}, and {MAX_GROUP} query heads a KV head; {otherwise}",
        )
    if limits.max_num_tokens * heads * head_dim >= MAX_ELEMENTS:
        most = (MAX_ELEMENTS - 1) // (heads * head_dim)
        raise FasaError(
            f"max_num_tokens {limits.max_num_tokens} is more than the plugin can address", hint=f"at most {most}"
        )
    if sparse:
        _check_sparse(spec, kv_heads, head_dim, labels)


def _check_sparse(spec: SparseSpec, kv_heads: int, head_dim: int, labels: LabelKind) -> None:
    assert spec.n_tip is not None
    if spec.n_tip not in N_TIPS:  # `SparseSpec.resolve` has seen to it that the heads have so many chunks
        raise FasaError(
            f"the plugin has no kernel for n-tip {spec.n_tip}", hint=f"--n-tip {nearest_n_tip(spec.n_tip, head_dim)}"
        )
    lowest, highest = BUDGETS
    if not lowest <= spec.budget <= highest:
        raise FasaError(f"the plugin cannot attend to {spec.budget} tokens", hint=f"a budget of {lowest} to {highest}")
    if labels != "prefix" and not fits_label_head(labels, spec.n_tip, kv_heads, head_dim):
        needed = kv_heads * label_bytes(labels, spec.n_tip)
        raise FasaError(
            f"{labels} labels of {kv_heads} KV heads take {needed} bytes a token, a label head has "
            f"{head_dim * ITEM_BYTES}",
            hint="lower --n-tip, or use prefix labels",
        )

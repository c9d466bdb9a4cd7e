"""Makes a transformers model decode with FASA."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from fasa_trt.calibrate.load import load_model, resolve_device, resolve_dtype
from fasa_trt.core.checkpoint import Checkpoint, open_checkpoint
from fasa_trt.core.errors import FasaError
from fasa_trt.core.profile import Profile
from fasa_trt.core.spec import Reduction, Rule, SparseSpec
from fasa_trt.export.architectures import architecture_of
from fasa_trt.export.plan import plan_layers
from fasa_trt.runtime.torch.attention import NAME, prepare
from fasa_trt.runtime.torch.cache import FasaCache, FasaLayer, LayerSettings

LABELS = ("int4", "int8", "fp8", "prefix")
# What the CUDA kernels take: plugins/kernels/fasa.h.
KERNEL_HEAD_DIMS = (64, 96, 128, 256)
KERNEL_N_TIPS = (8, 16, 24, 32, 48, 64)
KERNEL_BUDGETS = (16, 4096)
KERNEL_GROUP = 16
HANDLE = "_fasa_hook"  # on a model: (hook handle, attention implementation before)


def load_fasa(
    model: str | Path | PreTrainedModel,
    profile: Profile | str | Path,
    *,
    budget: int = 256,
    n_tip: int | None = None,
    reduction: Reduction = SparseSpec.reduction,
    rule: Rule = "spread",
    sink: int = 4,
    recent: int = 32,
    dense_layers: Sequence[int] = SparseSpec.dense_layers,
    labels: str = "int4",
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A model whose `generate` and `forward` attend densely in prefill and with FASA in steps of one token.

    model: checkpoint directory, hub ID, or a loaded model, which is changed in place; once more with other settings
    is fine. profile: of `fasa-trt calibrate`, for the same checkpoint. n_tip: None takes half of the chunks (3/8 for
    labels="prefix"). labels: int4, int8, fp8 or prefix, what the CUDA kernels score
    with; on a CPU the reference runs, which scores with the keys themselves. device: auto, cpu, cuda or cuda:N.
    dtype: auto is float32 on a CPU, else the checkpoint's. Batches are padded on the left.

    Raises FasaError for an unsupported architecture, a profile of another model, settings that are out of range, or
    what no CUDA kernel takes.
    """
    spec = SparseSpec(budget, n_tip, reduction, rule, sink, recent, tuple(dense_layers))
    if labels not in LABELS:
        raise FasaError(f"unknown labels {labels!r}", hint=f"one of {', '.join(LABELS)}")
    loaded = isinstance(model, PreTrainedModel)
    checkpoint = open_checkpoint(_source(model), trust_remote_code=trust_remote_code)
    architecture_of(checkpoint)
    measured = profile if isinstance(profile, Profile) else Profile.load(Path(profile))
    limit = int(checkpoint.config.max_position_embeddings)
    spec = spec.resolve(
        head_dim=checkpoint.head_dim,
        num_layers=checkpoint.num_layers,
        max_seq_len=limit,
        quantised=labels != "prefix",
    )
    plans = plan_layers(checkpoint, measured, spec, max_seq_len=limit)
    if loaded:
        found: Any = model
        unload_fasa(found)
    else:
        place = resolve_device(device)
        as_dtype = resolve_dtype(dtype, place, checkpoint)
        found = load_model(checkpoint, device=place, dtype=as_dtype, trust_remote_code=trust_remote_code)
    if not found.is_backend_compatible():
        raise FasaError(f"{type(found).__name__} does not call transformers' attention interface")
    kind: type[FasaLayer]
    if found.device.type == "cpu":
        from fasa_trt.runtime.torch.reference import ReferenceLayer as kind
    else:
        _check_kernels(checkpoint, spec, labels, found.device, found.dtype)
        from fasa_trt.runtime.torch.paged import PagedLayer as kind
    settings = [LayerSettings(plan, spec, labels) for plan in plans]
    hook = prepare(lambda: FasaCache([kind(layer) for layer in settings]))
    before = found.config._attn_implementation
    handle = found.get_decoder().register_forward_pre_hook(hook, with_kwargs=True)
    found.set_attn_implementation(NAME)
    setattr(found, HANDLE, (handle, before))
    return found.eval()


def unload_fasa(model: PreTrainedModel) -> None:
    """Gives a model the attention back that it had before `load_fasa`; without effect on others."""
    known = getattr(model, HANDLE, None)
    if known is not None:
        handle, before = known
        handle.remove()
        model.set_attn_implementation(before)
        delattr(model, HANDLE)


def _source(model: str | Path | PreTrainedModel) -> str | Path:
    if not isinstance(model, PreTrainedModel):
        return model
    if not model.name_or_path:
        raise FasaError(
            "this model does not say which checkpoint it is from, so no profile can be checked against it",
            hint="pass the checkpoint's directory",
        )
    return str(model.name_or_path)


def _check_kernels(
    checkpoint: Checkpoint, spec: SparseSpec, labels: str, device: torch.device, dtype: torch.dtype
) -> None:
    """Raises FasaError for what the CUDA kernels do not take."""
    head_dim, group = checkpoint.head_dim, checkpoint.num_heads // checkpoint.num_kv_heads
    if device.type != "cuda":
        raise FasaError(f"FASA has no kernels for {device}", hint="--device cuda or cpu")
    if dtype not in (torch.float16, torch.bfloat16):
        raise FasaError(f"the CUDA kernels have no {dtype}", hint="load the model in bfloat16 or float16")
    if head_dim not in KERNEL_HEAD_DIMS:
        raise FasaError(f"the CUDA kernels have no head_dim {head_dim}", hint=f"one of {KERNEL_HEAD_DIMS}; or a CPU")
    if spec.n_tip not in KERNEL_N_TIPS:
        raise FasaError(f"the CUDA kernels have no n_tip {spec.n_tip}", hint=f"one of {KERNEL_N_TIPS}")
    low, high = KERNEL_BUDGETS
    if not low <= spec.budget <= high:
        raise FasaError(f"the CUDA kernels have no budget of {spec.budget}", hint=f"{low} to {high}")
    if group > KERNEL_GROUP:
        raise FasaError(f"{group} query heads share a KV head, the CUDA kernels take {KERNEL_GROUP} at most")

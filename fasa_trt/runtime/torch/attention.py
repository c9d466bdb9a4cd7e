"""`attn_implementation="fasa"`: the function that transformers calls for every layer, and the hook that feeds it.

The model's decoder passes keyword arguments on to the attention function, so the hook adds the cache there: nothing
is kept between forward passes but what the caller holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache

from fasa_trt.core.errors import FasaError
from fasa_trt.runtime.torch.cache import FasaCache

NAME = "fasa"
POSITIONAL = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds")


def fasa_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    fasa_cache: FasaCache | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [B, Hq, T, d] and this pass's key, value [B, Hkv, T, d] after RoPE.

    Returns [B, T, Hq, d] and no weights. Masks and windows follow from the cache, so attention_mask is not looked at.
    Raises FasaError in models that `load_fasa` did not prepare.
    """
    if fasa_cache is None:
        raise FasaError('attn_implementation="fasa" needs a profile', hint="load the model with load_fasa")
    if module.training:
        raise FasaError("FASA attention has no gradients", hint="model.eval()")
    layer = fasa_cache.layers[module.layer_idx]
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    with torch.no_grad():
        return layer.attend(query, key, value, fasa_cache.step, scale, float(softcap or 0.0)), None


AttentionInterface.register(NAME, fasa_attention)


def prepare(make_cache: Callable[[], FasaCache]) -> Callable[..., Any]:
    """A forward pre-hook (with keyword arguments) for the decoder: the pass gets a FASA cache, and begins on it."""

    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = {**dict(zip(POSITIONAL, args, strict=False)), **kwargs}
        tokens = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        if tokens is None:
            raise FasaError("a forward pass needs input_ids or inputs_embeds")
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, FasaCache):
            # `generate` starts every prompt with an empty DynamicCache of its own.
            if cache is not None and not (isinstance(cache, DynamicCache) and cache.get_seq_length() == 0):
                raise FasaError(
                    f"a FASA model keeps its own cache and cannot go on with a {type(cache).__name__}",
                    hint="leave out past_key_values and cache_implementation",
                )
            cache = make_cache()
        cache.begin(tokens.shape[0], tokens.shape[1], kwargs.get("attention_mask"))
        return (), {**kwargs, "past_key_values": cache, "fasa_cache": cache}

    return hook

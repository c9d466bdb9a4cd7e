"""Reads queries and keys after RoPE out of a running transformers model.

Every decoder of transformers hands its rotated queries and keys to a function that it looks up by name in
`ALL_ATTENTION_FUNCTIONS`. Inside `capture` that name stands for a function which shows them to an observer and then
calls the one that was there, so nothing here depends on an architecture or on an attention implementation.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fasa_trt.core.errors import FasaError

Observer: TypeAlias = Callable[[int, Tensor, Tensor, float], None]
"""Called as observer(layer, q, k, scale): q [batch, heads, length, d] and k [batch, kv_heads, length, d] after RoPE
in the model's dtype, views that the model goes on to use; scale is the factor on q k^T."""


@contextlib.contextmanager
def capture(model: PreTrainedModel, observe: Observer, *, last_layer: int | None = None) -> Iterator[None]:
    """Shows the queries and keys of every attention call of `model` to `observe` until the block ends.

    last_layer: its attention is answered with zeros, for callers that want no hidden states, only q and k.
    Other models that run meanwhile are left alone. Raises FasaError when the model has attention code of its own.
    """
    if not model.is_backend_compatible():
        raise FasaError(
            f"cannot read queries and keys from {type(model).__name__}: it does not call transformers' attention "
            "interface",
            hint="use an architecture that does, such as Llama, Mistral, Qwen, Phi-3 or Gemma",
        )
    name = model.config._attn_implementation
    original = ALL_ATTENTION_FUNCTIONS.get(name)  # None for eager, which each modeling file defines for itself
    own = set(model.modules())

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if module in own:
            scale = kwargs.get("scaling")
            observe(module.layer_idx, query, key, query.shape[-1] ** -0.5 if scale is None else float(scale))
            if module.layer_idx == last_layer:
                batch, heads, length, _ = query.shape
                return query.new_zeros(batch, length, heads, value.shape[-1]), None
        function = original or sys.modules[type(module).__module__].eager_attention_forward
        return function(module, query, key, value, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS[name] = attention
    try:
        with torch.inference_mode():
            yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]  # uncovers what transformers registered
        if ALL_ATTENTION_FUNCTIONS.get(name) is not original:
            ALL_ATTENTION_FUNCTIONS[name] = original

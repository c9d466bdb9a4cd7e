"""The cache that transformers hands through a FASA model, and what each of its layers has to offer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from fasa_trt.core.errors import FasaError
from fasa_trt.core.spec import SparseSpec
from fasa_trt.export.plan import LayerPlan
from fasa_trt.runtime.torch.step import Step, padding_of


@dataclass(frozen=True)
class LayerSettings:
    """plan: chunk order, sparsity and window of a layer. spec: resolved. labels: of the CUDA kernels' label cache."""

    plan: LayerPlan
    spec: SparseSpec
    labels: str


class FasaLayer(CacheLayerMixin):
    """One layer's keys and values, and attention over them: the cache and the kernels share a layout."""

    is_sliding = False  # a window is the attention's business: all tokens are kept

    def __init__(self, settings: LayerSettings) -> None:
        super().__init__()
        self.settings = settings
        self.length = 0  # columns, padding included

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: Step, scale: float, softcap: float) -> Tensor:
        """Caches k, v [batch, kv_heads, columns, head_dim] and attends with q [batch, heads, columns, head_dim], all
        after RoPE: sparsely for a step of one column of a sparse layer, else to all, causally. softcap: 0 for none.
        Returns [batch, columns, heads, head_dim]; rows of padding hold anything finite."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values as they are: `attend` caches them, when it knows what is padding."""
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in transformers 5.0

    def reset(self) -> None:
        self.length = 0

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise FasaError(
            "this cache cannot be reordered, cropped or offloaded",
            hint="FASA models generate greedily or by sampling: no beam search, no assistant model",
        )

    reorder_cache = crop = batch_repeat_interleave = batch_select_indices = offload = prefetch = _refuse
    is_croppable = False


class FasaCache(Cache):
    """Keys and values of all layers. `step` is the forward pass that is under way."""

    step: Step

    def __init__(self, layers: Sequence[FasaLayer]) -> None:
        super().__init__(layers=list(layers))
        self._padding: NDArray[np.int64] | None = None

    def begin(self, batch: int, columns: int, mask: Tensor | None) -> None:
        """Starts a forward pass of `columns` tokens a row. mask: [batch, cached + columns] or None, 0 for padding.

        Raises FasaError for padding that is not on the left, or another batch than the cached one.
        """
        past = self.get_seq_length()
        if self._padding is None or past == 0:
            padding = padding_of(mask, batch, columns)
        elif len(self._padding) != batch:
            raise FasaError(f"the cache holds {len(self._padding)} sequences, this pass has {batch}")
        elif columns == 1 and (mask is None or tuple(mask.shape) == (batch, past + 1)):
            padding = self._padding  # reading the mask would wait for the GPU in every step
        else:
            padding = self._padding if mask is None else padding_of(mask, batch, past + columns)
            if (np.minimum(padding, past) != np.minimum(self._padding, past)).any():
                raise FasaError("attention_mask changes the padding of tokens that are cached already")
        self._padding = padding
        self.step = Step(columns, past, padding)
        if columns == 1 and (self.step.lengths < 1).any():
            raise FasaError("a row of the batch has padding only", hint="give every row a token")

"""FASA with chunks drawn at random: what calibration is worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from fasa_trt.evaluation.methods.base import Layers, Selector
from fasa_trt.evaluation.methods.fasa import Fasa, FasaSelector


@dataclass(frozen=True, kw_only=True)
class RandomChunks(Fasa):
    """seed: of the draw, which differs from layer to layer and KV head to KV head."""

    name: ClassVar[str] = "random"
    summary: ClassVar[str] = "FASA with random frequency chunks"
    uses_profile: ClassVar[bool] = False

    seed: int = 0

    def selector(self, layers: Layers, layer: int) -> Selector | None:
        spec = self.resolved(layers)
        rotary = layers.rotary(layer)
        rng = np.random.default_rng((self.seed, layer))
        rows = [rng.permutation(rotary.num_chunks)[: spec.n_tip] for _ in range(layers.num_kv_heads)]
        dims = torch.as_tensor(rotary.pairs[np.stack(rows)].reshape(len(rows), -1), device=layers.device)
        return FasaSelector(dims, spec, self.labels)

"""What a calibration leaves behind: the profile, and the measurements that its report is made of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fasa_trt.core.profile import Profile
from fasa_trt.core.rope import Rotary
from fasa_trt.core.spec import SparseSpec

WEAK_SKILL = 0.2
"""A KV head is weak when its chosen chunks go less than this far from guessing (0) to finding every key (1)."""


@dataclass(frozen=True)
class Calibration:
    """A profile, and what to tell about it.

    agreement: float32 [samples, len(ks), layers, heads, F]; spread: float32 [samples, layers, heads, F]. The profile
        holds their means over samples. Layers without RoPE have zeros.
    rotary: of each layer with RoPE. keys: how many keys its queries see.
    n_tip: an engine's default number of dominant chunks, the size of the sets that `held_out` is about.
    held_out: per rule float32 [len(ks), layers, heads]: agreement, on the last sample, of the sets of chunks that the
        other samples choose, one for each KV head. With one sample it chooses for itself.
    remarks: what the user should know, one sentence each.
    """

    profile: Profile
    agreement: NDArray[np.float32]
    spread: NDArray[np.float32]
    rotary: dict[int, Rotary]
    keys: dict[int, int]
    n_tip: int
    held_out: dict[str, NDArray[np.float32]]
    remarks: tuple[str, ...] = ()

    @property
    def at_budget(self) -> int:
        """Index of the K nearest to an engine's default budget."""
        return self.profile.nearest_k(SparseSpec().budget)

    @property
    def k(self) -> int:
        return self.profile.ks[self.at_budget]

    def found(self, rule: str) -> NDArray[np.float32]:
        """`held_out` at that K, mean over each KV head's query heads: float32 [layers, kv_heads]."""
        table = self.held_out[rule][self.at_budget]
        grouped: NDArray[np.float32] = table.reshape(len(table), self.profile.num_kv_heads, -1).mean(axis=-1)
        return grouped

    def stability(self) -> NDArray[np.float64] | None:
        """Share of the chosen chunks that two samples have in common: [layers], or None for a single sample.

        By the default rule; mean over pairs of samples and KV heads. Sets chosen at random share n_tip / F.
        """
        samples, layers, _, chunks = self.spread.shape
        if samples == 1:
            return None
        score = self.spread.reshape(samples, layers, self.profile.num_kv_heads, -1, chunks).mean(axis=3)
        order = np.argsort(-score, axis=-1, kind="stable")
        chosen = np.zeros(score.shape)
        np.put_along_axis(chosen, order[..., : self.n_tip], 1.0, axis=-1)
        times = chosen.sum(axis=0)  # samples that choose a chunk: times (times - 1) ordered pairs share it
        shared = (times * (times - 1)).sum(axis=-1) / (samples * (samples - 1) * self.n_tip)
        return shared.mean(axis=-1)

    def weak_heads(self) -> list[tuple[int, int]]:
        """(layer, KV head) where the default rule's set finds little: see WEAK_SKILL."""
        found = self.found(SparseSpec().rule)
        weak = []
        for layer, keys in self.keys.items():
            guess = min(1.0, self.k / keys)
            weak += [(layer, head) for head in np.flatnonzero(found[layer] < guess + WEAK_SKILL * (1 - guess)).tolist()]
        return weak

    def warnings(self) -> list[str]:
        weak = self.weak_heads()
        if not weak:
            return list(self.remarks)
        layers = ", ".join(str(layer) for layer in sorted({layer for layer, _ in weak}))
        return [
            *self.remarks,
            f"{len(weak)} KV heads have no good set of {self.n_tip} chunks, in layers {layers}: "
            "build with more chunks (--n-tip) or keep those layers dense (--dense-layers)",
        ]

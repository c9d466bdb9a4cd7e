"""The pass of a model over the calibration windows, layer by layer of one window after another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fasa_trt.calibrate.capture import capture
from fasa_trt.calibrate.corpus import Window
from fasa_trt.calibrate.greedy import forward_selection
from fasa_trt.calibrate.measure import DecodeSteps, measure, measure_sets
from fasa_trt.calibrate.result import Calibration
from fasa_trt.core.checkpoint import Checkpoint
from fasa_trt.core.errors import FasaError
from fasa_trt.core.profile import Profile
from fasa_trt.core.rope import Rotary, rotary_of, window_of
from fasa_trt.core.spec import RULES, SparseSpec

KS = (64, 128, 256, 512, 1024, 2048, 4096)
MIN_LENGTH = 4 * KS[0]  # agreement means little where K is not a small part of the keys
GREEDY_SAMPLES = 4  # forward selection needs a layer of all its windows at once: they run as one batch
GREEDY_STRIDE = 2  # and it measures every second step of them


def rotary_layers(checkpoint: Checkpoint) -> dict[int, Rotary]:
    """The rotary embedding of every layer that has one. Raises FasaError when none has."""
    found = {layer: rotary_of(checkpoint.config, layer) for layer in range(checkpoint.num_layers)}
    rotary = {layer: embedding for layer, embedding in found.items() if embedding is not None}
    if not rotary:
        raise FasaError("no layer of this model has rotary position embedding: there are no frequency chunks to rank")
    return rotary


def default_spec(checkpoint: Checkpoint) -> SparseSpec:
    """What an engine of this model would be built with if nobody said otherwise."""
    spec = SparseSpec()
    return spec.resolve(head_dim=checkpoint.head_dim, num_layers=checkpoint.num_layers, max_seq_len=spec.budget)


def query_positions(length: int, queries: int) -> list[int]:
    """Places of the steps: spread evenly over the last sixteenth of a window, where recall windows ask questions."""
    return np.linspace(length - length // 16, length - 1, queries).round().astype(int).tolist()


class CalibrationRun:
    """Measures every window, and keeps the tables; see `Calibration` for their shapes."""

    def __init__(self, checkpoint: Checkpoint, windows: list[Window], *, queries: int, greedy: bool) -> None:
        """windows: of one length. queries: steps measured in each. greedy: choose by forward selection too."""
        self.checkpoint, self.windows = checkpoint, windows
        self.rotary = rotary_layers(checkpoint)
        self.spec = default_spec(checkpoint)
        length = len(windows[0])
        self.sliding = {layer: window_of(checkpoint.config, layer) for layer in self.rotary}
        self.ks = tuple(k for k in KS if 4 * k <= length)
        self.positions = query_positions(length, queries)
        layers, heads, chunks = checkpoint.num_layers, checkpoint.num_heads, checkpoint.head_dim // 2
        self.agreement = np.zeros((len(windows), len(self.ks), layers, heads, chunks), np.float32)
        self.spread = np.zeros((len(windows), layers, heads, chunks), np.float32)
        natural = np.tile(np.arange(chunks, dtype=np.int32), (layers, checkpoint.num_kv_heads, 1))
        self.greedy = natural if greedy else None
        rules = RULES if greedy else ("spread", "agreement")
        self.held_out = {rule: np.zeros((len(self.ks), layers, heads), np.float32) for rule in rules}

    def run(self, model: PreTrainedModel, progress: Callable[[int, int], None]) -> None:
        """Fills the tables; progress(done, total) counts layers of windows.

        Raises FasaError when the model's queries and keys are not what its config says, or not finite.
        """
        for batch in self._batches():
            self._run_batch(model, batch, progress)

    def result(self, info: dict[str, Any], remarks: Iterable[str]) -> Calibration:
        """The tables, after `run`."""
        length = len(self.windows[0])
        profile = self._profile(range(len(self.windows)), slice(None))
        return Calibration(
            profile=replace(profile, fingerprint=self.checkpoint.fingerprint, info=info),
            agreement=self.agreement,
            spread=self.spread,
            rotary=self.rotary,
            keys={layer: min(window or length, length) for layer, window in self.sliding.items()},
            n_tip=self.n_tip,
            held_out=self.held_out,
            remarks=tuple(remarks),
        )

    @property
    def n_tip(self) -> int:
        assert self.spec.n_tip is not None  # resolved
        return self.spec.n_tip

    @property
    def _choosing(self) -> range:
        """The windows that choose the sets for `held_out`: all but the last, unless there is only one."""
        return range(max(1, len(self.windows) - 1))

    def _batches(self) -> list[range]:
        first = len(self._choosing[:GREEDY_SAMPLES]) if self.greedy is not None else 1
        return [range(first), *(range(i, i + 1) for i in range(first, len(self.windows)))]

    def _run_batch(self, model: PreTrainedModel, batch: range, progress: Callable[[int, int], None]) -> None:
        shown: set[int] = set()

        def observe(layer: int, q: Tensor, k: Tensor, scale: float) -> None:
            if layer not in self.rotary:
                return
            self._check(layer, q, k)
            self._measure(batch, layer, q, k, scale)
            shown.add(layer)
            progress(batch.start * len(self.rotary) + len(shown) * len(batch), len(self.windows) * len(self.rotary))

        tokens = torch.from_numpy(np.stack([self.windows[i] for i in batch])).to(model.device)
        with capture(model, observe, last_layer=max(self.rotary)):
            model.base_model(input_ids=tokens, use_cache=False)  # no logits: nobody reads them
        if shown != set(self.rotary):
            raise FasaError(
                f"cannot read queries and keys from {type(model).__name__}: not all of its layers call transformers' "
                "attention interface"
            )

    def _check(self, layer: int, q: Tensor, k: Tensor) -> None:
        heads, kv_heads, head_dim = self.checkpoint.num_heads, self.checkpoint.num_kv_heads, self.checkpoint.head_dim
        if q.shape[1::2] != (heads, head_dim) or k.shape[1::2] != (kv_heads, head_dim):
            raise FasaError(
                f"layer {layer} has {q.shape[1]} query heads of {q.shape[3]} dims on {k.shape[1]} KV heads, its config "
                f"says {heads} of {head_dim} on {kv_heads}: attention of this kind is not supported"
            )
        if not (torch.isfinite(q).all() and torch.isfinite(k).all()):
            raise FasaError(
                f"layer {layer} has infinite or NaN queries or keys in {q.dtype}", hint="try another --dtype"
            )

    def _measure(self, batch: range, layer: int, q: Tensor, k: Tensor, scale: float) -> None:
        texts = [
            DecodeSteps(
                q=q[i][:, self.positions],
                k=k[i],
                pairs=torch.from_numpy(self.rotary[layer].pairs).to(k.device),
                positions=self.positions,
                scale=scale,
                window=self.sliding[layer],
            )
            for i in range(len(batch))
        ]
        for sample, text in zip(batch, texts, strict=True):
            agreement, spread = measure(text, self.ks)
            self.agreement[sample, :, layer] = agreement.cpu().numpy()
            self.spread[sample, layer] = spread.cpu().numpy()
        if self.greedy is not None and batch.start == 0:
            fewer = [text.every(GREEDY_STRIDE) for text in texts]
            k_wanted = max(k for k in self.ks if k <= self.spec.budget)
            order = forward_selection(fewer, k=k_wanted, rounds=max(self.n_tip, q.shape[-1] // 4))
            self.greedy[layer] = order.numpy()
        if batch[-1] == len(self.windows) - 1:
            for rule, table in self.held_out.items():
                table[:, layer] = measure_sets(texts[-1], self._sets(rule, layer).to(k.device), self.ks).cpu().numpy()

    def _sets(self, rule: str, layer: int) -> Tensor:
        """int64 [kv_heads, n_tip], as an engine would choose them from the other windows."""
        profile = self._profile(self._choosing, slice(layer, layer + 1))
        return torch.from_numpy(profile.ranking(rule, budget=self.spec.budget)[0, :, : self.n_tip].copy())

    def _profile(self, samples: range, layers: slice) -> Profile:
        """Means over some windows, of some layers."""
        return Profile(
            agreement=self.agreement[samples.start : samples.stop, :, layers].mean(axis=0),
            spread=self.spread[samples.start : samples.stop, layers].mean(axis=0),
            greedy=None if self.greedy is None else self.greedy[layers],
            ks=self.ks,
            num_kv_heads=self.checkpoint.num_kv_heads,
            fingerprint="",
        )

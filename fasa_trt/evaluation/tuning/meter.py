"""Loss of sparse decoding at the end of a few windows, which are read once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fasa_trt.evaluation.attention import Traffic
from fasa_trt.evaluation.decoder import Decoder
from fasa_trt.evaluation.methods.base import Method
from fasa_trt.evaluation.methods.dense import Dense
from fasa_trt.evaluation.methods.fasa import Fasa
from fasa_trt.evaluation.model import EvalModel
from fasa_trt.evaluation.tuning.windows import ScoredWindow
from fasa_trt.export.config import BuildConfig


class LossMeter:
    """dense: mean next-token loss of full attention at the windows' scored tokens, in nats. scored: how many."""

    def __init__(self, model: EvalModel, windows: Sequence[ScoredWindow]) -> None:
        capacity = max(len(window.prompt) + len(window.steps) for window in windows)
        self._decoder = Decoder(model)
        self._cache = self._decoder.prefill([window.prompt for window in windows], capacity)
        self._windows = windows
        self.scored = sum(sum(window.scored) for window in windows)
        self.dense = self._loss(Dense(), ())

    def relative(self, config: BuildConfig) -> float:
        """How much higher than `dense` the loss is with the sparse layers of `config`, as a share of `dense`."""
        spec = config.spec
        method = Fasa(
            budget=spec.budget,
            dense_layers=0,  # those of spec need not be the first
            n_tip=spec.n_tip,
            reduction=spec.reduction,
            labels=config.labels,
            rule=spec.rule,
            sink=spec.sink,
            recent=spec.recent,
        )
        return self._loss(method, spec.dense_layers) / self.dense - 1

    def _loss(self, method: Method, dense_layers: Sequence[int]) -> float:
        cache = self._cache.branch()
        selectors = self._decoder.start(cache, method)
        for layer in dense_layers:
            selectors[layer] = None
        steps = [window.steps[:-1] for window in self._windows]
        logits = self._decoder.feed(cache, steps, selectors, Traffic(), every=True)
        total = 0.0
        for window, found in zip(self._windows, logits, strict=True):
            wanted = torch.tensor(window.steps[1:], device=found.device)
            losses = torch.nn.functional.cross_entropy(found[: len(wanted)], wanted, reduction="none")
            total += float(losses[torch.tensor(window.scored, device=found.device)].double().sum())
        return total / self.scored

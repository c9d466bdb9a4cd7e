"""The search: the reduction, then a grid with all layers sparse, then some layers dense, then a check on windows it has
not seen.

The settings that it chooses from do not depend on the bound, and what it leaves unmeasured could not have been chosen:
so a looser bound never chooses one that reads more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from fasa_trt.core.errors import FasaError
from fasa_trt.evaluation.model import EvalModel
from fasa_trt.evaluation.run import batch_tokens
from fasa_trt.evaluation.tuning.grid import kv_bytes
from fasa_trt.evaluation.tuning.meter import LossMeter
from fasa_trt.evaluation.tuning.result import Point, Tuning, cheapest_first, frontier
from fasa_trt.evaluation.tuning.windows import ScoredWindow
from fasa_trt.export.config import BuildConfig
from fasa_trt.export.plan import can_be_sparse

Progress = Callable[[str, int, int], None]


def tune(
    model: EvalModel,
    settings: Sequence[BuildConfig],
    windows: tuple[Sequence[ScoredWindow], Sequence[ScoredWindow]],
    *,
    length: int,
    max_loss: float,
    progress: Progress,
) -> Tuning:
    """settings: of `grid`. windows: to search on, and held out. length: tokens of a row at which bytes count.
    max_loss: of the loss relative to dense, 0.005 for half a percent. progress: called with (stage, done, total).

    Raises FasaError when no setting keeps to the bound, or the windows do not fit into memory.
    """
    count = sum(map(len, windows))
    if count * length > batch_tokens(model):
        raise FasaError(
            f"{count} windows of {length} tokens do not fit into the memory of {model.device}",
            hint="lower --windows or --length",
        )
    searched, held_out = (LossMeter(model, each) for each in windows)
    search = _Search(model, searched, held_out, length, max_loss, progress)
    chosen = search.run([_without_unmeasured(model, config) for config in settings])
    return Tuning(
        chosen=chosen,
        points=tuple(search.points.values()),
        max_loss=max_loss,
        dense_bytes=search.dense_bytes,
        dense_loss=(searched.dense, held_out.dense),
        scored=(searched.scored, held_out.scored),
        length=length,
    )


def dense_counts(layers: int) -> list[int]:
    """How many of `layers` to try dense: 1, 2, 3, 4, 6, 8, 12, 16, ... below all of them."""
    steps = sorted({factor << shift for factor in (1, 3) for shift in range(layers.bit_length())})
    return [count for count in steps if count < layers]


class _Search:
    """points: all that was measured. dense_bytes: read by full attention; only what reads less is measured."""

    def __init__(
        self, model: EvalModel, searched: LossMeter, held_out: LossMeter, length: int, max_loss: float, report: Progress
    ) -> None:
        self.model, self.searched, self.held_out = model, searched, held_out
        self.length, self.max_loss, self.report = length, max_loss, report
        self.points: dict[BuildConfig, Point] = {}
        self.dense_bytes = 0
        self._reads: dict[BuildConfig, int] = {}

    def run(self, settings: Sequence[BuildConfig]) -> Point:
        self._grid(self._of_one_reduction(settings))
        best = frontier(self.points.values())
        chosen = self._cheapest()
        layers = [layer for layer, sparse in enumerate(self.model.sparse) if sparse]
        least = min(self._bytes(_with_dense(point.config, layers[:1])) for point in best)
        if len(layers) > 1 and least < self._limit(chosen):
            chosen = self._some_dense(best, layers, chosen)
        if chosen is None:
            raise self._failure()
        return chosen

    def _of_one_reduction(self, settings: Sequence[BuildConfig]) -> Sequence[BuildConfig]:
        """Those with the reduction that has the lowest loss in the middle of the grid."""
        reductions = dict.fromkeys(config.reduction for config in settings)
        smaller = [config for config in sorted(settings, key=self._bytes) if self._bytes(config) < self.dense_bytes]
        if len(reductions) == 1 or not smaller:
            return settings
        middle = smaller[len(smaller) // 2]
        tried = [replace(middle, reduction=reduction) for reduction in reductions]
        best = min(tried, key=lambda config: self._measure(config).loss).reduction
        return [config for config in settings if config.reduction == best]

    def _grid(self, settings: Sequence[BuildConfig]) -> None:
        """All layers sparse, up to the first setting that is as good as dense on all windows: every bound allows it."""
        for done, config in enumerate(sorted(settings, key=self._bytes)):
            self.report("settings", done, len(settings))
            if self._bytes(config) >= self.dense_bytes:
                break
            if self._measure(config).loss <= 0 and self._check(self.points[config]).worst <= 0:
                break
        self.report("settings", len(settings), len(settings))
        if not self.points:
            raise FasaError(
                f"no setting reads less than full attention does at {self.length} tokens",
                hint="raise --length, or lower --n-tips or --budgets",
            )

    def _some_dense(self, best: Sequence[Point], layers: Sequence[int], chosen: Point | None) -> Point | None:
        """Makes those layers dense first that helped most, each alone, in the middle of the best settings."""
        middle = best[len(best) // 2].config
        alone = {}
        for done, layer in enumerate(layers):
            self.report("layers", done, len(layers))
            alone[layer] = self._measure(_with_dense(middle, [layer])).loss
        self.report("layers", len(layers), len(layers))
        order = sorted(layers, key=lambda layer: alone[layer])
        chosen = self._cheapest()
        variants = {_with_dense(point.config, order[:n]) for point in best for n in dense_counts(len(layers))}
        wanted = sorted(
            (config for config in variants - self.points.keys() if self._bytes(config) < self._limit(chosen)),
            key=lambda config: (self._bytes(config), config.dense_layers, config.budget),
        )
        for done, config in enumerate(wanted):
            self.report("combined", done, len(wanted))
            point = self._measure(config)
            if point.loss <= self.max_loss and self._check(point).worst <= self.max_loss:
                chosen = self.points[config]
                break
        self.report("combined", len(wanted), len(wanted))
        return chosen

    def _measure(self, config: BuildConfig) -> Point:
        if config not in self.points:
            self.points[config] = Point(config, self.searched.relative(config), self._bytes(config))
        return self.points[config]

    def _check(self, point: Point) -> Point:
        """The point with its loss on held-out windows, measured once."""
        if point.held_out is None:
            point = replace(point, held_out=self.held_out.relative(point.config))
            self.points[point.config] = point
        return point

    def _cheapest(self) -> Point | None:
        """The one within the bound, on held-out windows too, that reads least."""
        within = sorted((point for point in self.points.values() if point.loss <= self.max_loss), key=cheapest_first)
        return next((point for point in map(self._check, within) if point.worst <= self.max_loss), None)

    def _bytes(self, config: BuildConfig) -> int:
        if config not in self._reads:
            read, self.dense_bytes = kv_bytes(self.model.checkpoint, self.model.profile, config, self.length)
            self._reads[config] = read
        return self._reads[config]

    def _limit(self, chosen: Point | None) -> int:
        return self.dense_bytes if chosen is None else chosen.kv_bytes

    def _failure(self) -> FasaError:
        self._check(min(self.points.values(), key=lambda point: (point.loss, point.kv_bytes)))
        checked = [point for point in self.points.values() if point.held_out is not None]
        best = min(checked, key=lambda point: (point.worst, point.kv_bytes))
        enough = math.ceil(best.worst * 1000) / 10
        return FasaError(
            f"no setting keeps the loss within {self.max_loss:.2%} of full attention's: the best, {best.name}, has "
            f"{best.loss:+.2%} on the windows searched on and {best.held_out:+.2%} on held-out ones",
            hint=f"allow --max-loss {enough:.1f}%, offer more --budgets or --n-tips, or calibrate on more text",
        )


def _with_dense(config: BuildConfig, layers: Iterable[int]) -> BuildConfig:
    return replace(config, dense_layers=tuple(sorted({*config.dense_layers, *layers})))


def _without_unmeasured(model: EvalModel, config: BuildConfig) -> BuildConfig:
    """With layers dense that the build alone would make sparse, because its rows are no longer than their sliding
    window: what they lose is not measured."""
    assert config.max_seq_len is not None  # resolved
    spec, limit = config.spec, config.max_seq_len
    built = [can_be_sparse(model.checkpoint, spec, i, max_seq_len=limit) for i in range(model.num_layers)]
    return _with_dense(config, [i for i, sparse in enumerate(built) if sparse and not model.sparse[i]])

"""What a search measured and chose."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fasa_trt.evaluation.tuning.grid import build_settings
from fasa_trt.export.config import BuildConfig


@dataclass(frozen=True)
class Point:
    """A setting. loss: relative to dense, on the windows that are searched on; held_out: on the others, where
    measured. kv_bytes: read in one decode step."""

    config: BuildConfig
    loss: float
    kv_bytes: int
    held_out: float | None = None

    @property
    def worst(self) -> float:
        return self.loss if self.held_out is None else max(self.loss, self.held_out)

    @property
    def name(self) -> str:
        dense = ", ".join(map(str, self.config.dense_layers))
        name = f"n_tip {self.config.n_tip}, budget {self.config.budget}, {self.config.reduction}"
        return name + (f", dense layers {dense}" if dense else "")

    def to_json(self) -> dict[str, Any]:
        return {
            "n_tip": self.config.n_tip,
            "budget": self.config.budget,
            "reduction": self.config.reduction,
            "dense_layers": list(self.config.dense_layers),
            "loss": self.loss,
            "held_out_loss": self.held_out,
            "kv_bytes": self.kv_bytes,
        }


@dataclass(frozen=True)
class Tuning:
    """chosen: reads least of all settings whose losses are within max_loss. points: all that were measured.
    dense_bytes: read by full attention. dense_loss: of full attention, nats a token, on the windows searched on and on
    held-out ones; scored: tokens that it is the mean of. length: tokens of a row, at which bytes count."""

    chosen: Point
    points: tuple[Point, ...]
    max_loss: float
    dense_bytes: int
    dense_loss: tuple[float, float]
    scored: tuple[int, int]
    length: int

    def to_json(self) -> dict[str, Any]:
        return {
            "settings": build_settings(self.chosen.config),
            "max_loss": self.max_loss,
            "loss": self.chosen.loss,
            "held_out_loss": self.chosen.held_out,
            "kv_bytes": self.chosen.kv_bytes,
            "kv_bytes_dense": self.dense_bytes,
            "kv_share": self.chosen.kv_bytes / self.dense_bytes,
            "dense_loss": list(self.dense_loss),
            "scored": list(self.scored),
            "length": self.length,
            "points": [point.to_json() for point in self.points],
        }


def frontier(points: Iterable[Point]) -> list[Point]:
    """The points that no other beats in both bytes and loss, by ascending bytes."""
    best: list[Point] = []
    for point in sorted(points, key=cheapest_first):
        if not best or point.loss < best[-1].loss:
            best.append(point)
    return best


def cheapest_first(point: Point) -> tuple[int, float]:
    return point.kv_bytes, point.loss

"""The trade-off curve: loss against KV bytes, the chosen setting marked."""

from __future__ import annotations

import io

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from fasa_trt.evaluation.plots import COLOURS, DENSE
from fasa_trt.evaluation.tuning.result import Tuning, frontier

FLOOR = 1e-5  # the lowest loss of a figure; those at or below full attention's are drawn there


def tradeoff_svg(tuning: Tuning) -> bytes:
    """An SVG file. Equal tunings give equal files."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained", facecolor="white")
    axes = figure.subplots()
    unit = 2.0**20 if tuning.dense_bytes >= 1 << 22 else 2.0**10

    def xy(points: list[tuple[int, float]]) -> tuple[list[float], list[float]]:
        return [read / unit for read, _ in points], [max(loss, FLOOR) for _, loss in points]

    plain = [(p.kv_bytes, p.loss) for p in tuning.points if not p.config.dense_layers]
    mixed = [(p.kv_bytes, p.loss) for p in tuning.points if p.config.dense_layers]
    axes.plot(*xy(plain), "o", color=COLOURS[0], markersize=3, label="all layers sparse")
    axes.plot(*xy(mixed), "o", color=COLOURS[1], markersize=3, label="some layers dense")
    best = [(point.kv_bytes, point.loss) for point in frontier(tuning.points)]
    axes.plot(*xy(best), "-", color=DENSE, linewidth=1, drawstyle="steps-post", label="best")
    chosen = tuning.chosen
    assert chosen.held_out is not None
    axes.plot(*xy([(chosen.kv_bytes, chosen.loss)]), "*", color=COLOURS[7], markersize=13, label="chosen")
    axes.plot(*xy([(chosen.kv_bytes, chosen.held_out)]), "x", color=COLOURS[7], label="chosen, held out")
    if tuning.max_loss > 0:
        axes.axhline(tuning.max_loss, color=DENSE, linestyle=":", label=f"bound {tuning.max_loss:.2%}")
    axes.axvline(tuning.dense_bytes / unit, color=DENSE, linestyle="--", label="full attention")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel(
        f"KV {'MiB' if unit > 2**10 else 'KiB'} read in a decode step at {tuning.length} tokens", fontsize=8
    )
    axes.set_ylabel(f"loss above full attention's ({FLOOR:.3%}: none)", fontsize=8)
    axes.set_title(chosen.name, fontsize=8, loc="left")
    axes.tick_params(labelsize=7)
    axes.grid(True, linewidth=0.3)
    axes.legend(frameon=False, fontsize=7)
    drawn = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "fasa"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()

"""The picture of a calibration: which frequency chunks each KV head lives by, and how far its chosen ones carry it."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fasa_trt.calibrate.result import Calibration
from fasa_trt.core.spec import SparseSpec

INK, FAINT, GRID = "#1f2430", "#6b7280", "#d7dbe3"
COLOURS = {"spread": "#f26b1d", "agreement": "#c2338f", "greedy": "#2a9d6f"}
TICK_EVERY = 8  # chunks


def heat_map(calibration: Calibration, title: str) -> bytes:
    """A PNG: spread and agreement of every chunk with each rule's choice marked, and what the choices find together.

    Rows are the KV heads of the layers with RoPE, layer by layer from the top.
    """
    profile, rows = calibration.profile, len(calibration.rotary) * calibration.profile.num_kv_heads
    row_height = float(np.clip(8.0 / rows, 0.045, 0.3))  # inches
    figure = Figure(figsize=(15, 2.3 + rows * row_height), dpi=150, layout="constrained", facecolor="white")
    figure.suptitle(title, x=0.008, ha="left", fontsize=14, fontweight="bold", color=INK)
    spread_axes, agreement_axes, found_axes = figure.subplots(1, 3, sharey=True, width_ratios=(10, 10, 4))

    spread = _rows(calibration, profile.spread)
    strongest = spread.max(axis=1, keepdims=True)
    panels = (
        ("spread", spread_axes, spread / np.where(strongest > 0, strongest, 1.0), "Spread, share of the row's largest"),
        (
            "agreement",
            agreement_axes,
            _rows(calibration, profile.agreement[calibration.at_budget]),
            f"Agreement, share of the top {calibration.k} keys found",
        ),
    )
    for rule, axes, values, label in panels:
        image = axes.imshow(values, cmap="Blues", aspect="auto", interpolation="nearest", vmin=0)
        _mark(axes, _chosen(calibration, rule), COLOURS[rule], size=row_height)
        _chunk_axis(axes, calibration)
        bar = figure.colorbar(image, ax=axes, location="bottom", fraction=0.05, aspect=50, pad=0.02)
        bar.set_label(label, fontsize=9, color=FAINT)
        bar.ax.tick_params(labelsize=8, colors=FAINT)
        bar.outline.set_visible(False)
        _title(axes, f"Every chunk by {rule}; dots: the {calibration.n_tip} largest")
    _found_panel(found_axes, calibration, size=row_height)
    _layer_axis(spread_axes, calibration)
    for axes in (spread_axes, agreement_axes, found_axes):
        _separate_layers(axes, calibration)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10.5, color=INK, pad=28)


def _rows(calibration: Calibration, table: NDArray[np.float32]) -> NDArray[np.float32]:
    """[layers, heads, F] to [rows, F]: the layers with RoPE, mean over each KV head's query heads."""
    layers, _, chunks = table.shape
    grouped = table.reshape(layers, calibration.profile.num_kv_heads, -1, chunks).mean(axis=2)
    rows: NDArray[np.float32] = grouped[list(calibration.rotary)].reshape(-1, chunks)
    return rows


def _chosen(calibration: Calibration, rule: str) -> NDArray[np.int64]:
    """Chunks that the rule chooses: int64 [rows, n_tip]."""
    ranking = calibration.profile.ranking(rule, budget=SparseSpec().budget)[list(calibration.rotary)]
    return ranking[..., : calibration.n_tip].reshape(-1, calibration.n_tip)


def _mark(axes: Axes, chosen: NDArray[np.int64], colour: str, size: float) -> None:
    rows = np.repeat(np.arange(len(chosen)), chosen.shape[1])
    diameter = float(np.clip(size * 72 * 0.32, 1.0, 3.4))  # points
    axes.scatter(chosen.ravel(), rows, s=diameter**2, color=colour, linewidths=0)


def _chunk_axis(axes: Axes, calibration: Calibration) -> None:
    """Chunk numbers below; above, after how many tokens a chunk has turned once."""
    ticks = np.arange(0, calibration.profile.num_chunks, TICK_EVERY)
    axes.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=8, color=FAINT)
    axes.set_xlabel("frequency chunk, fast to slow", fontsize=9, color=FAINT)
    axes.tick_params(length=0)
    tables = [rotary.inv_freq for rotary in calibration.rotary.values()]
    if any(not np.array_equal(table, tables[0]) for table in tables):
        return  # layers turn at different speeds: no one scale fits all rows
    top = axes.secondary_xaxis("top")
    top.set_xticks(ticks, [_tokens_per_turn(float(tables[0][tick])) for tick in ticks], fontsize=8, color=FAINT)
    top.tick_params(length=0, pad=1)
    top.set_xlabel("tokens per turn", fontsize=8, color=FAINT, loc="left", labelpad=2)
    for part in (top.spines, axes.spines):
        part[:].set_visible(False)


def _tokens_per_turn(inv_freq: float) -> str:
    if inv_freq == 0:
        return "never"
    tokens = 2 * np.pi / inv_freq
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if tokens >= limit:
            return f"{tokens / limit:.1f}{unit}" if tokens < 10 * limit else f"{tokens / limit:.0f}{unit}"
    return f"{tokens:.0f}"


def _layer_axis(axes: Axes, calibration: Calibration) -> None:
    layers, kv_heads = list(calibration.rotary), calibration.profile.num_kv_heads
    every = max(1, round(len(layers) / 40))
    centres = [(place * kv_heads + (kv_heads - 1) / 2, layer) for place, layer in enumerate(layers)][::every]
    axes.set_yticks([place for place, _ in centres], [str(layer) for _, layer in centres], fontsize=9, color=INK)
    label = "layer" if kv_heads == 1 else f"layer, a row for each of {kv_heads} KV heads"
    axes.set_ylabel(label, fontsize=9, color=FAINT)


def _separate_layers(axes: Axes, calibration: Calibration) -> None:
    colour, width = ("white", 1.2) if axes.images else (GRID, 0.6)
    for place in range(1, len(calibration.rotary)):
        axes.axhline(place * calibration.profile.num_kv_heads - 0.5, color=colour, linewidth=width)


def _found_panel(axes: Axes, calibration: Calibration, size: float) -> None:
    """What each rule's set finds, KV head by KV head."""
    rules: Sequence[str] = list(calibration.held_out)
    diameter = float(np.clip(size * 72 * 0.45, 2.0, 5.5))
    found = {rule: calibration.found(rule)[list(calibration.rotary)].ravel() for rule in rules}
    rows = np.arange(len(found[rules[0]]))
    for rule in reversed(rules):  # the default rule's points lie on top
        axes.scatter(found[rule], rows, s=diameter**2, color=COLOURS[rule], label=rule, linewidths=0, zorder=3)
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"], fontsize=8, color=FAINT)
    axes.grid(axis="x", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(f"of the top {calibration.k} keys, held-out text", fontsize=9, color=FAINT)
    _title(axes, f"What {calibration.n_tip} chunks find together")
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.03, 1.0), ncols=len(rules), frameon=False, fontsize=8.5,
        handletextpad=0.1, columnspacing=0.9, borderaxespad=0, reverse=True,
    )  # fmt: skip

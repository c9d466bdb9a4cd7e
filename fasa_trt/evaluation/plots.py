"""Pictures of results: quality against budget, quality against bytes read, recall by depth."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from fasa_trt.core.atomic import write_bytes

COLOURS = ("#0f766e", "#f26b1d", "#c2338f", "#2563eb", "#a16207", "#7c3aed", "#4d7c0f", "#be123c", "#0891b2", "#475569")
DENSE = "#6b7280"
DEPTHS = 5  # rows of the heat map
ACROSS = 4  # panels


def write_plots(rows: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]], directory: Path) -> list[Path]:
    """Writes quality-budget.svg and quality-bytes.svg, and recall.svg where there are recall records; returns them."""
    figures = {
        "quality-budget.svg": quality(rows, "budget", "tokens attended"),
        "quality-bytes.svg": quality(rows, "kv_share", "share of the KV cache's bytes read"),
    }
    depths = [record for record in records if record["task"] == "recall"]
    if depths:
        figures["recall.svg"] = recall_map(depths)
    written = []
    for name, figure in figures.items():
        drawn = io.BytesIO()
        with matplotlib.rc_context({"svg.hashsalt": "fasa"}):  # equal results give equal files
            figure.savefig(drawn, format="svg", metadata={"Date": None})
        write_bytes(directory / name, drawn.getvalue())
        written.append(directory / name)
    return written


def quality(rows: Sequence[Mapping[str, Any]], x: str, label: str) -> Figure:
    """A panel for each task and context, a line for each method; dense is a horizontal one."""
    places = list(dict.fromkeys((row["task"], row["context"]) for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows if row["budget"] is not None))
    figure, panels = _panels(len(places))
    for axes, (task, context) in zip(panels, places, strict=True):
        mine = [row for row in rows if (row["task"], row["context"]) == (task, context)]
        for method, colour in zip(methods, _colours(len(methods)), strict=True):
            points = sorted((row for row in mine if row["method"] == method), key=lambda row: row["budget"])
            axes.plot(
                [row[x] for row in points], [row["score"] for row in points], "o-", color=colour, label=method,
                markersize=3, linewidth=1.2,
            )  # fmt: skip
        for row in mine:
            if row["method"] == "dense":
                axes.axhline(row["score"], color=DENSE, linestyle=":", label="dense")
        unsolved = any(row["solved"] is False for row in mine)
        axes.set_title(f"{task}, {context}" + (" (dense fails)" if unsolved else ""), fontsize=8, loc="left")
        axes.set_xscale("log")
        if x == "budget":
            budgets = sorted({row["budget"] for row in mine if row["budget"] is not None})
            axes.set_xticks(budgets, [str(budget) for budget in budgets])
        else:
            _plain_ticks(axes.xaxis, lambda share, _: f"{100 * share:.3g}%")
        axes.minorticks_off()
        if mine[0]["metric"] == "perplexity":
            axes.set_yscale("log")
            _plain_ticks(axes.yaxis, lambda value, _: f"{value:g}")
            axes.set_ylabel("perplexity, less is better", fontsize=7)
        else:
            axes.set_ylim(-0.03, 1.03)
            axes.set_ylabel(mine[0]["metric"], fontsize=7)
        axes.set_xlabel(label, fontsize=7)
        axes.tick_params(labelsize=7)
        axes.grid(True, linewidth=0.3)
    handles = {name: handle for axes in panels for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=5, frameon=False, fontsize=7)
    return figure


def recall_map(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Share of right answers by context and depth, a panel for each method at its smallest budget."""
    contexts = sorted({record["context"] for record in records})
    smallest = min((record["budget"] for record in records if record["budget"] is not None), default=None)
    methods = list(dict.fromkeys(record["method"] for record in records if record["budget"] in (None, smallest)))
    figure, panels = _panels(len(methods))
    for axes, method in zip(panels, methods, strict=True):
        mine = [record for record in records if record["method"] == method and record["budget"] in (None, smallest)]

        def share(depth: int, context: int, mine: Sequence[Mapping[str, Any]] = mine) -> float:
            scores = [
                record["score"]
                for record in mine
                if record["context"] == context and min(int(record["depth"] * DEPTHS), DEPTHS - 1) == depth
            ]
            return sum(scores) / len(scores) if scores else float("nan")

        _heat(axes, share, contexts)
        budget = "" if mine[0]["budget"] is None else f", budget {smallest}"
        axes.set_title(f"{method}{budget}", fontsize=8, loc="left")
    return figure


def _heat(axes: Axes, share: Callable[[int, int], float], contexts: Sequence[int]) -> None:
    table = [[share(depth, context) for context in contexts] for depth in range(DEPTHS)]
    axes.imshow(table, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(contexts)), [str(context) for context in contexts], fontsize=7)
    axes.set_yticks([0, DEPTHS - 1], ["start", "end"], fontsize=7)
    axes.set_xlabel("context, tokens", fontsize=7)
    axes.set_ylabel("depth of the note", fontsize=7)


def _plain_ticks(axis: Axis, text: Callable[[float, int], str]) -> None:
    """1, 2, 3, 5 and their powers of ten, as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.set_major_formatter(FuncFormatter(text))
    axis.set_minor_formatter(NullFormatter())


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    across = min(ACROSS, count)
    down = -(-count // across)
    figure = Figure(figsize=(3.1 * across, 2.6 * down + 0.6), layout="constrained", facecolor="white")
    panels = figure.subplots(down, across, squeeze=False).flatten().tolist()
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, panels[:count]


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]

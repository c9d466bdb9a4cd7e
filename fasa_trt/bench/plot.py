"""Figures of a record: latency against context length, a panel for each batch size."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Line:
    """key: of a point. name: in the legend."""

    key: str
    name: str
    colour: str
    style: str = "-"


STEP_LINES = (
    Line("dense_ms", "dense", "#6b7280"),
    Line("fasa_ms", "FASA", "#0f766e"),
    Line("rest_ms", "without attention", "#0f766e", ":"),
)
KERNEL_LINES = (
    Line("dense_us", "fastest dense kernel", "#6b7280"),
    Line("fasa_us", "FASA", "#0f766e"),
    Line("limit_us", "FASA's bytes at copy bandwidth", "#0f766e", ":"),
)


def latency_svg(points: Sequence[dict[str, Any]], lines: Sequence[Line], unit: str) -> str:
    """An <svg> element, log-log. points: each with context, batch and the lines' keys, whose values may be None."""
    import matplotlib

    matplotlib.use("Agg")
    with matplotlib.rc_context({"svg.hashsalt": "fasa"}):  # equal records give equal figures
        from matplotlib import pyplot

        batches = sorted({point["batch"] for point in points})
        figure, panels = pyplot.subplots(
            1, len(batches), figsize=(2.6 * len(batches) + 0.8, 3.4), sharey=True, squeeze=False
        )
        for panel, batch in zip(panels[0], batches, strict=True):
            mine = sorted((p for p in points if p["batch"] == batch), key=lambda point: point["context"])
            for line in lines:
                known = [point for point in mine if point.get(line.key) is not None]
                contexts, times = [point["context"] for point in known], [point[line.key] for point in known]
                panel.plot(contexts, times, line.style, color=line.colour, label=line.name, marker="o", markersize=3)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            ticks = sorted({point["context"] for point in mine})
            panel.set_xticks(ticks, [context_name(context) for context in ticks], fontsize=7)
            panel.minorticks_off()
            panel.set_title(f"batch {batch}", fontsize=9)
            panel.set_xlabel("context, tokens", fontsize=8)
            panel.grid(True, which="major", linewidth=0.3)
        panels[0][0].set_ylabel(unit)
        handles, names = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, names, loc="lower center", ncols=len(lines), frameon=False, fontsize=8)
        figure.tight_layout(rect=(0, 0.08, 1, 1))
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    text = drawn.getvalue()
    return text[text.index("<svg") :]


def context_name(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)

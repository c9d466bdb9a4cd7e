"""Draws a record of `benchmarks.kernels`: latency against context, a panel for each batch size.

python -m benchmarks.plot_kernels benchmarks/results/h200/kernels.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks.common import main
from fasa_trt.cli.console import say
from fasa_trt.core.errors import FasaError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# (key of a point, legend, colour, line style)
LINES = (
    ("dense_us", "fastest dense kernel", "#6b7280", "-"),
    ("fasa_us", "FASA", "#0f766e", "-"),
    ("limit_us", "FASA's bytes at copy bandwidth", "#0f766e", ":"),
)


def plot_kernels(
    record: Annotated[Path, typer.Argument(help="JSON file that benchmarks.kernels wrote.")],
    output: Annotated[
        list[Path] | None,
        typer.Option(help="Figure, .svg, .png or .pdf. Repeatable.", show_default="beside the record, .svg"),
    ] = None,
) -> None:
    """Draw latency against context length, log-log, one panel for each batch size.

    Example: python -m benchmarks.plot_kernels kernels.json --output kernels.svg --output kernels.png
    """
    try:
        result = json.loads(record.read_text("utf-8"))
        points = result["crossover"]["points"]
    except (OSError, ValueError) as error:
        raise FasaError(f"cannot read {record}: {error}") from None
    except (KeyError, TypeError):
        points = []
    if not points:
        raise FasaError(f"{record} has no crossover section", hint="python -m benchmarks.kernels --only crossover")
    for path in output or [record.with_suffix(".svg")]:
        draw(result, path)
        say(f"drew {path}")


def draw(result: dict[str, Any], path: Path) -> None:
    """Raises FasaError when the figure cannot be written."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "fasa"  # equal records give equal files
    from matplotlib import pyplot

    crossover = result["crossover"]
    batches = sorted({point["batch"] for point in crossover["points"]})
    figure, panels = pyplot.subplots(
        1, len(batches), figsize=(2.6 * len(batches) + 0.6, 3.4), sharex=True, sharey=True, squeeze=False
    )
    for panel, batch in zip(panels[0], batches, strict=True):
        points = sorted((p for p in crossover["points"] if p["batch"] == batch), key=lambda point: point["context"])
        draw_panel(panel, points, batch, crossover["from"].get(str(batch)))
    panels[0][0].set_ylabel("microseconds per layer and step")
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="lower center", ncols=len(LINES), frameon=False)
    labels = {"4bit": "4-bit", "8bit": "8-bit"}.get(crossover["labels"], crossover["labels"])
    figure.suptitle(
        f"One decode step of Llama-3.1-8B's attention on an {result['gpu']}, bfloat16; "
        f"FASA with {labels} labels, n_tip {crossover['n_tip']}, budget 256",
        fontsize=10,
    )
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    except (OSError, ValueError) as error:
        raise FasaError(f"cannot write {path}: {error}", hint="name a .svg, .png or .pdf file") from None
    finally:
        pyplot.close(figure)


def draw_panel(panel: Axes, points: list[dict[str, Any]], batch: int, crossover: int | None) -> None:
    for key, name, colour, style in LINES:
        known = [point for point in points if point[key] is not None]
        marker = "" if key == "limit_us" else "o"
        lengths, times = [point["context"] for point in known], [point[key] for point in known]
        panel.plot(lengths, times, style, color=colour, label=name, marker=marker, markersize=3, linewidth=1.4)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    ticks = [point["context"] for point in points][::2]
    panel.set_xticks(ticks, [size_name(length) for length in ticks])
    panel.minorticks_off()
    if crossover is not None:
        panel.axvline(crossover, color="#0f766e", linewidth=0.8, alpha=0.4)
    where = "no gain" if crossover is None else f"faster from {size_name(crossover)}"
    panel.set_title(f"batch {batch}: {where}", fontsize=9)
    panel.set_xlabel("context, tokens")
    panel.grid(True, which="major", linewidth=0.3)


def size_name(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens >= 1024 else str(tokens)


if __name__ == "__main__":
    main(plot_kernels)

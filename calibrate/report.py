"""What a calibration found, for people: as data, as a table, and as files with a heat map."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from fasa_trt.calibrate.heatmap import heat_map
from fasa_trt.calibrate.result import Calibration
from fasa_trt.core.atomic import write_bytes
from fasa_trt.core.errors import FasaError
from fasa_trt.core.spec import SparseSpec


def summarize(calibration: Calibration) -> dict[str, Any]:
    """The report as plain data.

    Per layer with RoPE: `found`, by rule, the share of a head's true top `k` keys that the `n_tip` chosen chunks find
    on the last sample, mean over query heads; `weakest`, the same by the default rule for the KV head with the least;
    `best_chunk`, what the best single chunk finds, mean over query heads and samples; `stability`, the share of the
    chosen chunks that two samples have in common, None for a single sample.
    """
    profile = calibration.profile
    weakest = calibration.found(SparseSpec().rule).min(axis=1)
    best = profile.agreement[calibration.at_budget].max(axis=-1).mean(axis=-1)
    stability = calibration.stability()
    layers = [
        {
            "layer": layer,
            "found": {rule: float(calibration.found(rule)[layer].mean()) for rule in calibration.held_out},
            "weakest": float(weakest[layer]),
            "best_chunk": float(best[layer]),
            "stability": None if stability is None else float(stability[layer]),
        }
        for layer in calibration.rotary
    ]
    return {
        "n_tip": calibration.n_tip,
        "chunks": profile.num_chunks,
        "k": calibration.k,
        "layers": layers,
        "weak_heads": [{"layer": layer, "kv_head": head} for layer, head in calibration.weak_heads()],
        "warnings": calibration.warnings(),
        "info": profile.info,
    }


def summary_table(summary: dict[str, Any]) -> Table:
    """One row a layer, and their mean."""
    rules = list(summary["layers"][0]["found"])
    table = Table(
        title=f"Top {summary['k']} keys found by {summary['n_tip']} of {summary['chunks']} chunks",
        caption=f"chosen by {', '.join(rules)}; weakest: KV head where {SparseSpec().rule} finds least; "
        "alone: best single chunk; stability: chunks that any two samples both choose",
    )
    for name in ("layer", *rules, "weakest", "alone", "stability"):
        table.add_column(name, justify="right")
    rows = [
        (*layer["found"].values(), layer["weakest"], layer["best_chunk"], layer["stability"])
        for layer in summary["layers"]
    ]
    for layer, row in zip(summary["layers"], rows, strict=True):
        table.add_row(str(layer["layer"]), *map(_percent, row))
    table.add_section()
    means = [None if None in column else sum(column) / len(column) for column in zip(*rows, strict=True)]
    table.add_row("mean", *map(_percent, means), style="bold")
    return table


def report_files(target: Path) -> dict[str, Path]:
    """Where `write_report` writes: the heat map, and for a directory the data too.

    Raises FasaError when `target` can be neither.
    """
    if target.suffix.lower() == ".png" and not target.is_dir():
        return {"heat map": target}
    if (target.suffix and not target.is_dir()) or target.is_file():
        raise FasaError(f"cannot write a report to {target}", hint="give a directory, or a file that ends in .png")
    return {"heat map": target / "calibration.png", "data": target / "calibration.json"}


def write_report(calibration: Calibration, target: Path, *, title: str) -> list[Path]:
    """Writes the heat map to a .png file, or that and the summary into a directory. Raises FasaError when it cannot."""
    files = report_files(target)
    write_bytes(files["heat map"], heat_map(calibration, title))
    if "data" in files:
        write_bytes(files["data"], (json.dumps(summarize(calibration), indent=2) + "\n").encode())
    return list(files.values())


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"

"""A record for people: as a table in the terminal, and as one HTML file that needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from fasa_trt.bench.plot import KERNEL_LINES, STEP_LINES, context_name, latency_svg
from fasa_trt.bench.record import require_one_run
from fasa_trt.core.errors import FasaError

FACTS = (
    "run_id", "time", "commit", "gpu", "driver", "cuda", "cpu", "cpu_count", "load_before", "system", "versions",
    "dtype", "weights", "layers", "sparse", "threads", "repeats", "linear_us", "missing", "skipped",
)  # fmt: skip


@dataclass(frozen=True)
class Table:
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables_of(record: Mapping[str, Any]) -> list[Table]:
    """The figures of a record. Raises FasaError for a kind of record that has no report."""
    if record["benchmark"] == "e2e":
        return [_steps(record)]
    if record["benchmark"] == "kernels":
        return [_kernels(record)] if record.get("rows") else []
    raise FasaError(f"no report for records of {record['benchmark']!r}", hint="e2e or kernels")


def html_report(records: Sequence[Mapping[str, Any]]) -> str:
    """One page about records of one run. Raises FasaError for records of several runs."""
    from jinja2 import Environment

    require_one_run([dict(record) for record in records])
    first = records[0]
    tables = [table for record in records for table in tables_of(record)]
    figures = [figure for record in records for figure in _figures(record)]
    where = first.get("gpu") or f"CPU: {first['cpu']}"
    facts = [(name, _text(first[name])) for name in FACTS if first.get(name) not in (None, {}, [])]
    template = resources.files("fasa_trt.bench").joinpath("report.html.jinja").read_text("utf-8")
    return (
        Environment(autoescape=True, trim_blocks=True)
        .from_string(template)
        .render(
            title=f"fasa-trt bench {', '.join(str(record['benchmark']) for record in records)}: {where}",
            note=first.get("note", ""),
            tables=tables,
            figures=figures,
            facts=facts,
            record=json.dumps(list(records), indent=1),
        )
    )


def _steps(record: Mapping[str, Any]) -> Table:
    columns = ("context x batch", "dense, ms", "FASA, ms", "ratio", "attention, dense", "attention, FASA", "tokens/s",
               "dense kernel")  # fmt: skip
    rows = [
        (
            f"{context_name(row['context'])} x {row['batch']}",
            f"{row['dense_ms']:.3f}",
            f"{row['fasa_ms']:.3f}",
            f"{row['speedup']:.2f}x",
            f"{row['attention_share']['dense']:.0%}",
            f"{row['attention_share']['fasa']:.0%}",
            f"{row['tokens_per_second']['fasa']:.0f}",
            str(row["dense_kernel"]),
        )
        for row in record["rows"]
    ]
    return Table(f"Decode steps, {record['shape']}", columns, rows)


def _kernels(record: Mapping[str, Any]) -> Table:
    columns = ("context x batch", "labels", "n_tip", "reduction", "dense, us", "FASA, us", "ratio", "dense kernel")
    rows = [
        (
            f"{context_name(row['context'])} x {row['batch']}",
            str(row["labels"]),
            str(row["n_tip"]),
            str(row["reduction"]),
            "-" if row["dense_us"] is None else f"{row['dense_us']:.1f}",
            f"{row['fasa_us']:.1f}",
            "-" if row["dense_us"] is None else f"{row['dense_us'] / row['fasa_us']:.2f}x",
            str(row["dense_kernel"] or "-"),
        )
        for row in record["rows"]
    ]
    return Table("Decode attention of one layer, Llama-3.1-8B's", columns, rows)


def _figures(record: Mapping[str, Any]) -> list[str]:
    if record["benchmark"] == "e2e":
        return [latency_svg(record["rows"], STEP_LINES, "milliseconds a step")] if record["rows"] else []
    points = record.get("crossover", {}).get("points", [])
    return [latency_svg(points, KERNEL_LINES, "microseconds per layer and step")] if points else []


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)

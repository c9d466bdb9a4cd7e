"""Results as tables in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table


def tables_of(rows: Sequence[dict[str, Any]]) -> list[Table]:
    """A table for each task: a line for each method and budget, a column for each context length."""
    return [_table(task, [row for row in rows if row["task"] == task]) for task in _unique(rows, "task")]


def _table(task: str, rows: Sequence[dict[str, Any]]) -> Table:
    contexts, metric = _unique(rows, "context"), rows[0]["metric"]
    unsolved = [str(row["context"]) for row in rows if row["method"] == "dense" and row["solved"] is False]
    note = f"dense attention does not solve this at {', '.join(unsolved)}: it says nothing about methods there"
    table = Table(title=f"{task}, {metric}, {rows[0]['samples']} samples", title_justify="left")
    if unsolved:
        table.caption, table.caption_justify = note, "left"
    table.add_column("method")
    table.add_column("budget", justify="right")
    for context in contexts:
        table.add_column(f"{context}", justify="right")
    table.add_column("KV read", justify="right")
    for method, budget in dict.fromkeys((row["method"], row["budget"]) for row in rows):
        mine = {row["context"]: row for row in rows if (row["method"], row["budget"]) == (method, budget)}
        cells = [f"{mine[context]['score']:.3f}" if context in mine else "-" for context in contexts]
        shares = [row["kv_share"] for row in mine.values()]
        low, high = f"{min(shares):.1%}", f"{max(shares):.1%}"
        share = low if low == high else f"{low}-{high}"
        table.add_row(method, "-" if budget is None else str(budget), *cells, share)
    return table


def _unique(rows: Sequence[dict[str, Any]], name: str) -> list[Any]:
    return list(dict.fromkeys(row[name] for row in rows))

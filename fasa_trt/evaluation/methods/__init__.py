"""The methods by name. To add one: a file here with a `Method` and its `Selector`, and a place in METHODS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any

from fasa_trt.core.errors import FasaError
from fasa_trt.evaluation.methods.base import Method
from fasa_trt.evaluation.methods.dense import Dense
from fasa_trt.evaluation.methods.fasa import Fasa
from fasa_trt.evaluation.methods.oracle import Oracle
from fasa_trt.evaluation.methods.quest import Quest
from fasa_trt.evaluation.methods.random_chunks import RandomChunks
from fasa_trt.evaluation.methods.snapkv import SnapKv
from fasa_trt.evaluation.methods.streamingllm import StreamingLlm
from fasa_trt.evaluation.methods.triattention import TriAttention

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (Dense, Fasa, Oracle, Quest, SnapKv, StreamingLlm, TriAttention, RandomChunks)
}


def parse_methods(text: str, budgets: Sequence[int]) -> list[Method]:
    """Every method of "fasa:n_tip=16,quest" with every budget, `dense` first and once. Raises FasaError."""
    wanted = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not wanted:
        raise FasaError("no methods to evaluate", hint=f"some of {', '.join(METHODS)}")
    found: dict[tuple[str, int], Method] = {}
    for spec in ("dense", *wanted):
        for budget in budgets:
            method = parse_method(spec, budget)
            found.setdefault((method.label, method.budget), method)
    return list(found.values())


def parse_method(spec: str, budget: int) -> Method:
    """One method, such as "fasa:n_tip=16:labels=prefix". Raises FasaError for what does not exist."""
    name, *options = spec.split(":")
    if name not in METHODS:
        raise FasaError(f"unknown method {name!r}", hint=f"one of {', '.join(METHODS)}")
    kind = METHODS[name]
    defaults = {f.name: f.default for f in fields(kind) if f.name != "budget" and f.default is not MISSING}
    chosen: dict[str, Any] = {"budget": budget} if kind.uses_budget else {}
    for option in options:
        key, sign, value = option.partition("=")
        if key not in defaults or not sign:
            raise FasaError(f"{name} has no option {option!r}", hint=f"{name}:option=value of {', '.join(defaults)}")
        chosen[key] = value if isinstance(defaults[key], str) else _whole(name, key, value)
    return kind(**chosen)


def _whole(name: str, key: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise FasaError(f"{name}:{key}={value} is not a whole number") from None

"""`fasa-trt inspect`: what an engine directory or a calibration profile holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fasa_trt.cli import options as opt


def inspect(
    path: Annotated[Path, typer.Argument(help="Engine directory, or profile.safetensors.")],
    json_output: opt.Json = False,
) -> None:
    """Show what an engine directory or a profile holds, after checking that it is sound."""
    from fasa_trt.core.errors import FasaError

    if not path.exists():
        raise FasaError(f"no such engine or profile: {path}", hint="make one with fasa-trt build or calibrate")
    facts = _engine(path) if path.is_dir() else _profile(path)
    if json_output:
        from fasa_trt.cli.console import print_json

        print_json(facts)
        return
    from rich.table import Table

    from fasa_trt.cli.console import out

    table = Table("", "", show_header=False, title=f"{facts['kind']} {path}")
    for key, value in facts.items():
        if key != "kind":
            table.add_row(key, _shown(value))
    out.print(table)


def _engine(path: Path) -> dict[str, Any]:
    from fasa_trt.core.engine_dir import open_engine

    engine = open_engine(path)
    layers = engine.fasa["layers"]
    return {
        "kind": "engine",
        "target": engine.target,
        "model": engine.fasa["model"],
        "fingerprint": engine.fasa["fingerprint"],
        **engine.config["pretrained_config"],
        **engine.config["build_config"],
        **engine.spec.to_json(),
        "sparse_layers": sum(layer["n_tip"] > 0 for layer in layers),
        "files": {name: entry["bytes"] for name, entry in engine.manifest["files"].items()},
        "versions": engine.manifest["versions"],
        "command": engine.manifest["command"],
    }


def _profile(path: Path) -> dict[str, Any]:
    from fasa_trt.core.profile import Profile

    profile = Profile.load(path)
    layers, heads, chunks = profile.spread.shape
    return {
        "kind": "profile",
        "fingerprint": profile.fingerprint,
        "layers": layers,
        "query_heads": heads,
        "kv_heads": profile.num_kv_heads,
        "frequency_chunks": chunks,
        "ks": list(profile.ks),
        "rules": ["spread", "agreement", *(["greedy"] if profile.greedy is not None else [])],
        **profile.info,
    }


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{key}: {item}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)

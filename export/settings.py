"""Settings of a build as users write them: read from a JSON file and from "key=value", and checked for their types."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fasa_trt.core.errors import FasaError


def read_settings(file: Path) -> dict[str, Any]:
    """The JSON object in `file`. Raises FasaError."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise FasaError(f"cannot read {file}: {error.strerror or error}") from None
    except ValueError as error:
        raise FasaError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise FasaError(f"{file} is not a JSON object", hint='for example {"budget": 256}')
    return content


def parse_setting(setting: str) -> dict[str, Any]:
    """{key: value} of "key=value"; a value that is not JSON is text. Raises FasaError."""
    key, equals, text = setting.partition("=")
    if not equals:
        raise FasaError(f"--set {setting!r} is not key=value", hint="for example --set budget=512")
    try:
        return {key.strip(): json.loads(text)}
    except ValueError:
        return {key.strip(): text}


def check_settings(chosen: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """`chosen` with underscores for dashes and values of the `known` types. Raises FasaError for others."""
    result = {}
    for key, value in chosen.items():
        name = key.replace("-", "_")
        if name not in known:
            raise FasaError(f"unknown build setting {key!r}", hint=f"known: {', '.join(sorted(known))}")
        result[name] = _typed(name, value, known[name])
    return result


def _typed(name: str, value: Any, kind: Any) -> Any:
    if name == "dense_layers":
        items = [value] if isinstance(value, int) and not isinstance(value, bool) else value
        if not isinstance(items, (list, tuple)) or not all(type(item) is int for item in items):
            raise FasaError(f"dense_layers must be layer numbers, not {value!r}", hint="for example [0, 1]")
        return tuple(items)
    if name == "arch" and type(value) in (str, int, float):  # 89 and 8.9 are numbers in JSON
        return str(value).removeprefix("sm_").replace(".", "")
    accepted = {str: (str,), int: (int,), str | None: (str, type(None)), int | None: (int, type(None))}[kind]
    if type(value) not in accepted:
        wanted = "text" if str in accepted else "a whole number"
        raise FasaError(f"{name} must be {wanted}, not {value!r}")
    return value

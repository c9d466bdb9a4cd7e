"""Everything that a build can be told, with defaults; from flags, a JSON file and --set key=value."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from fasa_trt.core.checkpoint import Checkpoint
from fasa_trt.core.errors import FasaError
from fasa_trt.core.rope import rotary_of
from fasa_trt.core.spec import SparseSpec
from fasa_trt.export.architectures import architecture_of
from fasa_trt.export.tensorrt import MAX_BUDGET

TARGETS = ("onnxruntime", "tensorrt-rtx", "tensorrt", "tensorrt-llm")
BUILDABLE = ("onnxruntime", "tensorrt-rtx")
FIXED_CAPACITY_LIMIT = 16384  # default tokens of a cache that is allocated whole


@dataclass(frozen=True)
class BuildConfig:
    """Flat, so that every field is one flag, one key of --config and one --set.

    target: where the engine runs; dtype: of weights and cache, "auto" for what the target runs best.
    max_seq_len: tokens of a row, prompt and answer; None for what the model was trained for (a fixed-capacity cache:
    at most 16384). max_batch_size: rows of a batch; None for 8, or 1 with a fixed-capacity cache.
    The rest as in `SparseSpec`.
    """

    target: str = "onnxruntime"
    dtype: str = "auto"
    max_seq_len: int | None = None
    max_batch_size: int | None = None
    budget: int = 256
    n_tip: int | None = None
    reduction: str = "sum"
    rule: str = "spread"
    sink: int = 4
    recent: int = 32
    dense_layers: tuple[int, ...] = ()

    @classmethod
    def resolve(
        cls,
        checkpoint: Checkpoint,
        *,
        file: Path | None = None,
        flags: Mapping[str, Any] | None = None,
        settings: Iterable[str] = (),
        default_target: str = "onnxruntime",
    ) -> BuildConfig:
        """Defaults, overridden by `file`, then by `flags` that are not None, then by `settings` ("key=value"); every
        default that depends on the model filled in and checked. Raises FasaError that names the wrong key or value."""
        chosen: dict[str, Any] = {"target": default_target}
        if file is not None:
            chosen.update(_checked(_read(file)))
        chosen.update(_checked({key: value for key, value in (flags or {}).items() if value is not None}))
        for setting in settings:
            chosen.update(_checked(_parse(setting)))
        return cls(**chosen)._complete(checkpoint)

    @property
    def fixed_capacity(self) -> bool:
        return self.target != "onnxruntime"

    @property
    def spec(self) -> SparseSpec:
        names = {field.name for field in fields(SparseSpec)}
        return SparseSpec.from_json({key: value for key, value in asdict(self).items() if key in names})

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "dense_layers": list(self.dense_layers)}

    def _complete(self, checkpoint: Checkpoint) -> BuildConfig:
        if self.target not in TARGETS:
            raise FasaError(f"unknown target {self.target!r}", hint=f"one of {', '.join(TARGETS)}")
        if self.target not in BUILDABLE:
            raise FasaError(
                f"target {self.target} needs the FASA plugin, which this version does not have yet",
                hint=f"build for {' or '.join(BUILDABLE)}",
            )
        rotary_of(checkpoint.config, 0)  # both refuse what cannot be exported, before anybody calibrates it
        architecture_of(checkpoint)
        trained = int(checkpoint.config.max_position_embeddings)
        limit = min(trained, FIXED_CAPACITY_LIMIT) if self.fixed_capacity else trained
        length = limit if self.max_seq_len is None else self.max_seq_len
        if length < 1:
            raise FasaError(f"max-seq-len must be at least 1, not {length}")
        if length > trained:
            raise FasaError(
                f"max-seq-len {length} is beyond the {trained} positions of this model",
                hint="lower it, or raise max_position_embeddings in its config.json if its RoPE reaches further",
            )
        if self.fixed_capacity and self.budget > MAX_BUDGET:
            raise FasaError(f"TensorRT's TopK takes at most {MAX_BUDGET} tokens, not a budget of {self.budget}")
        batch = (1 if self.fixed_capacity else 8) if self.max_batch_size is None else self.max_batch_size
        if batch < 1:
            raise FasaError(f"max-batch-size must be at least 1, not {batch}")
        spec = self.spec.resolve(head_dim=checkpoint.head_dim, num_layers=checkpoint.num_layers, max_seq_len=length)
        return replace(
            self,
            dtype=self._dtype(checkpoint),
            max_seq_len=length,
            max_batch_size=batch,
            n_tip=spec.n_tip,
            dense_layers=spec.dense_layers,
        )

    def _dtype(self, checkpoint: Checkpoint) -> str:
        if self.dtype == "auto":
            return "float32" if self.target == "onnxruntime" else checkpoint.dtype
        if self.dtype not in ("float32", "float16", "bfloat16"):
            raise FasaError(f"unknown dtype {self.dtype!r}", hint="auto, float32, float16 or bfloat16")
        return self.dtype


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise FasaError(f"cannot read {file}: {error.strerror or error}") from None
    except ValueError as error:
        raise FasaError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise FasaError(f"{file} is not a JSON object", hint='for example {"budget": 256}')
    return content


def _parse(setting: str) -> dict[str, Any]:
    key, equals, text = setting.partition("=")
    if not equals:
        raise FasaError(f"--set {setting!r} is not key=value", hint="for example --set budget=512")
    try:
        return {key.strip(): json.loads(text)}
    except ValueError:
        return {key.strip(): text}


def _checked(chosen: dict[str, Any]) -> dict[str, Any]:
    known = get_type_hints(BuildConfig)
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
    accepted = (str,) if kind is str else (int,) if kind is int else (int, type(None))
    if type(value) not in accepted:
        wanted = "text" if kind is str else "a whole number"
        raise FasaError(f"{name} must be {wanted}, not {value!r}")
    return value

"""The calibration profile: how well each frequency chunk of each query head predicts attention.

Stored as `profile.safetensors`: tensors `agreement`, `spread` and perhaps `greedy`, everything else as JSON in the
file's metadata. A profile holds measurements, not a choice: rule, n_tip and budget are decided when an engine is built.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fasa_trt.core.atomic import write_bytes
from fasa_trt.core.errors import FasaError

SCHEMA = 1


@dataclass(frozen=True)
class Profile:
    """Measurements per layer, query head and frequency chunk (FC); F = head_dim / 2.

    agreement: float32 [len(ks), layers, heads, F], mean contextual agreement CA_K (share of the true top K that the
        FC's own score finds), in 0..1. arXiv 2602.03152, "contextual agreement".
    spread: float32 [layers, heads, F], standard deviation over keys of the FC's partial logit, averaged over queries.
    greedy: int32 [layers, kv_heads, F] or None: FCs in the order in which forward selection took them.
    ks: the K of the sweep, ascending. num_kv_heads: KV heads that share the query heads evenly.
    fingerprint: of the checkpoint. info: free facts (samples, length, seed, corpus hash, versions).
    """

    agreement: NDArray[np.float32]
    spread: NDArray[np.float32]
    ks: tuple[int, ...]
    num_kv_heads: int
    fingerprint: str
    greedy: NDArray[np.int32] | None = None
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        return int(self.spread.shape[0])

    @property
    def num_chunks(self) -> int:
        return int(self.spread.shape[-1])

    def ranking(self, rule: str, *, budget: int) -> NDArray[np.int64]:
        """FCs of each KV head, best first: int64 [layers, kv_heads, F].

        `spread` and `agreement` average over the group's query heads; agreement uses the K nearest to `budget`.
        Ties go to the lower FC. Raises FasaError for `greedy` when it was not computed.
        """
        if rule == "greedy":
            if self.greedy is None:
                raise FasaError("this profile has no greedy order", hint="calibrate again with --greedy")
            return self.greedy.astype(np.int64)
        score = self.spread if rule == "spread" else self.agreement[self.nearest_k(budget)]
        layers, heads, chunks = score.shape
        grouped = score.reshape(layers, self.num_kv_heads, heads // self.num_kv_heads, chunks).mean(axis=2)
        return np.argsort(-grouped, axis=-1, kind="stable")

    def nearest_k(self, budget: int) -> int:
        """Index into `ks` of the K nearest to `budget`, in ratio."""
        return int(np.argmin(np.abs(np.log(np.asarray(self.ks) / budget))))

    def check(self, fingerprint: str) -> None:
        """Raises FasaError unless this profile was measured on the checkpoint with that fingerprint."""
        if self.fingerprint != fingerprint:
            raise FasaError(
                "the profile was calibrated on another model "
                f"(profile {self.fingerprint[:12]}, model {fingerprint[:12]})",
                hint="run fasa-trt calibrate on this model",
            )

    def save(self, path: Path) -> None:
        """Writes `path` at once or not at all. Raises FasaError when it cannot be written."""
        tensors: dict[str, NDArray[Any]] = {"agreement": self.agreement, "spread": self.spread}
        if self.greedy is not None:
            tensors["greedy"] = self.greedy
        facts = {
            "schema": SCHEMA,
            "ks": list(self.ks),
            "num_kv_heads": self.num_kv_heads,
            "fingerprint": self.fingerprint,
            "info": self.info,
        }
        contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
        write_bytes(path, save(contiguous, metadata={"fasa": json.dumps(facts, sort_keys=True)}))

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Raises FasaError when `path` is missing, corrupt, or not a profile of this schema."""
        if not path.is_file():
            raise FasaError(f"no such profile: {path}", hint="make one with fasa-trt calibrate")
        try:
            with safe_open(path, framework="numpy") as file:
                facts = json.loads((file.metadata() or {})["fasa"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if facts["schema"] != SCHEMA:
                raise FasaError(
                    f"{path} is a profile of schema {facts['schema']}, this version reads {SCHEMA}",
                    hint="calibrate again",
                )
            profile = cls(
                agreement=tensors["agreement"],
                spread=tensors["spread"],
                greedy=tensors.get("greedy"),
                ks=tuple(facts["ks"]),
                num_kv_heads=facts["num_kv_heads"],
                fingerprint=facts["fingerprint"],
                info=facts["info"],
            )
        except (SafetensorError, ValueError, KeyError, TypeError, OSError) as error:
            raise FasaError(f"{path} is not a calibration profile: {error}", hint="calibrate again") from None
        profile._check_shapes(path)
        return profile

    def _check_shapes(self, path: Path) -> None:
        layers, heads, chunks = self.spread.shape if self.spread.ndim == 3 else (0, 0, 0)
        numbers = (self.num_kv_heads, *self.ks)
        if not (
            len(numbers) > 1
            and all(type(number) is int and number > 0 for number in numbers)
            and heads > 0
            and heads % self.num_kv_heads == 0
            and self.agreement.shape == (len(self.ks), layers, heads, chunks)
            and (self.greedy is None or _is_order(self.greedy, (layers, self.num_kv_heads, chunks)))
        ):
            raise FasaError(
                f"{path} is not a calibration profile: its tables do not fit together", hint="calibrate again"
            )


def _is_order(order: NDArray[Any], shape: tuple[int, ...]) -> bool:
    """Whether each row along the last axis holds every chunk once."""
    return order.shape == shape and bool((np.sort(order, axis=-1) == np.arange(shape[-1])).all())

"""What can be trained, and how: free of PyTorch, because the data processes import it too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

SHORTEST_TASK = 512  # tokens that a problem or some notes need; shorter sequences are copies and text
TINY_TOKENIZER = Path(__file__).resolve().parents[1] / "models" / "fasa-tiny" / "tokenizer.json"

Mix = Literal["recall", "tasks"]
"""recall: code, and code with notes and recalls. tasks: prose and RULER's tasks as well."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama, named as in its config.json, shortened."""

    vocab: int = 2048
    hidden: int = 256
    layers: int = 6
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 128
    mlp: int = 768
    rope_theta: float = 500_000.0
    eps: float = 1e-5
    max_positions: int = 16384


@dataclass(frozen=True)
class Stage:
    """A sequence length, and the share of the training time after which it begins."""

    start: float
    length: int


@dataclass(frozen=True)
class Settings:
    """One training run; by default that of fasa-tiny. See the options in __main__.py.

    output: the Hugging Face checkpoint and its log. work: token ids and the state to resume from.
    """

    output: Path
    work: Path
    source: Sequence[Path]
    size: str = "tiny"
    shape: Shape = field(default_factory=Shape)
    mix: Mix = "recall"
    tokenizer: Path | None = None  # None trains one
    stages: tuple[Stage, ...] = (Stage(0.0, 1024), Stage(0.2, 4096), Stage(0.6, 8192))
    minutes: float = 11.5
    batch_tokens: int = 65536
    learning_rate: float = 2.5e-3
    warmup_steps: int = 300
    max_corpus_mb: float = 1000.0
    workers: int = 13
    eval_documents: int = 256
    cpu: bool = False
    compile: bool = True
    resume: bool = False
    seed: int = 0

    def length_at(self, progress: float) -> int:
        """The sequence length for a share of the training time, from 0 to 1."""
        return [stage.length for stage in self.stages if progress >= stage.start][-1]


def settings_of(size: str, *, output: Path, work: Path, source: Sequence[Path]) -> Settings:
    """The settings of a size in SIZES."""
    tiny = Settings(output=output, work=work, source=source)
    return tiny if size == "tiny" else _medium(output, work, source)


SIZES = ("tiny", "medium")


def _medium(output: Path, work: Path, source: Sequence[Path]) -> Settings:
    """31.7 M parameters (60.5 MiB in bfloat16), two query heads on a KV head, 32 frequency chunks a head."""
    return Settings(
        output=output,
        work=work,
        source=source,
        size="medium",
        shape=Shape(hidden=512, layers=12, heads=8, kv_heads=4, head_dim=64, mlp=1152),
        mix="tasks",
        tokenizer=TINY_TOKENIZER,
        # Looking back is learnt first, within a few hundred steps of short copies; then tasks, at last distance.
        stages=(Stage(0.0, 128), Stage(0.07, 512), Stage(0.3, 2048), Stage(0.55, 8192), Stage(0.7, 16384)),
        minutes=5.0,
        batch_tokens=32768,  # more steps rather than larger ones
        learning_rate=1.2e-3,
        warmup_steps=200,
        max_corpus_mb=200.0,
        eval_documents=32,
    )

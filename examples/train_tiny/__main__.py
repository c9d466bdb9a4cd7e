"""Command line: python -m examples.train_tiny --size medium --output runs/medium

Kept apart from the training itself, so that the data processes, which import this module too, do not load
PyTorch.
"""

from __future__ import annotations

import argparse
import dataclasses
import site
import sys
import sysconfig
from pathlib import Path

from examples.train_tiny.settings import SHORTEST_TASK, SIZES, Settings, Stage, settings_of
from fasa_trt.core.errors import FasaError

MIN_LENGTH = 64


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 1 after one line on what is wrong."""
    try:
        settings = parse(arguments)
        from examples.train_tiny.train import train

        train(settings)
    except FasaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse(arguments: list[str] | None = None) -> Settings:
    """Raises FasaError for values that do not go together, SystemExit as argparse does."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.train_tiny",
        description="Train a sample model. Unset options have the values that its size was made with.",
    )
    add = parser.add_argument
    add("--size", choices=SIZES, default="tiny", help="tiny: 8.0 M parameters, 8k tokens; medium: 31.7 M, 16k")
    add("--output", type=Path, help="folder for checkpoint and log; default: runs/train_tiny/SIZE/hf")
    add("--work", type=Path, help="folder for token ids and the state to resume from; default: runs/train_tiny/SIZE")
    add("--source", type=Path, nargs="+", help="folders with Python source; default: this Python's libraries")
    add("--minutes", type=float, help="training time, without preparation and evaluation")
    add("--lengths", type=int, nargs="+", help="sequence lengths of the stages, rising")
    add("--batch-tokens", type=int, help="tokens per step")
    add("--learning-rate", type=float)
    add("--max-corpus-mb", type=float, help="use at most this much source text")
    add("--workers", type=int, help="processes that prepare sequences")
    add("--eval-documents", type=int, help="documents of each part of the final evaluation")
    add("--cpu", action="store_true", help="train on the CPU: only to try the code")
    add("--no-compile", action="store_true", help="train without torch.compile")
    add("--resume", action="store_true", help="go on from the last state in --work")
    add("--seed", type=int)
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    size = given.pop("size")
    work = given.pop("work", Path("runs/train_tiny") / size)
    source = given.pop("source", None) or libraries()
    settings = settings_of(size, output=given.pop("output", work / "hf"), work=work, source=source)
    for folder in source:
        if not folder.is_dir():
            raise FasaError(f"no folder {folder}", hint="--source takes folders with Python source")
    lengths = given.pop("lengths", None)
    if lengths is not None:
        given["stages"] = _stages(settings, lengths)
    given["compile"] = not (given.pop("no_compile") or given["cpu"])
    settings = dataclasses.replace(settings, **given)
    for name in ("minutes", "batch_tokens", "learning_rate", "max_corpus_mb", "workers", "eval_documents"):
        if getattr(settings, name) <= 0:
            raise FasaError(f"--{name.replace('_', '-')} must be more than 0")
    return settings


def libraries() -> list[Path]:
    """Where this Python's standard library and installed packages are."""
    named = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
    return [folder for folder in map(Path, dict.fromkeys([*named, *site.getsitepackages()])) if folder.is_dir()]


def _stages(settings: Settings, lengths: list[int]) -> tuple[Stage, ...]:
    count, limit = len(settings.stages), settings.shape.max_positions
    least = MIN_LENGTH if settings.mix == "tasks" else SHORTEST_TASK
    if len(lengths) != count or min(lengths) < least or max(lengths) > limit or sorted(lengths) != lengths:
        raise FasaError(f"--lengths takes {count} numbers from {least} to {limit} that do not fall")
    if lengths[-1] < SHORTEST_TASK:
        raise FasaError(f"--lengths must end with {SHORTEST_TASK} or more", hint="tasks need as many tokens")
    return tuple(Stage(stage.start, length) for stage, length in zip(settings.stages, lengths, strict=True))


if __name__ == "__main__":
    sys.exit(main())

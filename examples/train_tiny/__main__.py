"""Command line: python -m examples.train_tiny --work runs/tiny

Kept apart from the training itself, so that the data processes, which import this module too, do not load
PyTorch.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.train_tiny", description="Train fasa-tiny.")
    add = parser.add_argument
    add("--work", type=Path, default=Path("runs/train_tiny"), help="folder for data and checkpoint")
    add("--source", type=Path, nargs="+", help="folders with Python source; default: this Python's libraries")
    add("--seconds", type=float, default=690.0, help="training time, without evaluation")
    add(
        "--lengths",
        type=int,
        nargs=3,
        default=(1024, 4096, 8192),
        help="of the three stages, each at least 640",
    )
    add("--batch-tokens", type=int, default=65536, help="tokens per step")
    add("--learning-rate", type=float, default=2.5e-3)
    add("--max-corpus-mb", type=float, default=1000.0, help="use at most this much source text")
    add("--workers", type=int, default=13, help="processes that prepare sequences")
    add("--eval-documents", type=int, default=256, help="documents of the final evaluation")
    add("--cpu", action="store_true", help="train on the CPU: only to try the code")
    add("--seed", type=int, default=0)
    args = vars(parser.parse_args())
    args["source"] = args["source"] or [Path(sysconfig.get_path(name)) for name in ("purelib", "stdlib")]
    args["lengths"] = tuple(args["lengths"])

    from examples.train_tiny.train import Settings, train

    train(Settings(**args))


if __name__ == "__main__":
    main()

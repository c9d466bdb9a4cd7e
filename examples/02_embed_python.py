"""Generates from Python with an engine directory that `fasa-trt build` made: one prompt, a batch, a stream, a service.

    python examples/02_embed_python.py out/demo/engine

The same code drives every target that can run here.
"""

from __future__ import annotations

import sys

from fasa_trt import Sampling, load
from fasa_trt.runtime.service import Service

PROMPTS = ["def fibonacci(n):\n", "class Stack:\n", "import os\n"]


def main(path: str) -> None:
    engine = load(path)

    for completion in engine.generate(PROMPTS, max_new_tokens=12):
        print(f"{completion.finish_reason:>6}: {completion.text!r}")

    for piece in engine.stream(PROMPTS[0], max_new_tokens=24, sampling=Sampling(temperature=0.7, top_p=0.9, seed=1)):
        print(piece.text, end="", flush=True)
    print(f"\nKV read: {engine.statistics.kv_share:.0%} of dense attention")

    # Requests from any thread, each with its own options; they join the running batch.
    with Service(engine) as service:
        streams = [service.submit(prompt, max_new_tokens=8 + 4 * i, stop=["\n\n"]) for i, prompt in enumerate(PROMPTS)]
        streams[2].cancel()
        for stream in streams[:2]:
            print(repr(stream.result().text))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])

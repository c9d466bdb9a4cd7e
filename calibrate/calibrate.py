"""Stage 1: measures how well each frequency chunk (FC) of each attention head of a model predicts its attention.

text -> windows of tokens -> model -> q, k after RoPE (capture) -> agreement, spread (measure) -> profile
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from fasa_trt.calibrate.corpus import Window, corpus_hash
from fasa_trt.calibrate.load import load_model, load_tokenizer, resolve_device, resolve_dtype
from fasa_trt.calibrate.result import Calibration
from fasa_trt.calibrate.run import MIN_LENGTH, CalibrationRun, rotary_layers
from fasa_trt.calibrate.windows import calibration_windows
from fasa_trt.core.checkpoint import Checkpoint
from fasa_trt.core.errors import FasaError


def calibrate(
    checkpoint: Checkpoint,
    *,
    text: Path | None = None,
    samples: int = 8,
    length: int = 8192,
    queries: int = 16,
    seed: int = 0,
    greedy: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Measures `queries` decode-like steps near the end of each of `samples` windows of `length` tokens.

    text: file, folder or .jsonl to calibrate on; None takes the bundled text, half of it with recall questions.
    greedy: also choose FCs by forward selection; it takes many times longer than all other measuring.
    device: auto, cpu, cuda or cuda:N. dtype: of the model, auto, float32, float16 or bfloat16; measuring is in float32.
    progress: called with (done, total) while it runs.
    Raises FasaError when the model has no RoPE, no tokenizer, attention of its own kind, or does not load or fit, and
    when the text is too short.
    """
    rotary_layers(checkpoint)  # a model without RoPE is refused before anything is loaded
    remarks: list[str] = []
    length = _allowed_length(checkpoint, length, remarks)
    if samples < 1 or not 1 <= queries <= length // 16:
        raise FasaError(
            f"cannot calibrate on {samples} samples with {queries} queries each",
            hint=f"at least 1 sample; 1 to {length // 16} queries in windows of {length} tokens",
        )
    place = resolve_device(device)
    precision = resolve_dtype(dtype, place, checkpoint)
    windows = _windows(checkpoint, text, length, samples, seed, trust_remote_code)
    if len(windows) < samples:
        remarks.append(f"the text fills {len(windows)} windows of {length} tokens, not {samples}: calibrated on those")
    run = CalibrationRun(checkpoint, windows, queries=queries, greedy=greedy)
    model = load_model(checkpoint, device=place, dtype=precision, trust_remote_code=trust_remote_code)
    try:
        run.run(model, progress or (lambda done, total: None))
    except torch.OutOfMemoryError:
        raise FasaError(f"{place} ran out of memory", hint="use a smaller --length, or --device cpu") from None
    info = {
        "samples": len(windows),
        "length": length,
        "queries": queries,
        "seed": seed,
        "text": "bundled" if text is None else text.name,
        "corpus_hash": corpus_hash(windows),
        "dtype": str(precision).removeprefix("torch."),
        "device": place.type,
        "versions": {name: version(name) for name in ("fasa-trt", "torch", "transformers")},
    }
    return run.result(info, remarks)


def _allowed_length(checkpoint: Checkpoint, length: int, remarks: list[str]) -> int:
    limit = getattr(checkpoint.config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        remarks.append(f"the model has {limit} positions: windows are {limit} tokens long, not {length}")
        length = int(limit)
    if length < MIN_LENGTH:
        raise FasaError(
            f"windows of {length} tokens are too short to calibrate on", hint=f"at least {MIN_LENGTH} tokens"
        )
    return length


def _windows(
    checkpoint: Checkpoint, text: Path | None, length: int, samples: int, seed: int, trust_remote_code: bool
) -> list[Window]:
    tokenizer = load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)

    def encode(part: str) -> list[int]:
        return tokenizer(part, add_special_tokens=False, verbose=False).input_ids

    windows = calibration_windows(encode, tokenizer("").input_ids, text, length=length, samples=samples, seed=seed)
    highest = max(int(window.max()) for window in windows)
    if highest >= checkpoint.config.vocab_size:
        raise FasaError(
            f"the tokenizer in {checkpoint.path} makes token {highest}, the model knows {checkpoint.config.vocab_size}",
            hint="it belongs to another model",
        )
    return windows

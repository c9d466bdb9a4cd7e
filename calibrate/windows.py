"""The token windows that a calibration runs on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fasa_trt.calibrate.corpus import Encode, Window, iter_documents, token_windows
from fasa_trt.calibrate.recall import recall_document

_TOKENS_PER_NOTE = 64  # so that notes and questions leave most of a short window to its text


def calibration_windows(
    encode: Encode, prefix: Sequence[int], text: Path | None, *, length: int, samples: int, seed: int
) -> list[Window]:
    """Up to `samples` windows of exactly `length` tokens, each starting with `prefix` (the tokenizer's BOS).

    text: whose windows to take, as it is. None takes the bundled text, and every second window becomes a recall
    window: heads that look far back show what they do only where something far back is asked for.
    Raises FasaError when the text does not fill one window.
    """
    room = length - len(prefix)
    if text is not None:
        bodies = token_windows(encode, iter_documents(text), room, samples, seed)
    else:
        plain = token_windows(encode, iter_documents(), room, (samples + 1) // 2, seed)
        recall = [recall_window(encode, room, seed * samples + i) for i in range(samples // 2)]
        bodies = [window for pair in zip(plain, recall, strict=False) for window in pair]
        bodies += plain[len(recall) :] + recall[len(plain) :]
    return [np.concatenate([np.array(prefix, dtype=np.int64), body]) for body in bodies]


def recall_window(encode: Encode, length: int, seed: int) -> Window:
    """Source code with notes in it, ending with the questions about them and the right answers: int64 [length].

    The text is cut at its start to make room for the questions, which may cost one or two of the notes.
    """
    document = recall_document(encode, length=length, notes=max(1, min(33, length // _TOKENS_PER_NOTE)), seed=seed)
    answered = "".join(f"{question.prompt}{question.answer}\n" for question in document.questions)
    return np.array([*encode(document.text), *encode(answered)][-length:], dtype=np.int64)

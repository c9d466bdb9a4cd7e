"""Windows for calibration: lengths, prefixes, recall questions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from fasa_trt.calibrate.corpus import Encode, corpus_hash
from fasa_trt.calibrate.run import query_positions
from fasa_trt.calibrate.windows import calibration_windows, recall_window
from fasa_trt.core.errors import FasaError


@pytest.fixture(scope="module")
def encode(tiny_tokenizer: PreTrainedTokenizerBase) -> Encode:
    return lambda text: tiny_tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_every_second_window_of_the_bundled_text_recalls(
    encode: Encode, tiny_tokenizer: PreTrainedTokenizerBase, samples: int
) -> None:
    windows = calibration_windows(encode, [0], None, length=1024, samples=samples, seed=3)
    assert [window.shape for window in windows] == [(1024,)] * samples
    assert all(window[0] == 0 for window in windows)
    texts = [tiny_tokenizer.decode(window) for window in windows]
    assert ["# recall" in text for text in texts] == [place % 2 == 1 for place in range(samples)]


def test_recall_windows_ask_where_queries_are_measured(encode: Encode, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    window = recall_window(encode, 8192, seed=1)
    text = str(tiny_tokenizer.decode(window))
    notes = dict(re.findall(r"^# note ([a-z]+) = (\d{5})$", text, re.M))
    questions = dict(re.findall(r"^# recall ([a-z]+) = (\d{5})$", text, re.M))
    assert len(questions) == 33 and 30 <= len(notes) <= 33
    assert notes.items() <= questions.items()
    measured = tiny_tokenizer.decode(window[query_positions(8192, 16)[0] :])
    assert measured.count("# recall") > 25


def test_seeds(encode: Encode) -> None:
    hashes = {
        corpus_hash(calibration_windows(encode, [], None, length=512, samples=4, seed=seed)) for seed in (0, 0, 1, 2)
    }
    assert len(hashes) == 3


def test_own_text_is_used_as_it_is(encode: Encode, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    file = tmp_path / "own.txt"
    file.write_text("a line of my own\n" * 400)
    windows = calibration_windows(encode, [0, 7], file, length=300, samples=100, seed=0)
    assert 1 < len(windows) < 100, "as many as the text fills"
    own = 0
    for window in windows:
        assert window.shape == (300,) and window[:2].tolist() == [0, 7]
        text = str(tiny_tokenizer.decode(window[2:]))
        assert text in "a line of my own\n" * 400
        own += len(text)
    assert own > 0.9 * len(file.read_text()) - 300


def test_too_short_text(encode: Encode, tmp_path: Path) -> None:
    file = tmp_path / "own.txt"
    file.write_text("short\n")
    with pytest.raises(FasaError, match="one window needs 299"):
        calibration_windows(encode, [0], file, length=300, samples=1, seed=0)

"""Documents and token windows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from fasa_trt.calibrate import corpus
from fasa_trt.calibrate.corpus import bundled_files, corpus_hash, iter_documents, token_windows
from fasa_trt.core.errors import FasaError


def characters(text: str) -> list[int]:
    return [ord(character) for character in text]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_bundled_text_is_code_and_prose() -> None:
    assert len(bundled_files("source")) >= 3 and len(bundled_files("prose")) >= 3
    documents = list(iter_documents(None))
    assert len(documents) == len(bundled_files())
    assert 350_000 < sum(map(len, documents)) < 450_000
    assert not any("\r" in document for document in documents)
    assert {"LICENSE", "NOTICE"} <= {file.name for file in corpus.BUNDLED.iterdir()}


def test_notice_names_every_bundled_file() -> None:
    notice = (corpus.BUNDLED / "NOTICE").read_text(encoding="utf-8")
    assert all(file.name in notice for file in bundled_files())


def test_a_file_is_one_document(tmp_path: Path) -> None:
    file = write(tmp_path / "notes.anything", "one\ntwo\n")
    assert list(iter_documents(file)) == ["one\ntwo\n"]


def test_a_folder_is_read_in_order_without_hidden_and_other_files(tmp_path: Path) -> None:
    write(tmp_path / "b.py", "second")
    write(tmp_path / "a" / "deep.md", "first")
    write(tmp_path / "c.jsonl", '{"text": "third"}\n\n{"text": "fourth"}\n')
    write(tmp_path / ".git" / "skipped.txt", "hidden")
    write(tmp_path / "weights.bin", "binary")
    write(tmp_path / "empty.txt", " \n")
    assert list(iter_documents(tmp_path)) == ["first", "second", "third", "fourth"]


def test_json_lines_are_streamed(tmp_path: Path) -> None:
    file = write(tmp_path / "big.jsonl", json.dumps({"text": "fine"}) + "\nnot json\n")
    documents = iter_documents(file)
    assert next(documents) == "fine"
    with pytest.raises(FasaError, match="line 2"):
        next(documents)


@pytest.mark.parametrize("line", ["[1]", '{"content": "x"}', '{"text": 3}', "null"])
def test_json_lines_without_text_are_refused(tmp_path: Path, line: str) -> None:
    with pytest.raises(FasaError, match=r"line 1: no text.*each line needs"):
        list(iter_documents(write(tmp_path / "x.jsonl", line)))


def test_missing_path_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(FasaError, match="no calibration text at"):
        iter_documents(tmp_path / "nowhere")


def test_folder_without_text_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "empty.txt", "\n")
    with pytest.raises(FasaError, match="no text in"):
        list(iter_documents(tmp_path))


@pytest.mark.parametrize("name", ["latin.txt", "latin.jsonl"])
def test_other_encodings_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(FasaError, match=r"latin.* is not UTF-8 text \(byte 0xe9\)"):
        list(iter_documents(tmp_path))


@given(
    sizes=st.lists(st.integers(0, 60), max_size=20),
    length=st.integers(1, 20),
    samples=st.integers(1, 8),
    seed=st.integers(0, 5),
)
def test_windows_are_whole_disjoint_and_repeatable(sizes: list[int], length: int, samples: int, seed: int) -> None:
    unique = map(chr, range(0x4E00, 0x9FFF))
    documents = ["".join(next(unique) for _ in range(size)) for size in sizes]
    total = sum(size + 1 for size in sizes if size)  # every document is ended with a newline
    if total < length:
        with pytest.raises(FasaError, match=f"has {total} tokens, one window needs {length}"):
            token_windows(characters, documents, length, samples, seed)
        return
    windows = token_windows(characters, documents, length, samples, seed)
    assert len(windows) >= min(samples, total // length)
    assert all(window.shape == (length,) and window.dtype == np.int64 for window in windows)
    tokens = [token for token in np.concatenate(windows) if token != ord("\n")]
    assert len(set(tokens)) == len(tokens)
    again = token_windows(characters, documents, length, samples, seed)
    assert corpus_hash(windows) == corpus_hash(again)


def test_seeds_choose_other_windows_of_one_document() -> None:
    text = "".join(f"{number}\n" for number in range(100_000))
    hashes = {corpus_hash(token_windows(characters, [text], 64, 4, seed)) for seed in range(8)}
    assert len(hashes) == 8


def test_only_the_text_that_is_needed_is_encoded() -> None:
    encoded: list[int] = []

    def counting(text: str) -> list[int]:
        encoded.append(len(text))
        return characters(text)

    token_windows(counting, ["line of text\n" * 100_000], 100, 3)
    assert sum(encoded) <= 2 * 800


def test_shuffling_holds_a_bounded_part_of_the_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "_SHUFFLE_CHARS", 1000)
    read: list[int] = []

    def documents() -> Iterator[str]:
        for number in range(500):
            read.append(number)
            yield f"{number:09}\n"

    token_windows(characters, documents(), 10, 5)
    assert len(read) <= 110


def test_hash_depends_on_order_and_shape() -> None:
    one, two = np.array([1, 2, 3]), np.array([4])
    assert corpus_hash([one, two]) != corpus_hash([two, one])
    assert corpus_hash([np.array([1, 2]), np.array([3, 4])]) != corpus_hash([np.array([1, 2, 3, 4])])


@pytest.mark.parametrize(("length", "samples"), [(0, 1), (1, 0)])
def test_nonsense_sizes_are_refused(length: int, samples: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        token_windows(characters, ["text"], length, samples)


def test_windows_of_the_sample_model(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    def encode(text: str) -> list[int]:
        return tiny_tokenizer.encode(text, add_special_tokens=False)

    windows = token_windows(encode, iter_documents(), length=2048, samples=8)
    assert len(windows) == 8
    assert all(window.min() >= 0 and window.max() < len(tiny_tokenizer) for window in windows)
    assert " the" in str(tiny_tokenizer.decode(windows[0]))

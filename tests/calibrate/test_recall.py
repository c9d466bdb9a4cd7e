"""Recall documents: length, notes, questions."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from fasa_trt.calibrate.corpus import Encode
from fasa_trt.calibrate.recall import RecallDocument, answer_of, note_line, recall_document
from fasa_trt.core.errors import FasaError


def characters(text: str) -> list[int]:
    return [ord(character) for character in text]


def words(text: str) -> list[str]:
    """A tokenizer whose tokens cross pieces: text joined from two parts can have fewer tokens than both."""
    return re.findall(r"\w+|\s+|[^\w\s]+", text)


@pytest.fixture(scope="module")
def encode(tiny_tokenizer: PreTrainedTokenizerBase) -> Encode:
    return lambda text: tiny_tokenizer.encode(text, add_special_tokens=False)


def check(document: RecallDocument, encode: Encode, length: int, notes: int) -> None:
    assert document.token_count == len(encode(document.text))
    assert 0.98 * length <= document.token_count <= length
    assert document.text.endswith("\n")
    found = dict(re.findall(r"^# note ([a-z]{4,6}) = (\d{5})\n", document.text, re.MULTILINE))
    assert len(found) == notes == document.text.count("# note ")
    assert {question.key: question.answer for question in document.questions} == found
    assert len(document.questions) == notes
    assert all(question.prompt == f"# recall {question.key} = " for question in document.questions)


@pytest.mark.parametrize("length", [512, 1024, 4096])
@pytest.mark.parametrize("seed", range(3))
def test_sample_model(encode: Encode, length: int, seed: int) -> None:
    notes = length // 64
    check(recall_document(encode, length=length, notes=notes, seed=seed), encode, length, notes)


def test_many_seeds_hit_the_length(encode: Encode) -> None:
    for seed in range(20):
        check(recall_document(encode, length=777, notes=8, seed=seed), encode, 777, 8)


@settings(deadline=None)
@given(length=st.integers(200, 3000), notes=st.integers(0, 8), seed=st.integers(0, 2**32))
def test_any_length_by_characters(length: int, notes: int, seed: int) -> None:
    check(recall_document(characters, length=length, notes=notes, seed=seed), characters, length, notes)


@settings(deadline=None, max_examples=50)
@given(
    pieces=st.lists(st.text("ab \n\f\r=", min_size=1, max_size=40), min_size=1),
    notes=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_any_filler(pieces: list[str], notes: int, seed: int) -> None:
    filler = pieces + ["more text to fill\n"] * 40
    document = recall_document(characters, filler, length=300, notes=notes, seed=seed)
    check(document, characters, 300, notes)


def test_tokens_across_lines(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    numbered: dict[str, int] = {}

    def encode(text: str) -> list[int]:
        return [numbered.setdefault(word, len(numbered)) for word in words(text)]

    check(recall_document(encode, length=1500, notes=20), encode, 1500, 20)


def test_a_seed_repeats_and_another_differs(encode: Encode) -> None:
    one = recall_document(encode, length=600, notes=4, seed=1)
    assert one == recall_document(encode, length=600, notes=4, seed=1)
    other = recall_document(encode, length=600, notes=4, seed=2)
    assert {q.key for q in one.questions}.isdisjoint(q.key for q in other.questions)
    assert one.text[:100] != other.text[:100]


def test_notes_are_spread_over_the_text(encode: Encode) -> None:
    document = recall_document(encode, length=4096, notes=8)
    places = [match.start() / len(document.text) for match in re.finditer("^# note", document.text, re.M)]
    for stretch, place in enumerate(places):
        assert (stretch - 0.5) / 8 <= place <= (stretch + 1.5) / 8


def test_questions_are_not_in_the_order_of_the_notes() -> None:
    document = recall_document(characters, length=4000, notes=20)
    places = [document.text.index(note_line(q.key, q.answer)) for q in document.questions]
    assert places != sorted(places)


def test_little_is_encoded() -> None:
    encoded: list[int] = []

    def counting(text: str) -> list[int]:
        encoded.append(len(text))
        return characters(text)

    recall_document(counting, length=20_000)
    assert sum(encoded) < 12 * 20_000


def test_filler_is_read_as_far_as_needed() -> None:
    def filler() -> Iterator[str]:
        while True:
            yield "endless\n"

    check(recall_document(characters, filler(), length=500, notes=2), characters, 500, 2)


def test_too_short_for_its_notes() -> None:
    with pytest.raises(FasaError, match="33 notes alone are longer than 100 tokens"):
        recall_document(characters, length=100)


def test_too_little_filler() -> None:
    with pytest.raises(FasaError, match="the filler has 6 tokens, 500 are needed"):
        recall_document(characters, ["short\n"], length=500, notes=1)


@pytest.mark.parametrize(
    ("generated", "answer"),
    [
        ("12345\nimport os", "12345"),
        (" 12345", "12345"),
        ("123456", "12345"),
        ("", ""),
        ("\n12345", ""),
        ("12 \n", "12"),
    ],
)
def test_answer_of(generated: str, answer: str) -> None:
    assert answer_of(generated) == answer

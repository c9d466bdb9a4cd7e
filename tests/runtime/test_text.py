"""Pieces of text join up to the whole text, and stop strings are never seen."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from fasa_trt.runtime.text import TextStream

shared = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
VOCABULARY = 2048
tokens = st.lists(st.integers(0, VOCABULARY - 1), max_size=30)
characters = st.text(st.sampled_from("aab .\n\N{GRINNING FACE}\N{FAMILY}\N{EURO SIGN}\N{CJK UNIFIED IDEOGRAPH-4E2D}é"))


def ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def decoded(tokenizer: Any, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


def run(tokenizer: Any, tokens: list[int], stop: list[str] | None = None) -> tuple[TextStream, list[str]]:
    """Feeds tokens until the stream has stopped, as generation does, and checks what it says of itself."""
    stream = TextStream(tokenizer, stop or [])
    pieces = []
    for token in tokens:
        pieces.append(stream.push(token))
        assert stream.text == "".join(pieces)
        if stream.stopped:
            break
    pieces.append(stream.finish())
    assert stream.text == "".join(pieces)
    return stream, pieces


@shared
@given(tokens)
def test_pieces_of_random_tokens_join_to_the_whole(tiny_tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> None:
    """Among them special tokens and bytes that are no characters."""
    stream, _ = run(tiny_tokenizer, tokens)
    assert stream.text == decoded(tiny_tokenizer, tokens)
    assert not stream.stopped


@shared
@given(characters)
def test_pieces_of_text_are_whole_characters(tiny_tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    stream, pieces = run(tiny_tokenizer, ids(tiny_tokenizer, text))
    assert stream.text == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert pieces[-1] == "", "nothing was left to flush"


def test_emoji_spans_several_tokens(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = ids(tiny_tokenizer, "a\N{GRINNING FACE}b")
    assert len(tokens) > 3, "the tokenizer has learnt it: choose another character"
    _, pieces = run(tiny_tokenizer, tokens)
    assert [piece for piece in pieces if piece] == ["a", "\N{GRINNING FACE}", "b"]


def test_text_appears_as_early_as_it_can(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = ids(tiny_tokenizer, "def total(values): return sum(values)")
    stream = TextStream(tiny_tokenizer)
    for count, token in enumerate(tokens, start=1):
        stream.push(token)
        assert stream.text == decoded(tiny_tokenizer, tokens[:count])


def test_half_a_character_at_the_end_is_flushed(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = ids(tiny_tokenizer, "a\N{GRINNING FACE}")[:-1]
    stream, pieces = run(tiny_tokenizer, tokens)
    assert stream.text == decoded(tiny_tokenizer, tokens)
    assert stream.text.startswith("a\N{REPLACEMENT CHARACTER}")
    assert pieces[-1] == stream.text[1:]
    assert stream.finish() == "", "flushing twice adds nothing"


def test_nothing() -> None:
    stream = TextStream(None)
    assert (stream.finish(), stream.text, stream.stopped) == ("", "", False)


# --- stop strings ---


class Letters:
    """A tokenizer whose tokens are the strings that the test wants."""

    def __init__(self, *vocabulary: str) -> None:
        self.vocabulary = vocabulary

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return "".join(self.vocabulary[token] for token in tokens)


@pytest.mark.parametrize(
    ("chunks", "stop", "text"),
    [
        (["one STOP two"], ["STOP"], "one "),
        (["one S", "TO", "P two"], ["STOP"], "one "),
        (["one S", "TO", "O"], ["STOP"], "one STOO"),
        (["one STO"], ["STOP"], "one STO"),
        (["STOP"], ["STOP"], ""),
        (["a", "a", "a", "b"], ["aab"], "a"),
        (["ab", "ab", "ac"], ["abac"], "ab"),
        (["x", "\n", "\n", "y"], ["\n\n"], "x"),
        (["x\n", "y\n\nz"], ["\n\n"], "x\ny"),
        (["one END two STOP"], ["STOP", "END"], "one "),
        (["one ST", "END"], ["STOP", "END"], "one ST"),
        (["a", "b", "c"], ["abcd", "bc"], "a"),
        (["one", " two"], [""], "one two"),
        (["one", " two"], [], "one two"),
        (["a", "b"], ["b"], "a"),
    ],
)
def test_stop_strings(chunks: list[str], stop: list[str], text: str) -> None:
    stream, _ = run(Letters(*chunks), list(range(len(chunks))), stop)
    assert stream.text == text
    assert stream.stopped == (text != "".join(chunks))


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    stream = TextStream(Letters("one ", "S", "T", "x", "ST"), ["STOP"])
    assert [stream.push(token) for token in range(5)] == ["one ", "", "", "STx", ""]
    assert stream.finish() == "ST"


def test_nothing_follows_a_stop_string() -> None:
    stream = TextStream(Letters("a", ".", "b"), ["."])
    assert [stream.push(token) for token in (0, 1, 2, 2)] == ["a", "", "", ""]
    assert (stream.finish(), stream.text, stream.stopped) == ("", "a", True)


class Bytes:
    """One token a byte."""

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return bytes(tokens).decode("utf-8", "replace")


def test_stop_string_with_characters_of_many_bytes() -> None:
    text = "go\N{OCTAGONAL SIGN}on"
    stream, _ = run(Bytes(), list(text.encode()), ["\N{OCTAGONAL SIGN}"])
    assert stream.text == "go" and stream.stopped


def test_stop_string_before_half_a_character_is_found_at_the_end() -> None:
    """The token ".\\xf0" is held back as a whole; nothing comes to complete it."""

    class Mixed:
        def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
            return b"".join([b"a", b".\xf0"][token] for token in tokens).decode("utf-8", "replace")

    stream, _ = run(Mixed(), [0, 1], ["."])
    assert stream.text == "a" and stream.stopped


letters = st.text("ab.", max_size=12)


@settings(deadline=None)
@given(st.lists(letters.filter(bool), max_size=12), st.lists(st.text("ab.", min_size=1, max_size=4), max_size=3))
@example(["aab"], ["ab", "aab"])
def test_random_stop_strings(chunks: list[str], stop: list[str]) -> None:
    """Whatever the token boundaries: the text before, all of it, and no stop string."""
    stream, _ = run(Letters(*chunks), list(range(len(chunks))), stop)
    whole = "".join(chunks)
    assert whole.startswith(stream.text)
    assert not any(text in stream.text for text in stop)
    if stream.stopped:
        assert any(whole.startswith(text, len(stream.text)) for text in stop)
    else:
        assert stream.text == whole
    if len(stop) == 1:
        assert stream.text == whole.split(stop[0])[0]


@shared
@given(tokens, st.data())
def test_stop_string_cut_from_the_text(
    tiny_tokenizer: PreTrainedTokenizerBase, tokens: list[int], data: st.DataObject
) -> None:
    whole = decoded(tiny_tokenizer, tokens)
    if not whole:
        return
    start = data.draw(st.integers(0, len(whole) - 1))
    stop = whole[start : start + data.draw(st.integers(1, 8))]
    if "\N{REPLACEMENT CHARACTER}" in stop:  # half a character may yet become another one
        return
    stream, _ = run(tiny_tokenizer, tokens, [stop])
    assert stream.stopped
    assert stream.text == whole[: whole.find(stop)]

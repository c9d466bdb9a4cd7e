"""Metrics on answers whose score one can work out."""

from __future__ import annotations

import pytest

from fasa_trt.evaluation import metrics


def test_words_that_both_have() -> None:
    assert metrics.qa_f1("The cat, sat!", "a cat sat") == 1.0
    assert metrics.qa_f1("cat sat on mats", "cat ran") == pytest.approx(2 * 1 / (4 + 2))
    assert metrics.qa_f1("", "cat") == 0.0


def test_longest_common_subsequence() -> None:
    assert metrics.rouge_l("a b c d", "a c x d") == pytest.approx(2 * 3 / 8)
    assert metrics.rouge_l("d c b a", "a b c d") == pytest.approx(2 * 1 / 8)
    assert metrics.rouge_l("same words", "same words") == 1.0


def test_classes() -> None:
    classes = ["City", "Country", "Other city"]
    assert metrics.classification("it is City", "City", classes) == 1.0
    assert metrics.classification("City or Country", "City", classes) == 0.5
    assert metrics.classification("Country", "City", classes) == 0.0


def test_numbers() -> None:
    assert metrics.retrieval("Paragraph 3, not 4", "Paragraph 3") == 0.5
    assert metrics.count("17", "17") == 1.0 and metrics.count("none", "17") == 0.0


def test_code() -> None:
    assert metrics.code_similarity("# a comment\nreturn x\nmore", "return x") == 1.0
    assert 0 < metrics.code_similarity("return y", "return x") < 1
    assert metrics.code_similarity("", "return x") == 0.0


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (r"\boxed{033}", 1),
        (r"\boxed{3} then \boxed{33}", 1),
        ("I get 33", 1),
        ("33 or 34", 0),
        ("", 0),
        (r"\boxed{x}", 0),
    ],
)
def test_final_answers(text: str, score: float) -> None:
    assert metrics.same_number(text, "33") == score

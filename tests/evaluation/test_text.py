from __future__ import annotations

import numpy as np
import pytest

from llm_at_home.evaluation.text import (
    contains,
    corpus_bleu,
    is_refusal,
    rouge_scores,
    share,
    squad_scores,
    text_quality,
)

REFUSAL = "The handbook does not say."


@pytest.mark.parametrize(
    ("prediction", "reference", "exact"),
    [
        ("The Red Room.", "red room", 1.0),
        ("  a  red\troom!! ", "Red Room", 1.0),
        ("red rooms", "red room", 0.0),
        ("It is the red room", "red room", 0.0),
        ("", "red room", 0.0),
        ("9:30", "930", 1.0),
        ("Theatre", "atre", 0.0),
    ],
)
def test_exact_match_overlooks_case_articles_punctuation_and_blanks(prediction, reference, exact) -> None:
    assert squad_scores(prediction, reference)[0] == exact


@pytest.mark.parametrize(
    ("prediction", "reference", "f1"),
    [
        ("red room", "red room", 1.0),
        ("it is the red room", "red room", 2 * (2 / 4) * (2 / 2) / (2 / 4 + 2 / 2)),  # "the" is no token
        ("blue room", "big red room", 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3)),
        ("red red", "red room", 2 * (1 / 2) * (1 / 2) / (1 / 2 + 1 / 2)),
        ("blue", "red", 0.0),
        ("", "red", 0.0),
    ],
)
def test_token_f1_by_hand(prediction: str, reference: str, f1: float) -> None:
    assert squad_scores(prediction, reference)[1] == pytest.approx(f1, abs=1e-6)


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        (REFUSAL, True),
        ("the handbook  does not say", True),
        ("Sorry: the handbook does NOT say!", True),
        ("The handbook says nine.", False),
        ("", False),
    ],
)
def test_a_refusal_is_known_whatever_case_and_punctuation(answer: str, refused: bool) -> None:
    assert is_refusal(answer, REFUSAL) is refused


@pytest.mark.parametrize(
    ("answer", "reference", "contained"),
    [
        ("The head of the casting hall is Odile Farrow.", "Odile Farrow", True),
        ("It stands in THE TOP  drawer!", "in the top drawer", True),
        ("It is 127 days.", "27 days", False),
        ("It is redder.", "red", False),
        ("Farrow, Odile", "Odile Farrow", False),
        ("anything", "the", False),
        ("", "red", False),
    ],
)
def test_an_answer_in_a_sentence_holds_the_reference(answer: str, reference: str, contained: bool) -> None:
    assert contains(answer, reference) is contained


def test_each_figure_is_over_its_own_questions() -> None:
    kinds = ["fact", "fact", "fact", "fact", "refusal", "refusal"]
    references = ["nine", "red room", "Ada", "ten", REFUSAL, REFUSAL]
    predictions = ["Nine.", "the blue room", REFUSAL, "ten", "the handbook does not say", "Blue"]
    figures = text_quality(kinds, predictions, references, REFUSAL)
    shares = {name: figure for name, figure in figures.items() if name != "bleu"}
    assert {name: (r.value, r.n, r.unit) for name, r in shares.items()} == {
        "exact_match": (0.5, 4, "1"),
        "token_f1": (pytest.approx((1 + 0.5 + 0 + 1) / 4), 4, "1"),
        "reference_contained": (0.5, 4, "1"),
        "rouge_1": (pytest.approx((1 + 0.4 + 0 + 1) / 4), 4, "1"),
        "rouge_2": (0.0, 4, "1"),
        "rouge_l": (pytest.approx((1 + 0.4 + 0 + 1) / 4), 4, "1"),
        "refusal_recall": (0.5, 2, "1"),
        "false_refusal_rate": (0.25, 4, "1"),
    }
    assert {r.method for r in shares.values()} == {"squad", "squad_words", "canonical_refusal", "rouge_f1"}
    for reading in shares.values():
        low, high = reading.interval95
        assert 0 <= low <= reading.value <= high <= 1


def test_a_data_set_without_refusals_has_no_figure_about_them() -> None:
    figures = text_quality(["fact"], ["a"], ["b"], None)
    assert set(figures) == {"exact_match", "token_f1", "reference_contained", "bleu", "rouge_1", "rouge_2", "rouge_l"}


def test_no_question_is_unknown_with_the_reason_and_not_zero() -> None:
    figures = text_quality(["fact"], ["nine"], ["nine"], REFUSAL)
    assert figures["exact_match"].value == 1.0
    assert figures["refusal_recall"].value is None
    assert figures["refusal_recall"].reason == "the test split has no such question"
    assert all(reading.value is None and reading.reason for reading in text_quality([], [], [], REFUSAL).values())


def test_one_question_has_a_value_and_no_interval() -> None:
    assert share([1.0], "squad").interval95 is None


@pytest.mark.parametrize(("n", "ones"), [(2, 1), (5, 1), (60, 57), (200, 0), (200, 90)])
def test_the_interval_holds_the_mean_and_has_the_right_width(n: int, ones: int) -> None:
    values = [1.0] * ones + [0.0] * (n - ones)
    reading = share(values, "squad")
    low, high = reading.interval95
    assert low <= reading.value <= high
    if n == 200:
        assert high - low == pytest.approx(2 * 1.96 * np.std(values) / np.sqrt(n), rel=0.12, abs=1e-12)
    assert share(values, "squad") == reading, "the draws are seeded"


SAID = [
    "The keys hang on the hook behind the green door.",
    "It opens at nine in the morning and closes at six.",
    "Ask Odile Farrow in the casting hall, she knows the kiln well.",
]
EXPECTED = [
    "The keys hang on the third hook behind the green door.",
    "It opens at nine in the morning, and closes at half past six.",
    "Odile Farrow knows.",
]


def test_bleu_is_sacrebleu_s_over_the_whole_corpus() -> None:
    from torchmetrics.functional.text import sacre_bleu_score

    for said, expected in ((SAID, EXPECTED), (EXPECTED, SAID), (["", *SAID], ["Nine.", *EXPECTED])):
        reading = corpus_bleu(said, expected)
        assert reading.value == pytest.approx(float(sacre_bleu_score(said, [[one] for one in expected])), abs=1e-6)
        low, high = reading.interval95
        assert low < reading.value < high
        assert reading.n == len(said)
    one = corpus_bleu(SAID[:1], EXPECTED[:1])
    assert one.value == pytest.approx(float(sacre_bleu_score(SAID[:1], [EXPECTED[:1]])), abs=1e-6)
    assert one.interval95 is None


def test_bleu_s_interval_is_over_resampled_corpora_and_not_a_mean_of_sentences() -> None:
    # Copies of one pair have the same corpus score however they are drawn; one that matches nothing pulls it down.
    same = corpus_bleu(SAID[:1] * 5, EXPECTED[:1] * 5)
    assert same.interval95 == pytest.approx((same.value, same.value))
    assert (
        corpus_bleu([*SAID, "none of it at all here"], [*EXPECTED, "Nine."]).value < corpus_bleu(SAID, EXPECTED).value
    )


@pytest.mark.parametrize("said", [["nine", "red room", ""], ["", "", ""]])
def test_answers_too_short_for_four_grams_have_no_bleu(said) -> None:
    reading = corpus_bleu(said, ["nine", "red room", "Ada"])
    assert reading.value is None
    assert "four tokens" in reading.reason


def test_long_answers_without_a_match_have_a_bleu_of_zero() -> None:
    assert corpus_bleu(["one two three four five"], ["six seven eight nine ten"]).value == 0.0


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("the red room", "the red room", (1, 1, 1)),
        # three of four words, no pair of neighbours, a subsequence of two
        ("b a c d", "a b c e", (0.75, 0, 0.5)),
        ("red", "red room", (2 / 3, 0, 2 / 3)),
        ("", "red room", (0, 0, 0)),
    ],
)
def test_rouge_by_hand(prediction: str, reference: str, expected: tuple[float, ...]) -> None:
    assert tuple(rouge_scores(prediction, reference).values()) == pytest.approx(expected, abs=1e-6)

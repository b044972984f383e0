import pytest

from llm_at_home.evaluation.judge.ratings import parse_rating, parse_verdict


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("Rating: [[7]]", 7),
        ("Rating: [[7.5]]", 7.5),
        ("[[10]]", 10),
        ("[[1]] and later [[9]]", 1),
        ("Rating: [8]", 8),
        ("see [2], so [[6]]", 6),
        ("[[0]]", None),
        ("[[11]]", None),
        ("[[100]] or [5]", None),
        ("[[-3]]", None),
        ("[[8/10]]", None),
        ("[[rating]]", None),
        ("Rating: 7", None),
        ("I would give it a 9 out of 10.", None),
        ("", None),
    ],
)
def test_a_rating_is_read_or_missing(reply: str, rating: float | None) -> None:
    assert parse_rating(reply) == rating


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("[[A]]", "A"),
        ("both err, but [[B]] it is: [[B]]", "B"),
        ("[[C]]", "tie"),
        ("[[A]] or rather [[B]]", None),
        ("[[D]]", None),
        ("[A]", None),
        ("A is better", None),
        ("", None),
    ],
)
def test_a_verdict_is_read_or_missing(reply: str, verdict: str | None) -> None:
    assert parse_verdict(reply) == verdict

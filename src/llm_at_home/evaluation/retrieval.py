"""Which passages answer a question, by BM25 (Robertson and Zaragoza 2009), from the ``bm25s`` package."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from llm_at_home.errors import Refusal
from llm_at_home.evaluation.text import contains, share
from llm_at_home.records.schema import Reading


class BM25:
    """An index over passages: Lucene's BM25 with k1 = 1.5 and b = 0.75, English stop words left out, no stemming.

    Args:
        passages: the texts to choose from.

    Raises:
        Refusal: when no passage holds a word that could be searched for.
    """

    def __init__(self, passages: Sequence[str]) -> None:
        import bm25s

        logging.getLogger("bm25s").setLevel(logging.WARNING)  # which logs each index at DEBUG
        self._tokenize = bm25s.tokenize
        words = self._words(passages)
        if not any(words):
            raise Refusal("no passage holds a word that can be searched for: use text.context=all")
        self._index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
        self._index.index(words, show_progress=False)

    def _words(self, texts: Sequence[str]) -> list[list[str]]:
        return self._tokenize(list(texts), stopwords="en", return_ids=False, show_progress=False)

    def best(self, query: str, count: int) -> list[int]:
        """Places of the passages that share a word with the query, the best first, equals in their order.

        Args:
            query: a question.
            count: at most so many.
        """
        (words,) = self._words([query]) or [[]]
        if not words:
            return []
        scores = self._index.get_scores(words)
        order = np.argsort(-scores, kind="stable")[:count]
        return [int(place) for place in order if scores[place] > 0]


def retrieval_recall(given: Sequence[Sequence[str]], references: Sequence[str], kinds: Sequence[str]) -> Reading:
    """The share of the answerable questions whose reference answer stands in the passages that they were given.

    Args:
        given: the passages of each question.
        references: the expected answers.
        kinds: of the questions; ``refusal`` marks those that nothing answers.
    """
    asked = zip(given, references, kinds, strict=True)
    found = [any(contains(p, reference) for p in passages) for passages, reference, kind in asked if kind != "refusal"]
    return share(found, "reference_in_passages")

"""How good a generated text is against one reference, in [0, 1], as the papers' evaluation scripts count it."""

from __future__ import annotations

import string
from collections.abc import Callable
from functools import cache

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def text_score(metric: str) -> Callable[[str, str], float]:
    """The function (text, reference) -> score of a metric of `slao.streams.base.METRICS`.

    ImportError: "rouge_l" without the package rouge-score.
    """
    if metric == "rouge_l":
        return _rouge_l()
    return {"accuracy": same, "exact_match": exact_match}[metric]


def same(text: str, reference: str) -> float:
    """1.0 where both are one text, white space and case aside."""
    return float(" ".join(text.split()).lower() == " ".join(reference.split()).lower())


def exact_match(text: str, reference: str) -> float:
    """1.0 where both are one text, punctuation, white space and case aside (SuperNI's evaluation)."""
    return same(text.translate(_NO_PUNCTUATION), reference.translate(_NO_PUNCTUATION))


@cache
def _rouge_l() -> Callable[[str, str], float]:
    """F1 of the longest common subsequence of words, stemmed as SuperNI's evaluation does (Lin, ROUGE, 2004)."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError('tasks scored by rouge_l need `rouge-score`: pip install "slao_kernels[rouge]"') from error
    scorer = RougeScorer(["rougeL"], use_stemmer=True)

    def rouge_l(text: str, reference: str) -> float:
        return float(scorer.score(target=reference, prediction=text)["rougeL"].fmeasure)

    return rouge_l

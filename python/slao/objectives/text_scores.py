"""How good a generated text is against one reference, in [0, 1], as the papers' evaluation scripts count it."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable
from functools import cache

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# Py150's places for literals: bare ones stand for 0 or nothing, others carry what is most often there.
_LITERAL = re.compile(r"<(STR|NUM|CHAR)_LIT(?::(.*?))?>", re.S)


def text_score(metric: str) -> Callable[[str, str, str], float]:
    """The function (text, reference, prompt) -> score of a metric of `slao.streams.base.METRICS`.

    ImportError: "rouge_l" without the package rouge-score.
    """
    if metric == "sari":
        return sari
    scores = {"accuracy": same, "exact_match": exact_match, "first_letter": first_letter}
    score = _rouge_l() if metric == "rouge_l" else {**scores, "code_similarity": code_similarity}[metric]
    return lambda text, reference, prompt: score(text, reference)


def same(text: str, reference: str) -> float:
    """1.0 where both are one text, white space and case aside."""
    return float(" ".join(text.split()).lower() == " ".join(reference.split()).lower())


def exact_match(text: str, reference: str) -> float:
    """1.0 where both are one text, punctuation, white space and case aside (SuperNI's evaluation)."""
    return same(text.translate(_NO_PUNCTUATION), reference.translate(_NO_PUNCTUATION))


def first_letter(text: str, reference: str) -> float:
    """1.0 where both begin with one character: the letter of the answer, before its reasons (TRACE's ScienceQA)."""
    first = text.strip()[:1]
    return float(first != "" and first == reference.strip()[:1])


def code_similarity(text: str, reference: str) -> float:
    """2 c / (length of both), c that of their longest common subsequence of characters, literals' places filled first.

    Up to rounding fuzz.ratio of fuzzywuzzy with python-Levenshtein (CodeXGLUE, TRACE), which without it takes difflib's
    matching blocks instead."""
    first, second = (_LITERAL.sub(_literal, code) for code in (text, reference))
    return 2 * _common(first, second) / (len(first) + len(second)) if first and second else 0.0


def _literal(found: re.Match[str]) -> str:
    return found[2] if found[2] is not None else "0" if found[1] == "NUM" else ""


def _common(first: str, second: str) -> int:
    """Length of the longest common subsequence, a row of its table in the bits of one number (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for i, character in enumerate(first):
        places[character] = places.get(character, 0) | 1 << i
    every = (1 << len(first)) - 1
    row = every
    for character in second:
        met = row & places.get(character, 0)
        row = (row + met | row - met) & every
    return len(first) - row.bit_count()


def sari(text: str, reference: str, prompt: str) -> float:
    """How well words of the prompt were kept and left out, and new ones added (Xu et al., TACL 2016), in [0, 1].

    The mean over n = 1 … 4 words of F1 of what is kept, F1 of what is added, precision of what is left out; then of the
    three: as in the authors' code, where nothing of nothing counts as 1. Words are lower case, and each sign of
    punctuation is one; sacrebleu's tokens, in the `sari` that TRACE calls, leave 3.5 and Covid-19 whole.
    """
    scores = [_sari_of(n, *(_words(each) for each in (text, reference, prompt))) for n in range(1, 5)]
    return sum(map(sum, scores)) / 12


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


def _sari_of(n: int, text: list[str], reference: list[str], prompt: list[str]) -> tuple[float, float, float]:
    out, right, source = (
        Counter(zip(*(words[i:] for i in range(n)), strict=False)) for words in (text, reference, prompt)
    )
    kept, left, added = out & source, source - out, out.keys() - source.keys()
    good, to_keep, to_add = kept & right, source & right, right.keys() - source.keys()
    keep = _f1(_mean(good, kept), sum(good.values()) / sum(to_keep.values()) if to_keep else 1.0)
    new = len(added & right.keys())
    add = _f1(new / len(added) if added else 1.0, new / len(to_add) if to_add else 1.0)
    return keep, add, _mean(left - right, left)


def _mean(good: Counter[tuple[str, ...]], of: Counter[tuple[str, ...]]) -> float:
    """Over the n-grams of `of`, the part of each that is in `good`; 1 where there are none."""
    return sum(good[gram] / count for gram, count in of.items()) / len(of) if of else 1.0


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


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

"""How likely each of a set of answers is: as if every prompt were run with every answer, alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from causal_models import CONFIGS, UNSHARED, WINDOWED, WORDS, causal
from torch import Tensor

from slao import logits
from slao.objectives.likelihood import log_likelihoods, most_likely

# One begins another, two begin alike, one stands twice, one is a single token.
ANSWERS = [[7, 8, 9, 2], [7, 8, 2], [7, 2], [11, 2], [12, 13, 14, 15, 2], [11, 20, 2], [2], [7, 8, 9, 2]]
CLOSE = 1e-5  # of a log-probability of five tokens, each some 4.6: sums of fp32


def prompts() -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(5, WORDS) for _ in range(draw.randrange(1, 20))] for _ in range(7)]


def one_by_one(model: Any, lines: list[list[int]], answers: list[list[int]]) -> Tensor:
    found = torch.zeros(len(lines), len(answers))
    with torch.no_grad():
        for i, line in enumerate(lines):
            for j, answer in enumerate(answers):
                logp = model(input_ids=torch.tensor([line + answer])).logits[0].float().log_softmax(-1)
                found[i, j] = sum(logp[len(line) - 1 + k, token] for k, token in enumerate(answer))
    return found


@pytest.mark.parametrize("size", [1, 3, 64])
@pytest.mark.parametrize("kind", [*CONFIGS, *WINDOWED, *UNSHARED])
def test_as_one_by_one(kind, size, monkeypatch):
    model = causal(kind)
    monkeypatch.setattr(logits, "_CHUNK", (5 if size == 3 else 1000) * WORDS)
    found = log_likelihoods(model, prompts(), ANSWERS, size, 0)
    best = most_likely(model, prompts(), ANSWERS, size, 0)
    assert model.training
    expected = one_by_one(model.eval(), prompts(), ANSWERS)
    assert (found - expected).abs().max() <= CLOSE
    assert (expected.amax(1) - expected[torch.arange(len(best)), best]).max() <= CLOSE


def test_answers_of_one_token():
    model, answers = causal("llama").eval(), [[3], [4], [5]]
    found = log_likelihoods(model, prompts(), answers, 8, 0)
    assert (found - one_by_one(model, prompts(), answers)).abs().max() <= CLOSE


def test_no_more_sequences_at_a_time_than_asked_for():
    model, seen = causal("llama").eval(), []
    model.model.register_forward_pre_hook(
        lambda module, args, given: seen.append(len(given["input_ids"])), with_kwargs=True
    )
    answers = [[token, 9, 2] for token in range(10, 30)]
    found = log_likelihoods(model, prompts(), answers, 4, 0)
    assert max(seen) <= 4
    assert (found - one_by_one(model, prompts(), answers)).abs().max() <= CLOSE


def test_a_prompt_is_run_once_and_what_answers_share_once():
    model, seen = causal("llama"), []
    model.model.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["input_ids"].shape), with_kwargs=True
    )
    log_likelihoods(model, [[5] * 20, [6] * 20], ANSWERS, 64, 0)
    # [7, 8, 9], [12, 13, 14, 15] and [11, 20] after each of two prompts, padded to four.
    assert [tuple(shape) for shape in seen] == [(2, 20), (6, 4)]


@pytest.mark.parametrize("sharp", [1, 16, 100])
def test_answers_that_cannot_be_the_best_are_not_run(sharp):
    """A model that is sure runs its own answer alone; one that is not, also what that one's whole leaves open: as far
    as two tokens, and then what is still open."""
    model, seen, line, draw = causal("llama").eval(), [], prompts()[0], random.Random(1)
    model.lm_head.weight.data *= sharp
    own = model.generate(torch.tensor([line]), max_new_tokens=4, do_sample=False)[0, len(line) :].tolist()
    others = [token for token in range(40, 60) if token != own[0]]
    answers = [own, *([token, *(draw.randrange(5, WORDS) for _ in range(3))] for token in others)]
    lines = [line, line]
    expected = one_by_one(model, lines, answers)
    begun = [one_by_one(model, [line], [answer[:count] for answer in answers[1:]]) for count in (1, 2)]
    further = [2 * int((logp >= expected[0, 0]).sum()) for logp in begun]
    model.model.register_forward_pre_hook(
        lambda module, args, given: seen.append(len(given["input_ids"])), with_kwargs=True
    )
    assert most_likely(model, lines, answers, 64, 0) == expected.argmax(1).tolist()
    assert seen == [2, 2, *(count for count in further if count)]
    assert {1: further == [40, 40], 16: 40 > further[0] > further[1] > 0, 100: further == [0, 0]}[sharp]


def test_of_equal_answers_the_first_counts():
    model = causal("llama").eval()
    assert most_likely(model, prompts(), [[3, 4], [7, 8, 2], [7, 8, 2]], 8, 0) == [
        int(row[1] >= row[0]) for row in one_by_one(model, prompts(), [[3, 4], [7, 8, 2]])
    ]

"""MagMax: entry by entry the largest change, ties to the newer."""

from __future__ import annotations

import pytest
import torch

from slao import MagMax, SeqLoRA


@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_the_merge_is_the_formula(lab, scale):
    """Over all tasks at once: the newest of the largest, by a search in reversed order."""
    method = lab.make(MagMax, scale=scale)
    start = [tensor.clone() for pair in method.pairs for tensor in (pair.A, pair.B)]
    changes: list[list[torch.Tensor]] = []
    for index in range(4):
        lab.task(method, index)
        live = [tensor for pair in method.pairs for tensor in (pair.A, pair.B)]
        changes.append([now - old for now, old in zip(live, start, strict=True)])
    winners = set()
    with method.merged():
        merged = [tensor.clone() for pair in method.pairs for tensor in (pair.A, pair.B)]
    for k, found in enumerate(merged):
        newest_first = torch.stack([task[k] for task in reversed(changes)])
        best = newest_first.abs().argmax(0, keepdim=True)
        winners |= set(best.unique().tolist())
        assert torch.equal(found, start[k] + scale * newest_first.gather(0, best)[0])
    assert len(winners) > 1


def test_ties_go_to_the_newer(lab):
    method = lab.make(MagMax, scale=1.0)
    start = method.pairs[0].A.clone()
    for index, value in enumerate((0.25, -0.25, 0.125)):  # powers of two about a start of zero: exact ties
        lab.begin(method, index)
        if index == 0:
            method._start[f"{method.pairs[0].name}.A"] = torch.zeros_like(start)
        method.pairs[0].A.fill_(value)
        lab.end(method, index)
    with method.merged():
        assert (method.pairs[0].A == -0.25).all()


def test_training_is_seqloras(lab):
    plain, method = lab.make(SeqLoRA), lab.make(MagMax)
    for each in (plain, method):
        lab.task(each, 0)
        lab.task(each, 1)
    assert torch.equal(lab.logits(plain), lab.logits(method))
    with method.merged():
        assert not torch.equal(lab.logits(plain), lab.logits(method))


def test_refusals(lab):
    for scale in (0.0, 1.5):
        with pytest.raises(ValueError, match=rf"scale must lie in \(0, 1\], not {scale}"):
            lab.make(MagMax, scale=scale)
    method = lab.make(MagMax)
    with pytest.raises(ValueError, match="the saved start of .*q_proj.A does not fit its"):
        method._load_state({f"{method.pairs[0].name}.B_start": torch.zeros(2)})

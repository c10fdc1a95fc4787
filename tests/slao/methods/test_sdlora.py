"""SD-LoRA: unit directions, trained magnitudes."""

from __future__ import annotations

import pytest
import torch

from slao import SDLoRA
from slao_kernels.testing import error_ratio


@pytest.mark.parametrize("patched", [True, False])
def test_a_new_task_starts_where_the_last_ended_with_unit_directions(lab, patched):
    method = lab.make(SDLoRA, patched=patched)
    lab.task(method, 0)
    for index in (1, 2, 3):
        trained, before = lab.logits(method), lab.deltas(method)
        lab.begin(method, index)
        assert error_ratio(lab.logits(method), trained) <= 1e-12
        for k, layer in enumerate(method.layers):
            A, B = method.frozen(k)
            assert tuple(layer.slao_frozen_scale.shape) == (index,)
            for one, other in zip(A.split(4), B.split(4, 1), strict=True):
                assert (other @ one).norm().item() == pytest.approx(1.0, rel=1e-12)
            parts = zip(layer.slao_frozen_scale, A.split(4), B.split(4, 1), strict=True)
            want = method.pairs[k].scaling * sum(scale * other @ one for scale, one, other in parts)
            assert error_ratio(want.detach(), before[k]) <= 1e-12
        directions = [method.frozen(k)[0].clone() for k in range(len(method.layers))]
        scales = [layer.slao_frozen_scale.detach().clone() for layer in method.layers]
        lab.train(method, shift=index)
        for k, layer in enumerate(method.layers):
            assert torch.equal(method.frozen(k)[0], directions[k])
            moved = (layer.slao_frozen_scale.detach() - scales[k]).abs()
            assert moved.max() > 1e-3
            assert moved.all()
        with method.merged():
            assert error_ratio(lab.logits(method), trained) <= 1e-12
        assert error_ratio(lab.logits(method), trained) > 1e-4
        lab.end(method, index)


def test_a_pair_that_stayed_zero_makes_no_nan(lab):
    method = lab.make(SDLoRA)
    for index in range(3):
        lab.begin(method, index)
        lab.end(method, index)
    assert not any(delta.any() for delta in lab.deltas(method))
    method.model(lab.IDS, labels=lab.IDS).loss.backward()
    assert all(layer.slao_frozen_scale.grad.isfinite().all() for layer in method.layers)


def test_a_state_with_the_wrong_number_of_magnitudes_is_refused(lab):
    method = lab.make(SDLoRA)
    name = method.pairs[0].name
    frozen = {f"{name}.frozen_A": torch.ones(4, 32), f"{name}.frozen_B": torch.ones(32, 4)}
    with pytest.raises(ValueError, match=f"the saved magnitudes of {name} do not fit its frozen pairs"):
        method._load_state(frozen | {f"{name}.frozen_scale": torch.ones(2)})
    assert method.layers[0].slao_frozen_A is None

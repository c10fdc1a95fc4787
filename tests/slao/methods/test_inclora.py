"""IncLoRA: the sum of its pairs, old ones frozen."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from slao import IncLoRA
from slao_kernels.testing import error_ratio, tiny_model


@pytest.mark.parametrize("patched", [True, False])
def test_the_model_is_the_sum_of_all_pairs_and_old_ones_do_not_move(lab, patched):
    """fp64, so agreement to 1e-12 leaves room for the order of sums only."""
    method = lab.make(IncLoRA, patched=patched)
    pairs: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
    for index in range(3):
        before = lab.logits(method)
        lab.begin(method, index)
        assert error_ratio(lab.logits(method), before) <= 1e-12  # B = 0
        lab.train(method, shift=index)
        with method.merged():
            assert error_ratio(lab.logits(method), before) <= 1e-12
        lab.end(method, index)
        assert error_ratio(lab.logits(method), before) > 1e-4
        pairs.append([(pair.A.clone(), pair.B.clone()) for pair in method.pairs])
        for k, delta in enumerate(lab.deltas(method)):
            want = method.pairs[k].scaling * sum(task[k][1] @ task[k][0] for task in pairs)
            assert error_ratio(delta, want) <= 1e-12
    for k in range(len(method.pairs)):
        A, B = method.frozen(k)
        assert torch.equal(A, torch.cat([task[k][0] for task in pairs[:-1]]))
        assert torch.equal(B, torch.cat([task[k][1] for task in pairs[:-1]], 1))
    assert method.lambdas == [1.0, 1.0, 1.0]


def test_finished_pairs_beyond_the_most_are_cut_to_the_nearest_of_that_rank(lab):
    """fp64, against the SVD of the dense sum: 1e-12 of it, squared norms of what the cut leaves out included."""
    method = lab.make(IncLoRA, max_pairs=2)
    before: list[torch.Tensor] = [torch.zeros(())] * len(method.pairs)
    for index in range(5):
        lab.begin(method, index)
        for k, pair in enumerate(method.pairs):
            A, B = method.frozen(k)
            assert len(A) == min(index, 2) * pair.rank
            if index > 2:
                U, S, Vh = torch.linalg.svd(before[k])
                most = 2 * pair.rank
                assert error_ratio(pair.scaling * B @ A, (U[:, :most] * S[:most]) @ Vh[:most]) <= 1e-12
                assert S[most] > 1e-6 * S[0], "nothing was cut"
        lab.train(method, shift=index)
        lab.end(method, index)
        before = lab.deltas(method)
    bytes_then = method.state_bytes()
    lab.task(method, 5)
    assert method.state_bytes() == bytes_then


def test_a_layer_of_less_rank_than_is_kept_keeps_the_whole_sum(lab):
    """Two layers of one r, the rows of v_proj too few for four pairs."""
    method = lab.make(IncLoRA, max_pairs=4, lora={"r": 8})
    deltas: list[torch.Tensor] = []
    for index in range(6):
        lab.begin(method, index)
        for pair, delta, (A, B) in zip(
            method.pairs, deltas, map(method.frozen, range(len(method.pairs))), strict=False
        ):
            assert len(A) == min(index, 4) * 8
            if len(pair.B) < 32:
                assert error_ratio(pair.scaling * B @ A, delta) <= 1e-12
        lab.train(method, shift=index)
        lab.end(method, index)
        deltas = lab.deltas(method)
    assert min(len(pair.B) for pair in method.pairs) < 32


def test_a_cut_state_goes_on_and_is_exported(lab, tmp_path):
    """Bit for bit; what PEFT loads of it is the merged model (fp32: 1e-5)."""
    first, second = (lab.make(IncLoRA, dtype=torch.float32, max_pairs=1) for _ in range(2))
    for index in range(3):
        lab.task(first, index)
    first.save(tmp_path / "state")
    second.load(tmp_path / "state")
    for method in (first, second):
        lab.task(method, 3)
    for index in range(len(first.pairs)):
        both = zip(first.frozen(index), second.frozen(index), strict=True)
        assert all(torch.equal(one, other) for one, other in both)
        assert torch.equal(first.pairs[index].B, second.pairs[index].B)
    first.save_pretrained(tmp_path / "out")
    model = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / "out")).eval()
    assert model.peft_config["default"].r == 2 * first.pairs[0].rank
    with first.merged(), torch.no_grad():
        assert error_ratio(model(lab.IDS).logits, lab.logits(first)) <= 1e-5
    whole = lab.make(IncLoRA, dtype=torch.float32)
    with pytest.raises(ValueError, match="max_pairs"):
        whole.load(tmp_path / "state")
    assert "max_pairs" not in whole._options()  # states of before the option go on


def test_no_pairs_at_all_are_refused(lab):
    with pytest.raises(ValueError, match="max_pairs must be at least 1, or None for all, not 0"):
        lab.make(IncLoRA, max_pairs=0)


def test_each_task_starts_from_a_fresh_pair_that_its_seed_decides(lab):
    starts = []
    for seed in (0, 0, 1):
        method = lab.make(IncLoRA, seed=3 + seed)
        method.seed = seed
        lab.task(method, 0)
        for index in (1, 2):
            lab.begin(method, index)
            starts.append(method.pairs[0].A.clone())
            assert not method.pairs[0].B.any()
            assert method.pairs[0].A.abs().max() <= method.pairs[0].A.shape[1] ** -0.5
            lab.end(method, index)
    assert torch.equal(starts[0], starts[2])
    assert torch.equal(starts[1], starts[3])
    assert not torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[4])


def test_a_state_whose_frozen_pairs_do_not_fit_is_refused(lab):
    method = lab.make(IncLoRA)
    name = method.pairs[0].name
    for tensors in ({f"{name}.frozen_A": torch.ones(4, 32)}, {f"{name}.frozen_{f}": torch.ones(6, 32) for f in "AB"}):
        with pytest.raises(ValueError, match=f"the saved frozen_A and frozen_B of {name} do not fit its A"):
            method._load_state(tensors)
    assert method.layers[0].slao_frozen_A is None

"""IncSLAO: its merge against dense averages and SVDs, what answers come from, its state and its export."""

from __future__ import annotations

import pytest
import torch
from method_experts import model_of
from peft import PeftModel

from slao import SLAO, IncLoRA, IncSLAO
from slao_kernels.testing import error_ratio, tiny_model


def cut(dense: torch.Tensor, rank: int) -> torch.Tensor:
    U, S, Vh = torch.linalg.svd(dense)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


@pytest.mark.parametrize("patched", [True, False])
@pytest.mark.parametrize("schedule", ["inv_sqrt", 0.3, "adaptive"])
def test_answers_come_from_the_average_of_the_sums(lab, patched, schedule):
    """fp64, against dense SVDs: what a task trains beside is the sum of the finished pairs, cut to two; M is the
    average of what was trained, cut to three."""
    method = lab.make(IncSLAO, patched=patched, schedule=schedule)
    merged: list[torch.Tensor] = []
    for index in range(6):
        lab.begin(method, index)
        lab.train(method, shift=index)
        sums = lab.deltas(method)  # frozen and live, as the model computes
        trained = lab.logits(method)
        if index:
            with method.merged():  # of the tasks before
                assert max(error_ratio(a, b) for a, b in zip(lab.deltas(method), merged, strict=True)) <= 1e-10
        assert torch.equal(lab.logits(method), trained)
        lab.end(method, index)
        if index == 0:
            merged = sums
        else:
            lam = method.lambdas[-1]
            each = lam if isinstance(lam, list) else [lam] * len(sums)
            wanted = [old + one * (new - old) for old, new, one in zip(merged, sums, each, strict=True)]
            merged = [cut(each, 3 * 4) for each in wanted]
            if index > 3:
                assert error_ratio(merged[0], wanted[0]) > 1e-6, "nothing was cut"
        with method.merged():
            assert max(error_ratio(a, b) for a, b in zip(lab.deltas(method), merged, strict=True)) <= 1e-10
            shown = lab.logits(method)
        assert torch.equal(lab.logits(method), trained)
        assert index == 0 or error_ratio(shown, trained) > 1e-4
    if schedule == "inv_sqrt":
        assert method.lambdas == pytest.approx([i**-0.5 for i in range(1, 7)], rel=1e-15)
    if schedule == "adaptive":
        assert len(set(method.lambdas[2])) > 1
        assert all(1 / 3 <= one <= 1 for one in method.lambdas[2])


def test_it_trains_as_inclora_does(lab):
    """The average is for answers alone."""
    method, plain = lab.make(IncSLAO, max_pairs=2), lab.make(IncLoRA, max_pairs=2)
    for index in range(4):
        for each in (method, plain):
            lab.task(each, index)
        assert torch.equal(lab.logits(method), lab.logits(plain))


def test_its_state_is_four_times_slaos_and_stays(lab):
    method = lab.make(IncSLAO)
    sizes = []
    for index in range(6):
        lab.task(method, index)
        sizes.append(method.state_bytes())
    pair = sum(part.nbytes for each in method.pairs for part in (each.A, each.B))
    assert sizes == [2 * pair, 5 * pair, 6 * pair, 6 * pair, 6 * pair, 6 * pair]


def test_the_export_is_a_plain_adapter_of_the_merges_rank(lab, tmp_path):
    method = lab.make(IncSLAO)
    for index in range(4):
        lab.task(method, index)
    method.save_pretrained(tmp_path)
    with method.merged():
        expected = lab.logits(method)
    torch.manual_seed(0)
    plain = PeftModel.from_pretrained(tiny_model("llama"), tmp_path).double()
    assert plain.peft_config["default"].r == 12
    with torch.no_grad():
        assert error_ratio(plain(lab.IDS).logits, expected) <= 1e-6  # written in fp64, loaded in fp32


class Third:
    """A schedule that is an object."""

    def __call__(self, i, stats):
        return 1 / 3


@pytest.mark.parametrize("kind", [SLAO, IncSLAO])
def test_a_schedule_that_is_an_object_can_be_saved(lab, tmp_path, kind):
    method = lab.make(kind, schedule=Third())
    for index in range(2):
        lab.task(method, index)
    method.save(tmp_path)
    lab.make(kind, schedule=Third(), seed=1).load(tmp_path)
    with pytest.raises(ValueError, match="schedule"):
        lab.make(kind).load(tmp_path)


def test_a_layer_of_less_rank_than_is_kept(lab):
    """Its sum is whole, and the rest zeros."""
    method = lab.make(IncSLAO, lora={"r": 16, "target_modules": ["q_proj", "v_proj"]})
    wanted: list[torch.Tensor] = []
    for index in range(4):
        lab.begin(method, index)
        lab.train(method, shift=index)
        sums = lab.deltas(method)
        lab.end(method, index)
        lam = method.lambdas[-1]
        wanted = [old + lam * (new - old) for old, new in zip(wanted or sums, sums, strict=True)]
        with method.merged(fold=True):
            folded = lab.logits(method)
        with method.merged():
            found = lab.deltas(method)
            assert error_ratio(lab.logits(method), folded) <= 1e-10
    assert min(found[0].shape) < 48
    assert max(error_ratio(a, b) for a, b in zip(found, wanted, strict=True)) <= 1e-8


def test_experts_are_averaged_each(lab):
    method = IncSLAO(model_of(), max_pairs=1, merged_pairs=2, schedule=0.25)
    before: list[list[torch.Tensor]] = []
    for index in range(3):
        lab.task(method, index)
        sums = [
            [b.double() @ a.double() for a, b in zip(pair.split("A", A), pair.split("B", B), strict=True)]
            for pair, (A, B) in zip(method.pairs, method._sums(), strict=True)
        ]
        if index == 0:
            before = sums
        else:
            before = [
                [cut(old + 0.25 * (new - old), 2 * pair.rank) for old, new in zip(*two, strict=True)]
                for pair, *two in zip(method.pairs, before, sums, strict=True)
            ]
        for pair, (A, B), wanted in zip(method.pairs, method._merged, before, strict=True):
            found = [b.double() @ a.double() for a, b in zip(pair.split("A", A), pair.split("B", B), strict=True)]
            assert max(error_ratio(a, b) for a, b in zip(found, wanted, strict=True)) <= 1e-8


def test_refusals(lab):
    with pytest.raises(ValueError, match="merged_pairs must be at least 1, not 0"):
        lab.make(IncSLAO, merged_pairs=0)
    with pytest.raises(ValueError, match="max_pairs must be at least 1"):
        lab.make(IncSLAO, max_pairs=0)
    method = lab.make(IncSLAO, schedule=lambda i, stats: 2.0)
    lab.task(method, 0)
    lab.begin(method, 1)
    before = [A.clone() for A, _ in method._merged]
    with pytest.raises(ValueError, match=r"the schedule's λ must lie in \[0, 1\]: .*q_proj: 2.0"):
        lab.end(method, 1)
    assert all(torch.equal(A, old) for (A, _), old in zip(method._merged, before, strict=True))
    pair = method.pairs[0]
    cut_to_five = {
        f"{pair.name}.A_merged": torch.zeros(5, pair.A.shape[1]),
        f"{pair.name}.B_merged": torch.zeros(len(pair.B), 5),
    }
    with pytest.raises(ValueError, match="the saved A_merged and B_merged of .*q_proj do not fit its A"):
        method._load_state(cut_to_five)
    with pytest.raises(ValueError, match="the saved merge of .*q_proj does not fit: 0 pairs of at most 3"):
        method._load_state({"x_merged": torch.zeros(1)})


@pytest.mark.parametrize("schedule", ["inv_sqrt", "adaptive"])
def test_slao_averages_products_where_it_is_asked_to(lab, schedule):
    """fp64, against dense SVDs; training is plain SLAO's."""
    method, plain = lab.make(SLAO, merge="product", schedule=schedule), lab.make(SLAO)
    merged: list[torch.Tensor] = []
    for index in range(5):
        for each in (method, plain):
            lab.begin(each, index)
            lab.train(each, shift=index)
        trained = lab.deltas(method)
        assert all(torch.equal(a, b) for a, b in zip(trained, lab.deltas(plain), strict=True))
        for each in (method, plain):
            lab.end(each, index)
        lam = method.lambdas[-1]
        weights = lam if isinstance(lam, list) else [lam] * len(trained)
        wanted = [
            new if index == 0 else old + one * (new - old)
            for old, new, one in zip(merged or trained, trained, weights, strict=True)
        ]
        merged = [cut(each, 2 * 4) for each in wanted]
        if index > 1:
            assert error_ratio(merged[0], wanted[0]) > 1e-6, "nothing was cut"
        with method.merged():
            assert max(error_ratio(a, b) for a, b in zip(lab.deltas(method), merged, strict=True)) <= 1e-10
        assert all(torch.equal(a, b) for a, b in zip(lab.deltas(method), trained, strict=True))
    pair = sum(part.nbytes for each in method.pairs for part in (each.A, each.B))
    assert method.state_bytes() == 3 * pair


def test_slaos_product_is_saved_loaded_and_exported(lab, tmp_path):
    whole = lab.make(SLAO, merge="product", merged_pairs=3)
    for index in range(3):
        if index == 2:
            whole.save(tmp_path / "state")
        lab.task(whole, index)
    resumed = lab.make(SLAO, merge="product", merged_pairs=3, seed=1)
    with torch.no_grad():
        for name, parameter in resumed.model.named_parameters():
            if "lora_" not in name:
                parameter.copy_(dict(whole.model.named_parameters())[name])
    resumed.load(tmp_path / "state")
    lab.task(resumed, 2)
    with whole.merged(), resumed.merged():
        expected = lab.logits(whole)
        assert torch.equal(lab.logits(resumed), expected)
    whole.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(0)
    plain = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "adapter").double()
    assert plain.peft_config["default"].r == 12
    with torch.no_grad():
        assert error_ratio(plain(lab.IDS).logits, expected) <= 1e-6
    with pytest.raises(ValueError, match="merged_pairs"):
        lab.make(SLAO, merge="product").load(tmp_path / "state")
    with pytest.raises(ValueError, match="merged_pairs must be at least 1, not 0"):
        lab.make(SLAO, merge="product", merged_pairs=0)
    with pytest.raises(ValueError, match="init='merged' starts from a merged A and B"):
        lab.make(SLAO, merge="product", init="merged")

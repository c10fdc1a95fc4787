"""SLoRA: what is kept of a task's pair, against dense SVDs and against random completions of its singular vectors."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import slao_kernels
from slao import IncLoRA, SLoRA
from slao.methods.products import product_svd
from slao.methods.slora import kept
from slao_kernels.testing import error_ratio, tiny_model


def basis(rows: int, columns: int, seed: int) -> torch.Tensor:
    drawn = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(drawn)[0]


def completed(U: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """U's first `count` columns, and random ones off them."""
    drawn = torch.randn(U.shape, dtype=U.dtype, generator=generator)
    return torch.linalg.qr(torch.cat([U[:, :count], drawn], 1))[0][:, : U.shape[1]]


@pytest.mark.parametrize("seed", range(4))
def test_it_keeps_what_random_completions_keep(seed):
    """The authors' way with 4,000 draws: the norm's mean is largest, or nearly, where `kept` says."""
    U, leading, generator = basis(24, 6, seed), basis(24, 6, seed + 100), torch.Generator().manual_seed(seed)
    if seed % 2:  # directions of both kinds
        U = torch.linalg.qr(torch.cat([leading[:, :2] + 0.1 * U[:, :2], U[:, 2:]], 1))[0]
    means = torch.stack(
        [
            torch.stack([(completed(U, c, generator).T @ leading).square().sum() for _ in range(4000)]).mean()
            for c in range(1, 7)
        ]
    )
    inside = (leading.T @ U).square().sum(0).cumsum(0)
    expected = torch.stack([inside[c - 1] + (6 - c) * (6 - inside[c - 1]) / (24 - c) for c in range(1, 7)])
    assert (means - expected).abs().max() <= 0.02  # of norms of 1 to 3: five of the mean's standard errors
    assert kept(U, leading, 6) == 1 + int(expected.argmax())
    assert kept(U, leading, 2) == 1 + int(expected[:2].argmax())


def test_what_it_keeps_where_that_is_plain():
    """Columns within the leading ones are kept, columns off them are cut."""
    leading, eye = torch.eye(12, dtype=torch.float64)[:, :4], torch.eye(12, dtype=torch.float64)
    for inside in (1, 2, 3, 4):
        order = [*range(inside), *range(4, 8 - inside)]
        assert kept(eye[:, order], leading, 4) == inside
    assert kept(eye[:, [6, 7, 0]], leading, 3) == 3  # what comes after two that alone would be cut pays for them
    assert kept(eye[:, [6, 7, 0]], leading, 2) == 1  # and does not where it is a direction of no size
    assert kept(eye[:, [6, 7, 8]], leading, 3) == 1  # no less
    assert kept(eye[:, [6, 7, 8]], leading, 0) == 1  # of B = 0
    assert kept(basis(4, 4, 0), basis(4, 2, 1), 4) == 4  # every number would score alike


@pytest.mark.parametrize(("m", "n", "r"), [(7, 5, 3), (5, 7, 1), (3, 8, 5), (8, 3, 5), (64, 96, 64)])
def test_the_svd_of_the_product(m, n, r):
    generator = torch.Generator().manual_seed(m)
    A, B = (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((r, n), (m, r)))
    U, S, Vh = product_svd(A, B)
    size, eye = min(r, m, n), torch.eye(min(r, m, n), dtype=torch.float64)
    assert (U.shape, S.shape, Vh.shape) == ((m, size), (size,), (size, n))
    assert error_ratio(U * S @ Vh, B @ A) <= 1e-13
    assert error_ratio(S, torch.linalg.svdvals(B @ A)[:size]) <= 1e-13
    assert (U.T @ U - eye).abs().max() <= 1e-13
    assert (Vh @ Vh.T - eye).abs().max() <= 1e-13


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # and Conv1D, whose weights are stored transposed
def test_a_task_keeps_the_cut_that_dense_svds_find(lab, kind, strength):
    def make(method, **options):
        names = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}
        config = LoraConfig(r=4, target_modules=names[kind], fan_in_fan_out=kind == "gpt2")
        torch.manual_seed(0)
        model = get_peft_model(tiny_model(kind), config).double()
        slao_kernels.patch(model)
        return method(model, **options)

    method, counts = make(SLoRA, strength=strength), set()
    for index in range(3):
        lab.begin(method, index)
        lab.train(method, shift=index)
        trained = [pair.B @ pair.A for pair in method.pairs]
        found = []
        for place, pair in enumerate(method.pairs):
            base = pair.layer.get_base_layer().weight.detach()
            A, B = method.frozen(place)
            scale = pair.layer.scaling["default"]
            found.append((base.T if pair.layer.fan_in_fan_out else base) + scale * (B @ A))
        lab.end(method, index)
        for pair, delta, weight in zip(method.pairs, trained, found, strict=True):
            leading = torch.linalg.svd(weight)[0][:, :4]
            U, S, Vh = torch.linalg.svd(delta)
            scores = [
                (leading.T @ U[:, :c]).norm() ** 2 + (4 - c) * (4 - (leading.T @ U[:, :c]).norm() ** 2) / (len(U) - c)
                for c in range(1, 5)
            ]
            count = 1 + int(torch.stack(scores).argmax())
            assert error_ratio(pair.B @ pair.A, strength * (U[:, :count] * S[:count]) @ Vh[:count]) <= 1e-12
            assert pair.A[count:].abs().sum() + pair.B[:, count:].abs().sum() == 0
            counts.add(count)
    assert len(counts) > 1  # the test saw cuts of more than one kind


def test_a_new_task_starts_from_the_cut_pairs(lab):
    method = lab.make(SLoRA)
    lab.task(method, 0)
    before = lab.logits(method)
    lab.begin(method, 1)
    assert error_ratio(lab.logits(method), before) <= 1e-13
    assert all(not pair.B.any() and pair.A.square().sum(1).gt(0).all() for pair in method.pairs)
    plain = lab.make(IncLoRA)
    lab.task(plain, 0)
    assert error_ratio(lab.logits(plain), before) > 1e-3  # which keeps all that was trained


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [{"r": 40}, {"r": 2, "rank_pattern": {"v_proj": 40}}])  # of 32 rows; v_proj has 16
def test_ranks_above_a_layers_size(lab, lora, dtype):
    """Nothing lies off a whole space: nothing is cut but by rounding to the adapter's dtype."""
    method = lab.make(SLoRA, dtype, lora=lora)
    lab.begin(method, 0)
    lab.train(method)
    before = [pair.B.double() @ pair.A.double() for pair in method.pairs]
    lab.end(method, 0)
    # Of bf16 A and B are rounded, 2^-9 each at most; of fp32 two QRs and an SVD, some units of 2^-24 a step of theirs.
    bound, wide = {torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtype], 0
    for pair, product in zip(method.pairs, before, strict=True):
        if pair.rank >= len(pair.B):
            wide += 1
            assert error_ratio(pair.B.double() @ pair.A.double(), product) <= bound
    assert wide >= 2
    lab.task(method, 1)
    assert torch.isfinite(lab.logits(method)).all()


def test_a_task_whose_end_fails_is_ended_once(lab, monkeypatch):
    """The second layer's SVD fails: nothing is written, and the task can be ended again."""
    import slao.methods.slora as module

    method, right = (lab.make(SLoRA, strength=0.5) for _ in range(2))
    for each in (method, right):
        lab.begin(each, 0)
        lab.train(each)
    calls, usual = [], module.product_svd

    def failing(A, B):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no memory")
        return usual(A, B)

    monkeypatch.setattr(module, "product_svd", failing)
    before = [(pair.A.clone(), pair.B.clone()) for pair in method.pairs]
    with pytest.raises(RuntimeError, match="no memory"):
        method.end_task()
    assert all(
        torch.equal(pair.A, A) and torch.equal(pair.B, B) for pair, (A, B) in zip(method.pairs, before, strict=True)
    )
    for each in (method, right):
        each.end_task()
    assert all(torch.equal(mine.B, theirs.B) for mine, theirs in zip(method.pairs, right.pairs, strict=True))


def test_refusals(lab):
    pissa = lab.make(SLoRA, torch.float32, lora={"init_lora_weights": "pissa"})
    with pytest.raises(ValueError, match=r"slora begins with B = 0, and 4 layers have a trained one \(.*q_proj"):
        lab.begin(pissa, 0)
    for strength in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"strength must be finite and above 0, not {strength}"):
            lab.make(SLoRA, strength=strength)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 4))
    model = get_peft_model(layers, LoraConfig(r=2, target_modules=["0", "2"]))
    with pytest.raises(ValueError, match=r"slora cannot treat 1 layers: .*\.0: the base weight has 4 dimensions"):
        SLoRA(model)

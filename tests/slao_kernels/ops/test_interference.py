"""interference: inner products and cosines of task vectors, against the deltas written out in fp64."""

from __future__ import annotations

import pytest
import torch
from adapter_lists import BAD, DTYPES, Adapter, adapter, in_every_dtype, model_with, on_every_device, unchanged
from places import Place
from torch import Tensor

import slao_kernels

# Of ‖Bᵢ‖ ‖Aᵢ‖ ‖Bⱼ‖ ‖Aⱼ‖: fp64 sums of at most 500 products, in two orders; the largest found is 2e-15.
EXACT = 1e-14


def dense_gram(As: list[Tensor], Bs: list[Tensor], scalings: list[float]) -> Tensor:
    """(T, T) of one layer, with every delta written out: ⟨sᵢ Bᵢ Aᵢ, sⱼ Bⱼ Aⱼ⟩ in fp64."""
    deltas = [s * B.detach().double() @ A.detach().double() for A, B, s in zip(As, Bs, scalings, strict=True)]
    flat = torch.stack(deltas).flatten(1)
    return flat @ flat.T


def error(found: slao_kernels.Interference, adapters: list[Adapter]) -> float:
    """The largest difference from the reference, in units of the product of the four factors' norms."""
    worst = 0.0
    for index, gram in enumerate(found.gram):
        layer = [(As[index], Bs[index], s[index]) for As, Bs, s in adapters]
        expected = dense_gram(*zip(*layer, strict=True))
        sizes = torch.stack([s * A.double().norm() * B.double().norm() for A, B, s in layer])
        units = (sizes[:, None] * sizes).clamp(min=1e-300)
        worst = max(worst, float(((gram - expected).abs() / units).max()))
    return worst


@on_every_device
@in_every_dtype
@pytest.mark.parametrize("ranks", [(1,), (8, 8), (1, 12, 16), (64, 8, 256, 0)], ids=str)
def test_equals_the_dense_inner_products(ranks, dtype, device):
    shapes = [(1, 1), (17, 33), (1, 40), (128, 64), (128, 64), (500, 3)]
    adapters = [adapter(shapes, r, seed, dtype, device) for seed, r in enumerate(ranks)]
    found = slao_kernels.interference(adapters)
    assert found.gram.shape == (6, len(ranks), len(ranks))
    assert found.gram.dtype == torch.float64
    assert found.gram.device.type == device
    assert error(found, adapters) <= EXACT


def test_adapters_of_different_dtypes_strides_and_ranks_per_layer():
    g = torch.Generator().manual_seed(3)
    adapters = []
    for dtype in DTYPES:
        As = [torch.randn(30, r, generator=g).to(dtype).t() for r in (3, 5)]  # column-major
        Bs = [torch.randn(50, 2 * r, generator=g).to(dtype)[::2, ::2] for r in (3, 5)]
        adapters.append((As, Bs, [2.0, -0.5]))
    same = unchanged(adapters)
    assert error(slao_kernels.interference(adapters), adapters) <= EXACT
    assert same()


@pytest.mark.parametrize("seed", range(5))
def test_cosines_norms_and_the_whole_model(seed):
    shapes = [(20, 30), (40, 10), (20, 30)]
    adapters = [adapter(shapes, 4, seed=100 * seed + t) for t in range(3)]
    found = slao_kernels.interference(adapters)
    vectors = [
        torch.stack([(s[i] * Bs[i].double() @ As[i].double()).flatten() for As, Bs, s in adapters]) for i in range(3)
    ]
    for index, rows in enumerate([*vectors, torch.cat(vectors, dim=1)]):
        result = found if index < 3 else found.whole()
        cosines, norms = result.cosines[index % 3], result.norms[index % 3]
        expected = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1)
        assert (cosines - expected).abs().max() <= 1e-13
        assert (norms / rows.norm(dim=1) - 1).abs().max() <= 1e-13
    assert found.layers == ["layers[0]", "layers[1]", "layers[2]"]
    assert found.whole().layers == ["model"]


def test_opposite_zero_and_cancelling_task_vectors():
    """-1 and 1 exactly where they are due, 0 with what is zero, be that by B = 0 or by terms that cancel."""
    (A,), (B,), _ = adapter([(40, 60)], 6)
    cancelling = (torch.cat([A, A]), torch.cat([B, -B], dim=1))
    adapters = [
        ([A], [B], 1.0),
        ([A], [B], -3.0),
        ([A], [torch.zeros_like(B)], 1.0),
        ([cancelling[0]], [cancelling[1]], 1),
    ]
    cosines = slao_kernels.interference(adapters).cosines[0]
    assert cosines[0, 1].item() == pytest.approx(-1, abs=1e-15)
    assert cosines[0, 0].item() == pytest.approx(1, abs=1e-15)
    assert not cosines[2:].any()
    assert not cosines[:, 2:].any()


def test_factors_of_very_different_sizes_keep_their_cosine():
    """1e18 in A and 1e-18 in B are an ordinary task vector; fp32 squares would be infinite and zero."""
    (A,), (B,), _ = adapter([(40, 60)], 6)
    (C,), (D,), _ = adapter([(40, 60)], 6, seed=1)
    plain = slao_kernels.interference([([A], [B], 1.0), ([C], [D], 1.0)]).cosines
    scaled = slao_kernels.interference([([A * 2.0**60], [B * 2.0**-60], 1.0), ([C], [D], 2.0**100)]).cosines
    assert (plain - scaled).abs().max() <= 1e-15


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_stay_with_their_adapter(bad):
    adapters = [adapter([(20, 30), (10, 10)], 3, seed=t) for t in range(3)]
    clean = slao_kernels.interference(adapters).cosines
    adapters[1][0][0][2, 5] = bad
    cosines = slao_kernels.interference(adapters).cosines
    assert cosines[0, 1].isnan().all()
    assert cosines[0, :, 1].isnan().all()
    others = torch.tensor([[0, 0, 2, 2], [0, 2, 0, 2]])
    assert torch.equal(cosines[0][others[0], others[1]], clean[0][others[0], others[1]])
    assert torch.equal(cosines[1], clean[1])


@on_every_device
def test_no_delta_is_formed(device):
    """The fp64 copies of three adapters' factors, their r×r products, and nothing of the size of W."""
    adapters = [adapter([(4096, 4096)] * 3, 4, seed=t, device=device) for t in range(3)]
    peak, _, _ = Place(device, "").memory(lambda: slao_kernels.interference(adapters))
    assert peak <= 2 * 3 * 8 * 3 * 4 * 8192  # twice the fp64 copies of all layers: 4.7 MB
    assert peak < 4 * 4096 * 4096 / 8


def test_names_of_a_models_adapters():
    """PEFT's own deltas, other ranks, scalings and layers per adapter; a layer that one leaves out counts as zero."""
    model = model_with(
        a={"r": 4, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"]},
        b={"r": 6, "target_modules": ["q_proj"], "use_rslora": True},
        c={"r": 2, "target_modules": ["v_proj", "o_proj"]},
    )
    found = slao_kernels.interference(["a", "b", "c"], model=model)
    assert [name.rsplit(".", 1)[1] for name in found.layers] == ["q_proj", "v_proj", "o_proj"] * 2
    whole = torch.zeros(3, 3, dtype=torch.float64)
    for name, gram in zip(found.layers, found.gram, strict=True):
        layer = model.get_submodule(name)
        zero = torch.zeros(layer.weight.shape)
        rows = [(layer.get_delta_weight(t) if t in layer.lora_A else zero).detach().double().flatten() for t in "abc"]
        dense = torch.stack(rows) @ torch.stack(rows).T
        assert (gram - dense).abs().max() <= 1e-5 * dense.abs().max()  # PEFT's deltas are fp32
        whole += dense
    assert (found.whole().gram[0] - whole).abs().max() <= 1e-5 * whole.abs().max()


def test_the_ways_to_give_an_adapter_agree():
    model = model_with(a={"r": 4, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"]})
    pairs = slao_kernels.adapters.find_pairs(model, "a")[0]
    lists = ([p.A for p in pairs], [p.B for p in pairs])
    ways = [pairs, (*lists, 7 / 4), (*lists, [7 / 4] * 4), [(p.A, p.B, p.scaling) for p in pairs]]
    unscaled = [(p.A, p.B) for p in pairs]
    grams = [slao_kernels.interference([way, unscaled]).gram for way in ways]
    for gram in grams:
        assert torch.equal(gram, grams[0])
        assert (gram[:, 0, 0] / gram[:, 1, 1]).tolist() == pytest.approx([(7 / 4) ** 2] * 4)
    three = [(p.A, p.B) for p in pairs[:3]]  # three pairs are not (As, Bs, scalings)
    assert torch.equal(slao_kernels.interference([three]).gram, slao_kernels.interference([unscaled]).gram[:3])


def test_nothing_to_compare():
    assert slao_kernels.interference([]).gram.shape == (0, 0, 0)
    assert slao_kernels.interference([([], [], 1.0), ([], [], 1.0)]).cosines.shape == (0, 2, 2)
    empty = slao_kernels.interference([([torch.ones(0, 5)], [torch.ones(4, 0)], 1.0)])
    assert empty.cosines.tolist() == [[[0.0]]]


def test_deterministic():
    adapters = [adapter([(300, 200)] * 40, 16, seed=t) for t in range(4)]
    assert torch.equal(slao_kernels.interference(adapters).gram, slao_kernels.interference(adapters).gram)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    adapters, message = BAD[case]
    with pytest.raises(ValueError, match=f"interference: .*{message}"):
        slao_kernels.interference(adapters)


def test_a_models_layers_that_keep_no_plain_pair_are_refused():
    model = model_with(d={"r": 4, "target_modules": ["q_proj"], "use_dora": True})
    with pytest.raises(
        ValueError, match=r"adapter 'd', .*model.layers.0.self_attn.q_proj: .* trains more than A and B"
    ):
        slao_kernels.interference(["d"], model=model)
    with pytest.raises(ValueError, match="no LoRA adapter 'x': it has 'a'"):
        slao_kernels.interference(["x"], model=model_with(a={"target_modules": ["q_proj"]}))

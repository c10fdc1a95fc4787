"""weighted_merge: against the dense SVD of the weighted sum in fp64, and against PEFT's add_weighted_adapter."""

from __future__ import annotations

import pytest
import torch
from adapter_lists import BAD, ONE, Adapter, adapter, in_every_dtype, model_with, on_every_device, unchanged
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import slao_kernels
from slao_kernels.testing import error_ratio

# RMS of B A over that of the exact one: fp64 arithmetic, then A and B rounded once each to the result's dtype.
ROUNDED = {torch.float64: 1e-13, torch.float32: 1e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}
SHAPES = [(1, 1), (17, 33), (1, 40), (128, 64), (128, 64), (40, 3), (300, 200)]


def totals(adapters: list[Adapter], weights: list[float]) -> list[Tensor]:
    """Per layer the weighted sum of the deltas, written out, in fp64."""
    found = []
    for index in range(len(adapters[0][0])):
        layer = [(a[0][index].detach().double(), a[1][index].detach().double(), a[2][index]) for a in adapters]
        found.append(sum(w * s * B @ A for w, (A, B, s) in zip(weights, layer, strict=True)))
    return found


def truncated(delta: Tensor, rank: int) -> Tensor:
    """The nearest matrix of that rank (Eckart, Young)."""
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def compare(merge: slao_kernels.WeightedMerge, sums: list[Tensor], ranks: list[int], tolerance: float) -> None:
    for (A, B), total, r, lost in zip(merge.pairs, sums, ranks, merge.lost, strict=True):
        assert (A.shape, B.shape) == ((r, total.shape[1]), (total.shape[0], r))
        best = truncated(total, r)
        product = B.double() @ A.double()
        assert error_ratio(product, best) <= tolerance
        # No matrix of that rank is nearer to the sum.
        distance, least = (product - total).norm(), (best - total).norm()
        assert distance <= least + tolerance * total.norm()
        assert float(lost) == pytest.approx(float(least / total.norm()), abs=1e-12)


@on_every_device
@in_every_dtype
@pytest.mark.parametrize("rank", [1, 8, 16])
@pytest.mark.parametrize("ranks", [(8,), (16, 16, 16), (1, 12, 64), (0, 8)], ids=str)
def test_equals_the_dense_svd_of_the_weighted_sum(ranks, rank, dtype, device):
    adapters = [adapter(SHAPES, r, seed, dtype, device) for seed, r in enumerate(ranks)]
    weights = [1.0, -0.7, 0.4][: len(ranks)]
    wanted = [min(rank, *shape) for shape in SHAPES]
    merge = slao_kernels.weighted_merge(adapters, weights, wanted)
    assert all(t.dtype == dtype and t.device.type == device and t.is_contiguous() for pair in merge.pairs for t in pair)
    compare(merge, totals(adapters, weights), wanted, ROUNDED[dtype])


@pytest.mark.parametrize("shape", [(1024, 1024), (1000, 256), (256, 1023)], ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_larger_layers(shape, seed):
    adapters = [adapter([shape], 16, 10 * seed + t) for t in range(3)]
    merge = slao_kernels.weighted_merge(adapters, [0.5, 0.3, 0.2], 16)
    compare(merge, totals(adapters, [0.5, 0.3, 0.2]), [16], 1e-7)


def test_A_is_orthonormal_and_the_columns_of_B_carry_the_singular_values():
    adapters = [adapter(SHAPES, 8, seed, torch.float64) for seed in range(3)]
    merge = slao_kernels.weighted_merge(adapters, [1.0, 1.0, 1.0], [min(8, *s) for s in SHAPES])
    for (A, B), total in zip(merge.pairs, totals(adapters, [1.0, 1.0, 1.0]), strict=True):
        S = torch.linalg.svdvals(total)[: len(A)]
        assert (A @ A.T - torch.eye(len(A), dtype=torch.float64)).abs().max() <= 1e-14
        assert (B.T @ B - S.square().diag()).abs().max() <= 1e-13 * S[0] ** 2


def test_the_whole_rank_loses_nothing_and_a_larger_one_adds_zeros():
    adapters = [adapter([(60, 50)], 4, seed, torch.float64) for seed in range(2)]
    (total,) = totals(adapters, [1.0, 2.0])
    for rank in (8, 20, 50):
        merge = slao_kernels.weighted_merge(adapters, [1.0, 2.0], rank)
        ((A, B),) = merge.pairs
        assert error_ratio(B @ A, total) <= 1e-13
        assert merge.lost.item() <= 1e-14
        assert (A @ A.T - torch.eye(rank, dtype=torch.float64)).abs().max() <= 1e-14
        assert B[:, 8:].norm() <= 1e-13 * B.norm()


def test_dependent_zero_and_cancelling_factors():
    """The same adapter three times, one with B = 0 and dependent rows of A, and a sum that is zero."""
    one, other = (adapter([(40, 30)], 6, seed, torch.float64) for seed in (0, 1))
    other[1][0].zero_()
    other[0][0][3] = other[0][0][1]
    (total,) = totals([one], [3.0])
    merge = slao_kernels.weighted_merge([one, one, one, other], [1.0, 1.0, 1.0, 5.0], 6)
    assert error_ratio(merge.pairs[0][1] @ merge.pairs[0][0], total) <= 1e-13
    nothing = slao_kernels.weighted_merge([one, one], [1.0, -1.0], 6)
    (A, B), lost = nothing.pairs[0], nothing.lost
    assert B.norm() <= 1e-14 * total.norm()
    assert (A @ A.T - torch.eye(6, dtype=torch.float64)).abs().max() <= 1e-14
    assert lost.isfinite().all()
    zeros = slao_kernels.weighted_merge([other], [1.0], 6)
    assert not zeros.pairs[0][1].any()
    assert zeros.lost.tolist() == [0.0]


def test_small_differences_of_large_adapters_keep_their_digits():
    """w and -w on adapters that differ by 1e-4: fp32 arithmetic would keep three digits."""
    As, Bs, s = adapter([(100, 80)], 8)
    near = [Bs[0] + 1e-4 * torch.randn(100, 8)]
    adapters = [(As, Bs, s), (As, near, s)]
    merge = slao_kernels.weighted_merge(adapters, [1.0, -1.0], 4)
    compare(merge, totals(adapters, [1.0, -1.0]), [4], 1e-7)


def test_mixed_dtypes_and_strides_and_a_dtype_of_choice():
    As, Bs, s = adapter(SHAPES, 5)
    half = ([A.half() for A in As], [B.half() for B in Bs], s)
    brain = ([A.bfloat16().t().contiguous().t() for A in As], [B.bfloat16().repeat(2, 2)[::2, :5] for B in Bs], s)
    brain[1][:] = [B[: len(b)] for B, b in zip(brain[1], Bs, strict=True)]
    adapters, ranks = [half, brain], [min(5, *shape) for shape in SHAPES]
    same = unchanged(adapters)
    merge = slao_kernels.weighted_merge(adapters, [1.0, 0.5], ranks)
    assert {tensor.dtype for pair in merge.pairs for tensor in pair} == {torch.float32}
    compare(merge, totals(adapters, [1.0, 0.5]), ranks, ROUNDED[torch.float32])
    chosen = slao_kernels.weighted_merge(adapters, [1.0, 0.5], ranks, dtype=torch.bfloat16)
    assert {tensor.dtype for pair in chosen.pairs for tensor in pair} == {torch.bfloat16}
    compare(chosen, totals(adapters, [1.0, 0.5]), ranks, ROUNDED[torch.bfloat16])
    assert same()


def test_the_default_rank_is_the_largest_that_fits():
    merge = slao_kernels.weighted_merge([adapter(SHAPES, 4), adapter(SHAPES, 16, 1)], [1.0, 1.0])
    assert [len(A) for A, _ in merge.pairs] == [min(16, *shape) for shape in SHAPES]
    assert slao_kernels.weighted_merge([([], [], 1.0)], [1.0]).pairs == []


def test_the_result_is_an_adapter():
    """It goes where adapters go, with scaling 1; alone it has cosine 1 with what it merged."""
    one = adapter(SHAPES, 4)
    merge = slao_kernels.weighted_merge([one], [2.0])
    cosines = slao_kernels.interference([merge.pairs, one]).cosines
    full = [index for index, shape in enumerate(SHAPES) if min(shape) >= 4]
    assert (cosines[full, 0, 1] - 1).abs().max() <= 1e-12
    assert (
        slao_kernels.interference([merge.pairs, one]).norms[full] @ torch.tensor([1.0, -2.0]).double()
    ).abs().max() <= 1e-5


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    ranks=st.lists(st.integers(0, 20), min_size=1, max_size=5).filter(any),
    rank=st.integers(1, 40),
    seed=st.integers(0, 2**20),
)
def test_no_matrix_of_that_rank_is_nearer(m, n, ranks, rank, seed):
    g = torch.Generator().manual_seed(seed)
    adapters = [
        ([torch.randn(r, n, generator=g).double()], [torch.randn(m, r, generator=g).double()], [0.5]) for r in ranks
    ]
    weights = torch.randn(len(ranks), generator=g).tolist()
    rank = min(rank, m, n)
    merge = slao_kernels.weighted_merge(adapters, weights, rank)
    ((A, B),), (total,) = merge.pairs, totals(adapters, weights)
    least = torch.linalg.svdvals(total)[rank:].norm()
    assert abs((B @ A - total).norm() - least) <= 1e-12 * total.norm()
    assert (A @ A.T - torch.eye(rank, dtype=torch.float64)).abs().max() <= 1e-13
    assert abs(merge.lost.item() * total.norm() - least) <= 1e-12 * total.norm()


def test_deterministic():
    adapters = [adapter([(300, 200)] * 9, 16, seed) for seed in range(3)]
    first, second = (slao_kernels.weighted_merge(adapters, [1.0, 1.0, 1.0], 16) for _ in range(2))
    for one, other in zip(first.pairs, second.pairs, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


# --- PEFT ---


KINDS = {
    "linear": ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
}


@pytest.mark.parametrize("rank", [None, 3, 16])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.7, -0.4, 0.2]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_pefts_add_weighted_adapter(kind, weights, rank):
    architecture, options = KINDS[kind]
    other = {**options, "target_modules": options["target_modules"][:1]}  # leaves layers out
    model = model_with(
        architecture,
        a={"r": 4, "lora_alpha": 8, **options},
        b={"r": 6, "lora_alpha": 3, **options},
        c={"r": 2, "rank_pattern": {"q_proj": 5}, **other},
    )
    model.add_weighted_adapter(["a", "b", "c"], weights, "theirs", "svd", svd_rank=rank)
    ours = slao_kernels.weighted_merge(["a", "b", "c"], weights, rank, model=model)
    pairs = {pair.name: pair for pair in slao_kernels.adapters.find_pairs(model, "theirs")[0]}
    assert ours.layers == list(pairs)
    for name, (A, B) in zip(ours.layers, ours.pairs, strict=True):
        theirs = pairs[name]
        assert theirs.scaling == 1
        assert (A.shape, B.shape) == (theirs.A.shape, theirs.B.shape)
        assert error_ratio(B @ A, theirs.B @ theirs.A) <= 1e-5  # PEFT's fp32 SVD
        assert error_ratio(B.norm(dim=0), theirs.B.norm(dim=0)) <= 1e-5


def test_where_pefts_own_differs():
    """What the docstring says of PEFT 0.20 and 0.21: √r too much with rsLoRA, and one adapter is not truncated."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    model = model_with("llama", a={**options, "use_rslora": True}, b={**options, "use_rslora": True})
    model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "theirs", "svd")
    model.add_weighted_adapter(["a"], [1.0], "alone", "svd", svd_rank=2)
    ours = slao_kernels.weighted_merge(["a", "b"], [1.0, 0.5], model=model)
    theirs, alone = (slao_kernels.adapters.find_pairs(model, name)[0] for name in ("theirs", "alone"))
    for (A, B), pair, single in zip(ours.pairs, theirs, alone, strict=True):
        assert pair.scaling == 2  # √4
        assert error_ratio(B @ A, pair.B @ pair.A) <= 1e-5
        assert single.A.shape[0] == 4


NAN = (torch.full((2, 6), float("nan")), torch.ones(5, 2))
LARGE = (torch.full((2, 6), 3e4).half(), torch.full((5, 2), 3e4).half())
MORE = {
    "empty": ([], [], {}, "adapters: is empty: there is nothing to merge"),
    "weights": ([[ONE], [ONE]], [1.0], {}, "lists: lengths differ: adapters 2, weights 1"),
    "weight": ([[ONE], [ONE]], [1.0, float("inf")], {}, r"weights\[1\]: is inf, expected a finite number"),
    "no float": ([[ONE]], [10**400], {}, r"weights\[0\]: is 10+, expected a finite number"),
    "no weight": ([[ONE]], ["x"], {}, r"weights\[0\]: is 'x', expected a finite number"),
    "nan": ([[ONE], [NAN]], [1, 1], {}, r"adapters\[1\], layers\[0\].A: has NaN or infinite entries"),
    "rank": ([[ONE]], [1], {"rank": 6}, r"rank of layers\[0\]: 6 is too large for B A \(5, 6\): at most 5"),
    "no rank": ([[ONE]], [1], {"rank": 0}, r"rank of layers\[0\]: is 0, expected a whole number from 1"),
    "ranks": ([[ONE]], [1], {"rank": [1, 1]}, "lengths differ: layers 1, rank 2"),
    "rank 0": ([[(ONE[0][:0], ONE[1][:, :0])]], [1], {}, "adapters: all have rank 0; pass rank="),
    "dtype": ([[ONE]], [1], {"dtype": torch.int8}, "dtype: is torch.int8, expected a floating one"),
    "overflow": ([[LARGE]], [1], {}, r"layers\[0\]: the merge overflows torch.float16; pass a wider dtype="),
    "several": (
        [[ONE], [(torch.ones(3, 6), ONE[1])]],
        [1, float("nan")],
        {},
        r"weights\[1\].*; adapters\[1\], layers\[",
    ),
}
REFUSED = [*MORE.values(), *((adapters, [1] * len(adapters), {}, said) for adapters, said in BAD.values())]


@pytest.mark.parametrize(
    ("adapters", "weights", "options", "message"), REFUSED, ids=[*MORE, *(f"of both: {k}" for k in BAD)]
)
def test_bad_input_is_named(adapters, weights, options, message):
    with pytest.raises(ValueError, match=f"weighted_merge: .*{message}"):
        slao_kernels.weighted_merge(adapters, weights, **options)

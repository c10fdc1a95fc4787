"""fold_(keep=) and unfold_: W' is the fold's, and W comes back bit for bit, whatever it holds and wherever it runs."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
from exact_folds import STORED, case, each, same, there_and_back
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from on_lists import DTYPES, INTERPRETED, ONCE
from torch import Tensor

from slao_kernels import Kept, dispatch, fold_, unfold_
from slao_kernels.ops.exact_fold import reference
from slao_kernels.testing import error_ratio


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@each
@pytest.mark.parametrize("adapter", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_exact_sum_rounded_once_and_comes_back(dtype, adapter, backend):
    torch.manual_seed(1)
    sizes = [(65, 129, 12), (1, 1, 1), (17, 33, 5), (6, 4100, 8)][: 2 if INTERPRETED else 4]
    for (n, k, r), delta in itertools.product(sizes, [1.0] if INTERPRETED else [0.01, 1.0, 50.0]):
        W, A, B = case(n, k, r, dtype, adapter, delta)
        before, keep = W.clone(), Kept()
        exact = W.double() + 0.7 * B.double() @ A.double()
        fold_([W], [A], [B], [0.7], keep=keep, backend=backend)
        # d by itself is one rounding more, of fp32 or wider, as large as d.
        assert error_ratio(W, exact) <= 2 * ONCE[dtype]
        assert n == k == 1 or not same(W, before)
        unfold_([W], keep)
        assert same(W, before)


@each
@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_bits_a_weight_and_what_a_plain_round_trip_changes(dtype, backend):
    """At most two bits up to a delta as large as W; and there is something to keep: W' - d alone is not W."""
    torch.manual_seed(2)
    for delta, at_least in ((0.01, 0.0005), (0.1, 0.02), (1.0, 0.2)):
        W, A, B = case(128 if INTERPRETED else 256, 512, 8, dtype, torch.float32, delta)
        back = W.clone()
        fold_([back], [A], [B], 1.0)
        fold_([back], [A], [B], -1.0)
        assert (back != W).float().mean() > at_least
        keep = there_and_back([W], [A], [B], 1.0, backend)
        assert 0 < keep.bits_per_weight <= 2.0
        assert keep.nbytes == keep.stream_bytes + A.nbytes + B.nbytes


@each
@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_a_thousand_cycles(dtype, backend):
    """New adapters each time, delta from 1 % to 100 % of W: no bit of W differs. Plain round trips drift meanwhile."""
    torch.manual_seed(3)
    W, cycles = torch.randn(48, 80).to(dtype), {"native": 1000, "reference": 50, "triton": 2}[backend]
    before, drifting = W.clone(), W.clone()
    for cycle in range(cycles):
        delta = 10 ** (-2 * (cycle % 11) / 10)
        A, B, keep = torch.randn(4, 80), torch.randn(48, 4) * delta / 2, Kept()
        fold_([W], [A], [B], 1.0, keep=keep, backend=backend)
        unfold_([W], keep)
        for sign in (1.0, -1.0):
            fold_([drifting], [A], [B], sign)
    assert same(W, before)
    assert (drifting != W).float().mean() > 0.3


def every_number(dtype: torch.dtype) -> Tensor:
    """All 16-bit patterns; in wider dtypes as many random ones, NaNs of all payloads and denormals among them."""
    if dtype.itemsize == 2:
        return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype).view(256, 256)
    words = torch.randint(-(1 << 62), 1 << 62, (256, 256)) * 2 + torch.randint(0, 2, (256, 256))
    if dtype == torch.float32:
        return (words >> 32).int().view(dtype)
    return words.view(dtype)


@each
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_comes_back(dtype, backend):
    """NaN by its payload, infinity, both zeros, denormals; where the sum overflows; where d is infinite or NaN."""
    g = torch.Generator().manual_seed(4)
    W = every_number(dtype)
    sizes = (1e-45, 1e-30, 1e-7, 1.0, 3e4, 1e30, float("inf"), float("nan"))
    for size in sizes[4::3] if INTERPRETED else sizes:
        A, B = torch.randn(3, 256, generator=g), torch.randn(256, 3, generator=g)
        A[0, ::7] = B[::5, 0] = 0.0
        if size != size or size > 1e38:
            B[3] = size
        else:
            B *= size
        there_and_back([W.clone()], [A], [B], 1.0, backend)
    there_and_back([-W.abs()], [torch.zeros(1, 256)], [torch.zeros(256, 1)], 1.0, backend)


def laid_out(rows: int, cols: int, layout: str, dtype: torch.dtype, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """(what lies around it, the matrix)"""
    if layout == "transposed":
        whole = torch.randn(cols + 2, rows + 3, generator=g).to(dtype)
        return whole, whole.t()[:rows, :cols]
    whole = torch.randn(rows + 2, 2 * cols + 8, generator=g).to(dtype)
    views = {"shifted": whole[1 : rows + 1, 3 : cols + 3], "strided": whole[:rows, : 2 * cols : 2]}
    return whole, views[layout]


@each
@settings(
    max_examples=3 if INTERPRETED else 60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 80), st.integers(0, 150), st.integers(0, 40)), min_size=1, max_size=4),
    layouts=st.tuples(*[st.sampled_from(["transposed", "shifted", "strided"])] * 3),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 3),
    scaling=st.floats(-100, 100),
    seed=st.integers(0, 2**20),
)
def test_any_shape_and_layout(backend, sizes, layouts, dtypes, scaling, seed):
    """What lies beside a weight stays as it is."""
    g = torch.Generator().manual_seed(seed)
    wholes, Ws = zip(*[laid_out(n, k, layouts[0], dtypes[0], g) for n, k, _ in sizes], strict=True)
    As = [laid_out(r, k, layouts[1], dtypes[1], g)[1] for _, k, r in sizes]
    Bs = [laid_out(n, r, layouts[2], dtypes[2], g)[1] for n, _, r in sizes]
    before, keep = [whole.clone() for whole in wholes], Kept()
    fold_(Ws, As, Bs, scaling, keep=keep, backend=backend)
    for whole, W, old in zip(wholes, Ws, before, strict=True):
        rest = torch.ones_like(whole, dtype=torch.bool)
        rest.as_strided(W.shape, W.stride(), W.storage_offset()).fill_(False)
        assert same(whole[rest], old[rest])
    unfold_(Ws, keep)
    assert all(map(same, wholes, before))


@each
def test_threads_autocast_and_what_the_adapters_do_meanwhile_do_not_matter(backend, threads, monkeypatch):
    """Over several pieces, slices or tiles of each weight."""
    if backend == "triton":
        kernels = dispatch.implementation("exact_fold", "triton")
        monkeypatch.setattr(kernels, "TILES", dict.fromkeys(kernels.TILES, (64, 128)))
    monkeypatch.setitem(reference._BLOCKS, "cpu", 1000)
    torch.manual_seed(5)
    n, k = (300, 700) if backend == "native" else (40, 170)
    cases = [case(n, k, r, dtype, torch.bfloat16, 0.3) for r, dtype in ((8, torch.bfloat16), (3, torch.float32))]
    Ws, As, Bs = (list(column) for column in zip(*cases, strict=True))
    before, found = [W.clone() for W in Ws], []
    for there, back, mode in ((1, 2, nullcontext()), (3, 1, torch.autocast("cpu", torch.bfloat16))):
        keep = Kept()
        threads(there)
        fold_(Ws, As, Bs, [0.5, 2.0], keep=keep, backend=backend)
        found.append([W.clone() for W in Ws])
        saved = [tensor.clone() for tensor in (*As, *Bs)]
        for tensor in (*As, *Bs):
            tensor.mul_(3.0)
        threads(back)
        with mode:
            unfold_(Ws, copy.deepcopy(keep) if there == 1 else pickle.loads(pickle.dumps(keep)))
        assert all(map(same, Ws, before))
        for tensor, old in zip((*As, *Bs), saved, strict=True):
            tensor.copy_(old)
    assert all(map(same, *found))


@each
def test_in_inference_mode_and_of_parameters(backend):
    torch.manual_seed(6)
    layer = torch.nn.Linear(30, 20)
    before, keep = layer.weight.detach().clone(), Kept()
    A, B = torch.randn(2, 30, requires_grad=True), torch.randn(20, 2)
    version = layer.weight._version
    with torch.inference_mode():
        fold_([layer.weight], [A], [B], 1.0, keep=keep, backend=backend)
    unfold_([layer.weight], keep)
    assert same(layer.weight.detach(), before)
    assert layer.weight.requires_grad
    assert layer.weight._version > version  # a backward that has saved the weight says so


@each
def test_several_folds_into_one_weight_are_undone_the_last_first(backend):
    torch.manual_seed(7)
    W, A, B = case(40, 50, 4, torch.bfloat16, torch.float32, 0.5)
    before, keeps = W.clone(), [Kept(), Kept()]
    for keep in keeps:
        fold_([W], [A], [B], 1.0, keep=keep, backend=backend)
    with pytest.raises(ValueError, match=r"weights\[0\]: has changed since the fold"):
        unfold_([W], keeps[0])
    for keep in reversed(keeps):
        unfold_([W], keep)
    assert same(W, before)

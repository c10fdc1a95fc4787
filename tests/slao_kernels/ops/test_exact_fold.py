"""fold_(keep=) and unfold_: W' is the fold's, and W comes back bit for bit, whatever it holds and wherever it runs."""

from __future__ import annotations

import array
import copy
import itertools
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from on_lists import DTYPES, ONCE, Core, bits
from torch import Tensor

import slao_kernels
from slao_kernels import Kept, fold_, native, unfold_
from slao_kernels.ops.exact_fold import native as native_exact
from slao_kernels.ops.exact_fold import reference
from slao_kernels.ops.exact_fold.kept import bits_of, bits_sum
from slao_kernels.testing import error_ratio

BACKENDS = ["native", "reference"]
STORED = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Any:
    if request.param == "native" and native.why_not("cpu") is not None:
        pytest.skip(f"no compiled core: {native.why_not('cpu')}")
    return request.param


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def same(W: Tensor, before: Tensor) -> bool:
    return torch.equal(bits(W), bits(before))


def case(n: int, k: int, r: int, dtype: torch.dtype, adapter: torch.dtype, delta: float) -> tuple[Tensor, ...]:
    """W of size 1 and A, B whose product has the size `delta`."""
    W, A, B = torch.randn(n, k), torch.randn(r, k), torch.randn(n, r) * delta / r**0.5
    return W.to(dtype), A.to(adapter), B.to(adapter)


def there_and_back(Ws: list[Tensor], As: list[Tensor], Bs: list[Tensor], scalings: Any, backend: str) -> Kept:
    """The keep as it was between; asserts that every weight is changed and comes back."""
    before, keep = [W.clone() for W in Ws], Kept()
    fold_(Ws, As, Bs, scalings, keep=keep, backend=backend)
    between = copy.deepcopy(keep)
    assert keep
    unfold_(Ws, keep)
    assert not keep
    assert all(map(same, Ws, before))
    return between


@pytest.mark.parametrize("adapter", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_exact_sum_rounded_once_and_comes_back(dtype, adapter, backend):
    torch.manual_seed(1)
    for (n, k, r), delta in itertools.product([(1, 1, 1), (17, 33, 5), (65, 129, 12), (6, 4100, 8)], [0.01, 1.0, 50.0]):
        W, A, B = case(n, k, r, dtype, adapter, delta)
        before, keep = W.clone(), Kept()
        exact = W.double() + 0.7 * B.double() @ A.double()
        fold_([W], [A], [B], [0.7], keep=keep, backend=backend)
        # d by itself is one rounding more, of fp32 or wider, as large as d.
        assert error_ratio(W, exact) <= 2 * ONCE[dtype]
        assert n == k == 1 or not same(W, before)
        unfold_([W], keep)
        assert same(W, before)


@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_bits_a_weight_and_what_a_plain_round_trip_changes(dtype, backend):
    """At most two bits up to a delta as large as W; and there is something to keep: W' - d alone is not W."""
    torch.manual_seed(2)
    for delta, at_least in ((0.01, 0.0005), (0.1, 0.02), (1.0, 0.2)):
        W, A, B = case(256, 512, 8, dtype, torch.float32, delta)
        back = W.clone()
        fold_([back], [A], [B], 1.0)
        fold_([back], [A], [B], -1.0)
        assert (back != W).float().mean() > at_least
        keep = there_and_back([W], [A], [B], 1.0, backend)
        assert 0 < keep.bits_per_weight <= 2.0
        assert keep.nbytes == keep.stream_bytes + A.nbytes + B.nbytes


@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_a_thousand_cycles(dtype, backend):
    """New adapters each time, delta from 1 % to 100 % of W: no bit of W differs. Plain round trips drift meanwhile."""
    torch.manual_seed(3)
    W, cycles = torch.randn(48, 80).to(dtype), 1000 if backend == "native" else 50
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_comes_back(dtype, backend):
    """NaN by its payload, infinity, both zeros, denormals; where the sum overflows; where d is infinite or NaN."""
    g = torch.Generator().manual_seed(4)
    W = every_number(dtype)
    for size in (1e-45, 1e-30, 1e-7, 1.0, 3e4, 1e30, float("inf"), float("nan")):
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


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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


def test_threads_autocast_and_what_the_adapters_do_meanwhile_do_not_matter(backend, threads, monkeypatch):
    """Over several pieces, or slices, of each weight."""
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


# --- what a stream is made of


def exact_sums(n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """A, B whose products and sums are exact in fp32 in any order, so that all backends make the same d."""
    A, B = torch.randint(-9, 10, (3, k)) / 8, torch.randint(-9, 10, (n, 3)) / 16
    return torch.randn(n, k), A, B


@pytest.mark.parametrize("isa", Core.SETS)
@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_core_and_reference_write_the_same(dtype, isa):
    """The same W', checksum, fields and exceptions, where d is: one piece of W is one slice. And the core's sets read
    what they wrote."""
    if (missing := Core(isa).why_not()) is not None:
        pytest.skip(missing)
    torch.manual_seed(8)
    W, A, B = exact_sums(70, 90)
    W[0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    A[1, 7], B[:, 1] = float("inf"), 1 / 16  # W' of a whole column is infinite, and W' - d is NaN
    W = W.to(dtype)
    other, before = W.clone(), W.clone()
    layer = native_exact._table([native_exact.Layer(W, A, B, 0.5)])
    core = native.core()
    pieces, most = core.exact_plan(*layer, isa)
    assert pieces == 1
    stream, lengths, sums = torch.zeros(most + 8, dtype=torch.uint8), array.array("q", [0]), array.array("Q", [0])
    used = core.exact_fold(*layer, stream.data_ptr(), lengths, sums, 1, isa)
    theirs, totals = reference.fold([reference.Layer(other, A, B, 0.5)])
    assert same(W, other)
    assert sums.tolist() == totals == [bits_sum(bits_of(W))]
    fields, places, values = theirs.parts[0][0]
    count = int(stream[:4].view(torch.int32))
    assert len(places) == count > 0
    size = 4 + W.element_size()
    assert used == lengths[0] == 4 + len(fields) + count * size
    assert torch.equal(stream[4 : 4 + len(fields)], fields)
    listed = stream[4 + len(fields) : used].view(count, size)
    assert torch.equal(listed[:, :4].contiguous().view(torch.int32).flatten(), places)
    assert torch.equal(listed[:, 4:].contiguous().flatten(), values.view(torch.uint8))
    assert core.exact_unfold(*layer, stream.data_ptr(), lengths, 1, isa)
    assert same(W, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_checksum_sees_every_bit_and_place(dtype):
    torch.manual_seed(9)
    words = bits_of(torch.randn(5, 6).to(dtype)).clone()
    seen = {bits_sum(words)}
    for i, j, bit in itertools.product(range(5), range(6), range(8 * dtype.itemsize)):
        changed = words.clone()
        changed[i, j] ^= torch.ones((), dtype=words.dtype) << bit
        seen.add(bits_sum(changed))
    assert len(seen) == 1 + 30 * 8 * dtype.itemsize
    assert bits_sum(words.flip(0)) not in seen
    assert bits_sum(words.flip(1)) not in seen
    assert (bits_sum(words[:2]) + bits_sum(words[2:], 2)) % 2**64 == bits_sum(words)


# --- what is refused, and errors midway


def folded(backend: str = "auto") -> tuple[list[Tensor], Kept]:
    torch.manual_seed(10)
    cases = [case(20, 30, 2, torch.bfloat16, torch.float32, 0.3) for _ in range(3)]
    Ws, As, Bs = (list(column) for column in zip(*cases, strict=True))
    keep = Kept()
    fold_(Ws, As, Bs, 1.0, keep=keep, backend=backend)
    return Ws, keep


def touch(Ws: list[Tensor]) -> list[Tensor]:
    for W, where in ((Ws[0], (3, 4)), (Ws[2], (19, 29))):
        bits_of(W)[where] += 1
    return Ws


WRONG = {
    "touched": (touch, r"weights\[0\]: has changed since the fold .*; weights\[2\]: has changed since"),
    "order": (lambda Ws: Ws[::-1], r"weights\[0\]: has changed since the fold .*; weights\[2\]: has changed since"),
    "dtype": (lambda Ws: [W.float() for W in Ws], r"weights\[1\]: is \(20, 30\) torch.float32, .* torch.bfloat16"),
    "shape": (lambda Ws: [Ws[0], Ws[1], Ws[2][:19]], r"weights\[2\]: is \(19, 30\) .*, what was folded was \(20, 30\)"),
    "count": (lambda Ws: Ws[:2], "lengths differ: weights 2, keep 3"),
    "meta": (lambda Ws: [W.to("meta") for W in Ws], r"weights\[0\]: is on the meta device"),
    "one memory": (lambda Ws: [Ws[0]] * 3, r"weights\[1\]: overlaps the memory of weights\[0\]"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_unfold_refuses_before_anything_is_written(wrong, backend):
    change, message = WRONG[wrong]
    Ws, keep = folded(backend)
    before = [W.clone() for W in Ws]
    given = change(Ws)
    before = [W.clone() for W in Ws] if wrong == "touched" else before
    with pytest.raises(ValueError, match=message) as caught:
        unfold_(given, keep)
    assert "\n" not in str(caught.value)
    assert all(map(same, Ws, before))
    if wrong != "touched":  # the keep is as it was
        unfold_(Ws, keep)
        assert not all(map(same, Ws, before))


def test_keeps_that_are_none(backend):
    Ws, keep = folded(backend)
    with pytest.raises(ValueError, match="keep: is a dict, expected the Kept"):
        unfold_(Ws, {})  # type: ignore[arg-type]
    for other, message in (([], "keep: is a list, expected a"), (keep, "keep: holds a fold already: unfold_ that")):
        with pytest.raises(ValueError, match=message):
            fold_(Ws, [torch.ones(1, 30)] * 3, [torch.ones(20, 1)] * 3, 1.0, keep=other)  # type: ignore[arg-type]
    assert "3 weights" in repr(keep)
    unfold_(Ws, keep)
    with pytest.raises(ValueError, match="keep: holds no fold"):
        unfold_(Ws, keep)
    assert repr(keep) == "Kept(nothing)"
    assert (keep.nbytes, keep.bits_per_weight) == (0, 0.0)


def test_arithmetic_that_is_no_longer_the_folds_is_refused():
    Ws, keep = folded("reference")
    before = [W.clone() for W in Ws]
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot take denormals for zeros")
    try:
        with pytest.raises(ValueError, match="denormals are numbers.*denormals are zeros"):
            unfold_(Ws, keep)
    finally:
        torch.set_flush_denormal(False)
    assert all(map(same, Ws, before))


@pytest.mark.skipif(native.why_not("cpu") is not None, reason=f"no compiled core: {native.why_not('cpu')}")
def test_the_core_keeps_denormals_whatever_the_thread_was_told():
    W, A, B = torch.full((3, 8), 3e-41), torch.full((1, 8), 1e-20), torch.full((3, 1), 1e-21)
    before, keep = W.clone(), Kept()
    try:
        torch.set_flush_denormal(True)
        fold_([W], [A], [B], 1.0, keep=keep, backend="native")
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(W, before + 1e-41)
    unfold_([W], keep)
    assert same(W, before)


def test_an_error_midway_leaves_every_weight_as_it_was(backend, monkeypatch):
    """The third weight's fails, after two that are written."""
    torch.manual_seed(11)
    cases = [case(20, 30, 2, torch.bfloat16, torch.float32, 0.3) for _ in range(4)]
    Ws, As, Bs = (list(column) for column in zip(*cases, strict=True))
    before, keep = [W.clone() for W in Ws], Kept()
    module = {"native": native_exact, "reference": reference}[backend]
    groups, whole, calls = [[0], [1], [2, 3]], module.fold, []

    def fold(layers: Any) -> Any:
        calls.append(len(layers))
        if len(calls) == 3:
            assert not same(Ws[0], before[0])
            raise MemoryError
        return whole(layers)

    monkeypatch.setattr(module, "groups", lambda weights: groups)
    monkeypatch.setattr(module, "fold", fold)
    with pytest.raises(MemoryError):
        fold_(Ws, As, Bs, 1.0, keep=keep, backend=backend)
    assert calls == [1, 1, 2]
    assert all(map(same, Ws, before))
    assert not keep


def test_weights_are_grouped_into_calls():
    sizes = [3, 1 << 24, 5, 6, (1 << 24) - 11, 1]
    weights = [torch.empty(1, size, device="meta") for size in sizes]
    assert native_exact.groups(weights) == [[0], [1], [2, 3, 4], [5]]
    assert reference.groups(weights) == [[index] for index in range(6)]


def test_other_backends_say_what_there_is():
    W, A, B = torch.zeros(3, 4), torch.ones(1, 4), torch.ones(3, 1)
    with pytest.raises(
        ValueError, match="backend 'triton' cannot run exact_fold on cpu: .*; available here: .*reference"
    ):
        fold_([W], [A], [B], 1.0, keep=Kept(), backend="triton")
    assert not W.any()
    with slao_kernels.use_backend("reference"):
        there_and_back([W], [A], [B], 1.0, "native")


@pytest.mark.gpu
def test_on_a_gpu():
    for dtype in STORED:
        W, A, B = (tensor.cuda() for tensor in case(700, 900, 8, dtype, torch.bfloat16, 0.3))
        assert there_and_back([W], [A], [B], 1.0, "auto").bits_per_weight <= 2

"""What an exact fold keeps: its streams and checksum; which keeps unfold_ refuses, and errors midway."""

from __future__ import annotations

import array
import itertools
from typing import Any

import pytest
import torch
from exact_folds import STORED, case, each, needs_core, same, there_and_back
from on_lists import DTYPES, INTERPRETED, Core
from torch import Tensor

import slao_kernels
from slao_kernels import Kept, dispatch, fold_, native, unfold_
from slao_kernels.ops.exact_fold import native as native_exact
from slao_kernels.ops.exact_fold import reference
from slao_kernels.ops.exact_fold.kept import bits_of, bits_sum

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


@each
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


@each
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


@needs_core
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


@each
def test_an_error_midway_leaves_every_weight_as_it_was(backend, monkeypatch):
    """The third weight's fails, after two that are written."""
    torch.manual_seed(11)
    cases = [case(20, 30, 2, torch.bfloat16, torch.float32, 0.3) for _ in range(4)]
    Ws, As, Bs = (list(column) for column in zip(*cases, strict=True))
    before, keep = [W.clone() for W in Ws], Kept()
    module = dispatch.implementation("exact_fold", backend)
    groups, whole, calls = [[0], [1], [2, 3]], module.fold, []

    def fold(layers: Any) -> Any:
        calls.append(len(layers))
        if len(calls) == 3:
            assert not same(Ws[0], before[0])
            raise MemoryError
        return whole(layers)

    monkeypatch.setattr(module, "groups", lambda layers: groups)
    monkeypatch.setattr(module, "fold", fold)
    with pytest.raises(MemoryError):
        fold_(Ws, As, Bs, 1.0, keep=keep, backend=backend)
    assert calls == [1, 1, 2]
    assert all(map(same, Ws, before))
    assert not keep


def test_weights_are_grouped_into_calls():
    sizes = [3, 1 << 24, 5, 6, (1 << 24) - 11, 1]
    factor = torch.empty(0)
    layers = [reference.Layer(torch.empty(1, size, device="meta"), factor, factor, 1.0) for size in sizes]
    assert native_exact.groups(layers) == [[0], [1], [2, 3, 4], [5]]
    assert reference.groups(layers) == [[index] for index in range(6)]


@pytest.mark.skipif(INTERPRETED, reason="Triton serves CPU tensors in this process")
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
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_on_a_gpu(backend):
    for dtype in STORED:
        W, A, B = (tensor.cuda() for tensor in case(700, 900, 8, dtype, torch.bfloat16, 0.3))
        assert there_and_back([W], [A], [B], 1.0, backend).bits_per_weight <= 2

"""The exact fold's Triton kernels, on a GPU or interpreted: the reference's W' and checksum, and W back bit for bit."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from exact_folds import case, same, there_and_back
from on_lists import DTYPES, INTERPRETED
from torch import Tensor

from slao_kernels import Kept, fold_, unfold_
from slao_kernels.ops.exact_fold import reference
from slao_kernels.ops.exact_fold.kept import Layer, bits_of, bits_sum

pytest.importorskip("triton", reason="triton is not installed")
from slao_kernels.ops.exact_fold import kernels

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
DEVICE = "cpu" if INTERPRETED else "cuda"


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones, of which even a small matrix has several; the interpreter's are large."""
    monkeypatch.setattr(kernels, "TILES", dict.fromkeys(kernels.TILES, (32, 64)))


def special(W: Tensor, rows: int = 1) -> Tensor:
    """W with NaN, infinities, both zeros and denormals in it."""
    tiny = torch.finfo(W.dtype).smallest_normal / 4
    W[:rows, :7] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0, tiny, -tiny], dtype=W.dtype)
    return W


def written(layer: Layer) -> tuple[Tensor, int, float]:
    """(W', its checksum, bits a weight); W comes back."""
    W, keep = layer.W.clone(), Kept()
    fold_([W], [layer.A], [layer.B], layer.scaling, keep=keep, backend="triton")
    found = W.clone(), keep.folded[0].sum, keep.bits_per_weight
    unfold_([W], keep)
    assert same(W, layer.W)
    return found


@pytest.mark.parametrize("adapter", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_writes_what_the_reference_does(dtype, adapter, tiles):
    """Each product and each sum rounded by itself, in the same order: no fused multiply-add, denormals are numbers."""
    torch.manual_seed(1)
    for n, k, r, delta in [(35, 80, 9, 1.0), (17, 67, 3, 1e-3), (16, 48, 2, 1e-38 if dtype.itemsize > 2 else 1e-6)]:
        W, A, B = case(n, k, r, dtype, adapter, delta)
        W = special(W if delta > 1e-30 else W * delta)
        theirs = W.clone()
        ((_, (expected,))) = reference.fold([Layer(theirs, A, B, 0.7)])
        W, A, B = (tensor.to(DEVICE) for tensor in (W, A, B))
        mine, total, _ = written(Layer(W, A, B, 0.7))
        mine = mine.cpu()
        assert total == bits_sum(bits_of(mine))
        fine = ~theirs.isnan()
        assert torch.equal(mine.isnan(), ~fine)
        if dtype.itemsize == 2 and adapter == torch.float64:  # torch rounds to fp32 in between
            assert (bits_of(mine)[fine].int() - bits_of(theirs)[fine].int()).abs().max() <= 1
            assert (bits_of(mine)[fine] != bits_of(theirs)[fine]).float().mean() < 0.01
        else:
            assert same(mine[fine], theirs[fine])
            assert total == expected or not fine.all()


def matrices(dtype: torch.dtype, adapter: torch.dtype, delta: float) -> list[Layer]:
    """Dense, odd, transposed, strided, one row, one column, empty; ranks from 0 up."""
    found = []
    sizes = [(33, 80, 5), (70, 131, 8), (1, 100, 1), (70, 1, 3), (0, 16, 4), (16, 64, 0)]
    for n, k, r in sizes:
        found.append(Layer(*case(n, k, max(r, 1), dtype, adapter, delta), 0.7))
        found[-1] = found[-1]._replace(A=found[-1].A[:r], B=found[-1].B[:, :r])
    W, A, B = case(64, 48, 7, dtype, adapter, delta)
    found.append(Layer(W.t().contiguous().t(), A.t().contiguous().t(), B, -2.0))
    W, A, B = case(40, 90, 2, dtype, adapter, delta)
    found.append(Layer(W[::2, 1::3], A[:, 1::3], B[::2], 1.0))
    return [Layer(special(W, len(W)) if W.shape[1] >= 7 else W, *rest) for W, *rest in found]


# (W's, A's and B's) where they are interpreted
FEW = [(torch.float32, torch.bfloat16), (torch.float16, torch.float64)]


@pytest.mark.parametrize("delta", [1e-6, 1e-2, 1.0, 1e3, 1e6])
def test_all_dtypes_and_layouts_in_one_call(delta):
    torch.manual_seed(2)
    pairs = FEW if INTERPRETED else itertools.product(DTYPES, DTYPES)
    layers = [layer for dtype, adapter in pairs for layer in matrices(dtype, adapter, delta)]
    Ws, As, Bs, scalings = (list(column) for column in zip(*layers, strict=True))
    if DEVICE == "cuda":
        Ws, As, Bs = ([tensor.cuda() for tensor in tensors] for tensors in (Ws, As, Bs))
    there_and_back(Ws, As, Bs, scalings, "triton")


@pytest.mark.parametrize("r", [16, 256])
def test_ranks(r):
    torch.manual_seed(3)
    for dtype in (torch.bfloat16, torch.float32):
        W, A, B = (tensor.to(DEVICE) for tensor in case(20, 96, r, dtype, dtype, 0.5))
        assert there_and_back([W], [A], [B], 0.5, "triton").bits_per_weight < 3


def test_tensors_of_another_layout_are_unfolded():
    """The keep of dense weights, with one of them strided and one transposed by then."""
    Ws, As, Bs = (
        list(column) for column in zip(*[case(20, 48, 2, torch.float32, torch.float32, 1.0)] * 3, strict=True)
    )
    Ws, As, Bs = ([tensor.to(DEVICE).clone() for tensor in tensors] for tensors in (Ws, As, Bs))
    before, keep = Ws[0].clone(), Kept()
    fold_(Ws, As, Bs, 1.0, keep=keep, backend="triton")
    assert len(keep.streams) == 1
    strided = torch.zeros(40, 96, device=DEVICE)[::2, ::2]
    Ws[1], Ws[2] = strided.copy_(Ws[1]), Ws[2].t().contiguous().t()
    unfold_(Ws, keep)
    assert all(same(W, before) for W in Ws)


def test_one_group_for_each_set_of_constants():
    """W's dtype, what is computed in, and whether rows begin at multiples of 16 bytes."""
    bf16, fp32, fp64 = torch.bfloat16, torch.float32, torch.float64
    sizes = [(48, bf16, bf16), (48, bf16, fp32), (48, bf16, fp64), (47, bf16, bf16), (48, fp32, bf16), (64, bf16, bf16)]
    layers = [Layer(*case(5, k, 2, dtype, adapter, 1.0), 1.0) for k, dtype, adapter in sizes]
    assert kernels.groups(layers) == [[0, 1, 5], [2], [3], [4]]


def test_the_floor_of_a_tile(tiles):
    """What no width foresees costs its own tile: -0 two bits of each element, a NaN with a payload all of them."""
    W, A, B = torch.full((32, 128), 1.5), torch.zeros(2, 128), torch.zeros(32, 2)
    bits = []
    for pattern in (0, -(1 << 31), -1):
        bits_of(W)[3, 70] = pattern  # in the second of two tiles
        bits.append(written(Layer(*(tensor.to(DEVICE) for tensor in (W, A, B)), 1.0))[2])
    of_counts = 32 / 2048
    assert bits == [of_counts, of_counts + 2 / 2, of_counts + 32 / 2]


def kept() -> tuple[Tensor, Tensor, Kept]:
    """(W', W, what was kept), of several tiles."""
    W, A, B = (tensor.to(DEVICE) for tensor in case(40, 70, 3, torch.bfloat16, torch.float32, 1.0))
    before, keep = W.clone(), Kept()
    fold_([W], [A], [B], 1.0, keep=keep, backend="triton")
    return W, before, keep


def test_streams_of_another_length_are_noticed(tiles):
    W, before, keep = kept()
    now = W.clone()
    keep.streams[0].parts[1][0] += 4
    with pytest.raises(RuntimeError, match="did not repeat the arithmetic of the fold, or a stream is damaged"):
        unfold_([W], keep)
    assert same(W[:32, :64], now[:32, :64])
    assert not same(W, before)


def test_streams_of_other_tiles_are_refused(tiles, monkeypatch):
    W, before, keep = kept()
    now = W.clone()
    monkeypatch.setattr(kernels, "TILES", dict.fromkeys(kernels.TILES, (32, 128)))
    with pytest.raises(ValueError, match=r"keep: was made by .*tiles \(32, 64\).* does not use .*tiles \(32, 128\)"):
        unfold_([W], keep)
    assert same(W, now)
    monkeypatch.undo()
    monkeypatch.setattr(kernels, "TILES", dict.fromkeys(kernels.TILES, (32, 64)))
    unfold_([W], keep)
    assert same(W, before)


def test_no_memory_for_the_stream_leaves_the_weights(monkeypatch):
    W, A, B = (tensor.to(DEVICE) for tensor in case(20, 30, 2, torch.bfloat16, torch.float32, 0.3))
    before, keep = W.clone(), Kept()

    def none(*shape: Any, **options: Any) -> Tensor:
        raise MemoryError

    monkeypatch.setattr(kernels.torch, "zeros", none)
    with pytest.raises(MemoryError):
        fold_([W], [A], [B], 1.0, keep=keep, backend="triton")
    assert same(W, before)
    assert not keep

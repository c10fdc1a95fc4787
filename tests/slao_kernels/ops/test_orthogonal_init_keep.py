"""orthogonal_init_(keep=...): what the matrices were, taken in the pass that overwrites them."""

from __future__ import annotations

import pytest
import torch
from on_triton import INTERPRETED, interpreted
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import slao_kernels
from slao_kernels import dispatch

NATIVE = dispatch.why_not("orthogonal_init", "native", "cpu")
BACKENDS = [
    pytest.param("native", marks=pytest.mark.skipif(NATIVE is not None, reason=str(NATIVE))),
    "reference",
]
if INTERPRETED:  # the others have had their turn
    BACKENDS = ["triton"]
test_under_the_interpreter = interpreted(__file__, at_least=10)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def matrices(dtype: torch.dtype) -> list[Tensor]:
    """Regular, in need of a second pass, rank-deficient, zero, transposed, strided."""
    near = torch.randn(1, 90, dtype=torch.float64) * 30 + torch.randn(8, 90, dtype=torch.float64)
    twice = torch.randn(4, 30).repeat(2, 1)
    found = [torch.randn(16, 300), near, twice, torch.zeros(3, 7), torch.randn(40, 5).t(), torch.randn(6, 60)[:, ::3]]
    return [A.to(dtype) for A in found]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_r", [False, True])
def test_what_was_is_kept(dtype, backend, with_r):
    As = matrices(dtype)
    before, alone = [A.clone() for A in As], [A.clone() for A in As]
    keep = [torch.full_like(A, torch.nan) for A in As]
    keep[1] = torch.full((A_shape := As[1].t().shape), torch.nan, dtype=dtype).t()  # of other strides than the matrix
    assert keep[1].shape == As[1].shape == A_shape[::-1]
    versions = [copy._version for copy in keep]
    report = slao_kernels.orthogonal_init_(As, return_r=with_r, keep=keep, backend=backend)
    plain = slao_kernels.orthogonal_init_(alone, return_r=with_r, backend=backend)
    for copy, old, A, other in zip(keep, before, As, alone, strict=True):
        assert torch.equal(copy, old)
        assert torch.equal(A, other)
    assert report.deficient == plain.deficient
    assert all(copy._version > version for copy, version in zip(keep, versions, strict=True))


class Seen(TorchDispatchMode):
    """The operators that are called, in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_copies_are_one_call(backend):
    """What a GPU does, which copies before the other launches; a mode that looks on takes a CPU there too. One launch
    for the list: test_cuda_emulated.py counts it, and the test below."""
    As = matrices(torch.float32)
    before, keep = [A.clone() for A in As], [torch.empty_like(A) for A in As]
    with Seen() as seen:
        slao_kernels.orthogonal_init_(As, keep=keep, backend=backend)
    assert [name for name in seen.names if "copy" in name or name.startswith("slao_kernels::")] == [
        "slao_kernels::scaled_merge_",
        "slao_kernels::orthogonal_init_",
    ]
    assert all(torch.equal(copy, old) for copy, old in zip(keep, before, strict=True))


@pytest.mark.skipif(not INTERPRETED, reason="runs under Triton's interpreter")
def test_one_launch_of_triton_copies_all(monkeypatch):
    from slao_kernels.ops import tables
    from slao_kernels.ops.scaled_merge import device

    kernels, launch = [], tables.launch
    monkeypatch.setattr(
        tables, "launch", lambda kernel, *rest, **more: (kernels.append(kernel), launch(kernel, *rest, **more))
    )
    As = [torch.randn(2, 9) for _ in range(30)]
    before, keep = [A.clone() for A in As], [torch.empty_like(A) for A in As]
    slao_kernels.orthogonal_init_(As, keep=keep, backend="triton")
    assert kernels.count(device.merge_kernel) == 1
    assert all(torch.equal(copy, old) for copy, old in zip(keep, before, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nothing_is_written_where_one_is_not_finite(backend, value):
    As = matrices(torch.float32)
    As[4][1, 2] = value
    before, keep = [A.clone() for A in As], [torch.full_like(A, 7.0) for A in As]
    with pytest.raises(ValueError, match=r"As\[4\]: has NaN or infinite entries"):
        slao_kernels.orthogonal_init_(As, keep=keep, backend=backend)
    for A, old, copy in zip(As, before, keep, strict=True):
        assert torch.equal(A.nan_to_num(), old.nan_to_num())
        assert (copy == 7.0).all()


def bad(case: str) -> tuple[list[Tensor], list[Tensor], str]:
    A, B = torch.randn(3, 8), torch.randn(3, 8)
    return {
        "too few": ([A, B], [torch.empty(3, 8)], "lengths differ: As 2, keep 1"),
        "shape": ([A, B], [torch.empty(3, 8), torch.empty(3, 7)], r"keep\[1\]: is \(3, 7\) torch.float32, A \(3, 8\)"),
        "dtype": ([A], [torch.empty(3, 8).double()], r"keep\[0\]: is \(3, 8\) torch.float64"),
        "itself": ([A], [A], r"keep\[0\]: is As\[0\] itself"),
        "another": ([A, B], [torch.empty(3, 8), A], r"overlaps the memory of"),
        "one for two": ([A, B], [B.clone()] * 2, r"keep\[1\]: overlaps the memory of keep\[0\]"),
        "no tensor": ([A], [None], r"keep\[0\]: is a NoneType"),
        "meta": ([A], [torch.empty(3, 8, device="meta")], r"keep\[0\]: is on the meta device"),
    }[case]


@pytest.mark.parametrize("case", ["too few", "shape", "dtype", "itself", "another", "one for two", "no tensor", "meta"])
def test_bad_input_is_named_before_anything_is_written(case):
    As, keep, message = bad(case)
    before = [A.clone() for A in As]
    with pytest.raises(ValueError, match=message):
        slao_kernels.orthogonal_init_(As, keep=keep)
    assert all(torch.equal(A, old) for A, old in zip(As, before, strict=True))


def test_an_empty_list():
    assert slao_kernels.orthogonal_init_([], keep=[]).deficient == []

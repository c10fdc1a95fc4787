"""scaled_merge_: torch.lerp's answer, exactly at 0 and 1, for any mix of dtypes and layouts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from on_triton import INTERPRETED, interpreted

import slao_kernels
from slao_kernels import dispatch

BACKENDS = [name for name in dispatch.BACKENDS[1:] if dispatch.why_not("scaled_merge", name, "cpu") is None]
if INTERPRETED:  # the others have had their turn
    assert "triton" in BACKENDS
    BACKENDS = ["triton"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
test_under_the_interpreter = interpreted(__file__, at_least=80)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("lam", [0.1, 0.4999, 0.5, 0.7071067811865476, 0.999])
def test_within_one_unit_of_the_exact_merge(target, source, lam, backend):
    merged = [torch.randn(shape).to(target) for shape in ((33, 7), (5,), (2, 3, 4), ())]
    tuned = [torch.randn(m.shape).to(source) for m in merged]
    exact = [m.double() + lam * (f.double() - m.double()) for m, f in zip(merged, tuned, strict=True)]
    scale = [torch.maximum(m.double().abs(), f.double().abs()) for m, f in zip(merged, tuned, strict=True)]
    before = [f.clone() for f in tuned]
    slao_kernels.scaled_merge_(merged, tuned, lam, backend=backend)
    for m, e, big in zip(merged, exact, scale, strict=True):
        # Where the operands cancel, fp32 arithmetic leaves one fp32 unit of the operands, as torch.lerp does.
        slack = big * (
            torch.finfo(torch.float64).eps if target == torch.float64 else 2 * torch.finfo(torch.float32).eps
        )
        near = (m.double() - e).abs() <= slack + e.abs() * torch.finfo(target).eps + torch.finfo(target).tiny
        assert near.all()
    assert all(torch.equal(f, old) for f, old in zip(tuned, before, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ends_are_exact(dtype, backend):
    merged, tuned = torch.randn(50, 9).to(dtype), torch.randn(50, 9).to(dtype)
    tuned[0, 0] = float("inf")
    start = merged.clone()
    slao_kernels.scaled_merge_([merged], [tuned], 0.0, backend=backend)
    assert torch.equal(merged, start)
    slao_kernels.scaled_merge_([merged], [tuned], 1.0, backend=backend)
    assert torch.equal(merged, tuned)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_torch_lerp_in_fp32_but_for_the_last_bit(backend):
    """Each rounds its sum, so that they may be one unit apart; and either may round λ(f − m) before, where it has no
    fused product and sum: half a unit of that."""
    merged, tuned = torch.randn(4096), torch.randn(4096)
    expected, change = torch.lerp(merged, tuned, 0.3), 0.3 * (tuned - merged)
    slao_kernels.scaled_merge_([merged], [tuned], 0.3, backend=backend)
    unit = torch.finfo(torch.float32).eps * (expected.double().abs() + change.double().abs() / 2)
    assert ((merged.double() - expected.double()).abs() <= unit).all()


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), min_size=1, max_size=5),
    layout=st.sampled_from(["plain", "transposed", "strided"]),
    target=st.sampled_from(DTYPES),
    source=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**20),
)
def test_lists_of_any_shape_layout_and_weight(shapes, layout, target, source, seed):
    g = torch.Generator().manual_seed(seed)
    for backend in BACKENDS:
        whole = [torch.randn(2 * a, b, generator=g).to(target) for a, b in shapes]
        merged = [{"plain": lambda w: w[: len(w) // 2]}.get(layout, lambda w: w[::2])(w) for w in whole]
        merged = [m.t() if layout == "transposed" else m for m in merged]
        tuned = [torch.randn(m.shape, generator=g).to(source) for m in merged]
        lam = torch.rand(len(shapes), generator=g).tolist()
        exact = [m.double() + w * (f.double() - m.double()) for m, f, w in zip(merged, tuned, lam, strict=True)]
        slao_kernels.scaled_merge_(merged, tuned, lam, backend=backend)
        for m, e in zip(merged, exact, strict=True):
            torch.testing.assert_close(m.double(), e, rtol=torch.finfo(target).eps, atol=4e-6)


def test_a_tensor_merged_into_itself_stays():
    x = torch.randn(7)
    old = x.clone()
    slao_kernels.scaled_merge_([x], [x], 0.25)
    torch.testing.assert_close(x, old, rtol=1e-6, atol=0)


shared = torch.zeros(10)
BAD = {
    "length": (([torch.zeros(2)], [], 0.5), "lengths differ: merged 2, finetuned 1"),
    "lambdas": (([torch.zeros(2)], [torch.zeros(2)], [0.5, 0.5]), "lam 3"),
    "shape": (([torch.zeros(2)], [torch.zeros(3)], 0.5), r"finetuned\[1\]: is \(3,\), merged \(2,\)"),
    "range": (([torch.zeros(2)], [torch.zeros(2)], 1.5), r"lam\[0\]: is 1.5, expected a number in \[0, 1\]"),
    "nan": (([torch.zeros(2)], [torch.zeros(2)], float("nan")), r"lam\[0\]: is nan"),
    "device": (([torch.zeros(2)], [torch.zeros(2, device="meta")], 0.5), r"finetuned\[1\]: is on the meta device"),
    "integers": (([torch.zeros(2, dtype=torch.long)], [torch.zeros(2)], 0.5), r"merged\[1\]: is torch.int64"),
    "targets overlap": (([shared[:6], shared[5:]], [torch.zeros(6), torch.zeros(5)], 0.5), r"merged\[2\]: overlaps"),
    "source overlaps": (([shared[:6]], [shared[4:]], 0.5), r"finetuned\[1\]: overlaps the memory of merged\[1\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_before_anything_is_written(case):
    (merged, tuned, lam), message = BAD[case]
    good, target = torch.ones(3), torch.zeros(3)
    more = [0.5] if isinstance(lam, list) else []
    with pytest.raises(ValueError, match=message):
        slao_kernels.scaled_merge_([target, *merged], [good, *tuned], [*more, *lam] if more else lam)
    assert not target.any()
    assert not shared.any()


def test_a_repeated_call_sees_what_has_changed():
    """The checks and tables of a call are kept for the next one: everything that they depend on must be noticed."""
    merged, tuned = [torch.zeros(4, 6), torch.zeros(5)], [torch.ones(4, 6), torch.ones(5)]
    for _ in range(2):
        slao_kernels.scaled_merge_(merged, tuned, 0.5)
    assert all((m == 0.75).all() for m in merged)
    slao_kernels.scaled_merge_(merged, tuned, 1.0)  # another weight
    assert all((m == 1.0).all() for m in merged)
    merged[0].t_()  # the same memory, other strides
    tuned[0].copy_(torch.arange(24.0).view(4, 6))
    with pytest.raises(ValueError, match=r"finetuned\[0\]: is \(4, 6\), merged \(6, 4\)"):
        slao_kernels.scaled_merge_(merged, tuned, 1.0)
    tuned[0].t_()
    slao_kernels.scaled_merge_(merged, tuned, 1.0)
    assert torch.equal(merged[0], torch.arange(24.0).view(4, 6).t())
    tuned[1].data = torch.full((5,), 3.0)  # the same tensor, other memory
    slao_kernels.scaled_merge_(merged, tuned, 1.0)
    assert (merged[1] == 3.0).all()
    tuned[1].data = tuned[1].data.double()  # another dtype
    slao_kernels.scaled_merge_(merged, tuned, 1.0)
    assert (merged[1] == 3.0).all()
    tuned[1].data = merged[1].data[:5]  # its own destination: nothing to do, and no mistake
    slao_kernels.scaled_merge_(merged, tuned, 0.5)
    merged[0].data = tuned[0].data.t()[:4]  # looks into another tensor's source
    tuned[0].data = torch.ones(merged[0].shape)
    merged[1].data, tuned[1].data = merged[0].data[0], torch.ones(merged[0].shape[1])
    with pytest.raises(ValueError, match="overlaps the memory of"):
        slao_kernels.scaled_merge_(merged, tuned, 0.5)

"""scaled_merge_: torch.lerp's answer, exactly at 0 and 1, for any mix of dtypes and layouts, wherever it runs
(on_lists.py)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from on_lists import CORES, DTYPES, EMULATED, GPU, INTERPRETED, ONCE, PUBLIC, at, bits

import slao_kernels
from slao_kernels.testing import error_ratio

SIZES = [(33, 7), (5,), (2, 3, 4), (), (1037,)]
SIZES += [] if INTERPRETED else [(8195,), (4096,), (3,), (300, 200)]
# What 16 bits cannot hold, and what is denormal there; for destinations and for sources.
THERE = torch.tensor([1e-40, -1e-7, 6e-8, 3e4, -3e4, 1.0, -1.0, 2.0])
HERE = torch.tensor([0.0, -0.0, 40000.0, 1e-7, -6e-8, 3e-5, 1e-3, -40000.0])


@at(PUBLIC, CORES, EMULATED, GPU)
@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("lam", [0.1, 0.3, 0.4999, 0.5, 0.7071067811865476, 0.8, 0.999, 1.0])
def test_within_one_unit_of_the_exact_merge(target, source, lam, ops):
    merged, tuned = [torch.randn(size).to(target) for size in SIZES], [torch.randn(size).to(source) for size in SIZES]
    merged[4][4:12], tuned[4][:8] = THERE.to(target), HERE.to(source)
    exact = [m.double() + lam * (f.double() - m.double()) for m, f in zip(merged, tuned, strict=True)]
    scale = [torch.maximum(m.double().abs(), f.double().abs()) for m, f in zip(merged, tuned, strict=True)]
    before = [f.clone() for f in tuned]
    ops.merge(merged, tuned, [lam] * len(SIZES))
    # Where the operands cancel, arithmetic leaves one unit of the operands, as torch.lerp does.
    slack = torch.finfo(torch.float64).eps if target == torch.float64 else 2 * torch.finfo(torch.float32).eps
    for m, e, big, f in zip(merged, exact, scale, tuned, strict=True):
        near = slack * big + e.abs() * torch.finfo(target).eps + torch.finfo(target).tiny
        assert ((m.double() - e).abs() <= near).all()
        if m.numel() > 2000:  # of a few, or where a few are far larger, one value's rounding may be all of the error
            assert error_ratio(m, e) <= ONCE[target]
        if lam == 1.0 and (source != torch.float64 or ops in CORES):  # torch rounds fp64 to 16 bits twice
            assert torch.equal(bits(m), bits(f.to(target)))
    assert all(torch.equal(f, old) for f, old in zip(tuned, before, strict=True))


@at(PUBLIC, CORES, EMULATED, GPU)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ends_are_exact(dtype, ops):
    """Bit for bit: a NaN keeps its payload, and one in the destination does not get through, nor does an infinity."""
    merged, tuned = torch.randn(5000).to(dtype), torch.randn(5000).to(dtype)
    random = torch.randint(0, 256, (4000 * dtype.itemsize,), dtype=torch.uint8).view(dtype)
    tuned[0], merged[1], tuned[1000:] = math.inf, math.nan, random
    other = torch.zeros(3, dtype=torch.float64)  # then a launch is for several dtypes, or there are two
    start = bits(merged).clone()
    ops.merge([merged, other], [tuned, torch.ones(3)], [0.0, 0.0])
    assert torch.equal(bits(merged), start)
    assert not other.any()
    ops.merge([merged, other], [tuned, torch.ones(3)], [1.0, 1.0])
    assert torch.equal(bits(merged), bits(tuned))
    assert other.tolist() == [1.0] * 3


@at(PUBLIC, CORES, EMULATED, GPU)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value_and_every_rounding(dtype, ops):
    """There and back, NaN payloads aside; and fp32 patterns around each 16-bit one, ties among them, denormals and the
    edge of fp16's range, as torch rounds them."""
    patterns = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
    values = patterns.view(dtype)
    wide, back = torch.empty(65536), torch.empty(65536, dtype=dtype)
    ops.merge([wide], [values], [1.0])
    ops.merge([back], [wide], [1.0])
    nan = values.isnan()
    assert torch.equal(wide.isnan(), nan)
    assert torch.equal(bits(wide[~nan]), bits(values.float()[~nan]))
    assert torch.equal(back.view(torch.int16)[~nan], patterns[~nan])
    assert back[nan].isnan().all()
    lows = (1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF)
    wides = [((patterns.to(torch.int32) << 16) | low).view(torch.float32) for low in lows]
    random = torch.randint(-(2**31), 2**31 - 1, (200_000,), dtype=torch.int64).to(torch.int32)
    halfway = (random & ~0x1FFF) | 0x1000  # exactly between two fp16 values
    wides += [random.view(torch.float32), halfway.view(torch.float32), torch.randn(100_000) * 1e-5]
    wide = torch.cat([*wides, torch.tensor([65519.9, 65520.0])])
    back, nan = torch.empty(len(wide), dtype=dtype), wide.isnan()
    ops.merge([back], [wide], [1.0])
    assert torch.equal(bits(back[~nan]), bits(wide[~nan].to(dtype)))
    assert back[nan].isnan().all()


LARGEST = 20 if INTERPRETED else 90


@at(PUBLIC, EMULATED)
@settings(
    max_examples=20 if INTERPRETED else 60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    shapes=st.lists(st.tuples(st.integers(0, LARGEST), st.integers(1, LARGEST)), min_size=1, max_size=5),
    layout=st.sampled_from(["plain", "transposed", "strided", "shifted", "mixed"]),
    target=st.sampled_from(DTYPES),
    source=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**20),
)
def test_lists_of_any_shape_layout_and_weight(ops, shapes, layout, target, source, seed):
    g = torch.Generator().manual_seed(seed)
    whole = [torch.randn(2 * a, b + 1, generator=g).to(target) for a, b in shapes]
    guards = [w.clone() for w in whole]
    cut = {"plain": lambda w: w[: len(w) // 2, :-1], "shifted": lambda w: w.view(-1)[1 : w.numel() // 2]}
    merged = [cut.get(layout, lambda w: w[::2, :-1])(w) for w in whole]
    merged = [m.t() if layout == "transposed" else m for m in merged]
    tuned = [torch.randn(m.shape, generator=g).to(source) for m in merged]
    if layout == "mixed":
        tuned = [t.t().contiguous().t() for t in tuned]
    lam = torch.rand(len(shapes), generator=g).tolist()
    expected = [m.double() + w * (f.double() - m.double()) for m, f, w in zip(merged, tuned, lam, strict=True)]
    ops.merge(merged, tuned, lam)
    for m, e, w, guard in zip(merged, expected, whole, guards, strict=True):
        torch.testing.assert_close(m.double(), e, rtol=torch.finfo(target).eps, atol=4e-6)
        if layout == "shifted" and w.numel():
            assert torch.equal(w.view(-1)[0], guard.view(-1)[0])
            assert torch.equal(w.view(-1)[w.numel() // 2 :], guard.view(-1)[w.numel() // 2 :])
        elif layout != "shifted":
            assert torch.equal(w[:, -1], guard[:, -1])
            if layout != "plain":
                assert torch.equal(w[1::2], guard[1::2])


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

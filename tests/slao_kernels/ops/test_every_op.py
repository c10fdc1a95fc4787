"""Every op against fp64: value and every gradient, on every backend, over shapes, dtypes, layouts and seeds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import (
    DROPPING,
    DTYPES,
    INTERPRETED,
    MAIN,
    OPS,
    PLACES,
    SHAPES,
    check,
    exact,
    laid_out,
    make,
    ours,
)

from slao_kernels.testing import TOLERANCE, error_ratio

fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
# dtypes of base and adapters, and the precision
MIXED = [(dtype, dtype, "base") for dtype in DTYPES]
MIXED += [(bf16, fp32, "base"), (bf16, fp32, "adapter"), (fp16, fp32, "adapter"), (fp32, torch.float64, "adapter")]


def grid() -> list:
    """All of it; every shape with some dtype, and every dtype at some shape, for each op of MAIN are not exhaustive."""
    found = []
    for o, op in enumerate(OPS):
        for i, shape in enumerate(SHAPES):
            for j, dtypes in enumerate(MIXED):
                few = op in MAIN and (i + o) % len(MIXED) == j and not (INTERPRETED and i == 5)  # a minute each
                marks = [] if few else [pytest.mark.exhaustive]
                if INTERPRETED and not few and not (i in (1, 2) and j in (1, 2, 5)):
                    continue  # Triton's interpreter takes a tenth of a second for each
                kinds = "-".join(str(kind).removeprefix("torch.") for kind in dtypes)
                found.append(pytest.param(op, shape, dtypes, marks=marks, id=f"{op}-{shape}-{kinds}"))
    return found


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("op", "shape", "dtypes"), grid())
def test_value_and_gradients(op, shape, dtypes, place, poisoned):
    """And bitwise the same at the next run."""
    (base, adapter, precision), (backend, device) = dtypes, place
    inputs = make(*shape, base, adapter, device=device)
    found = ours(op, inputs, precision=precision, backend=backend)
    check(op, found, exact(op, inputs), inputs, precision)
    again = ours(op, inputs, precision=precision, backend=backend)
    assert all(torch.equal(found[name], again[name]) for name in found)
    if op == "core alone":  # x sees it, A and B train through core_delta only
        assert not any(found[name].any() for name in ("A", "B", "core"))


LAYOUTS = ["dense", "transposed", "every other", "columns", "expanded"]


@settings(max_examples=15 if INTERPRETED else 120, deadline=None)
@given(
    op=st.sampled_from(sorted(OPS)),
    rows=st.integers(0, 40),
    k=st.integers(1, 70),
    n=st.integers(1, 70),
    r=st.integers(1, 20),
    seed=st.integers(0, 2**31),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS[:4]), st.sampled_from(LAYOUTS[:4])),
    dtypes=st.sampled_from(MIXED),
    wanted=st.sets(st.integers(0, 9), min_size=1),
    backend=st.sampled_from(["triton"] if INTERPRETED else ["eager", "auto"]),
)
def test_any_shape_layout_and_subset_of_gradients(op, rows, k, n, r, seed, layouts, dtypes, wanted, backend):
    """Layouts of x, y and dy, of weights, and of A and B; gradients of some of the tensors."""
    base, adapter, precision = dtypes
    inputs = make((rows,), k, n, r, base, adapter, seed)
    names = tuple(name for i, name in enumerate(OPS[op].names) if i in wanted) or OPS[op].names[:1]
    of_tokens, of_weights, of_adapters = layouts
    if of_tokens == "expanded" and rows:
        inputs |= {name: inputs[name][:1].repeat(rows, 1) for name in ("x", "y", "dy")}
    expected = exact(op, inputs, names)
    for name, value in inputs.items():
        layout = of_tokens if name in ("x", "y", "dy") else of_weights if "weight" in name else of_adapters
        inputs[name] = laid_out(value, layout) if value.dim() == 2 else value
    leaves = {name: value.detach().requires_grad_(name in names) for name, value in inputs.items()}
    out = OPS[op].ours(leaves, precision=precision, backend=backend)
    grads = [None] * len(names)
    if out.requires_grad:  # a core alone does not reach it
        dy = leaves["dy"].detach()
        grads = torch.autograd.grad(out, [leaves[name] for name in names], dy, allow_unused=True)
    found = {n: torch.zeros_like(inputs[n]) if g is None else g for n, g in zip(names, grads, strict=True)}
    # A single small value can cancel to almost nothing: the error is measured against the operands' size.
    for name, value in {"out": out, **found}.items():
        size = expected[name].square().mean().sqrt().item() if expected[name].numel() else 1.0
        allowed = 6 * TOLERANCE[base] * max(1.0, 1.0 / max(size, 1e-30)) * math.sqrt(max(rows, 1))
        assert error_ratio(value, expected[name]) <= allowed, name


@pytest.mark.parametrize("dtypes", [MIXED[1], MIXED[5]], ids=str)
@pytest.mark.parametrize("op", DROPPING)
@pytest.mark.skipif(INTERPRETED, reason="Triton's kernels draw their own")
@pytest.mark.parametrize("place", PLACES)
def test_dropout_is_torchs_own_mask(op, place, dtypes):
    """Where no kernel draws it; test_lora_linear_dropout.py has those masks."""
    (base, adapter, precision), (backend, device) = dtypes, place
    if backend == "triton" and precision == "base":
        pytest.skip("Triton's kernels draw it")
    inputs = make((64,), 40, 24, 6, base, adapter, device=device)
    torch.manual_seed(3)
    found = ours(op, inputs, precision=precision, backend=backend, dropout=0.4)
    torch.manual_seed(3)
    dropped = torch.nn.functional.dropout(inputs["x"], 0.4)
    # With the rounding of x / 0.6, which the gradient does not see.
    inputs["mask"] = (dropped.double() / inputs["x"].double()).nan_to_num()
    expected = exact(op, inputs)
    del inputs["mask"]
    check(op, found, expected, inputs, precision)

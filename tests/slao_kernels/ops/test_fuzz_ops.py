"""Any arguments at all: an op answers as its fp64 formula does, or says in one line what is wrong and writes nothing.

840 inputs an op, the same at every run; SLAO_FUZZ=5000 makes five thousand, others every time (`make fuzz`).
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from fuzz_inputs import BYTES, FLOATS, Call, factors, fp64, is_real, listed, memory, unchanged, wide
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from on_lists import INTERPRETED, STORAGE, exact_qr
from test_interference import EXACT
from test_weighted_merge import ROUNDED
from torch import Tensor

import slao_kernels
from slao_kernels.dispatch import why_not
from slao_kernels.ops.lora_linear import reference

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter has its own tests, and is slow")
EXAMPLES = int(os.environ.get("SLAO_FUZZ", "840"))
EPS = {dtype: torch.finfo(dtype).eps for dtype in FLOATS}
# The least step of a dtype, near zero.
STEP = {dtype: torch.finfo(dtype).tiny * EPS[dtype] for dtype in FLOATS}
BACKENDS = ["auto", "native", "reference", "auto"]
# What is asked, the tensors that it may write, and the check of its result.
Asked = tuple[Callable[[], Any], list[Any], Callable[[Any], None]]


def backend(call: Call, op: str) -> str:
    """Any backend that runs `op` on this machine's processor, or no backend at all."""
    name = call.pick(["nope", None, 3]) if call.oddly(20) else call.pick(BACKENDS)
    return "auto" if name == "native" and why_not(op, name, "cpu") else name


def near(found: Tensor, exact: Tensor, allowed: Tensor, spread: bool = True) -> None:
    """Entry by entry; what is not finite in the formula is not in the result either (if `spread`)."""
    assert found.shape == exact.shape
    found, fine = wide(found), exact.isfinite()
    assert ((found - exact).abs() <= allowed)[fine].all(), (found, exact, allowed)
    assert not spread or not found[~fine].isfinite().any(), (found, exact)


def olds_of(*lists: Any) -> list[tuple[Any, ...]]:
    """What the lists hold before the call, side by side."""
    return list(zip(*([wide(t) if is_real(t) else None for t in listed(items)] for items in lists), strict=False))


def init(call: Call) -> Asked:
    shapes = [(r, call.size(r, 8)) for r in (call.size(1, 5) for _ in range(call.size(0, 3)))]
    As = [call.tensor(*shape) for shape in shapes]
    keep: Any = None
    if call.pick([False, True]):
        dtypes = [A.dtype if is_real(A) else None for A in As]
        keep = [call.tensor(*shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
        keep = call.items(keep)
    As, on, triangles = call.items(As), backend(call, "orthogonal_init"), call.pick([False, True])
    olds = olds_of(As)

    def check(report: slao_kernels.OrthogonalInitReport) -> None:
        for index, (A, (old,)) in enumerate(zip(As, olds, strict=True)):
            completed, A, slack = index in report.deficient, A.detach(), len(A) ** 0.5
            gram = wide(A) @ wide(A).T - torch.eye(len(A), dtype=fp64)
            least = {torch.float32: 5e-6, fp64: 5e-12}.get(A.dtype, 0.0) if completed else 0.0
            # ‖δA‖ twice, and δA δAᵀ.
            rounded = {fp64: 1e-13}.get(A.dtype, 2.1 * STORAGE[A.dtype] * slack)
            assert torch.linalg.matrix_norm(gram, 2) <= max(least, rounded)
            condition = torch.linalg.cond(old)
            if condition < 1e3:  # Q moves by the rounding of A's products times that
                assert not completed
                moved = 16 * condition * EPS[fp64 if A.dtype == fp64 else torch.float32]
                assert (wide(A) - exact_qr(old)[0]).abs().max() <= moved + EPS[A.dtype]
            if triangles:
                lost = report.r[index].double().T @ wide(A) - old
                assert lost.norm() <= max(1e-6, STORAGE[A.dtype]) * slack * old.norm()
            if keep is not None:
                assert torch.equal(wide(keep[index]), old)

    ask = partial(slao_kernels.orthogonal_init_, As, keep=keep, return_r=triangles, backend=on)
    return ask, [*listed(As), *listed(keep)], check


def merge(call: Call) -> Asked:
    shapes = [tuple(call.size(0, 4) for _ in range(call.size(0, 4))) for _ in range(call.size(0, 3))]
    merged, tuned = (call.items([call.tensor(*shape) for shape in shapes]) for _ in range(2))
    lam, on = call.numbers([0.3, 0.0, 1.0, 0.5, 0.7071, 1, True], len(shapes)), backend(call, "scaled_merge")
    olds = olds_of(merged, tuned)

    def check(_: None) -> None:
        for target, (m, f), weight in zip(merged, olds, factors(lam, len(olds)), strict=True):
            assert 0 <= weight <= 1
            # At the ends it is a copy, whatever the other one holds.
            exact = m if weight == 0.0 else f if weight == 1.0 else m + weight * (f - m)
            sums = EPS[fp64] if target.dtype == fp64 else 2 * EPS[torch.float32]
            size = (1 - weight) * m.abs() + weight * f.abs() + (f - m).abs()
            size = exact.abs() if weight in (0.0, 1.0) else size
            near(target, exact, sums * size + exact.abs() * EPS[target.dtype] + STEP[target.dtype])

    return partial(slao_kernels.scaled_merge_, merged, tuned, lam, backend=on), listed(merged), check


def fold(call: Call) -> Asked:
    sizes = [(call.size(0), call.size(0), call.size(0, 4)) for _ in range(call.size(0, 3))]
    Ws = call.items([call.tensor(n, k) for n, k, _ in sizes])
    As = call.items([call.tensor(r, k) for _, k, r in sizes])
    Bs = call.items([call.tensor(n, r) for n, _, r in sizes])
    scalings, on = call.numbers([1, -0.7, 2.5, 0.0], len(sizes)), backend(call, "fold")
    olds = olds_of(Ws, As, Bs)

    def check(_: None) -> None:
        for target, (W, A, B), s in zip(Ws, olds, factors(scalings, len(olds)), strict=True):
            exact, size = W + s * (B @ A), W.abs() + abs(s) * (B.abs() @ A.abs())
            sums = EPS[fp64] if target.dtype == fp64 else EPS[torch.float32]
            allowed = exact.abs() * EPS[target.dtype] + 8 * sums * size + STEP[target.dtype]
            near(target, exact, allowed, spread=s != 0)  # BLAS reads nothing of a product with the factor 0

    return partial(slao_kernels.fold_, Ws, As, Bs, scalings, backend=on), listed(Ws), check


def grads(y: Tensor, trained: list[Tensor], dy: Tensor) -> list[Tensor]:
    """Of `trained`; zeros where y does not depend on it."""
    if not y.requires_grad:
        return [torch.zeros_like(t) for t in trained]
    found = torch.autograd.grad(y, trained, dy, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(trained, found, strict=True)]


def linear(call: Call) -> Asked:
    (n, k, r), dtype, own = (call.size(0), call.size(0), call.size(0, 4)), call.pick(FLOATS), call.pick(FLOATS)
    x = call.tensor(*(call.size(0, 3) for _ in range(call.size(0, 3))), k, dtype=dtype)
    weight = call.tensor(n, k, dtype=dtype)
    bias = call.tensor(n, dtype=dtype) if call.pick([True, False]) else None
    A, B = call.tensor(r, k, dtype=own), call.tensor(n, r, dtype=own)
    core, delta = (call.tensor(r, r, dtype=own) if call.pick([False, True, False]) else None for _ in range(2))
    scaling, precision = call.number([1, -0.7, 2.5, 0.0]), call.pick(["base", "adapter"])
    options = {"core": core, "core_delta": delta, "backend": backend(call, "lora_linear"), "precision": precision}
    if call.oddly(12):
        options |= call.pick([{"dropout": 1.0}, {"dropout": None}, {"precision": 3}, {"precision": "wide"}])
    values, seed = (x, weight, bias, A, B, core, delta), call.normal
    wides = {id(t): wide(t) for t in values if is_real(t)}
    trained = list({id(t): t for t in values if isinstance(t, Tensor) and t.requires_grad}.values())

    def formula(of: Callable[[Tensor], Tensor], dy: Tensor) -> list[Tensor]:
        """y, and dy's gradients, in fp64, of whatever `of` makes of the numbers. One tensor in two places is one."""
        leaves = {key: of(t) for key, t in wides.items()}
        for t in trained:
            leaves[id(t)].requires_grad_()
        x, weight, bias, A, B, core, delta = (None if t is None else leaves[id(t)] for t in values)
        s = of(torch.tensor(float(scaling), dtype=fp64)).item()
        y = reference.lora_linear(x, None, weight, bias, A, B, s, core, delta)
        return [y.detach(), *grads(y, [leaves[id(t)] for t in trained], dy)]

    def check(y: Tensor) -> None:
        given = [t for t in values if t is not None]
        assert y.dtype == x.dtype
        assert not {t.untyped_storage().data_ptr() for t in given if t.numel()} & {y.untyped_storage().data_ptr()}
        dy = seed(*y.shape).to(y.dtype)
        found, exact = [y.detach(), *grads(y, trained, dy)], formula(Tensor.clone, dy.double())
        # The same sums of absolute values, of which every rounding is a part. At most five are on a path of the branch
        # (x, T, B times the cores, the sum, the gradient), and each sum has at most 36 terms.
        sizes = formula(Tensor.abs, dy.double().abs())
        eps, step = (max(table[t.dtype] for t in given) for table in (EPS, STEP))
        spread = math.isfinite(float(scaling)) and float(scaling) != 0 and r > 0
        # A NaN in a core reaches by the order of the products what it does not in the formula.
        count = len(found) if all(c is None or c.isfinite().all() for c in (core, delta)) else 1
        for value, right, size in list(zip(found, exact, sizes, strict=True))[:count]:
            near(value, right, 6 * eps * size + 100 * step, spread)

    return partial(slao_kernels.lora_linear, x, weight, bias, A, B, scaling, **options), [], check


def adapters_of(call: Call, least: int) -> tuple[Any, list[tuple[int, int]]]:
    shapes = [(call.size(least), call.size(least)) for _ in range(call.size(0, 3))]
    found: list[Any] = []
    for _ in range(call.size(1, 3)):
        ranks = [call.size(0 if found else 1, 4) for _ in shapes]
        As = [call.tensor(r, n) for (_, n), r in zip(shapes, ranks, strict=True)]
        Bs = [call.tensor(m, r) for (m, _), r in zip(shapes, ranks, strict=True)]
        found.append((call.items(As), call.items(Bs), call.numbers([1.0, -0.7, 2, 0.0], len(shapes))))
    return (call.items(found) if call.oddly(20) else found), shapes


def parts(adapters: list[Any], index: int) -> list[tuple[Tensor, Tensor, float]]:
    return [(wide(A[index]), wide(B[index]), float(s[index] if isinstance(s, list) else s)) for A, B, s in adapters]


def interference(call: Call) -> Asked:
    adapters, _ = adapters_of(call, 0)

    def check(found: slao_kernels.Interference) -> None:
        for index, gram in enumerate(found.gram):
            flat = torch.stack([(s * B @ A).flatten() for A, B, s in parts(adapters, index)])
            sizes = torch.stack([abs(s) * A.norm() * B.norm() for A, B, s in parts(adapters, index)])
            exact, fine = flat @ flat.T, sizes.isfinite()
            # Documented: below 2⁻⁴⁶ of its factors' size a task vector counts as zero, and a NaN shows in the rows and
            # columns of its adapter alone.
            zero = exact.diagonal() <= 2**-45 * sizes**2
            allowed = EXACT * sizes[:, None] * sizes + torch.where(zero[:, None] | zero, exact.abs(), 0)
            near(gram[fine][:, fine], exact[fine][:, fine], allowed[fine][:, fine])
            assert not gram.diagonal()[~fine].isfinite().any()

    return partial(slao_kernels.interference, adapters), [], check


def weighted(call: Call) -> Asked:
    adapters, shapes = adapters_of(call, 1)
    weights = [call.number([1.0, -0.5, 2, 0.0]) for _ in range(3)][: len(adapters) if isinstance(adapters, list) else 1]
    least = min((min(shape) for shape in shapes), default=1)
    odd_ranks = [0, -1, 99, "2", 1.0, [1], True, 10**30]
    rank = call.pick(odd_ranks) if call.oddly(8) else call.pick([None, 1, least, [1] * len(shapes)])
    odd_types = [torch.int8, torch.float8_e4m3fn, "float"]
    dtype = call.pick(odd_types) if call.oddly(12) else call.pick([None, fp64, torch.float32])

    def check(merge: slao_kernels.WeightedMerge) -> None:
        for index, (A, B) in enumerate(merge.pairs):
            own = parts(adapters, index)
            total = sum(w * s * b @ a for w, (a, b, s) in zip(weights, own, strict=True))
            sizes = sum(abs(w * s) * a.norm() * b.norm() for w, (a, b, s) in zip(weights, own, strict=True))
            U, S, Vh = torch.linalg.svd(total, full_matrices=False)
            best, r = (U[:, : len(A)] * S[: len(A)]) @ Vh[: len(A)], ROUNDED[A.dtype]
            assert (wide(B) @ wide(A) - total).norm() <= (best - total).norm() + 8 * r * best.norm() + 1e-13 * sizes

    return partial(slao_kernels.weighted_merge, adapters, weights, rank, dtype=dtype), [], check


OPS = {"init": init, "merge": merge, "fold": fold, "linear": linear, "interference": interference, "weighted": weighted}
FEWEST = 20  # of a hundred calls, that have to be answered, and that have to be refused


@pytest.mark.parametrize("op", OPS)
def test_any_arguments(op, one_thread):
    seen: Counter[str] = Counter()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize="SLAO_FUZZ" not in os.environ,
        phases=(Phase.generate, Phase.shrink),
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    @given(st.binary(min_size=BYTES, max_size=BYTES))
    def run(chosen: bytes) -> None:
        call = Call(chosen)
        ask, written, check = OPS[op](call)
        before = memory(call.tensors)
        olds = [(t, t.detach().clone()) for t in written if is_real(t)]
        refusal: Exception | None = None
        try:
            found = ask()
        except (ValueError, TypeError) as error:
            refusal = error
        except RuntimeError as error:  # a crash, but for torch's own of autograd, which says what to do
            if "Inference tensors cannot be saved" not in str(error):
                raise
            refusal = error
        if refusal is not None:
            assert call.odd, f"refused what fits: {refusal}"
            assert len(str(refusal).splitlines()) == 1
            assert unchanged(before), f"wrote, then refused: {refusal}"
            seen["refused"] += 1
            return
        check(found)
        with torch.no_grad():
            for tensor, old in olds:
                tensor.copy_(old)
        assert unchanged(before), "wrote beside its destinations, or into a source"
        seen["answered"] += 1

    run()
    assert min(seen["answered"], seen["refused"]) >= FEWEST * sum(seen.values()) / 100, seen

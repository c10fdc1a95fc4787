"""Any arguments at all: an op answers as its fp64 formula does, or says in one line what is wrong and writes nothing.

170 inputs an op, the same at every run; SLAO_FUZZ=1000 makes a thousand, others every time (`make fuzz`).
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fuzz_inputs import Call, memory, strided, unchanged, wide
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from on_lists import DTYPES, INTERPRETED, STORAGE, exact_qr
from test_interference import EXACT
from test_weighted_merge import ROUNDED
from torch import Tensor

import slao_kernels
from slao_kernels.testing import TOLERANCE

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter has its own tests, and is slow")
EXAMPLES = int(os.environ.get("SLAO_FUZZ", "170"))
PHASES = (Phase.generate, Phase.shrink)
EPS = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}
BACKENDS = ["auto", "auto", "native", "reference"]
Check = Callable[[Any], None]


def backend(call: Call) -> str:
    return call.pick(["nope", None, 3]) if call.oddly(20) else call.pick(BACKENDS)


def near(found: Tensor, exact: Tensor, allowed: Tensor) -> None:
    """Entry by entry; what is not finite in the formula is not in the result either."""
    found = wide(found)
    fine = exact.isfinite()
    assert ((found - exact).abs() <= allowed)[fine].all()
    assert not found[~fine].isfinite().any() or not allowed[~fine].isfinite().any()


def init(call: Call) -> tuple[Callable[[], Any], list[Any], Check]:
    shapes = [(r, call.size(r, 8)) for r in (call.size(1, 5) for _ in range(call.size(0, 3)))]
    As = [call.tensor(*shape) for shape in shapes]
    keep = None
    if call.pick([False, True]):
        keep = [torch.empty_like(A.detach(), requires_grad=False).fill_(7) if is_real(A) else A for A in As]
        call.tensors += [copy for copy in keep if isinstance(copy, Tensor)]
    olds = [wide(A) if is_real(A) else None for A in As]
    of_A, of_keep, on, triangles = call.items(As), keep and call.items(keep), backend(call), call.pick([False, True])

    def check(report: slao_kernels.OrthogonalInitReport) -> None:
        for index, (A, old) in enumerate(zip(of_A, olds, strict=False)):
            completed, A, slack = index in report.deficient, A.detach(), len(A) ** 0.5
            gram = wide(A) @ wide(A).T - torch.eye(len(A), dtype=torch.float64)
            least = {torch.float32: 5e-6, torch.float64: 5e-12}.get(A.dtype, 0.0) if completed else 0.0
            rounded = {torch.float64: 1e-13}.get(A.dtype, STORAGE[A.dtype] * slack)
            assert torch.linalg.matrix_norm(gram, 2) <= max(least, rounded)
            condition = torch.linalg.cond(old)
            if condition < 1e3:
                assert not completed
                assert (wide(A) - exact_qr(old)[0]).abs().max() <= (1e-10 if A.dtype == torch.float64 else 1e-5) + EPS[
                    A.dtype
                ]
            if triangles:
                lost = report.r[index].double().T @ wide(A) - old
                assert lost.norm() <= max(1e-6, STORAGE[A.dtype]) * slack * old.norm()
            if of_keep is not None:
                assert torch.equal(wide(of_keep[index]), old)

    written = [*As, *(keep or [])]
    return lambda: slao_kernels.orthogonal_init_(of_A, keep=of_keep, return_r=triangles, backend=on), written, check


def is_real(item: Any) -> bool:
    return isinstance(item, Tensor) and strided(item) and item.dtype in DTYPES


def merge(call: Call) -> tuple[Callable[[], Any], list[Any], Check]:
    shapes = [tuple(call.size(0, 4) for _ in range(call.size(0, 4))) for _ in range(call.size(0, 3))]
    merged, tuned = ([call.tensor(*shape) for shape in shapes] for _ in range(2))
    lam = call.numbers([0.0, 1.0, 0.3, 0.5, 0.7071, 1, True], len(shapes))
    olds = [tuple(wide(t) if is_real(t) else None for t in two) for two in zip(merged, tuned, strict=True)]
    of_m, of_t, on = call.items(merged), call.items(tuned), backend(call)

    def check(_: None) -> None:
        lams = [float(lam)] * len(olds) if not isinstance(lam, list) else [float(value) for value in lam]
        for target, (m, f), weight in zip(of_m, olds, lams, strict=True):
            exact = m if weight == 0.0 else f if weight == 1.0 else m + weight * (f - m)
            slack = EPS[torch.float64] if target.dtype == torch.float64 else 2 * EPS[torch.float32]
            size = torch.maximum(m.abs(), f.abs())
            near(target, exact, slack * size + exact.abs() * EPS[target.dtype] + torch.finfo(target.dtype).tiny)

    return lambda: slao_kernels.scaled_merge_(of_m, of_t, lam, backend=on), merged, check


def fold(call: Call) -> tuple[Callable[[], Any], list[Any], Check]:
    sizes = [(call.size(0), call.size(0), call.size(0, 4)) for _ in range(call.size(0, 3))]
    Ws, As, Bs = ([call.tensor(*shape) for shape in shapes] for shapes in (
        [(n, k) for n, k, _ in sizes], [(r, k) for _, k, r in sizes], [(n, r) for n, _, r in sizes]
    ))  # fmt: skip
    scalings = call.numbers([0.0, 1, -0.7, 2.5], len(sizes))
    olds = [tuple(wide(t) if is_real(t) else None for t in three) for three in zip(Ws, As, Bs, strict=True)]
    of_W, of_A, of_B, on = call.items(Ws), call.items(As), call.items(Bs), backend(call)

    def check(_: None) -> None:
        factors = [float(scalings)] * len(olds) if not isinstance(scalings, list) else [float(s) for s in scalings]
        for target, (W, A, B), s in zip(of_W, olds, factors, strict=True):
            exact, size = W + s * (B @ A), W.abs() + abs(s) * (B.abs() @ A.abs())
            sums = EPS[torch.float64] if target.dtype == torch.float64 else EPS[torch.float32]
            near(target, exact, exact.abs() * EPS[target.dtype] + 8 * sums * size + torch.finfo(target.dtype).tiny)

    return lambda: slao_kernels.fold_(of_W, of_A, of_B, scalings, backend=on), Ws, check


def linear(call: Call) -> tuple[Callable[[], Any], list[Any], Check]:
    (n, k, r), dtype, own = (call.size(), call.size(), call.size(1, 4)), call.pick(DTYPES), call.pick(DTYPES)
    x = call.tensor(*(call.size(0, 3) for _ in range(call.size(0, 3))), k, dtype=dtype)
    weight = call.tensor(n, k, dtype=dtype)
    bias = call.tensor(n, dtype=dtype) if call.pick([True, False]) else None
    A, B = call.tensor(r, k, dtype=own), call.tensor(n, r, dtype=own)
    core, delta = (call.tensor(r, r, dtype=own) if call.pick([True, False, False]) else None for _ in range(2))
    scaling, precision = call.number([0.0, 1, -0.7, 2.5]), call.pick(["base", "adapter"])
    options = {"core": core, "core_delta": delta, "backend": backend(call), "precision": precision}
    if call.oddly(12):
        options |= call.pick([{"dropout": 1.0}, {"dropout": None}, {"precision": 3}, {"precision": "wide"}])
    values = (x, weight, A, B, *(t for t in (bias, core, delta) if t is not None))

    def check(y: Tensor) -> None:
        if y.device.type == "meta":
            assert y.shape == (*x.shape[:-1], len(weight))
            return
        cores = [wide(c) for c in (core, delta) if c is not None]
        branch = wide(x) @ wide(A).T
        branch = branch @ sum(cores).T if cores else branch
        exact = wide(x) @ wide(weight).T + float(scaling) * branch @ wide(B).T + (0 if bias is None else wide(bias))
        assert y.dtype == x.dtype
        assert y.shape == exact.shape
        if y.numel() and all(bool(t.isfinite().all()) for t in values):
            # Against the operands' size. B times the cores is rounded to B's dtype.
            parts = [x, A, B, *cores]
            size = 1 + (wide(x).abs() @ wide(weight).abs().T).max().item()
            size += abs(float(scaling)) * math.prod(1 + t.detach().double().norm().item() for t in parts)
            worst = max(TOLERANCE[t.dtype] for t in ([x, A, B, core, delta] if cores else [x]) if t is not None)
            assert (wide(y) - exact).square().mean().sqrt() <= 6 * worst * size

    written: list[Any] = []
    return lambda: slao_kernels.lora_linear(x, weight, bias, A, B, scaling, **options), written, check


def adapters_of(call: Call) -> tuple[list[Any], list[tuple[int, int]]]:
    shapes = [(call.size(1), call.size(1)) for _ in range(call.size(0, 3))]
    found: list[Any] = []
    for _ in range(call.size(1, 3)):
        ranks = [call.size(0 if found else 1, 4) for _ in shapes]
        As = [call.tensor(r, n) for (_, n), r in zip(shapes, ranks, strict=True)]
        Bs = [call.tensor(m, r) for (m, _), r in zip(shapes, ranks, strict=True)]
        found.append((call.items(As), call.items(Bs), call.numbers([1.0, -0.7, 2, 0.0], len(shapes))))
    return (call.items(found) if call.oddly(20) else found), shapes


def deltas(adapters: list[Any], index: int) -> list[tuple[Tensor, Tensor, float]]:
    return [(wide(As[index]), wide(Bs[index]), float(s[index] if isinstance(s, list) else s)) for As, Bs, s in adapters]


def interference(call: Call) -> tuple[Callable[[], Any], list[Any], Check]:
    adapters, _ = adapters_of(call)

    def check(found: slao_kernels.Interference) -> None:
        for index, gram in enumerate(found.gram):
            parts = deltas(adapters, index)
            flat = torch.stack([(s * B @ A).flatten() for A, B, s in parts])
            sizes = torch.stack([abs(s) * A.norm() * B.norm() for A, B, s in parts])
            near(gram, flat @ flat.T, EXACT * sizes[:, None] * sizes)

    return lambda: slao_kernels.interference(adapters), [], check


def weighted(call: Call) -> tuple[Callable[[], Any], list[Any], Check]:
    adapters, shapes = adapters_of(call)
    weights = [call.number([1.0, -0.5, 2, 0.0]) for _ in range(3)][: len(adapters) if isinstance(adapters, list) else 1]
    least = min((min(shape) for shape in shapes), default=1)
    rank = call.pick([0, -1, 99, "2", 1.0, [1], True, 10**30]) if call.oddly(8) else call.pick([1, least])
    dtype = (
        call.pick([None, torch.float64, torch.float32])
        if not call.oddly(12)
        else call.pick([torch.int8, torch.float8_e4m3fn, "float"])
    )

    def check(merge: slao_kernels.WeightedMerge) -> None:
        for index, (A, B) in enumerate(merge.pairs):
            total = sum(w * s * b @ a for w, (a, b, s) in zip(weights, deltas(adapters, index), strict=True))
            U, S, Vh = torch.linalg.svd(total, full_matrices=False)
            best, r = (U[:, : len(A)] * S[: len(A)]) @ Vh[: len(A)], ROUNDED[A.dtype]
            sizes = sum(
                abs(w * s) * a.norm() * b.norm() for w, (a, b, s) in zip(weights, deltas(adapters, index), strict=True)
            )
            allowed = 8 * r * best.norm() + 1e-13 * sizes
            assert (wide(B) @ wide(A) - total).norm() <= (best - total).norm() + allowed

    return lambda: slao_kernels.weighted_merge(adapters, weights, rank, dtype=dtype), [], check


OPS = {"init": init, "merge": merge, "fold": fold, "linear": linear, "interference": interference, "weighted": weighted}
FEWEST = 25  # of a hundred calls, that have to be answered, and that have to be refused


@pytest.mark.parametrize("op", ["init", "merge", "fold", "linear"])  # the others: not run through yet
def test_any_arguments(op, one_thread):
    seen: Counter[str] = Counter()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize="SLAO_FUZZ" not in os.environ,
        phases=PHASES,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data: st.DataObject) -> None:
        call = Call(data.draw)
        ask, written, check = OPS[op](call)
        before = memory(call.tensors)
        olds = [(t, t.detach().clone()) for t in written if is_real(t)]
        said = None
        try:
            found = ask()
        except (ValueError, TypeError) as error:
            said = str(error)
        if said is not None:
            assert call.odd, f"refused what fits: {said}"
            assert len(said.splitlines()) == 1
            assert unchanged(before), f"wrote, then refused: {said}"
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

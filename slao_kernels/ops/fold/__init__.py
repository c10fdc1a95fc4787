"""fold_: LoRA deltas added into their base weights, all layers in one call."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ... import dispatch
from .. import checks, repeated
from ..exact_fold import Kept, fold_exactly_


def fold_(
    weights: Sequence[Tensor],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scalings: float | Sequence[float],
    *,
    keep: Kept | None = None,
    backend: str = "auto",
) -> None:
    """In place, for all layers: W <- W + scaling B A, without a temporary of W's size.

    weights: (N, K), for a layer that stores (K, N), such as GPT-2's Conv1D, pass `w.t()`; As: (r, K); Bs: (N, r);
    scalings: one number or one a layer. Any mix of floating dtypes and strides, one device; weights share no memory.
    Arithmetic in fp32 or wider, rounded once to W's dtype. Deterministic. Values are not inspected.
    keep: an empty `Kept`, with which `unfold_` gives every W its bits back, whatever the dtype and the delta. It takes
    0.06 bits a weight for a bf16 delta of 1 % of W, 1.5 for one as large as W, and copies of A and B. Sums are those of
    the delta by itself, so W may differ by their rounding from a fold without keep. Not under torch.compile; on a GPU
    the host waits for the streams' length and the checksums.
    Raises ValueError that names every offender, with nothing written.
    Source: LoRA, arXiv 2106.09685, section 4.1 (merging for inference).
    """
    weights, As, Bs = list(weights), list(As), list(Bs)
    factors = checks.numbers("fold_", "scalings", scalings, len(weights))
    more = len(weights), len(As), len(Bs), len(factors), all(map(math.isfinite, factors))
    call = _calls.call(weights + As + Bs, more, lambda: _check(weights, As, Bs, factors))
    if keep is not None:
        _check_keep(keep)
        return fold_exactly_(weights, As, Bs, factors, keep, backend)
    if not weights:
        return
    call.run("fold", dispatch.choose("fold", weights[0].device.type, backend), (weights, As, Bs), factors)


_calls = repeated.Repeated()


def _check_keep(keep: Kept) -> None:
    problems = checks.Problems("fold_")
    if not isinstance(keep, Kept):
        problems.add("keep", f"is a {type(keep).__name__}, expected a slao_kernels.Kept()")
    elif keep:
        problems.add("keep", "holds a fold already: unfold_ that first, or pass another Kept()")
    elif torch.compiler.is_compiling():
        problems.add("keep", "is of a size that depends on the weights: call fold_ outside of what is compiled")
    problems.raise_if_any()


def _check(weights: list[Tensor], As: list[Tensor], Bs: list[Tensor], factors: list[float]) -> None:
    problems = checks.Problems("fold_")
    if checks.lengths(problems, weights=weights, As=As, Bs=Bs, scalings=factors):
        device = next((tensor.device for tensor in weights if isinstance(tensor, Tensor)), None)
        for index, (W, A, B, factor) in enumerate(zip(weights, As, Bs, factors, strict=True)):
            fine = checks.tensor(problems, f"weights[{index}]", W, device)
            fine &= checks.tensor(problems, f"As[{index}]", A, device)
            fine &= checks.tensor(problems, f"Bs[{index}]", B, device)
            if fine:
                checks.destination(problems, f"weights[{index}]", W)
            if fine and not (
                W.dim() == A.dim() == B.dim() == 2 and W.shape == (B.shape[0], A.shape[1]) and A.shape[0] == B.shape[1]
            ):
                shapes = f"W {tuple(W.shape)}, A {tuple(A.shape)}, B {tuple(B.shape)}"
                problems.add(f"weights[{index}]", f"{shapes} do not fit W (N, K) += B (N, r) A (r, K)")
            if not math.isfinite(factor):
                problems.add(f"scalings[{index}]", f"is {factor}, expected a finite number")
        if not problems.found:
            checks.distinct_memory(problems, "weights", weights, As=As, Bs=Bs)
    problems.raise_if_any()

"""scaled_merge_: the running merge of every layer in one call (SLAO's step 7)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ... import dispatch
from .. import checks, repeated


def scaled_merge_(
    merged: Sequence[Tensor],
    finetuned: Sequence[Tensor],
    lam: float | Sequence[float],
    *,
    backend: str = "auto",
) -> None:
    """In place, for all pairs: merged <- merged + lam (finetuned - merged).

    merged, finetuned: equally long lists, pairwise of one shape (any), any mix of floating dtypes and strides, one
    device; merged tensors share no memory. lam: one number in [0, 1], or one a pair. Arithmetic in fp32 (fp64 for
    fp64 destinations), rounded once to the destination's dtype; within one unit in the last place of `torch.lerp` and
    half a unit of lam times the change, which only fused arithmetic leaves unrounded; lam = 0 leaves the destination
    as it is and lam = 1 copies, exactly. Deterministic. Values are not inspected.
    Raises ValueError that names every offender, with nothing written.
    Source: SLAO, arXiv 2512.23017, eq. for B_merge with λ(i) = 1/√i.
    """
    merged, finetuned = list(merged), list(finetuned)
    weights = checks.numbers("scaled_merge_", "lam", lam, len(merged))
    # The weights change from task to task, the tables do not have them.
    more = len(merged), len(finetuned), len(weights), all(0.0 <= weight <= 1.0 for weight in weights)
    call = _calls.call(merged + finetuned, more, lambda: _check(merged, finetuned, weights))
    if not merged:
        return
    chosen = dispatch.choose("scaled_merge", merged[0].device.type, backend)
    call.run("scaled_merge", chosen, (merged, finetuned), weights)


_calls = repeated.Repeated()


def _check(merged: list[Tensor], finetuned: list[Tensor], weights: list[float]) -> None:
    problems = checks.Problems("scaled_merge_")
    if checks.lengths(problems, merged=merged, finetuned=finetuned, lam=weights):
        device = next((tensor.device for tensor in merged if isinstance(tensor, Tensor)), None)
        for index, (target, source, weight) in enumerate(zip(merged, finetuned, weights, strict=True)):
            fine = checks.tensor(problems, f"merged[{index}]", target, device)
            fine &= checks.tensor(problems, f"finetuned[{index}]", source, device)
            if fine:
                checks.destination(problems, f"merged[{index}]", target)
            if fine and target.shape != source.shape:
                problems.add(f"finetuned[{index}]", f"is {tuple(source.shape)}, merged {tuple(target.shape)}")
            if not 0.0 <= weight <= 1.0:
                problems.add(f"lam[{index}]", f"is {weight}, expected a number in [0, 1]")
        if not problems.found:
            checks.distinct_memory(problems, "merged", merged, finetuned=finetuned)
    problems.raise_if_any()

"""orthogonal_init_: every layer's A becomes an orthonormal basis of its own row space (SLAO's step 1 to 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import dispatch
from .. import checks, repeated


class OrthogonalInitReport:
    """What `orthogonal_init_` did. On a GPU nothing is read back until an attribute is looked at.

    deficient: indices of the matrices that had rows without a direction of their own (linearly dependent or zero);
    those rows were completed to an orthonormal set. r: per matrix R (r, r) in fp32 (fp64 for fp64), upper triangular
    with a positive diagonal (zero or tiny on completed rows), or None if it was not asked for.
    Reading either raises ValueError if an input was not finite; then no matrix was changed.
    """

    def __init__(self, r: list[Tensor] | None, status: Tensor) -> None:
        self._r = r
        self._status = status
        self._states: list[int] | None = None

    def check(self) -> None:
        """Wait for the result; ValueError that names every matrix with a NaN or an infinity."""
        if self._states is None:
            self._states = self._status.tolist()
        problems = checks.Problems("orthogonal_init_")
        for index, state in enumerate(self._states):
            if state == 2:
                problems.add(f"As[{index}]", "has NaN or infinite entries; the training that made it diverged")
        problems.raise_if_any()

    @property
    def deficient(self) -> list[int]:
        self.check()
        return [index for index, state in enumerate(self._states or ()) if state == 1]

    @property
    def r(self) -> list[Tensor] | None:
        self.check()
        return self._r


def orthogonal_init_(
    As: Sequence[Tensor], *, return_r: bool = False, keep: Sequence[Tensor] | None = None, backend: str = "auto"
) -> OrthogonalInitReport:
    """In place, for all matrices: A <- Qᵀ where Aᵀ = Q R is the reduced QR with diag(R) > 0, so A Aᵀ = I.

    As: matrices (r, n), r <= n, each of any floating dtype and any strides, all on one device, no shared memory.
    Accuracy: ‖A Aᵀ − I‖₂ ≤ 1e-6 in fp32, ≤ 5e-6 where rows had to be completed; 16-bit storage holds the rounding
    of that. Deterministic. Works on Parameters; autograd does not record it.
    keep: tensors of the As' shapes and dtypes, which receive what the As were; on a CPU in the pass that overwrites
    those, which saves reading them once more, on a GPU all in one launch.
    Returns an OrthogonalInitReport.
    Raises ValueError that names every bad matrix (r > n, not floating, NaN or infinite, other device, overlap), with
    nothing written. On a GPU NaN and infinities are found on the device: no A is written either (`keep` is), and the
    report raises when it is read.
    Source: SLAO, arXiv 2512.23017, Algorithm 1.
    """
    As, kept = list(As), [] if keep is None else list(keep)
    call = _calls.call(As + kept, (len(As), keep is None), lambda: _check(As, None if keep is None else kept))
    if not As:
        return OrthogonalInitReport([] if return_r else None, torch.empty(0, dtype=torch.int32))
    device = As[0].device
    chosen = dispatch.choose("orthogonal_init", device.type, backend)
    r = [A.new_empty((A.shape[0], A.shape[0]), dtype=_r_dtype(A.dtype)) for A in As] if return_r else []
    status = torch.empty(len(As), dtype=torch.int32, device=device)
    in_one_pass = bool(kept) and call.seen is not None and chosen == "native" and device.type == "cpu"
    if kept and not in_one_pass:
        if device.type == "cpu":
            # The copies come first here: the report, which names what is not finite, before anything is written.
            OrthogonalInitReport(None, torch.tensor([2 * int(not A.isfinite().all()) for A in As])).check()
        # A merge with weight 1 copies bits, all in one launch.
        copies = dispatch.choose("scaled_merge", device.type, backend)
        call.run("scaled_merge", copies, (kept, As), [1.0] * len(As))
    call.run("orthogonal_init", chosen, (As,), r, status, **({"keep": kept} if in_one_pass else {}))
    report = OrthogonalInitReport(r if return_r else None, status)
    if device.type == "cpu":
        report.check()
    return report


_calls = repeated.Repeated()


def _check(As: list[Tensor], keep: list[Tensor] | None) -> None:
    problems = checks.Problems("orthogonal_init_")
    device = next((A.device for A in As if isinstance(A, Tensor)), None)
    for index, A in enumerate(As):
        if not checks.tensor(problems, f"As[{index}]", A, device):
            continue
        checks.destination(problems, f"As[{index}]", A)
        if A.dim() != 2 or not 0 < A.shape[0] <= A.shape[1]:
            problems.add(f"As[{index}]", f"is {tuple(A.shape)}; it needs the shape (r, n) with 1 <= r <= n")
    if keep is not None and checks.lengths(problems, As=As, keep=keep):
        for index, (A, copy) in enumerate(zip(As, keep, strict=True)):
            fits = isinstance(A, Tensor) and checks.tensor(problems, f"keep[{index}]", copy, device)
            if fits:
                checks.destination(problems, f"keep[{index}]", copy)
            if fits and (copy.shape, copy.dtype) != (A.shape, A.dtype):
                problems.add(f"keep[{index}]", f"is {tuple(copy.shape)} {copy.dtype}, A {tuple(A.shape)} {A.dtype}")
    if not problems.found:
        checks.distinct_memory(problems, "As", As)
        checks.distinct_memory(problems, "keep", keep or [], As=As)
        for index, copy in enumerate(keep or ()):
            if copy.data_ptr() == As[index].data_ptr():
                problems.add(f"keep[{index}]", f"is As[{index}] itself")
    problems.raise_if_any()


def _r_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32

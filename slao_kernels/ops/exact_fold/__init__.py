"""unfold_, and the fold that it undoes bit for bit: `fold_(..., keep=Kept())`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import dispatch
from .. import checks
from .kept import Folded, Kept, bits_of

__all__ = ["Folded", "Kept", "bits_of", "fold_exactly_", "unfold_"]


def fold_exactly_(
    weights: list[Tensor], As: list[Tensor], Bs: list[Tensor], scalings: list[float], keep: Kept, backend: str
) -> None:
    """`fold_` with a keep; the arguments have passed its checks. After an error midway all weights are as they were."""
    if not weights:
        return
    keep.backend = dispatch.choose("exact_fold", weights[0].device.type, backend)
    module = dispatch.implementation("exact_fold", keep.backend)
    keep.mark = module.mark()
    with torch.no_grad():
        try:
            for W, A, B, s in zip(weights, As, Bs, scalings, strict=True):
                flipped = W.stride(1) != 1 and W.stride(0) == 1  # walked in its own memory order
                keep.folded.append(
                    Folded(W.shape, W.dtype, W.device, flipped, A.detach().clone(), B.detach().clone(), s)
                )
            layers = [one.layer(W) for W, one in zip(weights, keep.folded, strict=True)]
            for owners in module.groups(layers):
                streams, sums = module.fold([layers[owner] for owner in owners])
                streams.owners = owners
                keep.streams.append(streams)
                for owner, total in zip(owners, sums, strict=True):
                    keep.folded[owner].sum = total
        except BaseException:
            _undo(weights, keep)
            raise


def unfold_(weights: Sequence[Tensor], keep: Kept) -> None:
    """In place, for all layers: W as it was before `fold_(weights, ..., keep=keep)`, bit for bit; keep is empty then.

    weights: the tensors of that call, in its order (or others that hold their bits: same shapes, dtypes, device). The
    thread count may be another, and the A and B of the fold may have changed: the keep has its own. Of several folds
    into one weight the last is undone first.
    Raises ValueError that names every weight whose bits changed since the fold, or that is another's, with nothing
    written.
    """
    weights = list(weights)
    problems = checks.Problems("unfold_")
    if not isinstance(keep, Kept):
        problems.add("keep", f"is a {type(keep).__name__}, expected the Kept that fold_ was given")
    elif weights and not keep:
        problems.add("keep", "holds no fold: pass one that fold_(..., keep=...) filled and unfold_ has not emptied yet")
    elif checks.lengths(problems, weights=weights, keep=keep.folded) and weights:
        _check(problems, weights, keep)
    problems.raise_if_any()
    if weights:
        with torch.no_grad():
            _undo(weights, keep)


def _check(problems: checks.Problems, weights: list[Tensor], keep: Kept) -> None:
    module = dispatch.implementation("exact_fold", keep.backend)
    if module.mark() != keep.mark:
        problems.add("keep", f"was made by instructions ({keep.mark}) that this process does not use ({module.mark()})")
    for index, (W, of) in enumerate(zip(weights, keep.folded, strict=True)):
        if not checks.tensor(problems, f"weights[{index}]", W, of.device):
            continue
        checks.destination(problems, f"weights[{index}]", W)
        if (W.shape, W.dtype) != (of.shape, of.dtype):
            now, then = (f"{tuple(one.shape)} {one.dtype}" for one in (W, of))
            problems.add(f"weights[{index}]", f"is {now}, what was folded was {then}")
    if problems.found:
        return
    checks.distinct_memory(problems, "weights", weights)
    with torch.no_grad():
        sums = module.sums([of.layer(W) for W, of in zip(weights, keep.folded, strict=True)])
    for index, (of, total) in enumerate(zip(keep.folded, sums, strict=True)):
        if total != of.sum:
            problems.add(
                f"weights[{index}]",
                "has changed since the fold (undo what was done to it later first, or load it anew)",
            )


def _undo(weights: list[Tensor], keep: Kept) -> None:
    """What the keep has streams of; then the keep is empty."""
    module = dispatch.implementation("exact_fold", keep.backend)
    while keep.streams:
        streams = keep.streams.pop()
        module.unfold([keep.folded[owner].layer(weights[owner]) for owner in streams.owners], streams)
    keep.clear()

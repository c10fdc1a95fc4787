"""Whether a tensor that a base layer has just returned is nobody else's, and may be written into."""

from __future__ import annotations

import sys

import torch
from torch import Tensor


def holders(y: Tensor) -> tuple[int, int, int]:
    """How many hold y: as a Python object, as a tensor (saved by a node), as memory (views, detached or saved ones)."""
    return sys.getrefcount(y), y._use_count(), torch._C._storage_Use_Count(y.untyped_storage()._cdata)


def _of_a_fresh_one() -> tuple[int, int, int] | None:
    """What `holders` says, called like this, of a tensor that nobody else has; None where torch cannot tell."""
    y = torch.empty(1)
    try:
        return holders(y)
    except AttributeError:
        return None


FRESH = _of_a_fresh_one()


def writable(y: Tensor) -> bool:
    """Whether y, if nobody else holds it, may be written into in this mode.

    Not so: an expanded or otherwise not contiguous one; a view, which autograd may refuse to rebase; a leaf that
    wants a gradient; one made in inference mode, outside of it; memory that torch did not allocate (numpy's).
    """
    if y._is_view() or not y.is_contiguous() or (y.requires_grad and y.is_leaf):
        return False
    if y.is_inference() and not torch.is_inference_mode_enabled():
        return False
    return y.numel() > 0 and y.untyped_storage().resizable()

"""Exact folds on the backends that this process has for a CPU: a decorator for tests, cases, and the round trip."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from on_lists import INTERPRETED, bits
from torch import Tensor

from slao_kernels import Kept, fold_, native, unfold_

STORED = [torch.bfloat16, torch.float16, torch.float32]
missing = native.why_not("cpu")
needs_core = pytest.mark.skipif(missing is not None, reason=f"no compiled core: {missing}")
# In the process where Triton interprets, the others have had their turn.
BACKENDS = ["triton"] if INTERPRETED else [pytest.param("native", marks=needs_core), "reference"]
each = pytest.mark.parametrize("backend", BACKENDS)


def same(W: Tensor, before: Tensor) -> bool:
    return torch.equal(bits(W), bits(before))


def case(n: int, k: int, r: int, dtype: torch.dtype, adapter: torch.dtype, delta: float) -> tuple[Tensor, ...]:
    """W of size 1 and A, B whose product has the size `delta`."""
    W, A, B = torch.randn(n, k), torch.randn(r, k), torch.randn(n, r) * delta / r**0.5
    return W.to(dtype), A.to(adapter), B.to(adapter)


def there_and_back(Ws: list[Tensor], As: list[Tensor], Bs: list[Tensor], scalings: Any, backend: str) -> Kept:
    """The keep as it was between; asserts that every weight is changed and comes back."""
    before, keep = [W.clone() for W in Ws], Kept()
    fold_(Ws, As, Bs, scalings, keep=keep, backend=backend)
    between = copy.deepcopy(keep)
    assert keep
    unfold_(Ws, keep)
    assert not keep
    assert all(map(same, Ws, before))
    return between

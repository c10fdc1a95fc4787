"""The same lists call after call: checked once, their tables made once.

A model's call has hundreds of tensors, and looking at each of them again takes longer than a GPU needs for the work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from . import checks, operators

# Calls of one op that are remembered: a CUDA graph may hold several, all of which have to have run before.
_MOST = 16


@dataclass
class Call:
    """Lists that passed an op's checks. seen: their description; None where the call has to go through torch's
    dispatcher, or nothing can be kept of it. more: whatever else the checks and the tables depend on."""

    seen: tuple[list[object], ...] | None = None
    more: object = None
    tables: dict[tuple[str, str], Any] = field(default_factory=dict)

    def run(self, op: str, backend: str, lists: Sequence[list[Tensor]], *more: Any, **options: Any) -> None:
        """The op's operator on these of the call's lists; past torch's dispatcher where nobody looks on, with what the
        backend's `tables` made of them. options: what only the backend's function takes."""
        with torch.no_grad():
            if backend == "reference" or self.seen is None:
                getattr(operators.OPS, f"{op}_")(*lists, *more, backend)
                return
            module = dispatch.implementation(op, backend)
            if (op, backend) not in self.tables:
                self.tables[op, backend] = module.tables(*lists)
            getattr(module, f"{op}_")(*lists, *more, self.tables[op, backend], **options)


class Repeated:
    """The last calls of an op, which the next one usually repeats."""

    def __init__(self) -> None:
        self._kept: list[Call] = []

    def call(self, tensors: Sequence[Tensor], more: object, check: Callable[[], None]) -> Call:
        """The call of these tensors; `check` is asked, and may raise, unless it is remembered."""
        seen = checks.description(tensors) if dispatch.direct() else None
        if seen is not None:
            for call in self._kept:  # another one's first address differs: a comparison is short
                if call.seen == seen and call.more == more:
                    return call
        check()
        call = Call(seen, more)
        if seen is not None:
            self._kept = [call, *self._kept[: _MOST - 1]]
        return call

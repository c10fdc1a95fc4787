"""The same lists call after call: checked once, their tables made once.

A model's call has hundreds of tensors, and looking at each of them again takes longer than a GPU needs for the work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from torch import Tensor

from .. import dispatch
from . import checks


@dataclass
class Call:
    """Lists that passed an op's checks. seen: their description; None where the call has to go through torch's
    dispatcher, or nothing can be kept of it. more: whatever else the checks and the tables depend on."""

    seen: tuple[list[object], ...] | None = None
    more: object = None
    tables: dict[str, Any] = field(default_factory=dict)

    def table(self, name: str, backend: ModuleType, *lists: Sequence[Tensor]) -> Any:
        """What the backend's `tables` made of these of the call's lists."""
        if name not in self.tables:
            self.tables[name] = backend.tables(*lists)
        return self.tables[name]


class Repeated:
    """The last call of an op, which the next one usually repeats."""

    def __init__(self) -> None:
        self._last = Call()

    def call(self, tensors: Sequence[Tensor], more: object, check: Callable[[], None]) -> Call:
        """The call of these tensors; `check` is asked, and may raise, unless it was the last one."""
        seen = checks.description(tensors) if dispatch.direct() else None
        if seen is None or seen != self._last.seen or more != self._last.more:
            check()
            self._last = Call(seen, more)
        return self._last

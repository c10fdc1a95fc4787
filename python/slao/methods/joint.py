"""Joint training: the rows of all tasks at once. No continual learning at all, but its upper bound."""

from __future__ import annotations

from .seqlora import SeqLoRA


class Joint(SeqLoRA):
    """One LoRA, trained once on all tasks' rows together, in as many steps as all tasks have; scored on every task.

    `slao.train` does it (`together`). With `begin_task` and `end_task` by hand it is SeqLoRA on whatever it is given.
    """

    name = "joint"
    together = True

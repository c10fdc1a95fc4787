"""What is looked at while a task trains: whether its weights are still numbers, and whether it is to stop."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import TrainerCallback

from slao_kernels import sharding

from . import stopping
from .methods import Method

logger = logging.getLogger("slao")
# RMS of a factor's entries. Trained ones are below 1; Adam at a learning rate of 1e-3 moves an entry by as much a step.
_EXPLODED = 100.0


class Watch(TrainerCallback):
    """Ends the training at a step's end when a signal asked for it, and raises ValueError at the first log (every 10
    steps, when the Trainer waits for the device anyway) after a layer's weights became NaN or infinite. Warns, once a
    task, of weights that are finite but explode. On several ranks the weights are looked at when the task ends only."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self._warned = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if sharding.ranks() == 1 and stopping.asked():
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if sharding.ranks() > 1 or not self.method.in_task:
            return
        self.method._refuse_broken_weights()
        if not self._warned:
            self._warn(state.global_step)

    def _warn(self, step: int) -> None:
        weights = self.method._live_tensors()
        if not weights:
            return
        norms = torch.stack(torch._foreach_norm([tensor.detach().float() for tensor in weights.values()])).tolist()
        large = {}
        for (key, tensor), norm in zip(weights.items(), norms, strict=True):
            if norm > _EXPLODED * tensor.numel() ** 0.5:
                large[key] = norm / tensor.numel() ** 0.5
        if large:
            self._warned = True
            key = max(large, key=large.__getitem__)
            logger.warning(
                "task %r explodes: after %d steps the entries of %s are of size %.3g (RMS), and %d weights exceed %g; "
                "lower the learning rate",
                self.method.names[-1],
                step,
                key,
                large[key],
                len(large),
                _EXPLODED,
            )

"""Avalanche: a method as a plugin of any of its strategies. Needs nothing of Avalanche itself: its hooks are found by
their names."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from ..methods import Method


class SlaoPlugin:
    """`Naive(model=model, ..., plugins=[SlaoPlugin(method)])`: each experience is one task of `method`.

    method: made on the strategy's model, after `slao_kernels.patch`. Evaluation between experiences runs on the merged
    weights; the one that `eval_every` asks for within an experience, on those that are being trained. A method's
    penalty joins the loss. ValueError when the strategy trains another model.
    The optimiser should be one without a state to carry over, or be made anew for each experience.
    """

    supports_distributed = True  # every rank makes the same calls

    def __init__(self, method: Method) -> None:
        self.method = method
        self._merged: ExitStack | None = None

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self.after_eval(strategy)  # an evaluation that was broken off
        first = self.method.pairs[0]
        if not any(module is first.layer for module in strategy.model.modules()):
            raise ValueError(
                f"the strategy's model does not hold the method's layer {first.name}: give the strategy the model that "
                "the method was made on"
            )
        self.method.begin_task(f"experience {strategy.experience.current_experience}")

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        penalty = self.method.penalty()
        if penalty is not None:
            strategy.loss = strategy.loss + penalty

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self.method.end_task()

    def before_eval(self, strategy: Any, **kwargs: Any) -> None:
        self.after_eval(strategy)
        if not self.method.in_task:
            self._merged = ExitStack()
            self._merged.enter_context(self.method.merged())

    def after_eval(self, strategy: Any, **kwargs: Any) -> None:
        if self._merged is not None:
            self._merged.close()
            self._merged = None

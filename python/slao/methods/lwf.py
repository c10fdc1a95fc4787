"""LwF (arXiv 1606.09282) in feature space: one LoRA, held on each new task to what the model said before that task."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from .base import Method
from .extended import refuse_shards
from .showing import Weights, swapped


class LwF(Method):
    """One LoRA with weight · mean ‖h − h_old‖² / ‖h_old‖² in every step's loss from the second task on.

    h: the last hidden states of the batch, at every token but padding (of a model that is not one of transformers' its
    output), under the adapter as it is trained; h_old those under the adapter as the last task left it. No row of
    earlier tasks is needed: the new ones stand for them. The paper compares class probabilities; states are there in
    every model, with a head or without, and a large head is not computed twice (as in less-forgetting learning, arXiv
    1607.00122).

    weight: what is right depends on the loss; 1 is a start. A step has one more forward pass, without gradients and
    dropout, through the model under its head. The batch is that of the last forward pass with gradients before
    `penalty()`. State: a copy of A and B, whatever the number of tasks.
    Raises ValueError for a weight that is negative or not finite, and in training for a model that returns no tensor.
    """

    name = "lwf"

    def __init__(self, model: nn.Module, weight: float = 1.0, adapter: str = "default", beside: str = "keep") -> None:
        super().__init__(model, adapter=adapter, beside=beside)
        if not 0.0 <= weight < float("inf"):
            raise ValueError(f"weight must be a finite number of at least 0, not {weight}")
        self.weight = float(weight)
        self._before: list[tuple[Tensor, Tensor]] = []  # A and B as the last task left them
        self._last: tuple[Any, Any, Tensor] | None = None  # arguments and states of the last forward pass
        self._body = _body(model)
        self._body.register_forward_hook(_observer(weakref.ref(self)), with_kwargs=True)

    def _begin(self, task: int) -> None:
        refuse_shards(self)  # whose storages cannot be swapped
        if task > 1:
            self._before = [(pair.A.clone(), pair.B.clone()) for pair in self.pairs]

    def penalty(self) -> Tensor | None:
        last, self._last = self._last, None
        if last is None:
            return None
        args, kwargs, states = last
        old = self._states_before(args, kwargs)
        apart = (states.to(old.dtype) - old).square().sum(-1) / old.square().sum(-1).clamp(min=1e-30)
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape == apart.shape:
            apart = apart[mask.bool()]
        return self.weight * apart.mean()

    def _states_before(self, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """Under the adapter of before, in fp32 at least."""
        training = self._body.training
        self._body.eval()
        try:
            with torch.no_grad(), swapped(self.pairs, self._weights_before):
                states = _states(self._body(*args, **kwargs))
        finally:
            self._body.train(training)
        return states.to(torch.promote_types(states.dtype, torch.float32))

    def _weights_before(self) -> Weights:
        return [*self._before]

    def _options(self) -> dict[str, Any]:
        return {"weight": self.weight}

    def _state(self) -> dict[str, Tensor]:
        both = zip(self.pairs, self._before, strict=False)  # before the second task there is nothing
        return {f"{pair.name}.{key}_before": value for pair, two in both for key, value in zip("AB", two, strict=True)}

    def _load_state(self, tensors: dict[str, Tensor]) -> None:
        found = []
        for pair in self.pairs if tensors else ():
            A, B = (tensors.get(f"{pair.name}.{key}_before") for key in "AB")
            if A is None or B is None or A.shape != pair.A.shape or B.shape != pair.B.shape:
                raise ValueError(f"the saved adapter of before does not fit {pair.name}, A {tuple(pair.A.shape)}")
            found.append((A.to(pair.A.device), B.to(pair.B.device)))
        self._before = found


def _body(model: nn.Module) -> nn.Module:
    """transformers' model without its head; any other model itself."""
    from transformers import PreTrainedModel

    found = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    return model if found is None else found.base_model


def _states(output: Any) -> Tensor:
    states: Any = getattr(output, "last_hidden_state", output)
    if not isinstance(states, Tensor):
        raise ValueError(f"lwf compares last hidden states, or a tensor that the model returns, and got {type(output)}")
    return states


def _observer(method: weakref.ref[LwF]) -> Any:
    """A hook that the model can keep without keeping the method."""

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        own = method()
        if own is not None and own._before and own.in_task and torch.is_grad_enabled():
            own._last = args, kwargs, _states(output)

    return hook

"""LwF (arXiv 1606.09282) in feature space: one LoRA, held on each new task to what the model said before that task."""

from __future__ import annotations

import inspect
import logging
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..modes import eval_mode
from .base import Method
from .extended import refuse_shards
from .showing import swapped

logger = logging.getLogger("slao")


class Seen(NamedTuple):
    """A forward pass of the body: its arguments, the states that it returned, and the autocast that it ran under."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    states: Tensor
    autocast: tuple[bool, torch.dtype]


class LwF(Method):
    """One LoRA with weight · Σ ‖h − h_old‖² / Σ ‖h_old‖² in every step's loss from the second task on.

    h: the last hidden states of the batch, summed over every token but padding (of a model that is not one of
    transformers' its output), under the adapter as it is trained; h_old those under the adapter as the last task left
    it. No row of earlier tasks is needed: the new ones stand for them. The paper compares class probabilities; states
    are there in every model, with a head or without, and a large head is not computed twice (as in less-forgetting
    learning, arXiv 1607.00122).

    weight: what is right depends on the loss; 1 is a start. A step has one more forward pass, without gradients and
    dropout, through the model under its head. The batch is that of the last forward pass with gradients before
    `penalty()`. State: while a task runs from the second on a copy of A and B.
    Raises ValueError for a weight that is negative or not finite, for what trains beside A and B under the head (unless
    beside="freeze"), and in training for a model that returns no tensor.
    """

    name = "lwf"

    def __init__(self, model: nn.Module, weight: float = 1.0, adapter: str = "default", beside: str = "keep") -> None:
        if not 0.0 <= weight < float("inf"):
            raise ValueError(f"weight must be a finite number of at least 0, not {weight}")
        super().__init__(model, adapter=adapter, beside=beside)
        self.weight = float(weight)
        self._before: list[tuple[Tensor, Tensor]] = []  # A and B as the last task left them
        self._last: Seen | None = None
        self._held = False  # whether a penalty of the running task had a gradient
        hook = self._body.register_forward_hook(_Hook(self), with_kwargs=True)
        weakref.finalize(self, hook.remove)

    def _check(self) -> None:
        self._body = _body(self.model, [pair.layer for pair in self.pairs])
        config = getattr(self._body, "config", None)
        if getattr(config, "is_encoder_decoder", False) and hasattr(self._body, "lm_head"):
            raise ValueError(
                "lwf holds the states under a head, and this encoder-decoder model has no module of its own there"
            )
        under = set(self._body.modules())
        trained = [part.name for part in self.beside.parts if part.slot[0] in under]
        if trained and self.beside.how != "freeze":
            raise ValueError(
                f"lwf holds what the model says under its head by A and B alone, and {trained[0]} trains there too: "
                "leave it out of the LoraConfig, or use beside='freeze'"
            )

    def _begin(self, task: int) -> None:
        refuse_shards(self)  # whose storages cannot be swapped
        self._last, self._held = None, False
        if task > 1:
            self._before = [(pair.A.clone(), pair.B.clone()) for pair in self.pairs]

    def _end(self, task: int) -> float:
        if self._before and self.weight and not self._held:
            logger.warning(
                "lwf: no step of task %r had a penalty with a gradient, so nothing was held: add penalty() to the loss "
                "of each step, after its forward pass",
                self.names[-1],
            )
        self._before, self._last = [], None
        return 1.0

    def penalty(self) -> Tensor | None:
        last, self._last = self._last, None
        if last is None:
            return None
        if self._before[0][0].device != self.pairs[0].parameters[0].device:
            self._follow()
        old = self._states_before(last)
        apart, size = ((states.to(old.dtype)).square().sum(-1) for states in (last.states - old, old))
        mask = _mask(self._body, last)
        if mask is not None:
            apart, size = apart * mask, size * mask
        total = self.weight * apart.sum() / size.sum().clamp(min=torch.finfo(size.dtype).tiny)
        self._held |= total.requires_grad
        return total

    def _states_before(self, seen: Seen) -> Tensor:
        """Under the adapter of before, in fp32 at least."""
        on, dtype = seen.autocast
        autocast = torch.autocast(seen.states.device.type, dtype, on)
        with torch.no_grad(), autocast, eval_mode(self._body), swapped(self.pairs, lambda: [*self._before]):
            states = _states(self._body(*seen.args, **seen.kwargs))
        return states.to(torch.promote_types(states.dtype, torch.float32))

    def _options(self) -> dict[str, Any]:
        return {"weight": self.weight}

    def _state(self) -> dict[str, Tensor]:
        both = zip(self.pairs, self._before, strict=False)
        return {f"{pair.name}.{key}_before": value for pair, two in both for key, value in zip("AB", two, strict=True)}

    def _load_state(self, tensors: dict[str, Tensor]) -> None:
        found = []
        for pair in self.pairs if tensors else ():
            A, B = (tensors.get(f"{pair.name}.{key}_before") for key in "AB")
            if A is None or B is None or A.shape != pair.A.shape or B.shape != pair.B.shape:
                raise ValueError(f"the saved adapter of before does not fit {pair.name}, A {tuple(pair.A.shape)}")
            found.append((A.to(pair.A.device), B.to(pair.B.device)))
        self._before, self._last = found, None


class _Hook:
    """What the body keeps: it does not keep the method alive, and is nothing in a copy or pickle of the model."""

    def __init__(self, method: LwF | None = None) -> None:
        self._method = None if method is None else weakref.ref(method)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        own = None if self._method is None else self._method()
        if own is None or not own.in_task or not torch.is_grad_enabled():
            return
        states = _states(output)  # from the first task on: what cannot be treated is said at once
        if own._before:
            device = states.device.type
            autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
            own._last = Seen(args, kwargs, states, autocast)


def _body(model: nn.Module, layers: list[nn.Module]) -> nn.Module:
    """transformers' model without its head, in which all of the layers are; else the model itself."""
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            body: nn.Module = module.base_model
            if set(layers) <= set(body.modules()):
                return body
    return model


def _states(output: Any) -> Tensor:
    states: Any = getattr(output, "last_hidden_state", output)
    if not isinstance(states, Tensor):
        raise ValueError(
            f"lwf compares last hidden states, or a tensor that the model returns, and got a {type(output).__name__}: "
            "set return_dict=True, or let the model return one tensor"
        )
    return states


def _mask(body: nn.Module, seen: Seen) -> Tensor | None:
    """1 at the tokens that count, of the states' shape without the last; None where all do, or the mask is no such."""
    given = inspect.signature(body.forward).bind_partial(*seen.args, **seen.kwargs).arguments
    config = getattr(body, "config", None)
    mask = given.get("decoder_attention_mask" if getattr(config, "is_encoder_decoder", False) else "attention_mask")
    if not isinstance(mask, Tensor):
        return None
    if mask.shape != seen.states.shape[:-1]:
        raise ValueError(
            f"lwf cannot tell padding by an attention_mask {tuple(mask.shape)} of states {tuple(seen.states.shape)}: "
            "give one number a token"
        )
    return (mask != 0).to(torch.promote_types(seen.states.dtype, torch.float32))

"""Logits where they are read: a causal language model's head, computed at the labelled positions alone.

With 262,144 words the head is half of a small model's step, and 8 × 1,024 tokens of its logits, in fp32 and with their
gradient, are 17 GB; of a prompt nobody reads them. Within `labelled_only(model)` a training pass is the model's own
code, all of it, on fewer rows: its decoder runs as always, and what lies above it (the head, a cap or a scale of its
logits, its loss, a router's) gets the states at labelled positions as one sequence of them. So no architecture is
named here. More positions than _CHUNK allows take several passes through the head, recomputed in the backward pass,
that only one of them is in memory at a time.

Loss and gradients are those of the whole, but for the order of sums.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IGNORED = -100  # the label of a token that no loss counts, torch's and transformers'
# Logits in memory at a time. In fp32, 128 MB; the loss needs two or three times that.
_CHUNK = 1 << 25
Places = tuple[Tensor, Tensor]  # row and column of each position that is read
# Arguments of a call whose loss, or logits, are not the plain ones.
_OTHERS = ("shift_labels", "logits_to_keep", "fused_lm_head", "skip_logits")


def causal_model(model: nn.Module) -> nn.Module:
    """The transformers model with a language-model head in `model`, which may wrap it (PEFT, DDP).

    ValueError where there is none.
    """
    from transformers import PreTrainedModel

    for module in model.modules():
        causal = isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None
        if causal and module.get_decoder() is not module:
            return module
    raise ValueError(f"{type(model).__name__} has no decoder with a language-model head over it")


def why_whole(model: nn.Module) -> str | None:
    """Why a training pass of the model computes all logits within `labelled_only`; None if it does not."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    try:
        causal: Any = causal_model(model)
    except ValueError as error:
        return str(error)
    forward = inspect.getmodule(type(causal).forward)
    if forward is None or not forward.__name__.startswith("transformers."):
        return f"{type(causal).__name__} has a forward pass from {getattr(forward, '__name__', 'elsewhere')}"
    if causal.loss_function is not ForCausalLMLoss:
        return f"{type(causal).__name__} has a loss of its own"
    if "forward" in vars(causal):
        return f"the forward pass of this {type(causal).__name__} was replaced"
    return None


@contextmanager
def labelled_only(model: nn.Module) -> Iterator[str | None]:
    """Within the block a training pass with labels computes logits at labelled positions alone, and returns none.

    model: any causal model of transformers, also within PEFT's or another wrapper. Yields the reason where all logits
    are computed as before (`why_whole`). In eval mode, without labels or under torch.compile nothing changes.
    """
    reason = why_whole(model)
    if reason is not None:
        yield reason
        return
    causal = causal_model(model)
    before = type(causal)
    if not hasattr(before, "slao_whole"):  # else it is so already
        causal.__class__ = _labelled(before)
    try:
        yield None
    finally:
        causal.__class__ = before


def _labelled(before: Any) -> Any:
    """The model's class with this forward pass: on a class, so that a replica or a copy runs on parts of its own."""
    whole = before.forward

    @functools.wraps(whole)  # whoever asks for its arguments (the Trainer does) gets the model's
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        plain = self.training and type(self) is labelled and not args and not torch.compiler.is_compiling()
        labels = kwargs.get("labels")
        plain = plain and kwargs.get("return_dict") is not False
        if labels is None or not plain or any(_is_given(kwargs.get(name)) for name in _OTHERS):
            return whole(self, *args, **kwargs)
        found = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)  # before the decoder: a GPU is not waited for later
        return _forward(self, whole, found, kwargs) if len(found[0]) else whole(self, **kwargs)

    labelled = type(
        before.__name__, (before,), {"forward": forward, "slao_whole": whole, "__module__": before.__module__}
    )
    return labelled


def _is_given(value: Any) -> bool:
    return isinstance(value, Tensor) or bool(value)


def _forward(causal: Any, whole: Callable[..., Any], found: Places, kwargs: dict[str, Any]) -> Any:
    """The model's output with its loss, from the states at `found`."""
    targets, passes = kwargs["labels"][found[0], found[1] + 1], _Passes(causal, whole, found)
    if kwargs.get("num_items_in_batch") is None and len(passes.parts) > 1:
        kwargs = {**kwargs, "num_items_in_batch": len(targets)}  # a mean over all of them, not over a part

    def labelled(part: slice) -> dict[str, Any]:
        return {**kwargs, "labels": targets[None, part], "shift_labels": targets[None, part]}

    def loss_of(states: Tensor, part: slice) -> Tensor:
        loss: Tensor = passes.above(states, labelled(part)).loss
        return loss

    try:
        output = passes.first(labelled(passes.parts[0]))
    except (ValueError, RuntimeError):
        if passes.ran:
            raise
        output = None
    if output is None or not passes.ran:  # its head is not fed by what get_decoder() names
        return whole(causal, **kwargs)
    loss = output.loss
    for part in passes.parts[1:]:
        loss = loss + checkpoint(loss_of, passes.states[part], part, use_reentrant=False)
    return type(output)(**{name: value for name, value in output.items() if name not in ("logits", "loss")}, loss=loss)


def log_probabilities(
    model: nn.Module, found: Places, places: Tensor, tokens: Tensor, **inputs: Any
) -> tuple[Tensor, Any]:
    """Of each of `tokens` (n) the log-probability, in fp32, of coming next after the position found[·][places[i]].

    found: row and column of each position that is read. inputs: of the model's forward pass, without labels. Also
    returns the decoder's own output, whose cache (with use_cache=True) a further call can go on from.
    """
    causal = causal_model(model)
    passes = _Passes(causal, type(causal).forward, found)
    result = torch.empty(len(tokens), dtype=torch.float32, device=tokens.device)
    for number, part in enumerate(passes.parts):
        output = passes.above(passes.states[part], inputs) if number else passes.first(inputs | passes.once)
        logp = output.logits[0].float().log_softmax(-1)
        here = ((places >= part.start) & (places < part.stop)).nonzero()[:, 0]
        result[here] = logp[places[here] - part.start, tokens[here]]
    return result, passes.outputs


class _Passes:
    """A pass through the decoder, and one through what lies above it for each of `parts` of the states at `found`."""

    def __init__(self, causal: Any, whole: Callable[..., Any], found: Places) -> None:
        self.causal, self.whole, self.found = causal, whole, found
        self.ran = False
        size = max(1, _CHUNK // causal.get_output_embeddings().weight.shape[0])
        self.parts = [slice(start, start + size) for start in range(0, len(found[0]), size)]
        self.once = (
            {"output_router_logits": False} if "output_router_logits" in inspect.signature(whole).parameters else {}
        )

    def first(self, kwargs: dict[str, Any]) -> Any:
        """The model's output on the first part; `outputs` are then its decoder's, `states` (n, width) those found."""

        def decode(decoder: nn.Module, *args: Any, **given: Any) -> Any:
            given.pop("shift_labels", None)
            self.outputs, self.ran = decoder(*args, **given), True
            self.states: Tensor = self.outputs.last_hidden_state[self.found]
            return dataclasses.replace(self.outputs, last_hidden_state=self.states[None, self.parts[0]])

        with _decoder(self.causal, decode):
            return self.whole(self.causal, **kwargs)

    def above(self, states: Tensor, kwargs: dict[str, Any]) -> Any:
        """The model's output on further states. What else its decoder returned counts once, with the first part."""
        made = type(self.outputs)(last_hidden_state=states[None])
        with _decoder(self.causal, lambda *_, **__: made):
            return self.whole(self.causal, **{**kwargs, **self.once})


@contextmanager
def _decoder(causal: Any, function: Callable[..., Any]) -> Iterator[None]:
    """Within the block the model calls function(decoder, ...) where it would call its decoder."""
    decoder = causal.get_decoder()
    path = next(name for name, module in causal.named_modules() if module is decoder)
    above, _, name = path.rpartition(".")
    place = vars(causal.get_submodule(above))  # looked at before nn.Module looks among its modules
    place[name] = _InPlaceOf(decoder, function)
    try:
        yield
    finally:
        del place[name]


class _InPlaceOf:
    """What is called in a module's place, and is that module in all else."""

    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        self._module, self._function = module, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(self._module, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

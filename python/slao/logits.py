"""Logits where they are read: a causal language model's head, computed at the labelled positions alone.

With 262,144 words the head is half of a small model's step, and 8 × 1,024 tokens of its logits, in fp32 and with their
gradient, are 17 GB; of a prompt nobody reads them. Within `labelled_only(model)` a training pass is the model's own
code, all of it, on fewer rows: its decoder runs as always, and what lies above it (the head, a cap or a scale of its
logits, its loss, a router's) gets the states at labelled positions as one sequence of them. So no architecture is
named here. More positions than _CHUNK allows take several passes through the head, recomputed in the backward pass,
that only one of them is in memory at a time.

Loss and gradients are those of the whole, but for the order of sums; a head that trains in 16 bits adds the parts of
its gradient in 16 bits.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

logger = logging.getLogger("slao")
IGNORED = -100  # the label of a token that no loss counts, torch's and transformers'
# Logits in memory at a time. In fp32, 128 MB; with the loss four times that.
_CHUNK = 1 << 25
Places = tuple[Tensor, Tensor]  # row and column of each position that is read
# Arguments of a call whose loss, or logits, are not the plain ones.
_OTHERS = ("shift_labels", "logits_to_keep", "fused_lm_head", "skip_logits")
_WRAPPERS = ("peft.", "torch.")  # who wraps a model and hands on what it returns
_blocks: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # how many are open for a model; a copy has none
_unfed: WeakSet[nn.Module] = WeakSet()  # whose head turned out to be fed by something else


def causal_model(model: nn.Module) -> nn.Module:
    """The transformers model with a language-model head over a decoder in `model`, which may wrap it (PEFT, DDP).

    ValueError where there is none.
    """
    return _path_to_causal(model)[-1]


def _path_to_causal(model: nn.Module) -> list[nn.Module]:
    from transformers import PreTrainedModel

    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None:
            decoder = module.get_decoder()
            plain = isinstance(decoder, PreTrainedModel) and decoder.get_output_embeddings() is None
            if plain and decoder is not module and not module.config.is_encoder_decoder:
                parts = name.split(".") if name else []
                return [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) + 1)]
    raise ValueError(f"{type(model).__name__} has no decoder with a language-model head over it")


def why_whole(model: nn.Module) -> str | None:
    """Why a training pass of the model computes all logits within `labelled_only`; None if it does not."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    try:
        *around, causal = _path_to_causal(model)
    except ValueError as error:
        return str(error)
    name = type(causal).__name__
    for module in around:
        if not type(module).__module__.startswith(_WRAPPERS):
            return f"{type(module).__name__} is around {name}, and may read its logits"
    if causal._forward_hooks:
        return f"a forward hook of {name} may read its logits"
    forward = inspect.getmodule(inspect.unwrap(type(causal).forward))
    if forward is None or not forward.__name__.startswith("transformers."):
        return f"{name} has a forward pass from {getattr(forward, '__name__', 'elsewhere')}"
    if causal.loss_function is not ForCausalLMLoss or not _calls_loss_function(type(causal)):
        return f"{name} has a loss of its own"
    if not getattr(causal.config, "return_dict", True):
        return f"{name} is set to return tuples"
    own = vars(causal).get("forward")
    if own is not None and not _is_labelled(inspect.unwrap(own, stop=_is_labelled)):  # accelerate's stay from before
        return f"the forward pass of this {name} was replaced"
    if causal in _unfed:
        return f"{name}'s head reads something else than what its get_decoder() returns"
    return None


def most_logits(model: nn.Module, positions: int) -> int:
    """How many logits a training pass holds at a time, at most, if every position is labelled."""
    causal: Any = causal_model(model)
    words: int = causal.config.get_text_config().vocab_size
    return positions * words if why_whole(model) else min(positions * words, max(words, _CHUNK))


def _calls_loss_function(kind: type) -> bool:
    """Whether its forward pass leaves the loss to `self.loss_function`, which takes labels that are shifted already."""
    for owner in kind.__mro__:
        if "forward" in vars(owner):
            names = inspect.unwrap(vars(owner)["forward"]).__code__.co_names
            if "CrossEntropyLoss" in names or "loss_function" in names:
                return "CrossEntropyLoss" not in names
            if "super" not in names:
                return False
    return False


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
    if not hasattr(before, "slao_whole"):  # else a block is around this one
        causal.__class__ = _labelled(before)
    _blocks[causal] = _blocks.get(causal, 0) + 1
    try:
        yield None
    finally:
        _blocks[causal] -= 1
        if not _blocks[causal] and "slao_whole" in vars(type(causal)):  # not where FSDP has made another class of it
            causal.__class__ = type(causal).__bases__[0]


def _labelled(before: Any) -> Any:
    """The model's class with this forward pass; copies and pickles of the model are of `before`."""
    whole = before.forward

    @functools.wraps(whole)  # whoever asks for its arguments (the Trainer does) gets the model's
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        plain = not torch.compiler.is_compiling() and self.training and not args and _blocks.get(self, 0) > 0
        plain = plain and kwargs.get("return_dict") is not False and self not in _unfed
        labels, read = kwargs.get("labels"), kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        if not plain or labels is None or read is None or any(_is_given(kwargs.get(name)) for name in _OTHERS):
            return whole(self, *args, **kwargs)
        found = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)  # before the decoder: a GPU is not waited for later
        if len(found[0]) == 0 or labels.shape != read.shape[:2]:
            return whole(self, **kwargs)
        return _forward(self, whole, found, kwargs)

    def reduced(self: Any, protocol: Any) -> Any:
        _, _, *state = before.__reduce_ex__(self, protocol)
        return (before.__new__, (before,), *state)

    forward.slao_labelled = True  # type: ignore[attr-defined]
    members = {"forward": forward, "slao_whole": whole, "__reduce_ex__": reduced, "__module__": before.__module__}
    labelled: Any = type(before.__name__, (before,), members)
    return labelled


def _is_labelled(function: Any) -> bool:
    return getattr(function, "slao_labelled", False)


def _is_given(value: Any) -> bool:
    return isinstance(value, Tensor) or bool(value)


def _forward(causal: Any, whole: Callable[..., Any], found: Places, kwargs: dict[str, Any]) -> Any:
    """The model's output with its loss, from the states at `found`."""
    targets, passes = kwargs["labels"][found[0], found[1] + 1], _Passes(causal, functools.partial(whole, causal), found)
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
    if output is None or not passes.ran:
        _unfed.add(causal)
        logger.warning("logits are computed at every position: %s", why_whole(causal))
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
    passes = _Passes(causal_model(model), model, found)
    result = torch.empty(len(tokens), dtype=torch.float32, device=tokens.device)
    for number, part in enumerate(passes.parts):
        output = passes.above(passes.states[part], inputs) if number else passes.first(inputs | passes.once)
        logp = output.logits[0].float().log_softmax(-1)
        here = ((places >= part.start) & (places < part.stop)).nonzero()[:, 0]
        result[here] = logp[places[here] - part.start, tokens[here]]
    return result, passes.outputs


class _Passes:
    """A pass through the decoder, and one through what lies above it for each of `parts` of the states at `found`.

    call: the model's forward pass, or that of what wraps it.
    """

    def __init__(self, causal: Any, call: Callable[..., Any], found: Places) -> None:
        self.causal, self.call, self.found = causal, call, found
        self.ran = False
        size = len(found[0]) if _gathers(causal) else max(1, _CHUNK // causal.config.get_text_config().vocab_size)
        self.parts = [slice(start, start + size) for start in range(0, len(found[0]), size)]
        router = "output_router_logits" in inspect.signature(type(causal).forward).parameters
        self.once = {"output_router_logits": False} if router else {}

    def first(self, kwargs: dict[str, Any]) -> Any:
        """The model's output on the first part; `outputs` are then its decoder's, `states` (n, width) those found."""

        def decode(decoder: nn.Module, *args: Any, **given: Any) -> Any:
            given.pop("shift_labels", None)
            self.outputs, self.ran = decoder(*args, **given), True
            self.states: Tensor = self.outputs.last_hidden_state[self.found]
            return dataclasses.replace(self.outputs, last_hidden_state=self.states[None, self.parts[0]])

        with _decoder(self.causal, decode):
            return self.call(**kwargs)

    def above(self, states: Tensor, kwargs: dict[str, Any]) -> Any:
        """The model's output on further states. What else its decoder returned counts once, with the first part."""
        made = type(self.outputs)(last_hidden_state=states[None])
        with _decoder(self.causal, lambda *_, **__: made):
            return self.call(**{**kwargs, **self.once})


def _gathers(causal: Any) -> bool:
    """Whether the head's weight is gathered from all ranks at each of its passes: then they must be alike many on all,
    whatever the rows of each, and there is one."""
    head = causal.get_output_embeddings()
    sharded = [kind.__name__ for kind in type(head).__mro__]
    return hasattr(head.weight, "ds_id") or "FSDPModule" in sharded or "FullyShardedDataParallel" in sharded


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

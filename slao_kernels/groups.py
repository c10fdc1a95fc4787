"""Layers that are given the very same x one after another (q/k/v, gate/up) and share one autograd node.

Nothing names them: patched layers watch their calls. Layers of one patched model that are called one after another
with one and the same tensor object, unchanged, in the same modes, become a group. From then on the first of them, the
leader, computes for all (ops/lora_linear/group.py) and leaves the others' outputs in a slot of its thread; each of
them collects its own, once, if it comes with that x, the modes and the parameters that the leader worked with.
Whatever else comes is computed alone: whether a result is right never depends on what was learned.

When a group starts and ends. Non-reentrant checkpointing runs a forward again within the backward and compares what
the two saved, so a forward and its recompute must do the same. Two things see to that:
- Only the leader's calls ask whether the group is on; collecting depends on the calls alone.
- It is switched, on after it was learned or off for good, outside of backward passes and only when no earlier call
  of its layers can be recomputed and compared any more. Such calls are those with gradients under saved-tensor
  hooks (reentrant checkpointing compares nothing). Each of them ties a token to its node and is over when the token
  has died with the graph, or when the layer's adapter has been written to since: an optimizer's step, which comes
  after the backward.
So a group works from the second forward on; with non-reentrant checkpointing from the first forward after a step, or
after the old graph was freed.

A group ends when an output that its leader left has not been collected by the next call of any watched layer in that
thread: another x, x changed in place, another mode, a sibling that is not called or has become ineligible (hooks), an
exception in between. Until that next call the output stays in memory, and the leader's node keeps the siblings'
parameters for its backward: autograd refuses it if one of them has been written to.
On a CPU the leader of a small x computes for itself alone, and so do the others then.
Nothing is learned, shared or ended while compiling, in inference mode (no versions there to tell whether x has
changed), with the backend "reference", with precision="adapter", with several active adapters, with a layer that
takes PEFT's forward (active dropout), and on devices other than CPUs and CUDA or ROCm GPUs: layers then run alone.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from . import dispatch
from .eligibility import _BASE_TYPES
from .grouping import Group, Key, Parts, Place, Run, is_watched
from .ops.lora_linear import apply_plain, group
from .plain import plain_call

_PLAIN = (nn.Parameter, Tensor)
# On a CPU, elements of x below which a leader leaves every layer to itself: keeping outputs for siblings costs about
# 10 µs of Python each. A training step of MiniLM on 2 x 16 tokens (2^13.6 elements) took 22.2 ms with groups and 21.0
# without, on 16 x 64 (2^18.6) 159.9 and 159.3; three 384 x 384 layers in bf16 on 1024 tokens 1.86 and 2.29.
_WORTH = 1 << 17
_hooks = torch._C._autograd._top_saved_tensors_default_hooks


class _Slot:
    """The outputs that one call of a leader left for its siblings."""

    __slots__ = ("group", "key", "left", "parts", "recomputed", "version", "versions", "x", "ys")

    def __init__(
        self,
        of: Group,
        x: Tensor,
        version: int,
        key: Key,
        ys: list[Tensor],
        parts: list[Parts],
        versions: list[int],
        recomputed: bool,
    ) -> None:
        self.group, self.x, self.version, self.key, self.parts = of, weakref.ref(x), version, key, parts
        self.ys: list[Tensor | None] = [None, *ys[1:]]
        self.left = len(ys) - 1
        self.versions = versions
        # A recompute that stops early leaves outputs behind; that says nothing about the group.
        self.recomputed = recomputed

    def take(self, layer: Any, place: Place, x: Tensor, version: int, key: Key | None, own: Parts) -> Tensor | None:
        """The layer's output, once, if it would compute the very same now."""
        i, of = place.index, self.group
        if of is not place.group or self.x() is not x or self.version != version or of.layers[i]() is not layer:
            return None
        y, used = self.ys[i], self.parts[i]
        if y is None or self.key != key or used.scaling != own.scaling or self.versions[i] != own.version():
            return None
        if used.stored is not own.stored or used.bias is not own.bias or used.A is not own.A or used.B is not own.B:
            return None
        self.ys[i] = None
        self.left -= 1
        return y


def _run(of: Group, layer: Any, x: Tensor, version: int, key: Key, own: Parts, recomputed: bool) -> list[Tensor] | None:
    """Every layer's output, the siblings' in this thread's slot too; None where not all can be computed now."""
    backend = dispatch.choose("lora_linear", x.device.type, layer.slao_options.backend)
    if backend == "reference":
        return None
    parts = [own]
    for sibling, place in zip(of.layers[1:], of.places[1:], strict=True):
        found = _read(sibling(), place, x)
        if found is None:
            return None
        parts.append(found)
    try:
        versions = [part.version() for part in parts]
    except RuntimeError:
        return None
    _, weights, biases, As, Bs, scalings, codes = map(list, zip(*parts, strict=True))
    ys = group.apply(x, weights, biases, As, Bs, scalings, backend, min(codes))
    _thread.slot = _Slot(of, x, version, key, ys, parts, versions, recomputed)
    return ys


class _Thread(threading.local):
    slot: _Slot | None = None
    run: Run | None = None


_thread = _Thread()


def call(layer: Any, x: Tensor, parts: Parts) -> Tensor:
    """The output of a watched layer that may take the fused forward, with one adapter and nothing dropped."""
    options, place, key = layer.slao_options, layer.slao_options.place, _key(x)
    version, slot = _version(x, parts), _thread.slot
    if slot is not None:
        y = slot.take(layer, place, x, version, key, parts)
        if y is None and not slot.recomputed:
            slot.group.end()
        if y is None or not slot.left:
            _thread.slot = None
        if y is not None:
            return y
    of, recomputed, ys = place.group, torch._C._current_graph_task_id() != -1, None
    if key is not None and version >= 0:
        if of is None:
            if not recomputed:
                _watch(layer, place, x, version, key)
        elif place.index == 0 and _pays(x) and of.layers[0]() is layer and of.is_on():
            ys = _run(of, layer, x, version, key, parts, recomputed)
    if ys is None:
        ys = [apply_plain(x, *parts[1:], "base", options.backend)]
    if not recomputed and _hooks(True) is not None:
        place.hold(ys, parts)
    return ys[0]


def _pays(x: Tensor) -> bool:
    """From x's size alone: a forward and its recompute get the same answer."""
    return x.numel() >= _WORTH or x.is_cuda


def _watch(layer: Any, place: Place, x: Tensor, version: int, key: Key) -> None:
    run = _thread.run
    if run is None or not run.joins(layer, place, x, version, key):
        _thread.run = Run(layer, place, x, version, key)
        if run is not None:
            run.finish()


def _key(x: Tensor) -> Key | None:
    """What must not change between a leader's call and its siblings'; None where layers run alone."""
    device, stream = x.device.type, 0
    if device == "cuda":
        stream = torch._C._cuda_getCurrentRawStream(x.get_device())
    elif device != "cpu":
        return None
    if torch.is_inference_mode_enabled():
        return None
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    # A sibling in another checkpointed region than its leader would find no leader when that region is recomputed.
    hooks = _hooks(True)
    return torch.is_grad_enabled(), dtype, hooks and hooks[0], stream


def _version(x: Tensor, parts: Parts) -> int:
    """x's version; -1 if x or a parameter is an inference tensor, which has none."""
    try:
        parts.version()
        return x._version
    except RuntimeError:
        return -1


def _read(layer: Any, place: Place, x: Tensor) -> Parts | None:
    """A sibling's parts, if the leader can compute with them.

    Whether the sibling takes the result is its own affair when it is called, after all of its checks: here is only
    what would make the leader fail. Through the dictionaries, because nn.Module's getattr takes a microsecond.
    """
    if not is_watched(layer, place):
        return None
    plain = plain_call(layer.__dict__, x)
    if plain is not None:
        return Parts(plain[0], *plain)
    if layer.disable_adapters or layer.merged_adapters:
        return None
    modules, device = layer._modules, x.device
    downs, ups = modules["lora_A"]._modules, modules["lora_B"]._modules
    adapters = [name for name in layer.active_adapters if name in downs]
    if len(adapters) != 1 or isinstance(layer.scaling[adapters[0]], Tensor):
        return None
    base, down, up = modules["base_layer"], downs[adapters[0]], ups[adapters[0]]
    if type(base) not in _BASE_TYPES or type(down) is not nn.Linear or type(up) is not nn.Linear:
        return None
    stored, bias, A, B = base.weight, base.bias, down.weight, up.weight
    for part in (stored, A, B) if bias is None else (stored, A, B, bias):
        if type(part) not in _PLAIN or part.device != device:
            return None
    dtype = stored.dtype
    if dtype != x.dtype and (not torch.is_autocast_enabled(device.type) or dtype == torch.float64):
        return None
    if stored.dim() != 2 or A.dim() != 2:
        return None
    weight = stored if type(base) is nn.Linear else stored.t()
    n, k = weight.shape
    if k != x.shape[-1] or A.shape[1] != k or B.shape != (n, A.shape[0]):
        return None
    if bias is not None and (bias.dtype != dtype or bias.shape != (n,)):
        return None
    return Parts(stored, weight, bias, A, B, float(layer.scaling[adapters[0]]))


def describe(model: nn.Module) -> list[list[str]]:
    """The groups that `model` has learned by now: the names of each one's layers, the leader's first."""
    found: dict[Group, dict[int, str]] = {}
    for name, module in model.named_modules():
        place: Place | None = getattr(module.__dict__.get("slao_options"), "place", None)
        of = None if place is None else place.group
        if place is not None and of is not None and not of.ended and of.layers[place.index]() is module:
            found.setdefault(of, {})[place.index] = name
    return [[names[i] for i in sorted(names)] for names in found.values()]

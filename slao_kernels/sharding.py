"""Whole tensors from sharded parameters, and back: FSDP2 and other DTensors, FSDP1, DeepSpeed's ZeRO-3.

What changes an adapter between tasks needs whole matrices. `whole` gathers them on every rank, lets all ranks compute
the same from the same, and hands each rank its shard of the result. Parameters that are whole on every rank (one
process, DDP, ZeRO-1 and -2, FSDP without sharding) are not copied: their pairs are the model's own memory.
Everything here is collective: every rank calls it, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from .adapters import LoraPair, Slot, find_pairs, live, slots

Result = TypeVar("Result")


def ranks() -> int:
    """How many processes work together; 1 without an initialised process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among `ranks()`, from 0."""
    return dist.get_rank() if ranks() > 1 else 0


def is_first() -> bool:
    """Whether this process is the one that writes files."""
    return rank() == 0


def agree(error: Exception | None) -> None:
    """Raise on every rank if any has an `error`: each its own, the others one that names rank and message.

    Otherwise a rank that raises leaves the others waiting in their next collective.
    """
    if ranks() > 1:
        told: list[Any] = [None] * ranks()
        mine = None if error is None else (f"{type(error).__name__}: {error}", isinstance(error, ValueError))
        dist.all_gather_object(told, mine)
        failed = [(rank, *one) for rank, one in enumerate(told) if one is not None]
        if failed and error is None:
            rank, message, bad_input = failed[0]
            kind = ValueError if bad_input else RuntimeError
            more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
            raise kind(f"rank {rank} of {ranks()}{more} failed: {message}")
    if error is not None:
        raise error


@contextmanager
def together() -> Iterator[None]:
    """An error within the block is raised on every rank, at the block's end. No collective may be inside."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    agree(error)


def on_first(function: Callable[[], Result]) -> Result:
    """What `function` returns on rank 0, on every rank (pickled); so with an error."""
    if ranks() == 1:
        return function()
    result: Any = None
    with together():
        if is_first():
            result = function()
    told = [result]
    dist.broadcast_object_list(told, src=0)
    return told[0]


def add_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Each tensor becomes its sum over the ranks, in place, alike on all. Every rank brings the same shapes."""
    if ranks() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP, FSDP1, DeepSpeed's engine and torch.compile: the one with PEFT's attributes."""
    while True:
        inner = model._modules.get("_orig_mod") or model._modules.get("module")
        if inner is None or not (hasattr(model, "_orig_mod") or _is_wrapper(model)):
            return model
        model = inner


def _is_wrapper(model: nn.Module) -> bool:
    wrappers = {"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"}
    return any(cls.__name__ in wrappers for cls in type(model).__mro__)


def is_plain(parameter: object) -> bool:
    """Whether a parameter is whole, here and now: no DTensor, no partition of ZeRO-3, not managed by FSDP1."""
    # FSDP1 marks what it manages, or keeps bare views of it instead of parameters.
    return (
        type(parameter) is nn.Parameter
        and not hasattr(parameter, "ds_id")
        and not getattr(parameter, "_fsdp_flattened", False)
    )


def is_sharded(model: nn.Module) -> bool:
    """Whether any parameter of the model is a DTensor, a partition of ZeRO-3, or managed by FSDP1."""
    return any(_is_partition(p) or getattr(p, "_fsdp_flattened", False) for p in model.parameters())


def _is_partition(value: Tensor) -> bool:
    """Whether the tensor itself is a shard, rather than a unit of FSDP1 around it."""
    if hasattr(value, "ds_id"):
        return True
    if type(value) in (nn.Parameter, Tensor) or not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


@contextmanager
def whole(
    model: nn.Module, adapter: str = "default", known: Sequence[LoraPair] = (), *, write: bool = True
) -> Iterator[tuple[list[LoraPair], dict[str, str]]]:
    """Within the block, the adapter's pairs and what was left out (`find_pairs`), with whole A and B on every rank.

    They are the model's own memory where that is whole already, else copies; with `write` these go back into the
    shards at the block's end. An error in the block is raised on every rank and nothing is written into shards.
    known: pairs found before, which saves the walk as long as they are still the model's and plain.
    """
    pairs, left_out, shards = list(known), dict[str, str](), None
    if not pairs or not all(live(pair, adapter) is pair and all(map(is_plain, pair.parameters)) for pair in pairs):
        shards = Shards(model)
        pairs, left_out = find_pairs(unwrap(model), adapter, shards.gather)
    with together():
        yield pairs, left_out
    if write and shards is not None:
        shards.write(pairs, adapter)


def write(model: nn.Module, pairs: Sequence[LoraPair], adapter: str = "default") -> None:
    """Whole pairs, the same on every rank, into the parameters of their layers, whatever shards those are."""
    Shards(model).write(pairs, adapter)


def live_pairs(pairs: Sequence[LoraPair], adapter: str) -> list[LoraPair]:
    """The pairs with the parameters that the layers have now, sharded or not."""
    return [live(pair, adapter) for pair in pairs]


class Shards:
    """A model whose parameters may be sharded, each in its own way. Not kept: a model is wrapped late."""

    def __init__(self, model: nn.Module) -> None:
        self._units: dict[int, nn.Module] = {}  # id of a module -> the FSDP1 unit that manages its own parameters
        if dist.is_available() and dist.is_initialized():
            _reshard(model)
            self._find_units(model, None)

    def gather(self, places: Sequence[Slot]) -> list[Tensor]:
        """The parameters at `places`, whole: themselves if they are, else copies without a graph."""
        found: list[Any] = [None] * len(places)
        for unit, indices in self._by_unit(places):
            with _opened(unit, [getattr(*places[i]) for i in indices], write=False):
                for i in indices:
                    value = getattr(*places[i])
                    found[i] = _full(value) if unit is not None or _is_partition(value) else value
        return found

    def scatter(self, places: Sequence[Slot], tensors: Sequence[Tensor]) -> None:
        """Whole tensors, the same on every rank, into the shards at `places`."""
        with torch.no_grad():
            for unit, indices in self._by_unit(places):
                with _opened(unit, [getattr(*places[i]) for i in indices], write=True):
                    for i in indices:
                        value = getattr(*places[i])
                        if value is not tensors[i]:
                            _put(value.detach(), tensors[i])

    def write(self, pairs: Sequence[LoraPair], adapter: str) -> None:
        """Whole pairs into the shards of the layers that they belong to."""
        both = [slots(pair.layer, adapter) for pair in pairs]
        places = [slot for two in both if not isinstance(two, str) for slot in two]
        self.scatter(places, [tensor for pair in pairs for tensor in pair.parameters])

    def _by_unit(self, places: Sequence[Slot]) -> list[tuple[Any, list[int]]]:
        """FSDP1's units one after another, so that no more than one is ever whole; then all that is in none."""
        by_unit: dict[int, tuple[Any, list[int]]] = {}
        for i, (module, _) in enumerate(places):
            unit = self._units.get(id(module))
            by_unit.setdefault(id(unit), (unit, []))[1].append(i)
        return list(by_unit.values())

    def _find_units(self, module: nn.Module, unit: nn.Module | None) -> None:
        from torch.distributed.fsdp import FullyShardedDataParallel

        if isinstance(module, FullyShardedDataParallel):
            if unit is None and getattr(module, "_is_root", False) is None:
                # FSDP takes the first unit that works for the root of all: that has to be the outermost one.
                with FullyShardedDataParallel.summon_full_params(module, recurse=False, writeback=False):
                    pass
            unit = module
        if unit is not None:
            self._units[id(module)] = unit
        for child in module.children():
            self._find_units(child, unit)


def _reshard(model: nn.Module) -> None:
    """FSDP2 keeps the root's parameters whole after a forward: a shard written then would not be seen by the next."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def _opened(unit: nn.Module | None, values: list[Any], write: bool) -> Iterator[None]:
    """Within the block the parameters of one FSDP1 unit, or those of ZeRO-3 among `values`, are whole."""
    partitioned = [value for value in values if hasattr(value, "ds_id")]
    if unit is not None:
        from torch.distributed.fsdp import FullyShardedDataParallel

        with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=write):
            yield
    elif partitioned:
        import deepspeed

        with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if write else None):
            yield
    else:
        yield


def _full(value: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    value = value.detach()
    return (value.full_tensor() if isinstance(value, DTensor) else value).clone()


def _put(value: Tensor, tensor: Tensor) -> None:
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(value, DTensor):
        # Every rank has the whole: it cuts out its own shard, nothing is sent.
        shard = distribute_tensor(tensor, value.device_mesh, value.placements, src_data_rank=None)
        value.to_local().copy_(shard.to_local())
    else:
        value.copy_(tensor)

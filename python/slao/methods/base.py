"""What every continual-learning method offers: begin a task, add to its loss, end it, show the merged model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from slao_kernels import deepspeed_masters, inventory, sharding
from slao_kernels.adapters import LoraPair
from slao_kernels.ops.checks import not_finite

from .. import checkpoint
from ..export import save_adapter
from . import showing, stored
from .beside import Beside
from .showing import Weights

if TYPE_CHECKING:
    from ..merging.cuts import CutAdapter

logger = logging.getLogger("slao")

STATE_FILE = "slao_state.safetensors"


class Method:
    """Base of all methods; alone it is the bookkeeping around one LoRA.

    model: any module with PEFT LoRA layers (patched or not), sharded or wrapped before or later. With several
    processes every rank makes the same calls; an error on one rank is raised on all, and rank 0 alone writes files.
    adapter: the adapter to train and merge; it has to be active from begin_task to end_task, and for merged().
    beside: what becomes of the heads, biases and tokens that it trains beside A and B: "keep" (the last task's),
    "merge" (averaged as B is; SLAO and IncSLAO alone) or "freeze" (trained in the first task alone); see `Beside`.
    pairs: what a method works on, whole within its own hooks; elsewhere the model's own parameters, perhaps shards.
    task: index of the running task, or of the last one, from 1 (0 before the first). names: of all tasks begun.
    lambdas: per finished task the λ it was merged with (a number, or one a layer); 1.0 where nothing is merged.
    cosines: per finished task the cosine, layer by layer in the order of `pairs`, of its task vector B A with that of
    the merge of the tasks before; None where the method had no reason to compute it. Saved and loaded.
    Raises ValueError when the model has no such adapter, or has parts of it that the method cannot treat.
    """

    name: ClassVar[str] = ""
    together: ClassVar[bool] = False  # whether `slao.train` makes one task of all rows (joint training)
    # Whether `slao.train` and `SlaoCallback` call `observe` with the task's batches before begin_task and end_task.
    observes: ClassVar[bool] = False
    adds_parameters: ClassVar[bool] = False  # whether begin_task makes some, which an older optimizer leaves out
    averages: ClassVar[bool] = False  # whether its λ is that of an average, which `beside="merge"` needs

    def __init__(self, model: nn.Module, *, adapter: str = "default", beside: str = "keep") -> None:
        self.model = model
        self.adapter = adapter
        if beside == "merge" and not self.averages:
            raise ValueError(f"beside='merge' averages with SLAO's λ, and {self.name} has none: use 'keep' or 'freeze'")
        self.beside = Beside(model, adapter, beside)
        self.pairs: list[LoraPair] = []
        self.names: list[str] = []
        self.lambdas: list[float | list[float]] = []
        self.cosines: list[list[float] | None] = []
        self._swapped = False
        with self._whole(write=False):
            self._check()

    @contextmanager
    def _whole(self, write: bool = True) -> Iterator[None]:
        """Within the block `self.pairs` have whole A and B on every rank; what is written there stays (if `write`)."""
        before = self.pairs
        names = [pair.name for pair in before]
        try:
            with sharding.whole(self.model, self.adapter, before, write=write) as (pairs, left_out):
                if left_out:
                    what = "; ".join(f"{layer}: {why}" for layer, why in list(left_out.items())[:8])
                    raise ValueError(f"{self.name or type(self).__name__} cannot treat {len(left_out)} layers: {what}")
                if names and names != [pair.name for pair in pairs]:
                    raise ValueError("the model's LoRA layers are others than when the method was made; make a new one")
                self.pairs = pairs
                yield
        except BaseException:
            self.pairs = before
            raise
        self.pairs = sharding.live_pairs(pairs, self.adapter)
        if write:
            deepspeed_masters.write_through(parameter for pair in self.pairs for parameter in pair.layer.parameters())

    @property
    def task(self) -> int:
        return len(self.names)

    @property
    def in_task(self) -> bool:
        """Whether a task was begun and not yet ended."""
        return len(self.names) > len(self.lambdas)

    def begin_task(self, name: str) -> None:
        """Prepare the adapter for training on the task `name`."""
        with sharding.together():
            if self.in_task:
                raise ValueError(
                    f"task {self.names[-1]!r} is still running; call end_task() before begin_task({name!r})"
                )
            self._ask("run", "begin_task")
            if self._is_frozen():
                raise ValueError(
                    f"begin_task(): no A or B of adapter {self.adapter!r} requires a gradient, so none trains: "
                    f"call the PeftModel's set_requires_grad({self.adapter!r}), or load it with is_trainable=True"
                )
            deepspeed_masters.refuse_unreachable(self.model)
            self.beside.find()
        with self._whole():
            if self.names and sharding.ranks() > 1:
                # A rank that refuses on its own would leave the others with an adapter that is re-based already.
                with sharding.together():
                    self._refuse_broken_weights()
            self._follow()
            self._begin(self.task + 1)
            self._settle()
        self.names.append(str(name))
        self.beside.begin(self.task)

    def end_task(self) -> None:
        """Take what was trained into the method's state. ValueError, with nothing changed, if training diverged."""
        with sharding.together():
            if not self.in_task:
                raise ValueError("no task is running; call begin_task(name) first")
            self._ask("run", "end_task")
        if self._is_frozen():
            logger.warning("adapter %r was frozen while the task ran: what it was then is merged", self.adapter)
        live = self.beside.live()
        with self._whole(write=False):
            with sharding.together():
                self._refuse_broken_weights(live)
            self._follow()
            lam = self._end(self.task)
            self._settle()
            cosines = self._new_to_merged()
        self.beside.end(self.task, lam)
        self.lambdas.append(lam)
        self.cosines.append(cosines)

    def observe(self, batches: Iterable[dict[str, Tensor]]) -> None:
        """Look at the task's batches (as the model takes them, on its device; on several ranks each its own)."""

    def penalty(self) -> Tensor | None:
        """A scalar to add to the loss of every training step, or None.

        Build it from `pair.parameters`: `pair.A` and `pair.B` carry no graph.
        """
        return None

    @contextmanager
    def merged(self, *, fold: bool = False) -> Iterator[nn.Module]:
        """Within the block the model computes with the merged weights of all finished tasks.

        Storages are swapped, nothing is copied; the trained weights are back after any exit. While a task runs, the
        merge is that of the tasks before it. Do not train inside the block; what is merged into the base there, and
        not by merge_and_unload, is taken out again at its end.
        fold: the merge is folded into the base weights too, for long evaluations and generation at the base model's own
        speed; they get their bits back (`slao_kernels.unfold_`). It takes a pass over the base at either end, up to two
        bits a weight, and copies of A and B. ValueError, with nothing changed, for layers that cannot be folded: those
        over quantised, sharded or tied bases, embeddings and convolutions.
        """
        self._ask("run", "merged")
        with self._swapped_in(self._merged_weights):
            try:
                with self._folded() if fold else nullcontext():
                    yield self.model
            finally:
                if inventory.unmerge(sharding.unwrap(self.model), self.pairs):
                    logger.warning("merge_adapter() inside merged(): unmerged at the block's end, where the weights go")

    def _folded(self) -> AbstractContextManager[None]:
        with sharding.together():
            if not self._is_plain():
                raise ValueError("merged(fold=True): the adapter is sharded; use merged()")
        return showing.folded(sharding.unwrap(self.model), self.pairs, self.adapter)

    @contextmanager
    def _swapped_in(self, weights: Callable[[], Weights]) -> Iterator[None]:
        """Within the block the pairs' parameters are what `weights` returns."""
        self._swapped = True
        try:
            with self._shown(weights), self.beside.shown():
                yield
        finally:
            self._swapped = False

    def _shown(self, weights: Callable[[], Weights]) -> AbstractContextManager[None]:
        if self._is_plain():
            self._follow()
            return showing.swapped(self.pairs, weights)
        with self._whole(write=False):
            self._follow()
            trained = self.pairs
            shown = [pair.with_weights(*two) for pair, two in zip(trained, weights(), strict=True)]
        return showing.overwritten(self.model, trained, shown, self.adapter)

    def _is_plain(self) -> bool:
        self.pairs = sharding.live_pairs(self.pairs, self.adapter)
        return all(sharding.is_plain(parameter) for pair in self.pairs for parameter in pair.parameters)

    def _is_frozen(self) -> bool:
        """Whether none of the pairs trains, as after PEFT's `set_requires_grad(adapter, False)`; shards do not say."""
        return self._is_plain() and not any(p.requires_grad for pair in self.pairs for p in pair.parameters)

    def save_pretrained(
        self, folder: str | Path, *, rank: int | None = None, keep: float | None = None
    ) -> CutAdapter | None:
        """The merged adapter as a plain PEFT folder, which loads without this library.

        rank, keep: cut every layer to that rank, or to the one that holds this part of its squared norm, as
        `slao.merging.compress.compress_adapter` does: for methods that keep a pair a task, whose export has rank T · r.
        Returns what each layer lost (None on ranks that do not write, and where nothing was to be cut).
        """
        from ..merging.cuts import Limit

        limit = None if rank is None and keep is None else Limit(rank, keep)
        with sharding.together():
            self._ask("read", "save_pretrained")
        stacked = self._stacked()  # of the shapes before they are swapped
        if stacked != 1 and not self._is_plain():
            raise ValueError(
                f"{self.name} keeps {stacked} pairs a layer, for which shards have no room; export from one process"
            )
        with self._swapped_in(self._exported_weights):
            return save_adapter(self.model, folder, self.adapter, stacked=stacked, limit=limit)

    def save(self, folder: str | Path, extra: dict[str, Any] | None = None) -> None:
        """The full state (adapter as trained, merge, history) and JSON-able `extra` into `folder`, atomically."""
        with sharding.together():
            self._ask("read", "save")
        beside = self.beside.state()
        with self._whole(write=False):
            tensors = self._live_tensors() | beside
            meta = {**self._identity(), "adapter": self.adapter, "base": self._base_mark()}
            meta |= {"names": self.names, "lambdas": self.lambdas, "cosines": self.cosines, "extra": extra or {}}
            if sharding.is_first():
                checkpoint.write_state(Path(folder) / STATE_FILE, tensors | self._state(), meta)

    def state_bytes(self) -> int:
        """Bytes of what `save` keeps: the adapter as trained and everything the method needs for the next task."""
        beside = self.beside.state()
        with self._whole(write=False):
            return sum(tensor.nbytes for tensor in (self._live_tensors() | self._state() | beside).values())

    def load(self, folder: str | Path) -> dict[str, Any]:
        """Continue from `save`: everything is compared first, then written. Returns `extra`.

        Rank 0 reads the file for all. Raises ValueError, with nothing changed, when it is absent or damaged, or was
        saved by another method, with other options or scalings (lora_alpha, use_rslora), or for other layers, shapes
        or dtypes, or where one of state and model trains something beside A and B that the other does not.
        """
        path = Path(folder) / STATE_FILE
        with sharding.together():
            self._ask("write", "load")
            deepspeed_masters.refuse_unreachable(self.model)
            self.beside.find()
        tensors, meta = sharding.on_first(lambda: checkpoint.read_state(path))
        here = self.beside.live()
        with sharding.together():
            stored.compare(path, meta, self._identity())
            beside = self.beside.taken_from(path, tensors, here)
        with self._whole():
            live = self._live_tensors()
            with sharding.together():
                rest = stored.rest(path, tensors, live, {pair.name for pair in self.pairs})
                stored.compare_scalings(path, meta, self._identity(), self._base_mark())
                self._load_state(rest)
            with torch.no_grad():
                for key, value in live.items():
                    value.copy_(tensors[key])
        self.names, self.lambdas = list(meta["names"]), list(meta["lambdas"])
        self.beside.load(beside, self.task, self.in_task)
        deepspeed_masters.write_through(part.tensor for part in self.beside.parts)
        self.cosines = list(meta.get("cosines", [None] * len(self.lambdas)))  # absent from older states
        return dict(meta["extra"])

    # What a method defines. `task` counts from 1.

    def _check(self) -> None:
        """Once, when the method is made: ValueError for pairs that it cannot treat."""

    def _begin(self, task: int) -> None:
        """Before training."""

    def _end(self, task: int) -> float | list[float]:
        """After training; returns the task's λ."""
        return 1.0

    def _new_to_merged(self) -> list[float] | None:
        """After `_end`: the task's entry of `cosines`."""
        return None

    def _merged_weights(self) -> Weights:
        """Per pair the merged (A, B); None where the trained one is it."""
        return [(None, None)] * len(self.pairs)

    def _exported_weights(self) -> Weights:
        """Per pair the (A, B) of the plain adapter that `save_pretrained` writes; None where the trained one is it."""
        return self._merged_weights()

    def _stacked(self) -> int:
        """How many times the rank of the trained pairs those of `_exported_weights` have."""
        return 1

    def _live_tensors(self) -> dict[str, Tensor]:
        """What training changes, named `<layer>.<key>`: saved as it is, and loaded in place."""
        return {f"{pair.name}.{key}": value for pair in self.pairs for key, value in (("A", pair.A), ("B", pair.B))}

    def _options(self) -> dict[str, Any]:
        """What a saved state must agree on to be loaded, JSON-able."""
        return {}

    def _identity(self) -> dict[str, Any]:
        """What a saved state is of: the method, its options (without the default of `beside`), the scalings."""
        options = self._options() | ({} if self.beside.how == "keep" else {"beside": self.beside.how})
        scalings: list[Any] = [pair.layer.scaling for pair in self.pairs]
        named = {pair.name: float(by[self.adapter]) for pair, by in zip(self.pairs, scalings, strict=True)}
        return {"method": self.name, "options": options, "scalings": named}

    def _base_mark(self) -> str | None:
        configs = getattr(sharding.unwrap(self.model), "peft_config", {})
        return inventory.base_mark(self.pairs, configs.get(self.adapter))

    def _state(self) -> dict[str, Tensor]:
        """Further tensors to save, named `<layer>.<key>`: the method's own, no copies."""
        return {}

    def _load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take them back; ValueError before anything is changed if they do not fit."""

    def _settle(self) -> None:
        """What is kept lies in memory as `load` would put it there, so that both go on with the same bits."""
        for tensor in self._state().values():
            tensor.data = checkpoint.settled(tensor)

    def _follow(self) -> None:
        """What is kept goes where its layer is: the model may have moved since (to(), a Trainer)."""
        devices = {pair.name: pair.parameters[0].device for pair in self.pairs}
        for key, tensor in self._state().items():
            device = devices[key.rpartition(".")[0]]
            if tensor.device != device:
                tensor.data = tensor.data.to(device)

    def _ask(self, use: str, what: str) -> None:
        """ValueError where A and B may not be used so now (`inventory.why_not_now`), or stand for the merge."""
        if self._swapped:
            raise ValueError(f"{what}() was called inside merged(); leave the block first")
        inventory.refuse_now(f"{what}()", sharding.unwrap(self.model), self.pairs, self.adapter, use)

    def _refuse_broken_weights(self, beside: dict[str, Tensor] | None = None) -> None:
        weights = [(tensor, key.rpartition(".")[0]) for key, tensor in self._live_tensors().items()]
        weights += [(tensor, name) for name, tensor in (beside or {}).items() if tensor.is_floating_point()]
        # The one host sync of a task's end.
        broken = list(dict.fromkeys(weights[index][1] for index in not_finite([tensor for tensor, _ in weights])))
        if broken:
            raise ValueError(
                f"task {self.names[-1]!r} diverged: NaN or infinite adapter weights in {len(broken)} layers "
                f"({', '.join(broken[:8])}); load the state before it, and train again with a lower learning rate"
            )

"""SLAO, "Merge before Forget" (arXiv 2512.23017): one LoRA, re-based before each task and merged after it."""

from __future__ import annotations

import logging
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from slao_kernels import orthogonal_init_, scaled_merge_

from ..schedules import MergeStats, Schedule, lambdas_of, make_schedule, schedule_name
from .base import Method
from .extended import fresh, refuse_shards
from .products import average, merged_from
from .showing import Weights

logger = logging.getLogger("slao")

INITS = ("last_ft", "merged", "random", "random_A")
MERGES = ("B", "A", "AB", "product")


class SLAO(Method):
    """Algorithm 1 of the paper with its ablations as options.

    Before task i >= 2: A <- an orthonormal basis of the last A's row space (Qᵀ of Aᵀ = QR with diag(R) > 0), B stays
    the last fine-tuned B. After it: B_merge <- B_merge + λ(i) (B - B_merge), A_merge <- A. Answers come from
    B_merge · A_merge. The first task is ordinary LoRA.

    schedule: "inv_sqrt" (1/√i, the paper's), "inverse", "adaptive" (by the cosine of each layer), a constant in
    [0, 1], or f(i, MergeStats) -> λ or one a layer.
    init: what a task starts from: "last_ft" (the paper's), "merged", "random" (fresh A, B = 0: ordinary LoRA's
    start), or "random_A" (fresh A, last fine-tuned B).
    orthogonal: re-base A. merge: the factors that are averaged, "B" (the paper's), "A" or "AB"; the other is replaced.
    Or "product": B A itself, M <- M + λ(i) (B A − M), kept to the rank of `merged_pairs` pairs by QR of the factors;
    not the paper's: bench/experiments.md has what it gains.
    preserve: start from B Rᵀ instead of B, so that re-basing A leaves B A as it was. seed: of a fresh A.
    keep_cosines: fill `cosines` at the end of every task from the second on, before it is merged; without it only where
    the schedule asked for `MergeStats.cosine()` anyway.
    State: besides the live A and B one further B a layer (and A, while a task runs), whatever the number of tasks; with
    "product" `merged_pairs` pairs.
    Raises ValueError for unknown options, where r > n forbids orthonormal rows, and with "product" for convolutions.
    """

    name = "slao"
    averages = True

    def __init__(
        self,
        model: nn.Module,
        schedule: str | float | Schedule = "inv_sqrt",
        init: str = "last_ft",
        orthogonal: bool = True,
        merge: str = "B",
        preserve: bool = False,
        adapter: str = "default",
        seed: int = 0,
        keep_cosines: bool = False,
        beside: str = "keep",
        merged_pairs: int = 2,
    ) -> None:
        if init not in INITS:
            raise ValueError(f"unknown init {init!r}; choose one of {', '.join(INITS)}")
        if merge not in MERGES:
            raise ValueError(f"unknown merge {merge!r}; choose one of {', '.join(MERGES)}")
        if preserve and not orthogonal:
            raise ValueError("preserve=True compensates the orthogonal re-basing; it needs orthogonal=True")
        if merge == "product" and init == "merged":
            raise ValueError("init='merged' starts from a merged A and B, and merge='product' has none of their rank")
        if merged_pairs < 1:
            raise ValueError(f"merged_pairs must be at least 1, not {merged_pairs}")
        self.schedule, self.merged_pairs = make_schedule(schedule), merged_pairs
        self.init, self.orthogonal, self.merge, self.preserve, self.seed = init, orthogonal, merge, preserve, int(seed)
        self.keep_cosines = keep_cosines
        self._schedule_name = schedule_name(schedule)
        # The merged A and B per layer; None where the trained factor is the merged one.
        self._merged: dict[str, list[Tensor] | None] = {"A": None, "B": None}
        # The memory of the copy that a running task needs, kept between tasks: fresh pages cost more than the copy.
        self._spare: dict[str, list[Tensor]] = {}
        self._measured: list[float] | None = None
        super().__init__(model, adapter=adapter, beside=beside)

    def _check(self) -> None:
        own = [(pair.name, *pair.split("A", pair.A)[0].shape) for pair in self.pairs]
        wide = [f"{name} {(r, n)}" for name, r, n in own if r > n]
        if self.orthogonal and wide:
            raise ValueError(
                f"A (r, n) with r > n has no orthonormal rows: {', '.join(wide[:8])}; "
                "lower r there (rank_pattern), leave these layers out of target_modules, or pass orthogonal=False"
            )
        convolutions = [pair.name for pair in self.pairs if any(part.dim() != 2 for part in pair.parameters)]
        if self.merge == "product" and convolutions:
            raise ValueError(f"merge='product' cannot treat layers that are no matrices: {', '.join(convolutions[:8])}")

    def _live(self, factor: str) -> list[Tensor]:
        return [getattr(pair, factor).detach() for pair in self.pairs]

    def _split(self, factor: str, tensors: list[Tensor]) -> list[Tensor]:
        """Every expert's own matrix, of tensors a layer."""
        return [one for pair, tensor in zip(self.pairs, tensors, strict=True) for one in pair.split(factor, tensor)]

    def _names(self) -> list[str]:
        return [name for pair in self.pairs for name in pair.names]

    def _merged_or_live(self, factor: str) -> list[Tensor]:
        merged = self._merged[factor]
        return self._live(factor) if merged is None else merged

    def _begin(self, task: int) -> None:
        if self.merge == "product":
            refuse_shards(self)  # which have no room for the merge's rank
        if task == 1:
            return
        # Training is about to change the factors that so far stood for their own merge. Re-basing A keeps it itself.
        kept = {factor: self._room(factor) for factor in "AB" if self._merged[factor] is None}
        As, Bs = self._live("A"), self._live("B")
        in_passing = kept.get("A") if self.orthogonal and self.init == "last_ft" else None
        for factor, copies in kept.items():
            if copies is not in_passing:
                scaled_merge_(copies, self._live(factor), 1.0)
        if self.init == "merged":
            scaled_merge_(As + Bs, self._merged_or_live("A") + self._merged_or_live("B"), 1.0)
        elif self.init != "last_ft":
            for pair, A, B in zip(self.pairs, As, Bs, strict=True):
                A.copy_(fresh(A, f"{self.seed}/{task}/{pair.name}"))
                if self.init == "random":
                    B.zero_()
        if self.orthogonal:
            self._rebase(As, Bs, in_passing)
        self._merged |= kept

    def _room(self, factor: str) -> list[Tensor]:
        """Memory for a copy of the live weights: that which the same copy took a task ago."""
        live = self._live(factor)
        spare, self._spare = self._spare, {}
        room = spare.get(factor)
        if room is None or any(not _alike(*two) for two in zip(room, live, strict=True)):
            return [torch.empty_like(tensor) for tensor in live]
        return room

    def _rebase(self, As: list[Tensor], Bs: list[Tensor], keep: list[Tensor] | None) -> None:
        try:
            kept = None if keep is None else self._split("A", keep)
            report = orthogonal_init_(self._split("A", As), return_r=self.preserve, keep=kept)
            report.check()
        except ValueError:  # nothing is written; the layers' names say more than their numbers
            self._refuse_broken_weights()
            raise
        if report.deficient:
            every = self._names()
            names = [every[index] for index in report.deficient]
            logger.warning(
                "A has linearly dependent rows in %d layers, completed to an orthonormal set: %s",
                len(names),
                ", ".join(names[:8]),
            )
        if self.preserve:
            for B, R in zip(self._split("B", Bs), report.r or [], strict=True):
                B.copy_(B.to(R.dtype) @ R.T)  # A = Rᵀ Qᵀ, so B A = (B Rᵀ) Qᵀ

    def _end(self, task: int) -> float | list[float]:
        averaged = [factor for factor in "AB" if factor in self.merge]
        self._measured = None
        if task == 1:
            for factor in "AB" if self.merge == "product" else averaged:
                self._merged[factor] = [tensor.clone() for tensor in self._live(factor)]
            return 1.0
        stats = self._stats(task)
        lam, each = lambdas_of(self.schedule, stats)
        if self.keep_cosines or stats.seen:
            self._measured = stats.cosine()
        if self.merge == "product":
            old, new = (list(zip(get("A"), get("B"), strict=True)) for get in (self._merged_or_live, self._live))
            found = average(self.pairs, old, new, each, self.merged_pairs)
            self._merged = {"A": [A for A, _ in found], "B": [B for _, B in found]}
            return lam
        targets, sources, factors = [], [], []
        for factor in averaged:
            rest = iter(each)
            for pair, merged, live in zip(self.pairs, self._merged[factor] or [], self._live(factor), strict=True):
                own = list(islice(rest, pair.experts))
                if len(set(own)) == 1:
                    targets.append(merged)
                    sources.append(live)
                    factors.append(own[0])
                else:  # their columns of B lie between one another
                    _merge_experts(factor, merged, live, own)
        scaled_merge_(targets, sources, factors)
        for factor in "AB":
            if factor not in averaged and (merged := self._merged[factor]) is not None:
                self._merged[factor], self._spare = None, {factor: merged}
        return lam

    def _new_to_merged(self) -> list[float] | None:
        return self._measured

    def _stats(self, task: int) -> MergeStats:
        return MergeStats(
            task,
            self.names[-1],
            self._names(),
            self._split("A", self._live("A")),
            self._split("B", self._live("B")),
            self._split("A", self._merged_or_live("A")),
            self._split("B", self._merged_or_live("B")),
            list(self.lambdas),
        )

    def _merged_weights(self) -> Weights:
        nothing: list[Tensor | None] = [None] * len(self.pairs)
        return list(zip(self._merged["A"] or nothing, self._merged["B"] or nothing, strict=True))

    def _stacked(self) -> int:
        merged = self._merged["A"]
        return 1 if self.merge != "product" or merged is None else len(merged[0]) // len(self.pairs[0].A)

    def _options(self) -> dict[str, Any]:
        return {
            **({"merged_pairs": self.merged_pairs} if self.merge == "product" else {}),
            "schedule": self._schedule_name,
            "init": self.init,
            "orthogonal": self.orthogonal,
            "merge": self.merge,
            "preserve": self.preserve,
            "seed": self.seed,
        }

    def _state(self) -> dict[str, Tensor]:
        return {
            f"{pair.name}.{factor}_merged": tensor
            for factor, tensors in self._merged.items()
            for pair, tensor in zip(self.pairs, tensors or [], strict=False)
        }

    def _load_state(self, tensors: dict[str, Tensor]) -> None:
        if self.merge == "product":
            both = merged_from(self.pairs, tensors, self.merged_pairs)
            self._merged = {factor: [two[side] for two in both] or None for side, factor in enumerate("AB")}
            return
        loaded: dict[str, list[Tensor] | None] = {}
        for factor in "AB":
            found = [tensors.get(f"{pair.name}.{factor}_merged") for pair in self.pairs]
            live = self._live(factor)
            if all(tensor is None for tensor in found):
                loaded[factor] = None
                continue
            for pair, tensor, now in zip(self.pairs, found, live, strict=True):
                # Its dtype is the model's of when it was merged; half() since then leaves it as exact as it was.
                if tensor is None or tensor.shape != now.shape or not tensor.is_floating_point():
                    raise ValueError(f"the saved merge of {pair.name} does not fit its {factor} {tuple(now.shape)}")
            loaded[factor] = [
                tensor.to(now.device) for tensor, now in zip(found, live, strict=True) if tensor is not None
            ]
        self._merged = loaded


def _merge_experts(factor: str, merged: Tensor, live: Tensor, lam: list[float]) -> None:
    """`scaled_merge_` with a λ for each expert of A or B as PEFT lays them out."""
    wide = torch.promote_types(merged.dtype, torch.float32)
    own = torch.tensor(lam, dtype=wide).to(merged.device)
    weights = (
        own.repeat_interleave(len(merged) // len(lam))[:, None]
        if factor == "A"
        else own.repeat(merged.shape[1] // len(lam))
    )
    merged.copy_(torch.lerp(merged.to(wide), live.to(wide), weights))


def _alike(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and left.dtype == right.dtype and left.device == right.device

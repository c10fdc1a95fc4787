"""C-LoRA (arXiv 2502.17920): one LoRA with a routing matrix R between A and B; each task trains a change of R."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slao_kernels import sharding
from slao_kernels.adapters import through

from .base import Method
from .extended import extend_all, fresh
from .showing import Weights

if TYPE_CHECKING:
    from slao_kernels.extension import Extended

ORTHOGONALITIES = ("core", "up")


class CLoRA(Method):
    """W' = W + s · B R A with R = R_old + R_δ (r, r): R_old is frozen, R_δ starts each task at (or near) zero.

    This is Continual LoRA; Controlled LoRA (arXiv 2410.16801), which is called CLoRA too, is another method.
    A and B go on training, but their gradient flows through R_δ alone, so that what R_old leads through changes slowly
    (`slao_kernels.lora_linear` has the formulas). At a task's end R_old <- R_old + R_δ. Nothing grows: 2 r² numbers a
    layer beside A and B. `penalty()` is the paper's loss of orthogonality, to be added to every step's loss
    (`slao.train` does).

    orthogonality: how the paper's ‖AᵀR_δ‖², whose shapes do not fit, is read: "core" ‖R_oldᵀ R_δ‖²_F, which keeps the
    new routing off the directions that the old one leads to; "up" ‖B R_δ‖²_F, which keeps the change small where B is
    large (B is taken as a constant). orthogonality_weight: its factor, 0.01 in the paper; 0 turns it off.
    delta_std: standard deviation of R_δ's start. With 0 a task starts exactly where the last one ended.
    b_std: standard deviation of B's start (uniform); a zero B (PEFT's) would leave every gradient zero. None: 1/√(3 r),
    as PEFT draws A. At √m / r a step of Adam on R_δ lowers the loss about as much as one on B does in ordinary LoRA
    (r² gradients instead of m r, each m / r times as large). With a B about that wide MiniLM learned its first task at
    a third to a tenth of the learning rate, but over four tasks no better at its best rate (accuracy .826 against .823
    on validation rows of clinc150), and it forgot more at the same rate; the wider B, the smaller R, and the less
    "core" acts.
    seed: of B and R_δ.
    Raises ValueError for unknown options, and for layers that cannot take a core.
    """

    name = "clora"

    def __init__(
        self,
        model: nn.Module,
        orthogonality: str = "core",
        orthogonality_weight: float = 0.01,
        delta_std: float = 0.0,
        b_std: float | None = None,
        adapter: str = "default",
        seed: int = 0,
        beside: str = "keep",
    ) -> None:
        super().__init__(model, adapter=adapter, beside=beside)
        if orthogonality not in ORTHOGONALITIES:
            raise ValueError(
                f"unknown orthogonality {orthogonality!r}; choose one of {', '.join(ORTHOGONALITIES)} "
                "(clora is C-LoRA, arXiv 2502.17920)"
            )
        for what, value in (("orthogonality_weight", orthogonality_weight), ("delta_std", delta_std)):
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"{what} must be a finite number of at least 0, not {value}")
        self.orthogonality, self.orthogonality_weight = orthogonality, float(orthogonality_weight)
        if b_std is not None and not 0.0 < b_std < float("inf"):
            raise ValueError(f"b_std must be a finite number above 0, or None, not {b_std}")
        self.delta_std, self.b_std, self.seed = float(delta_std), b_std, int(seed)
        self.layers: list[Extended] = extend_all(self)
        for pair, layer in zip(self.pairs, self.layers, strict=True):
            shape = (pair.rank,) * 2 if pair.experts == 1 else (pair.experts, pair.rank, pair.rank)
            layer.slao_core = pair.A.new_zeros(shape)
            layer.slao_core_delta = nn.Parameter(pair.A.new_zeros(shape))

    def _refuse_shards(self) -> None:
        sharded = [pair.name for pair, layer in zip(self.pairs, self.layers, strict=True) if not _is_whole(layer)]
        if sharded:
            raise ValueError(
                f"clora: the routing matrices of {len(sharded)} layers are sharded ({', '.join(sharded[:4])}); "
                "use DDP or ZeRO-2, or keep slao_core_delta out of FSDP (ignored_params)"
            )

    def _begin(self, task: int) -> None:
        self._refuse_shards()
        for pair, layer in zip(self.pairs, self.layers, strict=True):
            delta = layer.slao_core_delta
            assert delta is not None
            delta.requires_grad_(True)  # PEFT 0.20 freezes it where another adapter is added
            with torch.no_grad():
                if task == 1 and not pair.B.any():
                    std = (3 * pair.rank) ** -0.5 if self.b_std is None else self.b_std
                    columns = pair.B.shape[1]
                    noise = fresh(pair.B, f"{self.seed}/B/{pair.name}")  # uniform in ±1/√columns
                    pair.B.copy_(noise * (std * (3 * columns) ** 0.5))
                if self.delta_std > 0.0:
                    rows = delta.view(-1, pair.rank)
                    noise = fresh(rows, f"{self.seed}/{task}/{pair.name}")  # uniform in ±1/√r
                    rows.copy_(noise * (self.delta_std * (3 * pair.rank) ** 0.5))

    def _end(self, task: int) -> float:
        self._refuse_shards()
        with torch.no_grad():
            for layer in self.layers:
                core, delta = layer.slao_core, layer.slao_core_delta
                assert core is not None
                assert delta is not None
                core.add_(delta)
                delta.zero_()
        return 1.0

    def penalty(self) -> Tensor | None:
        if self.orthogonality_weight == 0.0:
            return None
        terms = []
        for pair, layer in zip(self.pairs, self.layers, strict=True):
            core, delta = layer.slao_core, layer.slao_core_delta
            assert core is not None
            assert delta is not None
            if self.orthogonality == "core":
                terms.append((core.mT @ delta).float().square().sum())
            else:  # ‖B R_δ‖² = tr(R_δᵀ (BᵀB) R_δ): r×r, never m×r with a graph
                grams = torch.stack([B.T @ B for B in pair.split("B", pair.B)]).view(delta.shape)
                terms.append((delta * (grams @ delta)).float().sum())
        return self.orthogonality_weight * torch.stack(terms).sum()

    def _exported_weights(self) -> Weights:
        """A as it is and B R: a plain LoRA."""
        out: Weights = []
        for pair, layer in zip(self.pairs, self.layers, strict=True):
            core, delta = layer.slao_core, layer.slao_core_delta
            assert core is not None
            assert delta is not None
            wide = torch.promote_types(pair.B.dtype, torch.float32)
            out.append((None, through(pair.B.to(wide), (core + delta.detach()).to(wide)).to(pair.B.dtype)))
        return out

    def _options(self) -> dict[str, Any]:
        return {
            "orthogonality": self.orthogonality,
            "orthogonality_weight": self.orthogonality_weight,
            "delta_std": self.delta_std,
            "b_std": self.b_std,
            "seed": self.seed,
        }

    def _live_tensors(self) -> dict[str, Tensor]:
        live = super()._live_tensors()
        for pair, layer in zip(self.pairs, self.layers, strict=True):
            core, delta = layer.slao_core, layer.slao_core_delta
            assert core is not None
            assert delta is not None
            live |= {f"{pair.name}.core": core, f"{pair.name}.core_delta": delta.detach()}
        return live


def _is_whole(layer: Extended) -> bool:
    return sharding.is_plain(layer.slao_core_delta) and type(layer.slao_core) is Tensor

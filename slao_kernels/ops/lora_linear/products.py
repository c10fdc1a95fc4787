"""A LoRA layer's forward and backward from torch's own GEMMs: the formula, and the five products that it is made of.

LoRA first, then the base GEMM on top of it with beta = 1: the M×N add rides in the GEMM's epilogue, and the rank-r
product is rounded before the larger base product joins it in the accumulator, which is more accurate than adding two
rounded M×N tensors. `scaling` is the GEMM's alpha, so no scaled copy of B is made.

Each product reads or writes one large matrix and costs next to no arithmetic. Other backends are subclasses with
other products (cpu.py, triton.py); the base GEMM stays torch's. M = tokens, K and N = features, r = rank. Gradients are
fresh tensors; y alone is given, since it has x's leading sizes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .precise import Grads, WideProducts, rows_of


class TorchProducts(WideProducts):
    """Everything by torch. `wide_forward` and `wide_backward` (precise.py) serve adapters that are wider than x.

    drawn: the mask of torch's dropout with probability p, if there was one; what the branch reads is dropped already.
    """

    def __init__(self, drawn: Tensor | None = None, p: float = 0.0) -> None:
        self.mask = drawn
        self.scale = 1.0 if drawn is None or p >= 1.0 else 1.0 / (1.0 - p)

    def shrink(self, x: Tensor, A: Tensor) -> Tensor:
        """x Aᵀ: x (M, K), A (r, K); (M, r)."""
        return torch.mm(x, A.t())

    def linear_(
        self, y: Tensor, x: Tensor, W: Tensor, t: Tensor, B: Tensor, scaling: float, bias: Tensor | None
    ) -> None:
        """y <- x Wᵀ + scaling t Bᵀ + bias: y (M, N), x (M, K), W (N, K), t (M, r), B (N, r), bias (N)."""
        if bias is None:
            torch.addmm(y, t, B.t(), beta=0, alpha=scaling, out=y)
        else:
            torch.addmm(bias, t, B.t(), alpha=scaling, out=y)
        y.addmm_(x, W.t())

    def grad_t(
        self, dy: Tensor, t: Tensor, B: Tensor, scaling: float, need_g: bool, need_dB: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """(g = scaling dy B (M, r), dB = scaling dyᵀ t (N, r)), None where not needed; dy (M, N)."""
        g = torch.addmm(t, dy, B, beta=0, alpha=scaling) if need_g else None
        return g, torch.addmm(B, dy.t(), t, beta=0, alpha=scaling) if need_dB else None

    def grad_A(self, g: Tensor, x: Tensor) -> Tensor:
        """gᵀ x (r, K): g (M, r), x (M, K)."""
        return torch.mm(g.t(), x)

    def grad_source(self, g: Tensor, A: Tensor) -> Tensor:
        """g A (M, K) where dropout kept x, the branch's part of dx: g (M, r), A (r, K)."""
        if self.mask is None:
            return torch.mm(g, A)
        out = g.new_empty((g.shape[0], A.shape[1]))
        return torch.addmm(out, g, A, beta=0, alpha=self.scale, out=out).mul_(rows_of(self.mask))

    def grad_x(self, dy: Tensor, W: Tensor, g: Tensor, A: Tensor) -> Tensor:
        """dy W + g A (M, K): dy (M, N), W (N, K), g (M, r), A (r, K)."""
        return self.grad_source(g, A).addmm_(dy, W)

    def forward(
        self,
        x: Tensor,
        source: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scaling: float,
    ) -> tuple[Tensor, Tensor]:
        """(y, t) of the operator `lora_linear`; see operators.py."""
        x2 = rows_of(x)
        t = self.shrink(x2 if source is None else rows_of(source), A)
        # N-D from the start: a view of a 2-D result would refuse the caller's in-place operations.
        y = x.new_empty((*x.shape[:-1], weight.shape[0]))
        self.linear_(rows_of(y), x2, weight, t, B, scaling, bias)
        return y, t

    def backward(
        self,
        dy: Tensor,
        source: Tensor,
        weight: Tensor,
        t: Tensor,
        A: Tensor,
        B: Tensor,
        scaling: float,
        needs: tuple[bool, bool, bool],
    ) -> Grads:
        """What the operator `lora_linear_backward` computes; see operators.py."""
        (need_x, need_A, need_B), dy2, source2, dx = needs, rows_of(dy), rows_of(source), None
        g, dB = self.grad_t(dy2, t, B, scaling, need_x or need_A, need_B)
        dA = self.grad_A(g, source2) if need_A else None
        if need_x:
            dx = self.grad_x(dy2, weight, g, A)
            dx = dx if source2 is source else dx.view(source.shape)
        return dx, dA, dB, g

    def add(self, x: Tensor, y: Tensor, A: Tensor, B: Tensor, scaling: float, out: Tensor) -> Tensor:
        """Writes y + scaling x Aᵀ Bᵀ into `out` (contiguous; y itself, or as large) and returns t; see `lora_add`."""
        x2, out2 = rows_of(x), rows_of(out)
        y2 = out2 if out is y else rows_of(y)
        t = self.shrink(x2, A) if x.dtype is A.dtype else self.shrink_wide(x2, A, 1.0)
        if B.shape[1] > A.shape[0]:  # a bias as one more column of B: its factor is 1
            t = torch.cat([t, t.new_ones(t.shape[0], 1)], 1)
        if y.dtype is not t.dtype:
            if out is not y:
                out2.copy_(y2)
            self.add_wide_(out2, t, B, scaling)
        elif out is y:
            out2.addmm_(t, B.t(), alpha=scaling)
        else:
            torch.addmm(y2, t, B.t(), alpha=scaling, out=out2)
        return t

    def add_backward(
        self, x: Tensor, dy: Tensor, t: Tensor, A: Tensor, B: Tensor, scaling: float, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dx, dA, dB) of the operator `lora_add_backward`, None where not needed; see operators.py."""
        need_x, need_A, need_B = needs
        dy2, x2, r, need_g = rows_of(dy), rows_of(x), A.shape[0], need_x or need_A
        biased = B.shape[1] > r
        own = B[:, :r] if biased else B
        dx = dA = dB = g = None
        if dy.dtype is B.dtype:
            g, dB = self.grad_t(dy2, t[:, :r] if biased else t, own, scaling, need_g, need_B and not biased)
            if need_B and biased:
                dB = torch.mm(dy2.t(), t).mul_(scaling)
        else:
            g = self.shrink_wide(dy2, own.t(), scaling) if need_g else None
            dB = self.outer_wide(t, dy2, scaling).t().contiguous() if need_B else None
        if g is None:
            return None, None, dB
        if x.dtype is g.dtype:
            dA = self.grad_A(g, x2) if need_A else None
            if need_x:
                dx = self.grad_source(g, A)
                dx = dx if x2 is x else dx.view(x.shape)
        else:
            dA = self.outer_wide(g, x2, 1.0) if need_A else None
            if need_x:
                dx = self.grad_source_wide(x, g, A)
        return dx, dA, dB


_TORCH = TorchProducts()


def products(drawn: Tensor | None = None, p: float = 0.0) -> TorchProducts:
    """The backend "eager"."""
    return _TORCH if drawn is None else TorchProducts(drawn, p)

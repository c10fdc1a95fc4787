"""lora_linear in plain PyTorch: the oracle of every test and the last fallback."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def lora_linear(
    x: Tensor,
    x_dropped: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    core: Tensor | None = None,
    core_delta: Tensor | None = None,
) -> Tensor:
    """y = x Wᵀ + bias + scaling · x Aᵀ (core + core_delta)ᵀ Bᵀ, all in the dtype of its arguments.

    Without `core` and `core_delta` it is plain LoRA. With them (C-LoRA, arXiv 2502.17920): x is differentiated
    through core + core_delta, A and B through core_delta alone, core_delta through both, core not at all.
    Shapes: x (..., K), weight (N, K), bias (N), A (r, K), B (N, r), core and core_delta (r, r); y (..., N).
    """
    source = x if x_dropped is None else x_dropped
    y = F.linear(x, weight, bias).to(A.dtype)
    source = source.to(A.dtype)
    return (y + scaling * routed(source, A, B, core, core_delta)).to(x.dtype)


def routed(x: Tensor, A: Tensor, B: Tensor, core: Tensor | None, core_delta: Tensor | None) -> Tensor:
    """x Aᵀ (core + core_delta)ᵀ Bᵀ with the gradients that `lora_linear` tells of; without cores x Aᵀ Bᵀ."""
    if core is None and core_delta is None:
        return x @ A.T @ B.T
    routing = sum(part for part in (None if core is None else core.detach(), core_delta) if part is not None)
    y = x @ A.detach().T @ routing.T @ B.detach().T
    if core_delta is not None:  # adds nothing to the value: only A's and B's gradient
        path = x.detach() @ A.T @ core_delta.detach().T @ B.T
        y = y + (path - path.detach())
    return y


def lora_add(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """y + scaling · x Aᵀ Bᵀ in A's dtype, rounded once to y's; a last column that B has beyond A's rows is a bias.

    Shapes: y (..., N), x (..., K), A (r, K), B (N, r) or (N, r + 1).
    """
    r = A.shape[0]
    branch = x.to(A.dtype) @ A.T @ B[:, :r].T
    if B.shape[1] > r:
        branch = branch + B[:, r]
    return (y.to(A.dtype) + scaling * branch).to(y.dtype)


def grads(
    dy: Tensor, source: Tensor, weight: Tensor, t: Tensor, A: Tensor, B: Tensor, scaling: float, kept: Tensor | float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The backward pass of `lora_linear` in functions that torch can batch: (dx, dA, dB, g) as of
    `TorchProducts.backward`, needed or not. kept: the factor of each x (..., K) in what the branch read."""
    rows, flat = source.reshape(-1, source.shape[-1]).to(t.dtype), dy.reshape(-1, dy.shape[-1])
    wide = flat.to(t.dtype)
    g = scaling * (wide @ B)
    dx = (flat @ weight).to(t.dtype).reshape(source.shape) + (g @ A).reshape(source.shape) * kept
    return dx.to(source.dtype), g.transpose(0, 1) @ rows, scaling * (wide.transpose(0, 1) @ t), g


def add_grads(
    x: Tensor, dy: Tensor, t: Tensor, A: Tensor, B: Tensor, scaling: float, kept: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dA, dB) of `lora_add` in functions that torch can batch."""
    wide = dy.reshape(-1, dy.shape[-1]).to(B.dtype)
    g = scaling * (wide @ B[:, : A.shape[0]])
    dx = ((g @ A).reshape(x.shape) * kept).to(x.dtype)
    return dx, g.transpose(0, 1) @ x.reshape(-1, x.shape[-1]).to(g.dtype), scaling * (wide.transpose(0, 1) @ t)

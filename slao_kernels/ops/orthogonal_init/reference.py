"""orthogonal_init_ through torch's Householder QR in fp64: the oracle of every test and the last fallback."""

from __future__ import annotations

import torch
from torch import Tensor

# Rows whose part orthogonal to the rows before them is below one rounding error of the row itself (in the dtype
# that the fast backends compute in) carry no direction of their own: they are completed and reported.
EPS = {torch.float64: 2.0**-50, "else": 2.0**-23}


def orthogonal_init_(As: list[Tensor], r: list[Tensor], status: Tensor) -> None:
    """A <- Qᵀ of Aᵀ = Q R with diag(R) > 0, per matrix; R goes into `r` (unless that list is empty).

    fp64 throughout, rounded once at the store. Householder's Q is orthonormal for any finite input, rank-deficient
    ones included, and Q = I for zeros. status: 0 done, 1 done but deficient, 2 not finite: then nothing is written.
    """
    finite = torch.stack([torch.isfinite(A).all() for A in As])
    proceed = finite.all()
    for index, A in enumerate(As):
        rows = A.detach().double()
        # A NaN would make LAPACK fail with an error of its own; the write below does not happen then anyway.
        Q, R = torch.linalg.qr(torch.where(finite[index], rows, torch.zeros_like(rows)).T)
        sign = torch.where(R.diagonal() < 0, -1.0, 1.0)  # a bare torch.sign would zero a column
        R = R * sign[:, None]
        tiny = R.diagonal() <= EPS.get(A.dtype, EPS["else"]) * torch.linalg.vector_norm(R, dim=0)
        A.copy_(torch.where(proceed, (Q * sign).T, rows))
        if r:
            r[index].copy_(R)
        status[index] = torch.where(finite[index], tiny.any().int(), 2)

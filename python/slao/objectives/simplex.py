"""Fixed classifier directions that lie as far apart as they can: nothing of a classifier is trained, or forgotten."""

from __future__ import annotations

import torch
from torch import Tensor


def simplex_directions(count: int, width: int, seed: int = 0) -> Tensor:
    """(count, width), fp32, unit rows: a simplex equiangular tight frame, each two at the cosine -1 / (count - 1).

    √(K/(K−1)) (I − 11ᵀ/K) Uᵀ, with K = count and U (width, K) orthonormal columns, drawn from `seed`.
    ValueError unless 2 ≤ count ≤ width. Source: Papyan, Han & Donoho 2020 (neural collapse); fixed for continual
    learning by Yang et al. 2023 (arXiv 2302.03004).
    """
    if not 2 <= count <= width:
        raise ValueError(f"a simplex of {count} directions needs at least 2 of them and a width of that; got {width}")
    drawn = torch.randn(width, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis = torch.linalg.qr(drawn)[0]
    centred = torch.eye(count, dtype=torch.float64) - 1 / count
    return ((count / (count - 1)) ** 0.5 * centred @ basis.T).float()

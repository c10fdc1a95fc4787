"""Averages of B A itself, where the factors of different tasks have no common basis: kept as factors, cut to a rank."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from slao_kernels import weighted_merge
from slao_kernels.adapters import LoraPair

Products = Sequence[tuple[Tensor, Tensor]]  # A (R, n) and B (m, R) of each layer, as PEFT packs them, of any rank R


def nearest(
    pairs: Sequence[LoraPair], terms: Sequence[Products], most: int, weights: Sequence[Sequence[float]] = ()
) -> list[tuple[Tensor, Tensor]]:
    """Per layer the nearest to the sum of its terms B A that has the rank of `most` of the pairs; all layers at once.

    Of a mixture's experts each one's. weights: of each term one a layer, of experts for each; 1 without. By QR of the
    stacked factors (`slao_kernels.weighted_merge`).
    """
    ranks = [min(most * pair.rank, len(pair.B), pair.A.shape[1]) for pair in pairs for _ in range(pair.experts)]
    each = weights or [[1.0] * len(ranks) for _ in terms]
    adapters = [(*split(pairs, term), list(own)) for term, own in zip(terms, each, strict=True)]
    found = iter(weighted_merge(adapters, [1.0] * len(terms), ranks).pairs)
    out = []
    for pair in pairs:
        cuts = list(islice(found, pair.experts))
        missing = most * pair.rank - len(cuts[0][0])  # a layer of fewer rows or columns: zeros, the sum is whole
        A = pair.join("A", [F.pad(A, (0, 0, 0, missing)) for A, _ in cuts])
        out.append((A, pair.join("B", [F.pad(B, (0, missing)) for _, B in cuts])))
    return out


def average(
    pairs: Sequence[LoraPair], old: Products, new: Products, weights: Sequence[float], most: int
) -> list[tuple[Tensor, Tensor]]:
    """`nearest` to old + weight · (new − old), a weight for each layer, of experts for each."""
    return nearest(pairs, [old, new], most, [[1 - weight for weight in weights], weights])


def product_svd(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, k), S (k), Vh (k, n) of B A from A (r, n) and B (m, r), k = min(r, m, n): QR of both, SVD of the core."""
    Q_A, R_A = torch.linalg.qr(A.T)
    Q_B, R_B = torch.linalg.qr(B)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T, False)
    return Q_B @ U, S, Vh @ Q_A.T


def merged_state(pairs: Sequence[LoraPair], merged: Products) -> dict[str, Tensor]:
    """What `Method.save` keeps of a merge; `merged_from` takes it back."""
    both = zip(pairs, merged, strict=False)
    return {f"{pair.name}.{key}_merged": part for pair, two in both for key, part in zip("AB", two, strict=True)}


def merged_from(pairs: Sequence[LoraPair], tensors: dict[str, Tensor], most: int) -> list[tuple[Tensor, Tensor]]:
    """On the layers' devices; empty where there was none. ValueError unless every layer's has the same number of pairs.

    That number is at most `most`.
    """
    found: list[tuple[Tensor, Tensor]] = []
    ranks: set[int] = set()
    for pair in pairs if any(key.endswith("_merged") for key in tensors) else ():
        A, B, number = fitting(pair, tensors, "{}_merged")
        ranks.add(number)
        if A is None or B is None or number > most or len(ranks) > 1:
            raise ValueError(f"the saved merge of {pair.name} does not fit: {number} pairs of at most {most}")
        found.append((A.to(pair.A.device), B.to(pair.B.device)))
    return found


def fitting(
    pair: LoraPair, tensors: dict[str, Tensor], key: str
) -> tuple[Tensor, Tensor, int] | tuple[None, None, int]:
    """A layer's saved A and B, and how many of its pairs they hold; none and 0 where both are absent.

    key: what they are called after the layer's name, with {} for the factor. ValueError for other shapes.
    """
    A, B = (tensors.get(f"{pair.name}.{key.format(factor)}") for factor in "AB")
    if A is None and B is None:
        return None, None, 0
    number = 0 if A is None or A.dim() != 2 else len(A) // len(pair.A)
    shapes = (number * len(pair.A), pair.A.shape[1]), (len(pair.B), number * pair.B.shape[1])
    if (
        A is None
        or B is None
        or number < 1
        or (A.shape, B.shape) != shapes
        or not (A.is_floating_point() and B.is_floating_point())
    ):
        raise ValueError(
            f"the saved {key.format('A')} and {key.format('B')} of {pair.name} do not fit its A {tuple(pair.A.shape)} "
            f"and B {tuple(pair.B.shape)}"
        )
    return A, B, number


def split(pairs: Sequence[LoraPair], products: Products) -> tuple[list[Tensor], list[Tensor]]:
    """A and B of every layer, of experts of each."""
    As, Bs = (
        [one for pair, two in zip(pairs, products, strict=True) for one in pair.split(factor, two[side])]
        for side, factor in enumerate("AB")
    )
    return As, Bs

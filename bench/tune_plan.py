"""What bench/tune_lora_gemm.py measures, which tiles it tries, and the file that it writes."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from shapes import GEOMETRIES

BLOCKS = ((32, 128), (64, 64), (64, 128), (128, 64))
# More rows a program are fewer parts of dB.
GRAD_T_BLOCKS = ((64, 64), (128, 32), (128, 64), (128, 128), (256, 32), (256, 64))


class Product(NamedTuple):
    """out (m, n) <- P (m, k) Q (k, n) + T (m, r) S (r, n); layout says how Q lies in memory, as in gemm.py."""

    layout: str
    m: int
    n: int
    k: int
    r: int


class Skinny(NamedTuple):
    """A rank-r product that reads a matrix (m, k)."""

    kernel: str
    m: int
    k: int
    r: int


def pairs(models: Iterable[str]) -> list[tuple[int, int]]:
    """(out_features, in_features) of the models' layers, each once."""
    return sorted({(n, k) for model in models for _, n, k in GEOMETRIES[model].layers})


def products(models: Iterable[str], tokens: Iterable[int], ranks: Iterable[int]) -> list[Product]:
    """Forward and dx of every layer, each product once."""
    both = {(layout, *sizes) for n, k in pairs(models) for layout, sizes in (("nk", (n, k)), ("kn", (k, n)))}
    return [Product(layout, m, n, k, r) for (layout, n, k), m, r in product(sorted(both), tokens, ranks)]


def skinny_products(models: Iterable[str], tokens: Iterable[int], ranks: Sequence[int]) -> list[Skinny]:
    """x of every width for shrink and outer, dy of every width for grad_t; each once. A tile serves all ranks up to its
    own, so there is one for each padded rank from the least to the most."""
    inner = {width for _, width in pairs(models)}
    widths = {"shrink": inner, "outer": inner, "grad_t": {width for width, _ in pairs(models)}}
    least, most = (max(16, 1 << (r - 1).bit_length()) for r in (min(ranks), max(ranks)))
    padded = [r for r in (16, 32, 64, 128, 256) if least <= r <= most]
    return [
        Skinny(kernel, m, k, r)
        for m, r in product(tokens, padded)
        for kernel, all_k in widths.items()
        for k in sorted(all_k)
    ]


def skinny_tiles(of: Skinny, dtype: torch.dtype) -> list[Any]:
    """The tiles to try, the default one first."""
    from slao_kernels.ops.lora_linear import tiles

    default = tiles.find(of.kernel, dtype, of.m, of.k, of.r)
    assert default is not None
    default = dataclasses.replace(default, r=of.r, m=of.m, k=of.k)
    tried = [
        dataclasses.replace(default, block_m=m, block_k=k, warps=warps, stages=3)
        for (m, k), warps in product(GRAD_T_BLOCKS if of.kernel == "grad_t" else BLOCKS, (4, 8))
    ]
    return [default, *(tile for tile in tried if tile != default)]


def table(about: str, tiles: Iterable[Any], measurements: Iterable[Any]) -> str:
    """The file's text, a row a line."""

    def rows(of: Iterable[Any]) -> str:
        return ",\n".join("    " + json.dumps(dataclasses.asdict(row)) for row in of)

    lists = ",\n".join(f'  "{name}": [\n{rows(of)}\n  ]' for name, of in (("tiles", tiles), ("gemm", measurements)))
    return f'{{\n  "about": {json.dumps(about)},\n{lists}\n}}\n'


def write(path: Path, text: str) -> None:
    """The whole file or none of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)

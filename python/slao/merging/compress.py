"""One saved adapter, cut layer by layer to a lower rank."""

from __future__ import annotations

import json
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor, nn

from slao_kernels.ops import checks

from . import product
from .cuts import SERVED, CutAdapter, CutLayer, Limit, balanced
from .factors import Pair
from .growing import GrowingFile
from .output import DTYPES, whole_folder, write_config
from .source import Source


def compress_adapter(
    folder: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    keep: float | None = None,
    one_rank: bool = False,
    progress: bool = False,
) -> CutAdapter:
    """Write the adapter in `folder` into a new folder `out`, each layer's scaling · B A cut to its leading singular
    values: to `rank` of them, or to the fewest that hold the part `keep` of the squared norm (both: at most `rank`).

    A layer never gets more than its own rank or its shape has. one_rank: all layers get the largest rank of any,
    rounded up to one that vLLM takes (with zeros where a layer has no more), for what serves adapters without reading
    rank_pattern. The result has scaling 1 and each layer's widest dtype; what the adapter has beside A and B is copied.
    By QR of A and B and an SVD between them, in fp64: no matrix of the layer's size.
    Raises ValueError, with nothing written, for a folder that holds no plain LoRA (docs/adapter_parts.md), NaN, a rank
    that would cut nothing, a result that the dtype cannot hold, `out` that exists.
    Source: Eckart and Young 1936.
    """
    from tqdm.auto import tqdm

    limit, source, target = Limit(rank, keep), Source(folder, beside=True), Path(out)
    if any(layer.experts > 1 for layer in source.layers.values()):
        raise ValueError(
            f"{folder} adapts a mixture's experts, which all have one rank: cut them by slao merge --method svd --rank"
        )
    own = max(layer.rank for layer in source.layers.values())
    if keep is None and rank is not None and rank >= own:
        raise ValueError(f"rank {rank} cuts nothing: the layers of {folder} have ranks up to {own}")
    names = [key for layer in source.layers.values() for key in layer.keys] + list(source.parts)
    note = {"method": "compress", "rank": rank, "keep": keep}
    with whole_folder(target) as scratch, torch.no_grad():
        cuts = {name: _cut(source, name, limit) for name in source.layers} if one_rank else {}
        uniform = _uniform(cuts)
        file = GrowingFile(scratch / "adapter_model.safetensors", names, json.dumps(note))
        layers: dict[str, CutLayer] = {}
        try:
            for name in tqdm(source.layers, unit="layer", leave=False, disable=None if progress else True):
                A, B = cuts[name] if one_rank else _cut(source, name, limit)
                if uniform:
                    A, B = (
                        nn.functional.pad(A, (0, 0, 0, uniform - len(A))),
                        nn.functional.pad(B, (0, uniform - len(A))),
                    )
                layers[name] = _written(file, source, name, A, B)
            for key in source.parts:
                file.write(key, source.part(key))
        finally:
            file.close()
        ranks = {name: layer.rank for name, layer in layers.items()}
        write_config(scratch / "adapter_config.json", source.config, ranks)
        copied = (f"copied as it is: {', '.join(source.beside)}",) if source.beside else ()
        made = CutAdapter(target, layers, copied)
        made.record(scratch)
    return made


def _cut(source: Source, name: str, limit: Limit) -> Pair:
    """A (r, n) and B (m, r) of the layer, in its dtype."""
    layer = source.layers[name]
    A, B = source.read(name)
    shape = B.shape[0], A.shape[1]
    cut = product.svd([(A.double(), B.double())], [layer.scaling], min(layer.rank, *shape))
    r = limit.chosen(cut.B.norm(dim=0), cut.total)
    dtype = reduce(torch.promote_types, [DTYPES[stored] for stored in layer.dtypes])
    A, B = (part.to(dtype) for part in balanced(cut.A[:r], cut.B[:, :r]))
    if checks.not_finite([A, B]):
        raise ValueError(f"{name} of {source.folder}, cut to rank {r}, overflows {dtype}. Nothing was written.")
    return A, B


def _uniform(cuts: dict[str, Pair]) -> int:
    """The rank of all layers, 0 where each has its own."""
    if not cuts:
        return 0
    largest = max(len(A) for A, _ in cuts.values())
    fits = next((rank for rank in SERVED if rank >= largest), None)
    if fits is None:
        raise ValueError(f"a rank of {largest} is more than vLLM takes, {SERVED[-1]}: pass a lower --rank or --keep")
    return fits


def _written(file: GrowingFile, source: Source, name: str, A: Tensor, B: Tensor) -> CutLayer:
    layer = source.layers[name]
    (_, *n), (m, _, *kernel) = layer.shapes
    file.write(layer.keys[0], A.reshape(len(A), *n))
    file.write(layer.keys[1], B.reshape(m, len(A), *kernel))
    before_A, before_B = source.read(name)
    before = before_A.double(), layer.scaling * before_B.double()
    norm = product.norm([before])
    lost = product.norm([before, (A.double(), -B.double())])
    return CutLayer(len(A), norm, lost / norm if norm else 0.0)

"""Adapters folded into their base: a model's folder and adapters' folders in, a model's folder out.

In the order of reading: `base` and `stored` (what the base's files hold, and by which names the model knows it),
`changes` and `ties` (what the adapters make of it), `plan` (what will be written), `arithmetic` (one tensor), `write`
and `verify`.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..merge import merge_adapters
from ..options import CUT, completed
from ..output import dtype_of, whole_folder
from .base import Base
from .plan import Plan, plan_of, single, summed
from .verify import Verified, tokens_of, verified
from .write import write_model


@dataclass(frozen=True)
class Folded:
    """What `fold_model` wrote. left: of the base's folder what was not copied, and why. lost: the part of the merge
    (norms) that its rank left out, None where nothing was cut. verified: where a prompt was given."""

    folder: Path
    method: str
    plan: Plan
    left: dict[str, str]
    lost: float | None
    verified: Verified | None

    def __str__(self) -> str:
        made = self.plan
        by = "" if self.method == "svd" and self.lost is None else f" by {self.method}"  # the adapters' sum itself
        lines = [f"{self.folder}: {len(made.changes)} weights changed{by}, {_size(made.size)}"]
        if self.lost is not None:
            lines[0] += f"; cut to a rank, which leaves out {self.lost:.2%} of the merge (norms)"
        if made.untied is not None:
            lines.append(f"untied: {made.untied} is written apart, and tie_word_embeddings is false")
        if made.rows is not None:
            lines.append(f"resized: vocab_size is {made.rows}")
        if made.others:
            lines.append(
                f"the adapter names another base, {', '.join(made.others)}: make sure that the base is that model"
            )
        if self.left:
            lines.append("not copied: " + ", ".join(f"{name} ({why})" for name, why in self.left.items()))
        if self.verified is not None:
            lines.append(str(self.verified))
        return "\n".join(lines)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def fold_model(
    base: str | Path,
    adapters: Sequence[str | Path],
    out: str | Path,
    method: str | None = None,
    *,
    dtype: str | None = None,
    untie: bool = False,
    verify: str | None = None,
    progress: bool = False,
    **options: Any,
) -> Folded:
    """Fold the adapters, oldest first, into the model in the folder `base`: a new folder `out` that transformers loads.

    Works on files: safetensors in, safetensors of the same names out, one tensor in memory at a time; arithmetic in
    fp32, rounded once. method: of several adapters, one of `merge_adapters`, "slao" unless said. "svd" without a rank
    is the weighted sum itself, rounded once, with nothing cut; the others fold what `merge_adapters` makes. options:
    the ones of that: weights, rank, density, schedule, seed, beside. dtype: "float32", "bfloat16", "float16" or
    "float64", of all floating weights; by default each keeps its own. untie: write a head that is tied to the input
    embedding apart where the adapter changes one of them alone. verify: a prompt, for which the logits of base with
    adapters and of the folded model are compared (`Folded.verified`).
    `out` appears when it is whole. docs/fold.md says what is treated and what is refused.
    Raises ValueError, with nothing written, for what is refused; OSError where the disk does not take it.
    """
    method = method or ("svd" if len(adapters) == 1 else "slao")
    given = {name: options.pop(name, None) for name in ("weights", "rank", "density", "schedule", "seed", "beside")}
    if options:
        raise TypeError(f"fold_model takes no {', '.join(options)}")
    beside = given.pop("beside")
    all_options = completed(method, **given, count=len(adapters))
    exact = method == "svd" and given["rank"] is None
    if verify is not None and exact and len(adapters) > 1 and beside is not None:
        raise ValueError("verify compares with PEFT, which answers with one adapter's heads and tokens: leave it out")
    model, target, to = Base(base), Path(out), None if dtype is None else dtype_of(dtype)
    asked = None if verify is None else tokens_of(model, verify)
    note = {"method": method, "adapters": [Path(folder).resolve().name for folder in adapters], **all_options}
    made = plan_of(model, summed(adapters, all_options["weights"], beside), to, untie) if exact else None
    sums: dict[str, str] = {}
    with whole_folder(target, sums) as scratch:
        folders, weights, merged = [Path(folder) for folder in adapters], all_options.get("weights", []), None
        if made is None:
            folders, weights = [scratch / ".adapter"], [1.0]
            merged = merge_adapters(adapters, folders[0], method, beside=beside, progress=progress, **given)
            made = plan_of(model, single(folders[0]), to, untie)
        left = write_model(made, scratch, note, sums, progress)
        told = None if asked is None else verified(made, folders, weights, scratch, *asked)
        if merged is not None:
            shutil.rmtree(folders[0])
    lost = merged.lost if merged is not None and method in CUT else None
    return Folded(target, method, made, left, lost, told)

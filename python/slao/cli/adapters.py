"""The commands of `slao` that work on saved adapters and models: interference, merge, fold, compress and extract."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import output

if TYPE_CHECKING:
    from ..merging.cuts import CutAdapter

INTERFERENCE = """
  slao interference adapters/*
"""
MERGE = """
  slao merge a/ b/ c/ -o out/
  slao merge a/ b/ c/ -o out/ --method svd --weights 0.5,0.3,0.2 --rank 16
  slao merge a/ b/ -o out/ --beside merge
"""
FOLD = """
  slao fold BASE a/ -o out/ --verify "The capital of France is"
  slao fold BASE a/ b/ -o out/ --method ties --density 0.3
"""
COMPRESS = """
  slao compress adapter/ -o out/ --keep 0.99
  slao compress adapter/ -o out/ --rank 8
"""
EXTRACT = """
  slao extract tuned/ base/ -o out/ --rank 64
"""
_METHODS = "linear, svd, ties, dare_ties, magmax, opcm, knots"

Adapters = Annotated[list[str], typer.Argument(metavar="FOLDER", help="as save_pretrained writes it")]
Out = Annotated[str, typer.Option("--out", "-o", metavar="FOLDER", help="to be made; must not exist")]
# What the methods of merge and fold take.
Weights = Annotated[str | None, typer.Option(help="comma-separated, one an adapter (not slao)")]
MergedRank = Annotated[int | None, typer.Option(help="of the result (svd, magmax, opcm, knots)")]
Density = Annotated[float | None, typer.Option(help="part of the entries that is kept (ties, dare_ties, knots)")]
Schedule = Annotated[str | None, typer.Option(help="inv_sqrt (default), inverse, adaptive or a number (slao)")]
Seed = Annotated[int | None, typer.Option(help="of dare_ties")]
Beside = Annotated[
    str | None,
    typer.Option(
        help="what becomes of heads, biases, tokens, embeddings: keep (the last one's), first, or merge (averaged)"
    ),
]
# How much compress and extract keep.
Rank = Annotated[int | None, typer.Option(help="of every layer; with --keep, at most")]
Keep = Annotated[float | None, typer.Option(help="part of a layer's squared norm that its rank holds, such as 0.99")]


def interference(adapters: Adapters, json: output.Json = False) -> None:
    """Cosines of the task vectors of saved PEFT adapters.

    With --json: adapters (each with name, norm, and beside: what trains beside
    A and B, which is not looked at), cosines (a row for each adapter).
    """
    from ..interference import compare

    with output.aside(json):
        found = compare(adapters)
    if json:
        each = zip(found.names, found.norms, found.beside, strict=True)
        fields = [{"name": name, "norm": norm, "beside": beside} for name, norm, beside in each]
        output.document({"adapters": fields, "cosines": found.cosines})
    elif (console := output.terminal()) is None:
        print(found)
    else:
        output.print_table(console, *found.cells())
        output.print_lines(console, found.notes())


def merge(
    adapters: Adapters,
    out: Out,
    method: Annotated[str, typer.Option(help=f"slao, {_METHODS}")] = "slao",
    weights: Weights = None,
    rank: MergedRank = None,
    density: Density = None,
    lambda_schedule: Schedule = None,
    seed: Seed = None,
    beside: Beside = None,
    union: Annotated[
        bool, typer.Option("--union", help="adapters may have other layers; an absent one is zero")
    ] = False,
    same_base: Annotated[
        list[str] | None,
        typer.Option(metavar="A=B", help="A and B are names of one base (may be given several times)"),
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="the base model, which DoRA adapters need (svd alone)")
    ] = None,
    json: output.Json = False,
) -> None:
    """Merge saved PEFT adapters, oldest first, into one PEFT folder.

    With --json: folder, method, ranks (layer: rank), lost (the part of the
    merge, as norms, that its ranks leave out), notes.
    """
    from ..merging import merge_adapters

    options = _options(weights, rank, density, lambda_schedule, seed)
    more: dict[str, Any] = {"beside": beside, "union": union, "same_base": same_base or (), "base": base}
    with output.aside(json):
        merged = merge_adapters(adapters, out, method, **options, **more, progress=True)
    if json:
        output.document(vars(merged))
    else:
        print(merged)


def fold(
    base: Annotated[str, typer.Argument(metavar="BASE", help="folder of the model, in safetensors")],
    adapters: Adapters,
    out: Out,
    method: Annotated[
        str | None,
        typer.Option(help=f"of several: slao (default), {_METHODS}; svd without --rank cuts nothing"),
    ] = None,
    weights: Weights = None,
    rank: MergedRank = None,
    density: Density = None,
    lambda_schedule: Schedule = None,
    seed: Seed = None,
    beside: Beside = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="of all weights: float32, bfloat16, float16 or float64; each keeps its own by default"),
    ] = None,
    untie: Annotated[
        bool, typer.Option("--untie", help="write a tied head apart where only one of both is changed")
    ] = False,
    verify: Annotated[
        str | None, typer.Option(metavar="PROMPT", help="compare the logits with those of base and adapters")
    ] = None,
    json: output.Json = False,
) -> int:
    """Fold saved PEFT adapters, oldest first, into their base: a model folder.

    With --json: folder, method, changed (how many weights), bytes, lost (as of
    merge; null where nothing was cut), untied (the head that is written apart),
    vocab_size (where it was resized), other_bases (that the adapters name),
    not_copied (file: why), verified (passed, difference, allowed, choice: the
    next token of base and adapters, and of the result).
    """
    from ..merging import fold_model

    options = _options(weights, rank, density, lambda_schedule, seed)
    more: dict[str, Any] = {"beside": beside, "dtype": dtype, "untie": untie, "verify": verify}
    with output.aside(json):
        folded = fold_model(base, adapters, out, method, **options, **more, progress=True)
    passed = folded.verified is None or folded.verified.passed
    if json:
        plan = folded.plan
        verified = None if folded.verified is None else {"passed": passed, **vars(folded.verified)}
        fields = {"folder": folded.folder, "method": folded.method, "changed": len(plan.changes), "bytes": plan.size}
        fields |= {"lost": folded.lost, "untied": plan.untied, "vocab_size": plan.rows, "other_bases": plan.others}
        output.document({**fields, "not_copied": folded.left, "verified": verified})
    else:
        print(folded)
    if not passed:
        print(f"slao: {folded.folder} was written, and does not answer as base and adapters do", file=sys.stderr)
    return 0 if passed else 1


def compress(
    adapter: Annotated[str, typer.Argument(metavar="FOLDER", help="as save_pretrained writes it")],
    out: Out,
    rank: Rank = None,
    keep: Keep = None,
    one_rank: Annotated[
        bool,
        typer.Option("--one-rank", help="one rank for all layers, one that vLLM takes: 1, 8, 16, 32, 64, ..."),
    ] = False,
    json: output.Json = False,
) -> None:
    """Cut a saved PEFT adapter to a lower rank, layer by layer.

    With --json: folder, lost (the part of the whole, as norms, that is left
    out), layers (layer: rank, norm, lost), notes.
    """
    from ..merging import compress_adapter

    with output.aside(json):
        cut = compress_adapter(adapter, out, rank=rank, keep=keep, one_rank=one_rank, progress=True)
    _print_cut(cut, json)


def extract(
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="folder of the tuned model, or its safetensors file")],
    base: Annotated[str, typer.Argument(metavar="BASE", help="the same of the model that it was tuned from")],
    out: Out,
    rank: Rank = None,
    keep: Keep = None,
    beside: Annotated[
        str,
        typer.Option(
            help="embeddings, norms, biases that differ: save (as modules_to_save) or leave (named, left out)"
        ),
    ] = "save",
    dtype: Annotated[str, typer.Option(help="of A and B: float32, bfloat16, float16, float64")] = "float32",
    json: output.Json = False,
) -> None:
    """Make a LoRA of the difference of a full fine-tune and its base.

    With --json: what compress prints.
    """
    from ..merging import extract_adapter

    with output.aside(json):
        cut = extract_adapter(tuned, base, out, rank=rank, keep=keep, beside=beside, dtype=dtype, progress=True)
    _print_cut(cut, json)


def _print_cut(cut: CutAdapter, json: bool) -> None:
    if json:
        layers = {name: vars(layer) for name, layer in cut.layers.items()}
        output.document({"folder": cut.folder, "lost": cut.lost, "layers": layers, "notes": cut.notes})
    elif (console := output.terminal()) is None:
        print(cut)
    else:
        output.print_table(console, *cut.cells())
        output.print_lines(console, cut.summary())


def _options(
    weights: str | None, rank: int | None, density: float | None, lambda_schedule: str | None, seed: int | None
) -> dict[str, Any]:
    """What the methods take, as `merge_adapters` names it."""
    try:
        parts = None if weights is None else [float(weight) for weight in weights.split(",")]
    except ValueError:
        raise ValueError(f"--weights takes numbers, such as 0.5,0.3,0.2; got {weights!r}") from None
    schedule: str | float | None = lambda_schedule
    with contextlib.suppress(ValueError):  # a name
        schedule = None if schedule is None else float(schedule)
    return {"weights": parts, "rank": rank, "density": density, "schedule": schedule, "seed": seed}

"""The commands of `slao` that work on saved adapters and models: merge, fold, compress and extract."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import Any

_METHODS = "linear, svd, ties, dare_ties, magmax, opcm, knots"


def add_commands(commands: Any) -> None:
    """Add their flags to the subparsers of `slao`. Each sets `options.act`, which runs it and returns the exit code."""
    merge = commands.add_parser("merge", help="merge saved PEFT adapters, oldest first, into one PEFT folder")
    merge.add_argument("adapters", nargs="+", metavar="FOLDER", help="as save_pretrained writes it")
    _add_out(merge)
    merge.add_argument("--method", default="slao", help=f"slao (default), {_METHODS}")
    _add_options(merge)
    merge.add_argument("--union", action="store_true", help="adapters may have other layers; an absent one is zero")
    merge.add_argument(
        "--same-base", action="append", metavar="A=B", help="A and B are names of one base (may be given several times)"
    )
    merge.add_argument("--base", metavar="FOLDER", help="the base model, which DoRA adapters need (svd alone)")
    merge.set_defaults(act=_merge)

    fold = commands.add_parser("fold", help="fold saved PEFT adapters, oldest first, into their base: a model folder")
    fold.add_argument("base", metavar="BASE", help="folder of the model, in safetensors")
    fold.add_argument("adapters", nargs="+", metavar="ADAPTER", help="as save_pretrained writes it")
    _add_out(fold)
    fold.add_argument("--method", help=f"of several: slao (default), {_METHODS}; svd without --rank is the exact sum")
    fold.add_argument(
        "--dtype", help="of all weights: float32, bfloat16, float16 or float64; each keeps its own by default"
    )
    fold.add_argument("--untie", action="store_true", help="write a tied head apart where only one of both is changed")
    fold.add_argument("--verify", metavar="PROMPT", help="compare the logits with those of base and adapters")
    _add_options(fold)
    fold.set_defaults(act=_fold)

    compress = commands.add_parser("compress", help="cut a saved PEFT adapter to a lower rank, layer by layer")
    compress.add_argument("adapter", metavar="FOLDER", help="as save_pretrained writes it")
    _add_out(compress)
    _add_limit(compress)
    compress.add_argument(
        "--one-rank", action="store_true", help="one rank for all layers, one that vLLM takes: 1, 8, 16, 32, 64, ..."
    )
    compress.set_defaults(act=_compress)

    extract = commands.add_parser("extract", help="make a LoRA of the difference of a full fine-tune and its base")
    extract.add_argument("tuned", metavar="TUNED", help="folder of the tuned model, or its safetensors file")
    extract.add_argument("base", metavar="BASE", help="the same of the model that it was tuned from")
    _add_out(extract)
    _add_limit(extract)
    extract.add_argument(
        "--beside",
        default="save",
        help="embeddings, norms, biases that differ: save (default; as modules_to_save) or leave (named, left out)",
    )
    extract.add_argument("--dtype", default="float32", help="of A and B: float32 (default), bfloat16, float16, float64")
    extract.set_defaults(act=_extract)


def _add_out(command: argparse.ArgumentParser) -> None:
    command.add_argument("-o", "--out", required=True, metavar="FOLDER", help="to be made; must not exist")


def _add_limit(command: argparse.ArgumentParser) -> None:
    command.add_argument("--rank", type=int, help="of every layer; with --keep, at most")
    command.add_argument("--keep", type=float, help="part of a layer's squared norm that its rank holds, such as 0.99")


def _add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--weights", help="comma-separated, one an adapter (not slao)")
    command.add_argument("--rank", type=int, help="of the result (svd, magmax, opcm, knots)")
    command.add_argument("--density", type=float, help="part of the entries that is kept (ties, dare_ties, knots)")
    command.add_argument("--lambda-schedule", help="inv_sqrt (default), inverse, adaptive or a number (slao)")
    command.add_argument("--seed", type=int, help="of dare_ties")
    command.add_argument(
        "--beside",
        help="what becomes of heads, biases, tokens, embeddings: keep (the last one's), first, or merge (averaged)",
    )


def _merge(options: argparse.Namespace) -> int:
    from .merging import merge_adapters

    given = {"union": options.union, "same_base": options.same_base or (), "base": options.base, **_options(options)}
    print(merge_adapters(options.adapters, options.out, options.method, **given, progress=True))
    return 0


def _fold(options: argparse.Namespace) -> int:
    from .merging import fold_model

    given = {"dtype": options.dtype, "untie": options.untie, "verify": options.verify, **_options(options)}
    folded = fold_model(options.base, options.adapters, options.out, options.method, **given, progress=True)
    print(folded)
    if folded.verified is None or folded.verified.passed:
        return 0
    print(f"slao: {folded.folder} was written, and does not answer as base and adapters do", file=sys.stderr)
    return 1


def _compress(options: argparse.Namespace) -> int:
    from .merging import compress_adapter

    given = {"rank": options.rank, "keep": options.keep, "one_rank": options.one_rank}
    print(compress_adapter(options.adapter, options.out, **given, progress=True))
    return 0


def _extract(options: argparse.Namespace) -> int:
    from .merging import extract_adapter

    given = {"rank": options.rank, "keep": options.keep, "beside": options.beside, "dtype": options.dtype}
    print(extract_adapter(options.tuned, options.base, options.out, **given, progress=True))
    return 0


def _options(options: argparse.Namespace) -> dict[str, Any]:
    """What the methods take, as `merge_adapters` names it."""
    try:
        weights = None if options.weights is None else [float(weight) for weight in options.weights.split(",")]
    except ValueError:
        raise ValueError(f"--weights takes numbers, such as 0.5,0.3,0.2; got {options.weights!r}") from None
    schedule: str | float | None = options.lambda_schedule
    with contextlib.suppress(ValueError):  # a name
        schedule = None if schedule is None else float(schedule)
    given: dict[str, Any] = {"weights": weights, "rank": options.rank, "density": options.density, "schedule": schedule}
    return given | {"seed": options.seed, "beside": options.beside}

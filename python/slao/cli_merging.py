"""The commands of `slao` that merge saved adapters, and fold them into their base."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import Any


def add_merge(commands: Any) -> None:
    merge = commands.add_parser("merge", help="merge saved PEFT adapters, oldest first, into one PEFT folder")
    merge.add_argument("adapters", nargs="+", metavar="FOLDER", help="as save_pretrained writes it")
    merge.add_argument("-o", "--out", required=True, metavar="FOLDER", help="to be made; must not exist")
    merge.add_argument("--method", default="slao", help=f"slao (default), {_METHODS}")
    _add_options(merge)


def add_fold(commands: Any) -> None:
    fold = commands.add_parser("fold", help="fold saved PEFT adapters, oldest first, into their base: a model folder")
    fold.add_argument("base", metavar="BASE", help="folder of the model, in safetensors")
    fold.add_argument("adapters", nargs="+", metavar="ADAPTER", help="as save_pretrained writes it")
    fold.add_argument("-o", "--out", required=True, metavar="FOLDER", help="to be made; must not exist")
    fold.add_argument("--method", help=f"of several: slao (default), {_METHODS}; svd without --rank is the exact sum")
    fold.add_argument(
        "--dtype", help="of all weights: float32, bfloat16, float16 or float64; each keeps its own by default"
    )
    fold.add_argument("--untie", action="store_true", help="write a tied head apart where only one of both is changed")
    fold.add_argument("--verify", metavar="PROMPT", help="compare the logits with those of base and adapters")
    _add_options(fold)


_METHODS = "linear, svd, ties, dare_ties, magmax, opcm, knots"


def _add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--weights", help="comma-separated, one an adapter (not slao)")
    command.add_argument("--rank", type=int, help="of the result (svd, magmax, opcm, knots)")
    command.add_argument("--density", type=float, help="part of the entries that is kept (ties, dare_ties, knots)")
    command.add_argument("--lambda-schedule", help="inv_sqrt (default), inverse, adaptive or a number (slao)")
    command.add_argument("--seed", type=int, help="of dare_ties")
    command.add_argument(
        "--beside", help="what becomes of heads, biases, tokens: keep (the last one's) or merge (averaged)"
    )


def merge(options: argparse.Namespace) -> int:
    from .merging import merge_adapters

    print(merge_adapters(options.adapters, options.out, options.method, **_options(options), progress=True))
    return 0


def fold(options: argparse.Namespace) -> int:
    from .merging import fold_model

    given = {"dtype": options.dtype, "untie": options.untie, "verify": options.verify, **_options(options)}
    folded = fold_model(options.base, options.adapters, options.out, options.method, **given, progress=True)
    print(folded)
    if folded.verified is None or folded.verified.passed:
        return 0
    print(f"slao: {folded.folder} was written, and does not answer as base and adapters do", file=sys.stderr)
    return 1


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

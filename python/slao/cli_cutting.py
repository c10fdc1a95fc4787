"""The commands that cut deltas to a rank: `slao compress` and `slao extract`; and what `slao merge` is told about
adapters that do not match."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any


def add_commands(commands: Any) -> None:
    """Their flags, into the subparsers of `slao`; each sets `options.act`, which runs it and returns what to print."""
    compress = commands.add_parser("compress", help="cut a saved PEFT adapter to a lower rank, layer by layer")
    compress.add_argument("adapter", metavar="FOLDER", help="as save_pretrained writes it")
    _common(compress, _compress)
    compress.add_argument(
        "--one-rank", action="store_true", help="one rank for all layers, one that vLLM takes: 1, 8, 16, 32, 64, ..."
    )
    extract = commands.add_parser("extract", help="make a LoRA of the difference of a full fine-tune and its base")
    extract.add_argument("tuned", metavar="TUNED", help="folder of the tuned model, or its safetensors file")
    extract.add_argument("base", metavar="BASE", help="the same of the model that it was tuned from")
    _common(extract, _extract)
    extract.add_argument(
        "--beside",
        default="save",
        help="embeddings, norms, biases that differ: save (default; as modules_to_save) or leave (named, left out)",
    )
    extract.add_argument("--dtype", default="float32", help="of A and B: float32 (default), bfloat16, float16, float64")


def add_merge_flags(merge: argparse.ArgumentParser) -> None:
    merge.add_argument("--union", action="store_true", help="adapters may have other layers; an absent one is zero")
    merge.add_argument(
        "--same-base", action="append", metavar="A=B", help="A and B are names of one base (may be given several times)"
    )
    merge.add_argument("--base", metavar="FOLDER", help="the base model, which DoRA adapters need (svd alone)")


def merge_flags(options: argparse.Namespace) -> dict[str, Any]:
    """As `merge_adapters` names them."""
    return {"union": options.union, "same_base": options.same_base or (), "base": options.base}


def _common(parser: argparse.ArgumentParser, act: Callable[[argparse.Namespace], str]) -> None:
    parser.add_argument("-o", "--out", required=True, metavar="FOLDER", help="to be made; must not exist")
    parser.add_argument("--rank", type=int, help="of every layer; with --keep, at most")
    parser.add_argument("--keep", type=float, help="part of a layer's squared norm that its rank holds, such as 0.99")
    parser.set_defaults(act=act)


def _compress(options: argparse.Namespace) -> str:
    from .merging.compress import compress_adapter

    given = {"rank": options.rank, "keep": options.keep, "one_rank": options.one_rank}
    return str(compress_adapter(options.adapter, options.out, **given, progress=True))


def _extract(options: argparse.Namespace) -> str:
    from .merging.extract import extract_adapter

    given = {"rank": options.rank, "keep": options.keep, "beside": options.beside, "dtype": options.dtype}
    return str(extract_adapter(options.tuned, options.base, options.out, **given, progress=True))

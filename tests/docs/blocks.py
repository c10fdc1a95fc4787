"""The code blocks of the documentation's pages, and what can be checked of each without running it."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
# Packages whose blocks are not run here, and what runs them.
FOREIGN = {
    "llamafactory": "tests/slao/test_llamafactory.py runs the callback in an environment that has it",
    "avalanche": "tests/slao/test_avalanche.py runs the plugin in an environment that has it",
    "deepspeed": "tests/slao/test_sharding.py runs ZeRO where it is installed",
    "vllm": "nothing here runs it",
}
# A fence, or a comment that a page hides: what its reader has done before.
_FENCE = re.compile(r"^(?:```(\w*)[^\n]*\n(.*?)^```|<!--(python)\n(.*?)^-->)", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    page: Path
    line: int  # of its first line of code
    language: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(DOCS)}:{self.line}"


def pages() -> list[Path]:
    return sorted(DOCS.rglob("*.md"))


def blocks(page: Path, language: str = "") -> list[Block]:
    """All of a page, or those of one language."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        inside = 2 if match[2] is not None else 4
        found.append(Block(page, text.count("\n", 0, match.start(inside)) + 1, match[inside - 1], match[inside]))
    return [block for block in found if language in ("", block.language)]


def imports(block: Block) -> Iterator[tuple[str, list[str]]]:
    """(module, names taken from it) of every import."""
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, [alias.name for alias in node.names]


def foreign(block: Block) -> list[str]:
    return sorted({module.split(".")[0] for module, _ in imports(block)} & FOREIGN.keys())


def check_own_imports(block: Block) -> None:
    """What a block takes from slao and slao_kernels is there."""
    for module, names in imports(block):
        if module.split(".")[0] not in ("slao", "slao_kernels"):
            continue
        found: Any = importlib.import_module(module)
        for name in names:
            assert hasattr(found, name), (block.where, f"{module} has no {name}")


def commands(block: Block) -> Iterator[list[str]]:
    """The command lines of a bash block, without comments, leading assignments and redirections."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0], re.DOTALL):
            words.pop(0)
        if words:
            yield words


def check_command(words: list[str]) -> None:
    """ValueError, or AssertionError, for a command line that would not be accepted. What is no command of this project
    is left alone, but for its name."""
    name, *rest = words
    if name == "slao":
        check_slao(rest)
    elif name == "torchrun":
        check_slao(rest[rest.index("slao.cli") + 1 :] if "slao.cli" in rest else ["info"])
    elif name == "make":
        targets = {word.split("=")[0] for word in rest if "=" not in word}
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^[\w .-]*\b{target}\b[\w .-]*:", makefile, re.MULTILINE) for target in targets), words
    elif name in ("python", "pytest"):
        files = [word for word in rest if re.match(r"(bench|tests|docs)/", word)]
        assert all((ROOT / word).exists() for word in files), words
    elif name == "pip":
        extras = re.findall(r"slao_kernels\[(\w+)\]", " ".join(rest)) + re.findall(r"^\.\[(\w+)\]$", " ".join(rest))
        known = (ROOT / "pyproject.toml").read_text()
        assert all(re.search(rf"^{extra} = \[", known, re.MULTILINE) for extra in extras), words
    else:
        assert name in ("accelerate", "axolotl", "curl", "sha256sum", "vllm", "git", "bash"), f"what is {name}?"


def check_slao(words: list[str]) -> None:
    """The command line as the program reads it, in the one place that knows how its parser is called; the settings of a
    run are completed and checked too, before any model or data."""
    import typer

    from slao.cli.app import app
    from slao.cli.training import settings_from

    group = typer.main.get_command(app)
    try:
        with group.make_context("slao", list(words)) as context:
            name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
            with command.make_context(name, rest, parent=context) as inner:
                if name == "run":
                    settings_from(inner.params)
    except typer.TyperException as error:
        raise ValueError(error.format_message()) from None

"""Every code block of the documentation: Python is run, page by page and in order; commands and settings are checked.

What a page finds around it (tiny models under real names, rows, a CPU) is conftest.py's `world`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import blocks
import pytest

PAGES = blocks.pages()
LANGUAGES = {"python", "bash", "yaml", "json", "text", "jinja"}


def _named(page: Path) -> str:
    return page.relative_to(blocks.DOCS).as_posix()


def _with(language: str) -> list[Path]:
    return [page for page in PAGES if blocks.blocks(page, language)]


# Page -> what it needs beside the library's own requirements.
NEEDS = {"recipes/quantised.md": "bitsandbytes", "recipes/trl.md": "trl"}
NOT_RUN = [block for page in PAGES for block in blocks.blocks(page, "python") if blocks.foreign(block)]


def test_the_pages_are_found_and_every_block_has_a_language():
    assert len(PAGES) > 25
    assert sum(len(blocks.blocks(page, "python")) for page in PAGES) > 25
    assert {block.where: block.language for page in PAGES for block in blocks.blocks(page)
            if block.language not in LANGUAGES} == {}  # fmt: skip


@pytest.mark.parametrize("page", _with("python"), ids=_named)
def test_python_runs(page, page_folder):
    """In one namespace, as who reads on would have it."""
    if package := NEEDS.get(_named(page)):
        pytest.importorskip(package, reason=f"{package} is not installed, which this page is about")
    names = {"__name__": "__main__"}
    for block in blocks.blocks(page, "python"):
        if not blocks.foreign(block):
            code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
            exec(code, names)


@pytest.mark.parametrize("block", NOT_RUN, ids=lambda block: block.where)
def test_python_of_other_packages(block):
    compile(block.text, block.where, "exec")
    blocks.check_own_imports(block)
    reasons = [f"{package}: {blocks.FOREIGN[package]}" for package in blocks.foreign(block)]
    pytest.skip(f"compiled and its imports found, not run: {'; '.join(reasons)}")


@pytest.mark.parametrize("page", _with("bash"), ids=_named)
def test_commands_are_accepted(page, page_folder):
    for block in blocks.blocks(page, "bash"):
        for words in blocks.commands(block):
            try:
                blocks.check_command(words)
            except ValueError as error:
                pytest.fail(f"{block.where}: {' '.join(words)}: {error}")


@pytest.mark.parametrize(
    "line",
    [
        "slao run --modell x",
        "slao merge a/ -o out/ --methode slao",
        "slao run --set train.bf17=true",
        "make nothing",
        "pip install slao_kernels[nothing]",
        "pyton x",
    ],
)
def test_a_wrong_command_is_found(line, page_folder):
    with pytest.raises((ValueError, AssertionError)):
        blocks.check_command(line.split())


@pytest.mark.parametrize("page", _with("yaml"), ids=_named)
def test_yaml(page, page_folder):
    """Settings of `slao run` pass its own check; accelerate knows the fields of its files; of Axolotl's, the plugin
    knows those that are ours."""
    from slao import settings
    from slao.reading import parse_yaml

    for block in blocks.blocks(page, "yaml"):
        given = parse_yaml(block.text, block.where)
        if isinstance(given, dict) and given.keys() & settings.DEFAULTS.keys():
            settings.complete(given)
            continue
        if "distributed_type" in given:
            from accelerate.commands.config.config_args import ClusterConfig

            assert given.keys() <= {field.name for field in dataclasses.fields(ClusterConfig)}, block.where
            continue
        ours = {key for key in given if key.startswith("slao_")}
        source = (blocks.ROOT / "python/slao/integrations/axolotl.py").read_text()
        assert all(f"\n    {key}: " in source for key in ours), (block.where, ours)


@pytest.mark.parametrize("page", _with("json"), ids=_named)
def test_json(page):
    for block in blocks.blocks(page, "json"):
        json.loads(block.text)

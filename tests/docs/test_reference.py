"""Pages and pictures that are written by a program are what it writes now."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"slao_docs_{name}", DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_figures():
    figures = _script("figures")
    assert {path.stem for path in figures.FOLDER.glob("*.svg")} == figures.FIGURES.keys()
    for name, draw in figures.FIGURES.items():
        drawn = (figures.FOLDER / f"{name}.svg").read_text(encoding="utf-8")
        assert drawn == draw().svg(), f"{name}.svg is an older one: python docs/figures.py"
        assert len(drawn) < 40_000


def test_the_weights_drawn_are_those_of_the_running_merge():
    figures = _script("figures")
    from slao.schedules import inv_sqrt

    merge = [0.0] * 10
    for i in range(1, 11):
        lam = inv_sqrt(i, None)  # type: ignore[arg-type]
        merge = [(1 - lam) * weight for weight in merge]
        merge[i - 1] += lam
    assert figures.weights_of(lambda i: i**-0.5, 10) == pytest.approx(merge, rel=1e-12)


def test_settings_page():
    pages = _script("reference_pages")
    assert (pages.FOLDER / "settings.md").read_text(encoding="utf-8") == pages.settings(), (
        "reference/settings.md is an older one: python docs/reference_pages.py"
    )


def test_commands_page():
    """Word by word: Pythons break and order a parser's lines differently."""
    pages = _script("reference_pages")

    def words(page: str) -> dict[str, list[str]]:
        sections = page.split("\n## ")[1:]
        return {text.split("\n")[0]: sorted(set(re.findall(r"[\w=./-]+", text))) for text in sections}

    written, now = words((pages.FOLDER / "commands.md").read_text(encoding="utf-8")), words(pages.commands())
    assert written == now, "reference/commands.md is an older one: python docs/reference_pages.py"
    assert "--preset" in now["slao run"]


def test_flags_that_the_settings_page_names_are_flags():
    pages = _script("reference_pages")
    named = set(re.findall(r"--[a-z-]+", " ".join(pages._MEANING.values()))) - {"--runs"}
    assert named <= set(re.findall(r"--[a-z-]+", pages.help_of("run")))


def test_every_public_name_has_its_entry():
    import slao
    import slao.merging
    import slao_kernels

    written = set(re.findall(r"^::: (\S+)$", "".join(page.read_text() for page in DOCS.glob("reference/*.md")), re.M))
    public = {f"{module.__name__}.{name}" for module in (slao, slao_kernels, slao.merging) for name in module.__all__}
    assert public - written == {"slao.merging.METHODS"}  # a table of names

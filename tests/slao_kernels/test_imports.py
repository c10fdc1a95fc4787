"""Imports point downwards only: no circle within a package, no slao below slao, no PEFT in the ops, no Python and no
torch in the C++."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"slao_kernels": ROOT / "slao_kernels", "slao": ROOT / "python" / "slao"}


def modules(package: str) -> dict[str, Path]:
    """Name -> file of every module, packages by their __init__.py."""
    folder = PACKAGES[package]
    found = {}
    for file in sorted(folder.rglob("*.py")):
        parts = [package, *file.relative_to(folder).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def statements(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import, those inside functions too; not what only a type checker runs."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from statements(node.orelse)
        else:
            for field in ("body", "orelse", "finalbody", "handlers", "cases"):
                yield from statements(getattr(node, field, []))


def imported(name: str, file: Path, known: dict[str, Path]) -> set[str]:
    """The modules that one module names: of `from . import a`, a where that is a module, else the package itself."""
    found = set()
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in statements(ast.parse(file.read_text()).body):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            continue
        base = node.module or ""
        if node.level:
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*above, *([node.module] if node.module else [])])
        for alias in node.names:
            whole = f"{base}.{alias.name}"
            found.add(whole if whole in known or alias.name == "_C" else base)
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circle(package):
    known = modules(package)
    assert len(known) > 30
    graph = {name: imported(name, file, known) & known.keys() - {name} for name, file in known.items()}
    assert sum(map(len, graph.values())) > len(known)  # it does read them
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_kernels_do_not_know_slao():
    for name, file in modules("slao_kernels").items():
        assert not [other for other in imported(name, file, {}) if other.split(".")[0] == "slao"], name


def test_ops_import_nothing_but_torch_and_each_other():
    """What a hub build takes (test_hub_layer.py), by relative imports: patching and its classes know PEFT."""
    parts = ("slao_kernels.dispatch", "slao_kernels.native", "slao_kernels.ops")
    files = [file for name, file in modules("slao_kernels").items() if name.startswith(parts)]
    assert len(files) > 25
    allowed = {*sys.stdlib_module_names, "torch", "triton", "numpy"}
    outside = {"patching", "layers", "eligibility", "injection", "plan", "extension"}
    for file in files:
        for node in statements(ast.parse(file.read_text()).body):
            names = [alias.name.split(".")[0] for alias in node.names]
            base = (getattr(node, "module", None) or "").split(".")[0]
            if getattr(node, "level", 0):
                assert outside.isdisjoint([base, *names]), (file, ast.unparse(node))
            else:
                assert allowed.issuperset([base] if base else names), (file, ast.unparse(node))


def test_the_cpp_knows_neither_python_nor_torch():
    """Outside of the bindings: bindings*, and tables.h, which they alone include."""
    files = [file for file in (ROOT / "csrc").rglob("*") if file.suffix in (".cpp", ".cu", ".h", ".cuh", ".hpp")]
    assert len(files) > 15
    python = re.compile(r'#\s*include\s*[<"](torch|ATen|c10|Python\.h|pybind11|([^">]*/)?(bindings\w*|tables)\.h)')
    found = {file.name for file in files if python.search(file.read_text())}
    assert "bindings.cpp" in found
    assert not {name for name in found if not name.startswith("bindings")} - {"tables.h"}

"""What is shipped: one version everywhere, an sdist of all that is tracked, and a build that needs no compiler."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

import slao_kernels

ROOT = Path(__file__).resolve().parents[2]
# What a checkout has beside what a build and `make test` read.
REPOSITORY = (".github/", ".gitignore", ".gitattributes")


def setup(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_one_version():
    version = slao_kernels.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    heading = re.search(r"^## (\S+) \((.+)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heading is not None
    assert heading[1] == version
    assert heading[2] == "unreleased" or re.fullmatch(r"\d{4}-\d\d-\d\d", heading[2])


def test_citation_names_both_papers():
    """CITATION.cff has what version 1.2.0 of the format requires, and cites what the two methods implement."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "type", "references"} <= cited.keys()
    assert all({"type", "title", "authors"} <= reference.keys() for reference in cited["references"])
    urls = [reference["url"] for reference in cited["references"]]
    assert urls == ["https://arxiv.org/abs/2512.23017", "https://arxiv.org/abs/2502.17920"]


def test_sdist_holds_what_is_tracked(tmp_path):
    """Every tracked file but the repository's own, and nothing else; named by the one version."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout: nothing says which files are tracked")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tracked = {name for name in listed.split("\0") if name and (ROOT / name).exists()}
    arguments = ["-q", "egg_info", "--egg-base", str(tmp_path), "sdist", "--formats=tar", "--dist-dir", str(tmp_path)]
    done = setup(*arguments)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar")
    assert archive.name == f"slao_kernels-{slao_kernels.__version__}.tar"
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames() if not tar.getmember(name).isdir()}
    generated = {name for name in names if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    expected = {name for name in tracked if not name.startswith(REPOSITORY)}
    assert "PKG-INFO" in generated
    assert names - generated == expected


@pytest.mark.exhaustive
def test_without_a_compiler(tmp_path):
    """The build warns in one line and makes nothing; what is installed then says so, runs, and compiles."""
    tree = tmp_path / "tree"
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        tree.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tree)
    for name in ("slao_kernels", "csrc", "python"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    built = setup("-q", "build_ext", "--inplace", cwd=tree, CXX="/bin/false", SLAO_KERNELS_BUILD="auto")
    assert built.returncode == 0, built.stderr
    warnings = [line for line in built.stderr.splitlines() if "slao_kernels" in line and "WARNING" in line]
    assert warnings == [
        "WARNING: slao_kernels: the native extension could not be built (no working C++ compiler (/bin/false)); "
        "the package works without it, on torch's own operations"
    ]
    assert not list(tree.rglob("_C*.so"))
    wanted = setup("-q", "build_ext", "--inplace", cwd=tree, CXX="/bin/false", SLAO_KERNELS_BUILD="cpu")
    assert wanted.returncode != 0
    assert "the native extension could not be built: no working C++ compiler (/bin/false)" in wanted.stderr

    program = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]  # has a core elsewhere
import torch
from slao_kernels import __main__, lora_linear
print(__main__.describe())
tensors = [torch.randn(*shape, dtype=torch.float64) for shape in [(5, 7), (3, 7), (3,), (2, 7), (3, 2)]]
x, W, b, A, B = tensors
compiled = torch.compile(lora_linear, backend="aot_eager", fullgraph=True)
for run in (lora_linear, compiled):
    print((run(x, W, b, A, B, 0.5) - (x @ W.T + b + 0.5 * x @ A.T @ B.T)).abs().max().item() < 1e-14)
"""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    environment.pop("SLAO_KERNELS_BACKEND", None)
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    *table, eager, compiled = done.stdout.splitlines()
    chosen = {line.split()[0]: line.split()[1] for line in table if line.startswith("  ")}
    assert chosen["lora_linear"] == "eager"
    assert {chosen[op] for op in ("orthogonal_init", "scaled_merge", "fold", "exact_fold")} == {"reference"}
    missing = "native: the extension was not built (no C++ compiler at install, or SLAO_KERNELS_BUILD=0)"
    assert sum(missing in line for line in table) == 5, done.stdout
    assert (eager, compiled) == ("True", "True")


def test_every_wheel_is_tested_on_the_pythons_that_are_promised():
    """[tool.cibuildwheel] builds for what requires-python and the tests of CI name."""
    if importlib.util.find_spec("tomllib") is None:
        pytest.skip("Python 3.10 reads no TOML by itself")
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["requires-python"] == ">=3.10"
    wheels = project["tool"]["cibuildwheel"]
    assert wheels["build"] == ["cp310-*", "cp311-*", "cp312-*", "cp313-*"]
    assert "--exclude libgomp.so.1" in wheels["linux"]["repair-wheel-command"]
    for command in wheels["test-command"]:
        for script in re.findall(r"\{project\}/(\S+)", command):
            assert (ROOT / script).is_file()

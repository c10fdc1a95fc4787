"""Fixtures of the tests of `slao`: folders with a saved tiny model or stream, and the server that runs commands in
forks.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parent))  # coarse, fuzz_twins and made_results, by name


@pytest.fixture(scope="session")
def saved_bert(tiny, tmp_path_factory) -> Path:
    return tiny.save("bert", tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="session")
def saved_llama(tiny, tmp_path_factory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def stream_folder(tiny, tmp_path_factory) -> Path:
    """Two tasks, eight training rows each, for --stream jsonl."""
    return tiny.write_stream(tiny.stream(tasks=2), tmp_path_factory.mktemp("streams") / "tiny")


class Server:
    """server.py as a process, which forks what it runs; `run` answers when all of it has ended."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().rstrip("\n")

    def run(self, argv: list[str], folder: Path, **job: Any) -> dict[str, Any]:
        """A `slao` command; the job is one of server.py's."""
        (answer,) = self.run_all([{"argv": argv, "folder": folder, **job}])
        return answer

    def run_all(self, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """All at the same time."""
        assert self._process.stdin is not None
        for job in jobs:
            Path(job["folder"]).mkdir(parents=True, exist_ok=True)
        print(json.dumps(jobs, default=str), file=self._process.stdin, flush=True)
        answers: list[dict[str, Any]] = json.loads(self._line())
        return answers

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    if not hasattr(os, "fork"):
        pytest.skip("this test forks, and may send POSIX signals")
    started = Server()
    yield started
    started.close()


@pytest.fixture(autouse=True)
def _coarse(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Coarse figures, but where a test looks at them."""
    if request.path.stem not in (
        "test_report_page",
        "test_report_figures",
        "test_similarity",
    ) and importlib.util.find_spec("matplotlib"):
        import coarse

        coarse.figures(monkeypatch.setattr)


@pytest.fixture(autouse=True, scope="session")
def _light() -> Iterator[None]:
    """One thread: nothing here is large enough for two, and on a busy machine the second only makes the first wait.
    And what the imports made is never looked at again by the collector, which transformers' Trainer runs once a task.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(before)

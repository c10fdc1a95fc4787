"""After a test on a GPU: whatever it left running is waited for, so that its failure is its own; and a process whose
context is lost ends, since there nothing but failures would follow."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _wait_for_the_accelerator(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if request.node.get_closest_marker("gpu") is None or not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
        return
    except RuntimeError as error:  # torch.AcceleratorError is one
        first = error
    try:
        torch.cuda.synchronize()
    except RuntimeError:  # it stays: an illegal access or a trap, after which CUDA does nothing more in this process
        end(f"{request.node.nodeid}: {str(first).splitlines()[0]}: the device is lost to this process, which ends here")
    raise first


def end(why: str) -> None:
    """A worker of xdist is replaced, its test counts as failed; a session of one process ends, its files written."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        pytest.exit(why, returncode=3)
    print(why, file=sys.__stderr__, flush=True)
    os._exit(3)

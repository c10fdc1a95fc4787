"""Every method × threads × places in memory: a run that was saved and loaded ends with the bits of one that was not.

What safetensors reads is the mapped file: row by row, from where the header ends. What a method keeps may come out of
LAPACK, or of a clone, column by column. Products of the same numbers differ in either.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import slao_kernels
from slao.methods import METHODS, Method, make_method
from slao.methods.base import STATE_FILE
from slao_kernels.testing import tiny_model

# (bytes past a multiple of 64 at which the model's weights begin, and at which the tensors of the state's file do;
# whether A and B lie column by column, so that their plain clones do too; threads).
PLACES = [(4, 40, False, 1), (0, 40, True, 2)]
MORE = [(0, 8, False, 1), (20, 24, False, 1), (60, 56, False, 2), (0, 8, True, 1)]
# Wide enough that two threads share a product, and that its blocks end in odd rests.
IDS = (torch.arange(4 * 24).view(4, 24) * 7) % 120 + 3


@pytest.fixture
def threads(place: tuple[int, int, bool, int]) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(place[3])
    yield
    torch.set_num_threads(before)


def placed(tensor: Tensor, offset: int) -> Tensor:
    """A copy that begins `offset` bytes past a multiple of 64, inside a larger storage."""
    room = torch.empty(tensor.numel() + 32, dtype=tensor.dtype)
    start = (offset - room.data_ptr()) % 64 // tensor.element_size()
    found = room[start : start + tensor.numel()].view(tensor.shape)
    assert found.data_ptr() % 64 == offset
    return found.copy_(tensor)


def make(name: str, offset: int, columns: bool, seed: int = 0) -> Method:
    model = tiny_model("llama", hidden_size=160, intermediate_size=200)
    torch.manual_seed(seed)
    model = get_peft_model(model, LoraConfig(r=6, target_modules=["q_proj", "v_proj", "down_proj"]))
    slao_kernels.patch(model)
    for parameter in model.parameters():
        parameter.data = placed(parameter.detach(), offset)
    method = make_method(name, model)
    for pair in method.pairs if columns else ():
        for parameter in pair.parameters:
            parameter.data = parameter.data.T.contiguous().T
    return method


def task(method: Method, index: int) -> None:
    """Two steps of Adam."""
    ids = (IDS + 11 * index) % 120 + 3
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    method.observe([batch])
    method.begin_task(str(index))
    optimizer = torch.optim.Adam([p for p in method.model.parameters() if p.requires_grad], 0.01)
    for _ in range(2):
        loss = method.model(ids, labels=ids).loss
        penalty = method.penalty()
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        optimizer.zero_grad()
    method.observe([batch])
    method.end_task()


def moved(path: Path, address: int) -> None:
    """Write the state at `path` anew with a longer header: its tensors begin `address` bytes past a multiple of 64."""
    with safe_open(path, framework="pt") as file:
        tensors, header = {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata()  # noqa: SIM118
    for spaces in range(0, 64, 8):  # the format fills its header up to a multiple of 8
        save_file(tensors, path, {**header, "unused": " " * spaces})
        if (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 64 == address:
            return
    raise AssertionError(f"no header ends at {address}")


def bits(method: Method) -> dict[str, bytes]:
    """Everything that the method would save, and the merged logits."""
    tensors = method._live_tensors() | method._state()
    with method.merged(), torch.no_grad():
        tensors["logits"] = method.model(IDS).logits
    return {key: tensor.detach().contiguous().numpy().tobytes() for key, tensor in tensors.items()}


def layout(method: Method) -> dict[str, tuple[tuple[int, ...], int]]:
    """How what the method keeps lies in memory."""
    return {key: (value.stride(), value.data_ptr() % 64) for key, value in method._state().items()}


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    "place", [*PLACES, *(pytest.param(each, marks=pytest.mark.exhaustive) for each in MORE)], ids=str
)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_same_bits(name, place, tmp_path):
    offset, address, columns, _ = place
    whole = make(name, offset, columns)
    task(whole, 0)
    task(whole, 1)
    whole.save(tmp_path)
    kept = layout(whole)
    task(whole, 2)
    moved(tmp_path / STATE_FILE, address)
    resumed = make(name, offset, columns, seed=5)
    before = bits(resumed)
    resumed.load(tmp_path)
    assert bits(resumed) != before
    assert layout(resumed) == kept
    task(resumed, 2)
    expected, found = bits(whole), bits(resumed)
    assert [key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)] == []
    assert (resumed.names, resumed.lambdas) == (whole.names, whole.lambdas)

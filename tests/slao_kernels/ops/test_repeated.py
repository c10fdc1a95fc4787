"""Lists that come again: not looked at a second time, computed anew each time, and looked at when anything differs."""

from __future__ import annotations

import pytest
import torch
from on_lists import Seen
from torch import Tensor

import slao_kernels
from slao_kernels import dispatch
from slao_kernels.ops import fold, orthogonal_init, repeated, scaled_merge

BACKENDS = [name for name in ("native", "triton", "reference") if dispatch.why_not("fold", name, "cpu") is None]


class Op:
    """A call of one op on lists of its own, and the same by the reference."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.name, self.module = name, {"fold": fold, "init": orthogonal_init, "merge": scaled_merge}[name]
        self.As = [torch.randn(4, 24 + i) for i in range(5)]
        self.Bs = [torch.randn(16, 4) for _ in range(5)]
        self.out = [torch.randn(16, 24 + i) for i in range(5)]

    @property
    def written(self) -> list[Tensor]:
        return {"fold": self.out, "init": self.As, "merge": self.out}[self.name]

    def run(self, backend: str, factor: float = 0.5) -> None:
        if self.name == "fold":
            slao_kernels.fold_(self.out, self.As, self.Bs, factor, backend=backend)
        elif self.name == "init":
            slao_kernels.orthogonal_init_(self.As, keep=[torch.empty_like(A) for A in self.As], backend=backend)
        else:
            tuned = [B @ A for A, B in zip(self.As, self.Bs, strict=True)]
            slao_kernels.scaled_merge_(self.out, tuned, factor, backend=backend)

    def expected(self, factor: float = 0.5) -> list[Tensor]:
        with dispatch.use_backend("reference"):
            other = Op(self.name)
            other.As, other.Bs, other.out = ([t.clone() for t in ts] for ts in (self.As, self.Bs, self.out))
            other.run("auto", factor)
        return other.written


@pytest.fixture
def looked(monkeypatch) -> list[str]:
    """The ops whose lists were looked at since."""
    found: list[str] = []
    for module in (fold, orthogonal_init, scaled_merge):
        check = module._check
        monkeypatch.setattr(module, "_calls", repeated.Repeated())
        name = module.__name__.rpartition(".")[2]
        monkeypatch.setattr(module, "_check", lambda *args, check=check, name=name: (found.append(name), check(*args)))
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["fold", "init", "merge"])
def test_every_call_computes_anew(name, backend):
    """With other values in the same memory, and with another factor."""
    op = Op(name)
    for factor in (0.5, 0.5, 0.25):
        for tensor in (*op.As, *op.Bs):
            tensor.copy_(torch.randn(tensor.shape))
        expected = op.expected(factor)
        op.run(backend, factor)
        for found, exact in zip(op.written, expected, strict=True):
            torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)


def test_the_same_lists_are_looked_at_once(looked):
    op = Op("fold")
    tuned, kept = [W.clone() for W in op.out], [A.clone() for A in op.As]
    for factor in (0.5, 0.25, 0.125):
        slao_kernels.fold_(op.out, op.As, op.Bs, factor)
        slao_kernels.scaled_merge_(op.out, tuned, factor)  # the other ops in between do not matter
        slao_kernels.orthogonal_init_(op.As, keep=kept)
    assert sorted(looked) == ["fold", "orthogonal_init", "scaled_merge"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_lists_are_remembered_with_their_tables(backend, looked, monkeypatch):
    """As many as one CUDA graph may hold; of more, the latest."""
    if backend != "reference":
        module, built = dispatch.implementation("fold", backend), []
        tables = module.tables
        monkeypatch.setattr(module, "tables", lambda *lists: (built.append(1), tables(*lists))[1])
    ops = [Op("fold") for _ in range(repeated._MOST + 1)]
    for op in [*ops[1:], *ops[1:], ops[0], ops[1]]:
        op.run(backend)
    assert looked == ["fold"] * (len(ops) + 1)
    assert backend == "reference" or len(built) == len(ops) + 1


def test_a_factor_that_is_none_is_refused_after_good_ones(looked):
    op = Op("fold")
    slao_kernels.fold_(op.out, op.As, op.Bs, 0.5)
    slao_kernels.scaled_merge_(op.out, op.out, 0.5)
    before = [W.clone() for W in op.out]
    with pytest.raises(ValueError, match=r"scalings\[0\]: is nan"):
        slao_kernels.fold_(op.out, op.As, op.Bs, float("nan"))
    with pytest.raises(ValueError, match=r"lam\[0\]: is 1.5"):
        slao_kernels.scaled_merge_(op.out, op.out, 1.5)
    with pytest.raises(ValueError, match="lengths differ"):
        slao_kernels.fold_(op.out, op.As, op.Bs, [0.5] * 4)
    assert all(torch.equal(W, old) for W, old in zip(op.out, before, strict=True))


def move_between(op: Op) -> None:
    """The lists one after the other are the same tensors; what is A's and what B's is not."""
    op.As, op.Bs = [*op.As, op.Bs[0]], op.Bs[1:]


CHANGES = {
    "another shape in the same memory": lambda op: op.As[0].t_(),
    "another tensor": lambda op: op.As.__setitem__(0, torch.randn(5, 24)),
    "an overlap": lambda op: op.As.__setitem__(0, op.out[0][:4, :24]),
    "no tensor": lambda op: op.As.__setitem__(0, "A"),
    "from one list to the other": move_between,
    "into another's memory": lambda op: setattr(op.As[0], "data", op.out[0].data[:4, :24]),
    "one fewer": lambda op: op.As.pop(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_is_looked_at(change):
    op = Op("fold")
    for _ in range(2):
        slao_kernels.fold_(op.out, op.As, op.Bs, 0.5)
    CHANGES[change](op)
    before = [W.clone() for W in op.out]
    for _ in range(2):  # what was refused is not remembered as good
        with pytest.raises(ValueError, match="Nothing was written"):
            slao_kernels.fold_(op.out, op.As, op.Bs, 0.5)
    assert all(torch.equal(W, old) for W, old in zip(op.out, before, strict=True))


ALLOWED = {
    "memory": lambda A: torch.randn(A.shape),
    "strides": lambda A: torch.randn(A.t().shape).t(),
    "dtype": lambda A: A.double(),
}


@pytest.mark.parametrize("change", ALLOWED)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_tensors_of_other_data(backend, change, looked):
    op = Op("fold")
    op.run(backend)
    op.run(backend)
    op.As[0].data = ALLOWED[change](op.As[0])
    expected = op.expected()
    seen = len(looked)
    op.run(backend)
    assert len(looked) == seen + 1
    for found, exact in zip(op.written, expected, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)


def test_where_somebody_looks_on_the_operator_is_called(looked):
    """A dispatch mode has to see it, so nothing is taken from the call before."""
    op = Op("init")
    slao_kernels.orthogonal_init_(op.As)
    with Seen() as seen:
        slao_kernels.orthogonal_init_(op.As)
    assert "slao_kernels::orthogonal_init_" in seen.names
    assert looked == ["orthogonal_init"] * 2


def test_a_negated_view_is_not_taken_for_its_memory():
    """conj().imag of the memory, shape and strides of a call before, all of which hold the opposite."""
    whole = torch.randn(3, dtype=torch.complex64)
    target = torch.zeros(3)
    slao_kernels.scaled_merge_([target], [whole.imag], 1.0)
    with pytest.raises(ValueError, match=r"finetuned\[0\]: is a view that holds the negative of its memory"):
        slao_kernels.scaled_merge_([target], [whole.conj().imag], 1.0)
    assert torch.equal(target, whole.imag)


def test_what_is_no_number_or_no_tensor_is_said_in_one_line():
    one = torch.ones(1)
    for lam in (10**400, None, [torch.ones(2)], "x"):
        with pytest.raises(ValueError, match="lam is neither a number nor a list of numbers"):
            slao_kernels.scaled_merge_([one], [one.clone()], lam)
    for A in (None, 1.5, torch.ones(1, 2, device="meta"), torch.ones(1, 2).to_sparse()):
        with pytest.raises(ValueError, match="lora_linear: A (is|has)"):
            slao_kernels.lora_linear(torch.ones(2), torch.ones(3, 2), None, A, torch.ones(3, 1), 1.0)
    with torch.inference_mode():
        target = torch.zeros(1)
    with pytest.raises(ValueError, match="was made in inference mode"):
        slao_kernels.scaled_merge_([target], [one], 1.0, backend="reference")
    with pytest.raises(ValueError, match="dtype: is torch.float8_e4m3fn"):
        slao_kernels.weighted_merge([([torch.ones(1, 2)], [torch.ones(3, 1)], 1.0)], [1.0], dtype=torch.float8_e4m3fn)

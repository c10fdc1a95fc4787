"""SLAO with two processes against one: DDP, FSDP2, FSDP1. The processes run tests/slao/ranks, all cases at once."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from slao import SLAO
from slao.methods import METHODS
from slao_kernels.testing import error_ratio, tiny_model

RANKS = 2
# A gradient that is summed in two halves is rounded elsewhere, which four steps and two merges enlarge. How much, one
# process shows: by how far its fp32 is from fp64 (2e-6 in the worst tensor, whatever the settings of MKL and ATen).
# The ranks may be so many times as far from it: another draw of the same errors. A rank alone would be off by 1e-1.
FACTOR = 10
WRAPS = ("ddp", "fsdp2_blocks", "fsdp2_leaves", "fsdp2_accelerate", "fsdp1", "fsdp1_flat")
# Why every adapted layer runs PEFT's own forward there; None: all are fused.
UNIT = "lora_A is an FSDP unit of its own ({}) and has to be called; FSDP2 over whole blocks (fully_shard(block)) "
UNIT += "leaves it fused"
FALLBACK = {
    "fsdp2_leaves": UNIT.format("FSDPLinear"),
    "fsdp1": UNIT.format("FullyShardedDataParallel"),
    "fsdp1_flat": UNIT.format("FullyShardedDataParallel"),
    "zero3": "lora_A's weight is partitioned by DeepSpeed ZeRO-3",
}
PACKAGE = Path(__file__).with_name("ranks")


def start(server: Any, folder: Path, cases: list[str]) -> None:
    """Run the cases in RANKS processes; their output is shown if one fails."""
    answers = server.run_all(
        [
            {"module": "ranks", "argv": [rank, RANKS, folder, *cases], "folder": folder / f"log.{rank}"}
            for rank in range(RANKS)
        ]
    )
    assert [answer["code"] for answer in answers] == [0] * RANKS, "\n".join(
        answer["out"] + answer["err"] for answer in answers
    )


@pytest.fixture(scope="module")
def ranks() -> SimpleNamespace:
    """The names in tests/slao/ranks (test folders are no packages, so they cannot be imported by name)."""
    before = list(sys.path)
    sys.path.append(str(PACKAGE.parent))
    try:
        parts = [importlib.import_module(f"ranks.{name}") for name in ("lab", "wraps", "cases", "zero")]
    finally:
        sys.path[:] = before
    return SimpleNamespace(**{name: value for part in parts for name, value in vars(part).items()})


@pytest.fixture(scope="module")
def folder(ranks, server, tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("ranks")
    start(server, made, list(ranks.CASES))
    return made


@pytest.fixture(scope="module")
def one(ranks) -> dict[str, Any]:
    return ranks.reference()


@pytest.fixture(scope="module")
def bound(ranks, one) -> float:
    """How far a tensor may be from that of one process."""
    return FACTOR * rounding(one["weights"], ranks.reference(torch.float64)["weights"])


def rounding(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """The error of the tensor that is furthest off."""
    assert found.keys() == exact.keys()
    return max(error_ratio(found[name], value) for name, value in exact.items())


def results(folder: Path, case: str) -> list[dict[str, Any]]:
    """What each rank left; an error there is one here."""
    found = [torch.load(folder / f"{case}.{rank}.pt") for rank in range(RANKS)]
    for rank, each in enumerate(found):
        assert "error" not in each, f"rank {rank}: {each['error']}"
    return found


def check_as_one(found: list[dict[str, Any]], one: dict[str, Any], bound: float, ranks: SimpleNamespace) -> None:
    """Adapters and merge as in one process, bitwise alike on all ranks; merged() leaves no trace."""
    for each in found:
        assert rounding(each["weights"], one["weights"]) <= bound
        assert error_ratio(each["logits"], one["logits"]) <= bound
        assert error_ratio(each["trained_logits"], one["trained_logits"]) <= bound
        assert ranks.equal(each["weights"], found[0]["weights"])
        assert ranks.equal(each["weights"], each["after"])


def test_the_reference_can_tell(one, bound):
    """Merged and trained weights, and what the model says with them, differ by far more than the bound."""
    assert bound <= 1e-4
    merged = [name for name in one["weights"] if name.endswith("B.merged")]
    assert len(merged) == 6
    for name in merged:
        assert error_ratio(one["weights"][name], one["weights"][name.removesuffix(".merged")]) > 1e-2
    assert error_ratio(one["logits"], one["trained_logits"]) > 1e-3


def check_fallbacks(found: dict[str, Any], one: dict[str, Any], reason: str | None) -> None:
    """Fused where the layer's forward sees plain tensors, else PEFT's own forward and the reason in the report."""
    assert found["fused"] == 6
    if reason is None:
        assert (found["fallbacks"], found["notes"]) == ({}, {})
        assert found["operators"] == one["operators"]
        assert sum(one["operators"].values()) > 0
    else:
        assert len(found["fallbacks"]) == 6
        assert set(found["fallbacks"].values()) == {reason}
        assert found["operators"] == {}


@pytest.mark.parametrize("case", [*WRAPS, "patched_late", "trainer", "callback"])
def test_two_tasks(case, folder, one, bound, ranks):
    found = results(folder, case)
    check_as_one(found, one, bound, ranks)
    for each in found:
        check_fallbacks(each, one, FALLBACK.get(case))
        assert each.get("skipped", {}) == {}


def test_every_method_over_ddp(folder, ranks, tmp_path):
    """In the Trainer and the callback: cores, frozen pairs, merges and spaces are those of one process."""
    found = [
        {**each, "sdlora": results(folder, "sdlora")[rank]} for rank, each in enumerate(results(folder, "every_method"))
    ]
    one, exact = (
        {**ranks.every_method(0, 1, tmp_path, dtype), "sdlora": ranks.sdlora(0, 1, tmp_path, dtype)}
        for dtype in (torch.float32, torch.float64)
    )
    assert found[0].keys() == one.keys() == METHODS.keys() - {"ewc"}
    for name, expected in one.items():
        assert ranks.equal(found[0][name], found[1][name]), name
        state, alone, right = (ranks.decided(name, each) for each in (found[0][name], expected, exact[name]))
        assert rounding(state, alone) <= FACTOR * rounding(alone, right) <= 1e-2, name


def test_ewcs_information_is_the_mean_over_the_ranks(folder, ranks):
    first, second = results(folder, "fisher")
    assert ranks.equal(first["all"], second["all"])
    assert not ranks.equal(first["mine"], second["mine"])
    for key, value in first["all"].items():
        assert error_ratio(value, (first["mine"][key].double() + second["mine"][key].double()) / 2) <= 1e-6  # fp32
    assert any(value.any() for value in first["all"].values())


def test_the_trainer_wraps(folder):
    for found in [*results(folder, "trainer"), *results(folder, "callback")]:
        assert "DistributedDataParallel" in found["wrapped"]


@pytest.fixture(scope="module")
def deepspeed_folder(ranks, server, tmp_path_factory) -> Path:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    made = tmp_path_factory.mktemp("deepspeed")
    start(server, made, list(ranks.MORE))
    return made


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("case", ["zero", "kept", "trainer"])
def test_deepspeed(case, stage, deepspeed_folder, one, bound, ranks):
    """An engine a task, one engine for all, and transformers' Trainer, whose engine is older than the task."""
    found = results(deepspeed_folder, f"{case}{stage}")
    check_as_one(found, one, bound, ranks)
    for each in found:
        check_fallbacks(each, one, FALLBACK.get(f"zero{stage}"))
        assert "DeepSpeedEngine" in each.get("wrapped", ["DeepSpeedEngine"])
    if case == "zero":
        alone = SLAO(ranks.make())
        alone.load(deepspeed_folder / f"zero{stage} of rank 0")
        assert ranks.equal(ranks.weights(alone), found[0]["weights"])
        assert not (deepspeed_folder / f"zero{stage} of rank 1").exists()


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeeds_fp32_copies_follow_what_a_task_writes_and_keep_their_digits(stage, deepspeed_folder):
    for found in results(deepspeed_folder, f"sixteen_bits{stage}"):
        assert len(found["trained"]) == 6
        for trained, loaded, begun, now in zip(
            *(found[key] for key in ("trained", "loaded", "begun", "now")), strict=True
        ):
            assert torch.equal(loaded[0], trained[0])
            assert torch.equal(loaded[1], trained[1])
            assert error_ratio(begun[0], trained[0]) > 1e-1
            assert torch.equal(begun[0], now[0])
            assert torch.equal(begun[1], trained[1])
            assert not torch.equal(begun[1], now[1])  # B has digits that bf16 has no room for


def test_deepspeeds_optimizer_of_16_bit_models_without_zero_is_refused(deepspeed_folder):
    """Its copies cannot be found from the parameters."""
    for found in results(deepspeed_folder, "without_zero"):
        assert found.pop("task") == 0
        for message in found.values():
            assert message.startswith("ValueError: DeepSpeed's FP16_UnfusedOptimizer (a 16-bit model without ZeRO)")
            assert "stage to 1 or higher, or make the method on the bare model and a new engine" in message


def test_the_operations_refuse_shards(folder):
    """A DTensor's own address is none: reading from it ends the process."""
    for found in results(folder, "refusals"):
        problem = "is a DTensor, whose memory is elsewhere; gather it first (slao_kernels.sharding.whole)"
        assert found["init"].startswith(f"ValueError: orthogonal_init_: As[0]: {problem}")
        assert found["merge"].startswith(f"ValueError: scaled_merge_: finetuned[0]: {problem}")
        assert found["fold"].startswith(f"ValueError: fold_: weights[0]: {problem}")
        assert found["linear"].startswith(f"ValueError: lora_linear: A {problem}")
        assert found["untouched"]
        for name in ("ewc", "inflora", "lwf", "opcm", "osf", "sdlora", "slora"):
            assert found[name].startswith(f"ValueError: {name}: A or B of 6 layers is sharded (")
            assert "keep the adapter out of FSDP (ignored_params)" in found[name]


@pytest.mark.parametrize("case", WRAPS)
def test_on_disk(case, folder, one, bound, ranks, tmp_path):
    """Saved by two ranks in the middle of a task, and taken up by two others, or by one process."""
    found = results(folder, f"{case}_on_disk")
    for each in found:
        assert each["extra"] == {"note": 0}
        assert ranks.equal(each["saved"], each["loaded"])
    check_as_one(found, one, bound, ranks)
    # The README comes from PeftModel.save_pretrained, which writes unsharded models only.
    expected = ["adapter", "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "slao_state.safetensors"]
    assert [name for name in found[0]["files"] if "README" not in name] == expected
    assert found[1]["files"] == []
    saved = next(folder.glob(f"{ranks.WRAPS[case].__name__} of rank 0"))
    alone = SLAO(ranks.make())
    assert alone.load(saved) == {"note": 0}
    assert ranks.equal(ranks.weights(alone), found[0]["saved"])

    model = ranks.make()
    method = SLAO(model)
    method.begin_task("0")
    ranks.learn(model, 0)
    method.end_task()
    method.save_pretrained(tmp_path)
    name = "adapter_model.safetensors"
    mine, theirs = load_file(tmp_path / name), load_file(saved / "adapter" / name)
    assert mine.keys() == theirs.keys()
    assert rounding(theirs, mine) <= bound
    loaded = peft.PeftModel.from_pretrained(tiny_model("llama", initializer_range=0.3), saved / "adapter")
    for key, value in theirs.items():
        assert torch.equal(loaded.state_dict()[key.replace(".weight", ".default.weight")], value)


def test_an_error_on_one_rank_is_one_on_all(folder):
    """Each rank raises, the one concerned its own error; nothing has changed anywhere, and all can go on."""
    first, second = results(folder, "one_rank_fails")
    diverged = "ValueError: task 'third' diverged: NaN or infinite adapter weights in 1 layers "
    for call in ("end_task", "begin_task"):
        assert second[call].startswith(diverged)
        assert first[call].startswith(f"ValueError: rank 1 of 2 failed: {diverged}")
        assert first[f"kept by {call}"]
        assert second[f"kept by {call}"]
    for call, error in (("save", "CannotWrite: cannot write "), ("save_pretrained", "FileExistsError")):
        assert first[call].startswith(error)
        assert second[call].startswith(f"RuntimeError: rank 0 of 2 failed: {error}")
    assert first["load"].startswith("ValueError: no saved state at ")
    assert second["load"].startswith("ValueError: rank 0 of 2 failed: ValueError: no saved state at ")
    assert second["too early"].startswith("ValueError: rank 0 of 2 failed: ValueError: no task is running")


SHARDED = "base_model.model.lm_head.weight"


@pytest.mark.parametrize("wrap", ["ddp", "fsdp2_blocks", "fsdp2_leaves", "fsdp1"])
def test_a_head_that_trains_beside(wrap, folder, ranks):
    """Saved and loaded whole from its shards, to the last bit; as in one process, as near as its rounding. What is
    sharded is neither averaged nor exported, and that is said by its name."""
    exact = ranks.head_reference(torch.float64)
    near = FACTOR * rounding(ranks.head_reference(), exact)
    for found in results(folder, f"{wrap}_heads"):
        assert SHARDED in exact
        assert rounding(found["kept"], exact) <= near
        assert ranks.equal(found["loaded"], found["kept"])
        if wrap == "ddp":
            assert found["export"] == found["merge"] == "nothing was raised"
            assert rounding(found["merged"], ranks.head_reference(torch.float64, "merge")) <= near
        else:
            only = f"the model is sharded and its adapter has {SHARDED}: only A and B can be exported then"
            assert found["export"] == f"ValueError: {only}"
            average = f"beside='merge' cannot average {SHARDED}, which is sharded: use 'keep' or 'freeze'"
            assert found["merge"] == f"ValueError: {average}"
            assert "merged" not in found

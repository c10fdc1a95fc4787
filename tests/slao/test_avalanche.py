"""The Avalanche plugin in Avalanche's own Naive strategy, on a stream of two experiences."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn

import slao_kernels
from slao import SLAO, SeqLoRA
from slao.integrations.avalanche import SlaoPlugin
from slao.methods import Method

HAVE = "avalanche is not installed (pip install avalanche-lib)"
training = pytest.importorskip("avalanche.training", reason=HAVE)
benchmarks = pytest.importorskip("avalanche.benchmarks", reason=HAVE)

from avalanche.benchmarks.utils import as_taskaware_classification_dataset  # noqa: E402
from avalanche.evaluation.metrics import accuracy_metrics  # noqa: E402
from avalanche.training.plugins import EvaluationPlugin  # noqa: E402


def model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 4))
    slao_kernels.patch(net, LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"]))
    return net


def stream() -> Any:
    sets = []
    for seed in (1, 2):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(48, 12, generator=g)
        y = (x @ torch.randn(12, 4, generator=g)).argmax(1)
        rows = torch.utils.data.TensorDataset(x, y)
        rows.targets = y.tolist()  # type: ignore[attr-defined]
        sets.append(as_taskaware_classification_dataset(rows))
    scenario = benchmarks.benchmark_from_datasets(train=sets, test=sets)
    return scenario


def strategy(net: nn.Module, *plugins: Any, **options: Any) -> Any:
    torch.manual_seed(3)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.3)
    evaluator = EvaluationPlugin(accuracy_metrics(experience=True), loggers=[])
    return training.Naive(
        model=net, optimizer=optimizer, criterion=nn.CrossEntropyLoss(), train_mb_size=8, train_epochs=6,
        eval_mb_size=48, plugins=list(plugins), evaluator=evaluator, **options,
    )  # fmt: skip


def weights(method: Method) -> dict[str, torch.Tensor]:
    with method.merged():
        merged = {f"merged.{key}": value.clone() for key, value in method.model.state_dict().items()}
    return {**copy.deepcopy(method.model.state_dict()), **merged}


def test_two_experiences_as_by_hand(tiny, recwarn):
    scenario = stream()
    ours, hand = SLAO(model()), SLAO(model())
    with_plugin, without = strategy(ours.model, SlaoPlugin(ours)), None
    torch.manual_seed(5)
    for experience in scenario.train_stream:
        with_plugin.train(experience, eval_streams=[])
    without = strategy(hand.model)
    torch.manual_seed(5)
    for experience in scenario.train_stream:
        hand.begin_task(str(experience.current_experience))
        without.train(experience, eval_streams=[])
        hand.end_task()
    assert ours.names == ["experience 0", "experience 1"]
    assert ours.lambdas == hand.lambdas == [1.0, 1 / 2**0.5]
    assert tiny.differing(weights(ours), weights(hand)) == []
    assert tiny.largest_error(ours.model.state_dict(), model().state_dict()) > 0.1
    assert [str(w.message) for w in recwarn if "incompatible" in str(w.message)] == []


def test_evaluation_runs_on_the_merged_weights(tiny):
    """Between experiences on the merge; within one, as `eval_every` asks for it, on the weights in training."""
    scenario = stream()
    method = SLAO(model())
    live: list[dict[str, torch.Tensor]] = []
    seen: list[tuple[bool, dict[str, torch.Tensor]]] = []

    class Look:
        supports_distributed = True

        def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
            live.append(copy.deepcopy(strategy.model.state_dict()))

        def before_eval_exp(self, strategy: Any, **kwargs: Any) -> None:
            now = copy.deepcopy(strategy.model.state_dict())
            seen.append((method.in_task, now))
            if method.in_task:
                assert tiny.differing(now, live[-1]) == []

    run = strategy(method.model, SlaoPlugin(method), Look(), eval_every=3)
    for experience in scenario.train_stream:
        run.train(experience, eval_streams=[scenario.test_stream[:1]])
    # Avalanche's periodic evaluation: before an experience, twice in it, and once it has ended.
    assert [running for running, _ in seen] == [False, True, True, False] * 2
    assert tiny.differing(seen[4][1], seen[3][1]) == [], "the merge, until the next experience begins"
    trained = copy.deepcopy(method.model.state_dict())
    results = run.eval(scenario.test_stream)
    running, merged = seen[-1]
    assert not running
    assert tiny.differing(merged, trained) == ["0.lora_B.default.weight", "2.lora_B.default.weight"]
    assert tiny.differing(method.model.state_dict(), trained) == [], "the trained weights are back"
    with method.merged(), torch.no_grad():
        for index, experience in enumerate(scenario.test_stream):
            rows = experience.dataset
            x, y = torch.stack([row[0] for row in rows]), torch.tensor([int(row[1]) for row in rows])
            right = (method.model(x).argmax(1) == y).double().mean().item()
            (found,) = [v for k, v in results.items() if k.endswith(f"Exp{index:03}")]
            assert found == pytest.approx(right)


def test_an_evaluation_that_breaks_off_is_made_good():
    scenario = stream()
    method = SLAO(model())
    plugin = SlaoPlugin(method)
    run = strategy(method.model, plugin)
    run.train(scenario.train_stream[0], eval_streams=[])
    plugin.before_eval(run)
    run.eval(scenario.test_stream)
    plugin.before_eval(run)
    run.train(scenario.train_stream[1], eval_streams=[])
    assert method.names == ["experience 0", "experience 1"]
    assert not method.in_task


def test_the_penalty_joins_the_loss():
    """With A = 0 the loss has no gradient in B, so B moves by -rate * 0.5 a step and nothing else."""

    class Pull(SeqLoRA):
        name = "pull"

        def penalty(self) -> torch.Tensor:
            return 0.5 * torch.stack([pair.parameters[1].sum() for pair in self.pairs]).sum()

    method = Pull(model())
    for pair in method.pairs:
        pair.parameters[0].requires_grad_(False).zero_()
    strategy(method.model, SlaoPlugin(method)).train(stream().train_stream[0], eval_streams=[])
    for pair in method.pairs:
        torch.testing.assert_close(pair.B.detach(), torch.full_like(pair.B, -0.15 * 6 * 6), rtol=1e-5, atol=0)


def test_another_model_is_refused():
    run = strategy(model(), SlaoPlugin(SLAO(model())))
    with pytest.raises(ValueError, match="does not hold the method's layer 0"):
        run.train(stream().train_stream[0], eval_streams=[])


def test_needs_nothing_of_avalanche():
    """The module's own imports: the plugin is made without the package."""
    assert "avalanche" not in vars(sys.modules["slao.integrations.avalanche"])

"""Merges tried on trainings that were recorded once: what a merge is worth is then known in seconds, not in hours.

    python bench/merge_lab.py record SETTINGS.yaml FOLDER [--jobs 2]      # train; adapters and inputs of every task
    python bench/merge_lab.py score FOLDER [--on test] [--merges "slao;last"] [--jobs 2]  # into FOLDER/scores_test.json

SLAO goes on from the last fine-tuned pair whatever it merges, and so do sequential LoRA and IncLoRA: one training
serves every merge of it. Recorded are, after each task, the adapter that was trained (IncLoRA's as the sum of its
pairs) and G, the mean of x xᵀ over the inputs x of each layer; SETTINGS are those of `slao run`, its methods and sweep
too. `score` forms the merge after each task from what a method would have kept until then, and scores it as
`slao run` does: AA and BWT. Choose on validation rows (the default; as many as test rows), report others on test rows.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from slao import metrics
from slao.checkpoint import write_atomically
from slao.methods.inputs import input_grams
from slao.objectives.base import in_batches
from slao.prepare import Prepared
from slao.settings import complete, load_file
from slao.sweep import Job, jobs, variants
from slao.train import train
from slao.workers import quiet
from slao_kernels import interference, weighted_merge

Pair = tuple[Tensor, Tensor]  # A (r, n) and B (m, r) of a layer, of any rank


@dataclass
class Recorded:
    """One training by `method`. tasks: names in training order; pairs[t][layer], grams[t][layer]: see the module."""

    job: Job
    method: str
    settings: dict[str, Any]
    tasks: list[str]
    pairs: list[list[Pair]]
    grams: list[list[Tensor]]


@dataclass(frozen=True)
class Kept:
    """What a merge has made of the tasks so far. pairs: the merged adapter; gram: what it knows of their inputs."""

    pairs: list[Pair]
    grams: list[Tensor]


# f(number of the task from 2, merge of the tasks before, adapter and inputs of this one) -> merge with it.
Merge = Callable[[int, Kept, Kept], Kept]


def last(i: int, kept: Kept, new: Kept) -> Kept:
    """No merge: the adapter as it was trained last."""
    return new


def factors(i: int, kept: Kept, new: Kept, adaptive: bool = False) -> Kept:
    """SLAO's: B averaged with λ = 1/√i (adaptive: its λ by each layer's cosine), A replaced."""
    exponents = [0.5] * len(new.pairs)
    if adaptive:
        both = [([A for A, _ in pairs], [B for _, B in pairs], 1.0) for pairs in (new.pairs, kept.pairs)]
        exponents = [(1 + c) / 2 for c in interference(both).cosines[:, 0, 1].tolist()]
    lams = [min(1.0, max(1 / i, i**-e)) for e in exponents]
    pairs = [(A, torch.lerp(Bm, B, lam)) for (A, B), (_, Bm), lam in zip(new.pairs, kept.pairs, lams, strict=True)]
    return Kept(pairs, new.grams)


def product(rank: int, power: float = 0.5) -> Merge:
    """The products themselves averaged with λ = i^(-power), and cut to a rank."""

    def merge(i: int, kept: Kept, new: Kept) -> Kept:
        lam = i**-power
        return Kept(_sum(kept.pairs, 1 - lam, new.pairs, lam, rank), new.grams)

    return merge


def by_inputs(rank: int | None = None, sketch: int | None = None, ridge: float = 1e-3) -> Merge:
    """The least squares of every task's outputs on its own inputs: M <- (M G_old + P G) (G_old + G)⁻¹, P = B A.

    Cut to `rank` in the norm of the sum of G; of that `sketch` eigenvectors are kept, and a multiple of the identity
    for the rest. Every task counts alike. After RegMean (arXiv 2212.09849), taken one task after another.
    """

    def merge(i: int, kept: Kept, new: Kept) -> Kept:
        pairs, grams = [], []
        for (Am, Bm), (A, B), old, gram in zip(kept.pairs, new.pairs, kept.grams, new.grams, strict=True):
            if i == 2:
                old = _kept(_ridged(old, ridge), sketch)
            gram = _ridged(gram, ridge)
            total = old + gram
            weighted = Bm.double() @ (Am.double() @ old) + B.double() @ (A.double() @ gram)
            L = torch.linalg.cholesky(total)
            U, S, Vh = torch.linalg.svd(torch.linalg.solve_triangular(L.T, weighted, upper=True, left=False),
                                        full_matrices=False)  # of M L  # fmt: skip
            keep = min(len(S), rank or len(S))
            down = torch.linalg.solve_triangular(L, Vh[:keep], upper=False, left=False)
            pairs.append((down.float(), (U[:, :keep] * S[:keep]).float()))
            grams.append(_kept(total, sketch))
        return Kept(pairs, grams)

    return merge


def scaled(merge: Merge, factor: float) -> Merge:
    """A merge whose B is multiplied by `factor` where it is used; what is kept is as it was."""
    merge.__dict__["factor"] = factor
    return merge


MERGES: dict[str, Merge] = {
    "last": last,
    "slao": factors,
    "slao adaptive": lambda *args: factors(*args, adaptive=True),
    "product, R 8": product(8),
    "product, R 16": product(16),
    "product, R 24": product(24),
    "product, R 32": product(32),
    "plain mean, R 32": product(32, power=1.0),
    "inputs, uncut": by_inputs(),
    "inputs, R 16, 32 vectors": by_inputs(16, 32),
    "inputs, R 16, 32 vectors, x 1.25": scaled(by_inputs(16, 32), 1.25),
    "inputs, R 32, 32 vectors": by_inputs(32, 32),
}
# Averages of factors mean something where one pair is trained on; the others take sums of pairs too.
OF_FACTORS = ("slao", "slao adaptive")


def _sum(old: list[Pair], w_old: float, new: list[Pair], w_new: float, rank: int) -> list[Pair]:
    both = [([A for A, _ in pairs], [B for _, B in pairs], 1.0) for pairs in (old, new)]
    return weighted_merge(both, [w_old, w_new], rank).pairs


def _ridged(gram: Tensor, ridge: float) -> Tensor:
    gram = gram.double()
    return gram + ridge * gram.trace() / len(gram) * torch.eye(len(gram), dtype=gram.dtype)


def _kept(gram: Tensor, count: int | None) -> Tensor:
    """What `count` eigenvectors and a multiple of the identity say of it; with None all."""
    if count is None:
        return gram
    values, vectors = torch.linalg.eigh(gram)
    rest = values[:-count].mean()
    return (vectors[:, -count:] * (values[-count:] - rest)) @ vectors[:, -count:].T + rest * torch.eye(len(gram))


def record(settings: dict[str, Any], job: Job, folder: Path) -> str:
    """Train one job, keep what `Recorded` says; returns the file's name."""
    path = folder / f"{job.folder}.pt"
    if path.is_file():
        if torch.load(path, weights_only=False)["settings"] != settings:
            raise ValueError(f"{path} was recorded with other settings: name another folder")
        return path.name
    prepared = Prepared(settings)
    model, method, objective = prepared.build(job.method, job.seed, job.order)
    if method.name not in ("seqlora", "slao", "inclora") or method.beside.parts:
        raise ValueError(f"{job.label}: A and B, and a sum of pairs, are all that is recorded")
    stream, config = prepared.ordered(job.seed, job.order), prepared.config_of(job.method)
    found = Recorded(job, method.name, settings, [task.name for task in stream.tasks], [], [])

    def after(index: int, result: Any) -> None:
        task = stream.tasks[index]
        features = objective.features(task, task.train)
        batches = in_batches(features, config.eval_batch_size, objective.collate, next(model.parameters()).device)
        counted = (batch for _, batch in batches)
        trained = [(pair.A.clone(), pair.B.clone()) for pair in method.pairs]
        if method.name == "inclora":  # the sum of its pairs is what was trained
            shown = method._exported_weights()
            trained = [(A.clone(), B.clone()) for A, B in shown if A is not None and B is not None]
        grams = input_grams(model, method.pairs, counted)
        tokens = sum(len(row["input_ids"]) for row in features)
        found.pairs.append(trained)
        found.grams.append([(gram / tokens).float() for gram in grams])

    # It is not scored here: a row of each task is enough.
    train(model, method, stream.limited(None, None, test=1), objective, config, seed=job.seed, on_task=after)
    write_atomically(path, lambda temporary: torch.save(vars(found) | {"job": asdict(job)}, temporary))
    return path.name


def merges_of(found: Recorded, merge: Merge) -> list[list[Pair]]:
    """The merged adapter after each task."""
    kept = Kept(found.pairs[0], found.grams[0])
    out = [kept.pairs]
    for i, (pairs, grams) in enumerate(zip(found.pairs[1:], found.grams[1:], strict=True), start=2):
        kept = merge(i, kept, Kept(pairs, grams))
        out.append(kept.pairs)
    factor = getattr(merge, "factor", 1.0)
    return [[(A, factor * B) for A, B in pairs] for pairs in out]


def score(path: Path, names: Sequence[str], split: str) -> list[dict[str, Any]]:
    """AA and BWT of each of the merges of one recorded training."""
    content = torch.load(path, weights_only=False)  # its own
    found = Recorded(**{**content, "job": Job(**content["job"])})
    # PEFT's own layers take weights of any rank.
    settings = {**found.settings, "patch": False, "methods": {"seqlora": {}}}
    prepared = Prepared(settings)
    job = found.job
    model, method, objective = prepared.build("seqlora", job.seed, job.order)
    stream = prepared.ordered(job.seed, job.order)
    rows = []
    for name in names:
        if name in OF_FACTORS and found.method == "inclora":
            continue
        merged = merges_of(found, MERGES[name])
        count = len(found.tasks)
        matrix: list[list[float | None]] = [[None] * count for _ in range(count)]
        for t, adapter in enumerate(merged):
            with torch.no_grad():
                for pair, (A, B) in zip(method.pairs, adapter, strict=True):
                    pair.parameters[0].data, pair.parameters[1].data = A, B
            objective.seen = tuple(found.tasks[: t + 1])
            for i in range(count) if t == count - 1 else [t]:
                task = stream.tasks[i]
                own = getattr(task, split)
                own = Random(f"{split}/{task.name}").sample(own, min(len(own), settings["test_rows"] or len(own)))
                matrix[t][i] = objective.score(model, task, own, prepared.config.eval_batch_size)
        rows.append({
            "trained": job.label, "merge": name, "seed": job.seed, "order": job.order, "on": split,
            "AA": metrics.average_accuracy(matrix), "BWT": metrics.backward_transfer(matrix),
        })  # fmt: skip
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Per training and merge the means over runs, and the paired difference in AA to SLAO's own merge of its own."""
    runs = {(row["trained"], row["merge"], row["seed"], row["order"]): row for row in rows}
    lines = ["| trained as | merge | runs | AA | BWT | AA - slao's, points |", "|---|---|---:|---:|---:|---:|"]
    for label, name in dict.fromkeys((row["trained"], row["merge"]) for row in rows):
        own = {key[2:]: row for key, row in runs.items() if key[:2] == (label, name)}
        base = {key: runs.get((label.replace("inclora", "slao"), "slao", *key)) for key in own}
        gains = [100 * (row["AA"] - found["AA"]) for key, row in own.items() if (found := base[key]) is not None]
        cells = [
            label,
            name,
            str(len(own)),
            *(f"{fmean(row[key] for row in own.values()):.4f}" for key in ("AA", "BWT")),
        ]
        lines.append(f"| {' | '.join(cells)} | {_spread(gains)} |")
    return "\n".join(lines)


def _spread(gains: list[float]) -> str:
    if not gains:
        return "–"
    error = stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else float("nan")
    return f"{fmean(gains):+.2f} (se {error:.2f})"


def _quiet() -> None:
    torch.set_num_threads(1)
    quiet()


def main() -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording, scoring = commands.add_parser("record"), commands.add_parser("score")
    recording.add_argument("settings", type=Path)
    for command in (recording, scoring):
        command.add_argument("folder", type=Path)
        command.add_argument("--jobs", type=int, default=1)
    scoring.add_argument("--on", default="validation", choices=("validation", "test"))
    scoring.add_argument("--merges", default=";".join(MERGES), help="names, with ; between them")
    options = parser.parse_args()
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_quiet) as pool:
        if options.command == "record":
            settings = complete(load_file(options.settings))
            options.folder.mkdir(parents=True, exist_ok=True)
            found = variants(settings)
            tasks = [pool.submit(record, found[job.variant].settings, job, options.folder) for job in jobs(settings)]
            for task in tasks:
                print(task.result(), flush=True)
            return 0
        names = options.merges.split(";")
        if unknown := [name for name in names if name not in MERGES]:
            parser.error(f"no merge {unknown[0]!r}; there are: {'; '.join(MERGES)}")
        paths = sorted(options.folder.glob("*.pt"))
        rows = [row for part in pool.map(score, paths, [names] * len(paths), [options.on] * len(paths)) for row in part]
    (options.folder / f"scores_{options.on}.json").write_text(json.dumps(rows) + "\n", "utf-8")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

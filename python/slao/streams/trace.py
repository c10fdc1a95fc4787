"""Stream "trace": the eight tasks of TRACE (Wang et al., "TRACE: a comprehensive benchmark for continual learning in
large language models", arXiv 2310.06762, https://github.com/BeyonderXX/TRACE, Apache-2.0), in its order.

Stance in Chinese, monetary policy, meetings to be summarised, code to be completed, science questions, two kinds of
arithmetic, German news to be simplified. Each is scored by its own metric: accuracy, Rouge-L, the similarity of a line
of code, the letter of the answer alone, SARI; TRACE reports BLEU beside some of them. Answers are generated.

The rows come with the benchmark (its README says where), in several sizes; `path` is the folder of one of them:
    <task>/{train,eval,test}.json    [{"prompt": text, "answer": text}, ...]
Prompts carry their instructions: nothing is put around them. Rouge-L is of stemmed words here, unlike TRACE's; how SARI
and code are scored, and what differs, says `slao.objectives.text_scores`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slao.streams.base import Splits, Stream, Task, carve_validation
from slao.streams.jsonl import read_split, task_folders

METRICS = {
    "C-STANCE": "accuracy",
    "FOMC": "accuracy",
    "MeetingBank": "rouge_l",
    "Py150": "code_similarity",
    "ScienceQA": "first_letter",
    "NumGLUE-cm": "accuracy",
    "NumGLUE-ds": "accuracy",
    "20Minuten": "sari",
}


def trace(
    path: str | Path, order: Sequence[str] | None = None, validation_fraction: float = 0.1, seed: int = 0
) -> Stream:
    """The tasks under `path` (see the module), in `order`; by default all eight.

    validation_fraction: share of a task's training rows that becomes validation, drawn from `seed`, where there is no
    eval.json.
    ValueError: names the task, file or row that is absent, unknown or malformed.
    """
    names = list(METRICS) if order is None else list(order)
    if unknown := [name for name in names if name not in METRICS]:
        raise ValueError(f"order names the task {unknown[0]!r}; those of trace are {', '.join(METRICS)}")
    folders = task_folders(Path(path))
    if missing := [name for name in names if name not in folders]:
        raise ValueError(f"{path} has no folder for {', '.join(missing)}; it holds {', '.join(sorted(folders))}")
    return Stream("trace", tuple(_task(name, folders[name], validation_fraction, seed) for name in names))


def _task(name: str, folder: Path, validation_fraction: float, seed: int) -> Task:
    train, held, test = (read_split(folder, split) for split in ("train", "eval", "test"))
    if train is None or test is None:
        raise ValueError(f"{folder} has no {'train' if train is None else 'test'}.json")
    if other := next((row for row in train.rows if not row.verbatim), None):
        raise ValueError(f'{other.where or folder}: a row of trace is {{"prompt", "answer"}}')
    splits = Splits(train.rows, [] if held is None else held.rows, test.rows)
    if held is None:
        splits.train, splits.validation = map(list, carve_validation(train.rows, validation_fraction, seed))
    return splits.task(name, metric=METRICS[name])

"""The HTML page of a report: one file with its images and style inside, readable offline, light or dark."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from .plots import Plot

Table = tuple[Sequence[str], Iterable[Sequence[str]]]

GLOSSARY = (
    ("AA", "mean score over all tasks after the last one; higher is better."),
    ("Inc-Acc", "mean, over the tasks in turn, of the mean score over the tasks trained until then."),
    ("BWT", "mean change of a task's score from its own training to the end; negative means forgotten."),
    ("forgetting", "mean drop from a task's best earlier score to the end; lower is better."),
    ("FWT", "mean gain over zero-shot on a task just before it is trained."),
    ("CE rise", "how much less likely a text that no task is about has become: cross-entropy, nats a token."),
    ("zero-shot", "mean score over all tasks before any training."),
    ("MOPD, AOPD", "largest and mean range of a task's final score over task orders, at one seed; lower is better."),
    ("train s, score s, merge s", "seconds of a run in training steps, in scoring, and around the tasks (merging)."),
    ("kept MB", "adapter and whatever else the method keeps, after the first and after the last task."),
    ("±", "sample standard deviation over runs. Peak memory is that of the process, the largest of the runs."),
)

STYLE = """
:root { color-scheme: light dark;
  --ink: #1c1e21; --soft: #5b6169; --page: #fbfbfa; --card: #ffffff; --line: #d9dce0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #a3aab3; --page: #15171a; --card: #1e2125; --line: #363b42; }
}
body { margin: 0 auto; max-width: 70rem; padding: 2rem 1.25rem 4rem; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
p, dl, figcaption { color: var(--soft); overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .9rem; }
dt { font-weight: 600; }
dd { margin: 0; }
.wide, pre { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; background: var(--card); }
pre { padding: 1rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .8rem; text-align: right; white-space: nowrap; }
th:first-child, .text td, .text th { text-align: left; }
.text td { white-space: normal; }
thead th { color: var(--soft); font-weight: 600; }
tbody tr { border-top: 1px solid var(--line); }
figure { margin: 0 0 2rem; }
figure img { display: block; max-width: 100%; height: auto; box-sizing: border-box; padding: .5rem;
  background: #ffffff; border: 1px solid var(--line); border-radius: 8px; }
figcaption { font-size: .9rem; margin-top: .4rem; }
details { margin: .75rem 0; }
summary { cursor: pointer; font-weight: 600; margin-bottom: .5rem; }
"""


def _table(table: Table, kind: str = "wide") -> str:
    header, rows = table
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    return f'<div class="{kind}"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _figure(plot: Plot) -> str:
    data = base64.b64encode(plot.path.read_bytes()).decode("ascii")
    image = f'<img alt="{escape(plot.title)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{escape(plot.caption)}</figcaption></figure>"


def _details(title: str, inner: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{inner}</details>"


def page(
    results: Mapping[str, Any],
    headline: Table,
    per_seed: Table,
    orders: Sequence[Sequence[str]],
    figures: Iterable[Plot],
    notes: Sequence[str] = (),
) -> str:
    """The whole document as text.

    results: the checked `results.json` object, of which the heading, settings and versions are shown.
    headline, per_seed: (column titles, rows) of text. orders: rows of (method, seed, task names).
    figures: read from their PNG files. notes: lines above the results. Everything that comes from outside is escaped.
    """
    stream, model, metric = (escape(str(results[key])) for key in ("stream", "model", "metric"))
    settings = json.dumps(results.get("settings"), indent=2, ensure_ascii=False)
    versions = [[str(name), str(version)] for name, version in (results.get("versions") or {}).items()]
    glossary = "".join(f"<dt>{escape(term)}</dt><dd>{escape(meaning)}</dd>" for term, meaning in GLOSSARY)
    parts = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{stream}: continual fine-tuning</title><style>{STYLE}</style></head><body>",
        f"<h1>{stream}: continual fine-tuning</h1><p>Model: {model}. Score: {metric}.</p>",
        *(f"<p><strong>{escape(note)}</strong></p>" for note in notes),
        f"<h2>Results</h2>{_table(headline)}<dl>{glossary}</dl>",
        f"<h2>Each seed</h2>{_table(per_seed)}",
        "<h2>Figures</h2>",
        *(_figure(plot) for plot in figures),
        "<h2>How it was run</h2>",
        _details("Settings", f"<pre>{escape(settings)}</pre>"),
        _details("Versions", _table((["package", "version"], versions), "wide text")),
        _details("Task orders", _table((["method", "seed", "order"], orders), "wide text")),
        "</body></html>\n",
    ]
    return "\n".join(parts)

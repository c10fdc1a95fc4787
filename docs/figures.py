"""Draws the figures of the documentation: `python docs/figures.py` writes docs/figures/*.svg, the same to the byte.

Plain SVG on a light card, so that a page of either colour, and a README, can show it; the standard library is enough.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

FOLDER = Path(__file__).with_name("figures")
INK, SOFT, LINE = "#1d2433", "#5b6475", "#9aa3b5"
BLUE, GREEN, AMBER, GREY = "#dce7fb", "#dcf3e3", "#fdeecb", "#eceff4"
_INDEX = re.compile(r"_\{([^}]*)\}")


class Figure:
    """A card of `width` × `height`; text is in its units, 16 unless said."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.parts: list[str] = []

    def text(self, x: float, y: float, words: str, size: int = 16, bold: bool = False, color: str = INK,
             anchor: str = "middle") -> None:  # fmt: skip
        """`words` around, from or up to x, on the line y; `B_{merge}` has an index."""
        down, pieces, at = size // 4, "", 0
        for found in _INDEX.finditer(words):
            pieces += escape(words[at : found.start()])
            pieces += f'<tspan dy="{down}" font-size="{size - 4}">{escape(found[1])}</tspan>'
            pieces += f'<tspan dy="-{down}">&#8203;</tspan>'  # back up, by a character of no width
            at = found.end()
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{color}"{weight}>'
            f"{pieces}{escape(words[at:])}</text>"
        )

    def box(self, x: float, y: float, width: float, height: float, title: str, lines: Sequence[str] = (),
            fill: str = BLUE) -> None:  # fmt: skip
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8" fill="{fill}" stroke="{LINE}"/>'
        )
        top = y + (height - 22 * len(lines)) / 2 + 6
        self.text(x + width / 2, top, title, 17, bold=True)
        for number, line in enumerate(lines):
            self.text(x + width / 2, top + 23 + 22 * number, line, 15)

    def arrow(self, *points: tuple[float, float], color: str = SOFT) -> None:
        path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
        self.parts.append(f'<path d="{path}" fill="none" stroke="{color}" stroke-width="2" marker-end="url(#tip)"/>')

    def svg(self) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'height="{self.height}" role="img" font-family="system-ui, -apple-system, Segoe UI, Roboto, sans-serif">'
        )
        tip = (
            '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
            f'orient="auto-start-reverse"><path d="M0 0 L10 5 L0 10 z" fill="{SOFT}"/></marker></defs>'
        )
        card = (
            f'<rect x="0.5" y="0.5" width="{self.width - 1}" height="{self.height - 1}" rx="12" fill="#fbfcfe" '
            'stroke="#d5dae4"/>'
        )
        return "\n".join([head, f"<title>{escape(self.title)}</title>", tip, card, *self.parts, "</svg>"]) + "\n"


def cycle() -> Figure:
    figure = Figure(760, 336, "The task cycle of SLAO: re-base A, train A and B, merge B")
    figure.box(20, 70, 200, 104, "1  Re-base A", ["A ← orthonormal basis", "of the last A's rows;", "B stays as it is"])
    figure.box(280, 70, 200, 104, "2  Train", ["A and B on task i,", "ordinary LoRA", "in any Trainer"], GREEN)
    figure.box(
        540, 70, 200, 104, "3  Merge B", ["B_{merge} ← B_{merge} +", "(B − B_{merge}) / √i", "A_{merge} ← A"], AMBER
    )
    figure.arrow((220, 122), (280, 122))
    figure.arrow((480, 122), (540, 122))
    figure.arrow((640, 70), (640, 36), (120, 36), (120, 70))
    figure.text(380, 27, "task i + 1 goes on from the trained A and B, not from the merge", color=SOFT)
    figure.box(
        410,
        232,
        330,
        84,
        "Answers and exports",
        ["W + s · B_{merge} A_{merge}", "one plain PEFT adapter of rank r"],
        GREY,
    )
    figure.arrow((640, 174), (640, 232))
    figure.text(20, 262, "kept a layer between tasks, however many:", 16, color=SOFT, anchor="start")
    figure.text(20, 290, "A,  B,  B_{merge}", 18, bold=True, anchor="start")
    return figure


def schedules() -> Figure:
    """What each of ten tasks weighs in B_merge after the tenth: w_j = λ(j) Π_{k>j} (1 − λ(k))."""
    figure = Figure(760, 300, "Weight of each of ten tasks in the merge, for three schedules")
    figure.text(380, 30, "weight of task j in B_{merge} after ten tasks", 17, bold=True)
    chosen: list[tuple[str, Callable[[int], float]]] = [
        ("λ = 1/√i  (SLAO)", lambda i: 1 / math.sqrt(i)),
        ("λ = 1/i  (plain mean)", lambda i: 1 / i),
        ("λ = 0.5  (constant)", lambda i: 0.5),
    ]
    for number, (name, schedule) in enumerate(chosen):
        left, floor, tall = 30 + 243 * number, 236, 300
        weights = weights_of(schedule, 10)
        for j, weight in enumerate(weights):
            x, high = left + 21.5 * j, weight * tall
            figure.parts.append(
                f'<rect x="{x:g}" y="{floor - high:.1f}" width="17" height="{high:.1f}" fill="#5b82d6"/>'
            )
            figure.text(x + 8.5, floor + 17, str(j + 1), 13, color=SOFT)
        figure.text(left + 8.5, floor - weights[0] * tall - 6, f"{weights[0]:.2g}", 13)
        figure.text(left + 202, floor - weights[-1] * tall - 6, f"{weights[-1]:.2g}", 13)
        figure.text(left + 105, 282, name, 16, bold=True)
    return figure


def weights_of(schedule: Callable[[int], float], tasks: int) -> list[float]:
    lambdas = [1.0, *(schedule(i) for i in range(2, tasks + 1))]
    return [lam * math.prod(1 - later for later in lambdas[j + 1 :]) for j, lam in enumerate(lambdas)]


def clora() -> Figure:
    figure = Figure(760, 270, "C-LoRA: a routing matrix between A and B")
    figure.box(20, 110, 70, 50, "x", fill=GREY)
    figure.box(150, 110, 110, 50, "A", ["r × n"])
    figure.box(320, 96, 190, 78, "R_{old} + R_{δ}", ["r × r, routing"], AMBER)
    figure.box(570, 110, 100, 50, "B", ["m × r"])
    figure.box(320, 20, 190, 44, "W", fill=GREY)
    figure.text(520, 37, "frozen", 15, color=SOFT, anchor="start")
    for left, right in ((90, 150), (260, 320), (510, 570)):
        figure.arrow((left, 135), (right, 135))
    figure.arrow((670, 135), (718, 135))
    figure.text(730, 141, "y", 18, bold=True)
    figure.arrow((55, 110), (55, 42), (320, 42))
    figure.arrow((510, 48), (694, 48), (694, 130))
    figure.text(380, 206, "forward: all of R_{old} + R_{δ};   gradients of A and B: through R_{δ} alone", 16)
    figure.text(380, 240, "a task trains R_{δ} from zero;   its end:  R_{old} ← R_{old} + R_{δ}", 16)
    return figure


def floors() -> Figure:
    figure = Figure(760, 330, "Three floors; imports point downwards only")
    rows = [
        (
            "python/slao",
            "tasks",
            ["methods, streams, objectives, training loop,", "merges of files, commands, report"],
            GREEN,
        ),
        (
            "slao_kernels",
            "layers and tensors",
            ["patch(), one folder an operation,", "backends: torch, C++, CUDA, Triton"],
            BLUE,
        ),
        ("csrc", "raw pointers", ["C++ and CUDA kernels; never", "Python, never torch"], AMBER),
    ]
    for number, (name, knows, lines, fill) in enumerate(rows):
        y = 20 + 104 * number
        figure.box(20, y, 470, 78, name, lines, fill)
        figure.text(510, y + 34, "knows", 15, color=SOFT, anchor="start")
        figure.text(510, y + 57, knows, 18, bold=True, anchor="start")
        if number:
            figure.arrow((255, y - 26), (255, y))
    return figure


def layer() -> Figure:
    figure = Figure(760, 420, "One node computes base and LoRA, forward and backward")
    figure.text(20, 34, "Forward", 18, bold=True, anchor="start")
    figure.box(20, 80, 60, 50, "x", fill=GREY)
    figure.box(140, 80, 130, 50, "T = x Aᵀ")
    figure.box(330, 80, 190, 50, "y = bias + s T Bᵀ")
    figure.box(580, 80, 160, 50, "y += x Wᵀ", fill=AMBER)
    for left, right in ((80, 140), (270, 330), (520, 580)):
        figure.arrow((left, 105), (right, 105))
    figure.arrow((50, 80), (50, 52), (660, 52), (660, 80))
    figure.text(660, 152, "added inside the GEMM", 15, color=SOFT)
    figure.text(205, 152, "M × r, kept", 15, color=SOFT)
    figure.text(20, 206, "Backward", 18, bold=True, anchor="start")
    figure.box(20, 246, 60, 50, "dY", fill=GREY)
    figure.box(140, 246, 130, 50, "g = s dY B")
    figure.box(330, 246, 190, 50, "dx = g A", fill=BLUE)
    figure.box(580, 246, 160, 50, "dx += dY W", fill=AMBER)
    for left, right in ((80, 140), (270, 330), (520, 580)):
        figure.arrow((left, 271), (right, 271))
    figure.arrow((50, 246), (50, 222), (660, 222), (660, 246))
    figure.box(140, 340, 130, 50, "dA = gᵀ x", fill=GREEN)
    figure.box(330, 340, 190, 50, "dB = s dYᵀ T", fill=GREEN)
    figure.arrow((205, 296), (205, 340))
    figure.arrow((50, 296), (50, 316), (425, 316), (425, 340))
    figure.text(660, 318, "added inside the GEMM", 15, color=SOFT)
    figure.text(540, 372, "saved: x, T, A, B", 16, bold=True, anchor="start")
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "cycle": cycle, "schedules": schedules, "clora": clora, "floors": floors, "layer": layer,
}  # fmt: skip


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        (FOLDER / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()

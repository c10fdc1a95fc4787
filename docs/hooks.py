"""mkdocs hooks: pages that stand outside docs/ are part of the site, and no page loads anything from elsewhere.

A page links to a file of the repository as one does on a forge (`../bench/experiments.md`); what is listed in OUTSIDE
becomes a page of the site, and links to it, from wherever they come, lead there. A link to any other file is an error.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
EXPERIMENTS = ROOT / "bench" / "experiments"
# File in the repository -> page of the site.
OUTSIDE = {
    "bench/experiments.md": "experiments.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    **{f"bench/results/{page.name}": f"measured/{page.name}" for page in RESULTS.glob("2*.md")},
    **{f"bench/results/scaling/{page.name}": f"measured/scaling/{page.name}" for page in RESULTS.glob("scaling/*.md")},
}
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
_BLOCK = re.compile(r"- |\d+\. |\|")
_ELSEWHERE = re.compile(r"""(?:\ssrc=|<link\b[^>]*\shref=)["']?(?:https?:)?//[^"'\s>]+""")


def on_files(files: Any, config: Any, **_: Any) -> Any:
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for picture in sorted(RESULTS.glob("*/*.png")):
        place = f"measured/{picture.relative_to(RESULTS).as_posix()}"
        files.append(File.generated(config, place, abs_src_path=str(picture)))
    for picture in sorted(EXPERIMENTS.glob("*.svg")):
        files.append(File.generated(config, f"experiments/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    here = next((source for source, name in OUTSIDE.items() if name == page.file.src_uri), f"docs/{page.file.src_uri}")

    def led(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), found[1]))
        if path in OUTSIDE:
            target = OUTSIDE[path]
        elif path.startswith("docs/"):
            target = path.removeprefix("docs/")
        elif path.startswith("bench/results/") and path.endswith(".png"):
            target = path.replace("bench/results/", "measured/")
        elif path.startswith("bench/experiments/") and path.endswith(".svg"):
            target = path.removeprefix("bench/")
        else:
            raise PluginError(f"{here} links to {path}, which is no page of the site: add it to OUTSIDE in hooks.py")
        return posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or ".") + (found[2] or "")

    return _LINK.sub(led, spaced(markdown))


def spaced(markdown: str) -> str:
    """`markdown` for Python-Markdown, which wants an empty line where a forge wants none: before a list or a table, and
    after a fence. A comment, which it would take a table for a part of, is left out."""
    lines: list[str] = []
    fenced = False
    for line in re.sub(r"^<!--.*?-->$", "", markdown, flags=re.MULTILINE | re.DOTALL).splitlines():
        before = lines[-1] if lines else ""
        begins = _BLOCK.match(line)
        inside = before.startswith(("- ", "|", " ")) or re.match(r"\d+\. ", before)
        if not fenced and ((begins and not inside) or before.startswith("```")):
            lines.append("")
        fenced ^= line.startswith("```")
        lines.append(line)
    return "\n".join(lines) + "\n"


def on_post_build(config: Any, **_: Any) -> None:
    for page in sorted(Path(config["site_dir"]).rglob("*.html")):
        if found := _ELSEWHERE.search(page.read_text(encoding="utf-8")):
            raise PluginError(f"{page.name} loads something from elsewhere: {found[0].strip()}")

"""A griffe extension: the docstrings here say `name: what it is.` a line each, which becomes a list on the site."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Function, Object

_FIELD = re.compile(r"^(\w+(?:, \w+)*): ")


_BRACKET = re.compile(r"\[(?=[^\]]*\](?!\())")


def plain(text: str) -> str:
    """`text` with brackets that are no links as they are: `m[i][j]` is no reference of Markdown's."""
    parts = text.split("`")
    return "`".join(part if number % 2 else _BRACKET.sub(r"\\[", part) for number, part in enumerate(parts))


def broken(text: str, names: set[str]) -> str:
    """`text` with a field that begins within a line on a line of its own."""

    def own(found: re.Match[str]) -> str:
        return f"\n{found[1]}: " if names.issuperset(found[1].split(", ")) else found[0]

    return re.sub(r"(?<=[.;)]) (\w+(?:, \w+)*): ", own, text)


def listed(text: str, names: set[str]) -> str:
    """`text` with every paragraph's lines that begin with some of `names` and a colon as items of a list."""
    lines: list[str] = []
    item = False
    for line in broken(plain(text), names).splitlines():
        found = _FIELD.match(line)
        if found and names.issuperset(found[1].split(", ")):
            if not item:
                lines.append("")
            item = True
            bold = ", ".join(f"**{name}**" for name in found[1].split(", "))
            line = f"- {bold}: {line[found.end() :]}"
        elif item and line[:1].isupper() and lines[-1].endswith("."):  # a sentence of its own, about the whole
            item = False
            lines.append("")
        elif item and line.strip():
            line = f"    {line}"
        else:
            item = False
        lines.append(line)
    return "\n".join(lines)


class Fields(Extension):
    """Applied to every object that has a docstring."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        functions = [obj, *(member for member in obj.members.values() if member.name == "__init__")]
        names = {parameter.name for each in functions if isinstance(each, Function) for parameter in each.parameters}
        names |= set(obj.members) if obj.is_class else set()
        obj.docstring.value = listed(obj.docstring.value, names | _instance(obj))


def _instance(obj: Object) -> set[str]:
    """Names that a class's methods set or its docstring may speak of."""
    return {"pairs", "task", "names", "lambdas", "cosines"} if obj.is_class else set()

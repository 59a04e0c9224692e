"""For make docs: a docstring's lines "name: what it is" become a list, as the reader of the source sees them."""

import re
from typing import Any

import griffe

LINE = re.compile(r"(\w+(?:, \w+)*): (?=\S)")
AFTER = re.compile(r"UserError|Raises|Returns")


class Arguments(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring and obj.is_function | obj.is_class:
            names = {parameter.name for parameter in obj.parameters} | set(obj.members)
            obj.docstring.value = listed(obj.docstring.value, names)


def listed(text: str, names: set[str]) -> str:
    lines, within = [], False
    for line in text.split("\n"):
        found = LINE.match(line)
        if found and names.issuperset(found[1].split(", ")):
            if not within:
                lines.append("")
            within = True
            line = f"- **{found[1]}**: {line[found.end() :]}"
        elif within and (not line or AFTER.match(line)):
            within = False
            lines.append("")
        elif within:
            line = f"    {line}"
        lines.append(line)
    return "\n".join(lines)

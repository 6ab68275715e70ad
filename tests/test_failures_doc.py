"""`docs/failures.md` says the deadlines that are in the code."""

import dataclasses
import re
from pathlib import Path

from shardkit.cluster.deadlines import Deadlines

DOC = Path(__file__).parents[1] / "docs" / "failures.md"
BEGIN = "<!-- deadlines: made by tests/test_failures_doc.py -->\n"
END = "<!-- end of deadlines -->\n"


def told_of(record):
    """What the docstring of a dataclass says of each field."""
    text = record.__doc__.partition("Attributes:\n")[2].split("\n\n")[0]
    entries = re.split(r"\n(?= {8}\w)", "\n" + text.rstrip())
    pairs = (entry.strip().split(": ", 1) for entry in entries if entry.strip())
    return {name: " ".join(what.split()) for name, what in pairs}


def make_table(record):
    told = told_of(record)
    rows = [
        f"| `{field.name}` | {field.default:g} | {told[field.name].rstrip('.')} |"
        for field in dataclasses.fields(record)
    ]
    return "\n".join(["| deadline | s | for what |", "|---|---|---|", *rows]) + "\n"


def test_the_table_of_deadlines_is_that_of_the_code():
    text = DOC.read_text(encoding="utf-8")
    assert BEGIN in text
    assert END in text
    found = text.split(BEGIN)[1].split(END)[0]
    assert found == make_table(Deadlines), f"paste:\n{make_table(Deadlines)}"


def test_every_deadline_that_the_page_names_is_one():
    text = DOC.read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+_(?:s|factor))`", text))
    known = {field.name for field in dataclasses.fields(Deadlines)}
    assert named <= known, named - known
    assert "silence_s" in named

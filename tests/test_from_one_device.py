"""The page that goes from one device to eight is run as it stands.

`python tests/test_from_one_device.py` runs all of it and writes what it prints into it.
"""

import contextlib
import dataclasses
import io
import os
import re
import shlex
import sys
import tempfile
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "from-one-device.md"
# What compiles more than a quick test can afford.
LONG = (
    "## What a group of two exchanges",
    "## Cutting positions: context",
    "## A rule for CI",
    "## Devices come and go",
)
MODULES = ("net", "job")
FORBIDDEN = 4
END = "…\n"

if __name__ == "__main__":
    os.environ.setdefault("PJRT_NPROC", "8")
    sys.path.insert(0, str(PAGE.parents[1]))


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of the page."""

    language: str
    text: str
    line: int
    heading: str

    @property
    def command(self):
        """The words after a prompt; none if it is no command."""
        first = self.text.partition("\n")[0]
        return shlex.split(first[2:]) if first.startswith("$ ") else []

    @property
    def output(self):
        return self.text.partition("\n")[2] if self.command else self.text

    @property
    def file(self):
        """The file that it is, or is a change of."""
        found = re.match(r"(?:#|---) (\w+\.\w+)\n", self.text)
        return Path(found[1]) if found else None


def blocks(page):
    found, heading, fence, text = [], "", None, []
    for number, line in enumerate(page.splitlines(), start=1):
        if fence is None and line.startswith("## "):
            heading = line
        elif fence is None and line.startswith("```"):
            fence, text = (line[3:], number + 1), []
        elif line == "```":
            body = "".join(f"{x}\n" for x in text)
            found.append(Block(fence[0], body, fence[1], heading))
            fence = None
        else:
            text.append(line)
    return found


def change(block):
    """Carries out a diff, whose lines must be in the file exactly once."""
    _, *lines = block.text.splitlines()
    before, after = (
        "".join(f"{line[1:]}\n" for line in lines if not line.startswith(other))
        for other in "+-"
    )
    text = block.file.read_text()
    assert text.count(before) == 1, before
    block.file.write_text(text.replace(before, after))


def shown(command, printed):
    """Of an explanation what is exchanged; what memory is for has a page of its own."""
    if command[1] == "explain":
        head, _, rest = printed.partition("\nheld several times")
        said = re.search(r"\n--forbid[\s\S]*", rest)
        return head + "\n" + END + (said[0] if said else "")
    if command[1] == "plan":
        return printed.partition("\nmemory of a device")[0] + "\n" + END
    return printed


def run_alone(run_verb, args):
    """Runs a command that finds modules as they are now, like a process of its own."""
    held = {name: sys.modules.pop(name, None) for name in MODULES}
    try:
        return run_verb(args)
    finally:
        sys.modules.update({name: x for name, x in held.items() if x is not None})


def run_page(run_verb, skips=lambda block: False):
    """Runs a page in the current directory: pairs of blocks and what they printed."""
    namespace, printed = {}, ""
    for block in blocks(PAGE.read_text()):
        if skips(block):
            printed = None
            continue
        if block.language == "diff":
            change(block)
        elif block.file:
            block.file.write_text(block.text.partition("\n")[2])
        elif block.command:
            assert block.command[0] == "shardkit"
            yield block, shown(block.command, run_alone(run_verb, block.command[1:]))
        elif block.language == "python":
            code = compile("\n" * (block.line - 1) + block.text, PAGE, "exec")
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(code, namespace)
            printed = out.getvalue()
        elif printed is not None:
            yield block, printed


def words(text):
    """What is the same on all machines, but for the last digits of a loss.

    Columns are as wide as what is in them, and a digest has all bits.
    """
    text = re.sub(r"\b[0-9a-f]{16}\b", "digest", text)
    found = re.findall(r"\d+\.\d{4,}|\S+", text)
    number = re.compile(r"\d+\.\d{4,}")
    return [
        pytest.approx(float(x), rel=1e-3) if number.fullmatch(x) else x for x in found
    ]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    # Other tests have a module `job` too, which comes back afterwards.
    held = {name: sys.modules.pop(name, None) for name in MODULES}
    yield tmp_path
    for name in MODULES:
        sys.modules.pop(name, None)
    sys.modules.update({name: x for name, x in held.items() if x is not None})


def is_long(block):
    trains_again = block.language == "python" and "train(8" in block.text
    explains = block.command[1:2] == ["explain"]
    return block.heading in LONG or explains or trains_again


@pytest.mark.usefixtures("compile_cache", "here")
def test_the_page_runs_and_shows_what_is_printed(verb):
    for block, printed in run_page(lambda args: verb(args[0])(*args[1:]), is_long):
        compare(block, printed)


@pytest.mark.slow
@pytest.mark.usefixtures("compile_cache", "here")
def test_all_of_the_page_runs_and_shows_what_is_printed(verb):
    for block, printed in run_page(lambda args: verb(args[0])(*args[1:])):
        compare(block, printed)


def compare(block, printed):
    if block.command[1:2] == ["plan"]:
        # Its figures follow profiles and have tests of their own.
        mesh = re.search(r"best mesh +(.*)", block.output)[1]
        assert re.search(r"best mesh +(.*)", printed)[1] == mesh
    elif block.command[1:2] == ["explain"]:
        assert collectives(printed) == collectives(block.output)
        for line in ("resharding", "--forbid"):
            of_line = re.compile(rf"^ *{line}\b.*", re.MULTILINE)
            assert of_line.findall(printed) == of_line.findall(block.output)
    else:
        assert words(printed) == words(block.output), block.heading


def collectives(text):
    """What is exchanged where, but for what versions of XLA put together otherwise."""
    row = re.compile(r"^(all-\S+|reduce-scatter|collective-permute)(?: \+)? +(\w+) ")
    lines = text.splitlines()
    rows = {match.groups() for match in map(row.match, lines) if match}
    causes = (
        "parameters made whole",
        "sum of gradients",
        "exact sum",
        "dot_general",
    )
    return rows, {cause for cause in causes if cause in text}


def test_the_page_is_linked_to():
    readme = (PAGE.parents[1] / "README.md").read_text()
    assert f"docs/{PAGE.name}" in readme
    for link in re.findall(r"\]\(([^)#]+)", PAGE.read_text()):
        assert (PAGE.parent / link).exists(), link


def main():
    """Runs the page and writes what it prints into it."""
    from shardkit.command.main import main as shardkit

    def run(args):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            code = shardkit(args)
        assert code in (0, FORBIDDEN), args
        return out.getvalue()

    lines = PAGE.read_text().splitlines()
    with tempfile.TemporaryDirectory() as directory, contextlib.chdir(directory):
        sys.path.insert(0, directory)
        found = [*run_page(run)]
    for block, printed in reversed(found):
        # The first line of the text of a block has the number of the fence, plus one.
        first = block.line - 1 + bool(block.command)
        last = first + len(block.output.splitlines())
        lines[first:last] = printed.splitlines()
    PAGE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

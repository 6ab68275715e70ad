"""The pages on migration are run as they stand."""

import re
import sys
import types
from pathlib import Path

import jax
import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("migrate-from-*.md"))
MOVING = "## Devices come and go"
CHANGES = "sk.scripted({2: 5, 4: 2, 6: 8})"
FEWER_CHANGES = "sk.scripted({2: 5, 6: 8})"

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


@pytest.fixture
def unoptimized():
    """Compiles in less than half of the time."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def program(page, without=""):
    """The code of a page; all else is empty lines, so that errors name its lines."""
    lines, heading, is_code = [], "", False
    for line in page.read_text().splitlines():
        is_fence = line.startswith("```")
        if line.startswith("## ") and not is_code:
            heading = line
        is_kept = is_code and not is_fence and heading != without
        lines.append(line if is_kept else "")
        if is_fence:
            is_code = line == "```python"
    return "\n".join(lines)


def run(page, code, monkeypatch, directory):
    # Dataclasses, which Linen's modules are, look for the module that they are of.
    module = types.ModuleType(page.stem.replace("-", "_"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(directory)
    exec(compile(code, page, "exec"), vars(module))
    return module


def test_pages_are_there():
    assert [page.stem.removeprefix("migrate-from-") for page in PAGES] == [
        "jit",
        "linen",
        "nnx",
        "rules",
    ]
    readme = (DOCS.parent / "README.md").read_text()
    for page in PAGES:
        code = program(page)
        assert code.count(CHANGES) == 1
        assert CHANGES not in program(page, without=MOVING)
        assert "assert trainer.state_digest() == digest" in code
        assert f"docs/{page.name}" in readme
        links = re.findall(r"\]\(([^)#]+)", page.read_text())
        assert all((DOCS / link).exists() for link in links)


@pytest.mark.usefixtures("compile_cache", "unoptimized")
@pytest.mark.parametrize("name", ["jit", "linen"])
def test_a_page_runs(name, monkeypatch, tmp_path):
    # A device count costs a program, and pages differ in nothing where they move.
    page, is_moved = DOCS / f"migrate-from-{name}.md", name == "jit"
    code = program(page, without="" if is_moved else MOVING)
    run(page, code.replace(CHANGES, FEWER_CHANGES), monkeypatch, tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("compile_cache")
@every_page
def test_a_page_runs_through_all_its_changes(page, monkeypatch, tmp_path):
    module = run(page, program(page), monkeypatch, tmp_path)
    assert module.counts == [8, 8, 5, 5, 2, 2, 8, 8]

"""Models nobody here wrote, made elastic in few lines, run as they stand."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = sorted(
    path.stem for path in EXAMPLES.glob("*.py") if "def main(" in path.read_text()
)
MAX_ELASTIC_LINES = 15
MARK = "# Elastic: what follows, up to the empty line."


@pytest.fixture
def main(monkeypatch, request):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module(request.param).main


@pytest.mark.parametrize("name", NAMES)
def test_few_lines_make_it_elastic(name):
    parts = (EXAMPLES / f"{name}.py").read_text().split(MARK)
    assert len(parts) == 2, f"{name} needs one line {MARK!r}"
    lines = parts[1].lstrip("\n").split("\n\n")[0].splitlines()
    assert len(lines) <= MAX_ELASTIC_LINES
    # Before that line it knows nothing of shardkit but its import.
    assert "sk." not in parts[0]


@pytest.mark.parametrize("main", NAMES, indirect=True)
def test_it_is_accepted(main):
    # The model is made, its loss traced and its state laid out; nothing is compiled.
    assert main(steps=0) == []


@pytest.mark.slow
@pytest.mark.parametrize("main", NAMES, indirect=True)
def test_any_devices_leave_the_same_bits(main):
    changing = main(steps=12, resize={0: 8, 2: 5, 4: 2, 6: 8})
    assert changing == main(steps=12, resize={0: 1})


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_as_a_script(name):
    subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py"], check=True, cwd=EXAMPLES.parent
    )

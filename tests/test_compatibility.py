"""Every framework, annotated in every way, with every kind of optimizer: the same bits.

`python tests/test_compatibility.py` runs all cells and writes docs/compatibility.md.
"""

import functools
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"

if __name__ == "__main__":
    import jax

    jax.config.update("jax_num_cpu_devices", 8)

from compatibility import CHANGES, MODELS, OPTIMIZERS, WAYS, WHY_NOT, train  # noqa: E402

CELLS = [(framework, way) for framework, ways in MODELS.items() for way in ways]


@functools.cache
def unchanged(framework, optimizer):
    """What one device computes; how dims are named cannot matter there."""
    return train(framework, "path rule", optimizer, {0: 1})


def is_same(framework, way, optimizer):
    found = train(framework, way, optimizer, CHANGES)
    return found == unchanged(framework, optimizer)


def test_one_of_all_cells_keeps_its_bits():
    assert is_same("dataclass", "type", "by parts")


@pytest.mark.slow
@pytest.mark.parametrize(("framework", "way"), CELLS)
def test_every_cell_keeps_its_bits(framework, way):
    for optimizer in OPTIMIZERS:
        assert is_same(framework, way, optimizer), optimizer


def spell_page():
    """The page, as it is when no cell differs."""
    header = ["framework", "annotated by", *OPTIMIZERS]
    lines = [
        "# What goes with what",
        "",
        "Each cell is a small model that trained through 8, 5, 2 and 8 devices; 0 is",
        "the number of bits in which losses and state differ from the run on one",
        "device. Dropout and BatchNorm are part of a model where its framework has",
        "them.",
        "",
        "`python tests/test_compatibility.py` runs all cells and writes this page if",
        "none differs; `make soak` runs them too. The models and optimizers are in",
        "`tests/compatibility.py`.",
        "",
        f"| {' | '.join(header)} |",
        "|---" * len(header) + "|",
    ]
    for framework, ways in MODELS.items():
        for way in WAYS:
            why_not = WHY_NOT.get((framework, way))
            cells = ["0"] * len(OPTIMIZERS) if way in ways else [f"not: {why_not}"]
            cells += [""] * (len(OPTIMIZERS) - len(cells))
            lines.append(f"| {framework} | {way} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def test_the_page_has_all_cells():
    assert PAGE.read_text() == spell_page(), "run python tests/test_compatibility.py"


def main():
    """Runs all cells, and writes the page if none differs."""
    bad = [
        (framework, way, optimizer)
        for framework, way in CELLS
        for optimizer in OPTIMIZERS
        if not is_same(framework, way, optimizer)
    ]
    if bad:
        sys.exit(f"these differ: {bad}")
    PAGE.write_text(spell_page())


if __name__ == "__main__":
    main()

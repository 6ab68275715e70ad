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


SOME = [
    ("dataclass", "type", "Adam"),
    ("Flax NNX", "Flax's metadata", "matrix"),
    ("Equinox", "path rule", "accumulating"),
]


@pytest.mark.parametrize(("framework", "way", "optimizer"), SOME)
def test_some_of_all_cells_keep_their_bits(framework, way, optimizer):
    assert is_same(framework, way, optimizer)


@pytest.mark.slow
@pytest.mark.parametrize(("framework", "way"), CELLS)
def test_every_cell_keeps_its_bits(framework, way):
    for optimizer in OPTIMIZERS:
        assert is_same(framework, way, optimizer), optimizer


def spell_page():
    """The page, as it is when no cell differs."""
    lines = [
        "# What goes with what",
        "",
        "Each cell is a small model that trained through 8, 5, 2 and 8 devices; `=` is",
        "0 differing bits in losses and state, beside the same run on one device.",
        "Dropout and BatchNorm are part of the models where the framework has them.",
        "",
        "Optimizers:",
        "",
        *(f"- {name}" for name in OPTIMIZERS),
        "",
        "Written by `python tests/test_compatibility.py`, which runs all cells, as",
        "`make soak` does.",
        "",
        "| framework | " + " | ".join(WAYS) + " |",
        "|---" * (1 + len(WAYS)) + "|",
    ]
    for framework, ways in MODELS.items():
        cells = [
            f"= with all {len(OPTIMIZERS)}" if way in ways else WHY_NOT[framework, way]
            for way in WAYS
        ]
        lines.append(f"| {framework} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


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

"""The page on frameworks is run as it stands."""

import doctest
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "frameworks.md"


def test_the_page_runs():
    found = doctest.testfile(str(PAGE), module_relative=False)
    assert found.attempted > 10
    assert not found.failed

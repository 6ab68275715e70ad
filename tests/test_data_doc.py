"""The page on data does what it says."""

import doctest
import importlib.util
import re
from pathlib import Path

import pytest


def test_the_page_on_data():
    pytest.importorskip("grain")
    text = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    if importlib.util.find_spec("datasets") is None:
        text = re.sub(r"## Hugging Face.*?(?=\n## )", "", text, flags=re.DOTALL)
    test = doctest.DocTestParser().get_doctest(text, {}, "data.md", "data.md", 0)
    result = doctest.DocTestRunner().run(test)
    assert result.attempted > 30
    assert not result.failed

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkit.checkpoint.patterns import Pattern
from shardkit.errors import ConfigError

properties = settings(max_examples=150, deadline=None, derandomize=True)


@pytest.mark.parametrize(
    ("pattern", "path", "found"),
    [
        ("a/b", "a/b", {}),
        ("a/b", "a/c", None),
        ("a/{x}", "a/b/c", None),
        ("a/{x}", "a/", None),
        ("a/{x}/c", "a/b/c", {"x": "b"}),
        ("l_{i}/w", "l_12/w", {"i": "12"}),
        ("m.{i}.{n}_proj.w", "m.0.q_proj.w", {"i": "0", "n": "q"}),
        ("{a}-{b}", "x-y-z", {"a": "x", "b": "y-z"}),
        ("{a}/{a}", "x/x", {"a": "x"}),
        ("{a}/{a}", "x/y", None),
        ("{a}-{a}", "x-x", {"a": "x"}),
        ("{r...}", "a/b", {"r": "a/b"}),
        ("a/{r...}", "a", {"r": ""}),
        ("a/{r...}/k", "a/k", {"r": ""}),
        ("a/{r...}/k", "a/b/c/k", {"r": "b/c"}),
        ("a/{r...}/k", "a", None),
        ("a/{r...}/a", "a", None),
        ("{x}/{r...}/{y}.w", "p/q/r/s.w", {"x": "p", "r": "q/r", "y": "s"}),
    ],
)
def test_patterns_match(pattern, path, found):
    assert Pattern(pattern).match(path) == found
    if found is not None:
        assert Pattern(pattern).fill(found) == path


@pytest.mark.parametrize(
    "pattern",
    [
        *("", "a//b", "/a", "{a}{b}", "{a", "a}", "{}", "{1}", "{{a}}", "{a b}"),
        *("x{r...}", "{r...}/{s...}", "{r...}/{r...}", "{a}/{a...}"),
    ],
)
def test_patterns_that_are_none_are_refused(pattern):
    with pytest.raises(ConfigError, match=r"pattern .*: .*Write paths such as"):
        Pattern(pattern)


words = st.text("ab.-", min_size=1, max_size=5)


@properties
@given(st.lists(words, min_size=1, max_size=4), st.lists(words, max_size=3))
def test_patterns_find_what_they_were_filled_with(values, rest):
    text = "x/" + "_".join(f"{{n{k}}}" for k in range(len(values))) + "/{rest...}/y"
    bound = {f"n{k}": value for k, value in enumerate(values)}
    bound["rest"] = "/".join(rest)
    pattern = Pattern(text)
    assert pattern.match(pattern.fill(bound)) == bound


def test_hostile_patterns_cost_no_more_than_their_length():
    start = time.perf_counter()
    many = "a".join(f"{{n{k}}}" for k in range(1000))
    assert Pattern(f"{many}b").match("a" * 20_000) is None
    repeated = "a".join("{n}" for _ in range(1000))
    assert Pattern(f"{repeated}b").match("a" * 20_000) is None
    deep = "/".join("{n}" for _ in range(1000))
    assert Pattern(deep + "/{r...}/x").match("a/" * 20_000 + "b") is None
    assert time.perf_counter() - start < 2

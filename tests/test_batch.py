"""What is said of a batch that cannot be used."""

import numpy as np
import pytest

from shardkit.batch import check_alike, check_batch
from shardkit.errors import DataError


def test_check_batch_returns_the_global_batch_size():
    batch = {"x": np.ones((24, 3)), "inner": {"y": np.ones(24)}}
    for num_microbatches in (1, 8, 24):
        found = check_batch(batch, num_microbatches=num_microbatches, where="here")
        assert found == 24


def test_check_batch_names_every_bad_leaf():
    batch = {
        "x": np.ones((24, 3)),
        "y": np.ones(24),
        "inner": {"short": np.ones((12, 2)), "scalar": np.float32(1)},
    }
    with pytest.raises(DataError) as caught:
        check_batch(batch, num_microbatches=8, where="train batch of step 3")
    message = str(caught.value)
    assert message.startswith("train batch of step 3: 2 of 4 leaves")
    assert "inner/short: expected 24 rows, found 12 (shape (12, 2))" in message
    assert "inner/scalar: expected 24 rows, found none (no leading dim)" in message
    assert "\n  x:" not in message


@pytest.mark.parametrize(
    ("num_rows", "num_microbatches", "advice"),
    [
        (24, 16, r"to 12 or 24, .* multiple of 16 such as 16\."),
        (24, 5, r"to 4 or 6, .* multiple of 5 such as 20\."),
        (24, 30, r"to 24, .* multiple of 30 such as 30\."),
    ],
)
def test_check_batch_offers_counts_that_divide(num_rows, num_microbatches, advice):
    batch = {"x": np.ones(num_rows), "y": np.ones(num_rows)}
    with pytest.raises(DataError, match=f"found 24 rows in x, y.*{advice}"):
        check_batch(batch, num_microbatches=num_microbatches, where="here")


@pytest.mark.parametrize("batch", [{}, {"x": 1.0}, {"a": {}}, [1, 2]])
def test_check_batch_refuses_what_holds_no_examples(batch):
    with pytest.raises(DataError, match="expected a dict of arrays"):
        check_batch(batch, num_microbatches=1, where="here")


def test_check_batch_refuses_bad_counts_and_no_rows():
    with pytest.raises(DataError, match=r"here: .*num_microbatches = 0"):
        check_batch({"x": np.ones(4)}, num_microbatches=0, where="here")
    with pytest.raises(DataError, match="found none in x"):
        check_batch({"x": np.ones((0, 2))}, num_microbatches=1, where="here")
    assert check_batch(np.ones((4, 2)), num_microbatches=2, where="here") == 4


def test_check_alike_names_every_leaf_that_differs():
    first = {"x": np.ones((4, 2), np.float32), "in": {"y": np.ones(4, np.int32)}}
    check_alike({k: first[k] for k in ("in", "x")}, first, where="data(3)")
    bad = {"x": np.ones((4, 3), np.float32), "in": {"y": np.ones(4)}, "z": np.ones(4)}
    with pytest.raises(DataError) as caught:
        check_alike(bad, first, where="data(3)")
    message = str(caught.value)
    assert message.startswith("data(3): 3 leaves are not as in the first batch")
    assert "x: expected float32[4, 2], found float32[4, 3]" in message
    assert "in/y: expected int32[4], found float64[4]" in message
    assert "z: expected nothing, found float64[4]" in message
    with pytest.raises(DataError, match=r"z: expected .*, found nothing"):
        check_alike({}, {"z": np.ones(4)}, where="here")

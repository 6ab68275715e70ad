"""Who keeps which piece: the same for all, no more copies than needed, evenly."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkit.errors import ConfigError
from shardkit.snapshot.assignment import Claim, assign

SETTINGS = settings(max_examples=80, deadline=None)


@st.composite
def problems(draw):
    num = draw(st.integers(1, 8))
    num_hosts = draw(st.integers(1, num))
    host_of = {p: f"h{p % num_hosts}" for p in range(num)}
    claims = [
        Claim(
            leaf,
            ((0, size),),
            size,
            tuple(
                (p, 10 * p)
                for p in sorted(draw(st.sets(st.integers(0, num - 1), min_size=1)))
            ),
        )
        for leaf, size in enumerate(draw(st.lists(st.integers(0, 99), max_size=20)))
    ]
    return claims, host_of, draw(st.integers(0, 3))


@SETTINGS
@given(problems(), st.randoms(use_true_random=False))
def test_every_piece_is_kept_as_often_as_needed_by_who_has_it(problem, rng):
    claims, host_of, num_losses = problem
    kept = assign(claims, host_of, num_losses)
    assert kept.keys() == host_of.keys()
    num_hosts = len(set(host_of.values()))
    needed = max(2, 1 + min(num_losses, num_hosts - 1))
    for claim in claims:
        keepers = [
            (p, piece)
            for p, pieces in kept.items()
            for piece in pieces
            if (piece.leaf, piece.box) == (claim.leaf, claim.box)
        ]
        hosts = {host_of[p] for p, _ in keepers}
        is_safe = len({host_of[p] for p, _ in claim.holders}) >= needed
        assert len(keepers) == len(hosts)
        assert len(hosts) == (0 if not claim.num_bytes else needed if is_safe else 1)
        for p, piece in keepers:
            assert (p, piece.device) in claim.holders
            assert piece.protected != is_safe
            assert piece.num_bytes == claim.num_bytes
    shuffled = [
        Claim(c.leaf, c.box, c.num_bytes, tuple(rng.sample(c.holders, len(c.holders))))
        for c in rng.sample(claims, len(claims))
    ]
    order = dict(rng.sample(list(host_of.items()), len(host_of)))
    assert assign(shuffled, order, num_losses) == kept


def loads(kept):
    return [sum(piece.num_bytes for piece in pieces) for pieces in kept.values()]


@pytest.mark.parametrize("num_losses", [0, 1, 2])
def test_replicated_state_is_spread_evenly(num_losses):
    rng = random.Random(0)
    everyone = tuple((p, p) for p in range(8))
    claims = [
        Claim(leaf, ((0, size),), size, everyone)
        for leaf, size in enumerate(rng.randrange(1, 1000) for _ in range(300))
    ]
    kept = assign(claims, {p: f"h{p}" for p in range(8)}, num_losses)
    copies = max(2, num_losses + 1)
    fair = copies * sum(claim.num_bytes for claim in claims) / 8
    assert max(loads(kept)) < 1.01 * fair
    assert min(loads(kept)) > 0.99 * fair


def test_what_one_host_must_keep_counts_before_what_others_can():
    claims = [
        Claim(0, ((0, 100),), 100, ((0, 0),)),
        *(Claim(i, ((0, 50),), 50, ((0, 0), (1, 1), (2, 2))) for i in range(1, 5)),
    ]
    kept = assign(claims, {0: "a", 1: "b", 2: "c"}, 1)
    assert max(loads(kept)) <= 200


def test_copies_on_one_host_are_no_copies():
    (piece,) = (
        piece
        for pieces in assign(
            [Claim(0, ((0, 4),), 4, ((0, 0), (1, 1)))], {0: "a", 1: "a", 2: "b"}, 1
        ).values()
        for piece in pieces
    )
    assert piece.protected


def test_a_holder_without_a_host():
    with pytest.raises(ConfigError, match=r"processes \[3\]"):
        assign([Claim(0, (), 4, ((3, 0),))], {0: "a"}, 1)


def test_many_pieces_are_quick():
    """A state of 80 thousand pieces on 64 hosts, each piece on 8 of them."""
    import time

    claims = [
        Claim(leaf, ((i, i + 1),), 1000 + leaf, tuple((h, h) for h in range(i, 64, 8)))
        for leaf in range(10_000)
        for i in range(8)
    ]
    start = time.thread_time()
    assign(claims, {p: f"h{p}" for p in range(64)}, 1)
    assert time.thread_time() - start < 10

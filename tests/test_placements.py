"""Which devices of the pool a count means."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkit.errors import MembershipError
from shardkit.placements import choose_devices


@dataclasses.dataclass(frozen=True)
class Device:
    process_index: int
    id: int


def pool_of(counts):
    return [Device(p, 10 * p + i) for p, n in enumerate(counts) for i in range(n)]


def taken(counts, num_devices, group_size=1):
    found = choose_devices(pool_of(counts), num_devices, group_size)
    return [sum(d.process_index == p for d in found) for p in range(len(counts))]


def test_processes_give_as_many():
    assert taken([4, 4], 5) == [3, 2]
    assert taken([1, 4], 4) == [1, 3]
    with pytest.raises(MembershipError, match=r"expected 2 \(one for each process\)"):
        taken([4, 4], 1)


def test_groups_stay_within_a_process():
    assert taken([4, 4], 6, 2) == [4, 2]
    # The seventh stays idle.
    assert taken([4, 4], 7, 2) == [4, 3]
    with pytest.raises(MembershipError, match=r"expected 8 \(a group of 4"):
        taken([4, 4], 4, 4)
    # Where no process has room for a group they cannot.
    assert taken([2, 2, 2], 4, 4) == [2, 1, 1]


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 4), st.data()
)
def test_what_is_in_use_is_among_what_there_is(counts, group_size, data):
    unit = group_size if min(counts) >= group_size else 1
    least = len(counts) * unit
    num_devices = data.draw(st.integers(least, sum(counts)))
    there = choose_devices(pool_of(counts), num_devices, group_size)
    assert len(there) == len({*there}) == num_devices
    assert {device.process_index for device in there} == {*range(len(counts))}
    in_groups = sum(count // unit for count in counts) * unit
    used = min(num_devices // unit * unit, in_groups)
    mesh = choose_devices(pool_of(counts), used, group_size)
    assert {*mesh} <= {*there}
    for group in range(0, used, unit):
        assert len({d.process_index for d in mesh[group : group + unit]}) == 1

"""Groups of devices in the text of programs, in all their spellings."""

import pytest

from shardkit.hlo import parse_module
from shardkit.hlo.groups import read_groups, span_of

SIZES = {"data": 2, "tensor": 4}

GROUPS = {
    "replica_groups={{0,1,2,3},{4,5,6,7}}": ("tensor",),
    "replica_groups={{0,4},{1,5},{2,6},{3,7}}": ("data",),
    "replica_groups={}": ("data", "tensor"),
    "replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}": (),
    "replica_groups=[2,4]<=[8]": ("tensor",),
    "replica_groups=[4,2]<=[2,4]T(1,0)": ("data",),
    "replica_groups=[1,8]<=[8]": ("data", "tensor"),
    "replica_groups=mesh['data'=2,'tensor'=4] {'tensor'}": ("tensor",),
    "replica_groups=mesh['a'=2,'b'=1,'c'=4] {'a'}": ("data",),
    "replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'b'}": (
        "tensor",
    ),
    "replica_groups=mesh['a'=8] {'a'}": ("data", "tensor"),
    "replica_groups=mesh['a'=8] {'a':(2)4}": ("tensor",),
    "replica_groups=mesh['a'=8] {'a':(1)2}": ("data",),
    "source_target_pairs={{0,1},{1,2},{2,3},{3,0}}": ("tensor",),
    "source_target_pairs={{0,4},{4,0},{1,1}}": ("data",),
    "source_target_pairs={{0,0},{1,1}}": (),
    "replica_groups={{0,9}}": None,
    "something_else=[3]": None,
}


@pytest.mark.parametrize("text", GROUPS)
def test_axes_follow_from_groups_however_they_are_spelled(text):
    span = span_of(f"channel_id=1, {text}, use_global_device_ids=true", SIZES)
    assert span.axes == GROUPS[text]


def test_a_part_of_an_axis_is_told_as_such():
    span = span_of("replica_groups={{0,1},{2,3},{4,5},{6,7}}", SIZES)
    assert (span.axes, span.group_size, span.is_whole) == (("tensor",), 2, False)
    assert str(span) == "tensor (parts)"


def test_a_split_axis_is_read_as_xla_means_it():
    # An axis of 8 as 2 × 4: its outer part, and its inner one.
    outer = read_groups("replica_groups=mesh['a'=8] {'a':(1)2}", 8)
    inner = read_groups("replica_groups=mesh['a'=8] {'a':(2)4}", 8)
    assert outer == [(n, n + 4) for n in range(4)]
    assert inner == [(0, 1, 2, 3), (4, 5, 6, 7)]


def test_names_with_quotes_and_brackets_are_read_back():
    text = """
ENTRY %main (x: f32[4]) -> f32[4] {
  ROOT %x = f32[4]{0} parameter(0), metadata={op_name="a}\\"b\\'{c" stack_frame_id=0}
}
"""
    [parameter] = parse_module(text).parameters
    assert parameter.op_name == "a}\"b'{c"

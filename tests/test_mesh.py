import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkit.errors import MeshError
from shardkit.mesh import MESH_AXES, MeshSpec, device_ids, mesh_sizes

FREE = {"data", "fsdp"}


@st.composite
def specs(draw):
    sizes = {axis: draw(st.integers(1, 12)) for axis in FREE}
    sizes |= {axis: draw(st.integers(1, 3)) for axis in set(MESH_AXES) - FREE}
    free = draw(st.sampled_from([None, "data", "fsdp"]))
    return MeshSpec(**{**sizes, **({free: -1} if free else {})})


@settings(max_examples=200, deadline=None, derandomize=True)
@given(spec=specs(), num_devices=st.integers(1, 64))
def test_sizes_use_every_device_that_fills_a_group(spec, num_devices):
    fixed = spec.tensor * spec.expert * spec.context
    if num_devices < fixed:
        with pytest.raises(MeshError, match=f"at least {fixed}"):
            spec.sizes(num_devices)
        return
    sizes = spec.sizes(num_devices)
    assert tuple(sizes) == MESH_AXES
    assert [sizes[a] for a in MESH_AXES[2:]] == [
        getattr(spec, a) for a in MESH_AXES[2:]
    ]
    num_groups = num_devices // fixed
    assert sizes["data"] * sizes["fsdp"] == num_groups
    bound, bent = ("data", "fsdp") if spec.fsdp == -1 else ("fsdp", "data")
    # The largest common divisor, by brute force: never more than was asked for.
    asked = getattr(spec, bound)
    assert sizes[bound] == max(
        d for d in range(1, asked + 1) if asked % d == 0 == num_groups % d
    )
    assert sizes[bent] == num_groups // sizes[bound]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(spec=specs(), num_devices=st.integers(27, 64))
def test_decisions_are_named_exactly_where_the_mesh_differs(spec, num_devices):
    sizes, notes = spec.sizes(num_devices), spec.decisions(num_devices)
    for axis in FREE:
        differs = getattr(spec, axis) not in (-1, sizes[axis])
        assert any(note.startswith(f"{axis} is {sizes[axis]} ") for note in notes) == (
            differs
        )
    idle = num_devices - int(np.prod(list(sizes.values())))
    assert any(f"{idle} of {num_devices} devices stay idle" == n for n in notes) == (
        idle > 0
    )


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": -1, "fsdp": -1}, "only one axis can be -1, found data, fsdp"),
        ({"fsdp": 2, "tensor": -1}, "tensor = -1"),
        ({"data": 0}, "'data': 0"),
        ({"data": 0, "context": -3}, "'context': -3"),
    ],
)
def test_impossible_specs_are_refused(sizes, message):
    with pytest.raises(MeshError, match=message):
        MeshSpec(**sizes)


def test_build_keeps_the_order_of_the_devices():
    pool = jax.devices()[5:1:-1]
    mesh = MeshSpec(data=2, fsdp=-1).build(pool)
    assert mesh.axis_names == MESH_AXES
    assert dict(mesh.shape) == {
        "data": 2,
        "fsdp": 2,
        "tensor": 1,
        "expert": 1,
        "context": 1,
    }
    assert device_ids(mesh) == tuple(device.id for device in pool)


def test_build_leaves_out_devices_that_fill_no_group():
    mesh = MeshSpec(tensor=2).build(jax.devices()[:5])
    assert device_ids(mesh) == (0, 1, 2, 3)
    assert MeshSpec(tensor=2).decisions(5) == ["1 of 5 devices stay idle"]


def test_mesh_sizes_names_what_is_larger_than_one():
    assert mesh_sizes(MeshSpec(data=-1, fsdp=2).build(jax.devices()[:6])) == {
        "data": 3,
        "fsdp": 2,
    }
    assert mesh_sizes(MeshSpec().build(jax.devices()[:1])) == {"data": 1}


def test_no_devices_is_a_mesh_error():
    with pytest.raises(MeshError, match="found 0"):
        MeshSpec().build([])

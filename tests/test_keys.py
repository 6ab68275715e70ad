import itertools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from shardkit import keys
from shardkit.errors import InexactError
from shardkit.mesh import MeshSpec


def bits(key):
    return tuple(np.asarray(jax.random.key_data(key)).ravel().tolist())


def test_keys_of_other_streams_steps_and_indices_differ():
    root = keys.root_key(0)
    points = itertools.product(("dropout", "noise", "loss"), range(4), range(5))
    found = {bits(keys.step_key(root, *point)) for point in points}
    assert len(found) == 3 * 4 * 5
    assert bits(root) not in found


def test_step_and_index_are_not_interchangeable():
    root = keys.root_key(0)
    assert bits(keys.step_key(root, "loss", 1, 2)) != bits(
        keys.step_key(root, "loss", 2, 1)
    )


def test_keys_are_functions_of_the_seed():
    assert bits(keys.stream(keys.root_key(3), "a")) == bits(
        keys.stream(keys.root_key(3), "a")
    )
    assert bits(keys.root_key(3)) != bits(keys.root_key(4))


def test_a_key_is_the_same_traced_or_not_and_on_any_mesh():
    root = keys.root_key(7)
    expected = bits(keys.step_key(root, "loss", 5, 3))
    for num_devices in (1, 3, 8):
        mesh = MeshSpec().build(jax.devices()[:num_devices])
        whole = NamedSharding(mesh, PartitionSpec())
        placed = jax.device_put(root, whole)
        traced = jax.jit(lambda root, step, i: keys.step_key(root, "loss", step, i))
        assert bits(traced(placed, np.int32(5), np.int32(3))) == expected


def test_the_derivation_is_frozen():
    # A change here changes every draw of every run, so it must be meant.
    assert bits(keys.step_key(keys.root_key(0), "dropout", 3, 17)) == (
        2043053312,
        3739040803,
    )


def test_example_keys_depend_on_the_row_alone():
    key = keys.root_key(1)
    many, few = keys.example_keys(key, 6), keys.example_keys(key, 2)
    assert [bits(k) for k in many[:2]] == [bits(k) for k in few]
    assert len({bits(k) for k in many}) == 6


def test_a_rank_key_stays_with_its_rank():
    root = keys.root_key(0)
    together = keys.rank_keys(root, "sampler", 4, ranks=range(8))
    apart = [keys.rank_keys(root, "sampler", 4, ranks=[r])[0] for r in range(8)]
    assert [bits(k) for k in together] == [bits(k) for k in apart]
    moved = keys.rank_keys(root, "sampler", 4, ranks=[6, 1])
    assert [bits(k) for k in moved] == [bits(together[6]), bits(together[1])]
    assert len({bits(k) for k in together}) == 8


def test_a_stream_needs_a_name():
    with pytest.raises(InexactError, match="name"):
        keys.stream(keys.root_key(0), "")


@pytest.mark.parametrize("implementation", ["rbg", "unsafe_rbg"])
def test_generators_that_depend_on_the_sharding_are_refused_by_name(implementation):
    keys.check_generator()
    with pytest.raises(InexactError, match=f"'{implementation}' is refused"):
        keys.check_generator(jax.random.key(0, impl=implementation))
    before = jax.config.jax_default_prng_impl
    jax.config.update("jax_default_prng_impl", implementation)
    try:
        with pytest.raises(InexactError, match=implementation):
            keys.root_key(0)
    finally:
        jax.config.update("jax_default_prng_impl", before)


def test_threefry_that_cannot_be_partitioned_is_refused():
    jax.config.update("jax_threefry_partitionable", False)
    try:
        with pytest.raises(InexactError, match="jax_threefry_partitionable"):
            keys.root_key(0)
    finally:
        jax.config.update("jax_threefry_partitionable", True)


def test_keys_of_an_explicit_threefry_are_accepted():
    keys.check_generator(jax.random.key(0, impl="threefry2x32"))

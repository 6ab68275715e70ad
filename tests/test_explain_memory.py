"""What memory is for, where XLA tells it and where only the text does."""

import jax
import jax.numpy as jnp
import pytest

import shardkit as sk
from shardkit.explain import buffers
from shardkit.explain.buffers import temporary_buffers

MESH = {"data": 1}


def two_products(x):
    first = jnp.tanh(x @ x)
    second = jnp.sort(first @ x, axis=0)
    return (second @ first).sum()


@pytest.fixture(scope="module")
def compiled():
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    return jax.jit(two_products).lower(x).compile()


def test_temporaries_lie_side_by_side_in_what_xla_takes_for_them(compiled):
    memory = sk.explain_program(compiled, MESH).memory
    assert memory.is_assigned
    assert memory.argument_bytes == memory.arguments[0].num_bytes == 4 * 256 * 256
    # Two of the matrices are alive at once.
    sizes = [x.num_bytes for x in memory.temporaries]
    assert sizes[:2] == [4 * 256 * 256] * 2
    assert sum(sizes) <= memory.temp_bytes
    assert {"dot_general"} <= {x.operation for x in memory.temporaries}
    assert all(x.source.startswith(f"{__file__}:") for x in memory.temporaries[:2])
    assert all(x.num_sharing is not None for x in memory.temporaries)


def test_the_assignment_that_is_read_is_xlas(compiled):
    """Guards the numbers of the fields: the sizes must be those of the instructions."""
    found = temporary_buffers(compiled)
    assert found
    text = compiled.as_text()
    for each in found:
        assert f"%{each.name} = " in text
        assert each.stop <= compiled.memory_analysis().temp_size_in_bytes
    largest = max(found, key=lambda b: b.num_bytes)
    assert largest.num_bytes == 4 * 256 * 256


def test_without_an_assignment_it_is_the_text_that_tells(compiled, monkeypatch):
    monkeypatch.setattr(buffers, "_fields", lambda message: iter(["damaged"]))
    assert temporary_buffers(compiled) is None
    memory = sk.explain_program(compiled, MESH).memory
    assert not memory.is_assigned
    assert memory.temp_bytes is not None
    assert memory.temporaries[0].num_bytes >= 4 * 256 * 256
    assert memory.temporaries[0].num_sharing is None
    text = sk.explain_program(compiled.as_text(), MESH).memory
    assert text.temporaries == memory.temporaries
    assert text.temp_bytes is None


@pytest.mark.parametrize("cut", [1, 7, 100])
def test_half_an_assignment_is_none(compiled, cut, monkeypatch):
    whole = compiled.memory_analysis().serialized_buffer_assignment_proto

    class Half:
        serialized_buffer_assignment_proto = whole[:-cut]

    class Program:
        runtime_executable = compiled.runtime_executable
        memory_analysis = staticmethod(lambda: Half)

    found = temporary_buffers(Program())
    # Where a whole message ends by chance there are fewer, and never wrong ones.
    assert found is None or {*found} <= {*temporary_buffers(compiled)}

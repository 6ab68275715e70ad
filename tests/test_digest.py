import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkit.digest import combine_digests, leaf_digest
from shardkit.layout import LeafLayout
from shardkit.mesh import MeshSpec

SHAPE = (5, 7)
WIDTHS = {
    "float32": 32,
    "bfloat16": 16,
    "float16": 16,
    "float8_e4m3fn": 8,
    "int32": 32,
    "uint32": 32,
    "int8": 8,
    "uint16": 16,
    "int4": 4,
    "bool": 1,
}


def layout_of(name, shape=SHAPE, dim=-1):
    return LeafLayout(f"params/{name}", shape, np.dtype(jnp.dtype(name)), dim)


def from_bits(words, name):
    """Views unsigned words as another dtype."""
    width = WIDTHS[name]
    if name == "bool":
        return words.astype(bool)
    if name == "int4":
        return (words.astype(np.int8) - 8).astype(jnp.int4)
    return words.astype(f"uint{width}").view(jnp.dtype(name))


def random_words(name, shape=SHAPE, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 2 ** WIDTHS[name], size=shape, dtype=np.uint32)


jit_digest = jax.jit(leaf_digest, static_argnums=1)


def digest_of(words, name):
    return tuple(
        np.asarray(jit_digest(from_bits(words, name), layout_of(name))).tolist()
    )


places = st.tuples(*[st.integers(0, n - 1) for n in SHAPE])
dtypes = st.sampled_from(sorted(WIDTHS))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(name=dtypes, place=places, seed=st.integers(0, 9), data=st.data())
def test_any_flipped_bit_changes_all_four_sums(name, place, seed, data):
    bit = data.draw(st.integers(0, WIDTHS[name] - 1))
    words = random_words(name, seed=seed)
    flipped = words.copy()
    flipped[place] ^= np.uint32(1 << bit)
    before, after = digest_of(words, name), digest_of(flipped, name)
    assert len(before) == 4
    assert all(a != b for a, b in zip(before, after, strict=True))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(name=dtypes, one=places, other=places, seed=st.integers(0, 9))
def test_swapping_two_elements_changes_the_digest(name, one, other, seed):
    words = random_words(name, seed=seed)
    swapped = words.copy()
    swapped[one], swapped[other] = words[other], words[one]
    same = words[one] == words[other]
    assert (digest_of(words, name) == digest_of(swapped, name)) == same


def test_values_that_compare_equal_have_other_digests():
    zeros = np.zeros(SHAPE, np.uint32)
    negative = zeros.copy()
    negative[2, 3] = 1 << 31
    assert digest_of(zeros, "float32") != digest_of(negative, "float32")
    payloads = [np.full(SHAPE, bits, np.uint32) for bits in (0x7FC00000, 0x7FC00001)]
    quiet, other = [digest_of(words, "float32") for words in payloads]
    assert quiet != other
    denormal = zeros.copy()
    denormal[0, 0] = 1
    assert digest_of(zeros, "float32") != digest_of(denormal, "float32")


def test_transposing_or_reshaping_is_seen():
    words = random_words("float32", (5, 5))
    x = words.view(np.float32)
    leaf = layout_of("float32", (5, 5))
    assert not np.array_equal(jit_digest(x, leaf), jit_digest(x.T, leaf))
    # The same elements in the same order are the same state: shapes are not bits.
    # They are part of what is combined.
    flat = layout_of("float32", (25,))
    one, other = jit_digest(x, leaf), jit_digest(x.reshape(25), flat)
    assert combine_digests({leaf.path: one}, [leaf]) != combine_digests(
        {flat.path: other}, [flat]
    )


MESHES = [(1, 1), (1, 3), (2, 2), (1, 8), (3, 1)]


@pytest.mark.parametrize(("data", "fsdp"), MESHES)
def test_a_digest_is_the_same_on_any_mesh_along_any_dim(data, fsdp):
    devices = jax.devices()[::-1][: data * fsdp]
    mesh = MeshSpec(data=data, fsdp=-1).build(devices)
    layout, state = [], []
    for name in WIDTHS:
        for dim in (-1, 0, 1):
            leaf = layout_of(name, dim=dim)
            physical = random_words(name, leaf.physical_shape(fsdp), seed=fsdp)
            physical[: SHAPE[0], : SHAPE[1]] = random_words(name)
            # What is left of `physical` is garbage, and padding.
            layout.append(leaf)
            state.append(jax.device_put(from_bits(physical, name), leaf.sharding(mesh)))
    digests = jax.jit(lambda state: list(map(leaf_digest, state, layout)))(state)
    for leaf, digest in zip(layout, digests, strict=True):
        name = leaf.path.split("/")[1]
        expected = digest_of(random_words(name), name)
        assert tuple(np.asarray(digest).tolist()) == expected, (name, leaf.dim)


def test_scalars_keys_and_complex_numbers_have_digests():
    def digest(x):
        return np.asarray(jit_digest(x, LeafLayout("x", x.shape, x.dtype))).tolist()

    assert digest(jnp.float32(1)) != digest(jnp.float32(2))
    keys = jax.random.split(jax.random.key(0), 3)
    assert digest(keys) != digest(keys[::-1])
    assert digest(keys) == digest(jax.random.wrap_key_data(jax.random.key_data(keys)))
    z = jnp.array([1 + 2j, 3 + 4j], jnp.complex64)
    assert len({tuple(digest(x)) for x in (z, z.conj(), z[::-1], z * 1j)}) == 4
    assert digest(jnp.zeros((0, 3))) == [0, 0, 0, 0]


def test_wide_elements_are_words_along_a_last_dim():
    def digest(x):
        return np.asarray(leaf_digest(x, LeafLayout("x", x.shape, x.dtype))).tolist()

    z = jnp.array([1 + 2j, 3 - 4j, -0.0], jnp.complex64)
    assert digest(z) == digest(jnp.stack([z.real, z.imag], axis=-1))
    keys = jax.random.split(jax.random.key(0), 3)
    assert digest(keys) == digest(jax.random.key_data(keys))
    with jax.enable_x64(True):
        for x in (np.float64([0.1, -0.3]), np.int64([2**40 + 5, -7])):
            bits = x.view(np.uint64)
            words = np.stack([bits % 2**32, bits >> 32], axis=-1).astype(np.uint32)
            assert digest(jnp.asarray(x)) == digest(jnp.asarray(words))


def small_layout():
    return {
        "b": LeafLayout("b", (3,), np.dtype("int8")),
        "a": LeafLayout("a", (2, 2), np.dtype("float32")),
    }


def small_digests():
    layout = small_layout()
    state = {
        "a": jnp.array([[1.0, -0.0], [jnp.inf, 2.5e-3]]),
        "b": jnp.array([-1, 0, 127], jnp.int8),
    }
    return {
        layout[name].path: np.asarray(jit_digest(state[name], layout[name]))
        for name in state
    }


def test_the_definition_is_frozen():
    # Digests are saved with checkpoints: another definition cannot read them.
    digests = small_digests()
    assert [f"{lane:08x}" for lane in digests["a"].tolist()] == [
        "ee8c4ec3",
        "84ec0fe6",
        "a19d8d1c",
        "8f6f3131",
    ]
    assert combine_digests(digests, small_layout()) == (
        "e8b18d4b132cfeff9928e0c23e3cbaa4"
    )


def test_the_order_of_leaves_is_not_part_of_a_digest_but_all_else_is():
    digests, layout = small_digests(), small_layout()
    expected = combine_digests(digests, layout)
    assert combine_digests(digests, [*layout.values()][::-1]) == expected
    variants = [
        (digests | {"a": digests["b"]}, layout),
        (digests | {"a": digests["a"] ^ np.uint32(1)}, layout),
        ({"a": digests["b"], "b": digests["a"]}, layout),
        (digests, {"a": layout["a"]}),
        (digests, layout | {"a": LeafLayout("a", (4,), np.dtype("float32"))}),
        (digests, layout | {"a": LeafLayout("a", (2, 2), np.dtype("int32"))}),
        (
            digests | {"c": digests["a"]},
            layout | {"a": LeafLayout("c", (2, 2), np.dtype("float32"))},
        ),
    ]
    found = {combine_digests(*variant) for variant in variants}
    assert len(found) == len(variants)
    assert expected not in found


@pytest.mark.parametrize("dim", [-1, 0])
def test_how_a_leaf_is_cut_is_not_part_of_a_digest(dim):
    layout = small_layout()
    layout["a"] = LeafLayout("a", (2, 2), np.dtype("float32"), dim)
    assert combine_digests(small_digests(), layout) == combine_digests(
        small_digests(), small_layout()
    )

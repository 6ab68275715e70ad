"""Real Flax writes with real Orbax; what that stored is remapped."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen, nnx
from flax.training import train_state

from models import gpt
from shardkit.checkpoint.orbax_trees import from_linen, from_nnx, to_linen, to_nnx
from shardkit.checkpoint.views import ArrayView, whole_box
from shardkit.errors import RestoreError
from shardkit.tree import named_leaves

SIZES = {"num_layers": 11, "num_heads": 2, "embed_dim": 8, "mlp_dim": 12}
TX = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.inject_hyperparams(optax.adamw)(learning_rate=optax.constant_schedule(0.1)),
)


def stored(path, tree):
    """Saves with Orbax and reads it back without a target, as a stranger would."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
        checkpointer.wait_until_finished()
        found = checkpointer.restore(path)
    return {name: ArrayView(np.asarray(leaf)) for name, leaf in named_leaves(found)}


def ours(params):
    """The leaves of a state of ours."""
    state = {"step": jnp.int32(0), "params": params, "opt_state": TX.init(params)}
    return dict(named_leaves(state))


def assert_same(tree, wanted, but=()):
    """Compares paths, shapes and bits."""
    assert set(tree) == set(wanted)
    for path, leaf in wanted.items():
        leaf = np.asarray(leaf)
        if path not in but:
            assert tree[path].dtype == leaf.dtype, path
        found = tree[path].read(whole_box(tree[path].shape))
        assert found.shape == leaf.shape, path
        assert found.astype(leaf.dtype).tobytes() == leaf.tobytes(), path


def fill(tree):
    """Makes every leaf tell its path."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.full_like(leaf, hash_of(path) % 100), tree
    )


def hash_of(path):
    return sum(ord(c) * (k + 1) for k, c in enumerate(jax.tree_util.keystr(path)))


@pytest.fixture(scope="module")
def model():
    return gpt.GPT(gpt.GPTConfig(**SIZES, vocab_size=13), nnx.Rngs(0))


@pytest.mark.parametrize("pure", [False, True], ids=["state", "pure"])
@pytest.mark.parametrize("place", ["", "model"], ids=["top", "below"])
def test_the_state_of_an_nnx_model(model, tmp_path, pure, place):
    params = fill(nnx.state(model, nnx.Param))
    state = nnx.to_pure_dict(params) if pure else params
    tree = stored(tmp_path / "a", {place: state} if place else state)
    found = from_nnx(tree, model=place).apply(tree)
    wanted = {path: x for path, x in ours(params).items() if path.startswith("params/")}
    assert_same(found, wanted)
    back = to_nnx(found, model=place).apply(found)
    assert {path.removesuffix("/value") for path in back} == {
        path.removesuffix("/value") for path in tree
    }


def test_an_nnx_model_with_its_optimizer(model, tmp_path):
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    nnx.update(optimizer, fill(nnx.state(optimizer)))
    params = fill(nnx.state(model, nnx.Param))
    state = {"model": params, "optimizer": nnx.state(optimizer)}
    tree = stored(tmp_path / "a", state)
    found = from_nnx(tree, model="model", optimizer="optimizer").apply(tree)
    wanted = ours(params)
    assert set(found) == set(wanted)
    for path, leaf in wanted.items():
        assert found[path].shape == leaf.shape
        if path.startswith("opt_state"):
            # The path that it had, to tell whether moments were mixed up.
            source = f"optimizer/{path}"
            source += "/value" * (source not in tree)
            assert found[path] is tree[source]
    assert found["step"].dtype == np.uint32
    back = to_nnx(found, model="model", optimizer="optimizer").apply(found)
    assert back == tree


class Block(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(4, name="up")(x)


class Tower(linen.Module):
    def setup(self):
        self.layers = [Block() for _ in range(12)]

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def linen_state(all_variables):
    tower = Tower()
    variables = tower.init(jax.random.key(0), jnp.zeros((1, 4)))
    params = fill(variables if all_variables else variables["params"])
    state = train_state.TrainState.create(apply_fn=tower.apply, params=params, tx=TX)
    return state.replace(opt_state=fill(state.opt_state), step=7)


@pytest.mark.parametrize("all_variables", [False, True], ids=["params", "variables"])
def test_a_linen_train_state_is_as_it_is(tmp_path, all_variables):
    state = linen_state(all_variables)
    tree = stored(tmp_path / "a", state)
    found = from_linen(tree).apply(tree)
    inner = state.params["params"] if all_variables else state.params
    assert {path for path in found if path.startswith("params/")} == {
        f"params/{path}" for path, _ in named_leaves(inner)
    }
    assert set(found) == set(ours(inner))
    back = to_linen(has_collection=all_variables).apply(found)
    assert back == tree


def test_lists_of_linen_become_those_of_nnx(tmp_path):
    state = linen_state(all_variables=True)
    tree = stored(tmp_path / "a", state)
    options = {"numbered": ["layers"], "suffix": "/value"}
    found = from_linen(tree, **options).apply(tree)

    class NNXBlock(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(4, 4, rngs=rngs)

    class NNXTower(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([NNXBlock(rngs) for _ in range(12)])

    assert set(found) == set(ours(nnx.state(NNXTower(nnx.Rngs(0)), nnx.Param)))
    moment = found["opt_state/1/inner_state/0/nu/layers/10/up/bias/value"]
    wanted = "opt_state/1/inner_state/0/nu/params/layers_10/up/bias"
    assert moment is tree[wanted]
    back = to_linen(**options, has_collection=True).apply(found)
    assert back == tree


def test_where_there_is_nothing_is_said(model):
    with pytest.raises(RestoreError, match="expected leaves at net, found a/value"):
        from_nnx({"a/value": None}, model="net")
    with pytest.raises(RestoreError, match="expected leaves at optimizer/opt_state/"):
        from_nnx({"model/a/value": None}, model="model", optimizer="optimizer")
    for make in (from_linen, to_nnx):
        with pytest.raises(RestoreError, match="expected leaves at params/"):
            make({"step": None})

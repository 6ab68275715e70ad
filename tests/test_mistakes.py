"""What people get wrong: one message says where, expected, found and what to do.

Each test is a mistake in a program that is otherwise right; all bad leaves are named.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import shardkit as sk
from shardkit.functions import check_captures


def init(key):
    return {"w": sk.axes(jax.random.normal(key, (8, 4)), "embed", None)}


def loss(params, microbatch, key):
    return jnp.mean((microbatch["x"] @ params["w"]) ** 2)


def batches(step):
    return {"x": np.ones((16, 8), np.float32)}


def run(**changed):
    """Trains a little; returns what was noticed."""
    events = sk.EventLog()
    notices = []
    events.subscribe(
        lambda e: e.name == "notice" and notices.append(e.fields["message"])
    )
    arguments = {
        "init": init,
        "loss": loss,
        "tx": optax.sgd(0.1),
        "data": batches,
        "axis_rules": {"embed": "fsdp"},
        "num_microbatches": 4,
        "certify": "off",
        "events": events,
    }
    with sk.Trainer(**(arguments | changed)) as trainer:
        for _ in trainer.run(steps=1, membership=sk.scripted({})):
            pass
    return notices


def refusal(kind, **changed):
    with pytest.raises(kind) as caught:
        run(**changed)
    return str(caught.value)


def test_the_program_itself_is_right():
    assert run() == []


def test_a_mesh_axis_that_does_not_exist():
    text = refusal(sk.PartitionError, axis_rules={"embed": "fspd", "mlp": "dta"})
    assert "embed = 'fspd'" in text
    assert "did you mean 'fsdp'?" in text
    assert "mlp = 'dta'" in text
    assert "did you mean 'data'?" in text


def test_rules_as_other_libraries_write_them():
    pairs = [("embed", "fsdp"), ("mlp", ["tensor"])]
    text = refusal(sk.ConfigError, axis_rules=pairs)
    assert "axis_rules: expected a dict, found a list" in text
    assert '{"embed": "fsdp"}' in text
    text = refusal(sk.ConfigError, path_rules=[("w", ("embed", None))])
    assert "path_rules: expected a dict, found a list" in text
    text = refusal(sk.PartitionError, axis_rules={"embed": ["fsdp", "sequence"]})
    assert "embed = ['fsdp', 'sequence']  ; give one of them: 'fsdp'" in text


@pytest.mark.parametrize(
    ("changed", "whose"),
    [
        ({"axis_rules": {"embed": "data"}}, "axis_rules: 'embed'"),
        (
            {"path_rules": {"w": PartitionSpec("data")}, "init": lambda k: three(k)},
            "a PartitionSpec",
        ),
    ],
)
def test_a_mesh_axis_that_cuts_nothing(changed, whose):
    [notice] = run(**{"axis_rules": {}, **changed})
    assert notice.startswith(f"{whose} goes to 'data', along which no array is cut;")


def test_a_mesh_that_is_set():
    with jax.set_mesh(jax.make_mesh((8,), ("x",))):
        text = refusal(sk.ConfigError)
    assert "{'x': 8} the current mesh" in text
    assert "leave jax.set_mesh out" in text


def test_a_mesh_that_is_set_later(make):
    # JAX would refuse a save, after all the steps before it.
    trainer, _ = make()
    with jax.set_mesh(jax.make_mesh((8,), ("x",))):
        with pytest.raises(sk.ConfigError, match=r"leave jax\.set_mesh out"):
            next(trainer.run(1))


def test_a_logical_axis_that_no_leaf_has():
    [notice] = run(axis_rules={"embde": "fsdp"})
    assert "no leaf has the logical axis 'embde'; did you mean 'embed'?" in notice
    text = refusal(sk.PartitionError, axis_rules={"embde": "fsdp"}, strict=True)
    assert "did you mean 'embed'?" in text


def three(key):
    return {name: jnp.ones((8, 4)) for name in ("u", "v", "w")}


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (
            ("embed",),
            "each of the 2 dims of an array of shape (8, 4), found ('embed',)",
        ),
        ("embed", "each of the 2 dims of an array of shape (8, 4), found ('embed',)"),
        ((["embed"], None), "found ['embed']"),
        (
            PartitionSpec(None, None, "fsdp"),
            "at most 2 dims for an array of shape (8, 4)",
        ),
        (PartitionSpec("fsdp", "fsdp"), "each mesh axis once"),
        (PartitionSpec("fspd"), "one of data, fsdp"),
    ],
)
def test_names_that_do_not_fit_are_told_of_all_leaves(names, found):
    rules = {"u": names, "v": names, "w": ("embed", None)}
    text = refusal(sk.PartitionError, init=three, path_rules=rules)
    lines = text.splitlines()
    for leaf in ("u", "v"):
        [line] = [line for line in lines if line.split()[0] == leaf]
        assert f"path rule '{leaf}'" in line
        assert found in line
    assert not any(line.split()[0] == "w" for line in lines)
    assert "Give a name for each dim" in text


def test_leaves_that_were_forgotten():
    def init(key):
        return {"w": sk.axes(jnp.ones((8, 4)), "embed", None), **three(key)} | {
            "w": sk.axes(jnp.ones((8, 4)), "embed", None)
        }

    text = refusal(sk.PartitionError, init=init, strict=True)
    assert "u  (8, 4)" in text
    assert "v  (8, 4)" in text
    assert "Annotate them" in text


def test_a_path_rule_that_fits_nothing():
    [notice] = run(path_rules={"**/kernel": ("embed", None)})
    assert "no array's path fits '**/kernel'" in notice


def test_parameters_that_are_no_floats():
    def init(key):
        return {
            "w": jnp.ones((8, 4)),
            "count": jnp.arange(3),
            "mask": jnp.ones(2, bool),
        }

    text = refusal(sk.PartitionError, init=init)
    assert "count  int32" in text
    assert "mask   bool" in text
    assert "out of params" in text


def test_leaves_that_are_no_arrays():
    def init(key):
        return {"w": jnp.ones((8, 4)), "act": jnp.tanh, "name": "mlp"}

    text = refusal(sk.PartitionError, init=init)
    assert "act" in text
    assert "found str 'mlp'" in text
    assert "static fields" in text


def test_host_arrays_are_as_good_as_others():
    rng = np.random.default_rng(0)
    assert (
        run(
            init=lambda key: {"w": rng.normal(size=(8, 4)).astype(np.float32)},
            axis_rules={},
        )
        == []
    )
    # And arrays that are on a device already, where batches come from the host.
    assert run(data=lambda step: {"x": jnp.ones((16, 8))}) == []


def test_a_state_of_another_tree():
    def init(key):
        return sk.Variables(three(key), [jnp.ones(2), jnp.ones(3)])

    def loss(params, state, microbatch, key):
        return sk.LossOutput(params["w"].sum(), jnp.float32(1), state=tuple(state))

    text = refusal(sk.PartitionError, init=init, loss=loss, axis_rules={})
    assert "expected PyTreeDef([*, *])" in text
    assert "found PyTreeDef((*, *))" in text


def test_a_state_that_is_not_returned():
    def init(key):
        return sk.Variables(three(key), {"mean": jnp.ones(2), "var": jnp.ones(2)})

    text = refusal(
        sk.PartitionError,
        init=init,
        loss=lambda p, state, m, key: sk.LossOutput(p["w"].sum(), jnp.float32(1)),
        axis_rules={},
    )
    assert "mean  expected float32[2]  found nothing" in text
    assert "var   expected float32[2]  found nothing" in text


def test_arrays_on_devices_that_a_loss_closes_over():
    mesh = jax.make_mesh((8,), ("x",))
    weights = {
        "cut": jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, PartitionSpec("x")))
    }
    gone = jnp.ones((8, 4))
    gone.delete()

    def inner(params):
        return params["w"] + weights["cut"]

    def loss(params, microbatch, key):
        return jnp.mean(microbatch["x"] @ (inner(params) + gone))

    text = refusal(sk.PartitionError, loss=loss)
    assert "weights/cut  float32[8, 4]  on 8 devices" in text
    assert "gone         float32[8, 4]  deleted" in text
    assert "as state (sk.Variables)" in text


def test_large_arrays_that_a_loss_closes_over_are_noticed():
    table = jnp.ones((512, 1024))
    small = jnp.ones((8, 4))

    def loss(params, microbatch, key):
        return jnp.mean(microbatch["x"] @ (params["w"] + small)) + table[0, 0]

    [notice] = check_captures("loss", loss)
    assert "loss sees table, float32[512, 1024], from outside" in notice


@pytest.mark.parametrize(
    ("changed", "kind", "found"),
    [
        ({"loss": lambda p, m: 0.0}, sk.ConfigError, "(params, microbatch, key)"),
        ({"loss": lambda p, m, k: (0.0, {})}, sk.PartitionError, "found a tuple"),
        ({"loss": lambda p, m, k: m["x"][:, 0]}, sk.PartitionError, "scalars"),
        ({"tx": 0.1}, sk.ConfigError, "found float without init and update"),
        ({"data": [1, 2]}, sk.ConfigError, "a function of (step), found list"),
        ({"data": iter([])}, sk.ConfigError, "sk.from_iterable"),
        ({"data": lambda: iter([])}, sk.ConfigError, "sk.from_iterable"),
        ({"data": lambda s: (1, 2)}, sk.DataError, "a tuple of 2. Name its parts"),
        ({"data": sk.from_iterable([[1]])}, sk.DataError, "batch 0: expected a dict"),
        ({"mesh": {"fsdp": 8}}, sk.ConfigError, "such as sk.MeshSpec(data=2"),
        ({"num_microbatches": 5}, sk.DataError, "Set num_microbatches to 4"),
    ],
)
def test_arguments_that_are_something_else(changed, kind, found):
    assert found in refusal(kind, **changed)


def test_attributes_and_odd_globals_are_no_captures():
    gone = jnp.ones(3)
    gone.delete()
    odd = {1: "a", "x": 2}
    odd["self"] = odd
    scope = {"w": gone, "odd": odd, "jnp": jnp}
    code = "def loss(params, microbatch, key):\n    return params.w.sum() + len(odd)"
    exec(code, scope)
    assert check_captures("loss", scope["loss"]) == []

    def empty(params, microbatch, key):
        return never + params

    if not odd:
        never = 1
    assert check_captures("loss", empty) == []


def test_many_functions_and_values_are_looked_at_once():
    table = jnp.ones((512, 1024))
    ints = list(range(3_000_000))
    scope = {"table": table, "ints": ints}
    names = [f"f{i}" for i in range(30)]
    for name in names:
        body = " + ".join(f"{other}(x)" for other in names)
        exec(f"def {name}(x):\n    return {body} + table + len(ints)", scope)
    assert len(check_captures("loss", scope["f0"])) == 1


def test_a_misspelled_rule_for_the_state():
    def init(key):
        return sk.Variables(three(key), {"seen": jnp.zeros(2)})

    def loss(params, state, microbatch, key):
        return sk.LossOutput(params["w"].sum(), jnp.float32(1), state=state)

    changed = {"init": init, "loss": loss, "axis_rules": {}}
    [notice] = run(**changed, combine={"sen": "sum"})
    assert "no leaf of the state fits 'sen'" in notice
    text = refusal(sk.PartitionError, **changed, combine={"sen": "sum"}, strict=True)
    assert "fits 'sen'" in text
    text = refusal(sk.ConfigError, **changed, combine={"seen": "summ"})
    assert "expected one of 'mean', 'sum', 'last'" in text
    assert "'seen': 'summ'" in text


def test_a_state_that_is_none_is_no_state():
    assert run(init=lambda key: sk.Variables(init(key), None)) == []

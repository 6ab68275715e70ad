"""What is saved can be read on any mesh, by the run that saved it and no other."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import PROBLEMS, consume, fields_of, linear, linear_data

import shardkit as sk
from shardkit.checkpoint import manager
from shardkit.checkpoint.manifest import FILE_NAME, sealed
from shardkit.checkpoint.remap import Remap
from shardkit.checkpoint.remap_ops import Drop, Transpose
from shardkit.checkpoint.rules import Rule
from shardkit.testing import assert_same_bits, run_digest


@pytest.fixture
def saved(make, tmp_path):
    """A run of the linear problem with steps 1 and 2 saved, and where."""
    config = sk.CheckpointConfig(directory=tmp_path, every=1)
    trainer, _ = make(checkpoint=config)
    consume(trainer, 2)
    return trainer, config


def edit_record(config, step, change):
    """Changes the record beside a saved state."""
    path = config.directory / str(step) / "state" / FILE_NAME
    record = json.loads(path.read_text())
    change(record)
    del record["sha256"]
    path.write_bytes(sealed(record))


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (sk.MeshSpec(data=2, fsdp=-1), sk.MeshSpec(data=1, fsdp=-1)),
        pytest.param(
            sk.MeshSpec(data=1, fsdp=-1),
            sk.MeshSpec(data=-1, fsdp=2),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["2x4 to 1x3", "1x3 to 3x2"],
)
def test_a_run_goes_on_from_another_mesh(first, then, make, tmp_path):
    counts = (8, 3) if first.data == 2 else (3, 6)
    config = sk.CheckpointConfig(directory=tmp_path)
    options = PROBLEMS["linear-clip-adam-ema"]() | {"checkpoint": config}
    trainer, _ = make(**options | {"mesh": first})
    begun = run_digest(trainer, 3, {0: counts[0]})
    trainer.save()
    state = jax.tree.map(np.asarray, trainer.state)
    resumed, _ = make(**options | {"mesh": then})
    assert resumed.restore() == resumed.step == 3
    found = run_digest(resumed, 3, {3: counts[1]})
    assert found == {"steps": {}, "state": begun["state"]}
    assert_same_bits(resumed.state, state)
    assert run_digest(resumed, 6, {3: counts[1]}) == run_digest(trainer, 6)


def test_keys_and_narrow_floats_are_saved_too(make, tmp_path):
    def init(key):
        kernel = jax.random.normal(key, (5, 3)).astype(jnp.bfloat16)
        return {"kernel": sk.axes(kernel, "in", "out"), "bias": jnp.ones(3)}

    noise = optax.add_noise(eta=0.1, gamma=0.5, key=jax.random.key(7))
    options = {
        "init": init,
        "tx": optax.chain(noise, optax.adam(0.1)),
        "loss_scale": sk.LossScale(),
        "ema": 0.9,
        "checkpoint": sk.CheckpointConfig(directory=tmp_path),
    }
    trainer, _ = make(**options)
    consume(trainer, 2)
    trainer.save()
    resumed, _ = make(**options)
    resumed.restore()
    assert run_digest(resumed, 4, {2: 3}) == run_digest(trainer, 4)


def test_what_is_restored_can_be_donated(make, saved):
    _, config = saved
    for spec in (sk.MeshSpec(data=1, fsdp=-1), sk.MeshSpec(data=-1, fsdp=1)):
        trainer, _ = make(mesh=spec, checkpoint=config)
        trainer.restore(2)
        _, state = trainer._controller.start()
        consume(trainer, 3)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_any_saved_step_can_be_restored(make, saved):
    trainer, _ = saved
    twin, _ = make()
    assert trainer.restore(1) == 1
    assert trainer.state_digest() == run_digest(twin, 1)["state"]
    assert run_digest(trainer, 3)["state"] == run_digest(twin, 3)["state"]
    with pytest.raises(sk.RestoreError, match=r"step 9, found \[\d, \d\]"):
        trainer.restore(9)


@pytest.mark.parametrize("end", [4, 6, 7])
def test_a_run_that_went_back_replaces_what_it_had_saved(make, tmp_path, end):
    config = sk.CheckpointConfig(directory=tmp_path, every=3, keep=None)
    trainer, _ = make(checkpoint=config)
    consume(trainer, 6)
    edit_record(config, 6, lambda record: record.update(digest="damaged"))
    trainer.restore(3)
    consume(trainer, end)
    trainer.save()
    again, _ = make(checkpoint=config)
    assert again.restore() == end
    twin, _ = make()
    assert again.state_digest() == run_digest(twin, end)["state"]
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"3", str(end)} | ({"6"} if end > 6 else set())
    records = [p.read_text() for p in tmp_path.glob(f"*/state/{FILE_NAME}")]
    assert not any("damaged" in record for record in records)


def test_nothing_saved_is_said_so(make, tmp_path):
    empty, _ = make(checkpoint=sk.CheckpointConfig(directory=tmp_path / "none"))
    with pytest.raises(sk.RestoreError, match="expected a checkpoint, found none"):
        empty.restore()
    without, _ = make()
    for method in (without.restore, without.save):
        with pytest.raises(sk.ConfigError, match="made without checkpoint"):
            method()


def test_every_leaf_of_another_optimizer_is_named(make, saved):
    _, config = saved
    other, _ = make(tx=optax.sgd(0.1, momentum=0.9), checkpoint=config)
    other.restore()
    with pytest.raises(sk.RestoreError, match="leaves of the checkpoint") as caught:
        other.state  # noqa: B018
    lines = [line.split() for line in str(caught.value).splitlines()]
    found = {line[0]: " ".join(line[1:]) for line in lines[1:-1]}
    assert found == {
        "opt_state/0/trace/bias": "expected float32[3] found nothing",
        "opt_state/0/trace/kernel": "expected float32[5, 3] found nothing",
        "opt_state/0/count": "expected nothing found int32[]",
        **{
            f"opt_state/0/{moment}/{name}": f"expected nothing found float32{shape}"
            for moment in ("mu", "nu")
            for name, shape in (("bias", [3]), ("kernel", [5, 3]))
        },
    }


def test_every_leaf_of_another_model_is_named(make, saved):
    _, config = saved

    def init(key):
        kernel = jax.random.normal(key, (5, 4)).astype(jnp.bfloat16)
        return {"kernel": kernel, "bias": jnp.ones(4)}

    def loss(params, microbatch, key):
        kept = {"kernel": params["kernel"][:, :3], "bias": params["bias"][:3]}
        return linear()["loss"](kept, microbatch, key)

    other, _ = make(init=init, loss=loss, checkpoint=config)
    other.restore()
    message = r"params/kernel +expected bfloat16\[5, 4\] +found float32\[5, 3\]"
    with pytest.raises(sk.RestoreError, match=message):
        consume(other, 3)


def test_another_run_is_refused_with_all_that_differs(make, saved):
    _, config = saved
    other, _ = make(seed=1, manifest={"corpus": "b"}, checkpoint=config)
    with pytest.raises(sk.RestoreError, match="of another run") as caught:
        other.restore()
    assert "seed" in str(caught.value)
    assert "saved 0" in str(caught.value)
    assert "now 1" in str(caught.value)
    assert str(caught.value).endswith("Give restore(remap=…) if that is meant.")
    assert "saved not recorded  now 'b'" in str(caught.value)


def test_another_environment_is_a_notice(make, saved, monkeypatch):
    _, config = saved
    trainer, events = make(checkpoint=config)
    monkeypatch.setenv("PJRT_NPROC", "3")
    trainer.restore()
    [notice] = fields_of(events, "notice")
    assert "threads was 8, is 3" in notice["message"]


def test_a_leaf_that_is_not_what_was_saved_is_named(make, saved):
    trainer, config = saved

    def change(record):
        blocks = record["leaves"]["opt_state/0/mu/kernel"]["blocks"]
        blocks[0] = f"{int(blocks[0], 16) ^ 1:032x}"

    edit_record(config, 2, change)
    trainer.restore(2)
    message = r"2/state: damaged: 1 block is .*\n  opt_state/0/mu/kernel  block 0 of 1"
    with pytest.raises(sk.DamagedError, match=message):
        trainer.state  # noqa: B018
    # The step before is whole.
    trainer.restore(1)
    assert int(trainer.state.step) == 1


@pytest.mark.parametrize("part", ["manifest", "arrays", "missing"])
def test_a_damaged_step_is_passed_over_for_the_newest_that_is_whole(make, saved, part):
    _, config = saved
    item = config.directory / "2" / "state"
    if part == "manifest":
        path = item / FILE_NAME
        path.write_bytes(path.read_bytes().replace(b"float32", b"float16"))
    else:
        # Which of them is read is TensorStore's affair.
        for path in item.rglob("d/*"):
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content) if part == "arrays" else path.unlink()
    trainer, events = make(checkpoint=config)
    first = trainer.restore()
    found = run_digest(trainer, 4, {})
    twin, _ = make()
    assert found["state"] == run_digest(twin, 4)["state"]
    assert first == (1 if part == "manifest" else 2)
    assert [*found["steps"]] == [1, 2, 3]
    [notice] = fields_of(events, "notice")
    assert "step 2 cannot be restored, going on from step 1: " in notice["message"]


def test_one_flipped_bit_in_a_file_is_found(make, tmp_path):
    def init(key):
        # Random bits cannot be compressed, so they are found in the file as they are.
        bits = jax.random.bits(key, (4096,))
        noise = jax.lax.bitcast_convert_type(bits, jnp.float32)
        noise = jnp.where(jnp.isfinite(noise), noise, 1.0)
        return {**linear()["init"](key), "noise": noise}

    config = sk.CheckpointConfig(directory=tmp_path)
    trainer, _ = make(init=init, checkpoint=config)
    trainer.save()
    # The beginning of the leaf, as a leaf is cut into pieces to be written.
    noise = np.asarray(trainer.state.params["noise"]).tobytes()[:1000]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    [path] = [path for path in files if noise in path.read_bytes()]
    content = bytearray(path.read_bytes())
    content[content.index(noise) + 500] ^= 0x10
    path.write_bytes(content)
    trainer.restore()
    with pytest.raises(sk.RestoreError, match=r"params/noise +block 0 of 1"):
        trainer.state  # noqa: B018


def test_a_record_that_cannot_be_read_is_an_error(make, saved):
    trainer, config = saved
    path = config.directory / "2" / "state" / FILE_NAME
    path.write_text(path.read_text()[:-9])
    with pytest.raises(sk.DamagedError, match=f"{FILE_NAME}: damaged"):
        trainer.restore(2)


def test_a_new_run_does_not_begin_among_the_checkpoints_of_another(make, tmp_path):
    checkpoint = sk.CheckpointConfig(directory=tmp_path, every=2)
    first, _ = make(checkpoint=checkpoint)
    assert first.saved_steps == []
    consume(first, 4)
    second, events = make(checkpoint=checkpoint)
    with pytest.raises(sk.RestoreError, match=r"holds steps \[2, 4\].*restore"):
        consume(second, 4)
    with pytest.raises(sk.RestoreError, match="another directory"):
        second.save()
    assert fields_of(events, "checkpoint") == []
    assert second.saved_steps == [2, 4]
    assert second.restore() == 4
    assert second.state_digest() == first.state_digest()


def test_another_run_that_saves_meanwhile_is_not_taken_for_this_one(make, tmp_path):
    checkpoint = sk.CheckpointConfig(directory=tmp_path)
    first, _ = make(checkpoint=checkpoint)
    second, events = make(checkpoint=checkpoint, tx=optax.sgd(0.5))
    consume(first, 2)
    consume(second, 2)
    first.save()
    with pytest.raises(sk.RestoreError, match="step 2 has been saved by another run"):
        second.save()
    assert fields_of(events, "checkpoint") == []


def test_what_was_kept_no_longer_need_not_be_deleted(make, tmp_path):
    checkpoint = sk.CheckpointConfig(directory=tmp_path, every=2, keep=None)
    consume(make(checkpoint=checkpoint)[0], 4)
    again, _ = make(checkpoint=sk.CheckpointConfig(directory=tmp_path, keep=1))
    again.restore(2)
    consume(again, 3)
    again.save()
    assert again.saved_steps == [3]


def test_after_closing_the_message_is_true(make, tmp_path):
    trainer, _ = make(checkpoint=sk.CheckpointConfig(directory=tmp_path))
    trainer.close()
    with pytest.raises(sk.ConfigError, match="closed"):
        trainer.save()


def test_rules_make_a_state_of_what_another_layout_has_saved(make, tmp_path):
    def init(key):
        return {
            "head": {"weight": sk.axes(jax.random.normal(key, (3, 5)), "out", "in")},
            "bias": sk.axes(jnp.ones(3), "out"),
        }

    def loss(params, microbatch, key):
        plain = {"kernel": params["head"]["weight"].T, "bias": params["bias"]}
        return linear()["loss"](plain, microbatch, key)

    options = {"checkpoint": sk.CheckpointConfig(directory=tmp_path)}
    trainer, _ = make(**options)
    consume(trainer, 2)
    trainer.save()
    other, _ = make(init=init, loss=loss, **options)
    rule = Rule("params/kernel", "params/head/weight", Transpose(1, 0))
    remap = Remap([rule], keep_rest=True)
    other.restore()
    with pytest.raises(sk.RestoreError, match="leaves of the checkpoint are not"):
        other.state  # noqa: B018
    assert other.restore(remap=remap) == 2
    old, new = trainer.state, other.state
    assert (np.asarray(new.params["head"]["weight"]) == old.params["kernel"].T).all()
    moments = new.opt_state[0].mu["head"]["weight"], old.opt_state[0].mu["kernel"]
    assert (np.asarray(moments[0]) == np.asarray(moments[1]).T).all()
    assert int(new.step) == 2
    # What is left out begins anew only where that is allowed.
    lost = Remap([rule, Rule("opt_state/{x...}", [], Drop())], keep_rest=True)
    other.restore(remap=lost)
    with pytest.raises(sk.RestoreError, match="opt_state/0/mu/head/weight"):
        other.state  # noqa: B018
    other.restore(remap=dataclasses.replace(lost, allow=["opt_state/{x...}"]))
    assert not np.asarray(other.state.opt_state[0].mu["head"]["weight"]).any()


def test_the_best_and_those_at_intervals_stay_too(make, tmp_path):
    config = sk.CheckpointConfig(
        directory=tmp_path, every=1, keep=1, keep_every=4, keep_best=2
    )
    evaluation = sk.EvalConfig(data=linear_data, every=1)
    trainer, events = make(checkpoint=config, eval=evaluation, tx=optax.sgd(0.9))
    consume(trainer, 7)
    losses = {fields["step"]: fields["loss"] for fields in fields_of(events, "eval")}
    assert sorted(losses.values()) != [*losses.values()]
    best = sorted(losses, key=losses.get)[:2]
    assert {*trainer.saved_steps} == {4, 7, *best}


@pytest.mark.parametrize(
    "options", [{"keep": 0}, {"every": -1}, {"keep_every": 0}, {"best_mode": "low"}]
)
def test_options_that_cannot_be_used_are_named(options, tmp_path):
    with pytest.raises(sk.ConfigError, match=next(iter(options))):
        sk.CheckpointConfig(directory=tmp_path, **options)


def test_what_could_not_be_written_is_told_and_can_be_saved_again(
    make, tmp_path, monkeypatch
):
    trainer, _ = make(checkpoint=sk.CheckpointConfig(directory=tmp_path, every=1))
    consume(trainer, 1)

    def full(directory, manifest):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(manager, "seal", full)
        with pytest.raises(sk.SaveError, match=r"No space left.* before is whole"):
            consume(trainer, 2)
    assert [p.name for p in tmp_path.iterdir() if p.name.isdecimal()] == ["1"]
    trainer.save()
    consume(trainer, 4)
    again, _ = make(checkpoint=sk.CheckpointConfig(directory=tmp_path))
    assert again.restore() == 4
    assert again.state_digest() == trainer.state_digest()


def test_another_global_batch_is_another_run(make, saved):
    _, config = saved

    def twice(step):
        return jax.tree.map(lambda x: np.concatenate([x, x]), linear_data(step))

    trainer, _ = make(data=twice, checkpoint=config)
    with pytest.raises(sk.RestoreError, match=r"rows +saved 24 +now 48"):
        trainer.restore()

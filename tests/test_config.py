import dataclasses
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkit.config import (
    CheckpointSection,
    DataSection,
    MeshSection,
    ModelSection,
    OptimizerSection,
    Override,
    RunConfig,
    SnapshotSection,
    TrainSection,
    differences,
    dump_toml,
    from_dict,
    identity,
    load,
    parse_resize,
    to_dict,
    to_toml,
)
from shardkit.errors import ConfigError

BASE = """
[model]
factory = "models.gpt:build"
[model.options]
num_layers = 4
[data]
sequence_length = 128
global_batch_size = 48
num_microbatches = 24
[optimizer]
learning_rate = 1
[train]
steps = 120
"""
CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.toml"))


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "run.toml"
        path.write_text(text)
        return path

    return write


def override(key, text):
    return Override(key, text, f"--{key}")


def test_a_whole_number_serves_as_a_number(write):
    rate = load(write(BASE)).optimizer.learning_rate
    assert rate == 1.0
    assert isinstance(rate, float)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_opens_with_what_to_expect(path):
    config = load(path)
    head = path.read_text().partition("\n\n")[0]
    for word in (f"python train.py configs/{path.name}", "Devices:", "Expected loss:"):
        assert word in head
    assert parse_resize(config.resize, config.devices or 8) is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("steps = 120", "stps = 120"), r"run.toml \[train\] stps.*'steps'\?"),
        (
            ("[model.options]\nnum_layers", "num_layers"),
            r"\[model\] num_layers: .* write \[model.options\] num_layers",
        ),
        (("[train]", "[trian]"), r"run.toml trian: unknown key; did you mean 'train'"),
        (("steps = 120", "steps = true"), r"\[train\] steps: .*whole number, found tr"),
        (("steps = 120", "steps = 1.5"), r"expected a whole number, found 1.5"),
        (("steps = 120", 'steps = "120"'), r'expected a whole number, found "120"'),
        (("rate = 1", 'rate = "1e-3"'), r"learning_rate: expected a number"),
        (("rate = 1", "rate = nan"), r"learning_rate: expected a number, found nan"),
        (("rate = 1", "rate = -1"), r"\[optimizer\]: learning_rate: expected more"),
        (("rate = 1", 'rate = 1\nname = "adam"'), r'one of "adamw", .*found "adam"'),
        (("rate = 1", 'rate = 1\nschedule = "cosine"'), "horizon_steps is missing"),
        (("rate = 1", "rate = 1\nmomentum = 0.9"), "momentum is of no use.*'adamw'"),
        (("num_layers = 4", "day = 2026-01-01"), r"options: expected a table"),
        (("microbatches = 24", "microbatches = 7"), "48 is not divisible.*= 7"),
        (('"models.gpt:build"', "3"), r"factory: expected text, found 3"),
        (("sequence_length = 128", ""), "sequence_length is missing"),
        (("[optimizer]\nlearning_rate = 1\n", ""), r"optimizer: this table is missing"),
        (("learning_rate = 1", ""), r"\[optimizer\] learning_rate: this key is miss"),
        (("[train]", "mesh = 3\n[train]"), r"unknown key"),
    ],
    ids=lambda change: change[1].replace("\n", " ") if change[0] in BASE else "",
)
def test_a_bad_value_is_named_with_its_place(write, change, message):
    assert change[0] in BASE
    with pytest.raises(ConfigError, match=message):
        load(write(BASE.replace(*change, 1)))


def test_every_problem_is_reported_at_once(write):
    text = BASE.replace("steps", "stps").replace("learning_rate = 1", "")
    with pytest.raises(ConfigError) as caught:
        load(write(text), [override("mesh.data", "many")])
    assert str(caught.value).count("\n") == 3  # one unknown, two missing, one flag


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path, "no such file"),
        (lambda path: path.mkdir() or path, "found a directory"),
        (lambda path: path.write_text("a = ") and path, "not TOML"),
        (lambda path: path.write_bytes(b"\xff\xfe") and path, "UTF-8"),
    ],
    ids=["missing", "directory", "no toml", "no text"],
)
def test_an_unusable_file_is_named(tmp_path, make, message):
    path = make(tmp_path / "run.toml")
    with pytest.raises(ConfigError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("optimizer.learning_rate", "1e-3", 1e-3),
        ("optimizer.learning_rate", ".5", 0.5),
        ("optimizer.learning_rate", "3", 3.0),
        ("optimizer.clip_norm", "none", None),
        ("optimizer.name", "lion", "lion"),
        ("mesh.data", "-1", -1),
        ("train.strict", "true", True),
        ("train.ema", "0.999", 0.999),
        ("devices", "4", 4),
        ("resize", "0:4,20:8", "0:4,20:8"),
        ("data.path", "3", "3"),
        ("axis_rules.embed", "fsdp", "fsdp"),
        ("model.options.num_layers", "2", 2),
        ("model.options.norm", "layer", "layer"),
        ("model.options.remat", "true", True),
        ("model.options.deep.down", "[1, 2]", [1, 2]),
    ],
)
def test_an_override_takes_the_type_of_its_key(write, key, text, value):
    found = to_dict(
        load(write(BASE), [override(key, text), override("mesh.fsdp", "2")])
    )
    for name in key.split("."):
        found = found[name]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("optimzer.learning_rate", "1", "--optimzer.* did you mean 'optimizer'"),
        ("optimizer.learning_rat", "1", "did you mean 'learning_rate'"),
        ("optimizer.learning_rate", "fast", '--optim.*a number, found "fast"'),
        ("train.steps", "1e3", "--train.steps: expected a whole number"),
        ("train.steps", "true", "expected a whole number, found true"),
        ("train.steps", "-3", "with --train.steps: steps: expected at least 1"),
        ("train.strict", "1", "expected true or false, found 1"),
        ("train.consistency", "exakt", 'one of "exact", "fast", found "exakt"'),
        ("train", "3", "train is a table; name one of its keys"),
        ("train.steps.more", "3", "'more' is inside a value"),
        ("model.options.num_layers.more", "3", "'num_layers' is a value, not a table"),
    ],
)
def test_a_bad_override_is_named_by_its_flag(write, key, text, message):
    with pytest.raises(ConfigError, match=message):
        load(write(BASE), [override(key, text)])


def test_an_override_sets_nothing_but_its_key(write):
    text = '"a"\nfactory = "b"'
    options = load(write(BASE), [override("model.options.norm", text)]).model.options
    assert options == {"num_layers": 4, "norm": text}


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        ("0:4,20:8", {0: 4, 20: 8}),
        (" 0:4 , 20 : 8 ", {0: 4, 20: 8}),
        ("7:1", {7: 1}),
        ("", {}),
        ("none", {}),
    ],
)
def test_a_schedule_is_read(text, schedule):
    assert parse_resize(text, pool=8) == schedule


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4", "STEP:N"),
        ("0:4,", "STEP:N"),
        ("0:4;20:8", "STEP:N"),
        ("0:four", "STEP:N"),
        ("-1:4", "STEP:N"),
        ("0:4.5", "STEP:N"),
        ("0:4,0:8", "step 0 stands twice"),
        ("20:4,0:8", "rising steps, found 0 after 20"),
        ("0:9", "1 to 8 devices, the pool, found 9 at step 0"),
        ("0:8,5:0", "found 0 at step 5"),
        ("5:-1", "found -1"),
    ],
)
def test_a_bad_schedule_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_resize(text, pool=8)


def test_standby_counts_are_device_counts(write):
    config = load(write(BASE + "standby_counts = [4, 2]\n"))
    assert config.train.standby_counts == [4, 2]
    with pytest.raises(ConfigError, match=r"at least 1, found \[4, 0\]"):
        load(write(BASE), [override("train.standby_counts", "[4, 0]")])


def test_where_and_how_far_a_run_goes_may_differ_on_resume(write):
    saved = load(write(BASE))
    free = [
        override("devices", "4"),
        override("mesh.data", "2"),
        override("resize", "3:2"),
        override("train.steps", "7"),
        override("train.log_every", "1"),
        override("train.standby_counts", "[4, 2]"),
    ]
    assert differences(saved, load(write(BASE), free)) == {}
    assert not {o.key for o in free} & identity(saved).keys()


def test_what_makes_another_run_is_listed(write):
    saved = load(write(BASE))
    asked = load(
        write(BASE),
        [
            override("train.seed", "1"),
            override("model.options.num_layers", "2"),
            override("axis_rules.embed", "fsdp"),
        ],
    )
    assert differences(saved, asked) == {
        "train.seed": (0, 1),
        "model.options.num_layers": (4, 2),
        "axis_rules.embed": (None, "fsdp"),
    }


text = st.text(st.characters(codec="utf-8"), max_size=8)
scalars = text | st.booleans() | st.integers() | st.floats(allow_nan=False)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(text, values, max_size=4))
def test_toml_survives_a_round_trip(table):
    assert tomllib.loads(dump_toml(table)) == table


positive = st.integers(1, 10**6)
rates = st.floats(1e-9, 10)


@st.composite
def configs(draw):
    num_microbatches = draw(st.integers(1, 64))
    warmup = draw(st.integers(0, 100))
    return RunConfig(
        model=ModelSection(
            factory=draw(text), options=draw(st.dictionaries(text, values, max_size=3))
        ),
        data=DataSection(
            path=draw(st.none() | text),
            sequence_length=draw(positive),
            num_microbatches=num_microbatches,
            global_batch_size=num_microbatches * draw(st.integers(1, 8)),
        ),
        optimizer=OptimizerSection(
            learning_rate=draw(rates),
            schedule=draw(st.sampled_from(["constant", "cosine", "linear"])),
            warmup_steps=warmup,
            horizon_steps=warmup + draw(positive),
            clip_norm=draw(st.none() | rates),
        ),
        mesh=MeshSection(data=draw(positive), fsdp=-1),
        axis_rules=draw(st.dictionaries(text, text, max_size=3)),
        path_rules=draw(st.dictionaries(text, st.lists(text), max_size=3)),
        train=TrainSection(steps=draw(positive), ema=draw(st.none() | st.just(0.5))),
        checkpoint=CheckpointSection(every=draw(positive)),
        snapshot=SnapshotSection(every=draw(st.integers(0, 9))),
        devices=draw(st.none() | positive),
        resize=draw(text),
    )


@given(configs())
def test_a_config_survives_a_round_trip(config):
    assert from_dict(tomllib.loads(to_toml(config))) == config


def test_an_empty_place_is_also_the_default():
    # TOML has no null, so what is None must come back by being left out.
    sections = (DataSection, OptimizerSection, TrainSection, RunConfig)
    for field in (f for s in sections for f in dataclasses.fields(s)):
        if "None" in str(field.type):
            assert field.default is None, field.name

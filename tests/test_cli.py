import subprocess
import sys
from pathlib import Path

import jax
import pytest

from shardkit import errors
from shardkit.build import (
    build_mesh,
    build_trainer,
    call_factory,
    device_pool,
    resolve_factory,
)
from shardkit.cli import exit_code, parse_arguments, plan_resizes, resume_command
from shardkit.errors import ConfigError
from shardkit.events import EventLog
from shardkit.logical_axes import infer_shardings

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "configs" / "tiny.toml")


def build(size: int, *, scale: float = 1.0, split: str = "train"):
    """Stands for a user's factory."""
    if size > 9:
        raise ValueError("size is above 9")
    return size, scale, split


def wrap(**options):
    return options


def test_flags_and_overrides_change_the_config():
    found = parse_arguments(
        ["--mesh.data", "-1", TINY, "--steps", "7", "--mesh.fsdp=2", "--resize", "0:4"]
    )
    assert found.config.mesh.data == -1
    assert found.config.mesh.fsdp == 2
    assert found.config.train.steps == 7
    assert found.config.resize == "0:4"
    assert found.path == Path(TINY)
    assert found.out is None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "CONFIG.toml"),
        ([TINY, "--bogus"], "unrecognized arguments: --bogus"),
        ([TINY, "--step", "3"], "unrecognized arguments"),
        ([TINY, "--steps"], "expected one argument"),
        ([TINY, "--steps", "many"], '--steps: expected a whole number, found "many"'),
        ([TINY, "--devices", "0"], "with --devices: devices: expected at least 1"),
        ([TINY, "--mesh.data"], "--mesh.data: expected a value"),
        ([TINY, "--mesh.date", "1"], "did you mean 'data'"),
        (
            [TINY, "--model.num_layers", "2"],
            "known: factory, options; .* write --model.options.num_layers$",
        ),
        ([TINY, "--model.option", "2"], "did you mean 'options'\\?$"),
        ([TINY, "--resume"], "name its directory with --out"),
    ],
)
def test_a_bad_command_line_is_one_message(argv, message):
    with pytest.raises(ConfigError, match=message):
        parse_arguments(argv)


def test_help_says_what_there_is_to_know(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(["--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    for word in ("[section]", "--section.key VALUE", "runs/CONFIG-NNN", "SIGUSR2"):
        assert word in said
    assert "see configs/" in " ".join(said.split())
    codes = said.partition("exit codes:")[2].splitlines()
    assert [line.split()[0] for line in codes if line] == ["0", "2", "3", "75", "130"]
    assert max(map(len, said.splitlines())) <= 80


def test_the_command_to_go_on_is_quoted(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["my python", "-u", "train.py", "old.toml"])
    monkeypatch.setattr(sys, "argv", ["train.py", "old.toml"])
    out = Path("my run")
    command = resume_command(out / "config.toml", out, twin=False)
    assert command == (
        "'my python' train.py 'my run/config.toml' --resume --out 'my run'"
    )
    assert resume_command(out / "config.toml", out, twin=True) == f"{command} --twin"


@pytest.mark.parametrize("name", ["digits", "tiny"])
def test_every_rule_of_a_config_cuts_something(name, tmp_path):
    config = parse_arguments(
        [str(ROOT / "configs" / f"{name}.toml"), "--train.strict", "true"]
    ).config
    events = EventLog()
    notices = []
    events.subscribe(lambda event: notices.append(event.fields))
    trainer, _ = build_trainer(
        config, devices=device_pool(8), checkpoints=tmp_path, events=events
    )
    trainer.close()
    assert notices == []
    model = call_factory(config.model.factory, config.model.options, where="model")
    params = jax.eval_shape(model.init, jax.random.key(0))
    rules = model.axis_rules | config.axis_rules
    mesh = build_mesh(config.mesh).build(jax.devices())
    specs = [s.spec for s in jax.tree.leaves(infer_shardings(params, rules, mesh))]
    assert any("fsdp" in spec for spec in specs)


def test_reading_a_command_line_does_not_import_jax():
    code = (
        "import sys; from shardkit import cli, report; "
        f"cli.parse_arguments([{TINY!r}]); sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_environment_gives_devices_threads_and_a_cache(tmp_path):
    code = (
        "from pathlib import Path; from shardkit import cli; "
        "cli.prepare_environment(5, Path('cache')); import jax, os; "
        "jax.jit(lambda x: x + 1)(1.0).block_until_ready(); "
        "print(len(jax.devices()), os.environ['PJRT_NPROC'])"
    )
    env = {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path), "PATH": ""}
    env["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True
    )
    # A pool of 5 is the first 5 of them; see `prepare_environment`.
    assert result.stdout == "8 8\n", result.stderr
    assert any((tmp_path / "shardkit" / "jax").iterdir())


def test_resizes_beyond_the_end_are_set_apart():
    resize = "0:8,30:6,60:3,90:8"
    config = parse_arguments([TINY, "--steps", "60", "--resize", resize]).config
    assert plan_resizes(config, pool=8) == ({0: 8, 30: 6}, {60: 3, 90: 8})


def test_a_pool_larger_than_the_machine_is_refused():
    assert len(device_pool(3)) == 3
    with pytest.raises(ConfigError, match=r"at most 8, the cpu devices.*found 9"):
        device_pool(9)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("models.gpt", 'expected "module:attribute"'),
        (":build", 'expected "module:attribute"'),
        ("no_such_module:build", "there is no module 'no_such_module'"),
        ("models.no_such:build", "there is no module 'models.no_such'"),
        (f"{__name__}:bild", "did you mean 'build'"),
        (f"{__name__}:TINY", "has no 'TINY' that can be called"),
        ("needy_module:build", "'needy_module' needs 'not_installed_at_all'"),
    ],
)
def test_a_factory_that_is_not_there_is_named(name, message, tmp_path, monkeypatch):
    (tmp_path / "needy_module.py").write_text("import not_installed_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=message):
        resolve_factory(name)


def test_a_factory_gets_its_options():
    name = f"{__name__}:build"
    options = {"size": 3, "scale": 2}
    found = call_factory(name, options, where="data", split="validation")
    assert found == (3, 2.0, "validation")
    assert isinstance(found[1], float)
    assert call_factory(f"{__name__}:wrap", {"a": [1]}, where="model") == {"a": [1]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sice": 3}, r"\[data.options\] sice: .* did you mean 'size'"),
        ({"size": 3, "split": "x"}, "split: .* takes no such option"),
        ({"size": "3"}, r'\[data.options\] size: expected a whole number, found "3"'),
        ({}, "missing 1 required positional argument: 'size'"),
        ({"size": 10}, "size is above 9"),
    ],
)
def test_an_option_that_a_factory_does_not_take_is_named(options, message):
    with pytest.raises(ConfigError, match=message):
        call_factory(f"{__name__}:build", options, where="data", split="train")


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("ConfigError", 2),
        ("DataError", 2),
        ("MeshError", 2),
        ("RestoreError", 2),
        ("InexactError", 2),
        ("CertificateError", 3),
        ("NonFiniteError", 3),
    ],
)
def test_exit_codes(name, code):
    assert exit_code(getattr(errors, name)("x")) == code

"""Whatever happens to its files, a checkpoint is refused or gives the right bits."""

import json
import random
import shutil

import pytest
from damaged import CHANGES, KINDS, Bench, history_of, placement_on, same_bits
from problems import consume, fields_of

import shardkit as sk
from shardkit import blocks
from shardkit.checkpoint.manager import load
from shardkit.checkpoint.manifest import FILE_NAME, sealed
from shardkit.checkpoint.reader import open_checkpoint, saved_steps
from shardkit.checkpoint.sums import SUMS_NAME

# Neither ever ends when it is read, and Orbax reads what is outside the item.
ENDLESS = "endless", "pipe"


@pytest.fixture(scope="module")
def small_blocks():
    """Blocks so small that leaves have several."""
    patch = pytest.MonkeyPatch()
    patch.setattr(blocks, "BLOCK_BYTES", 1024)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def bench(tmp_path_factory, small_blocks):
    return Bench(tmp_path_factory.mktemp("saved"))


def named(bench, ending):
    [file] = [f for f in bench.files if f.as_posix().endswith(ending)]
    return file


def changes(bench, num, seed):
    """Yields single-bit and single-byte changes, as many in every file."""
    rng = random.Random(seed)
    for number in range(num):
        yield CHANGES[number % 2], bench.files[number // 2 % len(bench.files)], rng


def test_an_undamaged_checkpoint_is_right_on_every_mesh(bench):
    for num_devices in (8, 3, 1):
        placement = placement_on(num_devices)
        saved = open_checkpoint(bench.step(2))
        state = load(saved, placement)
        assert same_bits(state, bench.truth[2], placement)
        assert len(saved.manifest.leaves["params/kernel"].blocks) == 11
    assert not same_bits(state, bench.truth[1], placement)


def test_single_changes_are_refused_by_name_or_harmless(bench):
    for kind, file, rng in changes(bench, 60, seed=0):
        bench.trial(kind, file, rng.random())


@pytest.mark.parametrize("kind", KINDS)
def test_every_damage_is_refused_by_name_or_harmless(bench, kind):
    # What every restore reads, and what none does.
    for ending in (FILE_NAME, SUMS_NAME, "manifest.ocdbt", "_METADATA"):
        file = next(f for f in bench.files if f.as_posix().endswith(ending))
        bench.trial(kind, file, 0)


@pytest.mark.parametrize("file", [FILE_NAME, "state/manifest.ocdbt"])
def test_what_cannot_be_read_is_refused(bench, file):
    for kind in ("emptied", "halved", "cut", "missing", "folder", "pipe", "endless"):
        assert bench.trial(kind, named(bench, file), 1) == "refused"


@pytest.mark.parametrize("kind", ["byte", "missing", "foreign", "folder", "pipe"])
def test_the_run_goes_on_from_the_newest_that_is_whole(bench, kind):
    bench.fallback(kind, named(bench, FILE_NAME), 0)


def test_a_step_in_the_place_of_another_is_passed_over(bench):
    for change in ("copied", "emptied", "deleted in part", "no state"):
        bench.damaged("stray", bench.files[0], random.Random(0))
        step = bench.work / "2"
        shutil.rmtree(step / ("" if change == "emptied" else "state"))
        step.mkdir(exist_ok=True)
        if change == "copied":
            shutil.copytree(bench.work / "1" / "state", step / "state")
        elif change == "deleted in part":
            (step / "state" / "d").mkdir(parents=True)
        elif change == "no state":
            (step / "state").write_text("no directory")
        with pytest.raises(sk.RestoreError, match="2"):
            load(open_checkpoint(bench.work, 2), placement_on(1))
        events = []
        history = history_of(bench.work, events)
        assert history.choose(None) == 1
        history.close()
        assert "step 2 cannot be restored" in fields_of(events, "notice")[0]["message"]


def test_directories_that_are_no_steps_are_none(bench):
    bench.damaged("stray", bench.files[0], random.Random(0))
    for name in ("007", "٣", "³", "-5", "1e3", "9" * 30):
        (bench.work / name).mkdir()
    (bench.work / "5").write_text("no directory")
    assert saved_steps(bench.work) == [1, 2]
    history = history_of(bench.work)
    assert history.choose(None) == 2
    history.close()


def test_a_leaf_without_digests_is_not_believed(bench, tmp_path):
    item = shutil.copytree(bench.step(2), tmp_path / "2") / "state"
    record = json.loads((item / FILE_NAME).read_bytes())
    del record["sha256"]
    for path in ("params/bias", "params/kernel"):
        record["leaves"][path]["blocks"] = []
    (item / FILE_NAME).write_bytes(sealed(record))
    with pytest.raises(sk.DamagedError, match="params/bias") as caught:
        load(open_checkpoint(item), placement_on(3))
    assert "12 blocks" in str(caught.value)


def test_a_trainer_passes_over_what_is_damaged(make, tmp_path):
    config = sk.CheckpointConfig(directory=tmp_path / "saved", every=1, keep=None)
    first, _ = make(checkpoint=config)
    digests = {}
    for step in (1, 2, 3):
        consume(first, step)
        digests[step] = first.state_digest()
    first.save()
    (tmp_path / "saved" / "3" / "state" / FILE_NAME).write_bytes(b"{}")
    shutil.rmtree(tmp_path / "saved" / "2" / "state" / "d")
    again, events = make(checkpoint=config)
    again.restore()
    assert again.state_digest() == digests[1]
    told = [fields["message"] for fields in fields_of(events, "notice")]
    assert fields_of(events, "restored") == [{"step": 1}]
    assert [text.split()[1] for text in told] == ["3", "2"]
    consume(again, 3)
    again.close()
    last, events = make(checkpoint=config)
    assert last.restore() == 3
    assert last.state_digest() == digests[3]
    assert fields_of(events, "notice") == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("compress", [False, True], ids=["plain", "compressed"])
def test_a_thousand_changes_load_no_wrong_value(tmp_path, small_blocks, compress):
    bench = Bench(tmp_path, compress=compress)
    for number, (kind, file, rng) in enumerate(changes(bench, 600, seed=compress)):
        bench.trial(kind, file, rng.random())
        if number % 9 == 0:
            bench.fallback(kind, file, rng.random())
    for kind in KINDS:
        for number, file in enumerate(bench.files):
            bench.trial(kind, file, number)
            if kind not in ENDLESS and number % 2 == 0:
                bench.fallback(kind, file, number)
    print(f"\n{'compressed' if compress else 'plain'}\n{bench.report()}")

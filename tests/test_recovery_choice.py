"""Which step a run goes on from, and what is said about it."""

import dataclasses

import numpy as np
import pytest
from snapshots import RUN, Cluster, check, make, recover, state, write

from shardkit.errors import TornError
from shardkit.snapshot.head import as_bytes, rewrite_record
from shardkit.snapshot.image import ImageWriter, read_image
from shardkit.snapshot.protection import read_protection
from shardkit.snapshot.rebuild import rebuild
from shardkit.snapshot.recovery import Report, choose, report


def text(plan):
    return "\n".join(plan.words)


def test_the_newest_step_wins_and_nothing_is_said_if_nothing_is_lost():
    cluster = make([[100], [200]], "mirror", steps=(4, 5))
    plan = recover(cluster, ())
    assert (plan.step, plan.rebuilds, plan.words) == (5, (), ())
    assert [(x.host, x.process) for x in plan.images] == [("host-0", 0), ("host-1", 1)]
    check(cluster, plan)


def test_what_was_lost_and_rebuilt_is_said():
    cluster = make([[100], [200], [300]], "parity")
    plan = recover(cluster, {"host-1"})
    assert "image of process 1 is lost with host-1" in text(plan)
    assert "are rebuilt on host-" in text(plan)
    assert "host-0, host-2" in text(plan)
    (job,) = plan.rebuilds
    assert job.host in {"host-0", "host-2"}
    assert plan.rebuilt_bytes == job.num_bytes
    assert plan.read_bytes >= job.num_bytes


def test_an_older_step_is_taken_if_the_newest_is_not_protected_yet():
    cluster = make(
        [[100], [200], [300]],
        "parity",
        steps=(4, 5),
        protect=lambda step, host: step < 5 or host == "host-0",
    )
    plan = recover(cluster, {"host-1"})
    assert plan.step == 4
    assert "step 5" in plan.words[0]
    assert "of w" in text(plan)
    assert "not whole" in text(plan)
    check(cluster, plan)


def test_disk_is_last_and_the_reason_is_said():
    cluster = make([[100], [200]], "none", steps=(4, 5))
    plan = recover(cluster, {"host-1"})
    assert plan.step is None
    assert plan.images == plan.rebuilds == ()
    assert "nothing" in text(plan) or "not whole" in text(plan)
    assert plan.words[-1].endswith("checkpoint on disk is next")
    assert choose([]).step is None


def test_a_loss_that_the_redundancy_does_not_cover_is_counted_out():
    cluster = make([[100], [200], [300], [400], [500]], "parity:2")
    plan = recover(cluster, {"host-0", "host-2", "host-4"})
    assert plan.step is None
    assert "cannot be rebuilt: of a codeword" in text(plan)


def test_replicas_need_no_rebuilding():
    """Nothing but shared pieces: any image has all of it."""
    cluster = make([[0], [0], [0]], "none", shared=50)
    plan = recover(cluster, {"host-0", "host-2"})
    assert plan.step == 5
    assert plan.rebuilds == ()
    assert "copies elsewhere" in text(plan)
    check(cluster, plan)


def test_what_was_not_protected_is_not_rebuilt_but_found_elsewhere():
    cluster = make([[100], [200], [300]], "parity", shared=5000)
    plan = recover(cluster, {"host-1"})
    (job,) = plan.rebuilds
    assert job.num_bytes < 5000
    check(cluster, plan)
    memory = memoryview(bytearray(job.num_bytes + 9999))
    image = rebuild(job, cluster.read, memory)
    assert [image.has(i) for i in range(2)] == [False, True]
    with pytest.raises(TornError, match="is not here"):
        image.piece(0)


def test_what_was_not_protected_and_is_lost_with_all_copies_is_missed():
    """Both images come back, but not what each of them kept for the other."""
    cluster = make([[100], [200], [300], [9]], "parity:2", shared=50, num_sharing=2)
    plan = recover(cluster, {"host-0", "host-1"})
    assert plan.step is None
    assert "1 of 2 leaves are not all there; of shared 0 of 50" in text(plan)
    plan = recover(cluster, {"host-1", "host-2"})
    assert plan.step == 5
    check(cluster, plan)


def test_a_torn_image_on_a_living_host_is_rebuilt():
    cluster = make([[100], [200], [300]], "parity")
    cluster.segments["host-1", "image1.5"][:128] = bytes(128)
    plan = recover(cluster, ())
    assert [job.process for job in plan.rebuilds] == [1]
    check(cluster, plan)


def test_what_is_damaged_or_of_another_run_is_left_alone_and_named():
    cluster = make([[100], [200]], "mirror")
    reports = cluster.reports()
    bad = dataclasses.replace(reports[0], name="old", content=b"x" * 500)
    plan = choose([*reports, bad, Report("host-1", "empty", b"")], run=RUN)
    assert plan.step == 5
    assert "host-0: old" in text(plan)
    assert "host-1: empty" in text(plan)
    plan = choose(reports, run="r2")
    assert plan.step is None
    assert "expected run r2, found r1" in text(plan)


def test_the_later_generation_of_a_step_counts_and_they_are_not_mixed():
    cluster = Cluster()
    layouts = state([[10], [20]])
    for generation in (1, 2):
        for layout in layouts[: 3 - generation]:
            memory = bytearray(layout.num_bytes)
            write(memory, layout, step=5, generation=generation)
            name = f"image{layout.process}.{generation}"
            cluster.segments[layout.host, name] = memory
    # Of generation 2 there is but one of two images.
    plan = choose(cluster.reports())
    assert (plan.step, plan.generation) == (5, 1)
    memory = bytearray(layouts[1].num_bytes)
    write(memory, layouts[1], step=5, generation=2)
    cluster.segments["host-1", "late"] = memory
    assert choose(cluster.reports()).generation == 2


def test_a_run_that_went_back_ignores_newer_steps():
    cluster = make([[10], [20]], "none", steps=(4, 5))
    assert choose(cluster.reports(), max_step=4).step == 4


def test_images_of_different_meshes_are_refused():
    cluster = make([[10], [20]], "none")
    other = make([[10], [20], [5]], "none")
    cluster.segments["host-1", "image1.5"] = other.segments["host-1", "image1.5"]
    plan = choose(cluster.reports())
    assert plan.step is None
    assert "another state" in text(plan)


@pytest.mark.parametrize("at", ["host-0", "host-2"])
def test_a_rebuilt_image_counts_in_the_next_recovery(at):
    cluster = make([[100], [200], [300]], "parity", shared=70)
    (job,) = recover(cluster, {"host-1"}).rebuilds
    memory = bytearray(job.num_bytes)
    rebuild(job, cluster.read, memoryview(memory))
    cluster.segments[at, "rebuilt"] = memory
    plan = recover(cluster, {"host-1"})
    assert plan.step == 5
    assert plan.rebuilds == ()
    check(cluster, plan)
    # The whole image, when its host is back, is the better one.
    plan = recover(cluster, ())
    assert [image.name for image in plan.images] == [f"image{i}.5" for i in range(3)]


def test_a_rebuilt_image_has_another_record_and_rebuilds_nothing():
    cluster = make([[100], [200], [300], [50]], "parity:2", shared=70)
    (job,) = recover(cluster, {"host-0"}).rebuilds
    memory = bytearray(job.num_bytes)
    rebuild(job, cluster.read, memoryview(memory))
    cluster.segments["host-1", "rebuilt"] = memory
    plan = recover(cluster, {"host-0", "host-3"})
    assert [job.process for job in plan.rebuilds] == [3]
    check(cluster, plan)


def test_work_is_spread_over_the_hosts():
    cluster = make([[1000], [1000], [1000], [1000], [1000]], "parity:2")
    plan = recover(cluster, {"host-0", "host-3"})
    assert len({job.host for job in plan.rebuilds}) == 2
    check(cluster, plan)


def test_a_rebuild_from_something_stale_is_refused_and_commits_nothing():
    cluster = make([[100], [200], [300]], "parity")
    (job,) = recover(cluster, {"host-1"}).rebuilds
    layouts = state([[100], [200], [300]])
    write(cluster.segments["host-0", "image0.5"], layouts[0], step=6)
    memory = memoryview(bytearray(job.num_bytes))
    with pytest.raises(TornError):
        rebuild(job, cluster.read, memory)
    with pytest.raises(TornError, match="being written"):
        read_image(memory)


@pytest.mark.parametrize("where", [9, 200, -1])
def test_a_rebuild_that_differs_commits_nothing(where):
    """In the record, in the header, or in a piece."""
    cluster = make([[1000], [1000], [1000]], "parity")
    (job,) = recover(cluster, {"host-1"}).rebuilds
    where = where if where >= 0 else job.num_bytes - 30
    repair = next(x for x in job.repairs if x.offset <= where < x.offset + x.num_bytes)
    block = next(x for x in repair.blocks if x.num_bytes > where - repair.offset)
    memory = cluster.segments[block.host, block.name]
    memory[block.offset + where - repair.offset] ^= 1
    target = memoryview(bytearray(job.num_bytes))
    with pytest.raises(TornError, match="rebuilt"):
        rebuild(job, cluster.read, target)
    assert not any(target[:128])


def test_a_report_is_small_and_a_cut_segment_is_none():
    cluster = make([[100_000], [100_000]], "mirror")
    assert max(len(one.content) for one in cluster.reports()) < 3000
    memory = cluster.segments["host-0", "image0.5"]
    with pytest.raises(TornError, match="found 90000"):
        report("host-0", "image0.5", memory[:90_000])
    with pytest.raises(TornError, match="expected 101"):
        report("host-0", "guard", cluster.segments["host-0", "guard.5"][:90_000])


def test_boxes_that_overlap_are_not_a_whole():
    """Two halves of 10 that both begin at 0 have 10 elements, and not all of them."""
    layout = state([[5], [5]])
    cluster = Cluster()
    for one in layout:
        pieces = tuple(dataclasses.replace(x, box=((0, 5),)) for x in one.pieces)
        one = dataclasses.replace(one, pieces=pieces)
        memory = memoryview(bytearray(one.num_bytes))
        writer = ImageWriter(memory, one, step=1, generation=0)
        writer.put(0, np.zeros(5, np.uint8))
        writer.commit({})
        cluster.segments[one.host, "image"] = memory
    plan = choose(cluster.reports())
    assert plan.step is None
    assert "5 of 10 elements" in text(plan)


def test_the_record_of_a_protection_has_to_fit_its_heads():
    cluster = make([[10], [20]], "mirror")
    memory = memoryview(cluster.segments["host-0", "guard.5"])
    head = read_protection(memory).head
    for change in ({"step": 6}, {"generation": 1}, {"num_bytes": head.num_bytes + 64}):
        rewrite_record(memory, head, **change)
        with pytest.raises(TornError):
            read_protection(as_bytes(memory))

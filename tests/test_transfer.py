"""Plans against an oracle that looks at every element of every place."""

import collections
import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkit.errors import LostStateError
from shardkit.layout import Layout
from shardkit.places import Medium, Places
from shardkit.senders import Cost
from shardkit.transfer import plan_transfer

AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class Case:
    sources: list
    target: dict
    lost: frozenset
    lost_hosts: frozenset

    def plan(self, **options):
        return plan_transfer(
            self.sources,
            self.target,
            lost=self.lost,
            lost_hosts=self.lost_hosts,
            **options,
        )


@st.composite
def grids(draw, medium, num_per_host):
    """A grid of up to 12 places in any order, often one that another draw gives too."""
    sizes = draw(
        st.lists(st.integers(1, 12), min_size=1, max_size=3).filter(
            lambda sizes: np.prod(sizes) <= 12
        )
    )
    num = int(np.prod(sizes))
    ids = draw(st.permutations(range(num + draw(st.integers(0, 4)))))[:num]
    hosts = [id // num_per_host for id in ids]
    if medium is not Medium.DEVICE:
        hosts = draw(st.lists(st.integers(-1, 3), min_size=num, max_size=num))
    shape = np.reshape(ids, sizes)
    return Places(AXES[: len(sizes)], shape, np.reshape(hosts, sizes), medium)


@st.composite
def layouts(draw, places, shape, itemsize):
    """Cuts the dims by any of the axes in any order."""
    cuts = [[] for _ in shape]
    if shape:
        for axis in draw(st.permutations(places.axes)):
            dim = draw(st.integers(-1, len(shape) - 1))
            if dim >= 0:
                cuts[dim].append(axis)
    return Layout(places, shape, itemsize, tuple(map(tuple, cuts)))


@st.composite
def cases(draw, num_sources=(1, 3), with_losses=True):
    num_per_host = draw(st.sampled_from([1, 2, 3, 100]))
    media = draw(st.lists(st.sampled_from(Medium), min_size=num_sources[0], max_size=3))
    media = media[: num_sources[1]]
    media[0] = draw(st.sampled_from([Medium.DEVICE, Medium.DEVICE, media[0]]))
    places = [draw(grids(medium, num_per_host)) for medium in media]
    wanted = draw(grids(draw(st.sampled_from([Medium.DEVICE] * 4 + [Medium.HOST])), 2))
    if draw(st.booleans()):
        wanted = Places(
            wanted.axes, wanted.ids, wanted.ids // num_per_host, wanted.medium
        )
    sources, target = [{} for _ in media], {}
    for path in "abc"[: draw(st.integers(1, 3))]:
        shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
        if draw(st.booleans()):
            shape = tuple(size + 1 for size in shape)
        itemsize = draw(st.sampled_from([1, 2, 8]))
        for tree, grid in zip(sources, places, strict=True):
            tree[path] = draw(layouts(grid, shape, itemsize))
        target[path] = draw(layouts(wanted, shape, itemsize))
    lost = lost_hosts = frozenset()
    if with_losses:
        lost = draw(st.frozensets(st.integers(0, 12), max_size=6))
        lost_hosts = draw(st.sampled_from([frozenset()] * 3 + [frozenset({1})]))
    return Case(sources, target, lost, lost_hosts)


def holdings(layout):
    """Id → the flat indices that it holds, straight from the definition."""
    flat = np.arange(np.prod(layout.shape, dtype=int)).reshape(layout.shape)
    held = {}
    for where, id in np.ndenumerate(layout.places.ids):
        coords = dict(zip(layout.places.axes, where, strict=True))
        keep = []
        for size, cut in zip(layout.shape, layout.cuts, strict=True):
            grid = [layout.places.axis_sizes[axis] for axis in cut]
            count = int(np.prod(grid, dtype=int))
            number = np.arange(count).reshape(grid)[tuple(coords[a] for a in cut)]
            step = -(-size // count)
            keep.append(list(range(size))[number * step : (number + 1) * step])
        held[int(id)] = flat[np.ix_(*keep)] if keep else flat
    return held


def cost_between(source, id, target, to):
    """The cost class that the definition gives."""
    if source.medium == target.medium and id == to:
        return Cost.SAME_DEVICE
    near = {
        Medium.DEVICE: Cost.SAME_HOST,
        Medium.HOST: Cost.HOST_MEMORY,
        Medium.DISK: Cost.DISK,
    }[source.medium]
    return Cost(near + (source.host(id) != target.host(to)))


def survivors(case, path):
    """Source, id and elements of every place that is left."""
    for index, source in enumerate(case.sources):
        places = source[path].places
        for id, elements in holdings(source[path]).items():
            gone = places.medium is Medium.DEVICE and id in case.lost
            if not gone and places.host(id) not in case.lost_hosts:
                yield index, id, elements


def least_costs(case, path):
    """Target → element → the least cost at which someone has it."""
    layout, found = case.target[path], {}
    alive = list(survivors(case, path))
    for to in holdings(layout):
        least = np.full(np.prod(layout.shape, dtype=int), 99)
        for index, id, elements in alive:
            places = case.sources[index][path].places
            cost = cost_between(places, id, layout.places, to)
            least[elements.ravel()] = np.minimum(least[elements.ravel()], cost)
        found[to] = least
    return found


def elements_in(layout, box):
    flat = np.arange(np.prod(layout.shape, dtype=int)).reshape(layout.shape)
    return flat[tuple(slice(a, b) for a, b in box)]


def has_all(case):
    for path in case.target:
        wanted = np.prod(case.target[path].shape, dtype=int)
        got = set().union(*(set(e.ravel()) for _, _, e in survivors(case, path)), set())
        if len(got) < wanted:
            return False
    return True


@settings(max_examples=400, deadline=None, derandomize=True)
@given(case=cases())
def test_every_element_comes_once_from_the_cheapest_that_has_it(case):
    plan = case.plan(partial=True)
    for path, layout in case.target.items():
        wanted, least = holdings(layout), least_costs(case, path)
        alive = {(i, id): set(e.ravel()) for i, id, e in survivors(case, path)}
        for to, elements in wanted.items():
            got = []
            for piece in plan.pieces(path, to):
                inside = elements_in(layout, piece.box).ravel()
                got += inside.tolist()
                assert set(inside) <= alive[piece.source_index, piece.source]
                assert piece.num_bytes == len(inside) * layout.itemsize > 0
                assert piece.target == to
                cost = max(piece.cost, Cost.SAME_DEVICE)
                assert (least[to][inside] == cost).all()
            reachable = [e for e in elements.ravel().tolist() if least[to][e] < 99]
            assert sorted(got) == sorted(reachable)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(case=cases())
def test_a_piece_is_whole_if_the_array_needs_no_change(case):
    plan = case.plan(partial=True)
    for path, layout in case.target.items():
        wanted = holdings(layout)
        for to in wanted:
            for piece in plan.pieces(path, to):
                source = case.sources[piece.source_index][path]
                held = holdings(source)[piece.source]
                assert piece.is_whole == (
                    source.piece_shape == layout.piece_shape
                    and np.array_equal(held, wanted[to])
                    and piece.box == layout.box(to)
                )
                assert (piece.cost == Cost.HELD) == (
                    piece.is_whole and piece.cost <= Cost.SAME_DEVICE
                )
                inside = held[source.slices(piece.source, piece.box)]
                assert np.array_equal(inside, elements_in(layout, piece.box))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(case=cases())
def test_what_is_missing_is_named_in_full(case):
    plan = case.plan(partial=True)
    for path, layout in case.target.items():
        got = [set(e.ravel()) for _, _, e in survivors(case, path)]
        gone = set(range(np.prod(layout.shape, dtype=int))) - set().union(*got, set())
        boxes = [elements_in(layout, box) for box in plan.missing.get(path, [])]
        found = [e for elements in boxes for e in elements.ravel().tolist()]
        assert sorted(found) == sorted(gone)
        assert all(elements.size for elements in boxes)
    if has_all(case):
        case.plan()
    else:
        with pytest.raises(LostStateError, match="are on no device"):
            case.plan()


def listed(plan, case):
    ids = next(iter(case.target.values())).places.ids.ravel().tolist()
    return [transfer for id in ids for transfer in plan.for_target(id)]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(case=cases())
def test_totals_are_the_sums_of_what_is_listed(case):
    plan = case.plan(partial=True)
    transfers = listed(plan, case)
    assert all(transfer.cost > Cost.SAME_DEVICE for transfer in transfers)
    moved = sum(transfer.num_bytes for transfer in transfers)
    assert plan.totals.bytes_moved == moved
    by_cost, links, sent, received = (collections.Counter() for _ in range(4))
    for t in transfers:
        by_cost[t.cost] += t.num_bytes
        received[t.target] += t.num_bytes
        if t.medium is Medium.DEVICE:
            sent[t.source] += t.num_bytes
        places = case.sources[t.source_index][t.path].places
        wanted = case.target[t.path].places
        links[places.host(t.source), wanted.host(t.target)] += t.num_bytes
    assert plan.totals.by_cost == by_cost
    assert plan.totals.received == received
    assert plan.totals.sent == sent
    assert plan.totals.links == links


@settings(max_examples=200, deadline=None, derandomize=True)
@given(case=cases())
def test_no_plan_moves_less(case):
    plan = case.plan(partial=True)
    if plan.missing:
        assert plan.totals.bytes_moved < plan.totals.min_bytes
        return
    lacking = network = 0
    for path, layout in case.target.items():
        least, wanted = least_costs(case, path), holdings(layout)
        entering = set()
        for to, elements in wanted.items():
            costs = least[to][elements.ravel()]
            lacking += layout.itemsize * int((costs > Cost.SAME_DEVICE).sum())
            host = layout.places.host(to)
            far = elements.ravel()[costs == Cost.NETWORK].tolist()
            entering |= {(host, element) for element in far}
        network += layout.itemsize * len(entering)
    assert plan.totals.bytes_moved == plan.totals.min_bytes == lacking
    assert plan.totals.min_network_bytes == network
    assert network <= plan.totals.by_cost.get(Cost.NETWORK, 0)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(case=cases())
def test_sources_and_targets_list_the_same(case):
    plan = case.plan(partial=True)
    offered = []
    for medium in Medium:
        ids = {
            id
            for source in case.sources
            for layout in source.values()
            if layout.places.medium is medium
            for id in layout.places.ids.ravel().tolist()
        }
        for id in ids:
            offered += plan.from_source(id, medium)
    by_box = lambda t: (t.path, t.target, t.box)  # noqa: E731
    assert sorted(offered, key=by_box) == sorted(listed(plan, case), key=by_box)


def touch(a, b):
    """Whether two boxes make one."""
    differ = [(x, y) for x, y in zip(a, b, strict=True) if x != y]
    return len(differ) == 1 and (
        differ[0][0][1] == differ[0][1][0] or differ[0][1][1] == differ[0][0][0]
    )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(case=cases())
def test_neighbours_from_one_source_are_one_transfer(case):
    plan = case.plan(partial=True)
    for path, layout in case.target.items():
        for to in layout.places.ids.ravel().tolist():
            for a, b in itertools.combinations(plan.pieces(path, to), 2):
                same = (a.source_index, a.source) == (b.source_index, b.source)
                assert not (same and touch(a.box, b.box))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(case=cases())
def test_equal_senders_of_a_piece_send_the_same_up_to_one_transfer(case):
    plan = case.plan(partial=True)
    sent, largest, eligible = collections.defaultdict(collections.Counter), {}, {}
    for t in listed(plan, case):
        source = case.sources[t.source_index][t.path]
        wanted = case.target[t.path].places
        host = wanted.host(t.target)
        is_near = source.places.host(t.source) == host
        piece = source.box(t.source)
        group = t.path, t.source_index, piece, host if is_near else None
        sent[group][t.source] += t.num_bytes
        largest[group] = max(largest.get(group, 0), t.num_bytes)
        eligible[group] = [
            id
            for index, id, _ in survivors(case, t.path)
            if index == t.source_index
            and source.box(id) == piece
            and (not is_near or source.places.host(id) == host)
        ]
    for group, counts in sent.items():
        loads = [counts[id] for id in eligible[group]]
        assert max(loads) - min(loads) <= largest[group]


def keeps_its_array(case, path, to):
    layout = case.target[path]
    return any(
        case.sources[index][path].places.medium is layout.places.medium
        and id == to
        and case.sources[index][path].piece_shape == layout.piece_shape
        and np.array_equal(elements, holdings(layout)[to])
        for index, id, elements in survivors(case, path)
    )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(case=cases())
def test_scratch_is_what_the_largest_leaf_takes(case):
    plan = case.plan(partial=True)
    most = collections.Counter()
    for path, layout in case.target.items():
        extra = collections.Counter()
        for to in layout.places.ids.ravel().tolist():
            pieces = plan.pieces(path, to)
            if layout.places.medium is Medium.DEVICE and layout.num_bytes:
                if not keeps_its_array(case, path, to):
                    extra[to] += layout.piece_bytes
                for piece in pieces:
                    if not piece.is_whole and piece.cost > Cost.SAME_DEVICE:
                        extra[to] += piece.num_bytes
            for piece in pieces:
                sliced = not piece.is_whole and piece.cost > Cost.SAME_DEVICE
                if sliced and piece.medium is Medium.DEVICE:
                    extra[piece.source] += piece.num_bytes
        most |= extra
    assert all(plan.totals.scratch.get(id, 0) >= most[id] for id in most)
    if len(case.sources) == 1:
        assert plan.totals.scratch == +most

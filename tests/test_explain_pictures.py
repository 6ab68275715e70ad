"""Pictures of leaves beside the boxes that the layout says."""

import random
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from shardkit.explain.picture import colour, draw, spell_ids
from shardkit.explain.picture_svg import svg_file, svg_picture
from shardkit.explain.picture_text import text_picture
from shardkit.layout import Layout
from shardkit.places import Places

HOSTILE = "<script>alert(1)</script>\"'>]]>&amp;\u202e"
SVG = "{http://www.w3.org/2000/svg}"


def layouts(num):
    """Layouts of all kinds: several axes on a dim, copies, padding, odd device ids."""
    chance = random.Random(0)
    for _ in range(num):
        sizes = [chance.choice([1, 2, 3, 4]) for _ in range(3)]
        ids = list(range(int(np.prod(sizes))))
        chance.shuffle(ids)
        places = Places(("data", "fsdp", "tensor"), np.reshape(ids, sizes), 0)
        ndim = chance.choice([0, 1, 2, 3, 4])
        shape = tuple(chance.choice([1, 2, 5, 12, 64]) for _ in range(ndim))
        axes = [a for a in ("data", "fsdp", "tensor") if chance.random() < 0.8]
        cuts = [[] for _ in shape]
        for axis in axes if shape else []:
            chance.choice(cuts).append(axis)
        yield Layout(places, shape, 4, tuple(map(tuple, cuts)))


@pytest.mark.parametrize("number", range(60))
def test_every_device_is_drawn_where_its_box_is(number):
    layout = list(layouts(number + 1))[-1]
    picture = draw("w", layout)
    row, column = picture.dims
    drawn = set()
    for panel in picture.panels:
        fixed = re.findall(r"dim (\d+): (\d+) to (\d+)", panel.title)
        for r, line in enumerate(panel.rows):
            for c, cell in enumerate(line):
                for id in cell.ids:
                    box = layout.box(id)
                    assert row is None or box[row] == picture.rows[r]
                    assert column is None or box[column] == picture.columns[c]
                    for dim, start, stop in fixed:
                        assert box[int(dim)] == (int(start), int(stop))
                    assert id not in drawn
                    drawn.add(id)
    empty = {id for id in layout.places.slots if any(a == b for a, b in layout.box(id))}
    assert set(picture.padding_ids) == empty
    assert drawn == set(layout.places.slots) - empty
    # Devices have one colour if they hold one box.
    boxes = {layout.box(id) for id in drawn}
    assert len({picture.number_of[id] for id in drawn}) == len(boxes)
    ElementTree.fromstring(svg_picture(picture))
    for line in text_picture(picture, 80):
        assert len(line.plain) <= 80 or "pieces of" in line.plain


def grid(shape, cuts, **sizes):
    ids = np.arange(int(np.prod(list(sizes.values()))))
    places = Places(tuple(sizes), ids.reshape(tuple(sizes.values())), 0)
    return Layout(places, shape, 4, cuts)


def test_a_file_of_pictures_is_valid_and_lets_nothing_act():
    layout = grid((10, 4), (("fsdp",), ()), data=2, fsdp=4)
    text = svg_file([draw(HOSTILE, layout), draw("w", layout)])
    root = ElementTree.fromstring(text.encode())
    assert root.tag == f"{SVG}svg"
    tags = {each.tag.removeprefix(SVG) for each in root.iter()}
    assert tags <= {"svg", "style", "g", "rect", "path", "text", "title"}
    assert not [n for each in root.iter() for n in each.attrib if n.startswith("on")]
    words = [each.text for each in root.iter(f"{SVG}text")]
    assert HOSTILE.replace("\u202e", "\\u202e") in words
    assert "\u202e" not in text
    assert not re.search(r"url\(|@import|href", text)
    # Devices 3 and 7 hold a row, and beside it padding.
    assert "padded from 10 to 12" in text
    assert text.count('class="pad"') == 2


def test_pieces_have_the_colours_of_their_devices():
    layout = grid((8,), (("fsdp",),), data=2, fsdp=4)
    root = ElementTree.fromstring(svg_file([draw("w", layout)]).encode())
    fills = [x.get("fill") for x in root.iter(f"{SVG}rect") if x.get("class") == "edge"]
    assert fills == [colour(n) for n in range(4)]
    tiles = [x.get("fill") for x in root.iter(f"{SVG}rect") if x.get("rx")]
    assert tiles == fills * 2
    assert len({colour(n) for n in range(64)}) == 64


def test_a_terminal_without_colours_has_brackets():
    picture = draw("w", grid((5, 6), (("fsdp",), ()), data=1, fsdp=4))
    lines = [line.plain for line in text_picture(picture, 60, is_coloured=False)]
    assert lines[1].strip() == "4 pieces of 2×6 over fsdp, padded from 5 to 8"
    pieces = [line.split("[")[1].split("]")[0].strip() for line in lines if "[" in line]
    assert pieces == ["0", "1", "2"]
    assert "padding only: devices 3" in lines[-1]
    assert any("+3" in line and "░" in line for line in lines)
    coloured = text_picture(picture, 60)
    styles = {str(span.style) for line in coloured for span in line.spans}
    assert {f"black on {colour(n)}" for n in range(3)} <= styles


def test_many_pieces_fit_or_are_said_to_be_too_many():
    wide = draw("w", grid((4, 512), ((), ("fsdp",)), fsdp=64))
    assert "too many for 80 columns" in text_picture(wide, 80)[-1].plain
    tall = draw("w", grid((512, 4), (("fsdp",), ()), fsdp=64))
    assert "and 32 more rows" in text_picture(tall, 80)[-1].plain
    ElementTree.fromstring(svg_picture(wide))


def test_ids_are_spelled_with_ranges():
    assert spell_ids([7, 3, 4, 5]) == "3-5 7"
    assert spell_ids([1, 2]) == "1 2"
    assert spell_ids([]) == ""

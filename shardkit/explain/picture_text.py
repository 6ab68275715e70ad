"""Pictures of leaves for a terminal.

Owns the characters. Invariant: what colours say is there in words too, so that it can
be read without them.
"""

from rich.text import Text

from shardkit.explain.picture import Panel, Picture, colour, spell_ids

__all__ = ["text_picture"]

_MOST_ROWS, _MOST_PANELS = 32, 16
_PADDING = "░"


def text_picture(
    picture: Picture, width: int, *, is_coloured: bool = True
) -> list[Text]:
    """Draws a leaf.

    Args:
        picture: It.
        width: Of the terminal.
        is_coloured: Whether it has colours; else brackets tell pieces apart.
    """
    shape = "×".join(map(str, picture.layout.shape)) or "scalar"
    lines = [
        Text(f"{picture.title}  ", style="bold") + Text(shape, style="dim"),
        Text(f"  {picture.words}"),
    ]
    for panel in picture.panels[:_MOST_PANELS]:
        lines += [Text(f"  {panel.title}", style="dim")] if panel.title else []
        lines += _panel(picture, panel, width, is_coloured)
    more = len(picture.panels) - _MOST_PANELS
    lines += [Text(f"  and {more} more like these", style="dim")] if more > 0 else []
    if picture.padding_ids:
        words = f"  padding only: devices {spell_ids(picture.padding_ids)}"
        lines.append(Text(words, style="dim"))
    return lines


def _panel(picture: Picture, panel: Panel, width: int, is_coloured: bool) -> list[Text]:
    row, column = picture.dims
    labels = [f"{a} to {b}" for a, b in picture.rows] or [""]
    if row is not None and picture.padding(row):
        labels.append(f"+{picture.padding(row)}")
    left = max([len(f"dim {row}") if row is not None else 0, *map(len, labels)])
    names = [[spell_ids(cell.ids) for cell in line] for line in panel.rows]
    heads = [f"{a} to {b}" for a, b in picture.columns] or [""]
    longest = max(len(x) for line in [*names, heads] for x in line)
    beyond = f" +{picture.padding(column)}" if picture.padding(column) else ""
    pad = max(4, len(beyond)) if beyond else 0
    # Behind the pieces stand what is padding, and the name of a dim.
    room = (width - left - 12 - pad) // max(1, len(heads))
    if room < 3:
        words = f"{len(heads)} pieces along dim {column}: too many for {width} columns"
        return [Text(f"  {words}")]
    cell_width = min(room, max(longest + 2, min(24, room)))
    head = Text(" " * (left + 2), style="dim")
    for name in heads:
        # Where there is no room for both ends, the beginning is enough.
        name = name if len(name) < cell_width else name.split(" ")[0]
        head.append(f"{name:^{cell_width}}"[:cell_width])
    head.append(beyond.ljust(pad))
    head.append(f"  dim {column}" if column is not None else "")
    lines = [head]
    for number, line in enumerate(panel.rows[:_MOST_ROWS]):
        height = 3 if len(panel.rows) <= 3 and is_coloured else 1
        for at in range(height):
            is_middle = at == height // 2
            text = Text(f"{labels[number] if is_middle else '':>{left}}  ", style="dim")
            for cell, name in zip(line, names[number], strict=True):
                cut = name if len(name) < cell_width else f"{name[: cell_width - 3]}…"
                words = f"{cut if is_middle else '':^{cell_width - 2}}"
                words = f" {words} " if is_coloured else f"[{words}]"
                text.append(words, style=f"black on {colour(cell.number)}")
            text.append(_PADDING * pad, style="dim")
            if is_middle and number == 0 and row is not None:
                text.append(f"  dim {row} ↓", style="dim")
            lines.append(text)
    if len(panel.rows) > _MOST_ROWS:
        lines.append(
            Text(f"  and {len(panel.rows) - _MOST_ROWS} more rows", style="dim")
        )
    elif row is not None and picture.padding(row):
        total = cell_width * len(heads) + pad
        lines.append(Text(f"{labels[-1]:>{left}}  {_PADDING * total}", style="dim"))
    return lines

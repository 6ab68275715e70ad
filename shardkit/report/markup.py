"""HTML and SVG as text, in which nothing told by a run can become markup.

Owns the difference between text and markup. Its invariant: what is no `Markup` already
is escaped wherever it goes, into an element or into an attribute, and characters that
no screen shows are spelled out.
"""

import html
import json
from typing import Any

__all__ = ["Markup", "data_block", "tag"]


class Markup(str):
    """Text that is markup already; made by `tag` and `data_block` alone."""

    __slots__ = ()


def tag(name: str, *inner: Any, **attributes: Any) -> Markup:
    """Writes an element.

    Args:
        name: Of the element.
        *inner: What is in it; text is escaped, `Markup` is not, None is left out.
        **attributes: Its attributes. `class_` is `class`, `text_anchor` is
            `text-anchor`; None is left out, and True is an attribute without a value.

    >>> tag("a", "1 < 2", tag("b", "x"), class_='say "no"')
    '<a class="say &quot;no&quot;">1 &lt; 2<b>x</b></a>'
    """
    words = [name]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            words.append(key)
        elif value is not None:
            words.append(f'{key}="{_escape(value)}"')
    content = "".join(_escape(each) for each in inner if each is not None)
    return Markup(f"<{' '.join(words)}>{content}</{name}>")


def data_block(name: str, value: Any) -> Markup:
    r"""Writes JSON for a script of the page to read; browsers do not run it.

    >>> data_block("data", ["</script>"])
    '<script type="application/json" id="data">["\\u003c/script>"]</script>'
    """
    # Without "<" nothing in it can end the element, or begin a comment in it.
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    text = text.replace("<", "\\u003c")
    return Markup(
        f'<script type="application/json" id="{_escape(name)}">{text}</script>'
    )


def _escape(value: Any) -> str:
    if isinstance(value, Markup):
        return value
    text = str(value)
    if not text.isprintable():
        # Some of them turn the direction in which the rest is read.
        text = "".join(
            c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text
        )
    return html.escape(text)

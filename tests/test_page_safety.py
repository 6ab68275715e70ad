"""A report lets nothing of its run act in it, and works in a browser."""

import base64
import hashlib
import html
import html.parser
import json
import re
import shutil
import subprocess
import urllib.parse

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stored_runs import (
    LEAVES,
    changed,
    store_run,
)

from shardkit.report.markup import tag
from shardkit.report.page import render_page, write_report
from shardkit.report.page_data import page_data
from shardkit.report.stored_run import StoredRun

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>\u202e</title>&amp;"
BROWSERS = ("chromium", "google-chrome", "chromium-browser")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)


class Elements(html.parser.HTMLParser):
    """The elements of a page, and its text outside of scripts."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.words = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_data(self, data):
        if self.tags[-1:] != ["script"]:
            self.words.append(data)


def read(path, **options):
    return page_data(StoredRun.read(store_run(path, **options)))


def test_nothing_of_a_run_becomes_markup(tmp_path):
    leaves = [(HOSTILE, (4,), [["fsdp"]], [HOSTILE])]
    facts = {"platform": HOSTILE, "versions": {"jax": HOSTILE}}
    config = changed(model={"factory": HOSTILE, "options": {HOSTILE: HOSTILE}})
    path = store_run(
        tmp_path / "run",
        config=config,
        leaves=leaves,
        facts=facts,
        digest=HOSTILE,
        corpus_digest=HOSTILE,
        source=HOSTILE,
        notices=[HOSTILE],
    )
    text = (path / "metrics.jsonl").read_text()
    (path / "metrics.jsonl").write_text(text.replace('"plan"', json.dumps(HOSTILE)))
    page = write_report(path).read_text()
    found, plain = Elements(page), Elements(render_page(read(tmp_path / "plain")))
    # No more scripts or images than in the page of a harmless run.
    for name in ("script", "img", "style", "title", "iframe"):
        assert found.tags.count(name) >= 1 or name in ("img", "iframe")
        if name not in ("title",):
            assert found.tags.count(name) == plain.tags.count(name)
    assert not [a for a in found.attributes if a[1].startswith("on") or a[1] == "style"]
    assert "\u202e" not in page
    assert "<script>alert(1)</script>" in "".join(found.words)
    block = re.search(r'<script type="application/json" id="data">(.*?)</script>', page)
    assert json.loads(block[1])["leaves"][0]["path"] == HOSTILE


@settings(max_examples=50, derandomize=True, deadline=None)
@given(st.text(max_size=40), st.text(max_size=40))
def test_text_is_read_back_as_it_was(text, value):
    found = Elements(tag("p", text, class_=value))
    assert found.tags == ["p"]
    spelled = [
        "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in each)
        for each in (text, value)
    ]
    assert ["".join(found.words), found.attributes[0][2]] == spelled


def test_the_page_lets_in_nothing_but_itself(tmp_path):
    page = render_page(read(tmp_path / "run"))
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for name in ("script", "style"):
        [text] = re.findall(rf"<{name}>(.*?)</{name}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|@import|url\(", text)
    links = set(re.findall(r"https?://[^\s\"'`<>)]+", page))
    # The name of a namespace is no place.
    assert links == {"http://www.w3.org/2000/svg"}


@pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} on PATH")
def test_a_browser_shows_the_page(tmp_path):
    """Opened with a leaf chosen in its address, by script, in a real browser."""
    leaves = [*LEAVES, ("params/<b>&'", (5, 4), [["fsdp"], []], None)]
    path = write_report(store_run(tmp_path / "run", leaves=leaves))
    chosen = urllib.parse.quote("params/<b>&'", safe="")
    said = subprocess.run(
        [
            BROWSER,
            *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--enable-logging=stderr", "--v=0", "--virtual-time-budget=2000"),
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            f"{path.as_uri()}#leaf={chosen}",
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "CONSOLE" not in said.stderr, said.stderr
    page = said.stdout
    assert 'data-ready="yes"' in page
    curve = re.search(r'class="line loss[^"]*" d="([^"]*)"', page)[1]
    assert len(re.findall(r"[ML]", curve)) == 20
    leaf = html.unescape(page[page.index('id="leaf"') : page.index("all leaves")])
    assert 'data-leaf="params/<b>&\'"' in leaf
    shown = re.findall(r'data-device="(\d+)".*?class="box">([^<]*)<', leaf)
    boxes = [
        ["0 to 2", "2 to 4", "4 to 5", "nothing"] * 2,
        ["0 to 2", "2 to 4", "4 to 5"],
    ]
    ids = [range(8), (4, 0, 2)]
    assert [(int(device), words) for device, words in shown] == [
        (device, f"dim 0: {words}")
        for mesh in zip(ids, boxes, strict=True)
        for device, words in zip(*mesh, strict=True)
    ]
    # Of pieces of two rows, one is half full and one is empty, twice and once.
    assert leaf.count('class="pad"') == 2 * 2 + 1

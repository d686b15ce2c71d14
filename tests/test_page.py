"""The page of a report: what is on it, and that a browser opens, searches and shows it."""

from __future__ import annotations

import html.parser
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import sp_compile
from sp_compile.errors import ConfigError
from sp_compile.layout import token_layout
from sp_compile.page import page, side_by_side
from sp_compile.pipeline import registered_passes
from tests.models import llama

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def report(sp: int = 3, scheme: str = "zigzag") -> sp_compile.Report:
    torch._dynamo.reset()
    return sp_compile.explain(llama(), sp_compile.pack([[5] * 40, [6] * 3, [7]]), sp=sp, scheme=scheme)


class _Tags(html.parser.HTMLParser):
    """Tags that are open, and what points elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "input", "br"):
            self.open.append(tag)
        self.links += [str(value) for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else():
    made = report()
    text = page(made, "a <model> & more")
    tags = _Tags()
    tags.feed(text)
    assert (tags.open, tags.links) == ([], [])
    assert "http" not in text
    assert "a &lt;model&gt; &amp; more" in text
    assert re.findall(r"<summary><b>(\w+)</b>", text) == list(registered_passes())
    assert text.count("<td>all_gather</td>") == len(made.collectives)
    assert "%attention" in text
    assert re.search(r"<td>0-1</td><td>allgather_kv</td>\s*<td class=.number.>[\d.e-]+ ms</td><td>ran</td>", text)
    assert re.search(r"<td>window</td><td></td><td>cannot: \w+", text)
    assert re.search(r"<td>hybrid</td><td></td><td>cannot: there is no 2-D mesh", text)


@pytest.mark.parametrize("scheme", ["zigzag", "contiguous", "whole"])
def test_every_token_is_in_the_picture_once(scheme: str):
    made = report(scheme=scheme)
    found = re.findall(r"<title>rank (\d+): request (\d+), tokens (\d+) to (\d+)</title>", page(made, ""))
    layout = token_layout(made.lengths, 3, scheme, min_shard_length=2)
    starts = torch.tensor([0, 40, 43])
    for rank in range(3):
        own = [(int(a), int(b), int(c)) for r, a, b, c in found if int(r) == rank]
        tokens = sorted(int(starts[request]) + i for request, first, last in own for i in range(first, last + 1))
        assert tokens == sorted(layout.local_index[rank][layout.valid[rank]].tolist())


def test_many_ranks_are_shown_by_some():
    text = page(report(100), "")
    assert "36 of them left out" in text
    assert text.count(">rank 0<") == text.count(">rank 99<") == 1


def test_a_diff_side_by_side():
    diff = ["--- before", "+++ pass", "@@ -1,4 +1,4 @@", " same", "-old", "-older", "+new", " end", "+last"]
    assert list(side_by_side(diff)) == [
        ("hunk", "@@ -1,4 +1,4 @@", ""), ("same", "same", "same"), ("changed", "old", "new"),
        ("changed", "older", ""), ("same", "end", "end"), ("changed", "", "last")]  # fmt: skip
    assert list(side_by_side([])) == []


def test_a_folder_that_is_not_there_is_told(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot be written: there is no directory"):
        report().write_html(tmp_path / "nowhere" / "page.html")


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
def test_a_browser_opens_diffs_and_finds_nodes(tmp_path: Path):
    file = tmp_path / "page.html"
    report().write_html(file, "Llama over 3 ranks")
    asking = """<script>
      window.addEventListener("error", (each) => { document.title = "broken: " + each.message; });
      const input = document.querySelector("#search input");
      input.value = "all_gather_into_tensor"; input.dispatchEvent(new Event("input"));
    </script></body>"""
    file.write_text(file.read_text().replace("</body>", asking))
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", "--dump-dom"]
    shown = subprocess.run([*command, file.as_uri()], capture_output=True, text=True, timeout=120, check=True).stdout
    assert "<title>Llama over 3 ranks</title>" in shown
    told = re.search(r'id="found"[^>]*>(\d+) lines in (\d+) passes<', shown)
    assert told is not None
    assert int(told[1]) == len(re.findall(r'<tr class="hit">', shown)) > 0
    opened = re.findall(r'<details open="">\s*<summary><b>(\w+)</b>', shown)
    assert len(opened) == int(told[2])
    assert "lower_redistributes" in opened

"""The report page: one document, nothing fetched, everything escaped, checks counted."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from trocar import errors
from trocar.plots import Bars
from trocar.plots.page import Check, Section, page

VOID = {"meta", "rect", "path", "line", "stop", "circle", "image"}
FIGURE = Bars(("<bos>",), (1.0,), "Figure <1>", "bits")
CHECKS = (Check("lens <ok>", "3×10⁻⁶", "≤ 10⁻⁴", ok=True), Check("steer", "2 nats", "≥ 3 nats", ok=False))


class Outline(HTMLParser):
    """A strict reader: tags must nest; collects text by tag and all attributes."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.attributes: list[tuple[str, str, str | None]] = []
        self.feed(document)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]
        self.texts.setdefault(tag, []).append("")
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID, tag
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts[self.open[-1]][-1] += data


def document() -> str:
    rows = (
        {"site": "resid_post.14 <x>", "AUROC": 0.97312, "ok": True},
        {"site": "", "AUROC": 0.5, "ok": False},
    )
    sections = (
        Section("One & two", ("First </p> paragraph.\nSame one.", "Second."), (FIGURE, FIGURE), rows),
        Section("Empty"),
    )
    return page("Report <title>", "The lead\x1b.", sections, CHECKS)


def test_it_nests_and_says_what_it_was_told() -> None:
    seen = Outline(document())
    assert seen.texts["h1"] == ["Report <title>"]
    assert seen.texts["h2"] == ["1 of 2 checks passed", "One & two", "Empty"]
    assert seen.texts["p"] == ["The lead␛.", "First </p> paragraph. Same one.", "Second."]
    assert [t for t in seen.texts["span"]] == ["✓ pass", "✗ fail"]
    assert "lens <ok>" in seen.texts["th"]
    assert {"3×10⁻⁶", "≥ 3 nats", "resid_post.14 <x>", "0.9731", "yes", "no"} <= set(seen.texts["td"])
    assert "<bos>" in seen.texts["text"]


def test_nothing_is_fetched_or_run() -> None:
    text = document()
    seen = Outline(text)
    assert not set(seen.texts) & {"script", "link", "iframe", "object", "img", "base", "form"}
    for tag, name, value in seen.attributes:
        assert not name.startswith("on")
        assert name not in {"src", "href", "action", "data", "srcset"}, (tag, name)
        assert "://" not in (value or "") or name == "xmlns"
    assert "@import" not in text
    assert re.findall(r"url\((?!#)", text) == []
    policy = next(
        v
        for tag, name, v in seen.attributes
        if tag == "meta" and name == "content" and "default-src" in (v or "")
    )
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_the_same_figure_twice_has_different_ids() -> None:
    ids = [value for _, name, value in Outline(document()).attributes if name == "id"]
    assert len(ids) == len(set(ids))
    labels = [value for _, name, value in Outline(document()).attributes if name == "aria-labelledby"]
    assert set(labels) <= set(ids)


def test_it_is_the_same_text_every_time() -> None:
    assert document() == document()


def test_without_checks_there_is_no_summary() -> None:
    assert "checks passed" not in page("T", "L", (Section("A"),))


def test_rows_with_other_columns_are_refused() -> None:
    with pytest.raises(errors.ClientError) as caught:
        page("T", "L", (Section("A", rows=({"a": 1}, {"b": 2})),))
    assert caught.value.path == "rows[1]"
    assert "['b']" in caught.value.reason

"""Hostile text: what is shown is one printable line, well-formed in XML, and never wider than promised."""

from __future__ import annotations

import html
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trocar.plots import glyphs, svg

ANY_TEXT = st.text(st.characters(), max_size=40)


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" Paris", "·Paris"),
        ("two words", "two words"),
        ("a  b ", "a··b·"),
        ("\n", "⏎"),
        ("\t\r", "⇥␍"),
        ("\x1b[31m", "␛[31m"),
        ("\x7f", "␡"),
        ("\u202eevil", "\\u202eevil"),
        ("\ud800", "\\ud800"),
        ("\x85", "\\x85"),
        ("東京", "東京"),
        ("", ""),
    ],
)
def test_the_convention(token: str, shown: str) -> None:
    assert glyphs.visible(token) == shown


@given(ANY_TEXT)
def test_visible_text_is_printable_one_line_and_stable(text: str) -> None:
    shown = glyphs.visible(text)
    assert shown.isprintable()
    assert shown == shown.strip(" ")
    assert glyphs.visible(shown) == shown


@given(ANY_TEXT)
def test_escaped_text_survives_an_xml_parser_and_an_html_one(text: str) -> None:
    markup = glyphs.escape(text)
    assert ET.fromstring(f'<a b="{markup}">{markup}</a>').text in (glyphs.visible(text), None)
    assert ET.fromstring(f"<a b='{markup}'/>").get("b") == glyphs.visible(text)
    assert html.unescape(markup) == glyphs.visible(text)
    assert not set("<>\"'") & set(markup)


@given(ANY_TEXT, st.integers(3, 60))
def test_clipped_and_padded_text_keep_their_width(text: str, wide: int) -> None:
    assert glyphs.columns(glyphs.clip(text, wide)) <= wide
    assert glyphs.columns(glyphs.pad(text, wide)) == wide


@given(ANY_TEXT, st.floats(5, 400), st.booleans())
def test_shortened_text_fits(text: str, room: float, mono: bool) -> None:
    shown = glyphs.shorten(text, room, 11, mono=mono)
    assert glyphs.width_px(shown, 11, mono=mono) <= room
    if shown != glyphs.visible(text) and shown:
        assert shown.endswith("…")


def test_a_very_long_token_is_cut_quickly() -> None:
    shown = glyphs.shorten("e\u0301" * 100_000, 1e9, 11)
    assert len(shown) <= glyphs.MOST_SHOWN + 1
    assert shown.endswith("…")


def test_wrapping_keeps_all_words() -> None:
    lines = glyphs.wrap("one two three four five six seven", 80, 11)
    assert len(lines) > 1
    assert " ".join(lines) == "one two three four five six seven"
    assert all(glyphs.width_px(line, 11) <= 80 for line in lines)


@pytest.mark.parametrize(
    ("value", "written"), [(-0.001, "0"), (1.5, "1.5"), (100.0, "100"), (-2.256, "-2.26")]
)
def test_coordinates(value: float, written: str) -> None:
    assert svg.coordinate(value) == written


def test_attributes_cannot_break_out() -> None:
    markup = svg.node("a", href='"><script>alert(1)</script>')
    assert ET.fromstring(markup).get("href") == '"><script>alert(1)</script>'

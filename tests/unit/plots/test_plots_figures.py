"""Figures: well-formed, self-contained SVG with its text, right colours, refusals, tables, terminal text."""

from __future__ import annotations

import base64
import dataclasses
import math
import re
import struct
import unicodedata
import xml.etree.ElementTree as ET
import zlib
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trocar import errors
from trocar.plots import Bars, Figure, Heatmap, Line, Lines, Reference, TokenStrip

NS = "{http://www.w3.org/2000/svg}"
TOKENS = (
    "<bos>",
    "</s>",
    "<|im_start|>",
    "<script>alert('x')</script>",
    "\x00\x1b\n",
    ' "&',
    "\u202e",
    "東京",
    "",
)
N = len(TOKENS)


def heatmap(**changes: object) -> Heatmap:
    values = np.linspace(-1, 2, 3 * N).reshape(3, N)
    given: dict[str, object] = {
        "values": values,
        "x_labels": TOKENS,
        "y_labels": ("0", "1", "2"),
        "title": "Lens <b>",
        "x_title": "token",
        "y_title": "layer",
        "value_title": "p",
        "cell_texts": [TOKENS] * 3,
    }
    return Heatmap(**(given | changes))  # type: ignore[arg-type]


def lines(**changes: object) -> Lines:
    given: dict[str, object] = {
        "series": (
            Line(
                "<probe>", (0, 1, 2, 3), (0.5, 0.7, math.nan, 0.9), (0.4, 0.6, 0.7, 0.8), (0.6, 0.8, 0.9, 1.0)
            ),
            Line("control & co", (0, 1, 2, 3), (0.5, 0.5, 0.5, 0.5), dashed=True),
        ),
        "title": "AUROC by <layer>",
        "x_title": "layer",
        "y_title": "AUROC",
        "references": (Reference(0.5, "chance"), Reference(2, "here", "x")),
        "band_title": "95 % interval",
    }
    return Lines(**(given | changes))  # type: ignore[arg-type]


def bars(**changes: object) -> Bars:
    given: dict[str, object] = {
        "names": ("released <b>", "download"),
        "values": (3e5, 4e9),
        "title": "Bits",
        "value_title": "bits",
        "log": True,
    }
    return Bars(**(given | changes))  # type: ignore[arg-type]


def strip(**changes: object) -> TokenStrip:
    given: dict[str, object] = {"tokens": TOKENS, "values": [*range(N - 1), math.nan], "title": "Score"}
    return TokenStrip(**(given | changes))  # type: ignore[arg-type]


FIGURES = (heatmap(), lines(), bars(), strip())
each_figure = pytest.mark.parametrize("figure", FIGURES, ids=lambda f: type(f).__name__)


def parse(figure: Figure, width: float = 760) -> ET.Element:
    return ET.fromstring(figure.to_svg(width))


def texts(root: ET.Element) -> list[str]:
    return [node.text or "" for node in root.iter(f"{NS}text")]


def titles(root: ET.Element) -> list[str]:
    return [node.text or "" for node in root.iter(f"{NS}title")]


def terminal_columns(line: str) -> int:
    marks = {"Mn", "Me"}  # drawn over the character before them
    return sum(
        0 if unicodedata.category(c) in marks else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in line
    )


@each_figure
def test_svg_is_self_contained_and_accessible(figure: Figure) -> None:
    root = parse(figure)
    tags = {node.tag.removeprefix(NS) for node in root.iter()}
    assert not tags & {"script", "style", "foreignObject", "use", "a", "animate"}
    for node in root.iter():
        for name, value in node.attrib.items():
            assert not name.startswith("on")
            assert "http" not in value
            assert name != "style"
            assert not name.endswith("href") or value.startswith("data:image/png;base64,")
    assert root.get("role") == "img"
    assert root.get("aria-label") == figure.title
    assert root[0].text == figure.title
    assert root[1].text == figure.summary()
    assert root.get("fill") == "currentColor"


@each_figure
def test_ids_are_unique_deterministic_and_saltable(figure: Figure) -> None:
    def ids(svg: str) -> list[str]:
        return [i for node in ET.fromstring(svg).iter() if (i := node.get("id"))]

    plain, salted = figure.to_svg(), figure.to_svg(salt="2")
    assert plain == figure.to_svg() == dataclasses.replace(figure).to_svg()  # type: ignore[type-var]
    assert len(ids(plain)) == len(set(ids(plain))) >= 2
    assert not set(ids(plain)) & set(ids(salted))
    for reference in re.findall(r"url\(#([^)]+)\)", plain):
        assert reference in ids(plain)


def test_equal_titles_with_other_data_have_other_ids() -> None:
    other = dataclasses.replace(bars(), values=(3e5, 5e9))
    assert parse(bars())[0].get("id") != parse(other)[0].get("id")


@each_figure
@pytest.mark.parametrize("width", [280, 400, 760, 1200])
def test_text_stays_inside_the_figure(figure: Figure, width: float) -> None:
    root = parse(figure, width)
    height = float(root.get("height", "0"))
    assert root.get("viewBox") == f"0 0 {width} {root.get('height')}"
    for node in root.iter(f"{NS}text"):
        x, y = float(node.get("x", "0")), float(node.get("y", "0"))
        # a low estimate of the width: what overflows by this measure overflows in every font
        wide = 0.5 * float(node.get("font-size", "11")) * terminal_columns(node.text or "")
        if "rotate" in node.get("transform", ""):
            wide = 0.0
        start = {"end": x - wide, "middle": x - wide / 2}.get(node.get("text-anchor", ""), x)
        assert start >= -1, node.text
        assert start + wide <= width + 1, node.text
        assert -20 <= y <= height, node.text


@each_figure
def test_repr_and_terminal_text_fit_in_100_columns(figure: Figure) -> None:
    long = dataclasses.replace(figure, title="x" * 500)  # type: ignore[type-var]
    for shown in (repr(figure), repr(long), *str(figure).splitlines(), *long.to_text().splitlines()):
        assert shown.isprintable()
        assert terminal_columns(shown) <= 100
    assert "\n" not in repr(figure)
    assert type(figure).__name__ in repr(figure)


class _Strict(HTMLParser):
    """Collects tags and text, to see that nothing hostile became markup."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@each_figure
def test_notebooks_get_one_representation_with_a_table(figure: Figure) -> None:
    assert not hasattr(figure, "_repr_svg_")
    seen = _Strict()
    seen.feed(figure._repr_html_())
    assert {"svg", "details", "table", "td"} <= seen.tags
    assert not seen.tags & {"script", "bos", "s", "b"}


@each_figure
def test_figures_are_frozen(figure: Figure) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        figure.title = "other"


@each_figure
@pytest.mark.parametrize("width", [279, 0, -5, math.nan])
def test_too_narrow_is_refused(figure: Figure, width: float) -> None:
    with pytest.raises(errors.ClientError, match="too narrow"):
        figure.to_svg(width)


def test_hostile_tokens_are_text() -> None:
    for figure in (heatmap(), strip()):
        root = parse(figure)
        shown = texts(root)
        for token in ("<bos>", "</s>", "<|im_start|>"):
            assert token in shown
        assert any("<script>alert('x')</script>" in t for t in titles(root) + shown)
        assert any(repr("\x00\x1b\n") in t for t in titles(root))
        assert "␀␛⏎" in shown


def test_every_cell_says_its_exact_value() -> None:
    value = 0.1 + 0.2
    root = parse(heatmap(values=[[value] * N, [1] * N, [math.nan] * N], cell_texts=None))
    assert sum("p = 0.30000000000000004" in t for t in titles(root)) == N
    assert sum("p = no value" in t for t in titles(root)) == N


def cell_rects(root: ET.Element) -> list[ET.Element]:
    return [node for node in root.iter(f"{NS}rect") if len(node) and node[0].tag == f"{NS}title"]


def test_layer_zero_is_at_the_bottom_unless_asked_otherwise() -> None:
    for origin, sign in (("lower", 1), ("upper", -1)):
        root = parse(heatmap(origin=origin, cell_texts=None, y_labels=("L0", "L1", "L2")))
        y = {
            name: next(float(t.get("y", "0")) for t in root.iter(f"{NS}text") if t.text == name)
            for name in ("L0", "L2")
        }
        assert (y["L0"] - y["L2"]) * sign > 0
        first, last = (float(cell_rects(root)[i].get("y", "0")) for i in (0, -1))
        assert (first - last) * sign > 0


def test_diverging_cells_are_red_below_zero_and_blue_above() -> None:
    root = parse(heatmap(values=[[-1.0] * N, [0.0] * N, [0.5] * N], cell_texts=None, diverging=True))
    fills = [bytes.fromhex(node.get("fill", "")[1:]) for node in cell_rects(root)]
    assert len(fills) == 3 * N
    assert fills[0][0] > fills[0][2] + 60
    assert max(fills[N]) - min(fills[N]) < 5
    assert fills[2 * N][2] > fills[2 * N][0] + 60


def test_cell_text_is_black_on_light_and_white_on_dark() -> None:
    root = parse(heatmap(values=[[0.0] * N, [1.0] * N, [1.0] * N], cell_texts=[["tok"] * N] * 3))
    inks = [t.get("fill") for t in root.iter(f"{NS}text") if t.text == "tok"]
    assert inks == ["#fff"] * N + ["#000"] * 2 * N


def test_cell_text_that_does_not_fit_is_left_out_but_kept_on_hover() -> None:
    many = 200
    figure = Heatmap([[1.0] * many], ["t"] * many, ["0"], "", "", "", "", cell_texts=[["longtoken"] * many])
    root = parse(figure)
    assert "longtoken" not in texts(root)
    assert sum("text 'longtoken'" in t for t in titles(root)) == many


def test_a_large_grid_becomes_an_image_with_the_right_pixels() -> None:
    values = np.arange(30_000, dtype=float).reshape(100, 300)
    values[99, 0] = math.nan
    figure = Heatmap(values, [str(i) for i in range(300)], [str(i) for i in range(100)], "Big", "x", "y", "v")
    root = parse(figure)
    assert not cell_rects(root)
    image = next(root.iter(f"{NS}image"))
    raw = base64.b64decode(image.get("href", "").partition(",")[2])
    assert struct.unpack(">II", raw[16:24]) == (300, 100)
    (length,) = struct.unpack(">I", raw[33:37])
    pixels = (
        np.frombuffer(zlib.decompress(raw[41 : 41 + length]), np.uint8)
        .reshape(100, 1201)[:, 1:]
        .reshape(100, 300, 4)
    )
    assert pixels[0, 0].tolist() == [0, 0, 0, 0]  # row 99 is on top; NaN is transparent
    assert pixels[99, 0].tolist() == [0x35, 0x09, 0x56, 255]
    assert pixels[0, 299].tolist() == [0xF8, 0xEE, 0x4B, 255]
    assert len(figure.to_svg()) < 300_000
    assert "first 500 of 30,000 rows" in figure._repr_html_()


def test_points_of_a_line_are_where_their_values_say() -> None:
    root = parse(Lines((Line("a", (0, 5, 10), (0, 10, 5)),), "", "x", "y"))
    spots = [(float(c.get("cx", "0")), float(c.get("cy", "0"))) for c in root.iter(f"{NS}circle")]
    (x0, y0), (x1, y1), (x2, y2) = spots
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.02)
    assert y0 - y2 == pytest.approx(y2 - y1, abs=0.02)
    assert y1 < y2 < y0


def test_nan_interrupts_line_and_band() -> None:
    nan = math.nan
    line = Line("a", (0, 1, 2, 3, 4), (1, 2, nan, 4, 5), (0, 1, nan, 3, 4), (2, 3, nan, 5, 6))
    root = parse(Lines((line,), "", "x", "y"))
    stroke = next(
        p for p in root.iter(f"{NS}path") if p.get("fill") == "none" and p.get("d", "").count("M") > 1
    )
    assert stroke.get("d", "").count("M") == 2
    band = next(p for p in root.iter(f"{NS}path") if p.get("fill-opacity") == "0.18")
    assert band.get("d", "").count("Z") == 2
    assert len(list(root.iter(f"{NS}circle"))) == 4


def test_the_legend_is_above_the_data() -> None:
    root = parse(lines())
    legend = [g for g in root.iter(f"{NS}g") if g.get("transform", "").startswith("translate")]
    names = [g.findtext(f"{NS}text") for g in legend]
    assert names == ["<probe>", "control & co", "chance", "here", "95 % interval"]
    lowest = max(float(g.get("transform", "").split()[-1].rstrip(")")) for g in legend)
    frame = next(root.iter(f"{NS}clipPath"))[0]
    assert lowest + 6 < float(frame.get("y", "0"))


def test_series_have_distinct_looks() -> None:
    series = tuple(Line(f"s{i}", (0, 1), (i, i + 1)) for i in range(28))
    root = parse(Lines(series, "", "", ""))
    legend = [g for g in root.iter(f"{NS}g") if g.get("transform", "").startswith("translate")]
    looks = {
        (m.get("fill"), m.get("d")) for g in legend for m in g[0].iter(f"{NS}path") if m.get("fill") != "none"
    }
    assert len(looks) == 28
    with pytest.raises(errors.ClientError, match="29 series"):
        Lines((*series, series[0]), "", "", "")


def test_points_outside_a_given_range_are_counted_not_hidden() -> None:
    figure = Lines((Line("a", (0, 1, 2, 3), (0, 1, 2, 3)),), "", "x", "y", y_range=(0.5, 2.0))
    root = parse(figure)
    assert "2 of 4 points lie outside the vertical range shown" in texts(root)
    assert len(list(root.iter(f"{NS}circle"))) == 2
    assert "outside" not in dataclasses.replace(figure, y_range=None).to_svg()


def test_crowded_points_have_no_markers_unless_they_would_vanish() -> None:
    y = [0.0] * 300
    y[99] = y[101] = math.nan
    root = parse(Lines((Line("", range(300), y),), "", "", ""))
    assert len(list(root.iter(f"{NS}circle"))) == 298
    assert sum(p.get("fill") == "#0072B2" for p in root.iter(f"{NS}path")) == 1


def test_log_bars_have_lengths_in_decades() -> None:
    root = parse(bars())
    first, second = (float(r.get("width", "0")) for r in root.iter(f"{NS}rect"))
    assert first / second == pytest.approx(math.log10(3e5 / 1e5) / math.log10(4e9 / 1e5), abs=1e-3)
    assert "bits (logarithmic)" in texts(root)
    assert {"300,000", "4×10⁹", "10⁵", "10¹⁰"} <= set(texts(root))


def test_linear_bars_start_at_zero_on_both_sides() -> None:
    root = parse(Bars(("a", "b", "c"), (-1.0, 2.0, 0.0), "", ""))
    minus, plus, none = root.iter(f"{NS}rect")
    assert float(minus.get("x", "0")) + float(minus.get("width", "0")) == pytest.approx(
        float(plus.get("x", "0")), abs=0.02
    )
    assert float(plus.get("width", "0")) == pytest.approx(2 * float(minus.get("width", "0")), abs=0.02)
    assert float(none.get("width", "0")) == 1.0


def test_bars_show_the_texts_they_are_given() -> None:
    assert {"37 kB", "500 MB"} <= set(texts(parse(bars(value_texts=("37 kB", "500 MB")))))


def test_a_strip_wraps_and_breaks_after_newlines() -> None:
    figure = TokenStrip(["word"] * 50 + ["\n", "next"], [0.0] * 51 + [1.0], "")
    boxes = [
        (float(r.get("x", "0")), float(r.get("y", "0")), float(r.get("width", "0")))
        for r in parse(figure, 400).iter(f"{NS}rect")
    ]
    assert len(boxes) == 52
    assert all(x + wide <= 400 for x, _, wide in boxes)
    assert boxes[51][0] == boxes[0][0]
    assert boxes[51][1] > boxes[50][1]
    for (x, y, wide), (x2, y2, _) in pairwise(boxes):
        assert y2 > y or x2 >= x + wide


def test_tables_hold_everything_unchanged() -> None:
    rows = heatmap().to_table()
    assert len(rows) == 3 * N
    assert rows[N + 3] == {
        "y_index": 1,
        "y": "1",
        "x_index": 3,
        "x": TOKENS[3],
        "value": heatmap().values[1][3],
        "text": TOKENS[3],
    }
    assert lines().to_table()[1] == {"series": "<probe>", "x": 1.0, "y": 0.7, "low": 0.6, "high": 0.8}
    assert lines().to_table()[4]["low"] is None
    assert bars().to_table() == [{"name": "released <b>", "value": 3e5}, {"name": "download", "value": 4e9}]
    assert strip().to_table()[1] == {"index": 1, "token": "</s>", "value": 1.0}


def test_terminal_text() -> None:
    figure = Heatmap([[0.0, 1.0], [math.nan, 0.5]], ["<bos>", " a"], ["0", "1"], "T", "x", "y", "v")
    assert figure.to_text().splitlines() == [
        "T",
        "2 y x 2 x, v 0 to 1, 1 blank",
        "1   · ▅▅",
        "0  ▁▁ ██",
        "    0  1",
        "0=<bos>  1=·a",
    ]
    sign = Heatmap([[-1.0, 0.5, 0.0]], list("abc"), ["0"], "", "", "", "", diverging=True).to_text()
    assert "−█ +▅  ▁" in sign
    assert "▁▅█" in Lines((Line("s", (0, 1, 2), (0, 1, 2)),), "", "", "").to_text()
    lengths = [line.count("█") for line in bars().to_text().splitlines()[2:]]
    assert lengths[0] / lengths[1] == pytest.approx(0.477 / 4.602, abs=0.02)
    assert "</s>" in strip().to_text()


@pytest.mark.parametrize(
    ("make", "path"),
    [
        (lambda: heatmap(values=[[1.0] * N] * 2), "values"),
        (lambda: heatmap(values=[[1.0] * N, [1.0], [1.0] * N]), "values[1]"),
        (lambda: heatmap(values=[[math.inf] * N] * 3), "values[0][0]"),
        (lambda: heatmap(x_labels="abcdefghi"), "x_labels"),
        (lambda: heatmap(cell_texts=[TOKENS] * 2), "cell_texts"),
        (lambda: heatmap(cell_texts=[TOKENS, TOKENS, TOKENS[1:]]), "cell_texts[2]"),
        (lambda: heatmap(cell_texts=[[1] * N] * 3), "cell_texts[0][0]"),
        (lambda: heatmap(origin="top"), "origin"),
        (lambda: heatmap(diverging=True, vmin=-1.0, vmax=2.0), "vmin"),
        (lambda: Heatmap([], [], [], "", "", "", ""), "values"),
        (lambda: Line("a", (0, 1), (0,)), "Line('a').y"),
        (lambda: Line("a", (0,), (0,), low=(0,)), "Line('a').low"),
        (lambda: Line("a", (0,), (0,), (1,), (0,)), "Line('a').low[0]"),
        (lambda: Reference(1.0, "r", "z"), "axis"),  # type: ignore[arg-type]
        (lambda: lines(series=()), "series"),
        (lambda: lines(series=(Line("a", (0,), (math.nan,)),)), "series"),
        (lambda: lines(y_range=(1.0, 1.0)), "y_range"),
        (lambda: bars(values=(0.0, 1.0)), "values[0]"),
        (lambda: bars(values=(1.0,)), "values"),
        (lambda: bars(value_texts=("a",)), "value_texts"),
        (lambda: bars(names=(), values=()), "names"),
        (lambda: strip(values=[1.0]), "values"),
        (lambda: strip(tokens=(), values=()), "tokens"),
    ],
)
def test_refusals_name_the_argument(make: object, path: str) -> None:
    with pytest.raises(errors.ClientError) as caught:
        make()  # type: ignore[operator]
    assert caught.value.code == "bad_argument"
    assert caught.value.path == path


VALUES = st.floats(-1e300, 1e300) | st.just(math.nan)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.text(st.characters(), max_size=12), VALUES), min_size=1, max_size=8), st.booleans()
)
def test_any_tokens_and_values_make_well_formed_figures(
    pairs: list[tuple[str, float]], diverging: bool
) -> None:
    tokens, values = zip(*pairs, strict=True)
    if all(map(math.isnan, values)):
        return
    figures = (
        TokenStrip(tokens, values, tokens[0], diverging=diverging),
        Heatmap(
            [values],
            tokens,
            tokens[:1],
            tokens[0],
            "",
            "",
            tokens[0],
            cell_texts=[tokens],
            diverging=diverging,
        ),
        Lines((Line(tokens[0], range(len(values)), values),), tokens[0], tokens[0], ""),
        Bars(tokens, [0.0 if math.isnan(v) else v for v in values], tokens[0], ""),
    )
    for figure in figures:
        root = parse(figure, 320)
        for node in root.iter():
            for name, value in node.attrib.items():
                assert name in {"id", "aria-label", "aria-describedby"} or not re.search(
                    r"\b(nan|inf)\b", value
                )
        assert all(terminal_columns(line) <= 100 for line in figure.to_text().splitlines())

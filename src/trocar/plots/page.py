"""One self-contained HTML document of figures, checks, prose and tables: a report to send or print.

Everything is inline: no scripts, no style sheets or fonts from elsewhere, and a content security policy in
the document that forbids them. Light and dark follow the reader's setting; print is always light. All text
is plain text and is escaped here. Nothing is measured or judged here: a `Check` says itself whether it holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from trocar.plots.figure import Figure
from trocar.plots.glyphs import Markup, escape
from trocar.plots.svg import join, node
from trocar.plots.table import Cell, html_table

FIGURE_PX: Final = 760


@dataclass(frozen=True, slots=True)
class Check:
    """One row of the summary table.

    Attributes:
        name: what was checked.
        measured: what came out, with its unit.
        goal: what was asked for, with its unit.
        ok: whether the goal was met.
    """

    name: str
    measured: str
    goal: str
    ok: bool


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and what stands under it, in this order: paragraphs, figures, one table.

    Attributes:
        heading: plain text.
        paragraphs: plain text each; a single newline is a space.
        figures: drawn 760 px wide.
        rows: rows of one table, all with the same keys.
    """

    heading: str
    paragraphs: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    rows: Sequence[Mapping[str, Cell]] = ()


def page(title: str, lead: str, sections: Sequence[Section], checks: Sequence[Check] = ()) -> str:
    """The document.

    Args:
        title: name of the page and its first heading.
        lead: one paragraph under it.
        sections: in reading order.
        checks: for the summary table on top; without any, no table.

    Returns:
        HTML 5, the same text for the same arguments. Write it as UTF-8.

    Example:
        page("Demo", "What was measured.", [Section("Lens", ("One figure.",), (heatmap,))])
    """
    head = join(
        [
            node("meta", charset="utf-8"),
            node("meta", name="viewport", content="width=device-width, initial-scale=1"),
            node("meta", http_equiv="Content-Security-Policy", content=_POLICY),
            node("meta", name="color-scheme", content="light dark"),
            node("title", _prose(title)),
            node("style", Markup(_STYLE)),
        ]
    )
    body = node(
        "main",
        node("header", node("h1", _prose(title)), node("p", _prose(lead), **{"class": "lead"})),
        _summary(checks),
        *(_section(i, section) for i, section in enumerate(sections, start=1)),
    )
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>{head}</head>\n<body>\n{body}\n</body>\n</html>\n'


def _prose(text: str) -> Markup:
    """Running text: line breaks and runs of spaces are single spaces, as HTML would show them."""
    return escape(" ".join(text.split()))


def _summary(checks: Sequence[Check]) -> Markup:
    if not checks:
        return Markup("")
    passed = sum(check.ok for check in checks)
    head = node("tr", *(node("th", escape(name), scope="col") for name in ("", "Check", "Measured", "Goal")))
    return node(
        "section",
        node("h2", _prose(f"{passed} of {len(checks)} checks passed"), id="checks"),
        _scroll(node("table", node("thead", head), node("tbody", *map(_check, checks)))),
        **{"class": "checks", "aria-labelledby": "checks"},
    )


def _check(check: Check) -> Markup:
    word, kind = ("✓ pass", "pass") if check.ok else ("✗ fail", "fail")
    return node(
        "tr",
        node("td", node("span", escape(word), **{"class": kind})),
        node("th", _prose(check.name), scope="row"),
        node("td", _prose(check.measured)),
        node("td", _prose(check.goal)),
    )


def _section(i: int, section: Section) -> Markup:
    parts = [node("h2", _prose(section.heading), id=f"section-{i}")]
    parts += [node("p", _prose(text)) for text in section.paragraphs]
    parts += [_figure(figure, f"{i}.{k}") for k, figure in enumerate(section.figures, start=1)]
    parts += [_scroll(html_table(section.rows))] if section.rows else []
    return node("section", *parts, **{"aria-labelledby": f"section-{i}"})


def _figure(figure: Figure, place: str) -> Markup:
    drawing = node("div", Markup(figure.to_svg(FIGURE_PX, salt=place)), tabindex="0", **{"class": "scroll"})
    values = node(
        "details", node("summary", Markup("Values as a table")), _scroll(html_table(figure.to_table()))
    )
    return node("figure", drawing, values)


def _scroll(content: Markup) -> Markup:
    """Wide content scrolls inside itself on a narrow screen, by keyboard too."""
    return node("div", content, tabindex="0", **{"class": "scroll"})


_POLICY: Final = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
)
_STYLE: Final = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1f23; --soft: #59616b; --rule: #d9dde2;
  --pass: #0a6b45; --pass-paper: #e2f4eb; --fail: #a3260f; --fail-paper: #fde9e4; }
@media screen and (prefers-color-scheme: dark) {
  :root { --paper: #14171a; --ink: #e4e7ea; --soft: #a0a8b1; --rule: #363c43;
    --pass: #7ddcae; --pass-paper: #12382a; --fail: #ffab98; --fail-paper: #47190f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans",
  Arial, sans-serif; }
main { max-width: 50rem; margin: 0 auto; padding: 3rem 1.25rem 5rem; }
h1 { font-size: clamp(1.5rem, 5vw, 2rem); line-height: 1.2; margin: 0 0 .6rem; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 0 0 .6rem; }
p { margin: 0 0 1rem; max-width: 42rem; overflow-wrap: anywhere; }
.lead { font-size: 1.125rem; color: var(--soft); }
section { margin-top: 2.75rem; }
figure { margin: 1.5rem 0; break-inside: avoid; }
svg { display: block; max-width: 100%; min-width: 38rem; height: auto; }
.scroll { overflow-x: auto; }
.scroll:focus-visible { outline: 2px solid currentColor; outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; line-height: 1.4;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding: .3rem 0; }
th, td { padding: .4rem .8rem .4rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { text-align: left; font-weight: 600; }
th[align=right], td[align=right] { text-align: right; }
thead th { color: var(--soft); font-weight: 500; white-space: nowrap; }
tbody th { font-weight: 500; }
@media (min-width: 40rem) { .checks td:nth-child(n+3) { min-width: 8.5rem; } }
details { margin-top: .4rem; font-size: .9rem; color: var(--soft); }
details table { width: auto; min-width: 50%; }
details .scroll { max-height: 24rem; overflow-y: auto; }
summary { cursor: pointer; width: fit-content; }
.pass, .fail { display: inline-block; padding: 0 .5rem; border-radius: 1rem; white-space: nowrap;
  font-size: .85rem; font-weight: 600; }
.pass { color: var(--pass); background: var(--pass-paper); }
.fail { color: var(--fail); background: var(--fail-paper); }
@media print { main { max-width: none; padding: 0; } details { display: none; } .scroll { overflow: visible; }
  svg { min-width: 0; } h2 { break-after: avoid; } tr { break-inside: avoid; }
  .pass, .fail { border: 1px solid currentColor; } }
"""

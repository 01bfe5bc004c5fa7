"""SVG written as text: elements, words, hover titles and the document around them.

Every string, attribute or content, goes through `glyphs.escape`; there is no way to add raw markup except the
`Markup` that these functions made. Styling is presentation attributes only: no scripts, no style sheets, no
fonts, nothing fetched, so a figure works inside pages with a strict content security policy and does not
leak styles into a notebook. Text and axes are `currentColor` on a transparent background.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from trocar.plots.glyphs import Markup, escape

SANS: Final = (
    "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', Arial, sans-serif"
)
MONO: Final = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
SMALL_PX: Final = 11.0
TITLE_PX: Final = 14.0
FAINT: Final = 0.14
SOFT: Final = 0.75


def node(name: str, /, *children: Markup, **attributes: str | float | None) -> Markup:
    """One element; `text_anchor="end"` becomes `text-anchor="end"`, None leaves the attribute out."""
    shown = "".join(
        f' {key.replace("_", "-")}="{_value(v)}"' for key, v in attributes.items() if v is not None
    )
    return Markup(f"<{name}{shown}>{''.join(children)}</{name}>" if children else f"<{name}{shown}/>")


def _value(value: str | float) -> str:
    return escape(value) if isinstance(value, str) else coordinate(value)


def coordinate(value: float) -> str:
    """A length or place in pixels, to a hundredth."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def join(parts: Iterable[Markup]) -> Markup:
    return Markup("".join(parts))


def group(*children: Markup, **attributes: str | float | None) -> Markup:
    return node("g", *children, **attributes)


def tip(*lines: str) -> Markup:
    """The hover title of the element it is put into, one line per argument."""
    return node("title", Markup("\n".join(escape(line) for line in lines)))


def words(
    text: str,
    x: float,
    y: float,
    *,
    size: float = SMALL_PX,
    anchor: str | None = None,
    mono: bool = False,
    bold: bool = False,
    fill: str | None = None,
    soft: bool = False,
    turn: float | None = None,
    full: str | None = None,
) -> Markup:
    """Text whose vertical middle is at `y`.

    Args:
        text: what is shown.
        x: place of the start, middle or end, as `anchor` says.
        y: the vertical middle of lower-case letters' line.
        turn: rotation in degrees about (x, y).
        full: the uncut text for the hover title, when it differs from what is shown.
    """
    return node(
        "text",
        escape(text),
        *([tip(full)] if full is not None and full != text else []),
        x=x,
        y=y,
        dy="0.35em",
        text_anchor=anchor,
        font_size=None if size == SMALL_PX else size,
        font_family=MONO if mono else None,
        font_weight="600" if bold else None,
        fill=fill,
        fill_opacity=SOFT if soft else None,
        transform=None if turn is None else f"rotate({coordinate(turn)} {coordinate(x)} {coordinate(y)})",
    )


def line(
    x1: float, y1: float, x2: float, y2: float, *, opacity: float = FAINT, **more: str | float | None
) -> Markup:
    """A thin straight line in the colour of the text."""
    return node(
        "line",
        x1=x1,
        y1=y1,
        x2=x2,
        y2=y2,
        stroke="currentColor",
        stroke_opacity=opacity,
        stroke_width=1,
        **more,
    )


def document(body: Markup, *, width: float, height: float, title: str, description: str, key: str) -> str:
    """The whole SVG: accessible name and description first, then the drawing.

    Args:
        key: prefix of every id in the document, unique to the figure.
    """
    return node(
        "svg",
        node("title", escape(title), id=f"{key}-title"),
        node("desc", escape(description), id=f"{key}-desc"),
        body,
        xmlns="http://www.w3.org/2000/svg",
        width=width,
        height=height,
        viewBox=f"0 0 {coordinate(width)} {coordinate(height)}",
        role="img",
        aria_label=title or description,
        aria_describedby=f"{key}-desc",
        font_family=SANS,
        font_size=SMALL_PX,
        fill="currentColor",
    )

"""What every figure can do: become SVG, HTML, a table, terminal text and a one-line repr.

A figure is a frozen value; drawing is a pure function of it and of the width, so the same figure is the same
bytes everywhere. Notebooks get `_repr_html_` and deliberately no `_repr_svg_`: with both, some front ends
show the figure twice, and a bare SVG is displayed as an image whose text cannot follow a dark theme.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Final

from trocar import errors
from trocar.plots import svg
from trocar.plots.glyphs import Markup, clip, wrap
from trocar.plots.table import Cell, html_table

WIDTH_PX: Final = 760
LEAST_WIDTH_PX: Final = 280
TEXT_COLUMNS: Final = 100
PAD_PX: Final = 8.0
_LINE_PX: Final = 18.0


@dataclass(frozen=True, slots=True)
class Drawing:
    """The inside of an SVG document and how tall it came out, in pixels."""

    body: Markup
    height: float


class Figure(ABC):
    """Base of `Heatmap`, `Lines`, `Bars` and `TokenStrip`."""

    title: str

    @abstractmethod
    def summary(self) -> str:
        """One sentence: size and range. Read out by screen readers and shown in the repr."""

    @abstractmethod
    def to_table(self) -> list[dict[str, Cell]]:
        """Everything the figure shows, one row per mark, labels and numbers unchanged."""

    @abstractmethod
    def to_text(self) -> str:
        """The figure for a terminal: several lines, none over 100 columns."""

    @abstractmethod
    def _draw(self, width: float, key: str) -> Drawing: ...

    def to_svg(self, width: float = WIDTH_PX, *, salt: str = "") -> str:
        """One self-contained SVG element.

        Args:
            width: in CSS pixels, at least 280; the height follows from the content.
            salt: makes the ids differ when the same figure appears twice in one document.

        Raises:
            ClientError: `bad_argument` for a width that nothing fits into.
        """
        if not width >= LEAST_WIDTH_PX:
            raise errors.refuse(
                "bad_argument", "width", f"{width!r} px is too narrow; the least is {LEAST_WIDTH_PX}"
            )
        key = self._key(width, salt)
        drawing = self._draw(width, key)
        return svg.document(
            drawing.body,
            width=width,
            height=drawing.height,
            title=self.title,
            description=self.summary(),
            key=key,
        )

    def _key(self, width: float, salt: str) -> str:
        """Prefix for ids: a hash of all that decides the drawing, so equal figures have equal ids."""
        content = [type(self).__name__, width, salt, *(getattr(self, f.name) for f in fields(self))]  # type: ignore[arg-type]
        return "f" + hashlib.sha256(ascii(content).encode("ascii")).hexdigest()[:12]

    def to_html(self, width: float = WIDTH_PX) -> str:
        """The SVG, and under it the same values as a folded table."""
        table = svg.node(
            "details", svg.node("summary", Markup("Values as a table")), html_table(self.to_table())
        )
        return svg.node("div", Markup(self.to_svg(width)), table, style="overflow-x: auto")

    def _repr_html_(self) -> str:
        return self.to_html()

    def __repr__(self) -> str:
        return clip(f"<{type(self).__name__} {clip(self.title, 48)!r}: {self.summary()}>", TEXT_COLUMNS)

    def __str__(self) -> str:
        return self.to_text()


def heading(title: str, width: float) -> Drawing:
    """The title in as many lines as it needs, from the top left corner."""
    if not title:
        return Drawing(Markup(""), PAD_PX)
    lines = wrap(title, width - 2 * PAD_PX, svg.TITLE_PX * 1.06)
    parts = (
        svg.words(text, PAD_PX, PAD_PX + _LINE_PX * (i + 0.5), size=svg.TITLE_PX, bold=True)
        for i, text in enumerate(lines)
    )
    return Drawing(svg.join(parts), PAD_PX + _LINE_PX * len(lines) + 4)

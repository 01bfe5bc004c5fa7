"""Figures as values: built from numbers and labels, drawn as SVG, HTML, tables or terminal text.

`Heatmap`, `Lines`, `Bars` and `TokenStrip` are frozen; one renderer serves notebooks, the console, reports
and tests. Labels and tokens are treated as hostile markup everywhere (`glyphs` has the convention). `page`
(import it from `trocar.plots.page`) puts figures into one self-contained HTML document. This room knows
nothing about models, programs or the network, and needs neither torch nor a plotting library.
"""

from trocar.plots.bars import Bars
from trocar.plots.figure import Figure
from trocar.plots.heatmap import Heatmap
from trocar.plots.lines import Lines
from trocar.plots.series import Line, Reference
from trocar.plots.strip import TokenStrip

__all__ = ["Bars", "Figure", "Heatmap", "Line", "Lines", "Reference", "TokenStrip"]

"""Analyses of stored rows: fits that turn rows and public labels into a direction per site, honestly scored.

Everything here takes arrays and returns frozen results; a fit sees one site at a time, so memory holds one
site. Every site is fitted and tested on the same held-out split. Rows are secret and stay here; labels came
from the user. This room knows nothing of handles, models, programs or budgets.
"""

from trocar.analysis.fit import check, fit, sizes
from trocar.analysis.maps import LinearFit, linear_map
from trocar.analysis.maps import sizes as map_sizes
from trocar.analysis.metrics import auroc
from trocar.analysis.results import ClassMetrics, FitResult, Kind, RidgeMetrics, SiteFit

__all__ = [
    "ClassMetrics",
    "FitResult",
    "Kind",
    "LinearFit",
    "RidgeMetrics",
    "SiteFit",
    "auroc",
    "check",
    "fit",
    "linear_map",
    "map_sizes",
    "sizes",
]

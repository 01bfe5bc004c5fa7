"""Analyses of stored rows: fits that turn rows and public labels into directions and maps per site, honestly scored.

Rows come as a `Source`, block by block, as often as a fit needs them; what is kept of them are sums and scores, never
the rows. Every site is fitted and tested on the same held-out split. Rows are secret and stay here; labels came from
the user. This room knows nothing of handles, models, programs or budgets.
"""

from trocar.analysis.fit import check, fit, leans_on, sizes
from trocar.analysis.many import logistic_many
from trocar.analysis.maps import LinearFit, linear_map
from trocar.analysis.maps import sizes as map_sizes
from trocar.analysis.metrics import auroc
from trocar.analysis.results import Calibration, ClassMetrics, FitResult, Kind, RidgeMetrics, SiteFit
from trocar.analysis.source import ArraySource, Source
from trocar.analysis.transforms import Transform, fit_leace, fit_pca, fit_whitening

__all__ = [
    "ArraySource",
    "Calibration",
    "ClassMetrics",
    "FitResult",
    "Kind",
    "LinearFit",
    "RidgeMetrics",
    "SiteFit",
    "Source",
    "Transform",
    "auroc",
    "check",
    "fit",
    "fit_leace",
    "fit_pca",
    "fit_whitening",
    "leans_on",
    "linear_map",
    "logistic_many",
    "map_sizes",
    "sizes",
]

"""Dictionaries of features, trained next to the rows: sparse autoencoders by SAELens, with a faster step for TopK.

Rows come as a `Source`, as for analyses; what leaves is for others to decide. SAELens comes with the extra `sae` and
is loaded when it is first needed. This room knows nothing of stores, handles, models or budgets.
"""

from trocar.dictionaries.dictionary import Codes, Dictionary, FeatureRows, encode
from trocar.dictionaries.files import load, save
from trocar.dictionaries.measures import Examples, Measures, measure, top_examples
from trocar.dictionaries.recipe import Recipe
from trocar.dictionaries.training import Progress, Training, train

__all__ = [
    "Codes",
    "Dictionary",
    "Examples",
    "FeatureRows",
    "Measures",
    "Progress",
    "Recipe",
    "Training",
    "encode",
    "load",
    "measure",
    "save",
    "top_examples",
    "train",
]

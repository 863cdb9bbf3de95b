"""The comparison that the Linear Centroids Hypothesis rests on, at matched sites.

The same SAEs on a component's centroids, on what it reads and on what it writes: `compare`.
"""

from lch_plugin.saes.compare.data import Labelled
from lch_plugin.saes.compare.run import compare
from lch_plugin.saes.compare.settings import ComparisonSettings
from lch_plugin.saes.compare.sources import load_labelled

__all__ = ["ComparisonSettings", "Labelled", "compare", "load_labelled"]

"""The comparison that the Linear Centroids Hypothesis rests on, at matched sites.

The same SAEs on a component's centroids, on what it reads and on what it writes: `compare`.
"""

from lch_plugin.saes.comparison.data import Labelled
from lch_plugin.saes.comparison.run import compare
from lch_plugin.saes.comparison.settings import ComparisonSettings
from lch_plugin.saes.comparison.sources import load_labelled

__all__ = ["ComparisonSettings", "Labelled", "compare", "load_labelled"]

"""Saliency: which tokens, or pixels, an answer rests on, by local centroids of its metric.

`AnswerMetric` is a plain function from a prompt's embeddings to an answer's log-probability. `text`
is its local centroid, `by_method` what Captum has beside it. `curves`, `randomisation` and
`completeness` judge. `images` is for models of images.
"""

from lch_plugin.saliency.answers import AnswerMetric
from lch_plugin.saliency.image_maps import ImageMaps, images
from lch_plugin.saliency.judging import Curves, curves, randomisation
from lch_plugin.saliency.scores import (
    METHODS,
    Completeness,
    TokenScores,
    by_method,
    completeness,
    text,
)

__all__ = [
    "METHODS",
    "AnswerMetric",
    "Completeness",
    "Curves",
    "ImageMaps",
    "TokenScores",
    "by_method",
    "completeness",
    "curves",
    "images",
    "randomisation",
    "text",
]

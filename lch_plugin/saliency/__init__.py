"""Saliency: which tokens, or pixels, an answer rests on, by local centroids of its metric.

`AnswerMetric` is a plain function from a prompt's embeddings to an answer's log-probability, and
`ClassMetric` one from an image to a class's. `text` and `images` are local centroids; `by_method`
and `image_by_method` have what Captum has beside them. `curves`, `image_curves`, `randomisation`
and `completeness` judge.
"""

from lch_plugin.saliency.answers import AnswerMetric
from lch_plugin.saliency.classes import ClassMetric, image_curves
from lch_plugin.saliency.image_maps import ImageMaps, images
from lch_plugin.saliency.image_methods import IMAGE_METHODS, image_by_method
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
    "IMAGE_METHODS",
    "METHODS",
    "AnswerMetric",
    "ClassMetric",
    "Completeness",
    "Curves",
    "ImageMaps",
    "TokenScores",
    "by_method",
    "completeness",
    "curves",
    "image_by_method",
    "image_curves",
    "images",
    "randomisation",
    "text",
]

"""Sparse autoencoders on centroids, trained by SAELens.

On text through SAELens' runners (`train`), on models that TransformerLens does not know through its
wrapper of HuggingFace models (`HookedModel`), and on models without text through its trainer
(`Images`, `Rows`, `train_on`, `train_transcoder`). Values can be cached once for many SAEs
(`cache`), and the same SAEs compared on centroids and activations (`compare`).
"""

# Before all the others, each of which needs it.
import lch_plugin.saes.toolkit  # isort: skip  # noqa: F401

from lch_plugin.saes.caching.cache import Cache, Stream
from lch_plugin.saes.caching.writing import cache
from lch_plugin.saes.comparison import ComparisonSettings, Labelled, compare, load_labelled
from lch_plugin.saes.dashboards.features import Feature, FeatureReport, features
from lch_plugin.saes.evaluation.evaluate import Evaluation, evaluate
from lch_plugin.saes.evaluation.feature_acts import load_sae
from lch_plugin.saes.evaluation.functional import (
    CapturedComponent,
    ResponseFit,
    predicted_responses,
    reconstructed_centroids,
)
from lch_plugin.saes.sources.hooked_model import HookedModel
from lch_plugin.saes.sources.images import Images
from lch_plugin.saes.sources.rows import Rows
from lch_plugin.saes.sources.texts import load_text
from lch_plugin.saes.training.configs import runner_config
from lch_plugin.saes.training.many import train_many
from lch_plugin.saes.training.on_rows import train_on
from lch_plugin.saes.training.train import train
from lch_plugin.saes.training.transcoders import train_transcoder
from lch_plugin.steering import SteeringEffects, steering, steering_effects

__all__ = [
    "Cache",
    "CapturedComponent",
    "ComparisonSettings",
    "Evaluation",
    "Feature",
    "FeatureReport",
    "HookedModel",
    "Images",
    "Labelled",
    "ResponseFit",
    "Rows",
    "SteeringEffects",
    "Stream",
    "cache",
    "compare",
    "evaluate",
    "features",
    "load_labelled",
    "load_sae",
    "load_text",
    "predicted_responses",
    "reconstructed_centroids",
    "runner_config",
    "steering",
    "steering_effects",
    "train",
    "train_many",
    "train_on",
    "train_transcoder",
]

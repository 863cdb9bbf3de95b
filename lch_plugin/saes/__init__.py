"""Sparse autoencoders on centroids, trained by SAELens.

On text through SAELens' runner (`train`), on models that TransformerLens does not know through its
wrapper of HuggingFace models (`HookedModel`), and on models without text through its trainer
(`Images`, `Rows`, `train_on`).
"""

from lch_plugin.saes.hooked import HookedModel
from lch_plugin.saes.images import Images
from lch_plugin.saes.rows import Rows, reconstruction, train_on
from lch_plugin.saes.train import train

__all__ = ["HookedModel", "Images", "Rows", "reconstruction", "train", "train_on"]

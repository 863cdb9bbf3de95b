"""Sparse autoencoders on centroids, trained by SAELens."""

from lch_plugin.saes.train import train

__all__ = ["train"]

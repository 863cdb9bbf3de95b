"""Every error this package raises on purpose, and the one warning.

Each message names the offending value, the reason it cannot work and the cure.
"""

from __future__ import annotations


class LCHError(Exception):
    """Base class: ``except LCHError`` catches everything raised on purpose here."""


class InputError(LCHError, ValueError):
    """A tensor, token sequence, number or configuration cannot be used as given."""


class SiteError(LCHError):
    """A layer, site or hook does not exist, or is not the kind of module it has to be."""


class AttachError(LCHError):
    """A model already carries, or does not carry, the centroid hooks a call needs."""


class VanishingCentroidError(LCHError):
    """The cotangent is (numerically) orthogonal to everything the component writes."""


class NotDifferentiableError(LCHError):
    """The output of a function does not depend differentiably on its input."""


class OutputError(LCHError, OSError):
    """An output path exists with other content, or cannot be written."""


class NonFiniteError(LCHError):
    """A centroid came out with NaN or infinite values."""


class ToolkitError(LCHError, ImportError):
    """A toolkit is not installed, or not in a version that works here."""


class ClusterError(LCHError, RuntimeError):
    """Workers of a cluster were lost, again and again."""


class PaddingWarning(UserWarning):
    """Whether a position is a token or padding was not said, or the model reads padding as text."""

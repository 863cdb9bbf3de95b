"""The exact lens: what the residual stream at each layer and position adds to the logits."""

from lch_plugin.lens.reading import Reading, TopTokens, read

__all__ = ["Reading", "TopTokens", "read"]

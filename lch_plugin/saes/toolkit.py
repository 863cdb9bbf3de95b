"""Whether SAELens is here, which everything else in `lch_plugin.saes` is made with."""

from __future__ import annotations

from importlib.metadata import version

from lch_plugin.errors import ToolkitError

try:
    from sae_lens import SAETransformerBridge
except ImportError as error:
    lens = version("transformer-lens")
    if int(lens.partition(".")[0]) >= 4:
        raise ToolkitError(
            f"lch_plugin.saes needs SAELens, which does not support TransformerLens {lens} yet: "
            "pip install 'transformer-lens<4' 'lch-plugin[saes]'."
        ) from error
    raise ToolkitError(
        f"lch_plugin.saes needs SAELens: pip install 'lch-plugin[saes]' ({error})."
    ) from error

__all__ = ["SAETransformerBridge"]

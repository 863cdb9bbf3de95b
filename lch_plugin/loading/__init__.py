"""Load a transformers model from wherever it is, and hand it to a toolkit.

Weights are read from safetensors or GGUF alone: nothing is unpickled, and code that comes with a
checkpoint is run only where the caller asks for it.
"""

from lch_plugin.loading.conversions import Conversion
from lch_plugin.loading.models import LoadedModel, load

__all__ = ["Conversion", "LoadedModel", "load"]

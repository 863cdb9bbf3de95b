"""What it is worth that heads look where they do, and not where they look on a corrupt prompt."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from lch_plugin.adapters.transformer_lens import LensModel, pattern_names
from lch_plugin.circuits.prompt_batches import Prompts
from lch_plugin.circuits.scores.attribution import activations, metric_gradients


def pattern_worth(model: LensModel, pair: Prompts) -> list[Float[Tensor, "head pos"]]:
    """By layer, what each head's pattern is worth at each position it looks from.

    With the values of the prompt and everything behind the pattern frozen, exactly what the metric
    loses if the pattern is that of the corrupt twin: `lch_plugin.circuits.pattern_attribution`,
    position by position.

    Args:
        model: TransformerBridge or HookedTransformer.
        pair: one prompt with a corrupt twin.

    Raises:
        InputError, SiteError: as `lch_plugin.circuits.pattern_attribution`.
    """
    assert pair.corrupt is not None
    names = pattern_names(model)
    found = metric_gradients(
        model, pair, names, linearization="detached", through_patterns=True, leaves=names
    )
    twin = activations(model, pair.corrupt, names)
    return [
        (found.gradients[name] * (found.activations[name] - twin[name]))[0].sum(-1)
        for name in names
    ]

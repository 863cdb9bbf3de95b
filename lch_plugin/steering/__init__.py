"""Move what a component reads along a direction, and see what becomes of the model's predictions.

A centroid ``mu = J^T v`` is a vector of the component's *input* space, and so is each decoder row
of an SAE on centroids. Nothing consumes a centroid, so there is nothing to splice a feature into;
but adding the row to what the component reads changes what the component does, and with it the
logits. What an MLP or attention reads lies after the layer norm: the vector is added there, past
the norm, and reaches nothing but that component. A block reads the residual stream, so what is
added there also flows by it.

Random directions of the same norm say how much of the effect any direction would have had.
"""

from lch_plugin.steering.editing import edited_input, steering
from lch_plugin.steering.effects import SteeringEffects, steering_effects

__all__ = ["SteeringEffects", "edited_input", "steering", "steering_effects"]

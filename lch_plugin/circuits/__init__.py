"""Which neurons a model's centroids rest on, and whether removing them matters.

One sign convention throughout, in the units of the metric (logits, unless said otherwise): a
positive effect means that removing the node lowers the metric. The untargeted neuron score is a
magnitude and has no sign.
"""

from lch_plugin.circuits.ablation import AblationCheck, ablation_check
from lch_plugin.circuits.neurons import Neuron, NeuronAttribution, neuron_attribution

__all__ = ["AblationCheck", "Neuron", "NeuronAttribution", "ablation_check", "neuron_attribution"]

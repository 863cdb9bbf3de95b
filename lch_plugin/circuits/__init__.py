"""Which parts of a model a behaviour rests on, and whether that is true.

One sign convention throughout, in the units of the metric (logits or nats): a positive score means
that removing the node lowers the metric. The untargeted score of a neuron (no metric, the paper's)
is a magnitude and has no sign. Every score comes with its rank and percentile.

Modules, each knowing those before it: `metrics`, what is measured; `prompts`, on what; `tasks`,
five known behaviours; `nodes`, heads, neurons and MLPs, their scores, and circuits made of them;
`attribution`, scores of all nodes at once by targeted centroids; `neurons`, the paper's score of
the neurons of an MLP; `ablation`, what the model says without some nodes.
"""

from lch_plugin.circuits.ablation import AblationCheck, ablation_check
from lch_plugin.circuits.attribution import node_attribution
from lch_plugin.circuits.metrics import kl_divergence, log_probability, logit_difference
from lch_plugin.circuits.neurons import Neuron, NeuronAttribution, neuron_attribution
from lch_plugin.circuits.nodes import Circuit, Node, NodeScores, ScoredNode
from lch_plugin.circuits.prompts import Prompts, prompts
from lch_plugin.circuits.tasks import TASKS, task

__all__ = [
    "TASKS",
    "AblationCheck",
    "Circuit",
    "Neuron",
    "NeuronAttribution",
    "Node",
    "NodeScores",
    "Prompts",
    "ScoredNode",
    "ablation_check",
    "kl_divergence",
    "log_probability",
    "logit_difference",
    "neuron_attribution",
    "node_attribution",
    "prompts",
    "task",
]

"""Which parts of a model a behaviour rests on, and whether that is true.

One sign convention throughout, in the units of the metric (logits or nats): a positive score means
that removing the node lowers the metric. The untargeted score of a neuron (no metric, the paper's)
is a magnitude and has no sign. Every score comes with its rank and percentile.

Modules, each knowing those before it: `metrics`, what is measured; `prompts`, on what; `tasks`,
five known behaviours; `nodes`, heads, neurons and MLPs, their scores, and circuits made of them;
`attribution`, scores of all nodes at once by targeted centroids; `neurons`, the paper's score of
the neurons of an MLP; `ablation`, what the model says without some nodes; `faithfulness`, how much
of the metric a circuit recovers; `mib`, scores for that benchmark's evaluator.
"""

from lch_plugin.circuits.ablation import AblationCheck, ablation_check, run_circuit
from lch_plugin.circuits.attribution import node_attribution, pattern_attribution
from lch_plugin.circuits.faithfulness import (
    Faithfulness,
    Judgement,
    faithfulness,
    judge,
    smallest_circuit,
)
from lch_plugin.circuits.metrics import kl_divergence, log_probability, logit_difference
from lch_plugin.circuits.mib import save_mib
from lch_plugin.circuits.neurons import Neuron, NeuronAttribution, neuron_attribution
from lch_plugin.circuits.nodes import Circuit, Node, NodeScores, ScoredNode
from lch_plugin.circuits.prompts import Prompts, prompts
from lch_plugin.circuits.stability import Stability, stability
from lch_plugin.circuits.tasks import TASKS, task

__all__ = [
    "TASKS",
    "AblationCheck",
    "Circuit",
    "Faithfulness",
    "Judgement",
    "Neuron",
    "NeuronAttribution",
    "Node",
    "NodeScores",
    "Prompts",
    "ScoredNode",
    "Stability",
    "ablation_check",
    "faithfulness",
    "judge",
    "kl_divergence",
    "log_probability",
    "logit_difference",
    "neuron_attribution",
    "node_attribution",
    "pattern_attribution",
    "prompts",
    "run_circuit",
    "save_mib",
    "smallest_circuit",
    "stability",
    "task",
]

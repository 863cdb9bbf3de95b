"""Which parts of a model a behaviour rests on, and whether that is true.

One sign convention throughout, in the units of the metric (logits or nats): a positive score means
that removing the node lowers the metric. The untargeted score of a neuron (no metric, the paper's)
is a magnitude and has no sign. Every score comes with its rank and percentile.

Modules, each knowing those before it: `prompt_batches`, what is measured on what; `prompt_files`,
texts of one's own; `tasks`, seven known behaviours; `nodes`, heads, neurons and MLPs, their
scores, and circuits made of them; `scores`, what each of them is worth; `graphs`, what flows
between them; `edges`, circuits of edges; `evaluation`, whether a circuit is true of the model;
`reports`, pages to look at.
"""

from lch_plugin.circuits.edges.ablation import EdgeAblation, run_edges
from lch_plugin.circuits.edges.attribution import edge_attribution
from lch_plugin.circuits.edges.wiring import Edge, EdgeCircuit, EdgeScores
from lch_plugin.circuits.evaluation.ablation import AblationCheck, ablation_check, run_circuit
from lch_plugin.circuits.evaluation.faithfulness import (
    Faithfulness,
    Judgement,
    faithfulness,
    judge,
    smallest_circuit,
)
from lch_plugin.circuits.evaluation.intervention import Intervention, intervene
from lch_plugin.circuits.evaluation.masks import learn_masks
from lch_plugin.circuits.evaluation.mib import save_mib
from lch_plugin.circuits.graphs import (
    attribution_graph,
    grouped,
    load_graph,
    merge,
    prune,
    same_token,
    same_write,
    save_graph,
)
from lch_plugin.circuits.nodes import Circuit, Node, NodeScores, ScoredNode
from lch_plugin.circuits.prompt_batches import Prompts, prompts, solved
from lch_plugin.circuits.prompt_files import read_prompts
from lch_plugin.circuits.reports.graph_details import node_details
from lch_plugin.circuits.reports.graph_page import write_graph_page
from lch_plugin.circuits.scores.attribution import (
    METHODS,
    Contributions,
    Method,
    contributions,
    node_attribution,
    pattern_attribution,
)
from lch_plugin.circuits.scores.features import FeatureScores, feature_attribution
from lch_plugin.circuits.scores.neurons import Neuron, NeuronAttribution, neuron_attribution
from lch_plugin.circuits.scores.stability import Stability, stability
from lch_plugin.circuits.tasks import TASKS, TemplateReport, task, task_templates
from lch_plugin.metrics import (
    kl_divergence,
    log_odds,
    log_probability,
    logit_difference,
)

__all__ = [
    "METHODS",
    "TASKS",
    "AblationCheck",
    "Circuit",
    "Contributions",
    "Edge",
    "EdgeAblation",
    "EdgeCircuit",
    "EdgeScores",
    "Faithfulness",
    "FeatureScores",
    "Intervention",
    "Judgement",
    "Method",
    "Neuron",
    "NeuronAttribution",
    "Node",
    "NodeScores",
    "Prompts",
    "ScoredNode",
    "Stability",
    "TemplateReport",
    "ablation_check",
    "attribution_graph",
    "contributions",
    "edge_attribution",
    "faithfulness",
    "feature_attribution",
    "grouped",
    "intervene",
    "judge",
    "kl_divergence",
    "learn_masks",
    "load_graph",
    "log_odds",
    "log_probability",
    "logit_difference",
    "merge",
    "neuron_attribution",
    "node_attribution",
    "node_details",
    "pattern_attribution",
    "prompts",
    "prune",
    "read_prompts",
    "run_circuit",
    "run_edges",
    "same_token",
    "same_write",
    "save_graph",
    "save_mib",
    "smallest_circuit",
    "solved",
    "stability",
    "task",
    "task_templates",
    "write_graph_page",
]

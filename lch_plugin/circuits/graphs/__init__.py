"""Attribution graphs: what flows from node to node of a model, on one prompt, to a metric.

Modules, each knowing those before it: `frozen_components`, cut off from each other; `node_slices`,
nodes as projections; `top_nodes`, which of them; `edges`, what flows; `patterns`, what it is worth
where heads look; `building`, the graph; `pruning`, its most influential part; `writes`, what its
nodes write; `supernodes`, which of them belong together; `files`, as JSON for circuit-tracer's
viewer and Neuronpedia, and as GraphML.
"""

from lch_plugin.circuits.graphs.building import attribution_graph
from lch_plugin.circuits.graphs.files import load_graph, save_graph
from lch_plugin.circuits.graphs.pruning import prune
from lch_plugin.circuits.graphs.supernodes import grouped, merge, same_token, same_write

__all__ = [
    "attribution_graph",
    "grouped",
    "load_graph",
    "merge",
    "prune",
    "same_token",
    "same_write",
    "save_graph",
]

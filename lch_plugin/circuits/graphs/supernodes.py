"""Supernodes: nodes of a graph that belong together, drawn and counted as one.

Groups are mappings from a name to names of nodes: made by hand, from the token that nodes write
towards (`same_token`), or from what they write (`same_write`). `grouped` keeps them beside the
graph, which is saved, pruned and drawn with them; `merge` makes one node of each.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeAlias, runtime_checkable

import networkx as nx
import torch
from jaxtyping import Float
from torch import Tensor

from lch_plugin.adapters.transformer_lens import LensModel
from lch_plugin.circuits.graphs.writes import node_writes
from lch_plugin.circuits.prompt_batches import Prompts
from lch_plugin.errors import InputError

#: Names of nodes, by the name of their supernode.
Groups: TypeAlias = Mapping[str, Sequence[str]]


@runtime_checkable
class Detail(Protocol):
    """What is said of a node, as `lch_plugin.circuits.node_details` has it."""

    @property
    def promoted(self) -> Sequence[tuple[str, float]]: ...


def grouped(graph: nx.DiGraph, groups: Groups) -> nx.DiGraph:
    """The graph with these supernodes, in place of any it had.

    Nodes and edges stay as they are. The groups stand in the graph's attribute ``supernodes``:
    `save_graph` writes them for viewers, `load_graph` reads them, and `write_graph_page` draws each
    as one box that can be unfolded.

    Args:
        graph: of `attribution_graph`, pruned or not.
        groups: names of nodes, by the name of their supernode; none takes all supernodes away.

    Returns:
        A new graph.

    Raises:
        InputError: a group that is empty, shares a node with another, holds the metric or a node
            that is not in the graph, or has the name of a node.

    Example:
        >>> import networkx as nx
        >>> graph = nx.DiGraph([("a0.h1@3", "metric"), ("a0.h2@3", "metric")])
        >>> grouped(graph, {"early": ["a0.h1@3", "a0.h2@3"]}).graph["supernodes"]
        {'early': ['a0.h1@3', 'a0.h2@3']}
    """
    check_groups(graph, groups)
    found = graph.copy()
    found.graph.pop("supernodes", None)
    if groups:
        found.graph["supernodes"] = {name: list(members) for name, members in groups.items()}
    return found


def merge(graph: nx.DiGraph, groups: Groups | None = None) -> nx.DiGraph:
    """One node in place of each group.

    Contributions and offsets of its members add up, and so do edges from and to a node outside.
    What flows between the members is no edge any more but the attribute ``internal``. So what
    enters a supernode through edges, its offset and ``internal`` are its contribution; what leaves
    it and ``internal`` are, too. What goes through patterns adds up likewise, but for what one
    member does through the pattern of another, which no edge says any more.

    A path may leave a group and come back to it, and then the merged graph has a cycle: prune
    before.

    Args:
        graph: of `attribution_graph`, pruned or not.
        groups: as `grouped`; those that the graph has if None.

    Returns:
        A new graph. Supernodes have the kind ``"supernode"``, the names of their ``members``, and
        the layer, position and token of the member of largest contribution. They are at the place
        that their first member had in the order of nodes.

    Raises:
        InputError: as `grouped`.
    """
    groups = graph.graph.get("supernodes", {}) if groups is None else groups
    check_groups(graph, groups)
    owner = {member: name for name, members in groups.items() for member in members}
    merged = nx.DiGraph()
    merged.graph.update({key: v for key, v in graph.graph.items() if key != "supernodes"})
    numbers = {name: i for i, name in enumerate(groups)}
    for node, data in graph.nodes(data=True):
        name = owner.get(node, node)
        if name not in groups:
            merged.add_node(name, **data)
        elif name not in merged:
            merged.add_node(name, **_supernode(graph, list(groups[name]), numbers[name]))
    for source, target, data in graph.edges(data=True):
        s, t = (owner.get(node, node) for node in (source, target))
        if s == t:
            merged.nodes[s]["internal"] += data["weight"]
        elif merged.has_edge(s, t):
            before = merged.edges[s, t]
            for kind, worth in data.items():
                before[kind] = before.get(kind, 0.0) + worth
        else:
            merged.add_edge(s, t, **data)
    return merged


def same_token(details: Mapping[str, Detail]) -> dict[str, list[str]]:
    """Groups of nodes that raise the same token most, whatever their layer and position.

    Args:
        details: of `lch_plugin.circuits.node_details`: those of the nodes to group.

    Returns:
        Groups of two nodes or more, called as ``"writes ' Mary'"``. Token embeddings, which mostly
        write themselves, are in none.
    """
    found: dict[str, list[str]] = defaultdict(list)
    for node, detail in details.items():
        if detail.promoted and not node.startswith("embedding@"):
            token, _ = detail.promoted[0]
            found[f"writes {token!r}"].append(node)
    return {name: nodes for name, nodes in found.items() if len(nodes) > 1}


def same_write(
    model: LensModel, prompts: Prompts, graph: nx.DiGraph, threshold: float = 0.7
) -> dict[str, list[str]]:
    """Groups of heads, neurons and MLPs that write in nearly the same direction.

    Starting with the node of largest contribution, each joins the first group with all of whose
    members the cosine of what they write to the residual stream is at least ``threshold``, or
    begins a new one.

    Args:
        model, prompts: that the graph is of.
        graph: of `attribution_graph`, pruned or not.
        threshold: least cosine of any two nodes of a group, above 0 and at most 1.

    Returns:
        Groups of two nodes or more, called as ``"like a2.h1@13"``, after the first node of each.

    Raises:
        InputError: a threshold out of range, or as `attribution_graph`.
        SiteError: as `attribution_graph`.
    """
    if not 0 < threshold <= 1:
        raise InputError(f"threshold={threshold} must be above 0 and at most 1: it is a cosine.")
    writes = {
        node: write
        for node, write in node_writes(model, prompts, graph).writes.items()
        if graph.nodes[node]["kind"] != "embedding"
    }
    order = sorted(writes, key=lambda node: -abs(graph.nodes[node]["contribution"]))
    return _alike({node: writes[node] for node in order}, threshold)


def _alike(vectors: Mapping[str, Float[Tensor, " d"]], threshold: float) -> dict[str, list[str]]:
    """Groups by cosine, in the order in which the nodes come."""
    if not vectors:
        return {}
    stacked = torch.nn.functional.normalize(torch.stack(list(vectors.values())).double(), dim=-1)
    alike = (stacked @ stacked.T >= threshold).tolist()
    groups: list[list[int]] = []
    for i in range(len(alike)):
        fitting = (group for group in groups if all(alike[i][j] for j in group))
        group = next(fitting, None)
        if group is None:
            groups.append([i])
        else:
            group.append(i)
    names = list(vectors)
    return {f"like {names[g[0]]}": [names[i] for i in g] for g in groups if len(g) > 1}


def check_groups(graph: nx.DiGraph, groups: Groups) -> None:
    """Groups have names of their own, and each member is a node of the graph and in one alone.

    Raises:
        InputError: not so.
    """
    owner: dict[str, str] = {}
    for name, members in groups.items():
        if name in graph:
            raise InputError(f"supernode {name!r} has the name of a node: choose another.")
        if isinstance(members, str) or not members:
            raise InputError(f"supernode {name!r} has the members {members!r}: list its nodes.")
        for member in members:
            if member not in graph:
                raise InputError(f"supernode {name!r}: the graph has no node {member!r}.")
            if graph.nodes[member].get("kind") == "metric":
                raise InputError(f"supernode {name!r} holds the metric, which all flows to.")
            if member in owner:
                raise InputError(
                    f"node {member!r} is in the supernodes {owner[member]!r} and {name!r}: each "
                    "node is in one, once."
                )
            owner[member] = name


def _supernode(graph: nx.DiGraph, members: list[str], number: int) -> dict[str, object]:
    """Attributes of the node that stands for some others."""
    own = [graph.nodes[member] for member in members]
    # What a member's pattern is worth, its edges and the rest, add up whoever the edges come from.
    patterns = [key for key in ("pattern", "pattern_rest") if any(key in data for data in own)]
    first = max(own, key=lambda data: abs(data["contribution"]))
    return {
        "kind": "supernode",
        **{key: first[key] for key in ("layer", "position", "token")},
        "index": number,
        **{key: sum(data[key] for data in own) for key in ("contribution", "offset")},
        **{key: sum(data.get(key, 0.0) for data in own) for key in patterns},
        "activation": None,
        "members": members,
        "internal": 0.0,
    }

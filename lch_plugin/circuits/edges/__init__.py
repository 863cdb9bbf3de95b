"""Circuits of edges: what one component writes, as one other component reads it.

The edges are those of the MIB benchmark (Mueller et al., arXiv 2504.13151) and of EAP-IG (Hanna et
al., arXiv 2403.17806): from the embeddings, a head or an MLP, to the query, key or value input of a
later head, to a later MLP, or to the logits. Modules, each knowing those before it: `wiring`, which
edges there are, their scores and circuits; `passes`, a model run reader by reader; `attribution`,
what each edge is worth; `ablation`, the model with the edges of a circuit alone.
"""

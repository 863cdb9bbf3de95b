"""Circuits to look at: `direct`, the tokens that a write raises; `graph_layout`, `graph_page` and
`graph_details`, a graph as an interactive page; `task_run` and `neuron_run`, the two reports of
``lch circuit``.
"""

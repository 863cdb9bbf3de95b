"""Whether a circuit is true of the model: `ablation`, what the model says without the rest of it;
`faithfulness`, how much of the metric that recovers; `mib`, scores for that benchmark's evaluator.
"""

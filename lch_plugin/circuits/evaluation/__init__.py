"""Whether a circuit is true of the model: `ablation`, what the model says without the rest of it;
`faithfulness`, how much of the metric that recovers; `masks`, circuits that are learned by that;
`mib`, scores for that benchmark's evaluator.
"""

"""The circuit behind "a" or "an": found, tested, and drawn.

python examples/a_an_circuit.py                    # the embedded model
python examples/a_an_circuit.py gpt2               # downloads the weights
"""

import sys

import torch
from transformer_lens.model_bridge import TransformerBridge

import lch_plugin as lch
from lch_plugin import circuits
from lch_plugin.demo.tasks import pear_apple

model = TransformerBridge.boot_transformers(sys.argv[1]) if sys.argv[1:] else lch.load_demo_model()
generator = torch.Generator().manual_seed(0)

print("neurons by the paper's score, on its prompt")
paper = circuits.neuron_attribution(model, pear_apple().prompt, generator=generator)
for layer in paper.scores:
    print(f"  layer {layer}:", ", ".join(str(n.index) for n in paper.top(5, layer=layer)))

print("\nheads and neurons by what removing them takes from the logit difference")
found_on = circuits.task(model, "an", 30, split="train")
judged_on = circuits.task(model, "an", 30, split="test")
scores = circuits.node_attribution(model, found_on)
for one in scores.top(8):
    print(f"  {one.node}: {one.score:+.2f} logits, rank {one.rank} ({one.percentile:.1f} %)")

circuit = scores.circuit(int(0.05 * len(scores.values)))
top = [one.node for one in scores.top(3)]
verdict = circuits.judge(
    model, judged_on, circuit, nodes=top, n_random=5, n_subsets=3, generator=generator
)
without = verdict.complement_recovered
print(
    f"\n{len(circuit)} nodes ({circuit.share:.1%}) recover {verdict.recovered:.0%} of it, random "
    f"circuits {verdict.random.mean():.0%}, everything but the circuit {without:.0%}"
)

for node, fall in verdict.minimality.items():
    print(f"  without {node} it recovers {fall:.0%} less")

(example,) = circuits.task(model, "an", 1)
graph = circuits.prune(circuits.attribution_graph(model, example, circuit=circuit))
circuits.write_graph_page(graph, "a_an_circuit.html", circuits.node_details(model, example, graph))
print(f"a_an_circuit.html: {len(graph)} nodes, {graph.number_of_edges()} edges")

"""The neurons behind "a" or "an": the paper's prompt, scored and then removed.

python examples/a_an_circuit.py                    # the embedded model
python examples/a_an_circuit.py gpt2-large         # downloads the weights
"""

import sys

import torch
from transformer_lens.model_bridge import TransformerBridge

import lch_plugin as lch
from lch_plugin.demo.tasks import pear_apple

model = TransformerBridge.boot_transformers(sys.argv[1]) if sys.argv[1:] else lch.load_demo_model()
prompt = pear_apple().prompt
an, a = model.to_single_token(" an"), model.to_single_token(" a")

cotangents = {"all ones": None, "an - a": (model.W_U[:, an] - model.W_U[:, a]).detach()}
for name, cotangent in cotangents.items():
    attribution = lch.circuits.neuron_attribution(
        model, prompt, cotangent=cotangent, generator=torch.Generator().manual_seed(0)
    )
    print(f"\ncotangent {name}")
    for layer in attribution.scores:
        top = attribution.top(5, layer=layer)
        check = lch.circuits.ablation_check(
            model, prompt, an, a, {layer: [n.index for n in top]}, generator=torch.Generator()
        )
        neurons = ", ".join(str(n.index) for n in top)
        print(
            f"layer {layer}: neurons {neurons}; removing them lowers the logit difference by "
            f"{check.effect:+.2f} (random sets {check.random_effects.mean():+.2f} "
            f"± {check.random_effects.std():.2f})"
        )

"""Centroids in a TransformerLens workflow: attach, cache, look.

python examples/centroids.py                       # the embedded model
python examples/centroids.py gpt2                  # any model TransformerBridge boots
"""

import sys

import torch
from transformer_lens.model_bridge import TransformerBridge

import lch_plugin as lch

model = TransformerBridge.boot_transformers(sys.argv[1]) if sys.argv[1:] else lch.load_demo_model()
prompt = "Mary and John went to the park. Mary was tired because"

with lch.attach(model) as handle, torch.no_grad():
    _, cache = model.run_with_cache(prompt, names_filter=handle.hook_names)

for name in handle.hook_names:
    mu = cache[name]
    print(f"{name}  shape {tuple(mu.shape)}  mean norm {mu.norm(dim=-1).mean():.3f}")

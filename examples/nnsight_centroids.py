"""Centroids in nnsight traces: every layer at once, under an intervention, while generating.

python examples/nnsight_centroids.py [MODEL]

MODEL is a GPT-2 by name on the hub, a directory or a .gguf file; the embedded model by default.
"""

import sys

import torch
from torch.nn.functional import cosine_similarity

import lch_plugin as lch
from lch_plugin.demo import DEMO_MODEL_DIR

source = sys.argv[1] if len(sys.argv) > 1 else DEMO_MODEL_DIR
# Every module's envoy has its centroid as a property.
model = lch.load(source).nnsight(envoys=lch.nnsight.CentroidEnvoy)
layers = model.transformer.h
prompt = "I climbed up the pear tree and picked a pear. I climbed up the apple tree and picked"

with torch.no_grad():
    with model.trace(prompt):
        plain = [layer.mlp.centroid[0, -1] for layer in layers].save()

    # The same without the first layer's attention: what comes later sees it.
    with model.trace(prompt):
        layers[0].attn.output[0][:] = 0
        edited = [layer.mlp.centroid[0, -1] for layer in layers].save()

    # One trace, two prompts of different lengths, each padded to the longer on the left.
    with model.trace() as tracer:
        with tracer.invoke(prompt):
            long = layers[2].mlp.centroid.save()
        with tracer.invoke("I picked"):
            short = layers[2].mlp.centroid.save()

    with model.generate(prompt, max_new_tokens=4, do_sample=False) as tracer:
        steps = [].save()
        for _ in tracer.iter[:]:
            # The new token's, by one vector-Jacobian product through the whole block.
            steps.append(lch.nnsight.centroid(layers[2])[0, -1])

print("layer  |centroid|  cosine with the centroid once layer 0's attention is off")
for i, (a, b) in enumerate(zip(plain, edited, strict=True)):
    print(f"{i:5} {a.norm():11.3f} {cosine_similarity(a, b, dim=0):8.3f}")
print("two prompts in one batch:", tuple(long.shape), tuple(short.shape))
print("block 2 while generating:", ", ".join(f"{step.norm():.2f}" for step in steps))

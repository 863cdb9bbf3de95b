"""A sparse autoencoder on centroids: trained by SAELens, evaluated, saved and loaded again.

python examples/train_centroid_sae.py OUTPUT_DIRECTORY
"""

import sys

from datasets import Dataset
from sae_lens import SAE, TopKTrainingSAEConfig

import lch_plugin as lch
from lch_plugin.demo.corpus import stories

model, out = lch.load_demo_model(), sys.argv[1]  # Or any TransformerBridge or HookedTransformer.
hook = "blocks.2.mlp.hook_centroid"
sae = TopKTrainingSAEConfig(
    d_in=model.cfg.d_model, d_sae=512, k=8, normalize_activations="expected_average_only_in"
)
config = lch.saes.runner_config(
    sae, hook, training_tokens=100_000, train_batch_size_tokens=1024, lr=2e-3, output_path=out
)
lch.saes.train(model, Dataset.from_dict({"text": list(stories(2000))}), config)

trained = SAE.load_from_disk(out)
print("trained on", trained.cfg.metadata.lch_centroid)
scores = lch.saes.evaluate(trained, model, list(stories(100, split="test")))
print(f"held out: {scores.explained_variance:.1%} explained with {scores.l0:.1f} features a token")
print(f"{scores.n_fired} features fire, {scores.n_dense} on more than a tenth of the tokens")

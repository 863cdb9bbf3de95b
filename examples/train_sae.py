"""A sparse autoencoder on centroids, trained by SAELens, saved and loaded again.

python examples/train_sae.py OUTPUT_DIRECTORY
"""

import sys

from datasets import Dataset
from sae_lens import SAE, LanguageModelSAERunnerConfig, LoggingConfig, TopKTrainingSAEConfig

import lch_plugin as lch
from lch_plugin.demo.corpus import stories

model, out = lch.load_demo_model(), sys.argv[1]
config = LanguageModelSAERunnerConfig(
    sae=TopKTrainingSAEConfig(
        d_in=model.cfg.d_model, d_sae=256, k=8, normalize_activations="expected_average_only_in"
    ),
    hook_name="blocks.2.mlp.hook_centroid",
    dataset_path="generated stories",
    streaming=False,
    context_size=128,
    training_tokens=40_000,
    train_batch_size_tokens=1024,
    n_batches_for_norm_estimate=10,
    lr=2e-3,
    checkpoint_path=None,
    output_path=out,
    logger=LoggingConfig(log_to_wandb=False),
)
lch.saes.train(model, Dataset.from_dict({"text": list(stories(1000))}), config)

sae = SAE.load_from_disk(out)
print("loaded", type(sae).__name__, "trained on", sae.cfg.metadata.lch_centroid)

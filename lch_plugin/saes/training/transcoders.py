"""Transcoders between two places of a model, centroids among them.

SAELens has transcoders (Dunefsky, Chlenski & Nanda 2024, arXiv 2406.11944) but does not train them.
Its trainer does, given an SAE whose rows are pairs: what it reads and what it is to predict, side
by side. The losses are those of SAELens' standard and JumpReLU SAEs, in whose form its transcoders
are saved.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import (
    JumpReLUTrainingSAEConfig,
    JumpReLUTranscoder,
    JumpReLUTranscoderConfig,
    StandardTrainingSAEConfig,
    TrainingSAE,
    Transcoder,
    TranscoderConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE
from sae_lens.saes.standard_sae import StandardTrainingSAE
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor, nn

from lch_plugin.errors import InputError
from lch_plugin.progress import Advance, progress
from lch_plugin.saes.evaluation.sae_inputs import check_width
from lch_plugin.saes.training.on_rows import shuffled, with_lr_end
from lch_plugin.saes.training.quiet import saelens_quiet
from lch_plugin.saes.training.starting import n_estimate_batches


def train_transcoder(
    pairs: Iterable[tuple[Float[Tensor, "_ d_in"], Float[Tensor, "_ d_out"]]],
    sae: StandardTrainingSAEConfig | JumpReLUTrainingSAEConfig,
    config: SAETrainerConfig,
    *,
    buffer_size: int = 16_384,
    seed: int = 0,
) -> Transcoder:
    """Train a transcoder, with SAELens' own trainer, and return SAELens' own class.

    Both sides are scaled to a mean norm of the square root of their width, and the scales folded
    into the weights at the end; encoder and decoder start at their means. From a `Cache` two
    streams with the same seed give pairs of the same tokens.

    Args:
        pairs: what the transcoder reads and what it is to predict, token by token; as many as
            training takes, or something to be iterated again and again until then.
        sae: SAELens' configuration of sparsity, width and start: standard for a `Transcoder`,
            JumpReLU for a `JumpReLUTranscoder`. Its ``normalize_activations`` is left to us.
        config: SAELens' own configuration of the trainer.
        buffer_size: pairs that are shuffled together.
        seed: of initialisation and shuffling; the global random state is left alone.

    Returns:
        The transcoder; ``save_model(path)`` writes it as `sae_lens.SAE.load_from_disk` reads it.

    Raises:
        InputError: a configuration without a transcoder, pairs that do not belong together or do
            not fit it, too small a buffer, or no pairs.

    Example:
        >>> names = ("blocks.2.mlp.hook_centroid", "blocks.2.hook_mlp_out")
        >>> streams = (cache.stream(name, batch_size=2048, buffer_size=65_536) for name in names)
        >>> transcoder = lch.saes.train_transcoder(zip(*streams), sae_config, trainer_config)
    """
    kinds = {StandardTrainingSAEConfig: _Standard, JumpReLUTrainingSAEConfig: _JumpReLU}
    if type(sae) not in kinds:
        raise InputError(
            f"sae is a {type(sae).__name__}: SAELens has no transcoder of that kind. Use a "
            "StandardTrainingSAEConfig or a JumpReLUTrainingSAEConfig."
        )
    if sae.normalize_activations != "none":
        raise InputError(
            f"normalize_activations={sae.normalize_activations!r}: both sides are scaled already. "
            "Leave it at 'none'."
        )
    joined = _Joined(pairs)
    sae = dataclasses.replace(sae, apply_b_dec_to_input=False)
    with torch.random.fork_rng(), torch.enable_grad(), saelens_quiet():
        torch.manual_seed(seed)
        _, batches = shuffled(joined, config.train_batch_size_samples, buffer_size)
        check_width("what the transcoder reads", sae.d_in, joined.d_in)
        training = kinds[type(sae)](sae, joined.d_out)
        scale = training.start_at(
            torch.cat(list(itertools.islice(batches, n_estimate_batches(config))))
        )
        scaled = (batch * scale.to(batch) for batch in batches)
        total = config.total_training_samples
        with progress("training", total, "rows") as advance:
            SAETrainer(with_lr_end(config), training, _each_row(scaled, advance)).fit()
        return training.finished(scale)


def _each_row(
    batches: Iterator[Float[Tensor, "_ d_both"]], advance: Advance
) -> Iterator[Float[Tensor, "_ d_both"]]:
    """The same batches; ``advance`` hears of the rows of each."""
    for batch in batches:
        yield batch
        advance(len(batch))


class _Joined:
    """Pairs side by side."""

    d_in: int
    d_out: int

    def __init__(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        self._pairs = pairs

    def __iter__(self) -> Iterator[Float[Tensor, "_ d_both"]]:
        for x, y in self._pairs:
            if len(x) != len(y):
                raise InputError(
                    f"{len(x)} rows to read and {len(y)} to predict do not make pairs. Take both "
                    "from the same tokens."
                )
            self.d_in, self.d_out = x.shape[-1], y.shape[-1]
            yield torch.cat([x, y.to(x)], dim=-1)


class _Transcoding(TrainingSAE[Any]):
    """Makes an SAE of SAELens' predict the second part of its rows from the first."""

    cfg: Any
    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    mse_loss_fn: Any
    inference: tuple[type[Transcoder], type[TranscoderConfig]]

    def __init__(self, cfg: Any, d_out: int) -> None:
        self.d_out = d_out  # Needed for the weights, which come into being in the next line.
        super().__init__(cfg)
        mse_loss = self.mse_loss_fn
        self.mse_loss_fn = lambda y_hat, pair: mse_loss(y_hat, pair[..., cfg.d_in :])

    def initialize_weights(self) -> None:
        super().initialize_weights()
        rows = torch.randn(
            self.cfg.d_sae, self.d_out, dtype=self.W_dec.dtype, device=self.W_dec.device
        )
        norm = self.cfg.decoder_init_norm or 1.0
        self.W_dec = nn.Parameter(rows / rows.norm(dim=-1, keepdim=True) * norm)
        self.b_dec = nn.Parameter(rows.new_zeros(self.d_out))

    def process_sae_in(self, pair: Tensor) -> Tensor:
        # SAELens' own subtracts the decoder's bias, whose space is another one here.
        return pair[..., : self.cfg.d_in].to(self.W_enc.dtype)

    @torch.no_grad()
    def start_at(self, sample: Float[Tensor, "n d_both"]) -> Float[Tensor, " d_both"]:
        """Put the biases at the means; returns what rows have to be multiplied by."""
        sample = sample.to(self.W_enc.device)
        sides = sample.split([self.cfg.d_in, self.d_out], dim=-1)
        scales = [side.shape[-1] ** 0.5 / side.norm(dim=-1).mean() for side in sides]
        x, y = (side.mean(0) * scale for side, scale in zip(sides, scales, strict=True))
        self.b_enc.copy_(-x @ self.W_enc)
        self.b_dec.copy_(y)
        return torch.cat([s.expand(side.shape[-1]) for s, side in zip(scales, sides, strict=True)])

    @torch.no_grad()
    def finished(self, scale: Float[Tensor, " d_both"]) -> Transcoder:
        """As SAELens' own transcoder, with the scales folded in."""
        transcoder_class, config_class = self.inference
        shared = {field.name for field in dataclasses.fields(config_class)} - {"d_out"}
        settings = {name: getattr(self.cfg, name) for name in shared if hasattr(self.cfg, name)}
        transcoder = transcoder_class(config_class(**settings, d_out=self.d_out))
        scale_in, scale_out = scale.split([self.cfg.d_in, self.d_out])
        state = dict(self.state_dict())
        state["W_enc"] = state["W_enc"] * scale_in[:, None]
        state["W_dec"] = state["W_dec"] / scale_out
        state["b_dec"] = state["b_dec"] / scale_out
        transcoder.load_state_dict(state)
        return transcoder


class _Standard(_Transcoding, StandardTrainingSAE):
    inference = (Transcoder, TranscoderConfig)


class _JumpReLU(_Transcoding, JumpReLUTrainingSAE):
    inference = (JumpReLUTranscoder, JumpReLUTranscoderConfig)

"""Any HuggingFace model as SAELens' runner takes it, with centroids among its hook points."""

from __future__ import annotations

from collections.abc import Iterable

from jaxtyping import Float
from sae_lens.load_model import HookedProxyLM
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformers import PreTrainedTokenizerBase

from lch_plugin.adapters.huggingface import (
    Reader,
    Target,
    context_length,
    make_readers,
    resolve_arguments,
)
from lch_plugin.cotangents import Cotangent
from lch_plugin.errors import InputError


class HookedModel(HookedProxyLM):
    """SAELens' own wrapper of a HuggingFace language model, with centroids as hook points.

    For models that TransformerLens does not know: ``run_with_cache``, ``run_with_hooks``,
    ``lch_plugin.saes.train`` and SAELens' runner work as on any hooked model. The hook point of a
    component is its name and ``.hook_centroid``: ``transformer.h.2.mlp.hook_centroid``. A centroid
    is computed only if something listens.

    Attributes:
        model: the HuggingFace model.
        tokenizer: its tokenizer.
        readers: of the centroids, by hook point.

    Raises:
        InputError: no tokenizer, or as `lch_plugin.huggingface.attach`.
        SiteError, VanishingCentroidError: as `lch_plugin.huggingface.attach`.

    Example:
        >>> loaded = lch.load("path/to/model")
        >>> model = lch.saes.HookedModel(loaded.model, loaded.processor, "model.layers.*.mlp")
        >>> sae = lch.saes.train(model, dataset, config)
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        modules: str | Iterable[str] | None = None,
        *,
        cotangent: Float[Tensor, " d_out"] | Cotangent | None = None,
        activations: Iterable[str] = (),
    ) -> None:
        """Wrap a model.

        Args:
            model: a HuggingFace language model.
            tokenizer: of the model.
            modules: components whose centroids are wanted, as `lch_plugin.huggingface.attach`.
            cotangent: ``v`` of the centroids.
            activations: names of modules whose outputs are hook points too, under those names.
        """
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise InputError(
                f"tokenizer is a {type(tokenizer).__name__}; SAELens reads text through one of "
                "transformers. For images and other inputs without text use lch.saes.Rows."
            )
        targets, v = resolve_arguments(model, modules, cotangent)
        points = {target: HookPoint() for target in targets}
        super().__init__(model, tokenizer, hook_names=list(activations))
        self.readers: dict[str, Reader] = {}
        readers = make_readers(
            model, targets, v, lambda t: (points[t], lambda: bool(points[t].fwd_hooks))
        )
        for reader, (target, point) in zip(readers, points.items(), strict=True):
            name = _hook_name(target)
            point.name = name
            self.readers[name] = reader
            self.hook_dict[name] = self.mod_dict[name] = point
            # Where SAELens stops the model; the centroid is there by then.
            self.named_modules_dict[name] = model.get_submodule(target.last)
            reader.install()

    def detach(self) -> None:
        """Take the centroids off the model."""
        for reader in self.readers.values():
            reader.remove()

    @property
    def n_ctx(self) -> int | None:
        """The longest sequence, if the model's config says."""
        return context_length(self.model)


def _hook_name(target: Target) -> str:
    return f"{target.name}.hook_centroid"

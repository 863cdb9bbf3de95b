"""Any HuggingFace model as SAELens' runner takes it, with centroids among its hook points."""

from __future__ import annotations

from collections.abc import Iterable

from jaxtyping import Float
from sae_lens.load_model import HookedProxyLM, get_hook_fn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedTokenizerBase

from lch_plugin.adapters.checks import known_at_once
from lch_plugin.adapters.huggingface import (
    Reader,
    context_length,
    make_readers,
    resolve,
    resolve_modules,
)
from lch_plugin.adapters.transformer_lens import HookPoint
from lch_plugin.cotangents import Cotangent
from lch_plugin.errors import InputError
from lch_plugin.sites import Settings


class HookedModel(HookedProxyLM):
    """SAELens' own wrapper of a HuggingFace language model, with centroids as hook points.

    For models that TransformerLens does not know: ``run_with_cache`` and ``run_with_hooks`` on
    token ids without padding, ``lch_plugin.saes.train`` and SAELens' runner work as on any hooked
    model. The hook point of a component is its name and ``.hook_centroid``:
    ``transformer.h.2.mlp.hook_centroid``. A centroid is computed only if something listens. A
    context manager, which detaches.

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
            activations: names of modules whose outputs are hook points too, under those names;
                ``*`` as in ``modules``.
        """
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise InputError(
                f"tokenizer is a {type(tokenizer).__name__}; SAELens reads text through one of "
                "transformers. For images and other inputs without text use lch.saes.Rows."
            )
        targets, v = resolve_modules(model, modules), known_at_once(cotangent)
        self._outputs = [target.last for target in resolve(model, activations)]
        self._handles: list[RemovableHandle] = []
        points = {target: HookPoint() for target in targets}
        super().__init__(model, tokenizer, hook_names=self._outputs)
        self.readers: dict[str, Reader] = {}
        readers = make_readers(
            model,
            targets,
            Settings(cotangent=v),
            lambda t: (lambda found: points[t](found[""]), lambda: bool(points[t].fwd_hooks)),
        )
        for reader, (target, point) in zip(readers, points.items(), strict=True):
            name = f"{target.name}.hook_centroid"
            self._add(name, point, target.last)
            self.readers[name] = reader
            reader.install()

    def setup(self) -> None:
        """Hook the activations; as SAELens' own does, but so that they can be taken off."""
        self.hook_dict: dict[str, HookPoint] = {}
        self.mod_dict: dict[str, nn.Module] = {}
        self.named_modules_dict: dict[str, nn.Module] = {}
        for name in self._outputs:
            point = HookPoint()
            self._add(name, point, name)
            module = self.model.get_submodule(name)
            self._handles.append(module.register_forward_hook(get_hook_fn(point)))

    def detach(self) -> None:
        """Take every hook point off the model."""
        for handle in self._handles:
            handle.remove()
        for reader in self.readers.values():
            reader.remove()
        self._handles.clear()
        self.readers.clear()
        self.hook_dict.clear()
        self.mod_dict.clear()
        self.named_modules_dict.clear()

    def __enter__(self) -> HookedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _add(self, name: str, point: HookPoint, module: str) -> None:
        point.name = name
        self.hook_dict[name] = self.mod_dict[name] = point
        # Where SAELens stops the model; what goes through the point is there by then.
        self.named_modules_dict[name] = self.model.get_submodule(module)

    @property
    def n_ctx(self) -> int | None:
        """The longest sequence, if the model's config says."""
        return context_length(self.model)

"""A loaded model, and what hands it to a toolkit."""

from __future__ import annotations

import functools
import logging
import shlex
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lch_plugin.devices import check_device
from lch_plugin.errors import InputError
from lch_plugin.loading.conversions import (
    Conversion,
    check_unbridged,
    read_conversion,
    write_conversion,
)
from lch_plugin.loading.directories import Place, load_directory
from lch_plugin.loading.gguf import load_gguf
from lch_plugin.loading.origins import Origin, find_origin

if TYPE_CHECKING:
    from lch_plugin.adapters.transformer_lens import HookedTransformer, TransformerBridge


_log = logging.getLogger("lch_plugin.loading")
# Where transformers imports code that comes with a checkpoint.
_OWN_CODE = "transformers_modules."


@dataclass(frozen=True)
class LoadedModel:
    """A transformers model with what is needed to use it elsewhere.

    Attributes:
        model: in evaluation mode, of the class it was saved as.
        processor: tokenizer, or image processor or feature extractor of a model that reads no
            text; None if there is none beside the model.
        name: the name on the hub, or the path, as it was given.
        path: the directory or .gguf file on this machine that the model came from.
        revision: commit on the hub; None for a path.
        conversion: what `save` or ``lch convert`` made the directory of; None of any other.
    """

    model: PreTrainedModel
    processor: Any
    name: str
    path: Path
    revision: str | None
    conversion: Conversion | None = None

    def __repr__(self) -> str:
        n = self.model.num_parameters()
        unit, digits = next((u, d) for u, d in (("B", 1e9), ("M", 1e6), ("", 1.0)) if n >= d)
        dtype = str(self.model.dtype).removeprefix("torch.")
        return (
            f"LoadedModel({self.name}: {type(self.model).__name__}, {n / digits:.4g}{unit} "
            f"parameters, {dtype}, {self.model.device})"
        )

    def save(self, path: str | Path) -> Conversion:
        """Write model and processor to a new directory, which `load` reads in seconds.

        ``conversion.json`` in it says what they were made of: the source, its revision or the hash
        of its files, the dtype and versions. Call it before `bridge`.

        Args:
            path: an absent or empty directory.

        Returns:
            The record.

        Raises:
            InputError: a bridge was made of the model.
            OutputError: the path holds something, cannot be written, or has no room.
        """
        origin = Origin(self.name, self.path, self.revision)
        return write_conversion(path, self.model, self.processor, origin)

    def bridge(self, *, saes: bool = False) -> TransformerBridge:
        """Boot the model into TransformerLens.

        The bridge takes the model over: its modules are replaced in place and its attention is
        switched to the eager implementation, whose patterns have hooks. Load again for a
        model of your own.

        Args:
            saes: whether SAEs are to be put in: SAELens' class of bridge, with ``add_sae`` and
                ``run_with_saes``.

        Raises:
            InputError: TransformerLens lacks the tokenizer, a library or an adapter for it, or the
                model is of code that came with the checkpoint, or a bridge already.
            ToolkitError: SAELens is wanted, and not installed.
        """
        from lch_plugin.adapters.transformer_lens import TransformerBridge

        # By its name: SAELens is known to no room below that of SAEs.
        cls = import_module("lch_plugin.saes.toolkit").SAETransformerBridge if saes else None
        check_unbridged(self.model, self.name)
        if type(self.model).__module__.startswith(_OWN_CODE):
            raise InputError(
                f"{self.name} is a {type(self.model).__name__} of its own code, which "
                "TransformerLens may take for a class that it knows and compute otherwise. Take "
                "lch.huggingface.attach or .nnsight(), which run the code as it is."
            )
        tokenizer = self.processor if _is_tokenizer(self.processor) else None
        config = self.model.config
        more_than_text = hasattr(config, "vision_config") or hasattr(config, "audio_config")
        if tokenizer is None and self.model.main_input_name == "input_ids":
            raise InputError(
                f"{self.name} has no tokenizer beside it, and TransformerLens needs one for text. "
                "Save one there with tokenizer.save_pretrained."
            )
        if more_than_text and find_spec("torchvision") is None:
            # TransformerLens would run pip to install it.
            raise InputError(
                f"{self.name} reads more than text, for which TransformerLens needs torchvision. "
                "Install it: pip install torchvision."
            )
        # TransformerLens looks for processors of images and sound under the label. A directory
        # is read at once; a name is asked for on the network, for minutes where there is none.
        label = self.name if tokenizer is not None and not more_than_text else str(self.path)
        self.model.set_attn_implementation("eager")
        try:
            return (cls or TransformerBridge).boot_transformers(
                label,
                hf_model=self.model,
                tokenizer=tokenizer,
                device=self.model.device,
                dtype=self.model.dtype,
            )
        except (ValueError, ImportError) as error:
            raise InputError(
                f"TransformerLens cannot boot {self.name}, a {type(self.model).__name__}; "
                "lch.huggingface.attach takes the model as it is, and lch.saes.HookedModel wraps "
                f"it for SAELens. TransformerLens says: {error}"
            ) from error

    def hooked(self) -> HookedTransformer:
        """A HookedTransformer with these weights as they are, where TransformerLens still has it.

        Nothing is folded or centered, so that centroids are the model's own and do not vanish. The
        weights are copied; the model stays as it is. Its logits are held to the model's. Texts
        begin with BOS, as everywhere in HookedTransformer: give ``prepend_bos=False`` or token ids
        for what the tokenizer itself gives.

        Raises:
            ToolkitError: TransformerLens 4 has no HookedTransformer.
            InputError: TransformerLens has no conversion for the model, or one that computes
                something else; or a bridge was made of it.
        """
        from lch_plugin.adapters.transformer_lens import hooked_transformer

        check_unbridged(self.model, self.name)
        tokenizer = self.processor if _is_tokenizer(self.processor) else None
        return hooked_transformer(self.model, tokenizer, self.name)

    def nnsight(self, **kwargs: Any) -> Any:
        """Wrap the model, which stays as it is, for nnsight.

        With a tokenizer or image processor the wrapper is a TransformersModel, which takes text or
        images; without one it is a plain NNsight, which takes the model's own arguments.

        Args:
            **kwargs: for the wrapper; ``task`` where nnsight cannot tell it from the model.

        Raises:
            InputError: nnsight cannot wrap the model so.
        """
        from lch_plugin.adapters.nnsight import wrap

        return wrap(self.model, self.processor, self.name, **kwargs)


def load(
    source: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
    device_map: str | dict[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool | None = None,
) -> LoadedModel:
    """Load a model from the hub or its cache, a directory, or a .gguf file.

    A string names a path if it exists, starts with ``/``, ``.`` or ``~``, or ends in ``.gguf``;
    any other is a name on the hub. Without a network, and with HF_HUB_OFFLINE set, the hub's cache
    answers. Quantised tensors of a .gguf file are unpacked.

    Args:
        source: name on the hub, directory written by ``save_pretrained``, or .gguf file.
        dtype: of the weights, such as ``torch.bfloat16`` or ``"bfloat16"``; by default what the
            checkpoint says, and for most .gguf files float32.
        device: where to put the model.
        device_map: in place of ``device``, how transformers and accelerate spread a model that is
            larger than one device: ``"auto"``, ``"balanced"``, or a device for each module by name.
        revision: branch, tag or commit on the hub.
        trust_remote_code: of a checkpoint that comes with code of its own (``auto_map`` in its
            configs): True to run it, with all that code can do to this machine; False to take
            transformers' own classes, which may compute something else. Left out, such a checkpoint
            is refused. Without such code it makes no difference.

    Raises:
        InputError: there is no such model, it cannot be loaded faithfully, its weights alone are
            more than the memory that is free, it comes with code and ``trust_remote_code`` is left
            out, or dtype or device does not exist.

    Example:
        >>> loaded = lch.load(DEMO_MODEL_DIR)  # or "gpt2", a directory, "model.gguf"
        >>> model = loaded.bridge()  # for TransformerLens; .nnsight() for nnsight
        >>> model.cfg.n_layers
        4
    """
    dtype, place = _dtype(dtype), _place(device, device_map)
    origin = find_origin(source, revision, trust_remote_code)
    conversion = None
    if origin.path.is_dir():
        conversion = read_conversion(origin.path)
        model, processor = load_directory(origin, dtype, place)
    else:
        model, processor = load_gguf(origin, dtype, place)
        _tell(origin.path)
    return LoadedModel(model, processor, origin.name, origin.path, origin.revision, conversion)


@functools.cache
def _tell(path: Path) -> None:
    """Once for each file."""
    _log.warning(
        "%s is unpacked at each loading. Convert it once, and it loads in seconds: "
        "lch convert %s %s",
        path.name,
        shlex.quote(str(path)),
        shlex.quote(str(path.with_suffix(""))),
    )


def _place(device: str | torch.device, device_map: str | dict[str, Any] | None) -> Place:
    if device_map is None:
        return check_device(device)
    if str(device) != "cpu":
        raise InputError(
            f"device={str(device)!r} and device_map both say where the model goes: give one."
        )
    if find_spec("accelerate") is None:
        raise InputError("device_map needs accelerate: pip install accelerate.")
    return device_map


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | str:
    if dtype is None:
        return "auto"
    value = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(value, torch.dtype) or not value.is_floating_point or value.itemsize < 2:
        raise InputError(
            f"dtype={dtype!r} is no dtype that weights can have here. Choose float32, bfloat16, "
            "float16 or float64, or leave it out to keep the checkpoint's."
        )
    return value


def _is_tokenizer(processor: Any) -> bool:
    return isinstance(processor, PreTrainedTokenizerBase)

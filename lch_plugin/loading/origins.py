"""Where a model is: on the hub or in its cache, in a directory, or in a .gguf file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import transformers
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from lch_plugin.errors import InputError

T = TypeVar("T")

_FORMS = (
    "What can be loaded is a directory written by save_pretrained, a .gguf file, or a model on the "
    "Hugging Face hub by its name"
)
# Of a repository on the hub, what is read here; the rest may be weights in five other formats.
_WANTED = ["model*.safetensors", "*.json", "*.txt", "*.model", "*.spm", "*.jinja"]


@dataclass(frozen=True)
class Origin:
    """Where a model is, and how to say so to transformers.

    Attributes:
        name: as the caller gave it.
        path: directory or .gguf file.
        revision: commit, of a model from the hub.
        trust_remote_code: whether code that comes with it is run; None if the caller did not say.
    """

    name: str
    path: Path
    revision: str | None
    trust_remote_code: bool | None = None

    def read(self, reader: Callable[..., T], what: str, **kwargs: Any) -> T:
        """Call a ``from_pretrained`` so that it neither asks the hub nor runs untrusted code."""
        if self.revision is not None:
            # Not the path: transformers knows some models of the hub by their names.
            pretrained: str | Path = self.name
            kwargs["revision"] = self.revision
        elif self.path.is_dir():
            pretrained = self.path
        else:
            pretrained = self.path.parent
            kwargs["gguf_file"] = self.path.name
        try:
            return reader(
                pretrained,
                local_files_only=True,
                trust_remote_code=bool(self.trust_remote_code),
                **kwargs,
            )
        except Exception as error:  # Of any type, and all of them about the files.
            raise InputError(
                f"transformers {transformers.__version__} cannot read the {what} of {self.name}: "
                f"{error}"
            ) from error


def find_origin(
    source: str | Path, revision: str | None, trust_remote_code: bool | None = None
) -> Origin:
    name, path = str(source), Path(source).expanduser()
    is_path = isinstance(source, Path) or name.startswith(("/", ".", "~"))
    if path.exists():
        if not path.is_dir() and path.suffix != ".gguf":
            raise InputError(f"{name} is neither a directory nor a .gguf file. {_FORMS}.")
        if revision is not None:
            raise InputError(
                f"revision={revision!r} picks a commit on the hub, but {name} is a path. Leave "
                "revision out."
            )
        # No code comes with a .gguf file; what lies beside it belongs to something else.
        return Origin(name, path, None, trust_remote_code if path.is_dir() else False)
    if is_path or path.suffix == ".gguf":
        raise InputError(f"{name} does not exist. Check the path. {_FORMS}.")
    snapshot = _snapshot(name, revision, [*_WANTED, "*.py"] if trust_remote_code else _WANTED)
    # The cache names snapshots after commits.
    return Origin(name, snapshot, snapshot.name, trust_remote_code)


def _snapshot(name: str, revision: str | None, wanted: list[str]) -> Path:
    """Where the cache has a model of the hub, downloaded if need be."""
    refusal: Exception | None = None
    try:
        # One question tells whether there is a hub. Downloading would ask again for half a minute,
        # and transformers for half a minute a file.
        HfApi().model_info(name, revision=revision, timeout=10)
    except HFValidationError as error:
        raise InputError(
            f"{name!r} is neither a path that exists nor a possible name on the hub. {_FORMS}."
        ) from error
    except Exception as error:  # Among them those of a network library that changes its name.
        refusal = error
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=wanted,
                ignore_patterns=["*/*"],
                local_files_only=refusal is not None,
            )
        )
    except Exception as error:
        raise _not_found(name, revision, refusal or error) from error


def _not_found(name: str, revision: str | None, reason: Exception) -> InputError:
    at = f" at revision {revision!r}" if revision else ""
    if isinstance(reason, OfflineModeIsEnabled):
        why, cure = "HF_HUB_OFFLINE is set", "Unset HF_HUB_OFFLINE to download it"
    elif isinstance(reason, HfHubHTTPError):
        why = f"the hub refuses it ({reason})"
        cure = "Check the name, the revision, and your access to it with `hf auth whoami`"
    else:
        why, cure = f"the hub cannot be reached ({reason})", "Connect to the network to download it"
    return InputError(
        f"{name!r} is no path that exists and is not whole in the hub's cache{at}, and {why}. "
        f"{cure}. {_FORMS}; without a network, a name that is in the cache."
    )

"""What there is of a cache, and what is still to be done for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lch_plugin.errors import InputError
from lch_plugin.files import check_new_directory, unfinished
from lch_plugin.records import read_json
from lch_plugin.saes.caching.records import differences
from lch_plugin.saes.caching.shards import MANIFEST, Shard, read_index, read_manifest


@dataclass(frozen=True)
class Found:
    """A cache on the disk, finished, begun or not there yet.

    Attributes:
        path: its final name.
        directory: where its files are: the same if it is finished, else beside it.
        manifest: what it says of itself; empty if there is none.
    """

    path: Path
    directory: Path
    manifest: dict[str, Any]

    @classmethod
    def at(cls, path: str | Path) -> Found:
        """What there is under a path."""
        path = Path(path).expanduser().resolve()
        if _is_cache(path):
            cure = "Choose another path, or remove it and make it again."
            return cls(path, path, read_manifest(path, cure) or {})
        path = check_new_directory(path)
        directory = unfinished(path)
        cure = "Choose another path, or remove it: what it holds of this cache is lost."
        return cls(path, directory, read_manifest(directory, cure) or {})

    @property
    def is_finished(self) -> bool:
        """Whether it has its final name."""
        return self.directory == self.path

    def check_same(self, wanted: dict[str, Any]) -> None:
        """Refuse to go on with a cache of something else.

        Raises:
            InputError: model, hook points or settings differ.
        """
        if not self.is_finished:  # What there is of another number of tokens is of use.
            wanted = {key: value for key, value in wanted.items() if key != "n_tokens"}
        if self.manifest and (differing := differences(self.manifest, wanted)):
            raise InputError(
                f"{self.directory} holds {'a' if self.is_finished else 'an unfinished'} cache of "
                f"something else. {' '.join(differing)} Repeat the call it was made by, choose "
                "another path, or remove it."
            )

    def other_text(self, reason: str) -> InputError:
        """The error that its text is not the one that was passed."""
        return InputError(
            f"{self.directory} was made of another text: {reason}. Pass the same text in the same "
            "order, or choose another path."
        )


@dataclass(frozen=True)
class Plan:
    """Which shards stay, and which sequences are looked at.

    Attributes:
        found: what there is.
        known: shards that the manifest names, by file.
        whole: files of those that are what was written.
        shard_size: sequences in each shard but the last.
        n_sequences: how many of the text are looked at; None for all that it makes.
        writes: whether anything is to be written, and not only the text to be compared.
    """

    found: Found
    known: dict[str, Shard]
    whole: frozenset[str]
    shard_size: int
    n_sequences: int | None
    writes: bool

    @classmethod
    def of(cls, found: Found, manifest: dict[str, Any], context_size: int) -> Plan:
        """What is to be done so that a manifest comes true."""
        known = {shard["file"]: Shard(**shard) for shard in manifest["shards"]}
        damaged = {
            file: i
            for i, (file, shard) in enumerate(known.items())
            if shard.fault(found.directory, read=True)
        }
        settings, n_tokens = manifest["settings"], manifest["n_tokens"]
        size = settings["batch_size"] * settings["batches_per_shard"]
        n_sequences = None if n_tokens is None else -(-n_tokens // context_size)
        if found.is_finished:
            # Up to the last damaged shard; the first in any case, to see that the text is the same.
            last = max(damaged.values(), default=0)
            n_sequences = min(manifest["n_sequences"], size * (1 + last))
        return cls(
            found=found,
            known=known,
            whole=frozenset(known) - frozenset(damaged),
            shard_size=size,
            n_sequences=n_sequences,
            writes=bool(damaged) or not (found.is_finished and _has_index(found.directory)),
        )

    def keeps(self, file: str, n_sequences: int, tokens: str) -> bool:
        """Whether a shard is there, whole, with so many sequences of tokens of that hash.

        Raises:
            InputError: it was made of other tokens.
        """
        shard = self.known.get(file)
        if shard is None or shard.n_sequences != n_sequences:
            return False
        if shard.tokens != tokens:
            raise self.found.other_text(f"it has other tokens in {file}")
        return file in self.whole

    def is_short(self, index: int, n_seen: int) -> bool:
        """Whether the text ended before shard ``index`` was full, with ``n_seen`` sequences."""
        full = self.shard_size * (index + 1)
        return self.n_sequences is not None and n_seen < min(self.n_sequences, full)


def _is_cache(path: Path) -> bool:
    """Whether there is a manifest that at least tries to be one of a cache."""
    try:
        content = read_json(path / MANIFEST, "")
    except InputError:
        return (path / MANIFEST).is_file()
    return isinstance(content, dict) and "shards" in content


def _has_index(directory: Path) -> bool:
    try:
        read_index(directory, "")
    except InputError:
        return False
    return True

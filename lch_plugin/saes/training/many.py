"""Many SAEs from caches, each trained by one worker of a cluster."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.saes.sae import TrainingSAE

from lch_plugin.cluster import Cluster, Shared, shared
from lch_plugin.errors import InputError
from lch_plugin.saes.caching.cache import Cache
from lch_plugin.saes.training.train import train

Config: TypeAlias = LanguageModelSAERunnerConfig[Any]


def train_many(
    configs: Sequence[Config], cluster: Cluster, *, checkpoint_minutes: float | None = None
) -> Iterator[tuple[Config, TrainingSAE[Any]]]:
    """Train what each configuration describes, from a cache, each on one worker.

    An SAE is the one that `lch_plugin.saes.train` makes in one process with as many threads, bit
    for bit. A worker that is lost is started again and begins its SAE anew; what is finished stays.

    Args:
        configs: as of `lch_plugin.saes.train`, with ``use_cached_activations`` and an
            ``output_path`` of its own each. Caches and outputs are on disks that all machines of
            the cluster share, under the same names.
        cluster: where.
        checkpoint_minutes: as of `lch_plugin.saes.train`.

    Yields:
        Each configuration with its SAE, as they are done. Closed early, it stops the workers.

    Raises:
        InputError: a configuration without a cache or an output, or two with the same; a cache
            that is none; a worker that does not see the disk.
        ClusterError: workers are lost again and again.
        Exception: what `lch_plugin.saes.train` raises on a worker.

    Example:
        >>> cluster = lch.cluster.Cluster(workers=2)  # doctest: +SKIP
        >>> for config, sae in lch.saes.train_many(configs, cluster):  # doctest: +SKIP
        ...     print(config.output_path, sae.cfg.metadata.num_dead_features)
    """
    placed = [_absolute(config) for config in configs]
    if len({config.output_path for config in placed}) < len(placed):
        raise InputError("two configurations have the same output_path: give each its own.")
    if not placed:
        return
    home = _existing(Path(str(placed[0].output_path)))
    with (
        shared(home) as place,
        closing(cluster.run(partial(_trainer, place, checkpoint_minutes), placed)) as done,
    ):
        yield from done


def _trainer(place: Shared, minutes: float | None) -> Callable[[Config], TrainingSAE[Any]]:
    place.check()
    return lambda config: train(None, None, config, checkpoint_minutes=minutes)


def _absolute(config: Config) -> Config:
    """The same, with paths that mean the same on a worker, which has a directory of its own."""
    if not config.use_cached_activations or config.cached_activations_path is None:
        raise InputError(
            f"{config.hook_name}: on a cluster SAEs are trained from a cache. Set "
            "use_cached_activations and cached_activations_path; lch_plugin.saes.cache makes one."
        )
    if config.output_path is None:
        raise InputError(f"{config.hook_name}: output_path is None. Say where the SAE goes.")
    Cache(config.cached_activations_path)  # Here, before workers are started for it.
    config = copy.copy(config)
    for name in ("cached_activations_path", "output_path", "checkpoint_path"):
        if (path := getattr(config, name)) is not None:
            setattr(config, name, str(Path(path).resolve()))
    return config


def _existing(path: Path) -> Path:
    """The nearest directory above that there is."""
    return next(parent for parent in path.parents if parent.is_dir())

"""Texts of two kinds that every installation has, and averaged lenses fitted on them in parts.

A fit takes ``d_model`` rows of backward passes a text, so it is saved every few texts: what was
interrupted goes on, and a lens of 20 texts is part of that of 100.
"""

from __future__ import annotations

import importlib.util
import random
import sysconfig
from itertools import chain, islice, zip_longest
from pathlib import Path
from types import ModuleType
from typing import Any

from transformer_lens.tools.analysis import JacobianLens

import lch_plugin as lch

CORPORA = ("docstrings", "code")
LINEARIZATIONS = ("detached", "jacobian")
PART = 4  # Texts in a file.
SKIP_FIRST = 4  # Positions whose residual streams are not typical, the first above all.
_LETTERS = 600  # More than any fit here reads.


def texts(corpus: str, n: int, seed: int) -> list[str]:
    """The first so many texts of a corpus, in an order that the seed decides.

    ``docstrings`` are those of `examples/real_models/corpus.py`, packages in turn; ``code`` is the
    standard library, of each module the lines from a random one on.
    """
    order = random.Random(seed)
    if corpus == "docstrings":
        module = _corpus_module()
        packages = [module.docstrings(name, random.Random(seed)) for name in module.PACKAGES]
        turns = chain.from_iterable(zip_longest(*packages))
        found = list(islice((t for t in turns if t and not module.is_held_out(t)), n))
    else:
        paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        order.shuffle(paths)
        found = []
        for path in paths:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            start = order.randrange(max(1, len(lines) - 40))
            text = "".join(lines[start : start + 40]).strip()[:_LETTERS]
            if len(text) > _LETTERS // 2:
                found.append(text)
    if len(found) < n:
        raise SystemExit(f"{corpus}: {len(found)} texts here, fewer than {n}.")
    return found[:n]


def fit(
    model: Any,
    corpus: str,
    linearization: Any,
    n: int,
    start: int = 0,
    *,
    layers: list[int],
    n_tokens: int,
    seed: int,
    out: Path,
) -> JacobianLens:
    """The average over ``n`` texts from one on, from files where they are there already.

    ``layers`` are a reading's: the residual stream that block ``l`` reads is what block ``l - 1``
    leaves, and `JacobianLens` counts these.
    """
    out.mkdir(parents=True, exist_ok=True)
    if n % PART or start % PART or not n:
        raise SystemExit(f"{n} texts from {start} on: fits are kept in parts of {PART}.")
    parts, found = [], texts(corpus, start + n, seed)
    sources = [layer - 1 for layer in layers]
    for first in range(start, start + n, PART):
        path = out / f"{corpus}-{linearization}-{n_tokens}-{seed}-{first:03d}.pt"
        if not path.is_file():
            print(f"fitting {path.name} ...", flush=True)
            lens = lch.lens.average(
                model,
                found[first : first + PART],
                linearization,
                sources,
                corpus=f"{corpus}, seed {seed}",
                n_tokens=n_tokens,
                skip_first=SKIP_FIRST,
            )
            lens.save(str(path) + ".unfinished", dtype=lens.jacobians[sources[0]].dtype)
            Path(str(path) + ".unfinished").rename(path)
        part = lch.lens.load(path, model)
        if part.source_layers != sources:
            raise SystemExit(
                f"{path} has layers {part.source_layers}: delete it, or ask for these."
            )
        parts.append(part)
    return JacobianLens.merge(parts)


def _corpus_module() -> ModuleType:
    path = Path(__file__).parents[1] / "real_models" / "corpus.py"
    spec = importlib.util.spec_from_file_location("corpus", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

"""English text that every installation has: what installed packages say about themselves.

    python examples/real_models/corpus.py corpus

writes ``train.jsonl`` and ``test.jsonl``, one docstring a line with its package as the label. A
docstring belongs to the test split by a checksum of its text, so that equal texts are never on both
sides, and each text occurs once. Nothing is imported or downloaded.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import random
import sys
import zlib
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("numpy", "scipy", "sklearn", "torch", "pandas", "matplotlib")
SHORTEST = 300  # Letters: about 70 tokens.


def docstrings(package: str, order: random.Random) -> Iterator[str]:
    """Of all modules, classes and functions of a package, its files in random order."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        return
    paths = sorted(Path(spec.origin).parent.rglob("*.py"))
    order.shuffle(paths)
    for path in paths:
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # A package may carry code of another version of Python.
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = inspect.cleandoc(ast.get_docstring(node) or "")
                if len(text) >= SHORTEST:
                    yield text


def is_held_out(text: str) -> bool:
    return zlib.crc32(text.encode()) % 10 == 0


def write(directory: Path, n_letters: int, seed: int = 0) -> None:
    """Both splits, the same share of letters of each package, in an order that the seed decides."""
    directory.mkdir(parents=True, exist_ok=True)
    splits: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
    for package in PACKAGES:
        left, seen = n_letters // len(PACKAGES), set()
        for text in docstrings(package, random.Random(seed)):
            if left <= 0:
                break
            if text not in seen:
                seen.add(text)
                left -= len(text)
                split = "test" if is_held_out(text) else "train"
                splits[split].append({"text": text, "label": package})
    for split, rows in splits.items():
        random.Random(seed).shuffle(rows)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{split}.jsonl").write_text(lines, encoding="utf-8")
        letters = sum(len(row["text"]) for row in rows)
        print(f"{split}: {len(rows):,} texts, {letters:,} letters")
    versions = {"python": sys.version.partition(" ")[0]} | {
        name: version("scikit-learn" if name == "sklearn" else name) for name in PACKAGES
    }
    (directory / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--letters", type=int, default=1_200_000, help="in both splits together")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(args.out, args.letters, args.seed)


if __name__ == "__main__":
    main()

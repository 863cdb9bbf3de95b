"""The layout of the package, from the imports that are really there."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2] / "lch_plugin"


def tree() -> str:
    """Modules and packages of the package by level: each imports from levels above it alone.

    What imports each other in a circle stands on one level.
    """
    uses = imports()
    lines = ["```text", "lch_plugin/"]
    for i, level in enumerate(levels(uses)):
        circle = any(uses[name] & set(level) for name in level)
        lines.append(f"  level {i}{': these import each other' if circle else ''}")
        for name in level:
            path = ROOT / name
            shown = f"{name}/" if path.is_dir() else f"{name}.py"
            lines.append(f"    {shown:<20}{_first_sentence(path)}")
            if path.is_dir():
                lines += [f"      {sub:<18}{text}" for sub, text in _within(path)]
            if uses[name]:
                lines.append(f"      imports {', '.join(sorted(uses[name]))}")
    return "\n".join([*lines, "```"])


def imports() -> dict[str, set[str]]:
    """Of each module or package at the top, the others that it imports, lazily or not.

    What is imported for type checkers alone does not count, nor what `lch_plugin` itself offers.
    """
    names = {p.stem for p in ROOT.iterdir() if _is_code(p)}
    uses: dict[str, set[str]] = {name: set() for name in names}
    for path in ROOT.rglob("*.py"):
        top = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if top in uses:
            uses[top] |= {n for n in _imported(path) if n in names and n != top}
    return uses


def levels(uses: dict[str, set[str]]) -> Iterator[list[str]]:
    left = dict(uses)
    while left:
        level = sorted(name for name, others in left.items() if not others & left.keys())
        if not level:  # A circle: those that the fewest others are needed for.
            reach = {name: _reach(name, left) for name in left}
            fewest = min(map(len, reach.values()))
            level = sorted(name for name in left if len(reach[name]) == fewest)
        yield level
        for name in level:
            del left[name]


def _reach(name: str, uses: dict[str, set[str]]) -> set[str]:
    found, waiting = set(), [name]
    while waiting:
        for other in uses.get(waiting.pop(), set()) & uses.keys():
            if other not in found:
                found.add(other)
                waiting.append(other)
    return found


def _is_code(path: Path) -> bool:
    if path.is_dir():
        return (path / "__init__.py").is_file()
    return path.suffix == ".py" and path.stem != "__init__"


def _imported(path: Path) -> Iterator[str]:
    nodes: list[ast.AST] = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            nodes += node.orelse
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lch_plugin"):
            parts = (node.module or "").split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("lch_plugin."):
                    yield alias.name.split(".")[1]


def _within(package: Path) -> list[tuple[str, str]]:
    inner = sorted(p for p in package.iterdir() if p.is_dir() and _is_code(p))
    return [(f"{p.name}/", _first_sentence(p)) for p in inner]


def _first_sentence(path: Path) -> str:
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    text = " ".join((ast.get_docstring(ast.parse(file.read_text())) or "").split("\n\n")[0].split())
    sentence = text.partition(". ")[0].rstrip(".").replace("`", "")
    return sentence if len(sentence) < 80 else sentence.partition(":")[0]

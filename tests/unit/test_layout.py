"""Imports point one way: a module imports only from layers below its own."""

import ast
from pathlib import Path

import cce_torchrec

ROOT = Path(cce_torchrec.__file__).parent
LAYERS = [
    {"gpu", "versions"},
    {"config"},
    {"hashing"},
    {"bounds", "codes", "fused", "helper_rows", "slots"},
    {"chunk_codes"},
    {"expand", "kmeans", "metrics"},
    {"modules"},
    {"distributed"},
    {"clustering", "planning"},
    {"checkpoint"},
    {"train"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {n.split(".")[1] for n in names if n.startswith("cce_torchrec.")}
    return found


def test_imports_point_one_way():
    for path in ROOT.rglob("*.py"):
        own = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for name in imports(path) - {own}:
            assert LEVEL[name] < LEVEL[own], f"{path} imports {name}, which is not below {own}"

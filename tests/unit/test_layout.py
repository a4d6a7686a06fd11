"""The shape of the package: imports point one way, and what is private elsewhere is in one file."""

import ast
from pathlib import Path

import cce_torchrec

ROOT = Path(cce_torchrec.__file__).parent
LAYERS = [
    {"bars", "byte_sizes", "cpu_level", "extras", "packing", "reasons", "recipe", "serve_options"},
    {
        "collectives",
        "compiled",
        "device_name",
        "gpu",
        "signed",
        "torchrec_internals",
        "versions",
        "yaml_files",
    },
    {"chunk_order", "config_checks", "sizing"},
    {"config", "spans"},
    {"joint", "optimizer_state", "table"},
    {"codes"},
    {"lookup"},
    {"data", "kmeans", "metrics"},
    {"modules"},
    {"distributed"},
    {"clustering", "planning"},
    {"checkpoint"},
    {"alignment", "inference", "report"},
    {"train"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
TREES = {path: ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def imports(tree: ast.Module) -> set[str]:
    """Modules of the package that are imported, by functions too, as "file" or "folder.file".

    Functions import what not every machine has (Triton); in a circle they would hide it.
    """
    found = set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            # `from package import module` names the module last.
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {n.removeprefix("cce_torchrec.") for n in names if n.startswith("cce_torchrec.")}
    return {name for name in found if is_module(name)}


def test_every_form_of_import_is_seen():
    text = "from cce_torchrec import checkpoint, cluster\nimport cce_torchrec.train.run as x"
    assert imports(ast.parse(text)) == {"checkpoint", "train.run"}
    text = (
        "from cce_torchrec.clustering import pairs\nfrom cce_torchrec.kmeans.points import Points"
    )
    assert imports(ast.parse(text)) == {"clustering", "clustering.pairs", "kmeans.points"}


def test_imports_point_one_way():
    for path, tree in TREES.items():
        own = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for name in {name.split(".")[0] for name in imports(tree)} - {own}:
            assert LEVEL[name] < LEVEL[own], f"{path} imports {name}, which is not below {own}"


def test_files_of_a_folder_import_in_no_circle():
    arrows = {}
    for path, tree in TREES.items():
        own = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        folder = own.rpartition(".")[0]
        if folder and path.name != "__init__.py":
            found = imports(tree)
            arrows[own] = {n for n in found if n.rpartition(".")[0] == folder and n != own}
    while arrows:  # takes away files that import none that is left
        free = {own for own, names in arrows.items() if not names & arrows.keys()}
        assert free, f"imports in a circle among {sorted(arrows)}"
        arrows = {own: names for own, names in arrows.items() if own not in free}


def private(name: str) -> bool:
    return name == "__class__" or (name.startswith("_") and not name.startswith("__"))


def defined(tree: ast.AST) -> set[str]:
    """Names that a file gives: to functions, classes, variables and attributes of self."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found |= {node.attr} if ast.unparse(node.value) in ("self", "cls") else set()
    return found


def private_of_others(tree: ast.AST) -> set[str]:
    """Attributes, names and modules that are private, and not of the file itself."""
    own, found = defined(tree), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) != "super()":
            if private(node.attr) and node.attr not in own:
                found.add(ast.unparse(node))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and private(name.value):
                found.add(ast.unparse(node))
        elif isinstance(node, ast.ImportFrom) and node.module and node.module != "__future__":
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
            found |= {ast.unparse(node)} if any(map(private, names)) else set()
    return found


def test_private_attributes_of_others_are_in_one_file():
    for path, tree in TREES.items():
        if path.name != "torchrec_internals.py":
            found = private_of_others(tree)
            assert not found, f"{path} reads {found}: torchrec_internals.py is the place for it"


def test_private_attributes_are_found():
    text = (
        "from torch._c import d\nself._own = x._y\nx._own\ngetattr(x, '_w')\nsuper()._v\n"
        "x.__class__ = y\nx.__dict__"
    )
    found = private_of_others(ast.parse(text))
    assert found == {"from torch._c import d", "x._y", "getattr(x, '_w')", "x.__class__"}

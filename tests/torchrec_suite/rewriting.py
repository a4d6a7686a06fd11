"""Changes what the modules of TorchRec's tests import, as they are loaded.

Without a GPU TorchRec skips many tests that a CPU can run as well, so two more things are changed,
for both sides of the comparison: tests that a decorator skips for want of GPUs are run, and the
names of devices and backends are those of a CPU.
"""

from __future__ import annotations

import ast
import importlib.machinery
import multiprocessing
import re
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import CodeType, ModuleType

_EXAMPLES = "tests.torchrec_suite.examples"
_STRATEGIES = "tests.torchrec_suite.strategies"
_SUBSTITUTES = "tests.torchrec_suite.substitutes"
_SUBSTITUTED = {
    "EmbeddingBagCollection",
    "EmbeddingBagCollectionSharder",
    "EmbeddingCollection",
    "EmbeddingCollectionSharder",
    "FeatureProcessedEmbeddingBagCollectionSharder",
    "ShardedEmbeddingBagCollection",
    "ShardedEmbeddingCollection",
    "copy_state_dict",
    "get_default_sharders",
}
_ON_CPU = {"nccl": "gloo", "cuda": "cpu", "cuda:0": "cpu"}
_IS_TEST = re.compile(r"/(tests|test_utils)/|/test_[^/]*\.py$")
_PRELOADED = ["torchrec.distributed.test_utils.test_model_parallel_base"]


class _Rewriter(ast.NodeTransformer):
    def __init__(self, substitute: bool) -> None:
        self._substitute = substitute

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | list[ast.AST]:
        module = node.module or ""
        if module == "hypothesis":
            return ast.ImportFrom(_EXAMPLES, node.names, 0)
        if not (self._substitute and module.startswith("torchrec")):
            return node
        ours = [name for name in node.names if name.name in _SUBSTITUTED]
        theirs = [name for name in node.names if name.name not in _SUBSTITUTED]
        out: list[ast.AST] = [ast.ImportFrom(_SUBSTITUTES, ours, 0)] if ours else []
        return [*out, ast.ImportFrom(module, theirs, node.level)] if theirs else out

    def visit_Import(self, node: ast.Import) -> ast.AST:
        for name in node.names:
            if name.name == "hypothesis.strategies":
                return ast.Import([ast.alias(_STRATEGIES, name.asname)])
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.decorator_list = [
            each
            for each in node.decorator_list
            if not ("skip" in ast.unparse(each) and "cuda" in ast.unparse(each))
        ]
        return self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        return node  # a test that compares with "nccl" asks whether to skip

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, str) and node.value in _ON_CPU:
            return ast.copy_location(ast.Constant(_ON_CPU[node.value]), node)
        return node


class _Loader(importlib.machinery.SourceFileLoader):
    substitute = False

    def get_code(self, fullname: str) -> CodeType:
        # From the source, as bytecode in a cache may be of the other side.
        tree = ast.parse(self.get_data(self.path))
        tree = ast.fix_missing_locations(_Rewriter(self.substitute).visit(tree))
        return compile(tree, self.path, "exec", dont_inherit=True)


class _SubstitutingLoader(_Loader):
    substitute = True


class _Finder(MetaPathFinder):
    def __init__(self, source: str, substitute: bool) -> None:
        self._source, self._loader = source, _SubstitutingLoader if substitute else _Loader

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        origin = (spec and spec.origin) or ""
        if spec is None or not origin.startswith(self._source):
            return None
        if not _IS_TEST.search(origin) or origin.endswith("__init__.py"):
            return None
        spec.loader = self._loader(fullname, origin)
        return spec


def install(source: str, substitute: bool) -> None:
    """Loads the test modules below `source` rewritten from now on, in this process.

    Args:
        source: a source tree of TorchRec.
        substitute: whether they get CCE collections.
    """
    sys.meta_path.insert(0, _Finder(source, substitute))
    # Ranks are forked from one process that has imported torch.
    multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOADED)

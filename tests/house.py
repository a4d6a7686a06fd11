"""`python -m tests.house`: what the package looks like, in numbers; CONTRIBUTING.md has them."""

import ast
import io
import statistics
import tokenize
from collections import Counter
from pathlib import Path

import cce_torchrec
from tests.unit.test_layout import private_of_others

ROOT = Path(cce_torchrec.__file__).parent
BRANCHES = (ast.If, ast.For, ast.While, ast.IfExp, ast.ExceptHandler, ast.With, ast.comprehension)


def functions(tree):
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]


def length(node):
    return node.end_lineno - node.lineno + 1


def complexity(node):
    """Ways through a function: one, and one more for each branch and each `and` or `or`."""
    found = 1
    for inner in ast.walk(node):
        found += isinstance(inner, BRANCHES)
        found += len(inner.values) - 1 if isinstance(inner, ast.BoolOp) else 0
    return found


def like_typed(node):
    """Most positional arguments of one type, where a swap would pass the type checker."""
    arguments = node.args.posonlyargs + node.args.args
    kinds = Counter(ast.unparse(a.annotation) for a in arguments if a.annotation)
    return max(kinds.values(), default=0)


def is_kernel(node):
    return any("triton.jit" in ast.unparse(d) for d in node.decorator_list)


def comments(text):
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    ours = [t.string for t in tokens if t.type == tokenize.COMMENT]
    return sum(not c.startswith(("# type:", "# noqa", "# fmt:")) for c in ours)


def asks_for_cce(node):
    called = isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance"
    return called and "CCEEmbeddingBagConfig" in ast.unparse(node.args[1])


def undocumented(tree):
    public = [
        n
        for n in ast.walk(tree)
        if isinstance(n, ast.FunctionDef | ast.ClassDef)
        and not n.name.startswith("_")
        and "overload" not in map(ast.unparse, n.decorator_list)  # the function itself has it
    ]
    inner = {id(c) for f in functions(tree) for c in ast.walk(f) if c is not f}
    return [n.name for n in public if not ast.get_docstring(n) and id(n) not in inner]


def counts():
    """The numbers, by what they are of."""
    texts = {path: path.read_text() for path in sorted(ROOT.rglob("*.py"))}
    trees = {path: ast.parse(text) for path, text in texts.items()}
    lines = {path: len(text.splitlines()) for path, text in texts.items()}
    every = [f for tree in trees.values() for f in functions(tree)]
    long = [f.name for f in every if length(f) > 40]
    starred = (ast.Tuple, ast.List)
    nodes = [n for tree in trees.values() for n in ast.walk(tree)]
    return {
        "files": len(texts),
        "lines": sum(lines.values()),
        "lines of the median file": statistics.median(lines.values()),
        "files over 350 lines": sorted(p.name for p, n in lines.items() if n > 350),
        "functions": len(every),
        "functions over 40 lines, %": round(100 * len(long) / len(every), 1),
        "complexity over 15": sorted(f.name for f in every if complexity(f) > 15),
        "files that ask whether a table is a CCE table by isinstance": sum(
            any(asks_for_cce(n) for n in ast.walk(tree)) for tree in trees.values()
        ),
        "files that read private attributes of torch, TorchRec and FBGEMM": sum(
            bool(private_of_others(tree)) for tree in trees.values()
        ),
        "star-tuples": sum(
            isinstance(n, ast.Starred) and isinstance(n.value, starred) for n in nodes
        ),
        "functions of more than three like-typed positional arguments": sorted(
            f.name for f in every if like_typed(f) > 3 and not is_kernel(f)
        ),
        "asserts of the form `is not None`": sum(
            isinstance(n, ast.Assert) and "is not None" in ast.unparse(n.test) for n in nodes
        ),
        "public names without a docstring": sorted(
            name for tree in trees.values() for name in undocumented(tree)
        ),
        "comments, % of lines": round(
            100 * sum(map(comments, texts.values())) / sum(lines.values()), 1
        ),
    }


if __name__ == "__main__":
    for what, number in counts().items():
        shown = ", ".join(number) or "none" if isinstance(number, list) else number
        print(f"{what}: {shown}")

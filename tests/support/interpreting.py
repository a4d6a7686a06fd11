"""Runs checks in which Triton interprets kernels; `Beside` (tests/conftest.py) starts it.

Triton reads TRITON_INTERPRET once, when it is imported. So this process has that and what checks
import, and forks itself for each: it takes seconds to import all anew. On its standard input are
lines of JSON, [arguments of Python, file for what is said]; it answers with the exit status.
"""

import inspect
import json
import os
import runpy
import sys
import traceback
from functools import cache
from types import SimpleNamespace

import fbgemm_gpu  # noqa: F401
import pytest  # noqa: F401
import torchrec.distributed  # noqa: F401
import triton.experimental.gluon
from triton.runtime import interpreter

import cce_torchrec.clustering
import cce_torchrec.distributed.sharders  # noqa: F401


class Inspect:
    """`inspect` for Triton's interpreter, which looks for its builtins at every call in a kernel.

    That takes a third of all its time, and the names of modules and classes stay the same.
    """

    def __init__(self):
        self._names = {}

    def __getattr__(self, name):
        return getattr(inspect, name)

    def getmembers(self, of):
        if of not in self._names:
            found = inspect.getmembers(of, triton.language.core.is_builtin)
            self._names[of] = [name for name, _ in found]
        return [(name, getattr(of, name)) for name in self._names[of]]


_patch_lang = interpreter._patch_lang


@cache
def _patched(languages):
    _patch_lang(SimpleNamespace(__globals__=dict(languages)))


def patch_once(fn):
    """Triton's language as it is while a kernel is interpreted, from the first one on.

    Triton makes it so at each launch and each call of a function, and takes it back after each.
    """
    both = (triton.language, triton.language.core)
    own = {k: v for k, v in fn.__globals__.items() if any(v is language for language in both)}
    _patched(tuple(own.items()))
    return interpreter._LangPatchScope()  # with nothing to take back


def run(arguments, output):
    """Exit status of `python ARGUMENTS` (-c CODE or -m MODULE and its options) in this process."""
    said = os.open(output, os.O_WRONLY | os.O_CREAT)
    for number in (sys.stdout.fileno(), sys.stderr.fileno()):
        os.dup2(said, number)
    kind, what, *options = arguments
    sys.argv = [kind, *options]
    try:
        if kind == "-c":
            exec(what, {"__name__": "__main__"})
        else:
            runpy.run_module(what, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main():
    interpreter.inspect = Inspect()
    interpreter._patch_lang = patch_once
    for line in sys.stdin:
        child = os.fork()
        if not child:
            status = run(*json.loads(line))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()

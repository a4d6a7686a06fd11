"""The warning at first use names what to install, and tested triples are free of it."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from cce_torchrec import versions


def install(monkeypatch, torch, fbgemm, torchrec):
    found = {"torch": torch, "fbgemm-gpu": fbgemm, "torchrec": torchrec}

    def version(name):
        if name not in found:
            raise versions.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(versions, "version", version)


@pytest.mark.parametrize(
    "triple",
    [
        ("2.13.0+cpu", "1.8.0", "1.8.0"),
        ("2.13.0+cu130", "1.8.0", "1.9.2"),
        ("2.11.0+cu130", "1.6.0", "1.6.1"),
    ],
)
def test_tested_triples_do_not_warn(monkeypatch, triple):
    install(monkeypatch, *triple)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.check_versions()


def test_parts_of_two_tested_triples_warn(monkeypatch):
    install(monkeypatch, "2.11.0", "1.6.0", "1.9.2")
    with pytest.warns(UserWarning, match=r"not with \('2.11.0', '1.6.0', '1.9.2'\); install "):
        versions.check_versions()


ROOT = Path(__file__).parents[2]
NO_DRIVER = r"needs NVIDIA's driver, and this machine lacks it \(no {}\): run where .* --gpus all"


@pytest.mark.parametrize(
    "stub, told",
    [
        (
            "raise OSError('libcuda.so.1: cannot open shared object file: No such file')",
            NO_DRIVER.format(r"libcuda\.so\.1"),
        ),
        (
            "raise ImportError('Could not load: libnvidia-ml.so.1: cannot open it')",
            NO_DRIVER.format(r"libnvidia-ml\.so\.1"),
        ),
        (
            "raise OSError('fbgemm_gpu_py.so: undefined symbol: _ZN3c10')",
            r"do not load \(fbgemm_gpu_py.so: undefined symbol: _ZN3c10\): install torch==2",
        ),
        ("", r"do not load \(it has logged why\): install torch==2"),  # older builds only log
    ],
)
@pytest.mark.parametrize(
    "used",
    ["from cce_torchrec import make_plan", "from cce_torchrec.clustering import cluster",
     "import cce_torchrec.config", "from cce_torchrec.modules import compress"],
)  # fmt: skip
def test_without_a_driver_the_first_use_says_what_is_missing(tmp_path, stub, told, used):
    package = tmp_path / "fbgemm_gpu"
    package.mkdir()
    (package / "__init__.py").write_text(stub)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", used],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]  # one sentence, and after its cause
    assert last.startswith("ImportError: ")
    assert re.search(told, last)
    if stub:
        assert "The above exception was the direct cause" in done.stderr


def test_the_extra_asks_for_a_faiss_gpu_that_was_tried():
    assert 'faiss-gpu = ["faiss-gpu>=1.15"]' in (ROOT / "pyproject.toml").read_text()

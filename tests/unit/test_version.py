"""The version is in one place, and what repeats it agrees; what a wheel must have is looked for."""

import importlib.metadata
import re
import zipfile
from pathlib import Path

import pytest
import yaml

import cce_torchrec
from tests import wheel

ROOT = Path(__file__).parents[2]
VERSION = cce_torchrec.__version__
try:
    import tomllib
except ImportError:  # Python 3.10
    tomllib = pytest.importorskip("tomli")


def test_the_package_is_built_with_it():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    where = project["tool"]["setuptools"]["dynamic"]["version"]["attr"]
    assert where == "cce_torchrec.__version__"
    assert importlib.metadata.version("cce-torchrec") == VERSION


def test_the_citation_and_the_newest_change_have_it():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == VERSION
    headings = re.findall(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] in (VERSION, "Unreleased") and VERSION in headings


def test_images_are_labelled_with_no_other():
    """A label takes the version as an argument of the build, whose default is this one."""
    for file in (ROOT / "docker").rglob("*"):
        if file.is_file() and "ockerfile" in file.name:
            for found in re.findall(
                r"image\.version=(\S+)|ARG (?:CCE_)?VERSION=(\S+)", file.read_text()
            ):
                stated = "".join(found).strip("\"'")
                # Without a version there is no label, and with another one the build ends.
                assert not stated or stated.startswith("$") or stated == VERSION, file


def made(tmp_path, names, tag="py3-none-manylinux_2_28_x86_64"):
    file = tmp_path / f"cce_torchrec-{VERSION}-{tag}.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, "")
    return file


def test_a_whole_wheel_passes(tmp_path):
    names = {
        *wheel.NEEDED,
        "cce_torchrec/",
        "cce_torchrec/a.py",
        f"cce_torchrec-{VERSION}.dist-info/RECORD",
    }
    assert wheel.problems(made(tmp_path, names), wheel.NEEDED) == []


@pytest.mark.parametrize(
    "without, with_, told",
    [
        ("cce_torchrec/py.typed", None, "cce_torchrec/py.typed is missing"),
        ("cce_torchrec/kmeans/_native_avx2.so", None, "kmeans/_native_avx2.so is missing"),
        (None, "tests/conftest.py", "tests/conftest.py should not be there"),
        (None, "cce_torchrec/inference/libcce_lookup-torch2.so", "should not be there"),
        (None, "cce_torchrec.libs/libstdc++.so.6", "should not be there"),
    ],
)
def test_what_lacks_or_is_too_much_is_named(tmp_path, without, with_, told):
    names = wheel.NEEDED - {without} | ({with_} if with_ else set())
    (found,) = wheel.problems(made(tmp_path, names), wheel.NEEDED)
    assert told in found


@pytest.mark.parametrize("name", ["cce_torchrec-9.9-py3-none-any.whl", "x-cp311-cp311-linux.whl"])
def test_a_wheel_of_another_name_is_refused(tmp_path, name):
    file = made(tmp_path, wheel.NEEDED).rename(tmp_path / name)
    assert (
        "another version, or is for one version of Python" in wheel.problems(file, wheel.NEEDED)[0]
    )

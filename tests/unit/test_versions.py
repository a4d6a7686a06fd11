"""The warning at import names what to install, and tested triples are free of it."""

import warnings

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

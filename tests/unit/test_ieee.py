"""Scores are IEEE float32 whatever a job has set, and its setting stays as it was."""

import itertools

import pytest
import torch

from cce_torchrec.kmeans import kmeans
from cce_torchrec.kmeans.ieee import ieee_float32

CPU = torch.device("cpu")
SETTINGS = [("generic", "all"), *itertools.product(["cuda", "mkldnn"], ["all", "matmul"])]


def get(setting):
    return torch._C._get_fp32_precision_getter(*setting)


def put(setting, precision):
    torch._C._set_fp32_precision_setter(*setting, precision)


def raised_or(read):
    try:
        return read()
    except RuntimeError:
        return "refused"


def settings():
    """All that torch tells of a job's setting."""
    return [
        *map(get, SETTINGS),
        raised_or(lambda: torch.backends.cuda.matmul.allow_tf32),
        raised_or(torch.get_float32_matmul_precision),
        torch.is_autocast_enabled("cpu"),
    ]


def assert_ieee():
    assert get(("cuda", "matmul")) == get(("mkldnn", "matmul")) == "ieee"
    assert torch.backends.cuda.matmul.allow_tf32 is False  # and the two APIs agree
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.is_autocast_enabled("cpu")


def set_old(name, value):
    return lambda: setattr(torch.backends.cuda.matmul, name, value)


JOBS = {
    "nothing": lambda: None,
    "allow_tf32": set_old("allow_tf32", True),
    "allow_tf32 again": lambda: (set_old("allow_tf32", True)(), set_old("allow_tf32", False)()),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "products": set_old("fp32_precision", "tf32"),
    "backend": lambda: put(("cuda", "all"), "tf32"),
    "everything": lambda: put(("generic", "all"), "tf32"),
    "mkldnn": lambda: put(("mkldnn", "matmul"), "bf16"),
    "both": lambda: (torch.set_float32_matmul_precision("high"), put(("cuda", "matmul"), "ieee")),
}


@pytest.fixture(params=JOBS)
def job(request):
    """A job's setting; torch's own afterwards."""
    before = [get(setting) for setting in SETTINGS]
    JOBS[request.param]()
    yield request.param
    torch.set_float32_matmul_precision("highest")
    for setting, precision in zip(SETTINGS, before, strict=True):
        put(setting, precision)
    assert settings()[:5] == before


def test_the_setting_of_a_job_comes_back(job):
    before = settings()
    with ieee_float32(CPU):
        assert_ieee()
    assert settings() == before
    with pytest.raises(KeyError), ieee_float32(CPU):
        assert_ieee()
        raise KeyError
    assert settings() == before


@pytest.mark.parametrize("setting", [("generic", "all"), ("cuda", "all"), ("mkldnn", "all")])
def test_what_followed_a_setting_still_follows_it(job, setting):
    followed = {}
    for visited in (False, True):
        if visited:
            with ieee_float32(CPU):
                pass
        held = get(setting) if setting[0] == "generic" else "none"
        seen = []
        for precision in ("ieee", "tf32", "none"):
            put(setting, precision)
            seen.append([get(other) for other in SETTINGS])
        put(setting, held if job != "backend" or setting[0] != "cuda" else "tf32")
        followed[visited] = seen
    assert followed[False] == followed[True]


@pytest.mark.parametrize("metric", [None, torch.diag(torch.tensor([1.0, 4, 9, 2]))])
def test_torch_scores_in_ieee_float32(job, metric, monkeypatch):
    scored, products = torch.addmm, []

    def addmm(*args):
        assert_ieee()
        products.append(args)
        return scored(*args)

    points = torch.randn(300, 4, generator=torch.Generator().manual_seed(1))
    expected = kmeans(points, 9, 3, backend="torch", metric=metric)
    monkeypatch.setattr(torch, "addmm", addmm)
    before = settings()
    with torch.autocast("cpu", torch.bfloat16):
        found = kmeans(points, 9, 3, backend="torch", metric=metric)
        assert torch.is_autocast_enabled("cpu")
    assert products and settings() == before
    assert torch.equal(found.centroids, expected.centroids)
    assert torch.equal(found.assignment, expected.assignment)

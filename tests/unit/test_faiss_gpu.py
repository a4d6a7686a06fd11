"""What FAISS is asked for on a GPU, with a stand-in for faiss-gpu that notes its calls."""

import contextlib
import sys
import types

import pytest
import torch

from cce_torchrec.kmeans import TensorPoints
from cce_torchrec.kmeans.backends import FaissBackend, make_backend


class OnGpu(TensorPoints):
    """Points that say they are on a GPU."""

    number = 1

    @property
    def device(self):
        return torch.device("cuda", self.number)


@pytest.fixture
def calls(monkeypatch):
    """(what, torch's current device, which resource) of every call of the stand-in."""
    noted, current = [], [0]

    class Resources:
        def __init__(self):
            noted.append(("resources", current[0], self))

    class Config:
        device = 0

    class Index:
        def __init__(self, resources, dim, config):
            self.resources, self.dim, self.device = resources, dim, config.device
            noted.append(("index", self.device, resources))

        def add(self, x):
            assert x.is_contiguous() and current[0] == self.device
            self.held = x
            noted.append(("add", current[0], self.resources))

        def search(self, x, k):
            assert x.is_contiguous() and k == 1
            noted.append(("search", current[0], self.resources))
            distances, nearest = torch.cdist(x, self.held).min(1, keepdim=True)
            return distances, nearest

    @contextlib.contextmanager
    def device(number):
        before, current[0] = current[0], number
        yield
        current[0] = before

    faiss = types.ModuleType("faiss")
    faiss.StandardGpuResources, faiss.GpuIndexFlatConfig = Resources, Config
    faiss.GpuIndexFlatL2 = Index
    monkeypatch.setitem(sys.modules, "faiss", faiss)
    for name in ("faiss.contrib", "faiss.contrib.torch_utils"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(FaissBackend, "_resources", {})
    return noted


def test_one_resource_a_device_and_the_device_of_the_points(calls):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 4, generator=generator)
    for number in (1, 1, 3, 1):
        points = OnGpu(x)
        points.number = number
        for centroids in (x[:7], x[3:23].t().contiguous().t()):
            engine = make_backend("faiss", points.device)  # anew, as every clustering does
            found = engine.prepare(points, centroids)(0, len(x))
            assert torch.equal(found.long(), torch.cdist(x, centroids).argmin(1))
            assert [at for _, at, _ in calls[-3:]] == [number] * 3  # index, add, search
    made = [resources for what, _, resources in calls if what == "resources"]
    assert len(made) == 2  # of devices 1 and 3
    used = {(at, id(resources)) for what, at, resources in calls if what == "index"}
    assert used == {(1, id(made[0])), (3, id(made[1]))}


def test_faiss_without_its_gpu_form_is_refused(calls, monkeypatch):
    monkeypatch.delattr(sys.modules["faiss"], "StandardGpuResources")
    points = OnGpu(torch.randn(10, 4))
    with pytest.raises(ValueError, match=r"faiss-cpu is installed; .*cce-torchrec\[faiss-gpu\]"):
        make_backend("faiss", points.device).prepare(points, torch.zeros(2, 4))

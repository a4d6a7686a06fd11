"""Why kernels do not run on a GPU: one sentence, and the same done in torch."""

import importlib.util
import logging
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode

from cce_torchrec.gpu import memory, usable
from cce_torchrec.kmeans.backends import TorchBackend, make_backend
from cce_torchrec.lookup.bounds import BoundsCheck

GPU = torch.device("cuda", 0)


class Probe:
    """Stands for the smallest kernel."""

    error = None

    @classmethod
    def run(cls, device):
        if cls.error is not None:
            raise cls.error


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch):
    """An H100 whose compiler works, as far as is asked."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(Probe, "error", None)
    monkeypatch.setitem(sys.modules, "cce_torchrec.gpu.probe", Probe)
    import cce_torchrec.gpu as package

    monkeypatch.setattr(package, "probe", Probe, raising=False)
    usual = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: n == "triton" or usual(n, *a))
    forget()
    yield
    forget()


def forget():
    for cached in (usable._fault_of, usable._gpu_is_usable, usable._warn_once):
        cached.cache_clear()


def test_a_gpu_that_was_measured_is_taken_without_a_word(caplog):
    assert usable.usable(GPU) and not caplog.records
    assert make_backend("auto", GPU).name == "triton"


@pytest.mark.parametrize(
    "break_it, why",
    [
        (lambda p: p.setattr(torch.cuda, "get_device_capability", lambda d: (6, 1)),
         r"a GPU \(compute capability 6.1\) is older than 7.5, the oldest that CUDA 13 takes"),
        (lambda p: p.setattr(Probe, "error", RuntimeError("Failed to find C compiler. Please…")),
         r"does not run on a GPU .*Failed to find C compiler.*; install gcc or name a C compiler"),
        (lambda p: p.setattr(Probe, "error", RuntimeError("PTX was compiled by a newer driver")),
         r"newer driver; install a driver and a Triton that fit this GPU"),
        (lambda p: p.setattr(Probe, "error", subprocess.CalledProcessError(1, ["gcc", "main.c"])),
         r"'gcc', 'main.c'.* non-zero exit status 1.; install Python's headers \(python3-dev\)"),
        (lambda p: p.setattr(importlib.util, "find_spec", lambda n, *a: None),
         "Triton is not installed, with which the kernels for GPUs are compiled; install it"),
    ],
    ids=["old", "no compiler", "driver", "no headers", "no Triton"],
)  # fmt: skip
def test_what_is_missing_is_said_once(monkeypatch, caplog, break_it, why):
    break_it(monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert not usable.usable(GPU) and not usable.usable(GPU)
    (record,) = caplog.records
    assert record.getMessage().endswith("; the same is done in torch, several times slower")
    with pytest.raises(ValueError, match=why):
        make_backend("triton", GPU)
    assert isinstance(make_backend("auto", GPU), TorchBackend)


def test_a_gpu_that_was_never_measured_is_taken_and_named(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with caplog.at_level(logging.WARNING):
        assert usable.usable(GPU)
    (record,) = caplog.records
    assert "compute capability 8.0" in record.getMessage()
    assert record.getMessage().endswith(
        "was never measured, only 9.0; python -m benchmarks.gpu does"
    )


def test_a_compiled_model_asks_without_tracing_the_probe(monkeypatch, recwarn):
    runs = []
    monkeypatch.setattr(Probe, "run", classmethod(lambda cls, device: runs.append(device)))
    ask = torch.compile(lambda x: x + usable.usable(GPU), backend="eager", fullgraph=True)
    assert ask(torch.zeros(1)) == 1 and usable.usable(GPU)
    assert runs == [GPU] and not [w for w in recwarn if "cache" in str(w.message)]


def test_a_cpu_has_no_use_for_the_kernels():
    assert not usable.usable(torch.device("cpu"))
    with pytest.raises(ValueError, match="run on CUDA, not on cpu; or choose backend 'torch'"):
        make_backend("triton", torch.device("cpu"))


def test_fatal_is_refused_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    BoundsCheck(BoundsCheckMode.WARNING).refuse_capture()
    with pytest.raises(ValueError, match=r"FATAL reads .* CUDA graph .* WARNING and look at"):
        BoundsCheck(BoundsCheckMode.FATAL).refuse_capture()


def test_free_memory_is_the_drivers_and_what_torch_keeps(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    assert memory.free_bytes(GPU) == 1200


def test_too_little_free_memory_for_a_clustering(monkeypatch):
    """The limit is agreed on by all ranks: half of what the fullest GPU has free."""
    from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig
    from cce_torchrec.clustering import cluster, limits

    monkeypatch.setattr(limits, "free_share", lambda model: 5_000_000)
    config = CCEEmbeddingBagConfig(
        name="t", num_embeddings=9000, embedding_dim=16, feature_names=["f"], num_rows=50
    )
    module = CCEEmbeddingBagCollection([config])
    why = r"needs up to \d+ bytes .* memory_limit is 5000000, half of what is free on the GPU; free"
    with pytest.raises(ValueError, match=why):
        cluster(module)
    cluster(module, memory_limit=100_000_000)


def test_ranks_agree_about_the_kernels(monkeypatch):
    """One node without a compiler would count and score otherwise than the others."""
    from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig
    from cce_torchrec.clustering import cluster, step

    def with_another_rank(work, group):
        own, shared = agree(work, group)
        if hasattr(shared[0], "has_kernels"):
            shared.append(replace(shared[0], has_kernels=True))
        return own, shared

    agree = step.agree
    monkeypatch.setattr(step, "agree", with_another_rank)
    config = CCEEmbeddingBagConfig(
        name="t", num_embeddings=900, embedding_dim=16, feature_names=["f"], num_rows=50
    )
    with pytest.raises(ValueError, match=r"on some ranks and not on others .* \[None, True\]"):
        cluster(CCEEmbeddingBagCollection([config]))


def test_nothing_imports_triton_before_it_is_needed():
    """A machine without it takes the torch form."""
    script = "import sys; sys.modules['triton'] = None; import cce_torchrec.clustering"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)

"""Clusterings of a collection on the device, against the CPU, and how often the host waits."""

import pytest
import torch

from cce_torchrec.clustering import budget, cluster, finalize
from cce_torchrec.clustering.budget import Engine
from cce_torchrec.kmeans import native
from tests.desk.counts import counting
from tests.desk.emulated import on_cpu
from tests.desk.twins import assert_same_state, batch, table, twins, two_tables

N = 200
CLOSE = 1e-6
"""Relative, of objectives; see test_kmeans."""
WAITS_A_CHUNK = 40
"""Of a chunk of 6 Lloyd iterations: each asks how it went, and the last for what it left; the rest
are sizes of what is found (pairs, samples, starts) and checks of the input. 40 waits of some 10
microseconds are less than a hundredth of the 0.1 s that a large chunk may take."""


def metric(chunks, dim):
    root = torch.randn(chunks, dim, dim, generator=torch.Generator().manual_seed(3))
    return root @ root.transpose(1, 2)


OPTIONS = {
    "default": {},
    "samples_per_centroid": {"samples_per_centroid": 3},
    "k-means++": {"init": "k-means++"},
    "main": {"init": "main"},
    "seen": {"weights": "seen"},
    "seen, sampled": {"weights": "seen", "samples_per_centroid": 3},
    "weights": {"weights": {"t0": torch.arange(N) % 5}},
    "weights, sampled": {"weights": {"t1": torch.arange(N) % 5}, "samples_per_centroid": 3},
    "metric": {"metric": {"t1": metric(1, 16)}},
    "metric, sampled": {"metric": {"t0": metric(2, 8)}, "samples_per_centroid": 3},
    "tolerance": {"tolerance": 0.5},
    "little memory": {"memory_limit": 0},
}

FINALIZED = ("default", "k-means++", "seen, sampled", "metric", "little memory")
"""Ways that a step takes, each once: interpreted, another of them takes seconds."""

pytestmark = pytest.mark.usefixtures("small_blocks")


def prepared(options, chunks=2):
    """Small twins (kernels are interpreted) after a batch of training, so that ids were seen."""
    settings = {"num_embeddings": N, "track_seen": options.get("weights") == "seen"}
    tables = [table(0, num_chunks=chunks, num_rows=5, **settings)]
    tables += [table(1, num_chunks=1, num_rows=8, **settings)]
    cpu, cuda = twins(tables)
    # Enough ids where the seen alone count: of fewer points than clusters, rounding names donors.
    for seed in range(6 if settings["track_seen"] else 1):
        features = batch(num_ids=N, seed=seed)
        cpu(features), cuda(features.to("cuda"))
    return cpu, cuda


def fitted(step, module, backend, options):
    """The step's report; a `memory_limit` of 0 stands for the least that it does not refuse."""
    needed = 1
    while options.get("memory_limit") == 0:
        try:
            return step(module, backend=backend, **{**options, "memory_limit": needed})
        except ValueError as error:
            needed = int(str(error).split("needs up to ")[1].split()[0])
    return step(module, backend=backend, **options)


def compare(step, cpu, cuda, backend, options):
    options = {"iterations": 2, **options}
    one = fitted(step, cpu, "auto" if backend != "torch" else "torch", options)
    other = fitted(step, cuda, backend, options)
    assert len(one.chunks) == len(other.chunks) >= 2
    for a, b in zip(one.chunks, other.chunks, strict=True):
        assert b.objective_before == pytest.approx(a.objective_before, rel=CLOSE)
        close = CLOSE * a.objective_before  # what is left may be rounding alone
        assert b.objective_after == pytest.approx(a.objective_after, rel=CLOSE, abs=close)
        assert b.empty_clusters == a.empty_clusters


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("step", [cluster, finalize])
def test_equals_torch_on_the_cpu(monkeypatch, step, option):
    """The same operations on both, so the same codes and codebooks, bit by bit."""
    if step is finalize and option not in FINALIZED:
        pytest.skip("finalize refuses it, or takes the same way as cluster")
    monkeypatch.setattr(native, "available", lambda: False)
    cpu, cuda = prepared(OPTIONS[option])
    compare(step, cpu, cuda, "torch", OPTIONS[option])
    assert_same_state(cpu, cuda, rtol=0, atol=0)
    got = on_cpu(cuda(batch(num_ids=N).to("cuda")).values())
    torch.testing.assert_close(got, cpu(batch(num_ids=N)).values())


@pytest.mark.parametrize(
    ("step", "option"),
    [(cluster, "default"), (cluster, "seen, sampled"), (cluster, "metric"), (finalize, "metric")],
)
def test_equals_compiled_kernels_on_the_cpu(step, option):
    """By Triton's search, which "auto" takes on CUDA."""
    cpu, cuda = prepared(OPTIONS[option], chunks=1)
    compare(step, cpu, cuda, "auto", OPTIONS[option])


@pytest.mark.parametrize("options", [{}, {"samples_per_centroid": 3}], ids=["all", "sampled"])
def test_shrunk_by_counts_as_on_the_cpu(monkeypatch, options):
    monkeypatch.setattr(native, "available", lambda: False)
    tables = [table(0, num_chunks=2, num_rows=4, num_embeddings=N, recipe="rare")]
    cpu, cuda = twins([*tables, table(1, num_chunks=1, num_rows=8, num_embeddings=N)])
    for seed in range(5):
        features = batch(num_ids=N // 2, seed=seed)
        cpu(features), cuda(features.to("cuda"))
    assert cpu.codes["t0"].counts.unique().numel() > 3
    compare(cluster, cpu, cuda, "torch", options)
    assert_same_state(cpu, cuda, rtol=0, atol=0)


# Each pair of choices once: both steps wait at the same places.
@pytest.mark.parametrize(
    ("step", "samples", "weights"),
    [(cluster, None, None), (cluster, 2, "seen"), (finalize, None, "seen"), (finalize, 2, None)],
)
def test_waits_do_not_grow_with_the_ids(step, samples, weights):
    counted = []
    for num_ids in (200, 600):
        _, cuda = twins(
            [table(0, num_embeddings=num_ids, num_chunks=1, num_rows=5, track_seen=True)]
        )
        # Of so many batches that a sample of the ids has some that were seen.
        for seed in range(1, 1 + num_ids // 50):
            cuda(batch(seed, num_ids=num_ids).to("cuda"))
        with counting() as counts:
            step(cuda, backend="torch", samples_per_centroid=samples, weights=weights, iterations=1)
        counted.append(counts)
    few, many = (
        # How many iterations there are, and whether a cluster is empty, depends on the data.
        sum(n for (_, at), n in counts.waits.items() if "kmeans/lloyd.py" not in at)
        for counts in counted
    )
    assert many <= few, f"{counted[0]}\n{counted[1]}"


@pytest.mark.parametrize("option", ["k-means++", "seen, sampled", "metric"])
def test_waits_of_a_chunk(option):
    options = OPTIONS[option]
    _, cuda = prepared(options)
    with counting() as counts:
        done = fitted(cluster, cuda, "torch", options)
    assert counts.num_waits <= WAITS_A_CHUNK * len(done.chunks), str(counts)


def test_state_of_an_optimizer_follows():
    cpu, cuda = twins([table(i, num_embeddings=N, num_chunks=1, num_rows=5) for i in range(2)])
    optimizers = [torch.optim.Adam(module.parameters()) for module in (cpu, cuda)]
    for module, features in ((cpu, batch(num_ids=N)), (cuda, batch(num_ids=N).to("cuda"))):
        module(features).values().square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    cuda.load_state_dict(cpu.state_dict())  # float32 sums of gradients differ in their last bits
    for one, other in zip(*(o.state.values() for o in optimizers), strict=True):
        for key, value in one.items():
            on_cpu(other[key]).copy_(value)
    for module, optimizer in zip((cpu, cuda), optimizers, strict=True):
        cluster(module, backend="torch", optimizer=optimizer, iterations=2)
    for one, other in zip(*(o.state.values() for o in optimizers), strict=True):
        for key, value in one.items():
            torch.testing.assert_close(on_cpu(other[key]), value, msg=key)
    assert_same_state(cpu, cuda)


def test_unusable_weights_are_refused_and_nothing_is_written():
    _, cuda = twins(two_tables())
    with torch.no_grad():
        next(cuda.parameters())[3, 1] = torch.nan
    before = [on_cpu(b).clone() for b in cuda.buffers()]
    with pytest.raises(ValueError, match=r"table 't0', chunk 0: .* not finite"):
        cluster(cuda)
    assert all(torch.equal(on_cpu(b), a) for a, b in zip(before, cuda.buffers(), strict=True))


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
def test_budgets_on_cuda_hold_a_block_of_scores(backend):
    """Of what is computed without a device; what is taken is for a real one to say."""
    shape = budget.ChunkShape(num_ids=10**8, num_rows=8192, helper_rows=3 * 8192, dim=32)
    cpu, cuda = (
        budget.budget(shape, 20 << 30, samples_per_centroid=200, engine=engine)
        for engine in (Engine(backend="torch"), Engine(backend=backend, device="cuda"))
    )
    assert cuda.working_bytes >= cpu.working_bytes and cuda.code_bytes == cpu.code_bytes

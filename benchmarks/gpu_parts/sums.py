"""Whether the same work from the same state gives the same bytes, again and again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from benchmarks.contenders import Setting, batches, build
from benchmarks.gpu_parts.part import Part, free, start_group
from benchmarks.gpu_parts.timing import Contender, wait
from cce_torchrec.clustering import cluster
from cce_torchrec.clustering.local_chunks import fused_rows, uncached
from cce_torchrec.torchrec_internals import fused_kernels, lookups_of

FULL = Setting(10**6, dim=128, main_rows=4096, helper_rows=12288, tables=2, batch=65536, bag=10)
QUICK = Setting(1000, dim=32, main_rows=32, helper_rows=96, tables=2, batch=64, bag=10)
RUNS, STEPS = 3, 2
State = dict[str, torch.Tensor]


def run(part: Part) -> None:
    """CCE and plain tables by two optimizers, then a clustering after training.

    Then Zipf ids: FBGEMM adds up a row's gradients by atomics where more than 1,024 ids of a batch
    share it, in whatever order they come, unless torch.use_deterministic_algorithms is set.
    """
    start_group(part.device)
    setting = QUICK if part.quick else FULL
    for optimizer in ("rowwise_adagrad", "adam" if part.on_gpu else "adagrad"):
        for kind in ("cce", "plain"):
            what = f"{STEPS} steps of {kind} by {optimizer}"
            with part.attempt(what):
                _compare(part, setting, what, lambda k=kind, o=optimizer: trained(part, k, o))
    with part.attempt("clustering"):
        _compare(part, setting, "2 steps and a clustering", lambda: clustered(part))
    hot = replace(setting, zipf=True)
    for kind in ("cce", "plain"):
        what = f"{STEPS} steps of {kind}, Zipf ids"
        with part.attempt(what):
            _compare(part, hot, what, lambda k=kind: trained(part, k, zipf=True), judged=False)
            with deterministic():
                what = f"{what}, deterministic algorithms"
                _compare(part, hot, what, lambda k=kind: trained(part, k, zipf=True))


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """With torch.use_deterministic_algorithms; memory is not filled, which takes time."""
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _compare(
    part: Part, setting: Setting, what: str, once: Callable[[], State], judged: bool = True
) -> None:
    first, differing = None, set()
    for _ in range(RUNS):
        state = once()
        free()
        first = state if first is None else first
        differing |= {name for name in first if not torch.equal(first[name], state[name])}
    assert first is not None
    row = {"what": what, "runs": RUNS, "tensors": len(first), "differing": len(differing)}
    row |= {"which": sorted(differing), "setting": asdict(setting)}
    part.add("the same bytes", row)
    if judged:
        part.goal(f"the same bytes: {what}", len(differing), 0, unit="tensors differ")


def trained(part: Part, kind: str, optimizer: str = "rowwise_adagrad", zipf: bool = False) -> State:
    """Output of a last forward, weights and optimizer state after steps from a fresh start."""
    contender = _steps(part, kind, optimizer, zipf)
    return _state(part, contender)


def clustered(part: Part) -> State:
    """The same after a clustering; codes too."""
    contender = _steps(part, "cce", "rowwise_adagrad")
    cluster(contender.model)
    state = _state(part, contender)
    for name, codes in contender.model.module.collection.codes.items():
        state[f"codes of {name}"] = codes.codes.clone()
    return state


def _steps(part: Part, kind: str, optimizer: str, zipf: bool = False) -> Contender:
    setting = QUICK if part.quick else FULL
    torch.manual_seed(0)
    contender = Contender(build(setting, kind, part.device, optimizer))
    for ids in batches(replace(setting, zipf=zipf), part.device, STEPS):
        contender.step(ids)
    wait(part.device)
    return contender


def _state(part: Part, contender: Contender) -> State:
    setting = QUICK if part.quick else FULL
    with torch.no_grad():
        out = contender.model(batches(setting, part.device, 1, seed=9)[0])
    state = {"output": out.clone()}
    with uncached(contender.model):
        for name, (weight, optimizer) in _rows(contender.model.module.collection).items():
            state[name] = weight.detach().clone()
            for key, value in optimizer.items():
                state[f"{key} of {name}"] = value.detach().clone()
    return state


def _rows(collection: nn.Module) -> dict[str, Any]:
    """Weight and optimizer state of every table of a sharded collection, ours or TorchRec's."""
    if hasattr(collection, "embedding_bag_collection"):
        return fused_rows(collection)  # type: ignore[arg-type]  # has the attribute
    found = {}
    for tables, tbe in fused_kernels(lookups_of(collection)):
        states = tbe.get_optimizer_state()
        for table, weight, state in zip(tables, tbe.split_embedding_weights(), states, strict=True):
            found[table.name] = (weight, state)
    return found

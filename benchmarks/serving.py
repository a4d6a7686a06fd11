"""`python -m benchmarks.serving [--quick] [--json FILE]`: what a lookup of served tables costs.

Full tables quantised by TorchRec, and packed CCE tables, fused and portable: collections that are
scripted together with the making of a KeyedJaggedTensor from tensors, which is what a server gets.
Beside them FBGEMM's operator for full tables alone, and CCE's lookups, which take tensors. All take
turns in one process on one thread, each with batches of its own in every turn, half as many of
which come first and are not counted: so none finds in a cache ids that it or another has read
before, and all find what their tables share. Figures are medians of CPU microseconds a call.
Values of rows and codes are random: a lookup takes as long whatever they are.

`--huge-pages` has torch ask for huge pages for large tensors (THP_MEM_ALLOC_ENABLE), where the
system gives them to those that ask; how many bytes are in such pages is in the JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import onnxruntime
import torch
import torchrec.fx
from torch import nn
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.modules.embedding_configs import DataType
from torchrec.quant import EmbeddingBagCollection as QuantEmbeddingBagCollection
from tqdm import tqdm

from benchmarks.machine import device_name
from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig
from cce_torchrec.codes.chunk_codes import local_codes
from cce_torchrec.inference import inference_collection, to_onnx
from cce_torchrec.versions import installed_versions

CPU = torch.device("cpu")
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
DATA_TYPES = {"fp32": DataType.FP32, "int8": DataType.INT8, "int4": DataType.INT4}
Batch = tuple[torch.Tensor, torch.Tensor]
"""Values, and lengths of bags."""
Contender = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Tables that are compared."""

    ids: int
    tables: int = 1
    bag: int = 1
    rows: int
    """Main rows of a chunk, finalized."""
    data_type: str = "int8"
    zipf: bool = False
    dim: int = 64

    @property
    def names(self) -> list[str]:
        """Features, one of each table."""
        return [f"f{i}" for i in range(self.tables)]


SETTINGS = [
    *(Setting(ids=2 * 10**7, bag=bag, rows=16384, zipf=z) for bag in (1, 4) for z in (False, True)),
    *(Setting(ids=10**6, tables=26, rows=4096, zipf=zipf) for zipf in (False, True)),
    Setting(ids=2 * 10**7, rows=16384, data_type="int4"),
    Setting(ids=2 * 10**7, rows=16384, data_type="fp32"),
]
QUICK = [Setting(ids=10**5, rows=256), Setting(ids=10**4, tables=26, rows=64)]


class Bare(nn.Module):
    """FBGEMM's operator with the rows of a quantised collection."""

    def __init__(self, kernel: nn.Module) -> None:
        super().__init__()
        self.rows, self.nothing = kernel.weights_host, kernel.weights_uvm
        self.places, self.starts = kernel.weights_placements, kernel.weights_offsets
        self.types, self.dims, self.total = kernel.weights_tys, kernel.D_offsets, kernel.total_D
        self.int4, self.int8 = kernel.max_int4_D, kernel.max_int8_D
        self.fp32, self.alignment = kernel.max_float32_D, kernel.row_alignment

    def forward(self, values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Pooled rows [B, sum of D]."""
        ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        return torch.ops.fbgemm.int_nbit_split_embedding_codegen_lookup_function(
            self.rows, self.nothing, self.places, self.starts, self.types, self.dims, self.total,
            0, self.int4, self.int8, 0, self.fp32, values, ends, 0, None, 0, None, None,
            self.alignment,
        )  # fmt: skip


class FromTensors(nn.Module):
    """A collection that is called with tensors."""

    def __init__(self, names: list[str], collection: nn.Module) -> None:
        super().__init__()
        self.names, self.collection = names, collection

    def forward(self, values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Pooled embeddings [B, sum of D]."""
        features = KeyedJaggedTensor(keys=self.names, values=values, lengths=lengths)
        return self.collection(features).values()


def full_tables(setting: Setting) -> tuple[dict[str, Contender], int]:
    """TorchRec's quantised collection and the operator in it, and the bytes of its rows."""
    tables = [
        EmbeddingBagConfig(
            name=f"t{i}", num_embeddings=setting.ids, embedding_dim=setting.dim,
            feature_names=[name], data_type=DATA_TYPES[setting.data_type],
        )
        for i, name in enumerate(setting.names)
    ]  # fmt: skip
    collection = QuantEmbeddingBagCollection(
        tables, is_weighted=False, device=CPU, register_tbes=True
    )
    (kernel,) = collection.tbes
    graph = torchrec.fx.symbolic_trace(collection, leaf_modules=[type(kernel).__name__])
    found = {
        "full, TorchRec": torch.jit.script(FromTensors(setting.names, graph)),
        "full, operator": torch.jit.script(Bare(kernel)),
    }
    return found, kernel.weights_host.numel()


def collection_of(setting: Setting) -> CCEEmbeddingBagCollection:
    """CCE tables, finalized, with codes that look learned."""
    collection = CCEEmbeddingBagCollection(
        [
            CCEEmbeddingBagConfig(
                name=f"t{i}", num_embeddings=setting.ids, embedding_dim=setting.dim,
                feature_names=[name], num_rows=setting.rows, num_helper_rows=0,
            )
            for i, name in enumerate(setting.names)
        ]
    )  # fmt: skip
    for name in collection.codes:
        codes = local_codes(collection.codes, name)
        for column in range(len(codes.chunks)):
            codes.write(column, torch.randint(setting.rows, (setting.ids,)))
        codes.set_clusterings(1)  # else its codes would be hashes, and not stored
    return collection


def packed_tables(setting: Setting) -> tuple[dict[str, Contender], int]:
    """CCE tables in every form, and the bytes of their codes and rows."""
    collection = collection_of(setting)
    found: dict[str, Contender] = {}
    nbytes = 0
    for lookup in ("fused", "portable"):
        served = inference_collection(collection, data_type=setting.data_type, lookup=lookup)
        found[f"CCE, {lookup}"] = torch.jit.script(FromTensors(setting.names, served))
        found[f"CCE, {lookup} lookup"] = torch.jit.script(served.lookup)
        nbytes = served.packed.codes.numel() + served.packed.rows.numel()
    if setting.data_type == "int8":
        found["CCE, ONNX Runtime"] = in_onnx_runtime(served)
    return found, nbytes


def in_onnx_runtime(served: nn.Module) -> Contender:
    """The file of ONNX of a collection, on one thread."""
    with tempfile.TemporaryDirectory() as folder:
        file = to_onnx(served, Path(folder) / "tables.onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(
            str(file), options, providers=["CPUExecutionProvider"]
        )

    def run(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        (pooled,) = session.run(None, {"values": values.numpy(), "lengths": lengths.numpy()})
        return torch.from_numpy(pooled)

    return run


def batches(setting: Setting, size: int, count: int, seed: int = 0) -> list[Batch]:
    """Batches of `size` rows, whose bags have `setting.bag` ids each."""
    random = torch.Generator().manual_seed(size + 10_000 * seed)
    shape = (count, setting.tables * size * setting.bag)
    if setting.zipf:  # of exponent 1.05, ranks scattered over the ids
        u = torch.rand(shape, generator=random, dtype=torch.float64)
        ranks = ((1 - u * (1 - setting.ids**-0.05)) ** -20).long().clamp(1, setting.ids) - 1
        ids = ranks * 2654435761 % setting.ids
    else:
        ids = torch.randint(setting.ids, shape, generator=random)
    lengths = torch.full((setting.tables * size,), setting.bag)
    return [(own, lengths) for own in ids]


def medians(
    contenders: dict[str, Contender], setting: Setting, size: int, rounds: int
) -> dict[str, float]:
    """Microseconds of CPU time a call: of each round the mean, of these the median.

    Args:
        contenders: by name.
        setting: of the tables.
        size: bags of a feature in a batch.
        rounds: after one to warm up, in which TorchScript compiles. Each starts with another
            contender than the one before.
    """
    found: dict[str, list[float]] = {name: [] for name in contenders}
    count = max(4, min(200, 100_000 // (setting.tables * size * setting.bag)))
    for turn in range(rounds + 1):
        # New ones every time: what another, or itself, has read before is in a cache.
        each = count + count // 2
        every = batches(setting, size, each * len(contenders), seed=turn)
        names = list(contenders)
        for number, name in enumerate(names[turn % len(names) :] + names[: turn % len(names)]):
            contender, taken = contenders[name], every[number * each : (number + 1) * each]
            # A server looks up one model: what the one before has driven from the cache is back.
            for values, lengths in taken[count:]:
                contender(values, lengths)
            began = time.process_time()
            for values, lengths in taken[:count]:
                contender(values, lengths)
            if turn:
                found[name].append(1e6 * (time.process_time() - began) / count)
    return {name: statistics.median(times) for name, times in found.items()}


def measured(setting: Setting, sizes: list[int], rounds: int) -> dict[str, object]:
    """A row of the JSON: times of all contenders at all sizes of batches, and bytes."""
    torch.manual_seed(0)
    full, full_bytes = full_tables(setting)
    packed, packed_bytes = packed_tables(setting)
    contenders, times = full | packed, {}
    for size in sizes:
        times[size] = medians(contenders, setting, size, rounds)
    return asdict(setting) | {
        "microseconds": times,
        "bytes_in_huge_pages": memory("AnonHugePages"),
        "full_bytes": full_bytes,
        "cce_bytes": packed_bytes,
    }


def memory(kind: str) -> int:
    """Bytes of this process of a kind of memory that Linux counts, by its name (Pss, say)."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        name, _, size = line.partition(":")
        if name == kind:
            return 1024 * int(size.split()[0])
    return 0


def shown(row: dict[str, object]) -> str:
    """A row of the table for each size of batches."""
    lines = []
    ids = f"{row['tables']} x {row['ids']:.0e}, {'Zipf' if row['zipf'] else 'uniform'}"
    for size, times in row["microseconds"].items():
        ratios = [
            times["CCE, fused"] / times["full, TorchRec"],
            # Of a server, which has tensors: only TorchRec needs a KeyedJaggedTensor of them.
            times["CCE, fused lookup"] / times["full, TorchRec"],
            times["CCE, fused lookup"] / times["full, operator"],
            times["CCE, portable"] / times["full, TorchRec"],
        ]
        cells = [ids, row["bag"], row["data_type"], size]
        names = ("full, TorchRec", "full, operator", "CCE, fused", "CCE, fused lookup")
        micros = [times[name] for name in (*names, "CCE, portable")]
        text = [*map(str, cells), *(f"{t:.0f}" for t in micros), *(f"{r:.2f}" for r in ratios)]
        lines.append(f"| {' | '.join(text)} |")
    return "\n".join(lines)


HEADER = (
    "| tables, ids | bag | rows | batch | full, TorchRec | full, operator | CCE fused "
    "| its lookup | CCE portable | fused / TorchRec | lookup / TorchRec | lookup / operator "
    "| portable / TorchRec |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def main() -> None:
    """Prints a table and writes --json after every setting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small tables, seconds")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 64, 4096], help="of batches")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--huge-pages", action="store_true", help="for large tensors")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.huge_pages and os.environ.get(HUGE_PAGES) != "1":  # torch reads it when it starts
        command = [sys.executable, "-m", "benchmarks.serving", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, HUGE_PAGES: "1"})
    torch.set_num_threads(1)
    rows = []
    print(HEADER, flush=True)
    for setting in tqdm(QUICK if args.quick else SETTINGS, leave=False, disable=None):
        rows.append(measured(setting, args.sizes, args.rounds))
        print(shown(rows[-1]), flush=True)
        gc.collect()
        if args.json:
            result = {
                "device": device_name(CPU),
                "versions": installed_versions(),
                "settings": {k: v for k, v in vars(args).items() if k != "json"},
                "rows": rows,
            }
            args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

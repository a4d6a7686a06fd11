"""`python -m benchmarks.serving [--quick] [--json FILE]`: what a lookup of served tables costs.

Full tables quantised and scripted by TorchRec, the operator of FBGEMM below them alone, and packed
CCE tables, fused and portable, each scripted with a KeyedJaggedTensor and with tensors. All take
turns batch by batch in one process on one thread; figures are medians of CPU microseconds a call.
Values of rows and codes are random: a lookup takes as long whatever they are.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

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
from cce_torchrec.inference import inference_collection
from cce_torchrec.versions import installed_versions

CPU = torch.device("cpu")
DATA_TYPES = {"fp32": DataType.FP32, "int8": DataType.INT8, "int4": DataType.INT4}
Contender = Callable[[KeyedJaggedTensor], torch.Tensor]


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


def of_tensors(model: nn.Module) -> Contender:
    """`model` called with the tensors of a batch."""
    return lambda batch: model(batch.values(), batch.lengths())


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
    bare = torch.jit.script(Bare(kernel))
    scripted = torch.jit.script(graph)
    found = {"full, TorchRec": lambda batch: scripted(batch), "full, operator": of_tensors(bare)}
    return found, kernel.weights_host.numel()


def packed_tables(setting: Setting) -> tuple[dict[str, Contender], int]:
    """CCE tables in every form, and the bytes of their codes and rows."""
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
    found: dict[str, Contender] = {}
    nbytes = 0
    for lookup in ("fused", "portable"):
        served = inference_collection(collection, data_type=setting.data_type, lookup=lookup)
        script = torch.jit.script(served)
        found[f"CCE, {lookup}"] = lambda batch, script=script: script(batch)
        found[f"CCE, {lookup}, tensors"] = of_tensors(torch.jit.script(served.lookup))
        nbytes = served.packed.codes.numel() + served.packed.rows.numel()
    return found, nbytes


def batches(setting: Setting, size: int, count: int) -> list[KeyedJaggedTensor]:
    """Batches of `size` rows, whose bags have `setting.bag` ids each."""
    random = torch.Generator().manual_seed(size)
    shape = (count, setting.tables * size * setting.bag)
    if setting.zipf:  # of exponent 1.05, ranks scattered over the ids
        u = torch.rand(shape, generator=random, dtype=torch.float64)
        ranks = ((1 - u * (1 - setting.ids**-0.05)) ** -20).long().clamp(1, setting.ids) - 1
        ids = ranks * 2654435761 % setting.ids
    else:
        ids = torch.randint(setting.ids, shape, generator=random)
    lengths = torch.full((setting.tables * size,), setting.bag)
    return [KeyedJaggedTensor(setting.names, own, lengths=lengths) for own in ids]


def medians(
    contenders: dict[str, Contender], own: list[KeyedJaggedTensor], rounds: int
) -> dict[str, float]:
    """Microseconds of CPU time a call: of each round the mean, of these the median."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, contender in contenders.items():
            began = time.process_time()
            for batch in own:
                contender(batch)
            if turn:  # the first is to warm up, and for TorchScript to compile
                found[name].append(1e6 * (time.process_time() - began) / len(own))
    return {name: statistics.median(times) for name, times in found.items()}


def measured(setting: Setting, sizes: list[int], rounds: int) -> dict[str, object]:
    """A row of the JSON: times of all contenders at all sizes of batches, and bytes."""
    torch.manual_seed(0)
    full, full_bytes = full_tables(setting)
    packed, packed_bytes = packed_tables(setting)
    times = {}
    for size in sizes:
        ids = setting.tables * size * setting.bag
        count = max(4, min(200, 100_000 // ids))
        times[size] = medians(full | packed, batches(setting, size, count), rounds)
    return asdict(setting) | {
        "microseconds": times,
        "full_bytes": full_bytes,
        "cce_bytes": packed_bytes,
    }


def shown(row: dict[str, object]) -> str:
    """A row of the table for each size of batches."""
    lines = []
    ids = f"{row['tables']} x {row['ids']:.0e}, {'Zipf' if row['zipf'] else 'uniform'}"
    for size, times in row["microseconds"].items():
        ratios = [
            times["CCE, fused"] / times["full, TorchRec"],
            times["CCE, fused, tensors"] / times["full, operator"],
            times["CCE, portable"] / times["full, TorchRec"],
        ]
        cells = [ids, row["bag"], row["data_type"], size]
        micros = [times[n] for n in ("full, TorchRec", "full, operator", "CCE, fused")]
        micros += [times["CCE, portable"]]
        text = [*map(str, cells), *(f"{t:.0f}" for t in micros), *(f"{r:.2f}" for r in ratios)]
        lines.append(f"| {' | '.join(text)} |")
    return "\n".join(lines)


HEADER = (
    "| tables, ids | bag | rows | batch | full, TorchRec | full, operator | CCE fused "
    "| CCE portable | fused / TorchRec | fused / operator, tensors | portable / TorchRec |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def main() -> None:
    """Prints a table and writes --json after every setting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small tables, seconds")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 64, 4096], help="of batches")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
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

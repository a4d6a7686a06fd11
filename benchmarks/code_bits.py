"""`python -m benchmarks.code_bits`: how fast codes of any number of bits are expanded into rows.

The ids of one batch become codebook rows by the compiled kernel, from codes of each number of bits
and from whole ones of 8 or 16 bits, in turn in one run. Tables are as large as memory has no cache
for, since an id costs one visit there whatever its codes are.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.machine import device_name
from cce_torchrec import CCEEmbeddingBagConfig
from cce_torchrec.codes.chunk_codes import ChunkCodes
from cce_torchrec.lookup import native
from cce_torchrec.lookup.table_lookup import TableLookup
from cce_torchrec.table import Table
from cce_torchrec.versions import installed_versions

CPU = torch.device("cpu")
BITS = (1, 2, 3, 4, 6, 8, 10, 12, 14, 16)


def lookup(bits: int, chunks: int, num_ids: int) -> TableLookup:
    """A table whose codes have `bits` bits."""
    config = CCEEmbeddingBagConfig(
        name="t", num_embeddings=num_ids, embedding_dim=4 * chunks, num_chunks=chunks,
        feature_names=["f"], num_rows=2**bits, num_helper_rows=3 * 2**bits,
    )  # fmt: skip
    codes = ChunkCodes(Table(config), range(chunks), CPU)
    assert codes.packing.bits == bits
    return TableLookup(codes.table, [0], codes, list(range(chunks)))


def measured(
    tables: list[TableLookup], batches: list[torch.Tensor], rounds: int
) -> list[list[float]]:
    """Milliseconds of each table, batch by batch in turn."""
    out = torch.empty(2 * len(tables[0].columns) * len(batches[0]), dtype=torch.int64)
    seconds: list[list[float]] = [[] for _ in tables]
    for turn in range(rounds):
        ids = batches[turn % len(batches)]
        for table, found in zip(tables, seconds, strict=True):
            job = table.job(ids, out)
            began = time.perf_counter()
            native.expand([job])
            found.append(1e3 * (time.perf_counter() - began))
    return seconds


def main() -> None:
    """Prints a table and writes --json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ids", type=int, default=20_000_000)
    parser.add_argument("--batch", type=int, default=131_072, help="ids looked up at once")
    parser.add_argument("--chunks", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not native.available():
        parser.error("the compiled expansion is not built; install a C++ compiler and the package")
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(args.ids, (args.batch,), generator=generator) for _ in range(8)]
    rows = []
    print("| chunks | bits | ms | of whole codes | bytes an id | of whole codes |")
    print("| --- | --- | --- | --- | --- | --- |")
    for chunks in args.chunks:
        whole = {bits: lookup(bits, chunks, args.ids) for bits in (8, 16)}
        for bits in tqdm(BITS, leave=False, disable=None):
            peer = 8 if bits <= 8 else 16
            own = lookup(bits, chunks, args.ids)
            times = measured([own, whole[peer]], batches, args.rounds)
            ms, peer_ms = map(statistics.median, times)
            ratios = [a / b for a, b in zip(*times, strict=True)]
            row = {"chunks": chunks, "bits": bits, "ms": ms, "peer_bits": peer, "peer_ms": peer_ms}
            rows.append(row | {"ratio": statistics.median(ratios)})
            print(
                f"| {chunks} | {bits} | {ms:.2f} | {rows[-1]['ratio']:.2f} "
                f"| {chunks * bits / 8:g} | {bits / peer:.2f} |"
            )
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

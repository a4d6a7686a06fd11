"""Folders of runs as the training program leaves them, made up: `python -m tests.support.runs`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch

from cce_torchrec.checkpoint.distributions import distribution
from cce_torchrec.checkpoint.health import chunk_health
from cce_torchrec.checkpoint.health_warnings import warnings_of

TABLES = [("tailnum", 4_043), ("flight", 3_844), ("origin_dest", 224), ("carrier", 16)]
"""Names and numbers of ids, much as flights have them; the last one stays plain."""
STARTED = 1_760_000_000.0
EVERY = 25
"""Steps of a line of training."""


def write_run(
    folder,
    *,
    seed=0,
    rows=96,
    steps=3000,
    epochs=5,
    ranks=2,
    learning_rate=0.03,
    compressed=True,
    state="finished",
    error=None,
):
    """A run with all its files, finished or as far as `state` lets it be."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    tables = [_table(name, ids, rows, ranks, compressed) for name, ids in TABLES]
    clusterings = [steps * place // 12 for place in range(1, 9)] if compressed else []
    done = steps if state == "finished" else int(steps * 0.6)
    lines = list(_lines(random, tables, clusterings, steps, epochs, ranks, learning_rate, done))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {
        "model": "dlrm", "dataset": "flights", "method": "cce" if compressed else "full",
        "embedding_dim": 16, "num_rows": rows if compressed else None, "recipe": "auto",
        "epochs": epochs, "batch_size": 4096, "optimizer": "rowwise_adagrad", "lr": learning_rate,
        "dense_lr": 0.001, "finalize": False, "seed": seed, "out": str(folder),
    }  # fmt: skip
    run = {
        "state": state, "error": error, "started": STARTED,
        "ended": None if state == "running" else STARTED + lines[-1]["seconds"],
        "world_size": ranks, "device": "cpu", "settings": settings,
        "versions": {"torch": "2.13.0", "fbgemm": "1.8.0", "torchrec": "1.8.0"},
        "tables": tables, "epochs": epochs, "steps_per_epoch": steps // epochs,
        "clustering_steps": clusterings,
    }  # fmt: skip
    _write(folder / "run.json", run)
    (folder / "config.yaml").write_text(
        "".join(f"{k}: {json.dumps(v)}\n" for k, v in settings.items())
    )
    if state == "finished":
        _write(folder / "health.json", {"step": steps, "tables": _health(random, tables)})
        _write(folder / "summary.json", {"seconds": lines[-1]["seconds"], "settings": settings})
    return folder


def _write(file, found):
    file.write_text(json.dumps(found, indent=1) + "\n")


def _table(name, ids, rows, ranks, compressed):
    full = 4 * 16 * ids
    common = {"name": name, "features": name.split("_"), "num_embeddings": ids,
              "embedding_dim": 16, "full_bytes": full}  # fmt: skip
    if not compressed or ids < 100:
        return common | {
            "kind": "plain", "num_chunks": None, "num_rows": None, "num_helper_rows": None,
            "code_bits": None, "recipe": None, "codebook_bytes": full, "code_bytes": 0,
            "optimizer_bytes": 4 * ids, "sharding": "table_wise", "ranks": [0],
        }  # fmt: skip
    rows = min(rows, ids // 8)
    bits = (rows - 1).bit_length()
    return common | {
        "kind": "CCE", "num_chunks": 4, "num_rows": rows, "num_helper_rows": 3 * rows,
        "code_bits": bits, "recipe": "frequent", "codebook_bytes": 4 * rows * 64,
        "code_bytes": ids * 4 * bits // 8, "optimizer_bytes": 4 * rows * 16,
        "sharding": "table_wise", "ranks": [len(name) % ranks],
    }  # fmt: skip


def _lines(random, tables, clusterings, steps, epochs, ranks, rate, done):
    """Lines of metrics.jsonl, of curves that fall, and rise a little after each clustering."""
    budget = sum(table["codebook_bytes"] for table in tables) / sum(t["full_bytes"] for t in tables)
    floor, seconds = 0.405 + 0.012 * (1 - budget), 0.0
    for step in range(EVERY, done + 1, EVERY):
        since = min([step - c for c in clusterings if c < step] or [10**6])
        loss = floor + 0.27 * np.exp(-step / 260) + 0.03 * np.exp(-step / 1500)
        loss += 0.02 * np.exp(-since / 60)
        speed = 61_000 * (1 - 0.3 * np.exp(-step / 50)) * (1 + 0.03 * random.normal())
        seconds += EVERY * 4096 / speed
        yield {
            "kind": "train", "step": step, "epoch": 1 + step * epochs // (steps + 1),
            "examples": EVERY * 4096, "loss": loss + 0.004 * random.normal(),
            "auc": 0.5 + 0.9 * (0.69 - loss) + 0.004 * random.normal(),
            "examples_per_second": speed,
            "examples_per_second_per_rank": [speed / ranks] * ranks,
            "rates": {"tables": rate * min(1, step / 200), "dense": 0.001},
            "memory": [int(4e8 + 3e7 * r + 2e5 * np.log(step)) for r in range(ranks)],
            "seconds": seconds,
        }  # fmt: skip
        if step in clusterings:
            line = _clustering(random, tables, step, clusterings.index(step))
            seconds += line["seconds"]
            yield line
        if step % (steps // (2 * epochs)) == 0:
            val = floor + 0.006 + 0.25 * np.exp(-step / 300) + 0.02 * np.exp(-step / 1200)
            yield {
                "kind": "validation", "step": step, "epoch": 1 + step * epochs // (steps + 1),
                "log_loss": val, "auc": 0.5 + 0.9 * (0.69 - val), "examples": 67_000,
                "seconds": seconds,
            }  # fmt: skip
        if step % (steps // epochs) == 0:
            yield {"kind": "checkpoint", "step": step, "seconds": seconds, "bytes": 2_000_000,
                   "path": f"checkpoints/step-{step:09d}-0001"}  # fmt: skip
            yield {"kind": "epoch", "epoch": step * epochs // steps, "step": step,
                   "train_loss": loss, "val_log_loss": loss + 0.01, "val_auc": 0.74,
                   "seconds": seconds}  # fmt: skip


def _clustering(random, tables, step, number):
    chunks = [
        {
            "table": f"sparse.{table['name']}", "chunk": chunk, "ids": table["num_embeddings"],
            "objective_before": (before := table["num_embeddings"] * (0.05 + 0.02 * number)),
            "objective_after": before * (0.4 + 0.02 * random.random()),
            "changed": float(0.9 * 0.75**number + 0.02 * random.random()),
            "empty_clusters": int(random.integers(0, 3)), "dead_rows": int(random.integers(0, 3)),
            "imbalance": float(1.2 + 0.1 * number + 0.2 * random.random()), "seconds": 0.01,
        }
        for table in tables if table["kind"] == "CCE" for chunk in range(4)
    ]  # fmt: skip
    total = {name: sum(chunk[name] for chunk in chunks)
             for name in ("objective_before", "objective_after", "empty_clusters", "dead_rows",
                          "seconds")}  # fmt: skip
    changed = float(np.mean([chunk["changed"] for chunk in chunks]))
    most = max(chunk["imbalance"] for chunk in chunks)
    return {"kind": "clustering", "step": step, **total, "changed": changed, "imbalance": most,
            "chunks": chunks}  # fmt: skip


def _health(random, tables):
    """TABLEs of health.py, of random codes and rows."""
    out = []
    for table in tables:
        ids, rows, helper = (table[n] for n in ("num_embeddings", "num_rows", "num_helper_rows"))
        sums = distribution(random.gamma(1.5, 0.02, 4 * (rows or ids)))
        state = {"sum": {"rows": rows or ids, "looked_at": rows or ids, "zero": 0,
                         "not_finite": 0, "values": sums}}  # fmt: skip
        found = {
            "table": f"sparse.{table['name']}", "kind": table["kind"], "num_embeddings": ids,
            "embedding_dim": 16, "dtype": "float32",
            "optimizer": {"kind": "RowWiseAdagrad", "bytes": table["optimizer_bytes"],
                          "state": state},
        }  # fmt: skip
        if table["kind"] == "plain":
            norms = random.gamma(9, 0.08, ids)
            found |= {"untouched": 0.0, "rows": {"rows": ids, "looked_at": ids, "zero": 0,
                      "not_finite": 0, "norms": distribution(norms)}}  # fmt: skip
        else:
            found |= {"num_chunks": 4, "num_rows": rows, "num_helper_rows": helper,
                      "learned_codes": True, "clusterings": 8}  # fmt: skip
            found["chunks"] = [_chunk(random, ids, rows, helper, chunk) for chunk in range(4)]
        out.append(found | {"warnings": warnings_of(found)})
    return out


def _chunk(random, ids, rows, helper, chunk):
    shares = random.gamma(1.2, 1, rows)
    if chunk == 2 and rows > 40:  # so that there is something to warn of
        shares[: rows // 4] = 0
    codes = torch.from_numpy(random.choice(rows, ids, p=shares / shares.sum()))
    mains = torch.from_numpy(random.normal(0, 0.2, (rows, 4)) * random.gamma(6, 0.2, (rows, 1)))
    helpers = torch.from_numpy(random.normal(0, 0.07, (helper, 4)))
    hashed = torch.from_numpy(random.integers(0, helper, ids))
    return chunk_health(codes, mains, helpers, hashed, chunk=chunk)


def write_older_run(folder, epochs=3):
    """As runs were before they had run.json: a line an epoch without a kind, and summary.json."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"epoch": e, "train_loss": 0.5 - 0.02 * e, "val_log_loss": 0.49 - 0.02 * e,
         "val_auc": 0.7 + 0.01 * e, "seconds": 9.5}
        for e in range(1, epochs + 1)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _write(
        folder / "summary.json",
        {"best_val_log_loss": 0.43, "best_val_auc": 0.73, "table_bytes": 478_228,
         "compression_ratio": 12.1, "examples_per_second": 51_000.0, "clustering_seconds": 1.5,
         "seconds": 9.5 * epochs, "world_size": 2, "device": "cpu",
         "settings": {"model": "dlrm", "lr": 0.03}, "versions": {"torch": "2.13.0"}},
    )  # fmt: skip
    return folder


if __name__ == "__main__":
    root = Path(sys.argv[1])
    write_run(root / "cce")
    write_run(root / "cce-small", seed=1, rows=32, learning_rate=0.05)
    write_run(root / "full", seed=2, compressed=False, ranks=1)
    write_run(root / "failed", seed=3, state="failed", error="rank 1: not enough memory <for> it")
    write_run(root / "running", seed=4, state="running")
    write_older_run(root / "older")

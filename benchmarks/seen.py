"""`python -m benchmarks.seen [--quick] [--json FILE]`: `weights="seen"` where most ids are unseen.

Synthetic clicks: 90% of a table's ids never occur, neither in training nor in validation. A GMF
(sigmoid of id . context + biases, the contexts in a plain table) is trained with 8 clusterings,
once with K-means over all ids and once over seen ids. Reported per seed: validation log loss at
the end, and by how much each clustering step raises it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec import KeyedJaggedTensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from benchmarks.machine import device_name
from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig
from cce_torchrec.clustering import ClusteringSchedule, cluster
from cce_torchrec.versions import installed_versions


@dataclass(frozen=True)
class Setting:
    """Size of the problem and of the model."""

    num_ids: int = 50_000
    seen_share: float = 0.1
    contexts: int = 50
    groups: int = 64
    """Latent groups of ids; an id's taste is its group's plus noise."""
    noise: float = 0.3
    rows: int = 128
    dim: int = 16
    batch: int = 4096
    steps: int = 1000
    clusterings: int = 8
    lr: float = 0.1
    initial_std: float = 0.2


class Clicks:
    """Draws of (id, context, label) from fixed latent tastes; only some ids occur."""

    def __init__(self, s: Setting, seed: int) -> None:
        self._g = torch.Generator().manual_seed(seed)
        group = torch.randint(0, s.groups, (s.num_ids,), generator=self._g)
        tastes = torch.randn(s.groups, s.dim, generator=self._g)[group]
        self._tastes = tastes + s.noise * torch.randn(s.num_ids, s.dim, generator=self._g)
        self._contexts = torch.randn(s.contexts, s.dim, generator=self._g)
        self._contexts[:, 0] = 2  # some ids are liked more, whatever the context
        order = torch.randperm(s.num_ids, generator=self._g)
        self._occurring = order[: int(s.num_ids * s.seen_share)]

    def draw(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """ids, contexts and labels, [count] each."""
        at = torch.randint(0, len(self._occurring), (count,), generator=self._g)
        ids = self._occurring[at]
        contexts = torch.randint(0, len(self._contexts), (count,), generator=self._g)
        logits = (self._tastes[ids] * self._contexts[contexts]).sum(1) / 2
        labels = (torch.rand(count, generator=self._g) < logits.sigmoid()).float()
        return ids, contexts, labels


class Factors(nn.Module):
    """Logit of a click: dot product of an id's and a context's embedding."""

    def __init__(self, s: Setting) -> None:
        super().__init__()
        self.tables = CCEEmbeddingBagCollection(
            tables=[
                CCEEmbeddingBagConfig(
                    name="ids", num_embeddings=s.num_ids, embedding_dim=s.dim,
                    feature_names=["id"], num_rows=s.rows, track_seen=True,
                ),
                EmbeddingBagConfig(
                    name="contexts", num_embeddings=s.contexts, embedding_dim=s.dim,
                    feature_names=["context"],
                ),
            ]
        )  # fmt: skip
        with torch.no_grad():
            for bag in self.tables.embedding_bag_collection.embedding_bags.values():
                bag.weight.normal_(std=s.initial_std)
        parameters = list(self.tables.parameters())
        apply_optimizer_in_backward(RowWiseAdagrad, parameters, {"lr": s.lr})

    def forward(self, ids: torch.Tensor, contexts: torch.Tensor) -> torch.Tensor:
        lengths = torch.ones(2 * len(ids), dtype=torch.long)
        kjt = KeyedJaggedTensor(["id", "context"], torch.cat([ids, contexts]), lengths=lengths)
        out = self.tables(kjt)
        return (out["id"] * out["context"]).sum(1)


def loss_of(model: Factors, rows: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Mean log loss of (ids, contexts, labels)."""
    ids, contexts, labels = rows
    return binary_cross_entropy_with_logits(model(ids, contexts), labels)


def train(s: Setting, seed: int, weights: str | None) -> dict[str, float]:
    """Validation log loss at the end, and its mean rise over a clustering step."""
    torch.manual_seed(seed)
    clicks, model = Clicks(s, seed), Factors(s)
    held_out = clicks.draw(20_000)
    schedule = ClusteringSchedule.evenly(s.steps, s.clusterings)
    rises = []

    def validate() -> float:
        model.eval()  # evaluation marks no id as seen
        with torch.no_grad():
            loss = float(loss_of(model, held_out))
        model.train()
        return loss

    for step in range(1, s.steps + 1):
        loss_of(model, clicks.draw(s.batch)).backward()
        if schedule.due(step):
            before = validate()
            cluster(model, weights=weights)
            rises.append(validate() - before)
    return {"loss": validate(), "rise": statistics.mean(rises)}


def main() -> None:
    """Prints the table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, a short run")
    parser.add_argument("--json", type=Path, default=Path("runs/seen.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = [Setting(rows=128), Setting(rows=1024)]
    if args.quick:
        settings = [Setting(steps=80)]
    seeds = range(1 if args.quick else 5)
    measured = []
    for setting in settings:
        runs = {
            name: [train(setting, seed, weights) for seed in seeds]
            for name, weights in (("all ids", None), ("seen ids", "seen"))
        }
        measured.append({"setting": asdict(setting), "runs": runs})
        print(f"{setting.rows} main rows; {setting.num_ids} ids, {setting.seen_share:.0%} seen")
        pairs = list(zip(runs["seen ids"], runs["all ids"], strict=True))
        for key in ("loss", "rise"):
            for name, results in runs.items():
                show(f"{name}, {key}", [r[key] for r in results])
            show(f"difference per seed, {key}", [a[key] - b[key] for a, b in pairs])
    report = {
        "device": device_name(torch.device("cpu")),
        "threads": 1,
        "versions": installed_versions(),
        "rows": measured,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(report, indent=1) + "\n")
    print(args.json)


def show(name: str, values: list[float]) -> None:
    """Prints mean and standard deviation."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    print(f"  {name:30}{statistics.mean(values):9.4f} +- {spread:.4f}", flush=True)


if __name__ == "__main__":
    main()

"""What a model should do, as plainly as it can be said: a dictionary of rows.

Hashes are those of Steele et al. (SplitMix64) and Dietzfelbinger et al. (multiply-shift), written
anew in Python's integers, so that neither they nor the packing of codes are taken on trust.
"""

from __future__ import annotations

import functools
import math
import zlib

import numpy as np

from benchmarks.hard.specs import EPS, OPTIMIZERS, BatchSpec, ModelSpec, State, TableSpec

MASK = 2**64 - 1
CODE, HELPER, RAW, COUNT = 0, 1, 3, 4
PRIOR, BASE, LEVELS = 20, 1.5, 16


def mix(x: int) -> int:
    """SplitMix64's bijection of 64 bits."""
    z = x & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def output(state: int) -> int:
    """What SplitMix64 gives next."""
    return mix(state + 0x9E3779B97F4A7C15)


@functools.lru_cache(maxsize=100_000)
def function(seed: int, table: str, chunk: int, role: int, round_: int) -> tuple[int, int]:
    """Multiplier and addend."""
    state = output((seed & MASK) ^ zlib.crc32(table.encode()))
    for part in (chunk, role):
        state = output(state ^ part)
    state = output(state ^ round_)
    return output(state) | 1, output(state ^ 0xADD)


def bits31(hash_: tuple[int, int], id_: int) -> int:
    """31 hashed bits."""
    return ((mix(id_) * hash_[0] + hash_[1]) & MASK) >> 33


def hashed_row(hash_: tuple[int, int], id_: int, rows: int) -> int:
    """A row in [0, rows)."""
    return bits31(hash_, id_) * rows >> 31


class Reference:
    """The same model; `state` is what the last comparison left."""

    def __init__(self, spec: ModelSpec, state: State, sharded: bool) -> None:
        self.spec, self.sharded = spec, sharded
        self.frozen = {table.name for table in spec.tables if table.frozen}
        self.take(state)

    def take(self, state: State) -> None:
        """Goes on from `state`."""
        self.state = state
        self.weights = {k: v.double().numpy() for k, v in state.weights.items()}
        self.optimizer = {
            name: {k: v.double().numpy() for k, v in kept.items()}
            for name, kept in state.optimizer.items()
        }

    def helper_rows(self, table: TableSpec) -> int:
        """Of a chunk, now."""
        return 0 if table.name in self.state.finalized else table.helper

    def main_rows(self, table: TableSpec) -> int:
        """Of a chunk, now."""
        return table.rows + table.helper - self.helper_rows(table)

    def rows_of(self, table: TableSpec, id_: int) -> list[tuple[str, list[int]]]:
        """What an id reads: of each chunk (or the plain table) these rows, which are added up."""
        if not table.chunks:
            return [(table.name, [id_])]
        out = []
        for chunk in range(table.chunks):
            if table.learned:
                rows = [int(self.state.codes[table.name][id_, chunk])]
            else:
                own = function(table.seed, table.name, chunk, CODE, 0)
                rows = [hashed_row(own, id_, self.main_rows(table))]
            helper = self.helper_rows(table)
            if helper:
                rounds = self.state.clusterings[table.name]
                own = function(table.seed, table.name, chunk, HELPER, rounds)
                rows.append(self.main_rows(table) + hashed_row(own, id_, helper))
            out.append((f"{table.name}#{chunk}", rows))
        return out

    def read_by(self, table: TableSpec, feature: str, id_: int) -> list[tuple[str, list[int]]]:
        """The same of a feature's id, in the order of its embedding."""
        read = self.rows_of(table, self.own_id(table, feature, id_)[0])
        # Ids of features follow each other in the order of these.
        turn = table.features.index(feature) % len(read) if table.rotated else 0
        return read[turn:] + read[:turn]

    def vector(self, table: TableSpec, feature: str, id_: int) -> np.ndarray:
        """The embedding of a feature's id."""
        read = self.read_by(table, feature, id_)
        return np.concatenate([self.weights[name][rows].sum(0) for name, rows in read])

    def own_id(self, table: TableSpec, feature: str, id_: int) -> tuple[int, bool]:
        """The id of the table that a feature's is, and whether it was in bounds."""
        ids = table.ranges[feature]
        if table.hashed and table.chunks:
            name = f"{table.name}#{ids.start}" if table.joint else table.name
            key = function(table.seed, name, 0, RAW, 0)[1]
            return ids.start + (mix((id_ & MASK) ^ key) >> 1) % len(ids), True
        inside = 0 <= id_ < len(ids)
        return ids.start + (id_ if inside else 0), inside

    def pooled(self, batch: BatchSpec) -> np.ndarray:
        """The output [bags, width]."""
        bags = batch.bags_of(self.spec)
        columns = []
        for table, feature in self.spec.slots():
            width = table.width * max(1, table.chunks)
            rows = []
            for bag in bags[feature]:
                total = np.zeros(width)
                for id_, weight in bag:
                    total += weight * self.vector(table, feature, id_)
                rows.append(total / len(bag) if table.mean and bag else total)
            columns.append(np.stack(rows))
        return np.concatenate(columns, 1)

    def invalid(self, batch: BatchSpec) -> int:
        """Ids out of bounds, each counted for every table that reads it."""
        bags = batch.bags_of(self.spec)
        return sum(
            not self.own_id(table, feature, id_)[1]
            for table, feature in self.spec.slots()
            for bag in bags[feature]
            for id_, _ in bag
        )

    def gradients(self, batches: list[BatchSpec]) -> dict[str, dict[int, np.ndarray]]:
        """Gradient of each row that is read, per chunk or plain table; the mean of all ranks."""
        out: dict[str, dict[int, np.ndarray]] = {name: {} for name in self.weights}
        width = sum(t.width * max(1, t.chunks) for t, _ in self.spec.slots())
        for batch in batches:
            bags, outer = batch.bags_of(self.spec), batch.coefficients(width).double().numpy()
            first = 0
            for table, feature in self.spec.slots():
                for number, bag in enumerate(bags[feature]):
                    for id_, weight in bag:
                        share = weight / (len(bag) if table.mean else 1) / len(batches)
                        at = first
                        for name, rows in self.read_by(table, feature, id_):
                            part = share * outer[number, at : at + table.width]
                            at += table.width
                            for row in rows:
                                out[name][row] = out[name].get(row, 0) + part
                first += table.width * max(1, table.chunks)
        return out

    def note(self, batches: list[BatchSpec]) -> None:
        """What a lookup in training notes of ids."""
        for table in self.spec.tables:
            counts = table.name in self.state.levels and self.helper_rows(table) > 0
            if counts:
                self.state.batches[table.name] += 1
            read = {
                self.own_id(table, feature, id_)[0]
                for batch in batches
                for feature in table.features
                for bag in batch.bags_of(self.spec)[feature]
                for id_, _ in bag
            }
            for id_ in read if table.name in self.state.seen else ():
                self.state.seen[table.name][id_] = 1
            if not counts:
                continue
            levels = self.state.levels[table.name]
            own = function(table.seed, table.name, 0, COUNT, self.state.batches[table.name])
            for id_ in read:
                level = int(levels[id_])
                chance = round(BASE**-level * 2**31) if level < LEVELS - 1 else 0
                levels[id_] += bits31(own, id_) < chance

    def train(self, batches: list[BatchSpec]) -> None:
        """A step of the optimizer, in double precision."""
        self.note(batches)
        for name, by_row in self.gradients(batches).items():
            table = next(t for t in self.spec.tables if t.name == name.split("#")[0])
            if table.name in self.frozen:
                continue
            weight = self.weights[name]
            gradient = np.zeros_like(weight)
            for row, value in by_row.items():
                gradient[row] = value
            before = weight.copy()
            self._step(name, gradient, sorted(by_row))
            if self.keeps_main(table):
                weight[: table.rows] = before[: table.rows]

    def keeps_main(self, table: TableSpec) -> bool:
        """Whether clusterings alone set main: of the recipe "rare"."""
        return table.recipe == "rare" and table.learned and table.helper > 0

    def _step(self, name: str, gradient: np.ndarray, touched: list[int]) -> None:
        """One step of a table. Fused optimizers leave rows that were not read as they are."""
        weight, kept = self.weights[name], self.optimizer[name]
        settings = OPTIMIZERS[self.spec.optimizer][1]
        lr, kind = settings["lr"], self.spec.optimizer
        if kind.endswith("Adagrad") and "step" in kept:
            kept["step"] = kept["step"] + 1  # torch's forms count, and use it for no update here
        if kind == "SGD":
            weight -= lr * gradient
        elif kind == "Adagrad":
            total = kept.setdefault("sum", np.zeros_like(weight)).reshape(weight.shape)
            total += gradient**2
            weight -= lr * gradient / (np.sqrt(total) + EPS)
        elif kind == "RowWiseAdagrad":
            total = kept.setdefault("sum", np.zeros(len(weight))).reshape(-1)
            total += (gradient**2).mean(1)
            weight -= lr * gradient / (np.sqrt(total) + EPS)[:, None]
        else:
            at = touched if self.sharded else slice(None)
            step = float(np.max(kept.get("step", 0.0))) + 1
            kept["step"] = np.array(step)
            first = kept.setdefault("exp_avg", np.zeros_like(weight))
            second = kept.setdefault("exp_avg_sq", np.zeros_like(weight))
            first[at] = 0.9 * first[at] + 0.1 * gradient[at]
            second[at] = 0.999 * second[at] + 0.001 * gradient[at] ** 2
            move = first[at] / (1 - 0.9**step)
            weight[at] -= lr * move / (np.sqrt(second[at] / (1 - 0.999**step)) + EPS)

    def shares(self, table: TableSpec) -> np.ndarray | None:
        """Of each id, how much of its own vector counts; None where ids are not counted."""
        if not self.state.batches.get(table.name):
            return None
        count = (BASE ** self.state.levels[table.name].double().numpy() - 1) / (BASE - 1)
        return count / (count + PRIOR)

    def points(self, table: TableSpec, chunk: int) -> np.ndarray:
        """What a clustering step clusters: the chunk of every id, shrunk where ids are counted."""
        name = f"{table.name}#{chunk}"
        weight, main = self.weights[name], self.main_rows(table)
        own = [dict(self.rows_of(table, id_))[name] for id_ in range(table.ids)]
        vectors = np.stack([weight[rows].sum(0) for rows in own])
        share = self.shares(table)
        if share is None:
            return vectors
        mean = weight[:main].mean(0) + weight[main:].mean(0)
        return share[:, None] * vectors + (1 - share[:, None]) * mean

    @staticmethod
    def close(found: np.ndarray, expected: np.ndarray, rate: float = 1e-4) -> bool:
        """Whether values are equal but for the rounding of float32."""
        scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
        largest = float(np.abs(found - expected).max(initial=0.0))
        return math.isfinite(largest) and largest <= rate * scale

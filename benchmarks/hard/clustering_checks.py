"""What must hold after a clustering step, whatever K-means found."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.hard.reference import HELPER, Reference, function, hashed_row
from benchmarks.hard.specs import State, TableSpec

SHARE = {"sum": 0.1, "exp_avg_sq": 1.0}
"""Of the old helper's mean, from which state of the new helper starts; other state is zero."""


class ClusteringCheck:
    """Compares the state after a step with that before it.

    Args:
        reference: as it was before.
        options: of the step.
        last: whether it was `finalize`.
    """

    def __init__(self, reference: Reference, options: dict[str, Any], last: bool) -> None:
        self.reference, self.options, self.last = reference, options, last

    def clustered(self, table: TableSpec) -> bool:
        """Whether the step should have taken the table."""
        ours, chosen = self.reference, self.options.get("tables")
        return bool(
            table.chunks
            and table.learned
            and ours.helper_rows(table)
            and table.name not in ours.frozen
            and (chosen is None or table.name in chosen)
            and not (self.last and table.recipe == "rare")
        )

    def weights(self, table: TableSpec) -> np.ndarray:
        """How much each id counts."""
        given = self.options.get("weights")
        if given is None:
            return np.ones(table.ids)
        if given == "seen":
            return self.reference.state.seen[table.name].double().numpy()
        weights = given.get(table.name)
        return np.ones(table.ids) if weights is None else weights.double().numpy()

    def __call__(self, after: State, report: list[dict[str, Any]]) -> None:
        """Raises AssertionError if anything is not as it must be."""
        before = self.reference.state
        told = {(chunk["table"].split(".")[-1], chunk["chunk"]): chunk for chunk in report}
        expected = {
            (table.name, chunk)
            for table in self.reference.spec.tables
            if self.clustered(table)
            for chunk in range(table.chunks)
        }
        assert set(told) == expected, (sorted(told), sorted(expected))
        for table in self.reference.spec.tables:
            name = table.name
            if not self.clustered(table):
                self._untouched(table, after)
                continue
            assert after.clusterings[name] == before.clusterings[name] + 1
            assert (name in after.finalized) == self.last
            if name in after.seen:
                assert not after.seen[name].any(), f"{name}: ids are still seen"
            if name in after.levels:
                assert after.levels[name].equal(before.levels[name])
                assert after.batches[name] == before.batches[name]
            for chunk in range(table.chunks):
                self._chunk(table, chunk, after, told[name, chunk])

    def _untouched(self, table: TableSpec, after: State) -> None:
        before = self.reference.state
        for name, weight in before.weights.items():
            if name.split("#")[0] == table.name:
                assert after.weights[name].equal(weight), f"{name} was not to be clustered"
                for key, value in before.optimizer[name].items():
                    assert after.optimizer[name][key].equal(value), (name, key)
        if table.chunks:
            assert after.codes[table.name].equal(before.codes[table.name])
            assert after.clusterings[table.name] == before.clusterings[table.name]
            assert (table.name in after.finalized) == (table.name in before.finalized)

    def _chunk(self, table: TableSpec, chunk: int, after: State, told: dict[str, Any]) -> None:
        """Codes, main rows and helper rows of one chunk."""
        ours, name = self.reference, f"{table.name}#{chunk}"
        points, weights = ours.points(table, chunk), self.weights(table)
        weight = after.weights[name].double().numpy()
        codes = after.codes[table.name][:, chunk].numpy()
        clusters = table.rows + table.helper if self.last else table.rows
        main, helper = weight[:clusters], weight[clusters:]
        assert codes.min() >= 0 and codes.max() < clusters, (name, codes)
        scale = max(1e-3, float(np.abs(points).max()))
        distances = ((points[:, None] - main[None]) ** 2).sum(-1)
        own = distances[np.arange(table.ids), codes]
        assert (own <= distances.min(1) + 1e-5 * scale**2).all(), (
            f"{name}: codes that are not nearest: {own - distances.min(1)}"
        )
        self._residuals(table, chunk, points - main[codes], helper, scale)
        if self.options.get("samples_per_centroid") is not None:
            return
        if not weights.any():
            weights = np.ones(table.ids)  # nothing was seen
        objective = float((weights * own).sum())
        assert abs(told["objective_after"] - objective) <= 1e-4 * (objective + scale**2), (
            name, told["objective_after"], objective,
        )  # fmt: skip
        changed = (codes != ours.state.codes[table.name][:, chunk].numpy()).mean()
        assert abs(told["changed"] - changed) < 1e-9, (name, told["changed"], changed)
        sizes = np.bincount(codes, weights, minlength=clusters)
        assert told["empty_clusters"] == (sizes == 0).sum(), (name, told["empty_clusters"], sizes)
        self._optimizer(table, name, after, codes, weights)

    def _residuals(
        self, table: TableSpec, chunk: int, residuals: np.ndarray, helper: np.ndarray, scale: float
    ) -> None:
        """Helper rows are mean residuals under the new hash, and zero where no id has them."""
        if self.last:
            assert not len(helper)
            return
        rounds = self.reference.state.clusterings[table.name] + 1
        own = function(table.seed, table.name, chunk, HELPER, rounds)
        rows = np.array([hashed_row(own, id_, table.helper) for id_ in range(table.ids)])
        for row in range(table.helper):
            members = residuals[rows == row]
            expected = members.mean(0) if len(members) else np.zeros(table.width)
            if not len(members):
                assert not helper[row].any(), f"{table.name}#{chunk}: helper {row} has no id"
            assert np.abs(helper[row] - expected).max() <= 1e-5 * scale, (
                f"{table.name}#{chunk}: helper {row} is {helper[row]}, not {expected}"
            )

    def _optimizer(
        self, table: TableSpec, name: str, after: State, codes: np.ndarray, weights: np.ndarray
    ) -> None:
        """State of a main row is the mean of its ids' old rows; that of the helper is a share."""
        ours = self.reference
        old_rows = ours.main_rows(table)
        clusters = table.rows + table.helper if self.last else table.rows
        old_codes = ours.state.codes[table.name][:, int(name.split("#")[1])].numpy()
        for key, old in ours.optimizer[name].items():
            new = after.optimizer[name][key].double().numpy()
            if not old.ndim or len(old) != old_rows + ours.helper_rows(table):
                assert np.array_equal(new, old), (name, key)
                continue
            share = SHARE.get(key)
            if share is None:
                assert not new.any(), f"{name}: {key} was to be zero"
                continue
            for row in range(clusters):
                of_cluster = (codes == row) & (weights > 0)
                expected = old[:old_rows].mean(0)
                if of_cluster.any():
                    expected = np.average(
                        old[old_codes[of_cluster]], axis=0, weights=weights[of_cluster]
                    )
                assert ours.close(new[row], expected), (name, key, row, new[row], expected)
            expected = np.broadcast_to(share * old[old_rows:].mean(0), new[clusters:].shape)
            assert ours.close(new[clusters:], expected), (name, key, "helper")

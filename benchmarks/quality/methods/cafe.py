"""CAFE: ids whose gradients are large own rows, all others share hashed ones.

Zhang et al., "CAFE: Towards Compact, Adaptive, and Fast Embedding for Large-scale Recommendation
Models", SIGMOD 2024. A HotSketch finds the hot ids while training: buckets of four slots, each with
an id and its score, where an id that finds no slot takes over the one of the lowest score.
"""

from __future__ import annotations

import torch

from benchmarks.quality.budgets import FLOAT_BYTES, DoesNotFit
from benchmarks.quality.embedder import Tables
from benchmarks.quality.hashing import hashed_rows
from benchmarks.quality.methods.of_rows import Restarted
from benchmarks.quality.rows import Block, Rows, means

_SLOTS = 4
"""In a bucket, as published."""
_SLOT_BYTES = 12
"""An id, its score and the place of its row."""
_DECAY = 0.98
"""Of all scores, so that ids that were hot make room."""
_DECAYS_A_PASS = 20
_ROUNDS = 2
"""Ids of a batch that meet in a bucket are let in one a round."""


_COLD = 0.25
"""Share of the slots, those of the lowest scores, whose ids do not have their rows yet."""


class CAFE(Restarted):
    """The form is the share of the budget that hot ids have; slots cost bytes, and are counted.

    Every slot has a row. Its id gets it, and starts from its shared row, when its score passes a
    threshold that follows the scores; an id that is thrown out goes back to its shared row.
    """

    def __init__(self, tables: Tables, *, restarts: bool) -> None:
        super().__init__(tables)
        self.restarts = restarts
        hot_share = float(tables.form.removeprefix("hot="))
        values = sum(share.values() for share in tables.shares)
        slot_values = tables.dim + _SLOT_BYTES // FLOAT_BYTES
        self.buckets = min(int(hot_share * values) // slot_values, tables.num_ids) // _SLOTS
        if self.buckets < 1:
            raise DoesNotFit(f"{values:,} values hold no bucket of {_SLOTS} rows and ids")
        self.hot_rows = self.buckets * _SLOTS
        left = (values - self.hot_rows * slot_values) / values
        self.counts = [int(left * share.values()) // tables.dim for share in tables.shares]
        if min(self.counts) < 1:
            raise DoesNotFit(f"{values:,} values leave a table no shared row")
        pairs = zip(self.counts, tables.bounds, strict=True)
        blocks = [Block(count, bound) for count, bound in pairs]
        # Rows of hot ids first, all of which are written before they are read.
        self.rows = Rows([Block(self.hot_rows, 0.0), *blocks], tables.dim, tables.training)
        self.shared = self._shared()
        self.index = self.shared.clone()
        ids = torch.arange(tables.num_ids)
        self.bucket = hashed_rows(ids, self.buckets, seed=tables.seed, table="hot ids")
        self.slot_ids = torch.full((self.buckets, _SLOTS), -1)
        self.scores = torch.zeros(self.buckets, _SLOTS)
        self.threshold = 0.0
        self._read: tuple[torch.Tensor, torch.Tensor] | None = None

    def _shared(self) -> torch.Tensor:
        """Shared rows [N] of all ids."""
        tables = self.tables
        return torch.cat(
            [
                self.rows.first[1 + t]
                + hashed_rows(
                    torch.arange(size),
                    self.counts[t],
                    seed=tables.seed,
                    table=name,
                    drawn=self.drawn,
                )
                for t, (name, size) in enumerate(zip(tables.names, tables.sizes, strict=True))
            ]
        )

    def lookup(self, ids: torch.Tensor, training: bool) -> torch.Tensor:
        """See `Embedder`."""
        flat = ids.reshape(-1)
        out = self.rows.read(self.index.index_select(0, flat), training)
        if training:
            out.retain_grad()
            self._read = (flat, out)
        return out.view(*ids.shape, self.tables.dim)

    def step(self) -> None:
        """A step of the rows, then of the sketch by the norms of the gradients."""
        if self._read is None:
            return
        ids, out = self._read
        assert out.grad is not None
        own, inverse = torch.unique(ids, return_inverse=True)
        # The mean loss divides gradients by the batch; which id is hottest does not depend on it.
        norms = torch.zeros(len(own)).scatter_add_(0, inverse, out.grad.norm(dim=1))
        self._read = None
        self.rows.step()
        self._score(own, norms)

    @torch.no_grad()
    def _score(self, ids: torch.Tensor, norms: torch.Tensor) -> None:
        """Adds `norms` to the scores of `ids`, and lets the others in."""
        buckets = self.bucket[ids]
        here = self.slot_ids[buckets] == ids[:, None]
        known = here.any(1)
        slots = here.int().argmax(1)
        self.scores[buckets[known], slots[known]] += norms[known]
        self._warm(ids[known], buckets[known], slots[known])
        left, norms = ids[~known], norms[~known]
        for _ in range(_ROUNDS):
            if not len(left):
                return
            # Of ids that meet in a bucket the last one written is let in, the others next round.
            buckets = self.bucket[left]
            winner = torch.empty(self.buckets, dtype=torch.long)
            winner[buckets] = torch.arange(len(left))
            wins = winner[buckets] == torch.arange(len(left))
            self._let_in(left[wins], norms[wins])
            left, norms = left[~wins], norms[~wins]

    def _let_in(self, ids: torch.Tensor, norms: torch.Tensor) -> None:
        """Gives each of `ids`, of different buckets, the slot of the lowest score there."""
        buckets = self.bucket[ids]
        lowest, slots = self.scores[buckets].min(1)
        thrown_out = self.slot_ids[buckets, slots]
        # SpaceSaving: the newcomer takes the score over, so that the sum of scores stays right.
        self.scores[buckets, slots] = lowest + norms
        self.slot_ids[buckets, slots] = ids
        gone = thrown_out[thrown_out >= 0]
        self.index[gone] = self.shared[gone]
        self._warm(ids, buckets, slots)

    def _warm(self, ids: torch.Tensor, buckets: torch.Tensor, slots: torch.Tensor) -> None:
        """Gives the ids of these slots their rows, if they are hot enough and have none yet."""
        rows = buckets * _SLOTS + slots
        now = (self.index[ids] != rows) & (self.scores[buckets, slots] > self.threshold)
        ids, rows = ids[now], rows[now]
        self.rows.weight[rows] = self.rows.weight[self.shared[ids]]
        self.rows.state[rows] = self.rows.state[self.shared[ids]]
        self.index[ids] = rows

    def after(self, step: int) -> None:
        """Decay of the scores several times a pass, and a restart when one is due."""
        a_pass = self.tables.steps // self.tables.passes
        if step % max(1, a_pass // _DECAYS_A_PASS) == 0:
            self.scores *= _DECAY
            self.threshold = float(self.scores.flatten().quantile(_COLD))
        super().after(step)

    def restart(self) -> None:
        """Draws the hash of the shared rows anew; each is the mean of the ids that now share it.

        Ids with rows of their own keep them, and count nowhere.
        """
        old, cold = self.shared, self.index == self.shared
        self.shared = self._shared()
        self.index[cold] = self.shared[cold]
        new = means(self.shared[cold], self.rows.weight[old[cold]], len(self.rows.weight))
        self.rows.weight[self.hot_rows :] = new[self.hot_rows :]
        self.rows.forget_state(first_block=1)

    @property
    def parameters(self) -> int:
        """See `Embedder`."""
        return self.rows.weight.numel()

    @property
    def stored_bytes(self) -> int:
        """The slots."""
        return self.hot_rows * _SLOT_BYTES

    @property
    def training_bytes(self) -> int:
        """See `Embedder`."""
        return FLOAT_BYTES * (self.parameters + self.rows.state_values) + self.stored_bytes

"""A cell of the parts `networks-*`: pairs of small ReLU networks with noise of their own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.alignment.parts import Record
from benchmarks.alignment.small_problems import PROBLEMS, Examples
from benchmarks.alignment.small_training import train_all, wrong
from cce_torchrec.alignment import Moments, debiased_cka, linear_cka

STEPS = 1000
MEMBERS = 2


@dataclass(frozen=True, kw_only=True)
class NetworkCell:
    """Pairs of networks, one pair a seed, at one noise and size."""

    problem: str
    noise: str
    """inputs, labels or flips."""
    strength: float
    """SNR, or the share of labels that are flipped."""
    size: int
    seeds: int

    @property
    def key(self) -> str:
        """Everything that changes the result, as one line."""
        return (
            f"networks|{self.problem}|{self.noise}={self.strength:g}|n={self.size}"
            f"|hidden={PROBLEMS[self.problem].hidden}|steps={STEPS}|seeds={self.seeds}|version=1"
        )

    def measure(self) -> Record:
        """CKA, debiased CKA, test error and training error of each seed."""
        problem = PROBLEMS[self.problem]
        drawn = [problem.draw(seed, self.size) for seed in range(self.seeds)]
        seen = [
            noisy(one, self.noise, self.strength, (seed, member))
            for seed, one in enumerate(drawn)
            for member in range(MEMBERS)
        ]
        inputs = torch.from_numpy(np.stack([x for x, _ in seen])).float()
        labels = torch.from_numpy(np.stack([y for _, y in seen]))
        labels = labels if problem.classes else labels.float()
        held, held_labels = (
            torch.from_numpy(np.repeat(np.stack(of), MEMBERS, axis=0))
            for of in zip(*((one.held_inputs, one.held_labels) for one in drawn), strict=True)
        )
        nets = train_all(
            inputs, labels, hidden=problem.hidden, classes=problem.classes, steps=STEPS, seed=1
        )
        hidden = nets.hidden(held.float())
        sums = [Moments.of(*hidden[i : i + 2].double()) for i in range(0, len(hidden), MEMBERS)]
        aligned = [_aligned(one) for one in sums]
        errors = wrong(nets.outputs(held.float()), held_labels, problem.classes)
        training = wrong(nets.outputs(inputs), labels, problem.classes)
        return {
            "problem": self.problem,
            "noise": self.noise,
            "strength": self.strength,
            "size": self.size,
            "alignment": _rounded([pair[0] if pair else 0.0 for pair in aligned]),
            "debiased": _rounded([pair[1] if pair else 0.0 for pair in aligned]),
            "dead": aligned.count(None),
            "error": _rounded(errors.view(-1, MEMBERS).mean(1).tolist()),
            "training": _rounded(training.view(-1, MEMBERS).mean(1).tolist()),
        }


def _aligned(sums: Moments) -> tuple[float, float] | None:
    """CKA and debiased CKA; none of a network whose hidden units are 0 on almost all examples."""
    if not min(float(sums.xx.trace()), float(sums.yy.trace())) > 0:
        return None
    found = linear_cka(sums), debiased_cka(sums)
    return found if math.isfinite(found[1]) else None


def noisy(
    examples: Examples, noise: str, strength: float, who: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """The inputs and labels that one network sees, which begin alike for each size.

    Args:
        examples: without noise.
        noise: inputs, labels or flips.
        strength: SNR, or the share of labels that are flipped, each to another class.
        who: the seed, and which network of it.
    """
    rng = np.random.default_rng([20, *who])
    inputs, labels = examples.inputs, examples.labels
    if noise == "inputs":
        return inputs + strength**-0.5 * rng.standard_normal(inputs.shape), labels
    if noise == "labels":
        return inputs, labels + strength**-0.5 * rng.standard_normal(labels.shape)
    classes = int(examples.held_labels.max()) + 1
    draws = rng.random((len(labels), 2))
    others = (labels + 1 + np.floor(draws[:, 1] * (classes - 1)).astype(np.int64)) % classes
    return inputs, np.where(draws[:, 0] < strength, others, labels)


def _rounded(values: list[float]) -> list[float]:
    return [float(f"{value:.3g}") for value in values]

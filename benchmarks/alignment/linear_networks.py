"""Linear networks of one hidden layer, trained on the same examples with noise of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize

from cce_torchrec.alignment import Moments, linear_cka

HIDDEN = 8
_START = 0.01
"""Norm of the first weights of W2, and of each row of W1."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Examples y = b'x of which each network sees inputs x + s u and labels y + t v."""

    width: int
    """d, inputs."""
    size: int
    """n, examples."""
    input_noise: float
    """s."""
    label_noise: float
    """t."""
    seed: int

    def shared(self) -> tuple[np.ndarray, np.ndarray]:
        """b, [d], of norm 1, and x, [n, d], which begins alike for each n."""
        rng = np.random.default_rng([self.seed, 0])
        b = rng.standard_normal(self.width)
        return b / np.linalg.norm(b), rng.standard_normal((self.size, self.width))

    def seen(self, member: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels of one network."""
        b, x = self.shared()
        y = x @ b
        if self.input_noise:
            rng = np.random.default_rng([self.seed, 1, member])
            x = x + self.input_noise * rng.standard_normal(x.shape)
        rng = np.random.default_rng([self.seed, 2, member])
        return x, y + self.label_noise * rng.standard_normal(len(y))


@dataclass(frozen=True)
class Trained:
    """A network at the end of its training."""

    first: np.ndarray
    """W1, [h, d]."""
    second: np.ndarray
    """W2, [h]."""
    gradient: float
    """Norm of the gradient there, by that of A'y / n times |W2|, of the squares alone at w = 0."""
    gap: float
    """How far w is from ridge regression of penalty decay / |w|, by |w|."""

    @property
    def solution(self) -> np.ndarray:
        """w, what the network computes, [d]."""
        return self.second @ self.first


@dataclass(frozen=True)
class Axes:
    """The principal axes of a network's inputs."""

    inputs: np.ndarray
    """A, [n, d]."""
    values: np.ndarray
    """Eigenvalues of A'A / n, [d]."""
    vectors: np.ndarray
    """As columns, [d, d]."""

    @classmethod
    def of(cls, inputs: np.ndarray) -> Axes:
        """Those of `inputs`, [n, d]."""
        values, vectors = np.linalg.eigh(inputs.T @ inputs / len(inputs))
        return cls(inputs, values.clip(0), vectors)


def train(axes: Axes, labels: np.ndarray, decay: float, seed: int) -> Trained:
    """Minimises squares / (2 n) + decay / 2 |weights|^2 by L-BFGS, from small random weights.

    Weights are those of the principal axes of the inputs, and each is scaled by the deviation of
    its axis. Both change the path, and not the minimum; without, small axes take far longer.

    Args:
        axes: of the inputs.
        labels: [n].
        decay: of the squared weights; more than 0.
        seed: of the first weights.
    """
    d, values = len(axes.values), axes.values
    target = axes.vectors.T @ (axes.inputs.T @ labels / len(labels))
    rng = np.random.default_rng([seed, 3])
    first = _START * d**-0.5 * rng.standard_normal((HIDDEN, d))
    second = _START * HIDDEN**-0.5 * rng.standard_normal(HIDDEN)
    # The penalty of the end, if the solution were as long as labels are: a guess will do.
    scales = 1 / np.sqrt(values + decay / max(1.0, labels.std()))
    # Of scipy's own limits of steps and of gains none is an end of training.
    options = {"maxiter": 20_000, "maxfun": 40_000, "ftol": 0.0, "gtol": 1e-3 * decay}
    found = minimize(
        _objective(values, target, decay, scales),
        np.concatenate([(first @ axes.vectors / scales).ravel(), second]),
        jac=True,
        method="L-BFGS-B",
        options=options,
    )
    w1 = found.x[: HIDDEN * d].reshape(HIDDEN, d) * scales
    w2 = found.x[HIDDEN * d :]
    w = w2 @ w1
    slope = values * w - target
    gradient = np.hypot(
        np.linalg.norm(np.outer(w2, slope) + decay * w1), np.linalg.norm(w1 @ slope + decay * w2)
    ) / (np.linalg.norm(target) * np.linalg.norm(w2))
    norm = np.linalg.norm(w)
    gap = np.linalg.norm(w - target / (values + decay / norm)) / norm
    return Trained(w1 @ axes.vectors.T, w2, float(gradient), float(gap))


def _objective(
    values: np.ndarray, target: np.ndarray, decay: float, scales: np.ndarray
) -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
    """Of the scaled weights, flat: the loss but for a constant, and its gradient."""
    d = len(values)

    def function(weights: np.ndarray) -> tuple[float, np.ndarray]:
        w1 = weights[: HIDDEN * d].reshape(HIDDEN, d) * scales
        w2 = weights[HIDDEN * d :]
        w = w2 @ w1
        slope = values * w - target
        # (slope - target)'w / 2 is the sum of squares but for that of the labels.
        loss = 0.5 * (slope - target) @ w + 0.5 * decay * (np.square(w1).sum() + w2 @ w2)
        by_first = (np.outer(w2, slope) + decay * w1) * scales
        return float(loss), np.concatenate([by_first.ravel(), w1 @ slope + decay * w2])

    return function


def alignment(one: np.ndarray, other: np.ndarray) -> float:
    """Linear CKA of the hidden activations of two networks, over all new examples.

    These are standard normal, so that mean products of activations W1 x are W1 W1'. `linear_cka`
    takes them for the sums that it otherwise has of a sample.

    Args:
        one: W1, [h, d].
        other: of the other network.
    """
    x, y = torch.from_numpy(one), torch.from_numpy(other)
    no_mean, no_norms = x.new_zeros(len(x)), x.new_zeros(3)
    sums = Moments(
        ids=1,
        weight=x.new_tensor(1.0),
        x=no_mean,
        y=no_mean,
        xx=x @ x.T,
        xy=x @ y.T,
        yy=y @ y.T,
        x_norms=no_norms,
        y_norms=no_norms,
        x_by_norms=x.new_zeros(2, len(x)),
        y_by_norms=x.new_zeros(2, len(x)),
        normed=False,
    )
    return linear_cka(sums)

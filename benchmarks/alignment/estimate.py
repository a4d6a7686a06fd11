"""What CKA between two linear networks of one hidden layer is to be expected, by a formula.

Examples are x in R^d, standard normal, with y = b'x and |b| = 1. Two networks W2 W1 of one output
are trained with weight decay on the same n examples, each with noise of its own: inputs x + s u and
labels y + t v. Both are then solutions w of ridge regression, and CKA is cos^2 of their angle,
which tends to (p / q)^2 with q = |w|^2 and p = w'w*:

    kappa: the positive root of kappa^2 + kappa (c - mu - g c) - mu c = 0,  c = 1 + s^2, g = d / n
    e = c / (c + kappa), k = g e^2, m = e / c
    q = (m^2 + k / c (1 + t^2 - 2 m)) / (1 - k)
    p = (m^2 + k / c^2 (1 - 2 m)) / (1 - k / c^2)
    mu sqrt(q) = decay

The derivation, what is left out, and where it stops holding: docs/alignment_estimate.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """What is to be expected of a pair of networks, and of one."""

    alignment: float
    """CKA of their hidden activations over new examples."""
    error: float
    """Excess error on new examples without noise, |w - b|^2; infinite at n = d without decay."""
    penalty: float
    """mu, of the ridge regression that gives w."""


def estimate(
    ratio: float,
    *,
    input_noise: float = 0.0,
    label_noise: float = 0.0,
    decay: float = 0.0,
    width: int | None = None,
) -> Estimate:
    """CKA and error that two networks have on average, see the module.

    Args:
        ratio: examples per input, n / d.
        input_noise: s, standard deviation of the noise of each input, whose own one is 1.
        label_noise: t, the same of labels.
        decay: of the squared weights of both layers.
        width: d, inputs; None: infinitely many.
    """
    c = 1 + input_noise**2
    state = _State(ratio, c, label_noise)
    penalty = _penalty(state, decay) if decay else 0.0
    m, p, q = state.at(penalty)
    error = 1 - 2 * m + q
    if not (input_noise or label_noise):
        return Estimate(1.0, error, penalty)
    cosine = p / q if math.isfinite(q) else 0.0
    if width is None:
        alignment = cosine**2
    elif input_noise:
        alignment = cosine**2 + (1 - cosine**2) ** 2 / width
    else:
        values = spectrum(ratio, width)
        shares = values / (values + penalty)
        variances = label_noise**2 / (ratio * width) * values / (values + penalty) ** 2
        alignment = of_normals(shares / width**0.5, variances)
    return Estimate(alignment, error, penalty)


@dataclass(frozen=True)
class _State:
    ratio: float
    c: float
    label_noise: float

    def at(self, mu: float) -> tuple[float, float, float]:
        """m, p and q, of penalty mu."""
        c, g, t = self.c, 1 / self.ratio, self.label_noise
        half = (c - mu - g * c) / 2
        root = math.hypot(half, math.sqrt(mu * c))
        # The same root, of which no small difference of large numbers is taken.
        kappa = root - half if half < 0 else (mu * c / (root + half) if mu else 0.0)
        e = c / (c + kappa)
        m, k = e / c, g * e**2
        if k >= 1:
            q = math.inf if c > 1 or t else 1.0
        else:
            q = (m**2 + k / c * (1 + t**2 - 2 * m)) / (1 - k)
        if k >= c**2:
            return m, 1.0, q
        return m, (m**2 + k / c**2 * (1 - 2 * m)) / (1 - k / c**2), q


def _penalty(state: _State, decay: float) -> float:
    """The mu of which mu |w| is `decay`."""
    low, high = math.log(1e-15), math.log(1e6)
    for _ in range(100):
        middle = (low + high) / 2
        mu = math.exp(middle)
        if mu * math.sqrt(state.at(mu)[2]) < decay:
            low = middle
        else:
            high = middle
    return math.exp(low)


def spectrum(ratio: float, width: int) -> np.ndarray:
    """The min(n, d) eigenvalues of A'A / n that are not 0, as quantiles of their limit law.

    A is [n, d], standard normal. Source: Marchenko and Pastur, Mathematics of the USSR 1967.

    Args:
        ratio: n / d.
        width: d.
    """
    g = 1 / ratio
    # At an angle x, l = 1 + g - 2 sqrt(g) cos x, where the density has no edges.
    angles = np.linspace(0, math.pi, 20_001)[1:-1]
    values = 1 + g - 2 * math.sqrt(g) * np.cos(angles)
    below = np.cumsum(np.sin(angles) ** 2 / values)
    count = min(round(ratio * width), width)
    return np.interp((np.arange(count) + 0.5) / count, below / below[-1], values)


def label_noise_given_inputs(values: np.ndarray, means: np.ndarray, noise: float) -> float:
    """CKA on average over the noise of labels, for the inputs at hand, without decay.

    Given them, solutions are independent draws of a normal w, with mean the projection of b and
    variance (t / s_i)^2 in the direction of the i-th singular value.

    Args:
        values: the singular values s_i of the inputs that are not 0, [k].
        means: of w in their directions, [k].
        noise: t.
    """
    return of_normals(means, (noise / values) ** 2)


def of_normals(means: np.ndarray, variances: np.ndarray) -> float:
    """The mean of cos^2 of the angle between two independent draws of one normal w.

    That is the squared norm of E[w w' / |w|^2], the integral over z > 0 of E[w w' exp(-z w'w)].

    Args:
        means: of w in the directions in which its parts are independent, [k].
        variances: of those, [k].
    """
    total = (means**2).sum() + variances.sum()
    # Over z = exp(x), where the integrand is smooth.
    x = np.linspace(math.log(1e-8 / total), math.log(1e8 / total), 4000)
    z = np.exp(x)[:, None]
    shrunk = 1 + 2 * z * variances
    weight = np.exp(-0.5 * np.log(shrunk).sum(1) - (z * means**2 / shrunk).sum(1)) * z[:, 0]
    step = x[1] - x[0]
    moved = means / shrunk
    matrix = step * (moved.T * weight) @ moved
    matrix[np.diag_indices_from(matrix)] += step * (weight[:, None] * variances / shrunk).sum(0)
    return float((matrix**2).sum())

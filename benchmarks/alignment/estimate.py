"""What CKA between two linear networks of one hidden layer is to be expected, by a formula.

The setting. Examples are x in R^d, standard normal, with y = b'x and |b| = 1. Two networks W2 W1
of one output are trained on the same n examples, each with noise of its own: inputs a = x + s u
with u standard normal, and labels y + t v with v standard normal. Training minimises

    1 / (2 n) |y + t v - A W1' W2'|^2 + decay / 2 (|W1|^2 + |W2|^2)

with A the noisy inputs, [n, d]. What follows is exact where d and n are large at g = d / n. Let c =
1 + s^2 be the variance of an input of A. Two networks' inputs have the covariance 1.

1. The hidden layer. Among all W1 and W2 with W2 W1 = w', the least |W1|^2 + |W2|^2 is 2 |w|, where
   W1 = v w' / |w|^(1/2) and W2 = |w|^(1/2) v' for a v of norm 1. So w minimises the squares plus
   decay |w|, which makes it a solution of ridge regression of penalty mu = decay / |w|. W1 has a
   single direction: over new examples, CKA of two networks is cos^2 of the angle between w and w*,

       CKA = (w'w*)^2 / (|w|^2 |w*|^2) -> (p / q)^2    with q = |w|^2, p = w'w*.

2. The cavity equations. Ridge regression has mu w_j = 1 / n sum_i a_ij e_i, with e_i the residual
   of example i. If f_i is the residual that i would have, were it left out, then e_i = f_i / (1 +
   chi) with chi = 1 / n a_i' (A'A / n + mu)^(-1) a_i, the same for all i as d grows. With kappa =
   mu (1 + chi), kappa w_j = 1 / n sum_i a_ij f_i. In the mean a_ij f_i is b_j - c w_j, as its
   covariance with y_i is b_j and f_i has -a_ij w_j. What is left, z_j, is a sum over independent
   examples, and so normal:

       (c + kappa) w_j = b_j + z_j
       var z_j = c / n F,              F = var f_i = 1 + t^2 - 2 m + c q
       cov(z_j, z_j*) = 1 / n F*,      F* = cov(f_i, f_i*) = 1 - 2 m + p

   with m = w'b, since two networks share x and b'x, and neither u nor v. A force h on w_j moves it
   by h kappa / (mu (c + kappa)), and chi is g c times that, whence kappa is the positive root of

       kappa^2 + kappa (c - mu - g c) - mu c = 0.

3. The sums over j, with e = c / (c + kappa), the share of b that is learned but for the factor
   1 / c by which noise of inputs shrinks it, and with k = g e^2:

       m = e / c
       q = m^2 + k / c (1 + t^2 - 2 m + c q)     = (m^2 + k / c (1 + t^2 - 2 m)) / (1 - k)
       p = m^2 + k / c^2 (1 - 2 m + p)           = (m^2 + k / c^2 (1 - 2 m)) / (1 - k / c^2)

   and mu from mu sqrt(q(mu)) = decay. The excess error on new examples without noise, |w - b|^2, is
   1 - 2 m + q. Noise of inputs parts p from q by factors c, noise of labels enters q alone. As
   decay -> 0, e -> min(1, n / d), the solution of smallest norm, and at n = d, k is 1 and q
   infinite: alignment is lowest, 0, and error largest at the interpolation threshold.

4. Finite d. To be expected is the mean of cos^2, not the cos^2 of means; the difference, of first
   order in 1 / d, matters where p / q is small.
   - Noise of labels alone: given the inputs, w is normal. In the direction of an eigenvalue l of
     A'A / n its mean is l / (l + mu) times that of b, and its variance t^2 / n l / (l + mu)^2.
     `of_normals` integrates cos^2 over that exactly. For l the quantiles of its limit law
     (Marchenko and Pastur) are taken, and for b one of equal parts in all directions. What is left
     out is how l and mu vary between draws: by of the order of 1 / d, but for the least l at n = d.
   - Noise of inputs: w and w* turn around b independently but for what they share, as if drawn at
     random: the variance of a correlation of d pairs, (1 - (p / q)^2)^2 / d, is added.

5. Where it does not hold. Without decay, at n = d and finite d, w is dominated by the direction of
   the least singular value, and its norm has no mean. The dip then has a width of about d^(-1/2)
   and ends above 0. With noise of labels alone that direction is the same for both networks, so
   that CKA goes up to about one half there, and large noise brings no less at any d:
   `label_noise_given_inputs` gives it exactly, for the singular values at hand. Decay helps if it
   holds mu above the least eigenvalue, about 1 / d^2.

Sources: the cavity method, Mezard, Parisi and Virasoro, 1987; ridge regression, Hastie et al.,
"Surprises in high-dimensional ridgeless least squares interpolation", Annals of Statistics 2022;
two problems on the same examples, Clarte et al., "Analysis of bootstrap and subsampling in
high-dimensional regularized regression", UAI 2024. The question is of Umar and Laio, "Signal-to-
Noise Ratio and Sample Size Govern Representational Alignment in Neural Networks", arXiv 2605.26973.
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

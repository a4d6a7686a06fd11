"""What CKA between two linear networks of one hidden layer is to be expected, by a formula.

The setting. Examples are x in R^d, standard normal, with y = b'x. Two networks W2 W1 are trained to
their end, from small weights, on the same n examples, each with noise of its own: inputs x + s u
with u standard normal, and labels y + t v with v standard normal. What follows holds where d and n
are large, at their ratio a = n / d; b has norm 1.

1. The hidden layer. Gradient descent from small weights ends where W2 W1 = w', the solution of
   least squares with the smallest norm, and keeps W1 W1' - W2' W2, which was about 0. So W1 is a
   single direction u w' / |w|^(1/2), whose hidden values are those of w'x but for a rotation and a
   scale, to which CKA does not look. Over many new examples, CKA of the two is cos^2 of the angle
   between the two solutions w and w*: (w'w*)^2 / (|w|^2 |w*|^2).

2. Their norms and their product converge, so that the estimate is (p / q)^2 with q = |w|^2 and p =
   w'w*. Of ridge regression with inputs of variance c = 1 + s^2 and a penalty that goes to 0, the
   equations of state (cavity method; for two problems on the same examples: Clarte et al.,
   "Analysis of bootstrap and subsampling", UAI 2024) are as follows. Let m = w'b, r = 1 / c, and e
   = min(a, 1) the share of directions that n examples determine. The residual of an example that is
   left out has variance 1 + t^2 - 2 m + c q, and its covariance with that of the other network is 1
   - 2 m + p, as the networks share x and b'x, and not u or v. With m = e r:

       q = (e r)^2 + k (1 + t^2 - 2 e r + c q) / c,       k = 1 / a if a > 1, and a otherwise
       p = (e r)^2 + k (1 - 2 e r + p) / c^2

   Both are linear, and so solved. Noise of the inputs parts p from q by the factors c; noise of the
   labels alone enters q alone.

3. Where it does not hold. At n = d, q is infinite: w is dominated by the direction of the smallest
   singular value of the inputs, and its norm does not converge. With noise of the inputs that
   direction is another one for each network, and the estimate, 0, is right for large d: of finite d
   the dip has a width of about d^(-1/2) and ends above 0. With noise of the labels alone it is the
   same direction for both, so that CKA is 1 there if t is large, which the estimate of means
   misses: there w given the inputs is normal with known mean and covariance, and
   `label_noise_given_inputs` integrates over it exactly.
"""

from __future__ import annotations

import math

import numpy as np


def estimate(ratio: float, input_noise: float = 0.0, label_noise: float = 0.0) -> float:
    """CKA that two networks have on average, see the module.

    Args:
        ratio: examples per input, n / d.
        input_noise: s, standard deviation of the noise of each input, whose own one is 1.
        label_noise: t, the same of labels.
    """
    c = 1 + input_noise**2
    determined, k = (1.0, 1 / ratio) if ratio > 1 else (ratio, ratio)
    mean = determined / c
    if ratio == 1 and (input_noise or label_noise):
        return 0.0
    if not (input_noise or label_noise):
        return 1.0
    q = (mean**2 + k * (1 + label_noise**2 - 2 * mean) / c) / (1 - k)
    p = (mean**2 + k * (1 - 2 * mean) / c**2) / (1 - k / c**2) if c > 1 else determined
    return (p / q) ** 2


def label_noise_given_inputs(values: np.ndarray, means: np.ndarray, noise: float) -> float:
    """CKA on average over the noise of labels, for the inputs at hand.

    Given them, solutions are independent draws of a normal w, with mean the projection of b and
    variance (t / s_i)^2 in the direction of the i-th singular value; and the mean of cos^2 of two
    draws is the squared norm of E[w w' / |w|^2], the integral over z > 0 of E[w w' exp(-z w'w)].

    Args:
        values: the singular values s_i of the inputs that are not 0, [k].
        means: of w in their directions, [k].
        noise: t.
    """
    variances = (noise / values) ** 2
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

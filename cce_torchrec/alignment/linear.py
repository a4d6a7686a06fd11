"""Measures of alignment that follow from sums over ids: CKA, Procrustes distance, CCA, SVCCA."""

from __future__ import annotations

import torch

from cce_torchrec.alignment.moments import Moments

_NONE = 1e-10
"""Directions with less than this part of the largest variance are taken for none."""


def linear_cka(sums: Moments) -> float:
    """Linear CKA: |X'Y|^2 / (|X'X| |Y'Y|) of centred vectors, in Frobenius norms.

    Range: 0 to 1; 1 if one is the other, turned, moved and scaled by one factor. Under independence
    of n ids it is about sqrt(p q) / n, with p and q the numbers of directions that carry variance;
    `debiased_cka` is 0 there. Invariant to rotations, shifts and one scale for each table.
    Cost: the sums, then O(p q).

    Source: Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019.

    Raises:
        ValueError: the vectors of a table are all the same.
    """
    xx, xy, yy = centred(sums)
    return float(xy.square().sum() / (xx.norm() * yy.norm()))


def debiased_cka(sums: Moments) -> float:
    """Linear CKA with unbiased estimates of its three parts: 0 on average under independence.

    Range: at most 1, and below 0 by chance. Invariances and cost are those of `linear_cka`.

    Source: Song et al., JMLR 2012, equation 4, for the parts; Nguyen et al., ICLR 2021, for CKA.

    Raises:
        ValueError: fewer than four ids, ids with weights, or the vectors of a table are all the
            same.
    """
    if not sums.normed:
        raise ValueError("debiased CKA needs the sums of norms; leave out norms=False")
    if sums.weighted:
        raise ValueError("debiased CKA is one of ids that count alike; leave the weights out")
    if sums.ids < 4:
        raise ValueError(f"debiased CKA is one of four ids or more, and there are {sums.ids}")
    centred(sums)  # refuses constant vectors
    (a, aa, ab), (b, _, bb) = sums.x_norms, sums.y_norms
    (xa, xb), (ya, yb) = sums.x_by_norms, sums.y_by_norms
    n, x, y = sums.ids, sums.x, sums.y
    both = _Pair(n, sums.xy, x, y)
    own_x, own_y = _Pair(n, sums.xx, x, x), _Pair(n, sums.yy, y, y)
    xy = both.unbiased(a, b, ab, xb, ya)
    xx, yy = own_x.unbiased(a, a, aa, xa, xa), own_y.unbiased(b, b, bb, yb, yb)
    return float(xy / (xx * yy).sqrt())


def procrustes_distance(sums: Moments) -> float:
    """Orthogonal Procrustes distance of the centred tables, each scaled to norm 1.

    That is the least Frobenius norm of X R - Y over orthogonal R: sqrt(2 - 2 |X'Y|_*), with the
    nuclear norm of the product. Range: 0, of tables that are equal up to a rotation, a shift and
    a scale, to sqrt(2), about which it is under independence of many ids. Cost: the sums, then
    O(p q min(p, q)).

    Source: Schoenemann, Psychometrika 1966; Ding et al., NeurIPS 2021, as a measure of alignment.

    Raises:
        ValueError: the vectors of a table are all the same.
    """
    xx, xy, yy = centred(sums)
    # The best rotation makes the product's singular values its trace.
    product = torch.linalg.svdvals(xy).sum() / (xx.trace() * yy.trace()).sqrt()
    return float((2 - 2 * product).clamp_min(0).sqrt())


def mean_cca(sums: Moments) -> float:
    """Mean of the canonical correlations of the two tables, over the narrower one's directions.

    Range: 0 to 1; about sqrt(max(p, q) / n) under independence, and 1 of any vectors where ids
    are no more than dimensions. Invariant to any invertible linear
    map of each table, and so also to noise that fills a direction: `svcca` leaves such out. Cost:
    the sums, then O((p + q)^3).

    Source: Hotelling, Biometrika 1936; Raghu et al., NeurIPS 2017.

    Raises:
        ValueError: the vectors of a table are all the same.
    """
    return _cca(sums, kept=1.0)


def svcca(sums: Moments, kept: float = 0.99) -> float:
    """`mean_cca` of the directions of largest variance alone.

    Args:
        kept: part of each table's variance that its directions have.

    Source: Raghu et al., "SVCCA", NeurIPS 2017.

    Raises:
        ValueError: the vectors of a table are all the same, or `kept` is no part.
    """
    if not 0 < kept <= 1:
        raise ValueError(f"kept={kept} is no part of the variance; give more than 0, at most 1")
    return _cca(sums, kept)


def centred(sums: Moments) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums of products of the centred vectors: x with x, x with y, y with y.

    Raises:
        ValueError: the vectors of a table are all the same.
    """
    x, y = sums.x, sums.y
    xx = sums.xx - torch.outer(x, x) / sums.weight
    yy = sums.yy - torch.outer(y, y) / sums.weight
    for which, squares, raw in (("first", xx, sums.xx), ("second", yy, sums.yy)):
        # Relative to what was added up, of which less is rounding.
        if not squares.trace() > 1e-12 * raw.trace():
            raise ValueError(
                f"all ids of the {which} table have the same vector, so that nothing can be "
                "aligned; was it trained?"
            )
    return xx, sums.xy - torch.outer(x, y) / sums.weight, yy


class _Pair:
    """Two tables, or a table and itself, of which sums without the pairs (i, i) are wanted."""

    def __init__(self, n: int, xy: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
        self._n, self._xy, self._x, self._y = n, xy, x, y

    def unbiased(self, *norms: torch.Tensor) -> torch.Tensor:
        """Song's estimate, times n (n - 3).

        Args:
            norms: sums over ids of |x|^2, |y|^2, |x|^2 |y|^2, x |y|^2, and y |x|^2.
        """
        a, b, ab, xb, ya = norms
        n, x, y = self._n, self._x, self._y
        # Sums over all pairs of ids, less the pairs (i, i), from sums over ids.
        trace = self._xy.square().sum() - ab
        sums = (x @ x - a) * (y @ y - b)
        rows = x @ self._xy @ y - x @ xb - y @ ya + ab
        return trace + sums / ((n - 1) * (n - 2)) - 2 * rows / (n - 2)


def _cca(sums: Moments, kept: float) -> float:
    xx, xy, yy = centred(sums)
    left, right = _whitening(xx, kept), _whitening(yy, kept)
    # Rounding lifts those of equal directions above 1.
    correlations = torch.linalg.svdvals(left.T @ xy @ right).clamp_max(1)
    return float(correlations.sum() / min(left.shape[1], right.shape[1]))


def _whitening(squares: torch.Tensor, kept: float) -> torch.Tensor:
    """Directions with `kept` of the variance, each divided by its standard deviation."""
    values, vectors = torch.linalg.eigh(squares)
    values, vectors = values.flip(0), vectors.flip(1)
    share = values.clamp_min(0).cumsum(0) / values.clamp_min(0).sum()
    # All up to and with the one by which the sum reaches `kept`.
    count = int((share < kept - 1e-12).sum()) + 1
    count = min(count, int((values > _NONE * values[0]).sum()))
    return vectors[:, :count] / values[:count].sqrt()

"""The estimate of CKA between linear networks, against simulation and its limits."""

import math

import numpy as np
import pytest
import torch

from benchmarks.alignment.estimate import (
    estimate,
    label_noise_given_inputs,
    of_normals,
    spectrum,
)
from benchmarks.alignment.linear_networks import Axes, Task, alignment, train
from benchmarks.alignment.network_statistics import Point, claims, mean_of
from benchmarks.alignment.small_report import threshold_of
from cce_torchrec.alignment import Moments, linear_cka


def pairs(width, size, decay, seeds, **noises):
    """CKA and error of pairs of trained networks, one of each seed."""
    aligned, errors = [], []
    for seed in range(seeds):
        task = Task(width=width, size=size, seed=seed, **noises)
        seen = [task.seen(member) for member in range(2)]
        nets = [train(Axes.of(x), y, decay, 2 * seed + i) for i, (x, y) in enumerate(seen)]
        aligned.append(alignment(nets[0].first, nets[1].first))
        errors.append(np.mean([np.square(n.solution - task.shared()[0]).sum() for n in nets]))
    return np.array(aligned), np.array(errors)


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("s, t", [(0.3, 0.0), (1.0, 0.0), (0.0, 0.3), (0.0, 3.0), (0.5, 0.5)])
def test_trained_networks_are_as_estimated(ratio, s, t):
    width, seeds = 80, 12
    expected = estimate(ratio, input_noise=s, label_noise=t, decay=0.01, width=width)
    noises = {"input_noise": s, "label_noise": t}
    found, errors = pairs(width, round(ratio * width), 0.01, seeds, **noises)
    # A Student's quantile of 1 in 1000, and what a formula for large d leaves out at this one.
    slack = 4.4 * found.std(ddof=1) / seeds**0.5 + 0.02
    assert abs(found.mean() - expected.alignment) < slack
    assert abs(errors.mean() - expected.error) < (
        4.4 * errors.std(ddof=1) / seeds**0.5 + 0.1 * expected.error
    )


@pytest.mark.parametrize("ratio", [0.3, 0.8, 1.25, 4.0])
@pytest.mark.parametrize("s, t", [(0.3, 0.0), (0.0, 0.3), (1.0, 2.0)])
def test_little_decay_is_none(ratio, s, t):
    small = estimate(ratio, input_noise=s, label_noise=t, decay=1e-8)
    none = estimate(ratio, input_noise=s, label_noise=t)
    assert small.alignment == pytest.approx(none.alignment, abs=1e-5)
    assert small.error == pytest.approx(none.error, rel=1e-5)


def test_least_norm_with_noise_of_labels():
    """Of which p and q follow from projections alone."""
    few, many = estimate(0.25, label_noise=0.5), estimate(4.0, label_noise=0.5)
    assert few.alignment == pytest.approx((0.25 / (0.25 + 0.25 * 0.25 / 0.75)) ** 2)
    assert many.alignment == pytest.approx((1 / (1 + 0.25 / 3)) ** 2)
    assert few.error == pytest.approx(0.75 + 0.25 * 0.25 / 0.75)
    assert many.error == pytest.approx(0.25 / 3)


def test_without_decay_the_threshold_is_singular():
    at = estimate(1.0, input_noise=0.3)
    assert (at.alignment, at.error) == (0.0, math.inf)
    assert 0.2 < estimate(1.0, input_noise=0.3, decay=0.01).alignment < 0.6


def test_without_noise_networks_are_the_same():
    for decay in (0.0, 0.01):
        for ratio in (0.5, 1.0, 2.0):
            assert estimate(ratio, decay=decay, width=50).alignment == 1.0


def test_finite_width_matters_with_loud_labels():
    """Two networks share the few directions of small eigenvalues, by which both are dominated."""
    assert estimate(1.0, label_noise=10, decay=0.01).alignment < 0.001
    assert estimate(1.0, label_noise=10, decay=0.01, width=80).alignment > 0.05
    wide = estimate(2.0, label_noise=1, decay=0.01, width=1000).alignment
    assert wide == pytest.approx(estimate(2.0, label_noise=1, decay=0.01).alignment, abs=3e-3)


def test_cosines_of_normals():
    rng = np.random.default_rng(0)
    means, variances = rng.standard_normal(6), rng.exponential(size=6) ** 3
    one, other = means + np.sqrt(variances) * rng.standard_normal((2, 100_000, 6))
    squares = (one * other).sum(1) ** 2 / np.square(one).sum(1) / np.square(other).sum(1)
    error = squares.std() / len(squares) ** 0.5
    assert abs(squares.mean() - of_normals(means, variances)) < 4 * error
    values = 1 / np.sqrt(variances)
    assert label_noise_given_inputs(values, means, 1.0) == pytest.approx(
        of_normals(means, variances)
    )


@pytest.mark.parametrize("ratio", [0.5, 1.0, 3.0])
def test_spectrum_has_the_moments_of_its_law(ratio):
    values = spectrum(ratio, 400)
    assert len(values) == min(400, round(400 * ratio))
    assert values.sum() / 400 == pytest.approx(1, rel=0.01)
    assert np.square(values).sum() / 400 == pytest.approx(1 + 1 / ratio, rel=0.01)


def test_training_ends_at_ridge_regression():
    task = Task(width=30, size=30, input_noise=0.5, label_noise=0.5, seed=0)
    inputs, labels = task.seen(0)
    net = train(Axes.of(inputs), labels, 0.01, 0)
    w = net.solution
    penalty = 0.01 / np.linalg.norm(w)
    ridge = np.linalg.solve(inputs.T @ inputs / 30 + penalty * np.eye(30), inputs.T @ labels / 30)
    assert np.linalg.norm(w - ridge) < 2e-3 * np.linalg.norm(w)
    assert net.gap < 2e-3 and net.gradient < 1e-3
    # Both layers share the decay equally, and the hidden layer has one direction.
    values = np.linalg.svd(net.first, compute_uv=False)
    assert values[0] == pytest.approx(np.linalg.norm(net.second), rel=1e-2)
    assert values[1] < 1e-2 * values[0]


def test_alignment_over_all_inputs_is_that_of_many():
    rng = np.random.default_rng(0)
    one, other = rng.standard_normal((2, 4, 10))
    x = rng.standard_normal((100_000, 10))
    sample = linear_cka(Moments.of(*(torch.from_numpy(x @ w.T) for w in (one, other))))
    assert alignment(one, other) == pytest.approx(sample, abs=0.01)


def test_members_share_examples_and_nothing_else():
    task = Task(width=5, size=8, input_noise=1.0, label_noise=1.0, seed=3)
    longer = Task(width=5, size=16, input_noise=1.0, label_noise=1.0, seed=3)
    (x, y), (x_other, y_other) = task.seen(0), task.seen(1)
    assert not np.isclose(x, x_other).any() and not np.isclose(y, y_other).any()
    assert np.array_equal(longer.seen(0)[0][:8], x)


def point(size, alignment, error):
    shifts = np.linspace(-0.01, 0.01, 10)
    return Point(
        signal=1.0,
        noise="SNR 1",
        size=size,
        place=size / 100,
        alignment=alignment + shifts,
        error=error + shifts,
    )


def test_claims_of_a_dip():
    curve = [point(20, 0.8, 0.9), point(100, 0.2, 0.5), point(500, 0.9, 0.1)]
    text = "\n".join(claims(curve))
    row = "| SNR 1 | 100 | 1 x | no other | 0.200 ± 0.005 | 0.800 ± 0.005 | 0.900 ± 0.005 |"
    assert f"{row} significant |" in text
    assert "significant at 1 of 1" in text and "At 1 of them" in text
    assert "larger error in 1." in text and "at n = 20 alignment is 0.800" in text


def test_claims_need_intervals():
    noise = np.random.default_rng(0).standard_normal(10)
    flat = [
        Point(
            signal=1.0, noise="SNR 1", size=n, place=n / 100, alignment=0.5 + noise * i, error=noise
        )
        for i, n in ((1, 20), (-1, 100), (3, 500))
    ]
    text = "\n".join(claims(flat))
    assert "significant |" not in text and "significant at 0 of 1" in text
    assert "Of 0 pairs" in text


def test_claims_of_no_dip():
    rising = [point(20, 0.1, 0.9), point(100, 0.2, 0.5), point(500, 0.9, 0.1)]
    assert "none: lower at the smallest n |" in "\n".join(claims(rising))
    far = [point(20, 0.8, 0.9), point(40, 0.2, 0.5), point(500, 0.9, 0.1)]
    assert "significant, elsewhere |" in "\n".join(claims(far))
    few = [point(20, 0.1, 0.9), point(40, 0.2, 0.5), point(500, 0.9, 0.1)]
    assert "no size is near |" in "\n".join(claims(few))


def test_claims_of_an_unfinished_curve():
    for count in (0, 1, 2):
        assert "at 0 of 0" in "\n".join(claims([point(20, 0.1, 0.9), point(90, 0.2, 0.5)][:count]))


def test_claims_of_a_peak():
    peak = [point(20, 0.1, 0.9), point(100, 0.2, 0.5), point(500, 0.1, 0.1)]
    assert "a peak, above the sizes next to it on both sides: SNR 1 at n = 100" in "\n".join(
        claims(peak)
    )


def test_interval_is_student_s():
    mean = mean_of(np.array([1.0, 2.0, 3.0, 4.0]))
    assert mean.value == 2.5
    assert mean.half == pytest.approx(3.182 * math.sqrt(5 / 3) / 2, rel=1e-3)
    assert mean_of(np.array([1.0, 2.0]), 10).half > mean_of(np.array([1.0, 2.0])).half


def test_threshold_is_where_training_error_leaves_0():
    records = [
        {"size": size, "training": [error, error, 1.0]}
        for size, error in zip((10, 100, 1000, 10_000), (0.0, 0.0, 0.1, 0.5), strict=True)
    ]
    assert threshold_of(records) == pytest.approx(100 * 10**0.5)
    never = [{"size": size, "training": [0.0]} for size in (10, 100)]
    assert threshold_of(never) == 10

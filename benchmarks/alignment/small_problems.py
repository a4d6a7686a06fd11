"""Examples for small networks: from a random teacher, images of digits, and flights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

HELD_OUT = 500
"""Examples, of each seed, that no network is trained on."""
_TEACHER_UNITS = 8
_LIMIT = 3.0
"""Deviations at which features of flights are cut."""


@dataclass(frozen=True)
class Examples:
    """Examples without noise: for training, which begin alike for each size, and held out."""

    inputs: np.ndarray
    """[n, d], of variance about 1."""
    labels: np.ndarray
    """[n], numbers of variance about 1, or classes."""
    held_inputs: np.ndarray
    """[HELD_OUT, d]."""
    held_labels: np.ndarray
    """[HELD_OUT]."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What networks are trained on, and how."""

    title: str
    draw: Callable[[int, int], Examples]
    """From the seed and the number of examples for training."""
    classes: int
    """0: regression."""
    hidden: int
    """Few units: unrelated networks with h of d inputs have CKA of about h / (h + d), below which
    no dip can be seen, and the threshold comes at few examples."""
    sizes: tuple[int, ...]
    """n, across the interpolation threshold."""

    @property
    def noises(self) -> dict[str, tuple[float, ...]]:
        """Strengths of each noise: of inputs and labels SNRs, of flips shares of labels."""
        of_labels = ("flips", FLIPS) if self.classes else ("labels", SNRS)
        return dict([("inputs", SNRS), of_labels])


SNRS = (0.01, 0.1, 1.0, 10.0, 100.0)
FLIPS = (0.45, 0.3, 0.15, 0.05, 0.0)


def _teacher(width: int, classes: int) -> Callable[[int, int], Examples]:
    """Standard normal inputs, labelled by a random ReLU network, or by whether that is above 0."""

    def draw(seed: int, size: int) -> Examples:
        rng = np.random.default_rng([seed, 10])
        first = rng.standard_normal((width, _TEACHER_UNITS)) / width**0.5
        second = rng.standard_normal(_TEACHER_UNITS)
        scale = np.maximum(rng.standard_normal((10_000, width)) @ first, 0) @ second
        held = rng.standard_normal((HELD_OUT, width))
        inputs = np.random.default_rng([seed, 11]).standard_normal((size, width))
        of = [
            (np.maximum(x @ first, 0) @ second - scale.mean()) / scale.std() for x in (inputs, held)
        ]
        labels, held_labels = ((y > 0).astype(np.int64) if classes else y for y in of)
        return Examples(inputs, labels, held, held_labels)

    return draw


def _chosen(inputs: np.ndarray, labels: np.ndarray, seed: int, size: int) -> Examples:
    """Random examples of a data set, others for each seed."""
    order = np.random.default_rng([seed, 12]).permutation(len(labels))
    held, own = order[:HELD_OUT], order[HELD_OUT : HELD_OUT + size]
    if len(own) < size:
        raise ValueError(f"{size} examples for training were asked, and there are {len(own)}")
    return Examples(inputs[own], labels[own], inputs[held], labels[held])


@lru_cache(maxsize=1)
def _all_digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    pixels, digits = load_digits(return_X_y=True)
    pixels = pixels[:, pixels.std(0) > 0]
    # One scale for all: most pixels of the rim are 0 but in a few images.
    pixels = (pixels - pixels.mean(0)) / pixels.std(0).mean()
    return pixels, digits.astype(np.int64)


def _digits(seed: int, size: int) -> Examples:
    """8 x 8 pixels of handwritten digits, and which of ten it is (scikit-learn)."""
    return _chosen(*_all_digits(), seed, size)


@lru_cache(maxsize=1)
def _all_flights() -> tuple[np.ndarray, np.ndarray]:
    from benchmarks.quality.problems import PROBLEMS

    dataset = PROBLEMS["flights"].load(0)
    # The few features whose ids all come often, each id as a column.
    columns = [dataset.train.dense]
    for column, (name, size) in enumerate(dataset.features.items()):
        if name in ("carrier", "origin"):
            columns.append(torch.nn.functional.one_hot(dataset.train.ids[:, column], size))
    inputs = torch.cat([part.float() for part in columns], 1).numpy()
    inputs = inputs - inputs.mean(0)
    # Deviations of rare carriers are small; divided by them, one flight would outweigh all others.
    inputs /= np.maximum(inputs.std(0), 0.2)
    # Rain comes to 40 deviations: a few flights would be most of the variance of hidden units.
    inputs = inputs.clip(-_LIMIT, _LIMIT)
    return inputs, dataset.train.labels.numpy().astype(np.int64)


def _flights(seed: int, size: int) -> Examples:
    """Weather, distance, time, carrier and airport of a flight, and whether it came late."""
    return _chosen(*_all_flights(), seed, size)


PROBLEMS = {
    "regression": Problem(
        title="regression on a random teacher",
        draw=_teacher(32, 0),
        classes=0,
        hidden=8,
        sizes=(16, 64, 128, 181, 256, 362, 512, 1024, 2048),
    ),
    "classification": Problem(
        title="classification by a random teacher",
        draw=_teacher(20, 2),
        classes=2,
        hidden=6,
        sizes=(16, 64, 128, 256, 362, 512, 724, 1024, 2048),
    ),
    "digits": Problem(
        title="classification of digits",
        draw=_digits,
        classes=10,
        hidden=6,
        sizes=(16, 64, 128, 181, 256, 362, 512, 724, 1280),
    ),
    "flights": Problem(
        title="classification of flights",
        draw=_flights,
        classes=2,
        hidden=6,
        sizes=(16, 64, 128, 181, 256, 362, 512, 1024, 4096),
    ),
}

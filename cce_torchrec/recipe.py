"""Which recipe a table is trained by, where nobody says: by the examples of its ids."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

TRAINED_BY = ("frequent", "rare")
RECIPES = (*TRAINED_BY, "auto")
RARE_BELOW = 100.0
"""Examples of an id in one pass, in the mean, below which "auto" is "rare"."""


def is_rare(examples_per_id: float, *, multiplies: bool = False) -> bool:
    """Whether "auto" is "rare", under a network that multiplies two embeddings or another one.

    Codes group users by what they like, and items by who likes them, however few examples there
    are: where the network is the product of a user and an item nothing is rare (docs/settings.md).
    """
    return not multiplies and examples_per_id < RARE_BELOW


def trains_rare(fields: Mapping[str, Any]) -> bool:
    """Whether a table of such `fields` is "rare"; what is of no use is refused elsewhere."""
    recipe, examples = fields.get("recipe"), fields.get("examples_per_id")
    if recipe == "auto" and isinstance(examples, numbers.Real):
        return is_rare(float(examples))
    return recipe == "rare"


def recipe_fields(examples_per_id: float, *, multiplies: bool = False) -> dict[str, Any]:
    """The fields of a table of "auto", which itself knows nothing of the network above it."""
    fields = {"recipe": "auto", "examples_per_id": examples_per_id}
    # As "auto" is for frequent ids.
    return fields | {"recipe": "frequent", "track_counts": True} if multiplies else fields

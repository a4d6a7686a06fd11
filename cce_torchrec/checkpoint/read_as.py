"""How a model reads the tables of a checkpoint that does not say so: features, pooling, weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cce_torchrec.checkpoint.manifest import Reading
from cce_torchrec.table import named

_POOLING = ("SUM", "MEAN")


@dataclass(frozen=True, kw_only=True)
class ReadAs:
    """What holds in place of what a checkpoint says; tables by their names or full names.

    Raises:
        ValueError: another pooling.
    """

    features: Mapping[str, Sequence[str]] = field(default_factory=dict)
    pooling: Mapping[str, str] = field(default_factory=dict)
    """SUM or MEAN."""
    weighted: bool | None = None
    """Whether bags are pooled by weights of their ids."""

    def __post_init__(self) -> None:
        for table, pooling in self.pooling.items():
            if pooling.upper() not in _POOLING:
                raise ValueError(f"table {table!r}: pooling {pooling!r} is not SUM or MEAN")

    def resolved(self, tables: Collection[str]) -> ReadAs:
        """The same by full names, which are those of `tables`.

        Raises:
            ValueError: no table is called so.
        """
        return ReadAs(
            features=_by_full_name(self.features, tables, "features"),
            pooling=_by_full_name(self.pooling, tables, "pooling"),
            weighted=self.weighted,
        )

    def reading(self, full_name: str, default: Reading) -> Reading:
        """Of one table of a resolved one, where `default` holds for the rest."""
        return Reading(
            # What a caller says wins, as a model may have been changed since.
            features=list(self.features.get(full_name, default.features)),
            pooling=self.pooling.get(full_name, default.pooling).upper(),
            weighted=default.weighted if self.weighted is None else self.weighted,
        )


def _by_full_name(
    given: Mapping[str, Any], tables: Collection[str], argument: str
) -> dict[str, Any]:
    return {
        full_name: value
        for name, value in given.items()
        for full_name in named([name], tables, argument)
    }

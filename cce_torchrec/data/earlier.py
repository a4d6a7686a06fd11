"""What an earlier run found in its data: a run that goes on from it numbers its ids alike."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cce_torchrec.data.numbering import HashedIds, Numbering, PlainIds, Vocabulary
from cce_torchrec.data.scan import Scan

_KINDS = {Vocabulary: "by a vocabulary", HashedIds: "by a hash", PlainIds: "as they are"}


@dataclass(frozen=True)
class EarlierScan:
    """A scan that is kept, by the names of its columns."""

    file: Path
    numberings: dict[str, Numbering]
    """By feature."""
    moments: dict[str, tuple[float, float]]
    """Mean and standard deviation of each dense column."""

    def print(self) -> dict[str, Any]:
        """What tells it from others, as plain values."""
        # Of what ids follow from, and not of the file, which may be written anew.
        crc = 0
        for name, numbering in sorted(self.numberings.items()):
            numbers: Any = getattr(numbering, "numbers", None)
            own = getattr(numbering, "keys", np.array([getattr(numbering, "largest", -1)]))
            crc = zlib.crc32(own.tobytes(), zlib.crc32(name.encode(), crc))
            crc = crc if numbers is None else zlib.crc32(numbers.tobytes(), crc)
        return {"crc": crc, "moments": [[name, *pair] for name, pair in self.moments.items()]}

    def begin(self, features: tuple[str, ...], numberings: list[Numbering]) -> None:
        """Has new numberings go on from those of the features that were there.

        Raises:
            ValueError: naming the column, if it is numbered otherwise now.
        """
        for name, numbering in zip(features, numberings, strict=True):
            before = self.numberings.get(name)
            if before is None:
                continue
            # Ids of another kind would read the rows of strangers, without any error.
            if type(before) is not type(numbering):
                raise ValueError(
                    f"column {name!r}: ids were numbered {_KINDS[type(before)]} in {self.file} "
                    f"and are {_KINDS[type(numbering)]} now, which makes others of them; give "
                    "--ids and files of the types that were there"
                )
            if isinstance(before, Vocabulary) and isinstance(numbering, Vocabulary):
                numbering.extend(before.keys, before.all_numbers())
            elif isinstance(before, PlainIds) and isinstance(numbering, PlainIds):
                numbering.largest = before.largest
            elif before.num_ids != numbering.num_ids:
                raise ValueError(
                    f"column {name!r}: ids were hashed into {before.num_ids} in {self.file}, and "
                    f"are into {numbering.num_ids} now; give the same --hash-size"
                )

    def finish(self, dense: tuple[str, ...], found: Scan) -> None:
        """Has dense columns that were there standardised as they were."""
        # The network was trained on values that were moved and scaled so.
        for i, name in enumerate(dense):
            if name in self.moments:
                found.mean[i], found.deviation[i] = self.moments[name]

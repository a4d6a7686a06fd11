"""Two days of clicks in Parquet files: `python docs/pipeline/make_days.py FOLDER [ROWS]`.

They stand for the files that your own logs give. Whether a user clicks on an item depends on the
groups of both, which no column tells. On the second day there are new users, new items, and a
column more, `place`.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd

USERS, ITEMS, PLACES = 2000, 1200, 12
NEW_USERS, NEW_ITEMS = 200, 100
FILES = 4


def day(number: int, rows: int) -> pd.DataFrame:
    """The clicks of day 1 or 2."""
    truth = np.random.default_rng(0)  # the same on both days
    groups = truth.normal(size=(8, 6))
    of_user = truth.integers(8, size=USERS + NEW_USERS)
    of_item = truth.integers(6, size=ITEMS + NEW_ITEMS)
    random = np.random.default_rng(number)
    second = number == 2
    user = random.integers(USERS + NEW_USERS * second, size=rows)
    item = random.integers(ITEMS + NEW_ITEMS * second, size=rows)
    price = random.lognormal(size=rows)
    logit = 2 * groups[of_user[user], of_item[item]] - 0.5 * np.log(price)
    columns = {
        "click": (random.random(rows) < 1 / (1 + np.exp(-logit))).astype(np.int8),
        "price": price,
        "user": user,  # integers, which are ids as they are
        "item": np.char.add("sku-", item.astype(str)),  # texts, which get ids by a vocabulary
    }
    if second:
        columns["place"] = np.char.add("place-", random.integers(PLACES, size=rows).astype(str))
    return pd.DataFrame(columns)


def main(folder: Path, rows: int) -> None:
    """Writes `folder/day-1` and `folder/day-2`, several files each."""
    for number in (1, 2):
        out = folder / f"day-{number}"
        out.mkdir(parents=True, exist_ok=True)
        for part, frame in enumerate(np.array_split(np.arange(rows), FILES)):
            clicks = day(number, rows).iloc[frame]
            clicks.to_parquet(out / f"part-{part}.parquet", row_group_size=2000)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 60_000)

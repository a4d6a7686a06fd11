"""From columns of Arrow to numbers and keys of ids, with the row of the first value that is bad."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from cce_torchrec.codes.hashing import mix

_TRUTH = {"true": "1", "false": "0"}
"""As pandas, Spark and SQL write columns of truth values into text."""
_WORD = 8
"""Bytes of a text that are hashed at a time."""


class BadValue(Exception):
    """A value that a column may not have, in this row of its block, counted from 0."""

    def __init__(self, row: int, column: str, what: str) -> None:
        super().__init__(what)
        self.row, self.column = row, column


@dataclass(frozen=True)
class Keys:
    """Ids before they are numbered: `values` int64 [V], and bool [V] where a value is missing.

    A key is the integer itself, or `text_keys` of a text. `lengths` int64 [n] says how many of them
    each row has, where it may be another number than 1.
    """

    values: np.ndarray
    missing: np.ndarray
    lengths: np.ndarray | None = None

    def select(self, rows: np.ndarray) -> Keys:
        """The keys of the rows for which bool [n] is true."""
        if self.lengths is None:
            return Keys(self.values[rows], self.missing[rows])
        inside = np.repeat(rows, self.lengths)
        return Keys(self.values[inside], self.missing[inside], self.lengths[rows])


@dataclass(frozen=True)
class Values:
    """A block of rows: `labels` float32 [n], `dense` float64 [n, d] with NaN where missing."""

    labels: np.ndarray
    dense: np.ndarray
    keys: Sequence[Keys]
    """By feature."""

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: np.ndarray) -> Values:
        """The rows for which bool [n] is true."""
        keys = [key.select(rows) for key in self.keys]
        return Values(self.labels[rows], self.dense[rows], keys)


def text_keys(texts: pa.LargeBinaryArray) -> np.ndarray:
    """Keys of texts in UTF-8, int64, the same in every process and on every machine.

    A state starts as SplitMix64's mix of the number of bytes, and takes in the text by 8 bytes at a
    time, little-endian, the last ones filled up with zeros: `state = mix(state ^ word)`. Of a
    billion texts two have the same key with a probability of 3 %.
    """
    _, offsets, content = texts.buffers()
    bounds = np.frombuffer(offsets, dtype=np.int64)[texts.offset :][: len(texts) + 1]
    # Eight bytes are read from any place in it.
    padded = np.append(np.frombuffer(content or b"", dtype=np.uint8), np.zeros(_WORD, np.uint8))
    starts, lengths = bounds[:-1], np.diff(bounds)
    state = mix(torch.from_numpy(lengths))
    for first in range(0, int(lengths.max(initial=0)), _WORD):
        longer = np.flatnonzero(lengths > first)
        read = padded[(starts[longer] + first)[:, None] + np.arange(_WORD)]
        read[np.arange(_WORD) >= (lengths[longer] - first)[:, None]] = 0
        words = torch.from_numpy(read.view("<i8")[:, 0].astype(np.int64))
        state[longer] = mix(state[longer] ^ words)
    return state.numpy()


def is_text(kind: pa.DataType) -> bool:
    """Whether values of this type are text."""
    checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(check(kind) for check in checks)


def is_number(kind: pa.DataType) -> bool:
    """Whether values of this type are integers, or floats that may be whole."""
    checks = (pa.types.is_integer, pa.types.is_boolean, pa.types.is_floating, pa.types.is_decimal)
    return any(check(kind) for check in checks)


def is_list(kind: pa.DataType) -> bool:
    """Whether values of this type are lists."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def cast(array: pa.Array, to: pa.DataType, column: str, wanted: str) -> pa.Array:
    """`array` as another type.

    Raises:
        BadValue: of the first value that is none; all are, where the column's type has none.
    """
    try:
        return pc.cast(array, to)
    except pa.ArrowNotImplementedError:
        what = f"values are {array.type}, and a column of {wanted}s is needed"
        raise BadValue(0, column, what) from None
    except pa.ArrowInvalid:
        row = _first_bad(array, lambda part: pc.cast(part, to))
        raise BadValue(row, column, f"{array[row].as_py()!r} is no {wanted}") from None


def _first_bad(array: pa.Array, check: Callable[[pa.Array], object]) -> int:
    """The first value at which `check` of an array fails, which it does for the whole of it."""
    good, bad = 0, len(array)  # the first `good` values pass, the first `bad` do not
    while bad - good > 1:
        middle = (good + bad) // 2
        try:
            check(array.slice(good, middle - good))
            good = middle
        except pa.ArrowInvalid:
            bad = middle
    return good


def numbers(array: pa.Array, column: str) -> np.ndarray:
    """float64 [n], NaN where a value is missing.

    Raises:
        BadValue: a value is no number, or infinite.
    """
    # float64: standardised later, which float32 would do badly for large numbers such as times.
    try:
        read = cast(array, pa.float64(), column, "number")
    except BadValue:
        if not is_text(array.type):
            raise
        read = cast(_truth_as_numbers(array), pa.float64(), column, "number")
    found = read.to_numpy(zero_copy_only=False)
    infinite = np.isinf(found)
    if infinite.any():
        raise BadValue(int(infinite.argmax()), column, "the value is infinite; leave it out")
    return found


def _truth_as_numbers(array: pa.Array) -> pa.Array:
    """Texts "true" and "false", of any case, as 1 and 0; others as they are."""
    lower = pc.utf8_lower(array)
    for text, number in _TRUTH.items():
        array = pc.if_else(pc.equal(lower, text), number, array)
    return array


def labels(array: pa.Array, column: str) -> np.ndarray:
    """float32 [n].

    Raises:
        BadValue: a label is missing, or neither 0 nor 1.
    """
    found = numbers(array, column)
    bad = (found != 0) & (found != 1)  # NaN too
    if bad.any():
        row = int(bad.argmax())
        what = "the label is missing" if np.isnan(found[row]) else f"the label is {found[row]:g}"
        raise BadValue(row, column, f"{what}; it has to be 0 or 1")
    return found.astype(np.float32)


def keys(array: pa.Array, column: str, *, text: bool) -> Keys:
    """The keys of a column of ids, or of lists of them; of text "" is missing, too.

    Raises:
        BadValue: a value is no integer, where the column is one of integers.
    """
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()  # its dictionary may be larger than the block
    if is_list(array.type):
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
        try:
            inside = keys(pc.list_flatten(array), column, text=text)
        except BadValue as bad:
            raise BadValue(_row_of(bad.row, lengths), column, str(bad)) from None
        return Keys(inside.values, inside.missing, lengths.astype(np.int64))
    return _text(array, column) if text else _integers(array, column)


def _row_of(position: int, lengths: np.ndarray) -> int:
    """The row in whose list the value `position` is."""
    return int(np.searchsorted(lengths.cumsum(), position, side="right"))


def _integers(array: pa.Array, column: str) -> Keys:
    if pa.types.is_floating(array.type):
        # pandas makes floats of integers among which one is missing.
        array = pc.if_else(pc.is_nan(array), pa.scalar(None, array.type), array)
    # The same 64 bits: a key of the vocabulary or the hash may be any of them.
    if array.type == pa.uint64():
        array = array.view(pa.int64())
    found = cast(array, pa.int64(), column, "integer")
    missing = found.is_null().to_numpy(zero_copy_only=False)
    return Keys(found.fill_null(0).to_numpy(zero_copy_only=False), missing)


def _text(array: pa.Array, column: str) -> Keys:
    # Each text is hashed once, however often it is there.
    array = cast(array, pa.large_string(), column, "text").dictionary_encode()
    texts = pc.cast(array.dictionary, pa.large_binary())
    missing = array.is_null().to_numpy(zero_copy_only=False)
    if not len(texts):
        return Keys(np.zeros(len(array), dtype=np.int64), missing)
    # Where a value is missing any index does, as it is not read.
    index = array.indices.fill_null(0).to_numpy(zero_copy_only=False)
    empty = pc.equal(pc.binary_length(texts), 0).to_numpy(zero_copy_only=False)
    return Keys(text_keys(texts)[index], missing | empty[index])


def check_plain(found: Keys, column: str) -> None:
    """Refuses keys that are no ids as they are.

    Raises:
        BadValue: an id is missing or negative.
    """
    bad = found.missing | (found.values < 0)
    if not bad.any():
        return
    position = int(bad.argmax())
    row = position if found.lengths is None else _row_of(position, found.lengths)
    what = "the id is missing"
    if not found.missing[position]:
        what = f"the id {found.values[position]} (64 bits with a sign) is negative"
    raise BadValue(
        row,
        column,
        f"{what}; integers are ids as they are, from 0 on, unless they are numbered by a "
        "vocabulary or hashed (--ids vocabulary, --ids hash)",
    )

"""What another library's error says, in a sentence of ours."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of what it says, as some add frames of C++ or a dump of the file."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

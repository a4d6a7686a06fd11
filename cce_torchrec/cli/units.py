"""Types of options: numbers of bytes."""

from __future__ import annotations

from typing import Any

import click

from cce_torchrec.byte_sizes import parse_bytes


class Bytes(click.ParamType):
    """A number of bytes above 0, such as 40GB, 512MiB or 1000000."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number, of text or of one that is given already."""
        try:
            found = parse_bytes(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        # No table and no rank has none.
        if not found:
            self.fail("give more than 0 bytes", param, ctx)
        return found


BYTES = Bytes()

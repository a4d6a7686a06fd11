"""`python -m cce_torchrec.cli`, and the entry point `cce-torchrec`."""

from __future__ import annotations

import sys

from cce_torchrec.extras import MissingExtra, load_extra


def main() -> None:
    """Runs the command line; without click it says what to install."""
    try:
        load_extra("click", "cli", "the command line cce-torchrec")
    except MissingExtra as error:
        sys.exit(f"Error: {error}")
    from cce_torchrec.cli.main import command

    command(prog_name="cce-torchrec")


if __name__ == "__main__":
    main()

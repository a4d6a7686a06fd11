"""`torchrun ... -m cce_torchrec.train`: train DLRM or GMF with full or compressed tables."""

from __future__ import annotations

import sys

from cce_torchrec.extras import MissingExtra, load_extra


def main(argv: list[str] | None = None) -> None:
    """Runs the program; under torchrun with its ranks, otherwise as one."""
    try:
        load_extra("click", "cli", "the training program")
    except MissingExtra as error:
        sys.exit(f"Error: {error}")
    import click

    from cce_torchrec.train.command import command

    try:  # not click's own end, which would end a caller's process too
        command.main(argv, prog_name="cce_torchrec.train", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()

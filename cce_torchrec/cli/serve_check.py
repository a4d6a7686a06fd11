"""`cce-torchrec serve-check`: is an export what was trained?"""

from __future__ import annotations

from typing import Any

import click

from cce_torchrec.serve_options import ABOUT, OPTIONS, PURPOSE


def _check(export: str, **options: Any) -> None:
    from cce_torchrec.inference.serve_check import run

    # A wrong export is no error of the call, so no `Error:` is in front of what was found.
    if not run(export, options):
        raise SystemExit(1)


command = click.Command(
    "serve-check",
    params=[
        click.Argument(["export"]),
        *(
            click.Option(
                [f"--{one.name}"],
                type=click.Choice(one.choices) if one.choices else one.type,
                default=one.default,
                required=one.required,
                help=one.help,
            )
            for one in OPTIONS
        ),
    ],
    help=f"{PURPOSE}\n\n{ABOUT}",
    epilog="Example: cce-torchrec serve-check exports/items --data exports/examples.npz",
    callback=_check,
)

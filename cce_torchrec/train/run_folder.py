"""The folder of a run has the run of one configuration, which is in its config.yaml."""

from __future__ import annotations

import argparse
from pathlib import Path

from cce_torchrec.checkpoint.location import make_folder, write_whole
from cce_torchrec.train import config_file, options

CONFIG = "config.yaml"


def claim(args: argparse.Namespace) -> None:
    """Writes config.yaml to `args.out`, a path, unless the run of another configuration is there.

    Raises:
        ValueError: it is, and neither `overwrite` says to replace it; or it cannot be written.
    """
    file: Path = args.out / CONFIG
    # What a run of the same configuration left is written again, resumed or not.
    if file.exists() and not args.overwrite:
        _refuse_another(args, config_file.read_back(file))
    make_folder(args.out)
    write_whole(file, config_file.config_yaml(args))


def _refuse_another(args: argparse.Namespace, found: dict[str, object]) -> None:
    # What a resumed run may change is no other configuration.
    lasting = options.lasting(args)
    changes = [
        f"{config_file.option_name(name)} was {found.get(name)} and is {lasting[name]}"
        for name in config_file.names()
        if name in lasting and found.get(name) != lasting[name]
    ]
    if changes:
        raise ValueError(
            f"{args.out} has the run of another configuration: {', '.join(changes)}; give another "
            "--out, the same options, or --overwrite to replace it"
        )

"""`torchrun ... -m cce_torchrec.train`: train DLRM or GMF with full or compressed tables."""

from __future__ import annotations

import sys

from cce_torchrec.train import options


def main(argv: list[str] | None = None) -> None:
    """Runs the program; under torchrun with its ranks, otherwise as one."""
    args = options.parse(argv)
    # Loading torch and TorchRec takes seconds, which `--help` and bad options do not.
    from cce_torchrec.train.run import run

    failure = run(args)
    if failure is not None:
        sys.exit(failure)


if __name__ == "__main__":
    main()

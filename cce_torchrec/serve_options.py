"""The options of serve_check, for `python -m` by argparse and for the command line by click.

A machine that serves need not have click, and `--help` of the command line loads no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PURPOSE = "Compare an export with what the trained model gave."
ABOUT = """Loads EXPORT as a server would, in this process, which has none of what trained it:
verifies checksums and golden rows, scores the examples of --data, compares them with what the
trained model gave (`write_examples`), and prints times. Exit status 1, with one sentence, where
anything is wrong.

EXPORT is a folder of `save_inference`, TorchScript (.pt), an AOTInductor package (.pt2) or a file
of ONNX (.onnx)."""


@dataclass(frozen=True, kw_only=True)
class ServeOption:
    """One option, without its dashes."""

    name: str
    help: str
    type: type = str
    default: Any = None
    required: bool = False
    choices: tuple[str, ...] | None = None


OPTIONS = (
    ServeOption(
        name="data",
        required=True,
        help="file of write_examples (.npz), or .parquet with a column of ids for each feature",
    ),
    ServeOption(name="batch-size", type=int, default=64, help="examples at a time; default 64"),
    ServeOption(
        name="tolerance",
        type=float,
        help="largest difference of a value from the trained model; default that of the file",
    ),
    ServeOption(
        name="lookup",
        default="auto",
        choices=("auto", "fused", "portable"),
        help="of a folder: one compiled operator, or those of torch and FBGEMM; default auto",
    ),
    ServeOption(name="json", help="file to write what was found to, too; default none"),
)

"""`python -m cce_torchrec.inference.serve_check EXPORT --data FILE`: is an export what was trained?

`cce-torchrec serve-check` is the same; the options of both are in `serve_options`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cce_torchrec.inference import native
from cce_torchrec.inference.collection import InferenceEmbeddingBagCollection
from cce_torchrec.inference.examples import Examples, read_examples
from cce_torchrec.inference.folder import load_inference
from cce_torchrec.inference.onnx_file import verify_onnx
from cce_torchrec.reasons import first_line
from cce_torchrec.serve_options import ABOUT, OPTIONS
from cce_torchrec.torchrec_internals import load_package, package_metadata
from cce_torchrec.versions import check_installation, installed_versions

Score = Callable[[Examples], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class ServeReport:
    """What `check_export` has found; prints as sentences."""

    export: str
    verified: str
    """What was compared before any example was scored."""
    rows: int
    batch_size: int
    difference: float | None
    """From what the trained model gave, where it is largest beside the tolerance; None where the
    file does not say."""
    tolerance: float
    """What the difference may be there."""
    load_seconds: float
    batch_microseconds: float
    """Median of the batches, the first one not counted where there are more."""

    @property
    def ok(self) -> bool:
        """Whether the export gives what the trained model does, within the tolerance."""
        # Not a number is within no tolerance.
        return self.difference is None or self.difference <= self.tolerance

    def __str__(self) -> str:
        said = f"{self.rows:,} examples in batches of {self.batch_size:,}"
        if self.difference is None:
            compared = f"{said}: compared with nothing, as the file has no trained outputs"
        else:
            compared = (
                f"{said}: off by {self.difference:.3g} from the trained model where it is worst, "
                f"and {self.tolerance:.3g} may be: {'right' if self.ok else 'WRONG'}"
            )
        rate = 1e6 * self.batch_size / self.batch_microseconds
        return (
            f"{self.export}: {self.verified}\n{compared}\nloaded in {self.load_seconds:.2f} s; "
            f"{self.batch_microseconds:,.0f} microseconds a batch (median), {rate:,.0f} examples a "
            "second"
        )


def check_export(
    export: str | Path,
    data: str | Path,
    *,
    batch_size: int = 64,
    tolerance: float | None = None,
    lookup: str = "auto",
) -> ServeReport:
    """Loads `export`, and compares what it gives for the examples of `data`.

    Args:
        export: a folder of `save_inference`, TorchScript (.pt), an AOTInductor package (.pt2), or a
            file of ONNX (.onnx).
        data: see `read_examples`.
        batch_size: examples at a time.
        tolerance: largest difference; default: that of the file.
        lookup: of a folder, see `inference_collection`.

    Raises:
        ValueError: an export or file that is missing, damaged, of other versions or for other
            features, or a missing library, each with what to do.
    """
    export = Path(export)
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} must be 1 or more")
    if not export.exists():
        raise ValueError(f"{export} is not there")
    if not (export.is_dir() or export.is_file()):  # a pipe would be waited for
        raise ValueError(f"{export} is neither a folder nor a file")
    if not os.access(export, os.R_OK):
        raise ValueError(f"{export} cannot be read; see to its permissions")
    began = time.perf_counter()
    score, verified, features = load_export(export, lookup)
    load_seconds = time.perf_counter() - began
    examples = read_examples(data, features)
    outputs, seconds = [], []
    for first in range(0, examples.rows, batch_size):
        part = examples.part(first, min(first + batch_size, examples.rows))
        began = time.perf_counter()
        outputs.append(_scored(export, score, part))
        seconds.append(time.perf_counter() - began)
    difference, allowed = None, tolerance or 0.0
    if examples.expected is not None:
        limit = examples.tolerance if tolerance is None else torch.tensor(tolerance)
        difference, allowed = _difference(export, torch.cat(outputs), examples.expected, limit)
    return ServeReport(
        export=str(export),
        verified=verified,
        rows=examples.rows,
        batch_size=min(batch_size, examples.rows),
        difference=difference,
        tolerance=allowed,
        load_seconds=load_seconds,
        # The first batch reads what is mapped, and TorchScript optimises itself by it.
        batch_microseconds=1e6 * statistics.median(seconds[1:] or seconds),
    )


def load_export(export: Path, lookup: str) -> tuple[Score, str, list[str] | None]:
    """What scores examples, what was verified, and the features if the export names them."""
    if export.is_dir():
        served = load_inference(export, lookup=lookup)
        if not isinstance(served, InferenceEmbeddingBagCollection):
            raise ValueError(f"{export} has sequences, which examples are not written of")
        return (
            lambda examples: served(examples.keyed).values(),
            "checksums and golden rows are right",
            served.inputs,
        )
    if export.suffix == ".onnx":
        verify_onnx(export)
        return _onnx(export), "checksums are right", None
    loaders = {".pt": _torchscript, ".pt2": _package}
    if export.suffix not in loaders:
        raise ValueError(f"{export} is no folder and none of {[*loaders, '.onnx']}")
    _check_zip(export)
    # What the file was written with may be operators of either.
    check_installation()
    native.available()
    return loaders[export.suffix](export), "checksums are right", None


def _check_zip(file: Path) -> None:
    """Raises ValueError if the file is cut short or damaged: torch loads flipped bytes silently."""
    try:
        with zipfile.ZipFile(file) as archive:
            bad = archive.testzip()
    except Exception as error:  # zipfile raises many kinds of it, by where it is damaged
        raise ValueError(f"{file} is cut short or damaged ({error}); copy it again") from error
    if bad is not None:
        raise ValueError(f"{file} is damaged (the checksum of {bad} differs); copy it again")


def _torchscript(file: Path) -> Score:
    try:
        module = torch.jit.load(str(file))
    except RuntimeError as error:
        _refuse_without_library(file, error)
        why = first_line(error)
        raise ValueError(
            f"{file} is no TorchScript that torch {torch.__version__} loads ({why}); write it "
            "again by to_torchscript"
        ) from error
    features = list(module.inputs) if hasattr(module, "inputs") else None

    def score(examples: Examples) -> torch.Tensor:
        _check_features(examples, features)
        return module(*examples.tensors)

    return score


def _check_features(examples: Examples, features: list[str] | None) -> None:
    """Raises ValueError if ids are those of other features, which tensors do not tell."""
    if features is not None and examples.features != features:
        raise ValueError(f"they are of features {examples.features}, and it takes {features}")


def _refuse_without_library(file: Path, error: Exception) -> None:
    if "cce_inference::lookup" in str(error):
        why = native.problem() or "it is not loaded"
        raise ValueError(f"{file} needs the library of the fused lookup: {why}") from error


def _package(file: Path) -> Score:
    try:
        package = load_package(file)
        written = package_metadata(package)
    except (RuntimeError, OSError) as error:
        _refuse_without_library(file, error)
        why = first_line(error)
        raise ValueError(
            f"{file} is no AOTInductor package that torch {torch.__version__} loads ({why}); "
            "compile it again by to_package"
        ) from error
    # Compiled code goes by how libtorch lays its classes out, which versions change.
    here = installed_versions()
    other = {name: written[name] for name in here if written.get(name, here[name]) != here[name]}
    if other:
        raise ValueError(
            f"{file} was compiled with {other}, and here is {here}; compile it again by to_package"
        )
    return lambda examples: package(*examples.tensors)


def _onnx(file: Path) -> Score:
    try:
        runtime: Any = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise ValueError(
            f"{file} needs onnxruntime; pip install 'cce-torchrec[serving]'"
        ) from error
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised
    try:
        session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its classes are not the same in all versions
        why = first_line(error)
        raise ValueError(
            f"{file} is no model that ONNX Runtime {runtime.__version__} loads ({why}); write it "
            "again by to_onnx"
        ) from error
    names = [entry.name for entry in session.get_inputs()]
    features = json.loads(session.get_modelmeta().custom_metadata_map.get("inputs", "null"))

    def score(examples: Examples) -> torch.Tensor:
        _check_features(examples, features)
        given = {name: getattr(examples, name) for name in names}
        arrays = {name: tensor.numpy() for name, tensor in given.items() if tensor is not None}
        return torch.from_numpy(session.run(None, arrays)[0])

    return score


def _scored(export: Path, score: Score, examples: Examples) -> torch.Tensor:
    """What the export gives, float32.

    Raises:
        ValueError: it refuses the examples, with its first sentence.
    """
    try:
        with torch.no_grad():
            return score(examples).float()
    except Exception as error:  # of any runtime
        lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
        # TorchScript tells its whole way there first.
        said = next((line for line in reversed(lines) if "Error: " in line), lines[0])
        raise ValueError(f"{export} refuses the examples: {said}") from error


def _difference(
    export: Path, found: torch.Tensor, expected: torch.Tensor, tolerance: torch.Tensor | None
) -> tuple[float, float]:
    """The difference that is largest beside its tolerance, and that."""
    # Shapes that broadcast would be compared as if they were the same.
    if found.shape != expected.shape:
        raise ValueError(
            f"{export} gives {list(found.shape)}, and the trained model gave "
            f"{list(expected.shape)}: it is an export of another model"
        )
    off = (found - expected).double().abs()
    limit = (torch.zeros(()) if tolerance is None else tolerance).double().expand_as(off)
    # Not a number is larger than any, so that it is found.
    worst = (off - limit).nan_to_num(nan=torch.inf).argmax()
    return float(off.view(-1)[worst]), float(limit.reshape(-1)[worst])


def run(export: str | Path, options: Mapping[str, Any]) -> bool:
    """Checks, prints what was found, and says whether it is right.

    Args:
        export: see `check_export`.
        options: by the names of `serve_options.OPTIONS`, with underscores.

    Raises:
        ValueError, RuntimeError: see `check_export`.
    """
    report = check_export(
        export,
        options["data"],
        batch_size=options["batch_size"],
        tolerance=options["tolerance"],
        lookup=options["lookup"],
    )
    print(report)
    if options["json"] is not None:
        file = Path(options["json"])
        file.parent.mkdir(parents=True, exist_ok=True)
        found: dict[str, Any] = asdict(report) | {"ok": report.ok}
        found["versions"] = installed_versions()
        file.write_text(json.dumps(found, indent=1) + "\n")
    return report.ok


def main(argv: list[str] | None = None) -> None:
    """Prints what was found."""
    parser = argparse.ArgumentParser(
        prog="serve_check", description=ABOUT, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("export", type=Path)
    for one in OPTIONS:
        parser.add_argument(
            f"--{one.name}",
            type=one.type,
            default=one.default,
            required=one.required,
            choices=one.choices,
            help=one.help,
        )
    args = parser.parse_args(argv)
    try:
        right = run(args.export, vars(args))
    except (ValueError, RuntimeError) as error:
        sys.exit(f"serve_check: {error}")
    if not right:
        sys.exit(1)


if __name__ == "__main__":
    main()

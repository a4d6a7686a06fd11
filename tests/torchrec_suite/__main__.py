"""Runs TorchRec's tests with its own collections and with CCE ones, and compares.

    python -m tests.torchrec_suite --source TREE [--groups sequences ...] [--json FILE]

TorchRec's tests want the package parameterized.

Ends with 1 if a test passes with TorchRec's collections, fails with CCE ones, and no exception of
exceptions.py says why.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torchrec

from benchmarks.machine import device_name
from tests.torchrec_suite.exceptions import reason

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
GROUPS = {
    "embedding modules": [
        "modules/tests/test_embedding_modules.py",
        "modules/tests/test_fp_embedding_modules.py",
        "models/tests/test_dlrm.py",
        "models/tests/test_deepfm.py",
        "optim/tests/test_optim.py",
    ],
    "model parallel": [
        "distributed/tests/test_model_parallel_gloo.py",
        "distributed/tests/test_fp_embeddingbag.py",
        "distributed/tests/test_fp_embeddingbag_single_rank.py",
        "distributed/tests/test_qcomms_embedding_modules.py",
        "distributed/tests/test_init_parameters.py",
        "distributed/tests/test_apply_optim_per_param.py",
        "distributed/composable/tests/test_ddp.py",
        "distributed/composable/tests/test_embeddingbag.py",
        "distributed/composable/tests/test_fused_optim.py",
    ],
    "sequences": [
        "distributed/tests/test_sequence_model_parallel.py",
    ],
    "pipelines": [
        "distributed/train_pipeline/tests/test_train_pipelines.py",
        "distributed/train_pipeline/tests/test_train_pipelines_utils.py",
        "distributed/train_pipeline/tests/test_train_pipeline_prefetch_sparse_dist.py",
        "distributed/train_pipeline/tests/test_backward_injection.py",
        "distributed/train_pipeline/tests/test_gradient_accumulation.py",
        "distributed/train_pipeline/tests/test_postproc.py",
    ],
    "state dicts": [
        "distributed/tests/test_model_parallel_gloo_gpu_single_rank.py",
        "distributed/tests/test_sequence_model_parallel_single_rank.py",
    ],
}
PASSED = "passed"


@dataclass
class Compared:
    """The tests of one group; a test with examples counts once for each of them."""

    tests: int = 0
    plain_passed: int = 0
    cce_passed: int = 0
    exceptions: dict[str, list[str]] = field(default_factory=dict)
    """Tests that pass with TorchRec's collections alone, by the reason."""
    unexplained: dict[str, str] = field(default_factory=dict)
    """Those without a reason, with the end of what they say."""

    def add(self, plain: dict[str, str], cce: dict[str, str]) -> None:
        """Counts the outcomes of a file by test."""
        self.tests += len(plain)
        for test in (test for test, outcome in plain.items() if outcome == PASSED):
            self.plain_passed += 1
            outcome = cce.get(test, "the test did not run")
            self.cce_passed += outcome == PASSED
            if outcome == PASSED:
                continue
            why = reason(test, outcome)
            if why:
                self.exceptions.setdefault(why, []).append(test)
            else:
                self.unexplained[test] = outcome.strip()[-400:]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.torchrec_suite", description=__doc__)
    parser.add_argument("--source", type=Path, required=True, help="a source tree of TorchRec")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--examples", type=int, default=4, help="a test at most; 0 is all")
    parser.add_argument("--example-seconds", type=int, default=120, help="each at most")
    parser.add_argument("--file-seconds", type=int, default=3600, help="each at most")
    parser.add_argument("--json", type=Path, help="where the table is written, or added to")
    return parser.parse_args()


def outcomes(options: argparse.Namespace, file: str, substitute: bool) -> dict[str, str]:
    """The outcome of each test of `file`, with CCE collections if `substitute`."""
    source = options.source.resolve()
    ours = [HERE / "site", source, ROOT]
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record"
        record.touch()
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([*map(str, ours), os.environ.get("PYTHONPATH", "")]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "CCE_SUITE_SOURCE": str(source),
            "CCE_SUITE_SUBSTITUTE": str(int(substitute)),
            "CCE_SUITE_RECORD": str(record),
            "CCE_SUITE_EXAMPLES": str(options.examples),
            "CCE_SUITE_TIMEOUT": str(options.example_seconds),
        }
        command = [sys.executable, "-m", "pytest", "-q", "--assert=plain", "-p", "no:cacheprovider"]
        command += ["-p", "tests.torchrec_suite.recording", f"torchrec/{file}"]
        try:
            # TorchRec's tests print a lot, and what they end with is recorded.
            ended = subprocess.run(
                command, cwd=source, env=environment, capture_output=True,
                timeout=options.file_seconds, check=False,
            )  # fmt: skip
            if not record.read_text():
                said = ended.stdout.decode(errors="replace").strip()[-600:]
                raise SystemExit(f"{file}: no test of it ran; pytest says\n{said}")
        except subprocess.TimeoutExpired:
            print(f"  {file}: ended after {options.file_seconds} s", flush=True)
        lines = map(json.loads, record.read_text().splitlines())
        return {line["test"]: line["outcome"] for line in lines}


def table(groups: dict[str, Compared]) -> str:
    """The comparison, one line a group, and the exceptions below."""
    rows: list[tuple[str, ...]] = [
        ("", "tests", "pass plain", "of these CCE", "exceptions", "unexplained")
    ]
    whys: Counter[str] = Counter()
    for name, found in groups.items():
        by_reason = {why: len(tests) for why, tests in found.exceptions.items()}
        whys.update(by_reason)
        numbers = (found.tests, found.plain_passed, found.cce_passed, sum(by_reason.values()))
        rows.append((name, *map(str, numbers), str(len(found.unexplained))))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    lines += [f"{count} {why}" for why, count in whys.most_common()]
    for found in groups.values():
        lines += [f"UNEXPLAINED {test}\n{outcome}" for test, outcome in found.unexplained.items()]
    return "\n".join(lines)


def main() -> int:
    """Runs, prints and writes; 0 where every difference is explained."""
    options = arguments()
    groups: dict[str, Compared] = {}
    for name in options.groups:
        groups[name] = Compared()
        for file in GROUPS[name]:
            print(f"{name}: {file}", flush=True)
            groups[name].add(outcomes(options, file, False), outcomes(options, file, True))
    print(table(groups))
    if options.json:
        earlier = json.loads(options.json.read_text()) if options.json.exists() else {}
        report = {
            "device": device_name(torch.device("cpu")),
            "versions": {"torch": torch.__version__, "torchrec": torchrec.__version__},
            "examples": options.examples,
            "groups": earlier.get("groups", {}) | {n: asdict(g) for n, g in groups.items()},
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return int(any(found.unexplained for found in groups.values()))


if __name__ == "__main__":
    sys.exit(main())

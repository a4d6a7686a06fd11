"""What a run of the training program leaves in its folder."""

import json


def lines_of(out, kind):
    """The lines of metrics.jsonl of one kind."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def untimed(out, kind="epoch"):
    """The same without what two equal runs do not share: times, speed, memory, paths."""
    leave_out = ("seconds", "examples_per_second", "examples_per_second_per_rank", "memory", "path",
                 "bytes")  # fmt: skip
    found = [{k: v for k, v in line.items() if k not in leave_out} for line in lines_of(out, kind)]
    for line in found:
        for chunk in line.get("chunks", []):
            del chunk["seconds"]
    return found

"""Damage to files: bytes, values of JSON, and whole files, each by a random generator."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

_DEEP = "@deep@"
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 7, 2**31, 2**63, 10**30, -(10**30), 0.5, 1e308, float("nan"),
    float("inf"), "", "x", "../../../etc/passwd", "/etc/passwd", "\x00", "é\ud800", "9" * 5000,
    [], {}, [[]], [1, 2, 3], {"a": 1}, _DEEP,
]  # fmt: skip


def damage_bytes(content: bytes, rng: random.Random) -> bytes:
    """`content` with bits, bytes or blocks changed, or shorter or longer."""
    if not content:
        return bytes([rng.randrange(256)])
    at, size = rng.randrange(len(content)), rng.choice([1, 2, 8, 64, 4096])
    end = min(len(content), at + size)
    return rng.choice([
        lambda: content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :],
        lambda: content[:at] + rng.randbytes(end - at) + content[end:],
        lambda: content[:at] + bytes(end - at) + content[end:],
        lambda: content[:at],
        lambda: content[:at] + content[end:],
        lambda: content[:at] + content[at:end] + content[at:],
        lambda: content[:at] + rng.randbytes(size) + content[at:],
        lambda: content + rng.randbytes(size),
        lambda: b"",
    ])()  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """Container and key of every value inside."""
    out = []
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        out.append((value, key))
        if isinstance(inner, dict | list):
            out += places(inner)
    return out


def damage_json(text: str, rng: random.Random) -> str:
    """The same JSON with one value, key or member changed."""
    whole = json.loads(text)
    inside = places(whole)
    if not inside:
        return rng.choice(["null", "[]", "1", '"x"', "[" * 100_000])
    container, key = rng.choice(inside)
    other, other_key = rng.choice(inside)

    def put(value: Any) -> None:
        container[key] = value

    def near() -> None:
        """A value of the same type."""
        old = container[key]
        if isinstance(old, bool):
            container[key] = not old
        elif isinstance(old, int | float):
            container[key] = rng.choice([old + 1, old - 1, -old, old * 2, old * 10**6])
        elif isinstance(old, str):
            container[key] = rng.choice([old + "x", old[:-1], old.upper(), old[::-1]])
        elif isinstance(old, list):
            container[key] = rng.choice([old[:-1], old + old, old[::-1]])
        else:
            container[key] = {**(old or {}), "unknown": 1}

    def rename() -> None:
        if isinstance(container, dict):
            container[rng.choice(["", "x", "../x", "a" * 5000, "0", str(key) + "x"])] = (
                container.pop(key)
            )

    def swap() -> None:
        container[key], other[other_key] = other[other_key], container[key]

    rng.choice([
        lambda: put(rng.choice(VALUES)), lambda: put(rng.choice(VALUES)), near, near,
        lambda: container.pop(key), rename, swap,
    ])()  # fmt: skip
    try:
        damaged = json.dumps(whole)
    except ValueError:  # a swap has put a value into itself
        return "{}"
    depth = rng.choice([500, 100_000])
    return damaged.replace(f'"{_DEEP}"', "[" * depth + "]" * depth)


def damage_lines(text: str, rng: random.Random) -> str:
    """The same YAML with a line changed: its value, its name, its place or what it is."""
    lines = text.splitlines()
    at = rng.randrange(len(lines))
    name, colon, value = lines[at].partition(":")
    odd = rng.choice([
        "*x", "&x 1", "!!python/object/apply:os.system [ls]", "{a: {b: 1}}", "[1, [2]]", "~", "yes",
        ".nan", ".inf", "-1", "0", "1e400", "9" * 5000, "0x10", "1_000", "2001-01-01", "'", "\t",
        "[" * 5000, "{" * 5000, "../../etc/passwd", "\u0000", "|", "? x", "<<: *x",
    ])  # fmt: skip
    lines[at] = rng.choice([
        f"{name}{colon} {odd}", f"{name}{colon} {odd}", f"{name}{colon} {odd}", odd,
        f"{name}x{colon}{value}", f" {lines[at]}", f"{name}{colon}{value}x", f"{name}{colon}",
        "", f"{lines[at]}\n{lines[at]}", f"{name.upper()}{colon}{value}", f"{name}{colon}{value}0",
        rng.choice(lines), "---", f"{name.replace('_', '-')}{colon}{value}",
    ])  # fmt: skip
    return "\n".join(lines) + "\n"


def _damage_member(path: Path, rng: random.Random) -> None:
    """Damages one file inside a zip, whose checksums are made anew."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(sorted(members))
    members[name] = damage_bytes(members[name], rng)
    with zipfile.ZipFile(path, "w") as archive:
        for own, content in members.items():
            archive.writestr(own, content)


def damage_folder(folder: Path, donor: Path, rng: random.Random, *, pipes: bool = True) -> str:
    """Damages one file of `folder`, for which one of `donor` may come; says what was done."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = rng.choice(files)
    own = path.relative_to(folder)
    others = sorted(p for p in donor.rglob(f"*{path.suffix}") if p.is_file())

    def change(make: Callable[[], bytes]) -> Callable[[], object]:
        return lambda: path.write_bytes(make())

    def as_json() -> None:
        text = path.read_text()
        path.write_text(damage_json(text, rng), errors="surrogatepass")

    def replace(make: Callable[[Path], object]) -> None:
        path.unlink()
        make(path)

    ways: dict[str, Callable[[], object]] = {
        "bytes": change(lambda: damage_bytes(path.read_bytes(), rng)),
        "deleted": path.unlink,
        "doubled": lambda: shutil.copy(path, path.with_name("copy-" + path.name)),
        "over another": lambda: shutil.copy(path, rng.choice(files)),
        "a folder": lambda: replace(Path.mkdir),
        "a link to itself": lambda: replace(lambda p: p.symlink_to(p)),
        "a pipe": lambda: replace(os.mkfifo),
        "of another": lambda: shutil.copy(rng.choice(others), path) if others else path.unlink(),
    }
    if not pipes:
        del ways["a pipe"]
    names = ["bytes"] * 6 + list(ways)
    if path.suffix == ".yaml":
        ways["json"] = lambda: path.write_text(damage_lines(path.read_text(), rng), errors="ignore")
        names += ["json"] * 14
    if path.suffix == ".json":
        ways["json"] = as_json
        names += ["json"] * 14
    if path.suffix == ".npz":
        ways["member"] = lambda: _damage_member(path, rng)
        names += ["member"] * 14
    way = rng.choice(names)
    with contextlib.suppress(shutil.SameFileError):  # over itself, which is no damage
        ways[way]()
    return f"{own}: {way}"

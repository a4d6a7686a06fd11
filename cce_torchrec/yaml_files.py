"""Files of settings: YAML by the safe loader, and what is wrong with one in a sentence."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cce_torchrec.extras import load_extra

MOST_BYTES = 1 << 22
"""Of a file that is read; one of settings has a few hundred."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean NAME?` of the known name that is most like `name`, or nothing."""
    # Half of the letters alike, as names of options have long parts in common.
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""


def read_yaml(file: str | Path) -> Any:
    """What a YAML file (JSON is YAML, too) holds: dictionaries, lists, texts, numbers, None.

    No tags are obeyed that would make other objects, aliases are refused, and so are keys that
    stand twice, of which YAML would silently take the last.

    Raises:
        ValueError: naming the file and the line, if it cannot be read.
        MissingExtra: pyyaml is not installed.
    """
    yaml: Any = load_extra("yaml", "cli", f"{file}: a file in YAML")
    path = Path(file) if isinstance(file, str) else file  # which may be in an object store
    try:
        # Before it is read: a wrong name may be that of the data.
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(
                f"{file} has more than {MOST_BYTES:,} bytes: it is no file of settings"
            )
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8 ({error.reason})") from error
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror or error})") from error
    try:
        return yaml.load(text, Loader=_loader(yaml))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        said = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ValueError(f"{file}{where} is no YAML that can be read: {said}") from error


def write_yaml(values: dict[str, Any]) -> str:
    """The values as YAML, in their order, with a line for each.

    Raises:
        MissingExtra: pyyaml is not installed.
    """
    yaml: Any = load_extra("yaml", "cli", "a file in YAML")
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


@functools.cache
def _loader(yaml: Any) -> Any:
    """PyYAML's safe loader with two things more to refuse."""

    class Loader(yaml.SafeLoader):  # type: ignore[misc, name-defined]  # loaded when it is used
        def compose_node(self, parent: Any, index: Any) -> Any:
            # Nested aliases of a few lines make gigabytes.
            if self.check_event(yaml.AliasEvent):
                mark = self.peek_event().start_mark
                raise yaml.MarkedYAMLError(problem="aliases are refused", problem_mark=mark)
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: list[str] = []
            for key, _ in node.value:
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark
                    )
                seen.append(key.value)
            return super().construct_mapping(node, deep)

    return Loader

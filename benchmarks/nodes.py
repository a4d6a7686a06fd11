"""Machines for tests and benchmarks: network namespaces of Linux on a cable of their own.

Each has a loopback, a name of its own, one address that nobody outside can reach, and the files of
this machine. To make them takes root and the commands `ip` and `unshare`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

CABLE = "cable"
"""The network interface of a node."""
ADDRESSES = {"node-0": "198.18.0.1", "node-1": "198.18.0.2"}
"""Of host names, in the range that is set apart for benchmarks of networks (RFC 2544)."""
_FILES = Path("/etc/netns")
"""Where `ip netns exec` has the files that a namespace sees in place of those of /etc."""


def _run(*words: str) -> str:
    """What a command says.

    Raises:
        OSError: with what it complained of, if it failed.
    """
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip() or done.returncode}")
    return done.stdout


@dataclass(frozen=True)
class Node:
    """A namespace with an address; what runs in it is its processes, whoever started them."""

    name: str
    host: str
    address: str

    def start(
        self, command: Sequence[str], *, log: Path, variables: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Starts a command in the node, whose output is appended to `log`."""
        # torchrun and gloo look up the name of their machine, so each has its own.
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.host]
        with log.open("ab") as out:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, *named, *command],
                env=os.environ | (variables or {}),
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def processes(self) -> list[int]:
        """Ids of all processes in the node."""
        return [int(word) for word in _run("ip", "netns", "pids", self.name).split()]

    def kill(self) -> int:
        """Ends all processes of the node by SIGKILL, at once; how many there were."""
        killed: set[int] = set()
        while found := self.processes():  # again: one may have started another meanwhile
            for process in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            killed.update(found)
            time.sleep(0.01)
        return len(killed)

    def set_cable(self, state: str) -> None:
        """Plugs the node in ("up") or unplugs it ("down")."""
        _run("ip", "-n", self.name, "link", "set", CABLE, state)


def existing() -> list[str]:
    """Names of all namespaces of the machine."""
    # Beside a name there may be a number, in brackets.
    return [line.split()[0] for line in _run("ip", "netns", "list").splitlines()]


@contextlib.contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Two nodes that reach each other, and are gone afterwards with all that runs in them.

    Raises:
        OSError: the machine does not let this process make them.
    """
    first, second = (Node(f"cce-{os.getpid()}-{h}", h, a) for h, a in ADDRESSES.items())
    hosts = "".join(f"{a} {h}\n" for h, a in [("localhost", "127.0.0.1"), *ADDRESSES.items()])
    try:
        for node in (first, second):
            (_FILES / node.name).mkdir(parents=True, exist_ok=True)
            (_FILES / node.name / "hosts").write_text(hosts)
            _run("ip", "netns", "add", node.name)
            _run("ip", "-n", node.name, "link", "set", "lo", "up")
        ends = ["type", "veth", "peer", "name", CABLE, "netns", second.name]
        _run("ip", "link", "add", CABLE, "netns", first.name, *ends)
        for node in (first, second):
            _run("ip", "-n", node.name, "addr", "add", f"{node.address}/30", "dev", CABLE)
            node.set_cable("up")
            # What a node that lost its power would still have told: its sockets outlive it here.
            retries = "/proc/sys/net/ipv4/tcp_orphan_retries"
            _run("ip", "netns", "exec", node.name, "sh", "-c", f"echo 1 > {retries}")
        yield first, second
    finally:
        there = existing()
        for node in (first, second):
            if node.name in there:
                node.kill()
                _run("ip", "netns", "delete", node.name)
            shutil.rmtree(_FILES / node.name, ignore_errors=True)


def why_not() -> str | None:
    """Why there can be no nodes here, or None if there can."""
    if missing := [name for name in ("ip", "unshare") if shutil.which(name) is None]:
        return f"there is no command {missing[0]} (Debian's packages iproute2 and util-linux)"
    try:
        with two_nodes():
            return None
    except OSError as error:
        return f"no network namespaces: {error}"

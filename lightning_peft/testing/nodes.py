"""Two machines on one: network namespaces joined by a cable of their own, for tests of training on several nodes."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_NAMESPACES = Path("/run/netns")  # where `ip netns` keeps them
_CLONE_NEWNET = 0x40000000  # linux/sched.h: the kind of namespace that setns is to enter


class NodesUnavailable(RuntimeError):
    """This machine, or this user, cannot make network namespaces."""


@dataclass(frozen=True)
class Node:
    """A machine, as far as the network can tell.

    Attributes:
        interface: the network interface that other nodes are reached by.
        address: its address.
        namespace: the network namespace that is this node; ``None`` for the one that we are in.
    """

    interface: str = "lo"
    address: str = "127.0.0.1"
    namespace: str | None = None

    def enter(self) -> None:
        """Move this process to the node: sockets made from now on are the node's. There is no way back."""
        if self.namespace is None:
            return
        libc = ctypes.CDLL(None, use_errno=True)  # os.setns is there from Python 3.12 on
        handle = os.open(_NAMESPACES / self.namespace, os.O_RDONLY)
        try:
            if libc.setns(handle, _CLONE_NEWNET):
                number = ctypes.get_errno()
                raise OSError(number, f"cannot enter the network namespace {self.namespace}: {os.strerror(number)}")
        finally:
            os.close(handle)


@contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Two nodes with an address each and a cable between them, and no other way out; gone when the block ends.

    Raises:
        NodesUnavailable: there is no `ip` command, or it may not make namespaces (it takes root).
    """
    if shutil.which("ip") is None:
        raise NodesUnavailable("two nodes need the command `ip` (iproute2), which is not installed.")
    token = secrets.token_hex(4)  # several tests may do this at a time
    first, second = nodes = tuple(Node("veth0", f"10.77.0.{i}", f"peft-{token}-{i}") for i in (1, 2))
    try:
        for node in nodes:
            _ip(f"netns add {node.namespace}")
        # Made inside them: nothing is seen from the outside, and the cable goes with the namespaces.
        _ip(f"link add veth0 netns {first.namespace} type veth peer name veth0 netns {second.namespace}")
        for node in nodes:
            _ip(f"-n {node.namespace} addr add {node.address}/24 dev {node.interface}")
            _ip(f"-n {node.namespace} link set {node.interface} up")
            _ip(f"-n {node.namespace} link set lo up")  # processes of one node reach each other by it
        yield first, second
    finally:
        for node in nodes:
            if (_NAMESPACES / str(node.namespace)).exists():
                _ip(f"netns del {node.namespace}")


def _ip(arguments: str) -> None:
    done = subprocess.run(["ip", *arguments.split()], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NodesUnavailable(f"two nodes need network namespaces: `ip {arguments}` says {done.stderr.strip()!r}.")

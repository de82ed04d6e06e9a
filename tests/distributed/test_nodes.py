"""Two nodes on one machine: what the table of docs/exactness.md trains on."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lightning_peft.testing import nodes
from lightning_peft.testing.nodes import Node, NodesUnavailable, two_nodes
from lightning_peft.testing.processes import run_processes

pytestmark = pytest.mark.dist


def namespaces() -> set[str]:
    folder = Path("/run/netns")
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


@pytest.fixture
def pair() -> Iterator[tuple[Node, Node]]:
    try:
        with two_nodes() as found:
            yield found
    except NodesUnavailable as error:
        pytest.skip(str(error))


def meet() -> tuple[str, set[str], float]:
    dist.init_process_group("gloo")
    total = torch.ones(1) * (1 + dist.get_rank())
    dist.all_reduce(total)
    return os.environ["GROUP_RANK"] + os.environ["LOCAL_RANK"], {n for _, n in socket.if_nameindex()}, total.item()


def test_processes_of_two_nodes_meet_over_the_cable(pair: tuple[Node, Node]) -> None:
    places, interfaces, totals = zip(*run_processes(4, meet, nodes=pair), strict=True)
    assert places == ("00", "01", "10", "11")
    assert all(seen == {"lo", "veth0"} for seen in interfaces)  # they see nothing of the machine's own network
    assert totals == (10.0,) * 4


def test_nodes_are_gone_whatever_happens(pair: tuple[Node, Node]) -> None:
    with pytest.raises(ZeroDivisionError), two_nodes() as more:
        names = {str(node.namespace) for node in more}
        assert names <= namespaces()
        assert names.isdisjoint(str(node.namespace) for node in pair)
        raise ZeroDivisionError
    assert names.isdisjoint(namespaces())


def test_nodes_are_gone_when_making_them_fails(pair: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch) -> None:
    made, run = set(), nodes._ip

    def cable_fails(arguments: str) -> None:
        if arguments.startswith("netns add"):
            made.add(arguments.split()[-1])
        run("link frobnicate" if "type veth" in arguments else arguments)

    monkeypatch.setattr(nodes, "_ip", cable_fails)
    said = "two nodes need network namespaces: `ip link frobnicate` says"
    with pytest.raises(NodesUnavailable, match=said), two_nodes():
        pass
    assert len(made) == 2
    assert made.isdisjoint(namespaces())


def test_no_command_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NodesUnavailable, match="two nodes need the command `ip`"), two_nodes():
        pass


def test_a_node_that_is_not_there_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="peft-none"):
        Node("veth0", "10.77.0.1", "peft-none").enter()


def test_processes_are_shared_evenly() -> None:
    with pytest.raises(ValueError, match="3 processes cannot be shared evenly by 2 nodes"):
        run_processes(3, meet, nodes=(Node(), Node()))


def test_forking_beside_threads_is_remarked_on_by_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python does from 3.12 on, wherever a library has started a thread; here it is made to, whatever its version."""
    fork = os.fork

    def remarking() -> int:
        text = f"This process (pid={os.getpid()}) is multi-threaded, use of fork() may lead to deadlocks in the child."
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        return fork()

    monkeypatch.setattr(os, "fork", remarking)
    assert os.getpid() not in run_processes(2, os.getpid)

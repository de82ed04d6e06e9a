"""Several processes on one machine without an accelerator: what tests of distributed training need.

`run_processes` starts them as torchrun would, on one node or several; `CpuFSDPStrategy` and `CpuFSDPPrecision` are
Lightning's FSDP1 on a CPU, which Lightning itself refuses. DDP and FSDP2 (`ModelParallelStrategy`) need no help.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision import FSDPPrecision
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from lightning_peft.testing.nodes import Node


def run_processes(
    world: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 300,
    nodes: Sequence[Node] = (Node(),),
) -> list[Any]:
    """Call a function in several new processes that can form one process group; its results, by rank.

    The processes are forked: they see what the caller has imported, and torch must not have started threads. A Trainer
    inside takes `devices=world` (or `num_nodes` and `devices=world // num_nodes`) and finds its place in the
    environment, as under torchrun.

    Args:
        world: how many processes.
        function: called in each; what it returns is pickled.
        *args: what it is called with.
        timeout: seconds after which all are ended.
        nodes: where they run, as many on each; the first is the one that they meet at.

    Raises:
        ValueError: the nodes cannot have equally many processes.
        RuntimeError: one of them failed, with its traceback, or none answered in time.
    """
    if world % len(nodes):
        raise ValueError(f"{world} processes cannot be shared evenly by {len(nodes)} nodes.")
    context = multiprocessing.get_context("fork")
    port = _free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(world)]
    children = [
        context.Process(target=_child, args=(rank, world, nodes, port, pipes[rank][1], function, args))
        for rank in range(world)
    ]
    with warnings.catch_warnings():
        # From Python 3.12: of threads that hold a lock in the child for ever. torch's are as the docstring has them.
        warnings.filterwarnings("ignore", "This process .* is multi-threaded, use of fork", DeprecationWarning)
        for child in children:
            child.start()
    for _, sender in pipes:
        sender.close()  # the child's alone now: a child that dies without a word closes it
    try:
        answers = [_receive(receiver, rank, timeout) for rank, (receiver, _) in enumerate(pipes)]
    finally:
        for child in children:
            child.join(5)
            if child.is_alive():
                child.kill()
                child.join()
    failed = [(rank, text) for rank, (text, _) in enumerate(answers) if text]
    if failed:
        raise RuntimeError("\n".join(f"process {rank} of {world}:\n{text}" for rank, text in failed))
    return [result for _, result in answers]


class CpuFSDPStrategy(FSDPStrategy):
    """FSDP1 on a CPU with gloo: for tests, since Lightning refuses it and torch asks for the device by name."""

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu")

    def _setup_model(self, model: nn.Module) -> nn.Module:
        if any(isinstance(child, FullyShardedDataParallel) for child in model.modules()):
            return model  # wrapped by configure_model, or by an earlier entry point of the Trainer
        wrapped: nn.Module = FullyShardedDataParallel(
            module=model,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=torch.device("cpu"),
            **self.kwargs,
        )
        return wrapped


class CpuFSDPPrecision(FSDPPrecision):
    """Lightning's precision plugin for FSDP1 on a CPU: where it says "cuda", this says "cpu".

    Args:
        precision: as for Trainer: "bf16-mixed", "16-mixed", "bf16-true" and so on.
    """

    def __init__(self, precision: Any) -> None:
        half = precision == "16-mixed"
        super().__init__("bf16-mixed" if half else precision)
        self.precision = precision
        if half:
            self.scaler = ShardedGradScaler(device="cpu")

    def forward_context(self) -> AbstractContextManager[Any]:
        if "mixed" not in self.precision:
            return super().forward_context()
        return torch.autocast("cpu", dtype=torch.float16 if self.precision == "16-mixed" else torch.bfloat16)


def _child(
    rank: int, world: int, nodes: Sequence[Node], port: int, sender: Any, function: Callable[..., Any], args: Any
) -> None:
    node, local = divmod(rank, world // len(nodes))
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(local), GROUP_RANK=str(node), NODE_RANK=str(node), WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world // len(nodes)), MASTER_ADDR=nodes[0].address, MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="test", GLOO_SOCKET_IFNAME=nodes[node].interface,
    )  # fmt: skip
    try:
        nodes[node].enter()
        answer = ("", function(*args))
    except BaseException:
        answer = (traceback.format_exc(), None)
    sender.send_bytes(pickle.dumps(answer))  # not `send`, which would share tensors' memory with a process that ends
    if dist.is_initialized() and not answer[0]:
        dist.destroy_process_group()


def _receive(receiver: Any, rank: int, timeout: float) -> tuple[str, Any]:
    try:
        if not receiver.poll(timeout):
            return f"process {rank} did not answer within {timeout} seconds", None
        answer: tuple[str, Any] = pickle.loads(receiver.recv_bytes())
        return answer
    except EOFError:
        return f"process {rank} died without a word", None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port

"""Processes for tests, forked from a server that has the imports: those take longer than what the tests run.

The server is multiprocessing's, started by the first test that needs it. It has no threads and has computed nothing,
which is why forking is safe there and would not be from the process of the tests.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from recipes import cli

FORKED = get_context("forkserver")
# The second line is what the recipes, torch and transformers import late.
FORKED.set_forkserver_preload(
    ["recipes.cli", "recipes.commands.encode", "recipes.commands.finetune", "recipes.commands.train_tokenizer"]
    + ["datasets", "torch._dynamo", "torch.distributed.nn", "torch.utils.tensorboard", "transformers.trainer"]
)


def slm(*words: str) -> None:
    """The command line's `slm`, as its own process would run it."""
    sys.argv = ["slm", *words]
    cli.main()


def start(
    target: Callable, *arguments: object, log: Path, world: int = 1, threads: int = 1, alone: bool = False
) -> list[BaseProcess]:
    """Runs a function of a module in `world` processes that torchrun could have started, without torchrun's seconds.

    Args:
        target: what each process calls; where there are several it tells them apart by the variable RANK.
        arguments: what it is called with.
        log: where all of them write what they say.
        world: how many there are. They find each other by gloo, a GPU hidden: they would share it.
        threads: torch's, in each.
        alone: whether the one process of `world=1` is told that it is, as torchrun would.
    """
    environment = {}
    launched = world > 1 or alone
    if launched:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = str(listener.getsockname()[1])
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": ""}
        environment |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(world))
    started = []
    for rank in range(world):
        own = dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)) if launched else {}
        started.append(FORKED.Process(target=_run, args=(environment | own, log, threads, target, arguments)))
        started[-1].start()
    return started


def _run(environment: dict[str, str], log: Path, threads: int, target: Callable, arguments: tuple) -> None:
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(file, stream.fileno())
    torch.set_num_threads(threads)
    target(*arguments)


def exit_codes(processes: list[BaseProcess], timeout_s: float = 300) -> list[int | None]:
    """Waits for all; one that is still there when the time is over is killed, and its code is None."""
    deadline, codes = time.monotonic() + timeout_s, []
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        codes.append(process.exitcode)
        process.kill()
    return codes

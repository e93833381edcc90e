"""The `keye` command in a process of its own, forked so that it need not import everything again."""

import contextlib
import io
import multiprocessing
import os

import torch

from megatron_keye.train import cli

TIMEOUT_S = 120


def keye(*arguments) -> tuple[int, str]:
    """Runs one command line; its exit code, and what it wrote to stdout and stderr."""
    return in_a_fork(_run, [str(argument) for argument in arguments])


def in_a_fork(function, *args):
    """The result of function(*args), called in a forked process. The result must be picklable."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(sending, function, args))
    process.start()
    sending.close()
    try:
        if not receiving.poll(TIMEOUT_S):
            raise TimeoutError(f"{function.__name__} did not end within {TIMEOUT_S} s")
        return receiving.recv()
    finally:
        process.kill()
        process.join()


def _call(sending, function, args) -> None:
    torch.set_num_threads(1)
    sending.send(function(*args))
    sending.close()
    os._exit(0)


def _run(arguments: list[str]) -> tuple[int, str]:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        code = cli.main(arguments)
    return code, text.getvalue()

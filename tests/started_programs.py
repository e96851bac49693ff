"""Programs of `experiments`, forked from a process that has imported their libraries already.

Importing takes longer than many of them do; nothing is computed before the fork.
"""

import functools
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from quick_compilation import program_environment

ROOT = Path(__file__).parents[1]
_DOMAINS = ("images", "next_scale", "reasoning", "self_play", "text", "tokenizer")
_PRELOADED = [
    "quick_collection",
    "matplotlib.pyplot",
    *(f"experiments.{name}" for name in _DOMAINS),
]


class Ended(NamedTuple):
    """A program that has ended."""

    returncode: int | None
    stdout: str
    stderr: str


def start(module: str, *arguments: str, check: bool = True) -> Ended:
    """Runs a program to its end; if it fails and `check` says so, an AssertionError."""
    with tempfile.TemporaryDirectory() as directory:
        files = [str(Path(directory) / name) for name in ("stdout", "stderr")]
        process = _server().Process(
            target=_run, args=(module, arguments, program_environment(), files)
        )
        process.start()
        process.join(timeout=900)
        if process.exitcode is None:
            process.kill()
        told = [Path(file).read_text() if Path(file).exists() else "" for file in files]
    ended = Ended(process.exitcode, *told)
    assert not check or ended.returncode == 0, f"{module} {arguments}: {ended.stderr[-3000:]}"
    return ended


@functools.cache
def _server() -> multiprocessing.context.BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    before = dict(os.environ)
    os.environ.update(program_environment())
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _run(
    module: str, arguments: tuple[str, ...], environment: dict[str, str], files: list[str]
) -> None:
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    sys.argv = [module, *arguments]
    sys.orig_argv = [sys.executable, "-m", f"experiments.{module}", *arguments]
    runpy.run_module(f"experiments.{module}", run_name="__main__", alter_sys=True)

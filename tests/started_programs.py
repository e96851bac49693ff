"""Programs of `experiments` and of tests, forked from a process that has imported their libraries.

Importing takes longer than many of them do; nothing is computed before the fork.
"""

import atexit
import functools
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import sys
import tempfile
import time
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


class Program:
    """A running program: a module of `experiments`, or a script by its path.

    With `group`, it leads a process group of its own when this returns.
    """

    def __init__(
        self,
        program: str | Path,
        *arguments: str,
        directory: str | Path = ROOT,
        group: bool = False,
    ):
        self._directory = tempfile.TemporaryDirectory()
        self._files = [str(Path(self._directory.name) / name) for name in ("stdout", "stderr")]
        self._told = f"{program} {arguments}"
        self._process = _server().Process(
            target=_run,
            args=(program, arguments, program_environment(), str(directory), group, self._files),
        )
        self._process.start()
        while group and self.is_running() and os.getpgid(self.pid) != self.pid:
            time.sleep(0.001)

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_running(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> None:
        self._process.kill()

    def end(self, returncode: int | None = 0) -> Ended:
        """Waits for its end; an AssertionError if that is another, unless any will do (None)."""
        self._process.join(timeout=900)
        if self._process.exitcode is None:
            self._process.kill()
        told = [Path(file).read_text() if Path(file).exists() else "" for file in self._files]
        self._directory.cleanup()
        ended = Ended(self._process.exitcode, *told)
        assert returncode in (None, ended.returncode), f"{self._told}: {ended.stderr[-3000:]}"
        return ended


def start(module: str, *arguments: str, check: bool = True) -> Ended:
    """Runs a program to its end; if it fails and `check` says so, an AssertionError."""
    return Program(module, *arguments).end(0 if check else None)


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
    program: str | Path,
    arguments: tuple[str, ...],
    environment: dict[str, str],
    directory: str,
    group: bool,
    files: list[str],
) -> None:
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    if group:
        os.setpgid(0, 0)
    sys.path.insert(0, str(ROOT))
    try:
        if isinstance(program, Path):
            sys.argv = [str(program), *arguments]
            sys.orig_argv = [sys.executable, *sys.argv]
            sys.path.insert(0, str(program.parent))
            runpy.run_path(str(program), run_name="__main__")
        else:
            sys.argv = [program, *arguments]
            sys.orig_argv = [sys.executable, "-m", f"experiments.{program}", *arguments]
            runpy.run_module(f"experiments.{program}", run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out

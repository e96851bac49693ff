"""Programs of `experiments`, forked from a process that has imported their libraries already.

Importing takes longer than many of them do; nothing is computed before the fork.
"""

import functools
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import sys
from pathlib import Path

from quick_compilation import program_environment

ROOT = Path(__file__).parents[1]
_DOMAINS = ("images", "next_scale", "reasoning", "self_play", "text", "tokenizer")
_PRELOADED = ["matplotlib.pyplot", *(f"experiments.{name}" for name in _DOMAINS)]


def start(module: str, *arguments: str) -> None:
    """Runs a program to its end; an AssertionError if it fails."""
    process = _server().Process(target=_run, args=(module, arguments, program_environment()))
    process.start()
    process.join(timeout=900)
    if process.exitcode is None:
        process.kill()
    assert process.exitcode == 0, f"{module} {' '.join(arguments)} ended with {process.exitcode}"


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


def _run(module: str, arguments: tuple[str, ...], environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    sys.argv = [module, *arguments]
    sys.orig_argv = [sys.executable, "-m", f"experiments.{module}", *arguments]
    runpy.run_module(f"experiments.{module}", run_name="__main__", alter_sys=True)

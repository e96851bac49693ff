r"""Is a response right? Its answer against the gold answer, exactly or as mathematics.

Equivalence is math-verify's, with sympy below it, which can take for ever on what a model writes:
9^{9^{9^9}} is computed in one call that no signal handler interrupts. So answers have a greatest
length and are compared in processes of their own (`equivalence.py`, which imports no JAX); one that
exceeds its time is killed and replaced. A response whose comparison fails is wrong.

Rewards as in NFT (arXiv 2505.18116): the strict box for data whose gold answers are integers,
equivalence for the others. POSIX systems only.
"""

import contextlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Literal

from genjax_lab.reasoning.answers import extract_answer, extract_boxed, strict_box

_PROGRAM = Path(__file__).with_name("equivalence.py")
_LONGEST = 2000  # a pair's line, 12 bytes for a character at most, fits a pipe's 64 KiB
_START_SECONDS = 120.0
_MEMORY = 2**31
_ATTEMPTS = 2  # a process may die for reasons that are not its pair's
_MOST_FAILED_STARTS = 3


class Verifier:
    """Judges responses against gold answers; a context manager.

    `verify` may be called from any thread; calls take turns. The processes start at the first call
    and end with `close`, with the block, or with this process, however it ends.

    Attributes:
        num_timeouts: responses so far that are wrong because their comparison took too long.
        num_errors: responses so far that are wrong because their comparison raised an error, used
            too much memory, or ended its process twice.
    """

    def __init__(
        self,
        mode: Literal["strict", "equivalence"] = "equivalence",
        *,
        num_workers: int | None = None,
        timeout: float = 5.0,
        max_length: int = 1000,
    ):
        """Args are checked; nothing is started.

        Args:
            mode: "strict": the last box must be the gold answer character for character
                (`strict_box`). "equivalence": the answer (`extract_answer`) must mean the same.
            num_workers: processes; by default one for each core, at most 8.
            timeout: seconds for one comparison.
            max_length: characters; a longer answer is wrong. At most 2000.

        Raises:
            ValueError: if an argument is outside its range.
            ImportError: if equivalence is asked for and math-verify is not installed.
        """
        if mode not in ("strict", "equivalence"):
            raise ValueError(f"mode must be 'strict' or 'equivalence', got {mode!r}")
        num_workers = min(8, os.cpu_count() or 1) if num_workers is None else num_workers
        if num_workers < 1:
            raise ValueError(f"num_workers must be positive, got {num_workers}")
        if not 0 < timeout < math.inf:
            raise ValueError(f"timeout must be positive and finite, got {timeout}")
        if not 1 <= max_length <= _LONGEST:
            raise ValueError(f"max_length must be in [1, {_LONGEST}], got {max_length}")
        if mode == "equivalence" and importlib.util.find_spec("math_verify") is None:
            raise ImportError(
                "Verifier needs math-verify to tell equivalence: "
                "pip install 'genjax-lab[reasoning]', or use mode='strict'"
            )
        self.mode, self.timeout, self.max_length = mode, timeout, max_length
        self.num_workers = num_workers
        self.num_timeouts = self.num_errors = 0
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        self._closed = False

    def verify(self, predictions: Sequence[str], golds: Sequence[str]) -> list[bool]:
        r"""Whether each response gives its gold answer.

        Args:
            predictions: responses, whole texts; see `extract_answer`.
            golds: gold answers, as many, each bare ("\\frac{1}{2}") or in a box.

        Raises:
            ValueError: if the numbers differ, a gold answer is empty or longer than `max_length`,
                or the verifier is closed.
            RuntimeError: if no process can be started.
        """
        if isinstance(predictions, str) or isinstance(golds, str):
            raise ValueError("predictions and golds must be sequences of texts, not one text")
        if len(predictions) != len(golds):
            raise ValueError(f"{len(predictions)} predictions do not fit {len(golds)} golds")
        right = [self._gold(gold) for gold in golds]
        with self._lock:
            if self._closed:
                raise ValueError("the verifier is closed")
            if self.mode == "strict":
                return [strict_box(p, g) for p, g in zip(predictions, right, strict=True)]
            pairs = [
                (self._shortened(extract_answer(p)), g)
                for p, g in zip(predictions, right, strict=True)
            ]
            # Responses to one question often agree: each pair is judged once.
            verdicts = self._judge(list(dict.fromkeys(pair for pair in pairs if pair[0])))
            found = [verdicts.get(pair, False) for pair in pairs]
            self.num_timeouts += found.count("timeout")
            self.num_errors += found.count("error")
        return [verdict is True for verdict in found]

    def close(self) -> None:
        """Ends the processes; may be called again."""
        with self._lock:
            self._closed = True
            self._kill_workers()

    def __enter__(self) -> "Verifier":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def check(self, golds: Sequence[str]) -> None:
        """Raises the ValueError that `verify` would raise for a gold answer, before it is met."""
        for gold in golds:
            self._gold(gold)

    def _gold(self, gold: str) -> str:
        answer = extract_boxed(gold) or gold.strip()
        if not 1 <= len(answer) <= self.max_length:
            raise ValueError(
                f"gold answers must have 1 to {self.max_length} characters, got {len(answer)}"
            )
        return answer

    def _shortened(self, answer: str | None) -> str | None:
        return None if answer is None or len(answer) > self.max_length else answer

    def _judge(self, pairs: list[tuple[str, str]]) -> dict[tuple[str, str], bool | str]:
        """True, False, "timeout" or "error" for each of distinct pairs."""
        waiting, attempts, verdicts = deque(pairs), Counter(), {}
        while len(self._workers) < min(self.num_workers, len(pairs)):
            self._workers.append(_Worker(self.timeout))
        try:
            while len(verdicts) < len(pairs):
                for index, worker in enumerate(self._workers):
                    pair, outcome = worker.pair, worker.poll()
                    if outcome in ("timeout", "dead"):
                        worker.kill()
                        self._workers[index] = _Worker(self.timeout, worker.failed_starts)
                    if pair is None or outcome is None:
                        continue
                    if outcome == "dead" and attempts[pair] < _ATTEMPTS:
                        waiting.appendleft(pair)
                    else:
                        verdicts[pair] = "error" if outcome == "dead" else outcome
                for worker in self._workers:
                    if waiting and worker.ready and worker.pair is None:
                        attempts[waiting[0]] += 1
                        worker.send(waiting.popleft())
                if len(verdicts) < len(pairs):
                    wait(
                        [worker.replies for worker in self._workers],
                        max(0.0, min(w.deadline for w in self._workers) - time.monotonic()),
                    )
        except BaseException:  # an interrupt leaves pairs half judged
            self._kill_workers()
            raise
        return verdicts

    def _kill_workers(self) -> None:
        for worker in self._workers:
            worker.kill()
        self._workers.clear()


class _Worker:
    """A process that judges one pair at a time.

    Attributes:
        ready: it has loaded what it needs.
        pair: what it judges now, or None.
        deadline: when it must have answered, or started; infinite if nothing is asked of it.
        replies: file from which its replies come.
        failed_starts: how many processes in succession, up to this one, have not become ready.
    """

    def __init__(self, timeout: float, failed_starts: int = 0):
        if failed_starts >= _MOST_FAILED_STARTS:
            raise RuntimeError(
                f"{failed_starts} processes for {_PROGRAM.name} ended while starting"
            )
        # -P: the modules beside the program must not hide those of libraries.
        command = [sys.executable, "-P", str(_PROGRAM), str(2 * timeout + 2), str(_MEMORY)]
        # Popen starts programs without running this process's code after a fork, which JAX's
        # threads would not survive.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._timeout, self._received = timeout, b""
        self.replies = self._process.stdout
        os.set_blocking(self.replies.fileno(), False)
        self.ready, self.pair = False, None
        self.failed_starts = failed_starts + 1
        self.deadline = time.monotonic() + _START_SECONDS

    def send(self, pair: tuple[str, str]) -> None:
        """Ask for a verdict. That the process has ended shows in the next `poll`."""
        self.pair, self.deadline = pair, time.monotonic() + self._timeout
        line = json.dumps({"prediction": pair[0], "gold": pair[1]}) + "\n"
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line.encode("ascii"))
            self._process.stdin.flush()

    def poll(self) -> bool | str | None:
        """Verdict on `pair`, "error", "timeout" or "dead" if it is there, else None; never waits.

        Raises:
            RuntimeError: if the process cannot load math-verify.
        """
        with contextlib.suppress(BlockingIOError):
            part = os.read(self.replies.fileno(), 65536)
            if not part:
                return "dead"
            self._received += part
        if self._received.endswith(b"\n"):
            reply, self._received = json.loads(self._received), b""
            self.pair, self.deadline = None, math.inf
            if self.ready:
                return reply.get("equivalent", "error")
            if not reply["ready"]:
                raise RuntimeError(f"math-verify cannot be loaded: {reply['error']}")
            self.ready, self.failed_starts = True, 0
            return None
        if time.monotonic() < self.deadline:
            return None
        return "timeout" if self.ready else "dead"

    def kill(self) -> None:
        """End the process at once, whatever it does."""
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self.replies.close()

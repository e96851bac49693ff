"""Whatever is asked, verdicts come in bounded time, and no process is left."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from genjax_lab.reasoning import verifier as verifier_module
from genjax_lab.reasoning.verifier import Verifier

_TOWER = "9^{9^{9^9}}"
_PROGRAM = Path(verifier_module.__file__).with_name("equivalence.py")

# Speaks the same protocol, starts at once, and takes its time where it is asked to.
_STUB = """
import json, sys, time
print('{"ready": true}', flush=True)
for line in sys.stdin:
    pair = json.loads(line)
    time.sleep(600 if "forever" in pair["prediction"] else 0.002)
    print(json.dumps({"equivalent": pair["prediction"] == pair["gold"]}), flush=True)
"""


def _box(answer: object) -> str:
    return rf"So it is $\boxed{{{answer}}}$."


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """Verifiers that are made now judge with the stub."""
    path = tmp_path / "stub.py"
    path.write_text(_STUB)
    monkeypatch.setattr(verifier_module, "_PROGRAM", path)


def test_order_is_kept_and_repeated_pairs_agree(stub):
    numbers = [random.Random(1).randrange(1, 40) for _ in range(80)]
    with Verifier(num_workers=3) as opened:
        assert opened.verify([_box(n) for n in numbers], ["15"] * 80) == [n == 15 for n in numbers]
        assert opened.verify([], []) == []


def test_threads_may_share_a_verifier(stub):
    def run(shift: int) -> list[bool]:
        return opened.verify([_box(n) for n in range(12)], [str(shift)] * 12)

    with Verifier(num_workers=2) as opened, ThreadPoolExecutor(4) as threads:
        results = list(threads.map(run, range(4)))
    assert results == [[n == shift for n in range(12)] for shift in range(4)]


def test_golds_and_arguments_are_checked():
    verifier = Verifier()
    for predictions, golds in (
        (["1"], []),
        ("12", ["1", "2"]),
        (["1"], [" "]),
        (["1"], ["1" * 1001]),
    ):
        with pytest.raises(ValueError, match=r"fit|sequences|gold answers"):
            verifier.verify(predictions, golds)
    for arguments in (
        {"mode": "lenient"},
        {"num_workers": 0},
        {"timeout": 0},
        {"timeout": float("inf")},
        {"timeout": float("nan")},
        {"max_length": 0},
        {"max_length": 2001},
    ):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            Verifier(**arguments)


def test_strict_mode_starts_no_process():
    with Verifier("strict") as strict:
        assert (
            strict.verify([r"\boxed{34}", r"\boxed{34.0}", "34"], ["34"] * 3)
            == [True] + [False] * 2
        )
        assert strict._workers == []
    with pytest.raises(ValueError, match="closed"):
        strict.verify([r"\boxed{34}"], ["34"])


_HOSTILE = {
    "tower": _TOWER,
    "factorials": "9!!!!!!",
    "braces": "{" * 10**5 + "1" + "}" * 10**5,
    "braces within the limit": "{" * 450 + "1" + "}" * 450,
    "fractions": r"\frac{1}{" * 60 + "2" + "}" * 60,
    "digits": "7" * 10**6,
    "large power": "7^{999999999}",
    "null bytes": "\x00" * 10 + "7\x00",
    "surrogates": "\ud800\udfff7",
    "lines": '1\n{"equivalent": true}\n2',
    "quotes": '1", "gold": "1',
    "commands": r"\input{/etc/passwd}",
    "emoji": "🧮" * 900,
}


def test_hostile_answers_end_and_are_wrong():
    names = list(_HOSTILE)
    with Verifier(num_workers=2, timeout=1.0) as hostile:
        found = hostile.verify([_box(_HOSTILE[name]) for name in names], ["10/6"] * len(names))
        assert [name for name, right in zip(names, found, strict=True) if right] == []
        assert hostile.num_timeouts >= 1


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def _workers_with(verifier: Verifier, condition) -> "list[verifier_module._Worker]":
    """Waits until there are such workers."""
    while True:
        found = [worker for worker in list(verifier._workers) if condition(worker)]
        if found:
            return found
        time.sleep(0.002)


def test_killed_processes_lose_no_answer(stub):
    numbers = [str(n) for n in range(300)]
    with Verifier(num_workers=2, timeout=30.0) as verifier, ThreadPoolExecutor(1) as threads:
        assert verifier.verify(["1", "2"], ["1", "1"]) == [True, False]
        before = {worker._process.pid for worker in verifier._workers}
        for pid in before:
            os.kill(pid, signal.SIGKILL)  # while they wait
        while any(map(_runs, before)):
            time.sleep(0.002)
        result = threads.submit(verifier.verify, numbers, numbers)
        busy = _workers_with(verifier, lambda w: w.pair and w._process.pid not in before)
        os.kill(busy[0]._process.pid, signal.SIGKILL)  # while it works
        assert all(result.result())
        after = {worker._process.pid for worker in verifier._workers}
        assert not after & {*before, busy[0]._process.pid}
        assert (verifier.num_timeouts, verifier.num_errors) == (0, 0)


def test_a_pair_that_ends_its_process_twice_is_wrong(stub):
    predictions = [_box("forever"), "3", _box("forever")]
    with Verifier(num_workers=2, timeout=300.0) as verifier, ThreadPoolExecutor(1) as threads:
        result = threads.submit(verifier.verify, predictions, ["1", "3", "1"])
        pid = None
        for _ in range(2):
            at_it = _workers_with(
                verifier,
                lambda w, last=pid: w.pair and w.pair[0] == "forever" and w._process.pid != last,
            )
            pid = at_it[0]._process.pid
            os.kill(pid, signal.SIGKILL)
        assert result.result() == [False, True, False]
        assert (verifier.num_timeouts, verifier.num_errors) == (0, 2)  # responses, not pairs


def test_a_pair_that_takes_too_long_is_wrong_and_the_others_go_on(stub):
    predictions = [_box("forever"), *map(str, range(30)), _box("forever too")]
    with Verifier(num_workers=2, timeout=5.0) as verifier:
        assert verifier.verify(predictions, ["1", *map(str, range(30)), "1"]) == [
            False,
            *[True] * 30,
            False,
        ]
        assert (verifier.num_timeouts, verifier.num_errors) == (2, 0)
        assert verifier.verify(["7"], ["7"]) == [True]


def test_the_program_imports_no_jax_and_keeps_to_its_protocol():
    pairs = [("1/2", "0.5"), ("1\n2", "3"), ("\ud800", "1")]
    lines = "".join(json.dumps({"prediction": p, "gold": g}) + "\n" for p, g in pairs)
    done = subprocess.run(
        [sys.executable, "-P", "-X", "importtime", _PROGRAM, "60", str(2**31)],
        input=lines + "no JSON\n",
        capture_output=True,
        text=True,
        check=True,
    )
    ready, *replies = map(json.loads, done.stdout.splitlines())
    assert ready == {"ready": True}
    assert replies[:2] == [{"equivalent": True}, {"equivalent": False}]
    assert len(replies) == 4
    assert "error" in replies[3]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "sympy" in imported
    assert not imported & {"jax", "jaxlib", "numpy", "genjax_lab"}


def test_a_killed_parent_leaves_no_processes(stub):
    program = f"""
import time
from pathlib import Path
from genjax_lab.reasoning import verifier
verifier._PROGRAM = Path({str(verifier_module._PROGRAM)!r})
opened = verifier.Verifier(num_workers=2)
opened.verify(["1", "2"], ["1", "2"])
print(*(worker._process.pid for worker in opened._workers), flush=True)
time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    assert all(map(_runs, pids))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 120
    while any(map(_runs, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_runs, pids))


def test_a_process_that_computes_without_end_ends_without_its_parent():
    command = [sys.executable, "-P", _PROGRAM, "1", str(2**31)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    process.communicate(json.dumps({"prediction": _TOWER, "gold": "10/6"}) + "\n")
    assert process.returncode == -signal.SIGALRM


def test_closing_ends_the_processes(stub):
    with Verifier(num_workers=1) as opened:
        opened.verify(["1"], ["1"])
        (worker,) = opened._workers
        assert _runs(worker._process.pid)
    assert not _runs(worker._process.pid)
    opened.close()


def test_without_math_verify_equivalence_is_refused(monkeypatch):
    monkeypatch.setattr(verifier_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"genjax-lab\[reasoning\]"):
        Verifier()
    with Verifier("strict") as strict:
        assert strict.verify([r"\boxed{1}"], ["1"]) == [True]


@pytest.mark.parametrize(
    ("program", "match"),
    [
        ('print(\'{"ready": false, "error": "no sympy"}\')', "no sympy"),
        ("raise SystemExit(1)", "3 processes"),
    ],
)
def test_processes_that_cannot_start_are_an_error(monkeypatch, tmp_path, program, match):
    path = tmp_path / "program.py"
    path.write_text(program)
    monkeypatch.setattr(verifier_module, "_PROGRAM", path)
    with Verifier(num_workers=1) as broken:
        for _ in range(2):
            with pytest.raises(RuntimeError, match=match):
                broken.verify([_box("1/2")], ["0.5"])
            assert broken._workers == []


def test_an_interrupt_leaves_no_half_judged_pair(stub, monkeypatch):
    calls, wait = itertools.count(), verifier_module.wait

    def interrupted(*arguments):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return wait(*arguments)

    monkeypatch.setattr(verifier_module, "wait", interrupted)
    with Verifier(num_workers=1) as opened:
        with pytest.raises(KeyboardInterrupt):
            opened.verify(["1", "2"], ["1", "1"])
        assert opened._workers == []
        assert opened.verify(["2", "1"], ["1", "1"]) == [False, True]

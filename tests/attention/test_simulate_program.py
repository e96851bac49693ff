"""The simulator as a program."""

import pytest
from started_programs import start

HUNYUAN = ["--grid=30,48,80", "--window=18,24,24", "--tiles=4x8x8/2x8x8,2x8x8/2x8x8"]


def run(*arguments):
    return start("simulate_attention", *arguments, check=False)


def test_it_finds_strides():
    lines = run(*HUNYUAN).stdout.splitlines()
    assert lines[1].split() == ["2x8x8/2x8x8", "2x8x8", "72900", "100%", "0%", "11.111", "11.111"]
    assert lines[2].split()[1:3] == ["16x8x8", "38880"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--window=90", "--stride=1"], "axis 0 must be at most"),
        (["--tiles=4x8x8"], "16x16/16x8"),
        (["--additional=3"], "need a --stride"),
    ],
)
def test_mistakes_are_named(arguments, message):
    result = run(*HUNYUAN, *arguments)
    assert result.returncode != 0 and message in result.stderr + result.stdout

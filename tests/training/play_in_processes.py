"""One of several processes that play one round together; says what it wrote and what it reached.

Usage: play_in_processes.py INDEX COUNT PORT WORKDIR
"""

import json
import sys
import time
from pathlib import Path

import jax
import tiny_self_play

from genjax_lab.data import sample_pool
from genjax_lab.training import run_self_play

index, count, port, workdir = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", count, index)

written, drawn = [], []
write, digest = sample_pool._write_arrays, sample_pool._digest


def record_write(path, arrays):
    written.append(path.name)
    write(path, arrays)


def digest_late(path):
    time.sleep(0.5 * index)  # another process is at the next part already
    return digest(path)


sample_pool._write_arrays, sample_pool._digest = record_write, digest_late
model = tiny_self_play.gaussian()


def draw(variables, seeds):
    drawn.append([seeds.start, seeds.stop])
    yield from model.draw(variables, seeds)


variables = run_self_play(
    model._replace(draw=draw),
    workdir=workdir,
    config=tiny_self_play.several_parts(mesh={"data": count}),
    model_config=tiny_self_play.MODEL_CONFIG,
)
mean = variables["params"]["mean"].ravel().tolist()
report = {"written": written, "drawn": drawn, "mean": mean}
(workdir / f"report_{index}.json").write_text(json.dumps(report))

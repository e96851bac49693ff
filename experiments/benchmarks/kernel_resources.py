"""What the GPU kernels of neighborhood attention take of a GPU, compiled without one.

    python -m experiments.benchmarks.kernel_resources [--shapes=flux-4k,nat-t] [--targets=80,90,100]

Needs PyPI's `triton`, which brings NVIDIA's assembler; where it lies outside this environment, put
its folder on PYTHONPATH. XLA has a Triton of its own, so the numbers are close to what runs but not
the same. Prints registers and spilled bytes of a thread, shared memory of a block and the
tensor-core instruction found; writes experiments/results/kernel_resources.json.
"""

import contextlib
import functools
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from absl import app, flags

from genjax_lab.attention.kernels import kernel_attention
from genjax_lab.attention.shapes import SHAPES, AttentionShape

_SHAPES = flags.DEFINE_list("shapes", None, "Names of attention shapes; all by default.")
_TARGETS = flags.DEFINE_list("targets", ["80", "90", "100"], "Compute capabilities, times ten.")
_OUT = flags.DEFINE_string("out", "experiments/results/kernel_resources.json", "Where they go.")

# Bytes of a thread. Kernels with four warps spill up to this, mostly around their loops, and were
# still the fastest on an H100.
MAX_SPILL = 640
MAX_SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes of a block
TENSOR_CORES = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")  # newest first


def on_described_gpu() -> contextlib.AbstractContextManager[None]:
    """Within it programs may be lowered for a GPU where there is none; newer JAX asks which."""
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("device",), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


class Kernel(NamedTuple):
    """A kernel in Triton's IR and its launch parameters."""

    name: str
    ttir: str
    num_warps: int
    num_stages: int


class Resources(NamedTuple):
    """What a compiled kernel takes; bytes but for the registers of a thread."""

    registers: int
    spill: int
    shared: int
    tensor_cores: str | None


def kernels_of(shape: AttentionShape) -> list[Kernel]:
    """The distinct kernels of forward and backward, as JAX lowers them for CUDA."""
    dtype = jnp.dtype(shape.dtype)
    array = lambda *sizes: jax.ShapeDtypeStruct(sizes, dtype)  # noqa: E731
    query = array(shape.batch, *shape.grid, shape.heads, shape.head_dim)
    key = array(shape.batch, *shape.grid, shape.kv_heads, shape.head_dim)
    extra = None
    if shape.num_additional:
        extra = array(shape.batch, shape.num_additional, shape.kv_heads, shape.head_dim)

    def attend(query, key, value, more_keys, more_values):
        return kernel_attention(
            *(query, key, value, shape.spec),
            additional_keys=more_keys,
            additional_values=more_values,
            platform="gpu",
            q_tile=shape.q_tile,
            kv_tile=shape.kv_tile,
        )

    def gradient(*arrays):
        outputs, backward = jax.vjp(attend, *arrays)
        return backward(outputs)

    from jax._src.pallas.triton import (
        pallas_call_registration as registration,
    )  # has no public name

    found: list[Kernel] = []
    lower, call = registration.lowering.lower_jaxpr_to_triton_module, registration.mlir.custom_call

    def lowered(*args, **kwargs):
        result = lower(*args, **kwargs)
        found.append(Kernel("", result.module.operation.get_asm(), 0, 0))
        return result

    def called(*args, backend_config, **kwargs):
        if "num_warps" in backend_config:
            name, *sizes = (
                backend_config[key].value for key in ("name", "num_warps", "num_stages")
            )
            found[-1] = Kernel(name, found[-1].ttir, *sizes)
        return call(*args, backend_config=backend_config, **kwargs)

    with (
        mock.patch.object(registration.lowering, "lower_jaxpr_to_triton_module", lowered),
        mock.patch.object(registration.mlir, "custom_call", called),
        on_described_gpu(),
    ):
        program = jax.jit(gradient).trace(query, key, key, extra, extra)
        program.lower(lowering_platforms=("cuda",))
    return [kernel for number, kernel in enumerate(found) if kernel not in found[:number]]


def resources(kernel: Kernel, capability: int) -> Resources:
    """Compiles a kernel for a compute capability (times ten) and reads what it takes."""
    import triton
    from triton.backends.compiler import GPUTarget

    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ttir")
        path.write_text(kernel.ttir)
        compiled = triton.compile(str(path), GPUTarget("cuda", capability, 32), options)
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        dump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run(
            [dump, "-res-usage", cubin], check=True, capture_output=True, text=True
        ).stdout
    number = lambda name: int(re.search(rf"{name}:(\d+)", usage).group(1))  # noqa: E731
    instruction = next((name for name in TENSOR_CORES if name in compiled.asm["ptx"]), None)
    stack = max(number("STACK"), number("LOCAL"))
    return Resources(number("REG"), stack, compiled.metadata.shared, instruction)


def table(shapes: list[AttentionShape], targets: list[int]) -> dict[str, Any]:
    """The resources of each kernel of each shape, by target."""
    measure = functools.cache(resources)
    result: dict[str, Any] = {}
    for shape in shapes:
        counts: dict[str, int] = {}
        for kernel in kernels_of(shape):
            counts[kernel.name] = counts.get(kernel.name, 0) + 1
            name = kernel.name + " (additional)" * (counts[kernel.name] > 1)
            row = {f"sm_{target}": measure(kernel, target)._asdict() for target in targets}
            result.setdefault(shape.name, {})[name] = {
                "num_warps": kernel.num_warps,
                "num_stages": kernel.num_stages,
                **row,
            }
            print(shape.name, name, kernel.num_warps, kernel.num_stages, flush=True)
            for target, found in row.items():
                print(
                    "   ", target, *(f"{key} {value}" for key, value in found.items()), flush=True
                )
    return result


def main(_) -> None:
    """Compiles, prints and writes the table."""
    named = {shape.name: shape for shape in SHAPES}
    unknown = sorted(set(_SHAPES.value or ()) - set(named))
    if unknown:
        raise app.UsageError(f"--shapes has {unknown}, not in {sorted(named)}")
    shapes = [named[name] for name in _SHAPES.value or named]
    import triton

    result = {
        "command": shown_command("benchmarks.kernel_resources"),
        "jax": jax.__version__,
        "triton": triton.__version__,
        "limits": {"spill": MAX_SPILL, "shared": {f"sm_{t}": s for t, s in MAX_SHARED.items()}},
        "table": table(shapes, [int(target) for target in _TARGETS.value]),
    }
    Path(_OUT.value).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    app.run(main)

"""How the tests compile: programs are small here, and compiled more often than run."""

import os
import subprocess
import sys

# LLVM's optimisation takes half the time, and the emitters of fused loops half of the rest.
# XLA ends a process that names a flag which it does not know: a later version may drop the second.
_FLAGS = "--xla_backend_optimization_level=0"
_PERHAPS = "--xla_cpu_use_fusion_emitters=false"


def _is_known(flag: str) -> bool:
    program = (sys.executable, "-c", "import jax; jax.devices()")
    environment = {**os.environ, "XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(program, env=environment, capture_output=True).returncode == 0


def xla_flags() -> str:
    """XLA_FLAGS of tests and of the programs that they start; pytest-xdist's workers inherit it."""
    name = "QUICK_XLA_FLAGS"
    if name not in os.environ:
        os.environ[name] = f"{_FLAGS} {_PERHAPS}" if _is_known(_PERHAPS) else _FLAGS
    return os.environ[name]


def program_environment() -> dict[str, str]:
    """The environment of a program that a test starts, on one device."""
    return {**os.environ, "XLA_FLAGS": xla_flags(), "JAX_PLATFORMS": "cpu"}

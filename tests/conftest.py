"""Eight virtual CPU devices and one cache of programs for all tests, set before JAX starts."""

import os
import shutil
import tempfile

import quick_collection  # noqa: F401
from quick_compilation import xla_flags

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {xla_flags()}"
)
# A thread of XLA's CPU client blocks in every collective that it waits for. With as many threads as
# cores, eight devices can all wait for threads that wait for them: so give them enough.
os.environ["NPROC"] = "32"

# Compiling is most of the suite's time, and many tests and the programs that they start compile the
# same: whoever is first leaves the result to the others.
_CACHE = "JAX_COMPILATION_CACHE_DIR"
_made = None
if _CACHE not in os.environ:
    os.environ[_CACHE] = _made = tempfile.mkdtemp(prefix="genjax_lab_compiled_")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def pytest_unconfigure():
    """Removes the cache where it was made, which is not in pytest-xdist's workers."""
    if _made is not None:
        shutil.rmtree(_made, ignore_errors=True)


def pytest_terminal_summary(terminalreporter):
    """Says so if comparisons with the original packages were left out."""
    skipped = [
        report
        for report in terminalreporter.stats.get("skipped", [])
        if "oracle" in getattr(report, "keywords", {})
    ]
    if skipped:
        terminalreporter.write_line(
            f"{len(skipped)} comparisons with original packages were skipped; "
            "`make oracles` installs what they need."
        )

"""Eight virtual CPU devices for every test, set before JAX starts."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
# A thread of XLA's CPU client blocks in every collective that it waits for. With as many threads as
# cores, eight devices can all wait for threads that wait for them: so give them enough.
os.environ["NPROC"] = "32"


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

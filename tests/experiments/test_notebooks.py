"""Notebooks run from top to bottom, with smaller numbers in their parameter cell."""

from pathlib import Path

import ipykernel_launcher
import nbclient
import nbformat
import pytest
from jupyter_client.provisioning import local_provisioner
from started_programs import Program

FOLDER = Path(__file__).parents[2] / "experiments" / "notebooks"
SMALL = {
    "01_image_diffusion": "NUM_STEPS = 50\nNUM_SAMPLES = 100\nBUDGETS = [5]\n",
    "02_ddo": "NUM_STEPS = 50\nROUND_STEPS = 50\nROUNDS = 1\nNUM_BLOCKS = 1\nNUM_SAMPLES = 100\n",
    "03_neighborhood_attention": "GRID = (16, 16)\nWINDOWS = (8,)\nREPEATS = 1\n",
    "04_masked_diffusion": (
        "NUM_STEPS = 2\nLENGTH = 16\nDEPTH = 1\nNUM_DRAWS = 1\nNUM_SAMPLES = 4\n"
        "SAMPLING_STEPS = (4,)\n"
    ),
    "05_nft": (
        "EXAMPLE_STEPS = 20\nANSWERS = 8\nQUESTION_STEPS = 2\nROLLOUTS = 1\nOWN_ROLLOUTS = 1\n"
        "EVALUATIONS = 1\nNUM_SAMPLES = 64\nEPSILONS = (0.1, 1.0)\nMETHODS = ('nft',)\nDEPTH = 1\n"
    ),
}
NUM_PICTURES = {
    "01_image_diffusion": 7,
    "02_ddo": 4,
    "03_neighborhood_attention": 4,
    "04_masked_diffusion": 6,
    "05_nft": 7,
}


class Kernel(Program):
    """What jupyter_client asks of a kernel's process, for one that is forked and has one device."""

    stdin = stdout = stderr = None

    def __init__(self, command, *, cwd, **keywords):
        arguments = command[command.index("ipykernel_launcher") + 1 :]
        # Matplotlib has been imported before the kernel could choose its way to show pictures.
        launcher = Path(ipykernel_launcher.__file__)
        super().__init__(launcher, *arguments, "--matplotlib=inline", directory=cwd, group=True)

    def poll(self):
        return None if self.is_running() else self._process.exitcode

    def wait(self):
        return self.end(None).returncode


def test_every_notebook_is_tested():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(SMALL)


@pytest.mark.parametrize("name", sorted(SMALL))
def test_notebook_runs_from_top_to_bottom(name, tmp_path, monkeypatch):
    monkeypatch.setattr(local_provisioner, "launch_kernel", Kernel)
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    (parameters,) = [
        cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])
    ]
    parameters.source = SMALL[name]
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) >= NUM_PICTURES[name]

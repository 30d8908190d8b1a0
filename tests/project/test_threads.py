"""Threads sleep while they wait: OMP_WAIT_POLICY is passive before torch is imported, and what users set stays."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WATCHED = """
import os, sys

class Watch:  # asked first where each module is
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"))

sys.meta_path.insert(0, Watch())
"""


@pytest.mark.parametrize(
    "first, own",
    [("import lcqat_min.cli.main", None), ("import lcqat_min", "active"), ("from course import check", None)],
)
def test_threads_are_told_before_torch_reads_it(first, own):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'notebooks'}"} | ({"OMP_WAIT_POLICY": own} if own else {})
    program = WATCHED + first + "\nassert 'torch' in sys.modules"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-1] == (own or "passive")  # before that, the package asks whether there is a torch


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_import_course_before_torch(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    setup = next("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert 0 < setup.index("from course import") < setup.index("import torch")

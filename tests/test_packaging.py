"""The promises of the set-up: every dependency explained and pinned, core imports small, targets that exist.

Checked on the files as they stand, without building anything and without a network.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
CORE = (
    "constants digits codebook search lloyd rotate rounding calibrate feedback ptq linear convert checkpoint "
    "distillation train evaluate docstrings text locks tensorfile"
).split()
OPTIONAL = "transformers datasets triton tqdm matplotlib safetensors accelerate".split()
TARGETS = "help setup compare test bench figures notebooks slides lint lab clean".split()


def normalized(requirement: str) -> str:
    """The project name of a requirement, as package indexes compare names (PEP 503)."""
    return re.sub(r"[-_.]+", "-", re.match(r"[A-Za-z0-9._-]+", requirement)[0]).lower()


def requirements() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["dependencies"] + sum(project["optional-dependencies"].values(), [])


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {normalized(name): version for name, version in pinned}


@pytest.mark.parametrize("requirement", requirements())
def test_every_dependency_is_explained_and_pinned(requirement):
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(rf'^ *"{re.escape(requirement)}", +# \S+', text, re.MULTILINE), "no comment on its line"
    lowest = re.search(r">=([0-9.]+)", requirement)[1]
    pin = pins()[normalized(requirement)]
    assert numbers(pin) >= numbers(lowest), f"pinned to {pin}, outside its own range {requirement}"


def numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def test_conda_environment_has_one_source_and_the_same_pins():
    text = (ROOT / "environment.yml").read_text(encoding="utf-8")
    environment = yaml.safe_load(text)
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    *conda, last = environment["dependencies"]  # torch and numpy must both come from pip
    assert [re.split("[=<>]", name)[0] for name in conda] == ["python", "pip"]
    assert last["pip"] == ["-c constraints.txt", "-e .[notebooks,test,kernels]"]
    lines = text.partition("dependencies:\n")[2].splitlines()
    assert [line for line in lines if "#" not in line and line.strip() != "- pip:"] == []


def test_no_file_silences_a_double_openmp_runtime():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
    forbidden = b"KMP_" + b"DUPLICATE_LIB_OK"
    files = [ROOT / name for name in names if name]
    assert ROOT / "pyproject.toml" in files
    assert [str(file) for file in files if file.is_file() and forbidden in file.read_bytes()] == []


def test_core_imports_with_torch_and_the_standard_library_alone():
    modules = [f"lcqat_min.{name}" for name in CORE if (ROOT / "lcqat_min" / f"{name}.py").exists()]
    assert modules
    program = (
        f"import importlib, sys\n"
        f"for name in {OPTIONAL!r}: sys.modules[name] = None  # importing it now raises ImportError\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_core_works_with_torch_and_the_standard_library_alone():
    """Quantize, train and measure a model of one layer where nothing else can be imported, numpy included."""
    program = f"""
import sys
from types import SimpleNamespace
for name in {[*OPTIONAL, "numpy"]!r}: sys.modules[name] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "numpy" else find(name, *more)
import copy, torch
from lcqat_min import QuantConfig, TrainConfig, kl_to, quantize, train
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.linear = torch.nn.Embedding(16, 16), torch.nn.Linear(16, 16)
    def forward(self, input_ids, use_cache=False):
        return SimpleNamespace(logits=self.linear(self.embedding(input_ids)))
teacher, ids = Net(), torch.arange(64)
model = copy.deepcopy(teacher)
quantize(model, [ids.view(2, 32) % 16], QuantConfig())
train(model, [ids.view(2, 32) % 16], TrainConfig(1), teacher)
print(kl_to(teacher, model, ids % 16, 32))
"""
    environment = os.environ | {"LCQAT_QUIET": "1"}
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and float(run.stdout) > 0, run.stderr


@pytest.mark.parametrize("target", TARGETS)
def test_make_targets_exist(target):
    run = make("-n", target)
    assert run.returncode == 0, run.stderr


def test_make_alone_lists_all_targets():
    listed = re.findall(r"^  make (\w+) +\S", make().stdout, re.MULTILINE)
    assert sorted(listed) == sorted(TARGETS)


def test_make_installs_the_pinned_torch_first():
    installs = re.findall(r"-m pip install (.*)", make("-n", "-W", "constraints.txt", "setup").stdout)
    first, second = (line.strip() for line in installs)
    assert first == f"torch=={pins()['torch']}"
    assert second == '-c constraints.txt -e ".[notebooks,test,kernels]"'


def make(*arguments: str) -> subprocess.CompletedProcess:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    inherited = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "TORCH_INDEX", "ARGS"}  # `make test` may be what runs us
    environment = {name: value for name, value in os.environ.items() if name not in inherited}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)

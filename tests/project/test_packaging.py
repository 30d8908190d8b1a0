"""The promises of the set-up: every dependency explained and pinned, core imports small, targets that exist.

Checked on the files as they stand and on a wheel built from a copy of them, without a network.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import lcqat_min

ROOT = Path(__file__).resolve().parents[2]
CORE = "codebook layer kernels ptq qat systems disk harness".split()
OPTIONAL = "transformers datasets triton tqdm matplotlib safetensors accelerate".split()
TARGETS = "help setup compare test anywhere bench figures notebooks slides lint lab lock clean".split()


def normalized(requirement: str) -> str:
    """The project name of a requirement, as package indexes compare names (PEP 503)."""
    return re.sub(r"[-_.]+", "-", re.match(r"[A-Za-z0-9._-]+", requirement)[0]).lower()


def requirements() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["dependencies"] + sum(project["optional-dependencies"].values(), [])


def pins() -> dict[str, str]:
    """Project -> the one version that suits this Python and system."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    wanted = [Requirement(line) for line in lines if line and not line.startswith("#")]
    here = [one for one in wanted if one.marker is None or one.marker.evaluate()]
    found = {normalized(one.name): str(one.specifier).removeprefix("==") for one in here}
    assert len(found) == len(here) and all(re.fullmatch(r"==[^,]+", str(one.specifier)) for one in here)
    return found


def comments() -> list[tuple[str, str]]:
    """(requirement, comment) of each dependency line of pyproject.toml, in order."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.findall(r'^ +"([^"]+>=[^"]+)", +# (\S.*)$', text, re.MULTILINE)


def uses(file: Path, package: str) -> bool:
    """Whether a Python file or a notebook imports a package, also inside functions; for numpy, also `x.numpy()`."""
    source = file.read_text(encoding="utf-8")
    if file.suffix == ".ipynb":
        cells = json.loads(source)["cells"]
        source = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
        elif isinstance(node, ast.Attribute) and node.attr == "numpy":
            names.add("numpy")
    return package in names


def wrong_places(requirement: str, comment: str) -> list[str]:
    """Places that a comment names and that do not use the package: files, folders (any file in them), make targets."""
    package, wrong = normalized(requirement).replace("-", "_"), []
    for place in comment.split(": ")[0].split(", "):
        if target := re.fullmatch(r"`make (\w+)`", place):
            used = target[1] in TARGETS
        else:
            path = ROOT / place
            files = [path] if path.is_file() else [*path.rglob("*.py"), *path.rglob("*.ipynb")]
            used = path.exists() and any(uses(file, package) for file in files)
        wrong += [] if used else [place]
    return wrong


def test_every_dependency_says_where_it_is_used():
    assert [requirement for requirement, _ in comments()] == requirements(), "a line without a comment"
    assert {
        requirement: wrong for requirement, comment in comments() if (wrong := wrong_places(requirement, comment))
    } == {}


def test_a_wrong_comment_is_noticed():
    for comment in (
        "lcqat_min/harness/text.py: pictures",
        "nowhere/",
        "`make pictures`",
        "scripts/bench_cpu.py, tests/",
    ):
        assert wrong_places("matplotlib>=3.9", comment) == [place for place in comment.split(": ")[0].split(", ")]
    assert wrong_places("matplotlib>=3.9", "lcqat_min/harness/report.py: pictures") == []


def test_every_package_that_lcqat_min_imports_is_a_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {normalized(one).replace("-", "_") for one in project["dependencies"]} | {"triton"}
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "lcqat_min").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0}
    packages = {name.split(".")[0] for name in found} - sys.stdlib_module_names - {"lcqat_min"}
    assert packages <= declared and "accelerate" not in packages


@pytest.mark.parametrize("requirement", sorted(set(requirements())))
def test_every_dependency_is_pinned(requirement):
    lowest = re.search(r">=([0-9.]+)", requirement)[1]
    pin = pins()[normalized(requirement)]
    assert numbers(pin) >= numbers(lowest), f"pinned to {pin}, outside its own range {requirement}"


def numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def test_the_text_of_every_reader_is_made_of_pinned_packages():
    """Also of packages that others bring in: a new version of one is another text, and other figures."""
    from lcqat_min.harness.corpus import PACKAGES

    owners = packages_distributions()
    assert set(PACKAGES) <= owners.keys(), "not brought in by this project: some readers have it, others do not"
    assert {normalized(owner) for name in PACKAGES for owner in owners[name]} <= pins().keys()


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
    files = [file for room in CORE for file in (ROOT / "lcqat_min" / room).glob("*.py")]
    files = [file for file in files if file.name != "triton_kernels.py"]
    modules = [f"lcqat_min.{file.parent.name}.{file.stem}".removesuffix(".__init__") for file in files]
    assert all((ROOT / "lcqat_min" / room).is_dir() for room in CORE) and len(modules) > 4 * len(CORE)
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
from lcqat_min import LCQAT, TrainConfig, kl_to, quantize, train
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.linear = torch.nn.Embedding(16, 16), torch.nn.Linear(16, 16)
    def forward(self, input_ids, use_cache=False):
        return SimpleNamespace(logits=self.linear(self.embedding(input_ids)))
teacher, ids = Net(), torch.arange(64)
model = copy.deepcopy(teacher)
quantize(model, [ids.view(2, 32) % 16], LCQAT())
train(model, [ids.view(2, 32) % 16], TrainConfig(1), teacher)
print(kl_to(teacher, model, ids % 16, 32))
"""
    environment = os.environ | {"TQDM_DISABLE": "1"}
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and float(run.stdout) > 0, run.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with what `pip install .` puts into site-packages; the wheel is built from a copy of this tree."""
    pytest.importorskip("setuptools")
    place = tmp_path_factory.mktemp("wheel")
    for name in ("lcqat_min", "models", "results"):
        shutil.copytree(ROOT / name, place / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place / "tree")
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(place)!r})"
    run = subprocess.run([sys.executable, "-c", build], cwd=place / "tree", capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    with zipfile.ZipFile(next(place.glob("*.whl"))) as wheel:
        wheel.extractall(place / "site")
    return place / "site"


def test_a_wheel_holds_what_the_main_job_needs_and_no_more(installed):
    files = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    code = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lcqat_min").rglob("*.py")}
    model = {f"lcqat_min/bundled/models/doc-llama/{path.name}" for path in (ROOT / "models" / "doc-llama").iterdir()}
    assert {name.replace(os.sep, "/") for name in files if "dist-info" not in name} == {
        *code,
        *model,
        "lcqat_min/bundled/results/compare.json",
    }
    for name in (*model, "lcqat_min/bundled/results/compare.json"):
        assert (installed / name).read_bytes() == (ROOT / name.removeprefix("lcqat_min/bundled/")).read_bytes()


def test_an_installed_package_finds_its_model_from_anywhere(installed, tmp_path):
    program = (
        "import lcqat_min.harness.models as hub, lcqat_min.cli.compare as runs, lcqat_min.cli.main as cli\n"
        "print(hub.BUNDLED); print((runs.DATA / 'results' / 'compare.json').is_file())\n"
        "cli.main(['compare', '--save']); cli.main(['compare', '--help'])\n"
    )
    environment = os.environ | {"PYTHONPATH": str(installed)}
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    bundled, committed, *text = run.stdout.splitlines()
    assert Path(bundled).resolve().is_relative_to(installed.resolve()) and committed == "True"
    assert any("runs/<time>" in line for line in text) and "this package is not in one" in run.stderr
    assert not list(tmp_path.iterdir())


def test_every_file_names_the_same_version_and_papers():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    newest = re.search(r"^## \[(\S+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert lcqat_min.__version__ == citation["version"] == newest == version
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for paper in citation["references"]:
        name, number = paper["title"].split(":")[0], paper["url"].rpartition("/")[2]
        assert f"{name} ({number})" in readme and paper["doi"].endswith(f"arXiv.{number}") and paper["authors"]


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_pages_name_files_and_targets_that_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s#]+)\)", text) if "://" not in link]
    paths = re.findall(r"(?:^|[` ])((?:lcqat_min|scripts|tests|results|figures|notebooks|examples)/[\w./-]*)`", text)
    assert links + paths
    assert [path for path in links + paths if not (ROOT / path).exists() and "NN" not in path] == []
    assert set(re.findall(r"`make (\w+)", text)) <= set(TARGETS)


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

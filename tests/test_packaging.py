"""rawkern installed from a wheel, and without torch."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

import rawkern
from rawkern.runtime import source

ROOT = Path(__file__).parents[1]
SOURCES = ("*.cu", "*.cuh", "*.h")

#: Every launcher module imports and one of them runs, while torch cannot be imported.
WITHOUT_TORCH = """
import importlib, pkgutil, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
import numpy as np
import rawkern
import rawkern.launchers
for module in pkgutil.iter_modules(rawkern.launchers.__path__):
    importlib.import_module(f"rawkern.launchers.{module.name}")
from rawkern.launchers.gelu import gelu
result = gelu(np.array([-1.0, 0.0, 1.0]))
np.testing.assert_allclose(result, [-0.15865525393145707, 0, 0.8413447460685429], rtol=1e-14)
assert rawkern.launchers is sys.modules["rawkern.launchers"] and rawkern.epilogue.GELU
assert "torch" not in sys.modules
try:
    rawkern.gelu
except ImportError as error:
    assert error.name == "torch"
else:
    raise AssertionError("rawkern.gelu needs torch")
print(rawkern.__file__)
from rawkern.runtime import source
print(source.root())
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the checkout, in which building leaves its files."""
    copy = tmp_path_factory.mktemp("copy")
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("rawkern", "cuda"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", "dist", "."]
    process = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    (path,) = (copy / "dist").glob("*.whl")
    return path


def files_below(folder, patterns):
    return {path.relative_to(folder).as_posix() for pattern in patterns for path in folder.rglob(pattern)}


def run_without_torch(path, cwd):
    environment = {**os.environ, "PYTHONPATH": str(path)}
    command = [sys.executable, "-c", WITHOUT_TORCH]
    process = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    return process.stdout.split()


def test_wheel_holds_everything_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    python = {f"rawkern/{name}" for name in files_below(ROOT / "rawkern", ["*.py"])}
    device = {f"rawkern/_cuda/{name}" for name in files_below(ROOT / "cuda", SOURCES)}
    assert python | device == {name for name in names if ".dist-info/" not in name}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "any" in wheel.name and rawkern.__version__ in wheel.name


def test_wheel_runs_outside_the_checkout(wheel, tmp_path):
    installed = tmp_path / "site-packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    # NVIDIA's packages bring a folder of this name; it must not be taken for ours.
    (installed / "cuda" / "include").mkdir(parents=True)
    package, device_code = run_without_torch(installed, tmp_path)
    assert package == str(installed / "rawkern" / "__init__.py")
    assert device_code == str(installed / "rawkern" / "_cuda")


def test_checkout_runs_without_torch(tmp_path):
    package, device_code = run_without_torch(ROOT, tmp_path)
    assert package == str(ROOT / "rawkern" / "__init__.py")
    assert device_code == str(ROOT / "cuda")


def test_device_code_is_no_python_package():
    assert not list((ROOT / "cuda").rglob("*.py"))
    assert source.root().joinpath("include", "platform.cuh").is_file()


def test_version_is_the_same_everywhere():
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert config["metadata"]["version"] == rawkern.__version__
    assert re.search(rf"^## {re.escape(rawkern.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_ci_runs_the_command_of_the_readme():
    process = subprocess.run([ROOT / ".ci" / "run", "--show"], capture_output=True, text=True, cwd="/")
    assert process.returncode == 0, process.stderr
    command = process.stdout.strip()
    assert command in (ROOT / "README.md").read_text()
    assert command.startswith("python3 -m venv .venv && .venv/bin/pip install") and "-m pytest" in command
    assert "\n" not in command

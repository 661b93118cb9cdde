"""python -m rawkern: what can be seen of it without running check or demo, which have tests of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import rawkern
from rawkern import __main__ as command_line
from rawkern import info
from rawkern.runtime import emulator

ROOT = Path(__file__).parents[1]
#: Makes a module look as if it were not installed.
WITHOUT = """
import runpy, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
sys.argv[0] = "rawkern"
runpy.run_module("rawkern", run_name="__main__")
"""


def run(*arguments, without=(), **environment):
    start = ["-c", WITHOUT.format(names=list(without))] if without else ["-m", "rawkern"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, *start, *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)


def value_of(report, name):
    match = re.search(rf"^{re.escape(name)}: +(.*)$", report, re.MULTILINE)
    assert match, f"no line {name!r} in:\n{report}"
    return match[1]


def test_info_names_everything(tmp_path):
    process = run("info", RAWKERN_CACHE_DIR=str(tmp_path / "cache"), RAWKERN_THREADS="1")
    assert process.returncode == 0, process.stderr
    report = process.stdout
    assert value_of(report, "rawkern").startswith(f"{rawkern.__version__} in {ROOT / 'rawkern'}")
    assert value_of(report, "Python").startswith(sys.version.split()[0])
    assert value_of(report, "NumPy") == np.__version__
    assert emulator.compiler()[0] in value_of(report, "C++ compiler")
    assert value_of(report, "cache") == f"{tmp_path / 'cache'}, not there yet"
    assert "RAWKERN_THREADS=1" in value_of(report, "settings")
    for name in (
        "platform",
        "processor",
        "ml_dtypes",
        "PyTorch",
        "CuPy",
        "CUDA driver",
        "CUDA runtime",
        "NVRTC",
        "devices",
    ):
        assert value_of(report, name)
    assert report.isascii() and max(map(len, report.splitlines())) < 400  # pastes well


def test_info_counts_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAWKERN_CACHE_DIR", str(tmp_path))
    (tmp_path / "a.b.so").write_bytes(bytes(3 * 2**20))
    (tmp_path / "a.b.cubin").write_bytes(bytes(2**19))
    assert value_of(info.report(), "cache") == f"{tmp_path}, 2 kernels, 3.5 MiB"


@pytest.mark.parametrize(
    ("without", "missing"),
    [
        (("torch",), {"PyTorch"}),
        (("cupy", "cupy_backends"), {"CuPy", "CUDA driver", "CUDA runtime", "NVRTC", "devices"}),
    ],
)
def test_info_with_packages_missing(without, missing):
    process = run("info", without=without)
    assert process.returncode == 0, process.stderr
    found = {name for name in missing | {"NumPy"} if "not found (No module" in value_of(process.stdout, name)}
    assert found == missing


def test_info_without_compiler(tmp_path):
    process = run("info", RAWKERN_CXX="no-such-compiler")
    assert process.returncode == 0
    assert "no-such-compiler was found: install one" in value_of(process.stdout, "C++ compiler")


def test_help_lists_the_commands():
    process = run("--help", without=("torch", "cupy"))
    assert process.returncode == 0, process.stderr
    for name, summary in command_line.COMMANDS.items():
        assert re.search(rf"^ +{name} +{summary[:30]}", process.stdout, re.MULTILINE)


@pytest.mark.parametrize("command", command_line.COMMANDS)
def test_help_of_every_command(command, capsys):
    with pytest.raises(SystemExit) as end:
        command_line.main([command, "--help"])
    assert end.value.code == 0
    assert f"python -m rawkern {command}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["info", "--nonsense"]])
def test_wrong_arguments_print_usage(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        command_line.main(arguments)
    assert end.value.code == 2
    assert "usage: python -m rawkern" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["check", "demo"])
def test_commands_that_need_torch_say_so(command):
    process = run(command, without=("torch",))
    assert process.returncode == 2
    assert f"{command} needs torch, which is not installed" in process.stderr

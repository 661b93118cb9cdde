"""The examples in the README run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def blocks(marker):
    """The code blocks of the README that follow `<!-- marker -->`."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.findall(rf"<!-- {marker} -->\n```\w+\n(.*?)```", text, re.DOTALL)
    assert found, marker
    return found


def run(code, device, monkeypatch):
    (first,) = blocks("run first")
    if device == "cpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    torch.manual_seed(0)
    exec(compile(first + code, "README.md", "exec"), {})


@pytest.mark.parametrize("index", range(len(blocks("run"))))
def test_examples(index, device, monkeypatch):
    run(blocks("run")[index], device, monkeypatch)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("index", range(len(blocks("run on a GPU"))))
def test_examples_for_gpus(index, monkeypatch):
    run(blocks("run on a GPU")[index], "cuda", monkeypatch)


def test_commands():
    for command in blocks("run in a shell"):
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = command.replace("torchrun", f"{sys.executable} -m torch.distributed.run")
        done = subprocess.run(command, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "those of plain PyTorch" in done.stdout

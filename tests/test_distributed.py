"""Training in several processes: the gradients of the plain PyTorch model, by DistributedDataParallel and by FSDP2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def torchrun(*arguments, hide_gpus, processes=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if hide_gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command += [str(ROOT / "examples" / "train_distributed.py"), *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("wrap, processes", [("ddp", 2), ("ddp", 3), ("fsdp", 2)])
def test_processes_on_the_emulator(wrap, processes):
    """Also as many as do not divide the batch that two processes get."""
    printed = torchrun("--wrap", wrap, hide_gpus=True, processes=processes)
    assert f"{wrap}, {processes} x cpu: gradients and losses are those of plain PyTorch" in printed


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_two_gpus(wrap):
    printed = torchrun("--wrap", wrap, hide_gpus=False)
    assert f"{wrap}, 2 x cuda: gradients and losses are those of plain PyTorch" in printed

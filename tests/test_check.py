"""`python -m rawkern check` passes what is right and catches what is wrong."""

import argparse
import json

import pytest
import torch

import rawkern
from rawkern import check
from rawkern.check_cases import DTYPES, cases
from rawkern.testing import forward_backward


def run(*arguments):
    parser = argparse.ArgumentParser()
    check.add_arguments(parser)
    return check.main(parser.parse_args(["--device", "cpu", *arguments]))


def wrong(change):
    """gelu, with its result or its gradient changed."""
    original = rawkern.gelu
    return lambda input, approximate="none": change(original(input, approximate=approximate))


def spoil(output, place, by):
    change = torch.zeros_like(output)
    change[place] = by
    return output + change


class ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * (1 + 1e-5)


def test_everything_is_right(capsys):
    assert run() == 0
    assert "WRONG" not in capsys.readouterr().out


def test_right_results_pass(tmp_path, capsys):
    file = tmp_path / "check.json"
    assert run("--filter", "gelu float*", "--json", str(file)) == 0
    printed = capsys.readouterr().out
    assert "all right" in printed and "float16" in printed and "WRONG" not in printed
    rows = json.loads(file.read_text())
    assert {(row["dtype"], row["case"]) for row in rows} == {
        (dtype, form) for dtype in ("float16", "float32", "float64") for form in ("none", "tanh")
    }
    assert all(row["ok"] and row["error"] <= row["allowed"] and row["milliseconds"] > 0 for row in rows)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda y: spoil(y, (1, 2, 3, 4), 1e-3), id="one element"),
        pytest.param(lambda y: y * (1 + 1e-6), id="low precision"),
        pytest.param(lambda y: torch.nan_to_num(y, nan=0.0), id="NaN lost"),
        pytest.param(lambda y: spoil(y, (2, 1, 0, 0), float("inf")), id="an infinity"),
        pytest.param(lambda y: y[:, :, :-1], id="shape"),
        pytest.param(lambda y: y.double(), id="dtype"),
        pytest.param(lambda y: y.detach(), id="no gradient"),
        pytest.param(ScaledGradient.apply, id="gradient"),
    ],
)
def test_a_wrong_result_is_caught(monkeypatch, capsys, change):
    monkeypatch.setattr(rawkern, "gelu", wrong(change), raising=False)
    assert run("--filter", "gelu float32 none") == 1
    printed = capsys.readouterr().out
    assert "WRONG" in printed and "all right" not in printed


def test_an_exception_is_a_failure_and_not_the_end(monkeypatch, capsys):
    def broken(input, approximate="none"):
        raise RuntimeError("out of order")

    monkeypatch.setattr(rawkern, "gelu", broken, raising=False)
    assert run("--filter", "gelu* float32*") == 1
    printed = capsys.readouterr().out
    assert "out of order" in printed
    assert "gelu_group_norm" in printed  # which is not affected, and was run


def test_nothing_to_run_is_no_success(capsys):
    assert run("--filter", "no such op") == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_asking_for_a_missing_gpu_is_no_success(capsys):
    parser = argparse.ArgumentParser()
    check.add_arguments(parser)
    assert check.main(parser.parse_args(["--device", "cuda"])) == 2


def test_every_op_is_checked_in_every_dtype():
    """Also guards against a new public function that nobody added to the cases."""
    found = {(case.op, case.dtype) for case in cases()}
    assert found == {(op, dtype) for op in rawkern._FUNCTIONS for dtype in DTYPES}


def test_case_names_are_unique():
    names = [(case.op, case.name, case.dtype) for case in cases()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("case", [case for case in cases() if case.dtype is torch.float64], ids=lambda case: case.name)
def test_results_depend_on_every_input(case):
    """A case in which a function is saturated would compare nothing."""
    results = forward_backward(case.theirs, case.inputs(), dtype=torch.float64)
    for name, gradient in results.items():
        assert gradient.nan_to_num(0, 0, 0).abs().mean() > 1e-3, name

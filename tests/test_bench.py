"""The benchmarks' own arithmetic, their guards against kernels that are wrong on purpose, and the whole path."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from sweep import direct_kernels

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # the benchmarks are run from a checkout and are not installed
    sys.path.insert(0, str(ROOT))

from bench import __main__ as command  # noqa: E402
from bench import ahead, ceilings, compare, convolutions, data, guards, oracle, problems, runner, timing, windows  # noqa: E402
from bench.bench_conv_transpose2d import ConvTranspose2d  # noqa: E402
from bench.bench_gelu import GELU  # noqa: E402
from bench.convolutions import Convolution  # noqa: E402
from bench.devices import Cpu  # noqa: E402
from bench.floors import Ceilings, Cost, Phase, floor  # noqa: E402
from bench.report import Peer, Report, Row, time_text  # noqa: E402

GEOMETRIES = [
    convolutions.QUICK,
    Convolution(2, 3, (4, 5), 2, 3),
    Convolution(
        1, 4, (3, 6), 6, (1, 4), stride=(3, 2), padding=(0, 1), dilation=(1, 3), groups=2
    ),  # phases without taps
    Convolution(
        2, 5, (6, 4), 5, 3, stride=2, padding=2, output_padding=1, groups=5
    ),  # depthwise; padding cuts taps off
    Convolution(1, 2, (2, 3), 3, (2, 5), stride=1, padding=(1, 3), dilation=2),
]
#: Of one H200, so that floors can be compared with those worked out by hand.
H200 = Ceilings(
    copy=4.26e12,
    read=4.42e12,
    write=4.68e12,
    matrix={"float32/tf32": 475e12, "float32/ieee": 51e12, "bfloat16": 708e12, "float16": 682e12, "float64": 56e12},
    vector={"float32": 60e12, "float64": 30e12},
)


def tensors_of(conv, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = conv.input_shape, conv.weight_shape, (conv.out_channels,), conv.output_shape
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


# Counting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conv", GEOMETRIES, ids=str)
def test_flop_counts_exactly_the_products_that_reach_an_output(conv):
    x, w, _, y = tensors_of(conv)
    ones = torch.nn.functional.conv_transpose2d(torch.ones_like(x), torch.ones_like(w), None, *conv.arguments)
    assert ones.shape == y.shape
    assert conv.flop == 2 * int(ones.sum())


@pytest.mark.parametrize(
    "conv, gflop",
    [
        (convolutions.MODEL_MIN_SUM, 38.7),
        (convolutions.MODEL_GROUP_NORM, 618),
        (convolutions.MODEL_ADD_MIN, 137),
        (convolutions.ALONE_LARGE, 618),
        (convolutions.ALONE_GROUPED, 8),
    ],
    ids=str,
)
def test_flop_of_the_known_problems(conv, gflop):
    assert conv.flop / 1e9 == pytest.approx(gflop, rel=0.02)


def operation_named(name):
    return next(operation for operation in problems.operations() if operation.name == name)


@pytest.mark.parametrize(
    "name, milliseconds",
    [
        ("conv_transpose2d_min_sum_gelu_add/model", 0.081),
        ("conv_transpose2d_gelu_group_norm/model", 2.3),
        ("conv_transpose2d/model-add-min-gelu-mul", 0.29),
        ("conv_transpose2d/alone-1024", 1.30),
        ("conv_transpose2d/alone-grouped-dilated", 0.20),
    ],
)
def test_floors_of_the_known_problems(name, milliseconds):
    ((operation, problem),) = problems.select([name])
    cost = operation.cost(problem, "forward", 4)
    # Worked out with one bandwidth for all; here mostly writing is a little faster than copying.
    assert floor(cost, H200, "float32/tf32") * 1e3 == pytest.approx(milliseconds, rel=0.06)


def test_bytes_are_those_of_all_arrays():
    """What moves at least: everything a launcher is given, once, and everything it returns, once."""
    for operation, problem in problems.select([], quick=True):
        for direction in operation.directions(problem):
            if "gelu_group_norm" in operation.name and operation.name.startswith("conv"):
                continue  # has phases, which read some of it again
            specification = operation.inputs(problem, direction)
            sets = runner.new_sets(Cpu(), specification, np.dtype("float32"), 1)
            results = operation.call(problem, direction, sets.inputs[0], "ieee")
            arrays = [*sets.inputs[0].values(), *results]
            expected = sum(array.nbytes for array in arrays)
            counted = operation.cost(problem, direction, 4).bytes
            assert counted == pytest.approx(expected, abs=8 * len(arrays), rel=0.02), (operation.name, direction)


def test_a_floor_is_the_sum_of_its_phases_slowest_parts():
    memory, arithmetic = Phase(10**9, 10**9, 10), Phase(0, 8, 10**12)
    both = floor(Cost((memory, arithmetic)), H200, "bfloat16")
    assert both == pytest.approx(2e9 / 4.26e12 + 1e12 / 708e12)


def test_bandwidth_lies_between_the_measured_mixes():
    assert H200.seconds_to_move(100, 0) == pytest.approx(100 / H200.read)
    assert H200.seconds_to_move(0, 100) == pytest.approx(100 / H200.write)
    assert H200.seconds_to_move(50, 50) == pytest.approx(100 / H200.copy)
    assert 100 / H200.read < H200.seconds_to_move(80, 20) < 100 / H200.copy
    assert H200.seconds_to_move(0, 0) == 0


def test_ieee_may_use_three_tf32_products():
    assert H200.matrix_rate("float32/ieee") == pytest.approx(475e12 / 3)
    assert Ceilings(1, 1, 1, {"float32/ieee": 51e12}, {"float32": 67e12}).matrix_rate("float32/ieee") == 67e12


def test_percentiles():
    assert timing.percentiles([5, 1, 3, 2, 4, 6]) == pytest.approx((2, 3.5, 5))
    assert timing.percentiles([7]) == (7, 7, 7)


def test_no_size_of_the_sweep_is_a_multiple_of_another():
    sweep = convolutions.SWEEP.values()
    channels = {c for conv in sweep for c in (conv.in_channels, conv.out_channels)}
    extents = {size for conv in sweep for size in conv.size}
    for values in (channels, extents):
        multiples = [(a, b) for a in values for b in values if a != b and a % b == 0]
        assert not multiples, multiples
    assert (min(channels), max(channels)) == (3, 512)


def test_the_sweep_covers_what_it_promises():
    sweep = list(convolutions.SWEEP.values())
    assert {k for conv in sweep for k in conv.kernel} == set(range(1, 8))
    assert {s for conv in sweep for s in conv.stride} == set(range(1, 6))
    assert any(conv.kernel[0] != conv.kernel[1] for conv in sweep)
    for name in ("padding", "output_padding"):
        assert any(max(getattr(conv, name)) > 0 for conv in sweep)
    assert any(max(conv.dilation) > 1 for conv in sweep)
    assert any(conv.groups == conv.in_channels for conv in sweep)
    sizes = [4 * convolutions.elements(conv.input_shape, conv.output_shape) for conv in sweep]
    assert min(sizes) < 10_000 and max(sizes) > 10**9


# Data and oracle --------------------------------------------------------------------------------------------------


def test_random_numbers_are_centred_and_differ_between_seeds():
    values = np.empty(100_000, np.float32)
    data.fill_random(np, values, 3, scale=2.0, offset=1.0)
    assert values.mean() == pytest.approx(1.0, abs=0.03)
    assert values.std() == pytest.approx(2.0, rel=0.02)
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.02
    other = np.empty_like(values)
    data.fill_random(np, other, 4, scale=2.0, offset=1.0)
    assert (values != other).mean() > 0.99


def test_bfloat16_is_rounded_and_read_back_as_numpy_does():
    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32) * 100
    ours = np.empty(values.shape, data.bfloat16)
    data.store(ours, values)
    np.testing.assert_array_equal(ours.view(np.uint16), values.astype(data.bfloat16).view(np.uint16))
    np.testing.assert_array_equal(data.to_float64(ours), ours.astype(np.float64))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", data.bfloat16, "int32"], ids=str)
def test_poison_is_counted(dtype):
    array = np.zeros(1000, dtype)
    data.poison(array)
    array[10:] = 1
    assert data.count_poison(np, array) == 10


@pytest.mark.parametrize("conv", GEOMETRIES, ids=str)
def test_the_oracle_agrees_with_torch_in_float64(conv):
    x, w, b, gy = tensors_of(conv)
    x.requires_grad_()
    w.requires_grad_()
    y = torch.nn.functional.conv_transpose2d(x, w, b, *conv.arguments)
    gx, gw = torch.autograd.grad(y, (x, w), gy)
    x, w, b, gy, y = (tensor.detach().numpy() for tensor in (x, w, b, gy, y))
    image, exact = conv.batch - 1, oracle.EXACT
    rows = range(conv.out_size[0] // 2, conv.out_size[0])
    np.testing.assert_allclose(
        oracle.convolution_rows(conv, x[image], w, b, rows, exact), y[image, :, rows.start :], rtol=1e-12, atol=1e-12
    )
    rows = range(1, conv.size[0])
    np.testing.assert_allclose(
        oracle.input_gradient_rows(conv, gy[image], w, rows, exact), gx[image, :, 1:], rtol=1e-12, atol=1e-12
    )
    channel, columns = conv.in_channels - 1, [0, conv.out_channels // conv.groups - 1]
    np.testing.assert_allclose(
        oracle.weight_gradient_rows(conv, x, gy, channel, columns, exact), gw[channel, columns], rtol=1e-12, atol=1e-12
    )


def test_oracles_of_normalisation_and_functions_agree_with_torch():
    x, gy = (torch.randn(6, 5, 4, dtype=torch.float64, requires_grad=i == 0) for i in range(2))
    w, b = torch.rand(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    y = torch.nn.functional.group_norm(x[None], 2, w, b, 1e-5)[0]
    (gx,) = torch.autograd.grad(y, x, gy)
    arrays = [tensor.detach().numpy() for tensor in (x, gy, w, b, y, gx)]
    ours = oracle.group_norm_image(arrays[0], 2, arrays[2], arrays[3], 1e-5)
    np.testing.assert_allclose(ours, arrays[4], rtol=1e-12, atol=1e-12)
    groups = arrays[0].reshape(2, -1)
    rstd = 1 / np.sqrt(groups.var(axis=1) + 1e-5)
    ours = oracle.group_norm_image_gradient(arrays[1], arrays[0], groups.mean(axis=1), rstd, arrays[2])
    np.testing.assert_allclose(ours, arrays[5], rtol=1e-10, atol=1e-12)
    z = torch.linspace(-5, 5, 101, dtype=torch.float64, requires_grad=True)
    value = torch.nn.functional.gelu(z)
    (slope,) = torch.autograd.grad(value.sum(), z)
    np.testing.assert_allclose(oracle.gelu(z.detach().numpy()), value.detach().numpy(), atol=1e-14)
    np.testing.assert_allclose(oracle.gelu_derivative(z.detach().numpy()), slope.numpy(), atol=1e-14)


def test_every_op_agrees_with_its_own_torch_version():
    """The peers compute what the oracle checks: the same arrays through both."""
    pick = random.Random(0)
    for operation, problem in problems.select([], quick=True):
        sets = runner.new_sets(Cpu(), operation.inputs(problem, "forward"), np.dtype("float64"), 1)
        arrays = sets.inputs[0]
        result = operation.torch(problem)(**{name: torch.from_numpy(array) for name, array in arrays.items()}).numpy()
        assert result.shape == tuple(operation.output_shape(problem))
        for what, part, expected in operation.checks(problem, "forward", arrays, (result,), pick):
            np.testing.assert_allclose(part, expected(oracle.EXACT), rtol=1e-10, atol=1e-10, err_msg=what)


def test_the_tf32_model_rounds_operands_as_the_unit_does():
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    bits = (values.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    rounded = oracle.modelled("float32/tf32").operand(values.astype(np.float64))
    np.testing.assert_array_equal(rounded, bits.view(np.float32).astype(np.float64))


def test_windows_hold_the_first_and_the_last_rows():
    chosen = windows.row_windows(100, 1000, 1 << 16, random.Random(0))
    assert (0, range(4)) in chosen and (99, range(996, 1000)) in chosen
    small = windows.row_windows(2, 5, 10, random.Random(0))
    assert sorted(small) == [(0, range(5)), (1, range(5))] or len(small) == 2


# Kernels that are wrong on purpose --------------------------------------------------------------------------------


class Honest(ConvTranspose2d):
    """A convolution computed from the definition, standing for a kernel."""

    def call(self, problem, direction, arrays, precision, out=None):
        conv = problem.size
        out = out or [np.full(conv.output_shape, np.nan, arrays["input"].dtype)]
        self.compute(conv, arrays, out[0])
        return tuple(out)

    def compute(self, conv, arrays, out, rounding=oracle.EXACT):
        for n, image in enumerate(arrays["input"]):
            rows = range(conv.out_size[0])
            data.store(
                out[n], oracle.convolution_rows(conv, image, arrays["weight"], arrays["bias"], rows, rounding)
            )  # fmt: skip


class LastRowsSkipped(Honest):
    def compute(self, conv, arrays, out):
        before = out[-1, :, -1:].copy()
        super().compute(conv, arrays, out)
        out[-1, :, -1:] = before


class LastRowsZero(Honest):
    def compute(self, conv, arrays, out):
        super().compute(conv, arrays, out)
        out[-1, :, -1:] = 0


class OneElementWrong(Honest):
    def compute(self, conv, arrays, out):
        super().compute(conv, arrays, out)
        out[0, 0, 3, 2] *= 1.5


class LastOutputReturned(Honest):
    """Computes once and returns that from then on."""

    def call(self, problem, direction, arrays, precision, out=None):
        if not out:
            return super().call(problem, direction, arrays, precision)
        if not hasattr(self, "last"):
            self.last = super().call(problem, direction, arrays, precision, out)
        return self.last


class LastOutputCopied(Honest):
    """Does not even leave the poison: writes the last call's output again."""

    def call(self, problem, direction, arrays, precision, out=None):
        result = super().call(problem, direction, arrays, precision)
        if out:
            out[0][...] = getattr(self, "last", result)[0]
            self.last, result = result, tuple(out)
        return result


class NothingDone(Honest):
    def call(self, problem, direction, arrays, precision, out=None):
        return tuple(out) if out else super().call(problem, direction, arrays, precision)


class LowerPrecision(Honest):
    """Rounds its operands to `bits` bits."""

    def __init__(self, bits):
        self.bits = bits

    def compute(self, conv, arrays, out):
        super().compute(conv, arrays, out, oracle.Rounding(operand_bits=self.bits))


class SumsInHalf(Honest):
    """Adds the products up in the element type instead of float32."""

    def compute(self, conv, arrays, out):
        parts = [np.zeros(conv.output_shape, np.float32) for _ in range(2)]
        for part, channels in zip(parts, (slice(0, None, 2), slice(1, None, 2)), strict=True):
            masked = np.zeros_like(arrays["input"])
            masked[:, channels] = arrays["input"][:, channels]
            super().compute(conv, {**arrays, "input": masked, "bias": arrays["bias"] * 0.5}, part)
        halves = [part.astype(np.float16) * np.float16(0.125) + np.float16(100) for part in parts]  # loses low bits
        out[...] = ((halves[0] - np.float16(100)) + (halves[1] - np.float16(100))) * np.float16(8)


def context(ceilings=None):
    slow = Ceilings(1e15, 1e15, 1e15, dict.fromkeys(data.MODES, 1e18), dict.fromkeys(("float32", "float64"), 1e18))
    return runner.Context(Cpu(), ceilings or slow, row_seconds=0.005, pick=random.Random(0))


def judged(operation, mode="float32/ieee", ceilings=None):
    problem = next(p for p in operation.problems if p.name == "quick")
    return runner.run_row(context(ceilings), operation, problem, "forward", mode)


@pytest.mark.parametrize("mode", ["float32/tf32", "float32/ieee", "bfloat16", "float16"])
def test_an_honest_kernel_passes(mode):
    row = judged(Honest(), mode)
    assert row.problems == []
    assert row.median > 0 and row.p20 <= row.median <= row.p80 and row.peak_memory > 0


@pytest.mark.parametrize(
    "wrong, complaint",
    [
        (LastRowsSkipped, "not written"),
        (LastRowsZero, "error"),
        (OneElementWrong, "quick|error|wrong"),
        (LastOutputReturned, "error"),
        (LastOutputCopied, "error"),
        (NothingDone, "not written"),
    ],
)
@pytest.mark.parametrize("mode", ["float32/ieee", "float32/tf32", "bfloat16"])
def test_a_wrong_kernel_is_caught(wrong, complaint, mode):
    row = judged(wrong(), mode)
    assert any(word in problem for problem in row.problems for word in complaint.split("|")), row.problems


@pytest.mark.parametrize("mode, bits", [("float32/ieee", 11), ("float32/ieee", 16), ("float32/tf32", 8)])
def test_lower_precision_is_caught(mode, bits):
    """TF32 or less in ieee mode; bfloat16 in TF32 mode."""
    row = judged(LowerPrecision(bits), mode)
    assert any("error" in problem for problem in row.problems), (row.error, row.allowed_error)


def test_sums_in_the_element_type_are_caught():
    row = judged(SumsInHalf(), "float16")
    assert any("error" in problem for problem in row.problems), (row.error, row.allowed_error)


def test_the_precision_of_a_mode_passes():
    assert judged(LowerPrecision(11), "float32/tf32").problems == []
    row = judged(Honest(), "float32/tf32")
    assert "more exact" in row.precision  # what was computed is read off the error, not believed


def test_rawkerns_own_tf32_kernel_is_caught_in_ieee_mode():
    class Pretender(ConvTranspose2d):
        def call(self, problem, direction, arrays, precision, out=None):
            # Few channels have kernels that multiply in full float32 whatever is asked; here they pass for many.
            with direct_kernels(few_channels=lambda *shape: False):
                return super().call(problem, direction, arrays, "tf32", out)

    assert judged(Pretender(), "float32/tf32").problems == []
    assert any("error" in problem for problem in judged(Pretender(), "float32/ieee").problems)


def test_a_time_below_the_floor_is_a_measuring_error():
    slow = Ceilings(1.0, 1.0, 1.0, dict.fromkeys(data.MODES, 1.0), {"float32": 1.0, "float64": 1.0})
    assert any("below the floor" in problem for problem in judged(Honest(), ceilings=slow).problems)


def test_inputs_that_do_not_matter_are_caught():
    class Constant(ConvTranspose2d):
        """The third model where the convolution is always positive: 0 everywhere."""

        def inputs(self, problem, direction):
            inputs = super().inputs(problem, direction)
            return {**inputs, "bias": data.Input(inputs["bias"].shape, 0.5, 100.0)}

    operation = Constant()
    problem = next(p for p in operation.problems if p.name == "quick-add-min-gelu-mul")
    row = runner.run_row(context(), operation, problem, "forward", "float32/ieee")
    assert any("changes only 0.0% of the output" in problem for problem in row.problems), row.problems


def test_clocks_that_disagree_are_a_measuring_error():
    timing.check_clocks(1.00e-3, 1.04e-3)
    for device_seconds in (0.5, 2.0):
        with pytest.raises(timing.MeasuringError, match="clock"):
            timing.check_clocks(device_seconds, 1.0)


@pytest.mark.parametrize(("lies", "trusted"), [(2, True), (3, False)])
def test_a_sample_is_taken_again_where_the_clocks_disagree(lies, trusted, monkeypatch):
    """A host that loses the processor once is no wrong clock; one that always disagrees is."""
    calls, wrong = [], [True] * lies

    def check(device_seconds, host_seconds):
        if wrong and wrong.pop():
            raise timing.MeasuringError("clock")

    monkeypatch.setattr(timing, "check_clocks", check)
    arguments = Cpu(), calls.append, [7, 8], lambda: calls.append("prepared")
    if trusted:
        seconds, _ = timing.trusted_sample(*arguments)
        assert seconds >= 0 and calls == ["prepared", 7, 8] * (lies + 1)
    else:
        with pytest.raises(timing.MeasuringError):
            timing.trusted_sample(*arguments)


def test_a_kernel_that_fails_does_not_end_the_run(capsys):
    class Broken(GELU):
        def call(self, *arguments, **options):
            raise RuntimeError("no such kernel")

    assert any("no such kernel" in problem for problem in judged(Broken()).problems)


@pytest.mark.parametrize("rows_left, measured", [(3, True), (300, False)])
def test_rows_come_before_peers(rows_left, measured):
    """Where the time left is needed for rows that are still to come, a row has no peers."""
    run, operation = context(), GELU()
    run.deadline, run.peers, run.rows_left, run.own_seconds = time.monotonic() + 60, ("eager",), rows_left, [3.0]
    problem = next(p for p in operation.problems if p.name == "quick")
    row = runner.run_row(run, operation, problem, "forward", "float32/ieee")
    assert row.median and not row.problems
    assert (row.peers["eager"].median is not None) == measured and len(run.own_seconds) == 2


def test_sets_rotate_and_differ():
    specification = {"x": data.Input((100,))}
    sets = data.Sets(Cpu(), specification, "float32", 0, bytes_per_set=800, enough_bytes=8000, most_bytes=1 << 20)
    assert sets.count * 800 > 8000
    assert sets.following(sets.count) + sets.following(2) == [*range(sets.count), 0, 1]
    assert len({sets.inputs[i]["x"].tobytes() for i in range(sets.count)}) == sets.count
    pointers = [sets.inputs[i]["x"].__array_interface__["data"][0] for i in range(2)]
    assert (pointers[1] - pointers[0]) % 256 == 0


def test_memory_is_watched():
    with Cpu().watch_memory() as most:
        np.zeros(1 << 20, np.uint8)  # freed at once
        kept = np.zeros(1 << 18, np.uint8)
        del kept
    assert 1 << 20 <= most[0] < 3 << 19


def test_accuracy_reports_the_worst_part():
    class Parts:
        def checks(self, *_):
            exact = np.ones(10_000)
            yield "good", exact.copy(), lambda rounding: exact
            yield "bad", exact * 1.001, lambda rounding: exact

    accuracy = guards.check_results(Cpu(), Parts(), None, "forward", "float32/ieee", {}, (), random.Random(0))
    assert accuracy.error == pytest.approx(1e-3, rel=0.01)
    assert len(accuracy.problems) == 1 and accuracy.problems[0].startswith("bad")


# Results ----------------------------------------------------------------------------------------------------------


def row_of(problem="a", median=1e-3, spread=0.02, **options):
    return Row(
        "gelu", problem, "(3,)", "forward", "bfloat16", bytes=10, flop=20, floor=5e-4, bound="memory", intensity=2.0,
        median=median, p20=median * (1 - spread), p80=median * (1 + spread), **options,
    )  # fmt: skip


def test_the_ratio_is_to_the_fastest_peer():
    row = row_of(peers={"eager": Peer(3e-3), "compile": Peer(2e-3), "max-autotune": Peer(note="failed")})
    assert row.fastest_peer()[0] == "compile"
    assert row.ratio == pytest.approx(2.0) and row.fraction == pytest.approx(0.5)
    assert row_of().ratio is None


def test_reports_survive_the_file(tmp_path):
    report = Report({"device": "x"}, H200.as_dict(), [row_of(peers={"eager": Peer(3e-3)}), row_of("b")], True)
    report.save(tmp_path / "results.json")
    assert Report.load(tmp_path / "results.json") == report
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_compare_minds_the_spread(tmp_path, capsys):
    before = [row_of("same"), row_of("faster"), row_of("slower"), row_of("noisy", spread=0.3), row_of("gone")]
    after = [row_of("same", 1.01e-3), row_of("faster", 0.5e-3), row_of("slower", 2e-3), row_of("noisy", 1.3e-3)]
    for name, rows in (("a", before), ("b", after)):
        Report({"device": "x"}, H200.as_dict(), rows, True).save(tmp_path / f"{name}.json")
    paths = [str(tmp_path / f"{name}.json") for name in "ab"]
    assert command.main(["compare", *paths]) == 1
    printed = capsys.readouterr().out
    assert "1 faster, 2 same, 1 slower" in printed and "gelu/gone" in printed
    assert command.main(["compare", paths[0], paths[0]]) == 0
    assert compare.spread(before[0]) == pytest.approx(0.02)


@pytest.mark.parametrize(
    "seconds, text",
    [(81.3e-6, "81.3 us"), (4.48e-4, "0.448 ms"), (2.5e-3, "2.50 ms"), (0.1234, "123 ms"), (None, "-")],
)
def test_times_have_three_digits(seconds, text):
    assert time_text(seconds) == text


# The command ------------------------------------------------------------------------------------------------------


def test_selection_by_name_pattern_and_tag():
    models = problems.select(["model"])
    assert len(models) == 3 and all("model" in problem.tags for _, problem in models)
    assert "group_norm/model" in {problem.full_name for _, problem in problems.select(["norm/mod"])}
    assert all(p.op == "gelu" for _, p in problems.select(["gelu/*"]))
    assert [p.full_name for _, p in problems.select(["alone-1024"])] == ["conv_transpose2d/alone-1024"]
    assert problems.select(["no such problem"]) == []
    assert {operation.name for operation, _ in problems.select([], quick=True)} == {
        path.stem.removeprefix("bench_") for path in (ROOT / "bench").glob("bench_*.py")
    }


def test_the_quick_run_measures_every_op_on_the_emulator(tmp_path, capsys):
    assert command.main(["--device", "cpu", "--quick", "--output", str(tmp_path)]) == 0, capsys.readouterr().out
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["complete"] and all(row["problems"] == [] and row["median"] > 0 for row in report["rows"])
    assert {row["op"] for row in report["rows"]} == {operation.name for operation in problems.operations()}
    assert {row["mode"] for row in report["rows"]} == {"float32/tf32", "float32/ieee", "bfloat16", "float16"}
    for name in ("device", "driver", "cuda", "cupy", "torch", "commit", "date"):
        assert name in report["stamp"]
    assert (tmp_path / "roofline.png").stat().st_size > 10_000
    assert "Ceilings, measured in this run" in printed and "0 with problems" in printed


def test_peers_and_training_steps(tmp_path, capsys):
    arguments = ["--device", "cpu", "--quick", "--dtype", "float32", "--precision", "ieee", "--train"]
    arguments += ["--peers", "eager,channels-last", "--output", str(tmp_path), "conv_transpose2d/quick", "group_norm"]
    assert command.main(arguments) == 0, capsys.readouterr().out
    report = Report.load(tmp_path / "results.json")
    assert {row.direction for row in report.rows} >= {"forward", "backward", "train", "input_gradient"}
    assert all(row.ratio for row in report.rows)
    assert (tmp_path / "peers.png").stat().st_size > 10_000


@pytest.mark.parametrize("direction", ["forward", "weight_gradient", "train"])
def test_kernels_are_compiled_ahead(direction, tmp_path, monkeypatch):
    """Those that a GPU of this kind would be asked for, at the size of the problem, in the cache."""
    monkeypatch.setenv("RAWKERN_CACHE_DIR", str(tmp_path))
    ((operation, problem),) = problems.select(["conv_transpose2d/sweep-k3-wide"])
    kernels = ahead.compile_all([(operation, problem, direction, "float32/tf32")], "90", 132)
    names = {kernel.name for kernel in kernels}
    assert ("conv_transpose2d" in names) == (direction != "weight_gradient")
    assert ("conv_transpose2d_weight_gradient_taps" in names) == (direction != "forward")
    assert any("WarpgroupProducts" in kernel.type or "WarpgroupForward" in kernel.type for kernel in kernels)
    assert len(list(tmp_path.rglob("*.cubin"))) == len(kernels)


def test_interrupting_leaves_the_results_so_far(tmp_path, monkeypatch, capsys):
    honest, calls = runner.run_row, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return honest(*arguments)

    monkeypatch.setattr(runner, "run_row", interrupted)
    arguments = ["--device", "cpu", "--quick", "--output", str(tmp_path), "--dtype", "float32", "gelu/", "pointwise/"]
    assert command.main(arguments) == 130
    report = Report.load(tmp_path / "results.json")
    assert len(report.rows) == 2 and not report.complete


def test_it_runs_without_torch(tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from bench.__main__ import main\n"
        f"sys.exit(main(['--device', 'cpu', '--quick', '--dtype', 'float32', '--output', {str(tmp_path)!r}, 'gelu/']))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_help_list_and_mistakes(capsys):
    with pytest.raises(SystemExit) as done:
        command.main(["--help"])
    assert done.value.code == 0
    assert "examples:" in capsys.readouterr().out
    assert command.main(["--list", "model"]) == 0
    assert "conv_transpose2d_gelu_group_norm/model" in capsys.readouterr().out
    assert command.main(["nothing-of-that-name"]) == 2


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_120"])
def test_the_kernels_for_ceilings_compile(arch):
    pytest.importorskip("cupy")
    from rawkern.runtime.nvrtc import compile_cubin

    for kernel in ceilings.kernels():
        cubin, log = compile_cubin(kernel, arch)
        assert cubin and "0 bytes spill stores" in log and "C75" not in log, (kernel.type, log)


def test_the_kernels_for_bandwidth_move_everything():
    """On the emulator: what is counted as moved is moved."""
    from rawkern.runtime import queue_of

    source, target = np.arange(5000, dtype=np.float32), np.zeros(5000, np.float32)
    kernels = {kernel.type: kernel for kernel in ceilings.kernels() if kernel.type in ("Copy", "Write")}
    fields = {"source": source.ctypes.data, "target": target.ctypes.data, "vectors": 1250}
    kernels["Copy"].launch(queue_of(array=source), 2, **fields)
    np.testing.assert_array_equal(target, source)
    kernels["Write"].launch(queue_of(array=source), 2, **fields)
    assert (target[1:] != source[1:]).all()

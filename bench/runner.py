"""One row: a problem in one direction and mode, measured and checked; and its peers."""

import random
import statistics
import time
import traceback
from dataclasses import dataclass, field

from . import guards, peers
from .data import MODES, Input, Sets
from .floors import Cost, bound, floor, intensity
from .report import Row
from .timing import MeasuringError, Turn, measure

#: A time below the floor is a measuring error; ceilings are themselves measured to about this share.
FLOOR_TOLERANCE = 0.05
SEED = 2026
#: Sets together this many times as large as the L2: with less, some lines survive until they are needed again.
L2_MULTIPLE = 5
_MOST_GRAPHS = 64


@dataclass
class Context:
    """What rows of one run share.

    Attributes:
        device, ceilings: where, and under which ceilings.
        row_seconds: for timing one row, apart from preparations and checks; peers get half.
        peers: names of peers, or () for none.
        deadline: time.monotonic() by which the run should end; peers that would not make it are left out.
        rows_left: rows that are still to come, which are more important than peers.
        own_seconds: what each row took without its peers.
    """

    device: object
    ceilings: object
    row_seconds: float = 0.2
    peers: tuple = ()
    deadline: float = float("inf")
    pick: random.Random = field(default_factory=random.Random)
    rows_left: int = 0
    own_seconds: list = field(default_factory=list)

    def seconds_left(self):
        return self.deadline - time.monotonic()

    def seconds_for_peers(self):
        """What is left when all rows that are still to come have been measured, by what the others took."""
        each = statistics.fmean(self.own_seconds) if self.own_seconds else 0.0
        return self.seconds_left() - self.rows_left * each

    def budget(self):
        """Less for each row when time runs out."""
        return self.row_seconds if self.seconds_left() > 60 else self.row_seconds / 2


def new_row(context, operation, problem, direction, mode, cost):
    """A Row without times."""
    return Row(
        op=operation.name,
        problem=problem.name,
        size=str(problem.size),
        direction=direction,
        mode=mode,
        bytes=cost.bytes,
        flop=cost.flop,
        floor=floor(cost, context.ceilings, mode),
        bound=bound(cost, context.ceilings, mode),
        intensity=intensity(cost),
    )


def run_row(context, operation, problem, direction, mode):
    """Measures one direction of a launcher on arrays. What fails is in the row's `problems`; nothing is raised."""
    cost = operation.cost(problem, direction, MODES[mode][0].itemsize)
    row = new_row(context, operation, problem, direction, mode, cost)
    try:
        _measure_launcher(context, operation, problem, direction, mode, cost, row)
    except MeasuringError as error:
        row.problems.append(f"measuring error: {error}")
    except MemoryError:
        row.problems.append("does not fit into memory")
    except Exception as error:
        if type(error).__name__ != "OutOfMemoryError":
            traceback.print_exc()
        row.problems.append(f"{type(error).__name__}: {error}")
    finally:
        if cost.bytes > 1 << 26:
            context.device.release()
    return row


def _measure_launcher(context, operation, problem, direction, mode, cost, row):
    device, (dtype, precision) = context.device, MODES[mode]
    begin = time.monotonic()

    def launch(arrays, out=None):
        return operation.call(problem, direction, arrays, precision, out)

    sets = new_sets(device, operation.inputs(problem, direction), dtype, cost.bytes)
    first = launch(sets.inputs[0])
    row.problems += guards.check_dependence(
        device, sets.inputs[0], sets.inputs[1], launch, operation.density(problem, direction)
    )
    with device.watch_memory() as most:
        del first
        first = launch(sets.inputs[1])
        device.synchronize()
    row.peak_memory = most[0] + sum(array.nbytes for array in sets.inputs[0].values())
    sets.add_outputs(first)
    del first
    returned = {}

    def call(number):
        returned[number] = launch(sets.inputs[number], sets.outputs[number])

    timing, numbers = measure(device, call, sets, budget=context.budget(), prepare=sets.poison_outputs)
    row.median, row.p20, row.p80, row.host = timing.median, timing.p20, timing.p80, timing.host
    row.samples, row.calls = timing.samples, timing.calls
    # The last call, and one that nobody can foresee: both were timed, each on inputs of its own.
    for number in {numbers[-1], context.pick.choice(numbers)}:
        accuracy = guards.check_results(
            device, operation, problem, direction, mode, sets.inputs[number], returned[number], context.pick
        )
        row.problems += accuracy.problems
        row.error, row.allowed_error = accuracy.error, accuracy.allowed
    row.precision = read_precision(operation, mode, row)
    check_floor(row)
    context.own_seconds.append(time.monotonic() - begin)
    if context.peers:
        _time_peers(context, operation, problem, direction, mode, sets, row)


def new_sets(device, specification, dtype, bytes_per_set):
    """Rotating inputs: together with the outputs that follow, several times the L2."""
    return Sets(
        device,
        specification,
        dtype,
        seed=SEED,
        bytes_per_set=bytes_per_set,
        enough_bytes=L2_MULTIPLE * device.l2_bytes,
        most_bytes=int(0.4 * device.memory_available()),
    )


def check_floor(row):
    """Flags a time below the floor."""
    if row.median is not None and row.median < row.floor * (1 - FLOOR_TOLERANCE):
        row.problems.append(f"measuring error: {row.median * 1e3:.4g} ms is below the floor, {row.floor * 1e3:.4g} ms")


def read_precision(operation, mode, row):
    """The mode, and for float32 what the measured error says was really computed with."""
    if not operation.has_precision or not mode.startswith("float32"):
        return mode.partition("/")[0]
    if mode == "float32/tf32" and row.error is not None and row.error < 0.02 * row.allowed_error:
        return f"{mode} (more exact)"
    return mode


def add_peers(context, operation, problem, direction, mode, row):
    """Times further peers of a row that is there: those that compile, which come last because they take long."""
    if row.median is None:
        return
    dtype, _ = MODES[mode]
    try:
        if direction == "train":
            _train_peers(context, operation, problem, mode, _training_data(context, operation, problem, mode, row), row)
        else:
            sets = new_sets(context.device, operation.inputs(problem, direction), dtype, row.bytes)
            _time_peers(context, operation, problem, direction, mode, sets, row)
    except Exception as error:
        traceback.print_exc()
        row.problems.append(f"peers: {type(error).__name__}: {error}")
    finally:
        context.device.release()


def _time_peers(context, operation, problem, direction, mode, sets, row):
    """Peers of a launcher's forward pass; of its backward passes the eager ones, on graphs built beforehand."""
    names = peers.applicable(context.peers, operation, problem, context.device.kind)
    if direction == "forward":
        results = operation.call(problem, direction, sets.inputs[0], MODES[mode][1])
        reference = [peers.to_tensor(result).double() for result in results]
        trial = peers.Trial(operation.torch(problem), sets.inputs, None, (), "forward", mode, reference)
    else:
        names = [name for name in names if name in peers.EAGER]
        arrays, grads = _forward_arrays(context, operation, problem, mode, sets)
        wanted = operation.wanted(direction)
        trial = peers.Trial(operation.torch(problem), arrays, grads, wanted, "backward", mode, None)
    for name in names:
        row.peers[name] = peers.time_peer(name, trial, context)


def _forward_arrays(context, operation, problem, mode, sets):
    """Forward inputs and output gradients for the sets of a backward row: those it has, and what is missing drawn."""
    specification = dict(operation.inputs(problem, "forward"))
    missing = {name: spec for name, spec in specification.items() if name not in sets.inputs[0]}
    count = min(sets.count, _MOST_GRAPHS)
    drawn = Sets(
        context.device, missing, MODES[mode][0], seed=SEED + 1, bytes_per_set=1, enough_bytes=0, most_bytes=count,
        least=count,
    )  # fmt: skip
    arrays = [{name: (have | more)[name] for name in specification}
              for have, more in zip(sets.inputs[:count], drawn.inputs, strict=False)]  # fmt: skip
    return arrays, [values["grad_output"] for values in sets.inputs[:count]]


def run_training(context, operation, problem, mode):
    """A forward and backward step through torch: rawkern's functions against the peers."""
    dtype, _ = MODES[mode]
    phases = [operation.cost(problem, direction, dtype.itemsize).phases for direction in operation.directions(problem)]
    cost = Cost(tuple(phase for part in phases for phase in part))
    row = new_row(context, operation, problem, "train", mode, cost)
    try:
        _measure_training(context, operation, problem, mode, row)
    except MeasuringError as error:
        row.problems.append(f"measuring error: {error}")
    except Exception as error:
        traceback.print_exc()
        row.problems.append(f"{type(error).__name__}: {error}")
    finally:
        context.device.release()
    return row


def _training_data(context, operation, problem, mode, row):
    """(inputs, gradients of the output) for each set."""
    specification = dict(operation.inputs(problem, "forward"))
    grad = {"grad_output": Input(operation.output_shape(problem))}
    sets = new_sets(context.device, specification | grad, MODES[mode][0], row.bytes)
    count = min(sets.count, _MOST_GRAPHS)
    arrays = [{name: values[name] for name in specification} for values in sets.inputs[:count]]
    return arrays, [values["grad_output"] for values in sets.inputs[:count]]


def _measure_training(context, operation, problem, mode, row):
    device, precision = context.device, MODES[mode][1]
    begin = time.monotonic()
    arrays, grads = _training_data(context, operation, problem, mode, row)

    def ours(**tensors):
        return operation.rawkern(problem, precision, **tensors)

    step = peers.Step(peers.Trial(ours, arrays, grads, operation.differentiable, "train", mode, None))
    for result in step(0):
        if not bool(result.isfinite().all()):
            row.problems.append("a result of the training step is not finite")
    row.peak_memory = peers.torch_peak_memory(device, step)
    timing, _ = measure(device, step, Turn(len(arrays)), budget=context.budget())
    row.median, row.p20, row.p80, row.host = timing.median, timing.p20, timing.p80, timing.host
    row.samples, row.calls = timing.samples, timing.calls
    row.precision = mode if operation.has_precision else mode.partition("/")[0]
    check_floor(row)
    context.own_seconds.append(time.monotonic() - begin)
    if context.peers:
        _train_peers(context, operation, problem, mode, (arrays, grads), row)


def _train_peers(context, operation, problem, mode, training_data, row):
    precision, (arrays, grads) = MODES[mode][1], training_data

    def ours(**tensors):
        return operation.rawkern(problem, precision, **tensors)

    wanted = operation.differentiable
    own = peers.Step(peers.Trial(ours, arrays[:1], grads[:1], wanted, "train", mode, None))(0)
    # Gradients that jump with the last bit cannot be compared between implementations; the tests do that on exact data.
    reference = [result.double() for result in own[: 1 if operation.is_discontinuous else None]]
    del own
    trial = peers.Trial(operation.torch(problem), arrays, grads, wanted, "train", mode, reference)
    for name in peers.applicable(context.peers, operation, problem, context.device.kind):
        row.peers[name] = peers.time_peer(name, trial, context)
        if row.peers[name].difference is not None and row.peers[name].median is None:
            row.problems.append(f"{name} {row.peers[name].note}")

"""What must move and be computed, and the least time this can take under the measured ceilings."""

from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Phase:
    """Work that can overlap with itself but must end before the next phase can (a dependence on all of it).

    Attributes:
        read, written: bytes that must cross the device memory's interface: each input once, each output once.
        matrix: floating-point operations of products and sums that tensor cores can do (two per multiply-add).
        vector: all other floating-point operations, one per pointwise function and element.
    """

    read: int
    written: int
    matrix: int = 0
    vector: int = 0


@dataclass(frozen=True)
class Cost:
    """The phases of a problem, one after the other."""

    phases: tuple

    @classmethod
    def of(cls, read, written, matrix=0, vector=0):
        return cls((Phase(read, written, matrix, vector),))

    @property
    def bytes(self):
        return sum(phase.read + phase.written for phase in self.phases)

    @property
    def flop(self):
        return sum(phase.matrix + phase.vector for phase in self.phases)


@dataclass
class Ceilings:
    """What this machine reached in this run.

    Attributes:
        copy, read, write: bytes per second; copy counts both directions.
        matrix: FLOP per second of products for each mode ("float32/tf32", "bfloat16", ...).
        vector: FLOP per second of multiply-adds outside tensor cores, by dtype.
        how: where each figure comes from, for the report.
    """

    copy: float
    read: float
    write: float
    matrix: dict
    vector: dict
    how: dict = field(default_factory=dict)

    def seconds_to_move(self, read, written):
        """Time for this mix of reads and writes, between the measured mixes on a straight line (time per byte).

        Reading alone and writing alone are faster than copying, which turns the memory's bus around.
        """
        total = read + written
        if not total:
            return 0.0
        share = read / total
        outer, weight = (self.read, 2 * share - 1) if share > 0.5 else (self.write, 1 - 2 * share)
        return total * (weight / outer + (1 - weight) / self.copy)

    def matrix_rate(self, mode):
        """FLOP per second for products in this mode.

        float32 in ieee mode: the larger of the multiply-add rate and a third of the TF32 rate, because three TF32
        products of split operands give float32 accuracy.
        """
        rates = [self.matrix.get(mode, 0.0), self.vector.get(mode.partition("/")[0], 0.0)]
        if mode == "float32/ieee":
            rates.append(self.matrix.get("float32/tf32", 0.0) / 3)
        return max(rates)

    def vector_rate(self, mode):
        dtype = "float64" if mode == "float64" else "float32"
        return self.vector[dtype]

    def as_dict(self):
        return asdict(self)


def floor(cost, ceilings, mode):
    """The least time in seconds: for each phase the slowest of memory, tensor cores and the other arithmetic."""
    return sum(
        max(
            ceilings.seconds_to_move(phase.read, phase.written),
            phase.matrix / ceilings.matrix_rate(mode),
            phase.vector / ceilings.vector_rate(mode),
        )
        for phase in cost.phases
    )


def bound(cost, ceilings, mode):
    """What the floor consists of mostly: "memory" or "arithmetic"."""
    moving = sum(ceilings.seconds_to_move(phase.read, phase.written) for phase in cost.phases)
    return "memory" if moving >= sum(p.matrix for p in cost.phases) / ceilings.matrix_rate(mode) else "arithmetic"


def intensity(cost):
    """FLOP per byte that must move: a problem's place on the roofline."""
    return cost.flop / max(cost.bytes, 1)

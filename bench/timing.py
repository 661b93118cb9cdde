"""Samples of timed calls, percentiles, and the cross-check of the device's clock with the host's."""

import time
from dataclasses import dataclass

import numpy as np

#: The two clocks may differ by this share and this many seconds, the cost of reading them.
CLOCK_SHARE, CLOCK_SECONDS = 0.05, 100e-6
#: How often one sample is taken when they do: the host may lose the processor between two readings.
ATTEMPTS = 3


class MeasuringError(Exception):
    """The measurement cannot be trusted."""


@dataclass(frozen=True)
class Timing:
    """Seconds per call: percentiles over samples; `host` is what the host needs to issue one call."""

    median: float
    p20: float
    p80: float
    host: float
    samples: int
    calls: int

    @classmethod
    def of(cls, seconds, host_seconds, calls):
        p20, median, p80 = percentiles(seconds)
        return cls(median, p20, p80, percentiles(host_seconds)[1], len(seconds), calls)


class Turn:
    """Numbers of sets to take in turn, where there is no more to a set than its number."""

    def __init__(self, count):
        self.count, self.cursor = count, 0

    def following(self, calls):
        """The numbers for the next `calls` calls."""
        first = self.cursor
        self.cursor = (first + calls) % self.count
        return [(first + i) % self.count for i in range(calls)]


def percentiles(values):
    """The 20th, 50th and 80th percentile, linear between neighbours."""
    return tuple(float(value) for value in np.percentile(np.asarray(values, dtype=np.float64), (20, 50, 80)))


def check_clocks(device_seconds, host_seconds):
    """Raises MeasuringError unless both clocks saw the same span."""
    if abs(device_seconds - host_seconds) > CLOCK_SHARE * host_seconds + CLOCK_SECONDS:
        raise MeasuringError(
            f"the device's clock says {device_seconds * 1e3:.3f} ms, the host's {host_seconds * 1e3:.3f} ms"
        )


def sample(device, call, numbers):
    """One sample: call(number) for each of `numbers` between two marks of the device's clock.

    The whole device is idle before the opening mark and again before the closing one, so that work in other streams
    counts too. Returns (seconds per call, host seconds to issue one call).
    """
    clock = device.clock()
    device.synchronize()
    begin = time.perf_counter()
    clock.open()
    for number in numbers:
        call(number)
    issued = time.perf_counter()
    device.synchronize()
    elapsed = clock.close()
    end = time.perf_counter()
    check_clocks(elapsed, end - begin)
    return elapsed / len(numbers), (issued - begin) / len(numbers)


def trusted_sample(device, call, numbers, prepare):
    """`sample` after prepare(), taken again where the clocks disagree. Raises MeasuringError if they always do."""
    for attempt in range(ATTEMPTS):
        prepare()
        try:
            return sample(device, call, numbers)
        except MeasuringError:
            if attempt == ATTEMPTS - 1:
                raise


def measure(device, call, sets, *, budget, sample_seconds=4e-3, least=5, most=30, prepare=None):
    """Times call(number of a set), going round the sets, for about `budget` seconds.

    Args:
        sample_seconds: length of a sample, long against the two synchronisations (about 20 microseconds) in it.
        least, most: number of samples.
        prepare: called before each sample, outside the timed region (poison, flush).

    Returns:
        Timing, and the numbers of the sets that the last sample used, in order.
    """
    prepare = prepare or (lambda: None)
    estimate, _ = trusted_sample(device, call, sets.following(1), prepare)
    if estimate < sample_seconds:  # one call alone is mostly latency
        calls = min(sets.count, max(1, int(sample_seconds / 4 / estimate)))
        estimate, _ = trusted_sample(device, call, sets.following(calls), prepare)
    calls = int(max(1, min(sets.count * 4, sample_seconds / estimate)))
    samples = int(max(least, min(most, budget / (calls * estimate))))
    seconds, host_seconds, numbers = [], [], []
    for _ in range(samples):
        numbers = sets.following(calls)
        elapsed, issue = trusted_sample(device, call, numbers, prepare)
        seconds.append(elapsed)
        host_seconds.append(issue)
    return Timing.of(seconds, host_seconds, calls), numbers

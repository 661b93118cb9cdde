"""Benchmarks of rawkern on CuPy arrays, against measured floors and, where torch is there, against its own kernels.

`python -m bench --help` says how to run them. One `bench_<op>.py` per op says what is special to the op: its problems,
what must move and be computed, how its launcher is called, what the right answer is. Everything else is here once:

    problems.py     what a problem, an input and an op are; the registry and the selection by name
    convolutions.py sizes, exact counts of multiplications and the problems of the transposed convolution
    data.py         random numbers, dtypes, rotating sets of inputs and outputs, poison
    devices.py      the GPU and the emulator behind one interface: clock, memory, versions
    ceilings.py     bandwidths and arithmetic rates of this machine, measured in the same run
    floors.py       the least time a problem can take under those ceilings
    timing.py       samples, percentiles, the cross-check of two clocks
    oracle.py       float64 references on slices, and how far the precision mode may lead away from them
    guards.py       poison, oracle and dependence checks
    peers.py        the same computation by PyTorch: eager, channels-last, compiled
    runner.py       one row: all of the above for one problem
    report.py       rows, JSON files, tables;  plots.py: pictures;  compare.py: two JSON files side by side
"""

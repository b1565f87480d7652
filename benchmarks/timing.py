"""Fair timings on a machine that is never quiet: contenders take turns, medians count."""

import math
import statistics
import time
from dataclasses import dataclass

# Libraries' idle threads spin after a call, OpenBLAS's for a tenth of a second; nobody is timed
# beside them.
SETTLE_S = 0.03
SETTLE_MOST_S = 0.5
# Shorter calls are repeated until a sample is at least this long.
SAMPLE_S = 0.01
# Shorter calls are made once untimed after the pause: into the caches, and threads awake.
WARM_S = 0.3


@dataclass(frozen=True)
class Timing:
    median_s: float
    min_s: float
    samples: int

    @classmethod
    def of(cls, samples):
        return cls(statistics.median(samples), min(samples), len(samples))


def timed(run, count=1):
    """Seconds of one call out of `count`, after which everything has been computed."""
    start = time.perf_counter()
    run(count)
    return (time.perf_counter() - start) / count


def settle():
    """Pauses until no thread of this process computes any more."""
    end = time.perf_counter() + SETTLE_MOST_S
    while time.perf_counter() < end:
        before = time.process_time()
        time.sleep(SETTLE_S)
        if time.process_time() - before < 0.1 * SETTLE_S:
            return


class _Entry:
    def __init__(self, run, estimate):
        self.run = run
        self.warm = estimate < WARM_S
        self.count = max(1, min(1000, math.ceil(SAMPLE_S / max(estimate, 1e-9))))
        self.samples = []
        self.spent = 0.0

    def take(self):
        settle()
        if self.warm:
            self.run(1)
        self.samples.append(timed(self.run, self.count))
        self.spent += self.samples[-1] * self.count


def race(runs, budget_s, repeats, known=None):
    """The Timing of every run(count) in `runs`, by name.

    Samples are taken in turns, so that a disturbance hits everyone. Each contender gets
    `repeats` samples, or, where those would last longer than `budget_s`, at least three;
    one whose single call takes longer than the budget is timed once. `known` gives the
    seconds of calls that were timed already.
    """
    entries, timings = {}, {}
    for name, run in runs.items():
        estimate = (known or {}).get(name)
        if estimate is None:
            cold = timed(run)
            estimate = cold if cold > budget_s else timed(run)
        if estimate > budget_s:
            timings[name] = Timing.of([estimate])
        else:
            entries[name] = _Entry(run, estimate)
    pending = dict(entries)
    while pending:
        for name, entry in list(pending.items()):
            entry.take()
            enough = len(entry.samples) >= min(3, repeats) and entry.spent >= budget_s
            if enough or len(entry.samples) >= repeats:
                del pending[name]
    timings.update({name: Timing.of(entry.samples) for name, entry in entries.items()})
    return {name: timings[name] for name in runs}

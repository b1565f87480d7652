"""Checks a case, then times it beside its peers."""

import time
from dataclasses import dataclass, field

import mlx.core as mx

import peers
from contenders import MlxDeform, Unavailable, bound_for, device_kind
from memory import extra_megabytes
from named_cases import cropped
from problem import (
    BACKWARD,
    FORWARD,
    PASSES,
    check_against,
    check_cropped,
    errors_of,
    gflop,
    make_problem,
    product_of,
)
from report import OURS, Row
from timing import race, timed

# A peer whose output is farther than this from ours, relative to the largest magnitude, is
# named in the notes: it is timed, but at another operation or another precision.
PEER_TOLERANCE = {"float32": 1e-3, "float16": 5e-3, "bfloat16": 3e-2}


@dataclass(frozen=True)
class Options:
    dtypes: list
    threads: int
    budget_s: float
    repeats: int
    patience_s: float
    with_peers: bool
    memory_of: list
    tf32: bool


@dataclass
class Suite:
    options: Options
    notes: dict = field(default_factory=dict)  # why something is missing, without repetition

    def __post_init__(self):
        self.kind = device_kind()
        self.peers = peers.PEERS[self.kind] if self.options.with_peers else ()
        self.bound = bound_for(self.kind)

    @property
    def device(self):
        return "cpu" if self.kind == "cpu" else "gpu"

    def instruction_sets(self):
        """What each contender runs of the CPU's, by name; without those not installed."""
        named = {}
        for contender in (MlxDeform, self.bound, *self.peers):
            try:
                named[contender.name] = contender.instruction_set()
            except Unavailable:
                continue
        return named

    def note(self, text, case):
        self.notes.setdefault(text, []).append(case)

    def rows(self, name, config):
        """Yield a Row for every type and pass; raises Mismatch before anything is timed."""
        threads = self.options.threads
        problem = make_problem(name, config)
        reference, known = self.reference(problem)
        for dtype in self.options.dtypes:
            ours = MlxDeform(problem, dtype, threads)
            results = ours.as_numpy(ours.run(BACKWARD))
            error = None
            if reference is None:
                check_cropped(problem, dtype)
            else:
                error = check_against(reference, results, dtype, self.options.tf32)
            trials = self.trials(name, config, dtype)
            contenders = {OURS: ours, self.bound.name: self.bound(problem, dtype, threads)}
            contenders |= self.peers_of(problem, dtype, trials, results["output"], known)
            del results
            extra = {}
            for who in self.options.memory_of:
                extra[who] = extra_megabytes(name, dtype, who, self.device, threads)
            for which in PASSES:
                timings = self.timings(problem, dtype, contenders, which, trials, known)
                megabytes = {who: mb[which] for who, mb in extra.items() if which in mb}
                yield Row(
                    case=name,
                    dtype=dtype,
                    which=which,
                    gflop=gflop(config, which),
                    bound=self.bound.name,
                    timings=timings,
                    error=error,
                    extra_mb=megabytes,
                )

    def reference(self, problem):
        """torchvision's results in float32, and the seconds that they took; or None.

        They can take a minute, so they are its timing too where that is long.
        """
        if not self.options.with_peers:
            return None, {}
        device = "cuda" if self.kind == "cuda" else "cpu"
        try:
            torchvision = peers.Torchvision(problem, "float32", self.options.threads, device)
        except Unavailable as reason:
            self.note(f"checked on a small map against the oracle: {reason}", problem.name)
            return None, {}
        known = {}
        results = _first_call(torchvision, "float32", BACKWARD, known)
        return torchvision.as_numpy(results), known if device == self.kind else {}

    def trials(self, name, config, dtype):
        """Every peer that gets through a forward on a small map, by name: (peer, trial)."""
        small, trials = make_problem(name, cropped(config)), {}
        for peer in self.peers:
            try:
                trial = peers.build(peer, small, dtype, self.options.threads, self.kind)
                self.try_pass(trial, FORWARD, config)
            except Exception as error:  # whatever a peer raises, it is not in the race
                self.note(f"{peer.name}, {dtype}: {_summary(error)}", name)
                continue
            trials[peer.name] = (peer, trial)
        return trials

    def try_pass(self, trial, which, config):
        """Some peers take minutes, for want of a kernel for a type: Unavailable tells."""
        trial.run(which)
        small = product_of(cropped(config)).M
        seconds = timed(_runner(trial, which)) * product_of(config).M / small
        if seconds > self.options.patience_s:
            raise Unavailable(f"one {which} would take {seconds:.0f} s (see --patience)")

    def peers_of(self, problem, dtype, trials, output, known):
        """The peers at full size, called once; a note tells where results differ from ours."""
        contenders = {}
        for name, (peer, _) in trials.items():
            try:
                contender = peers.build(peer, problem, dtype, self.options.threads, self.kind)
                results = _first_call(contender, dtype, FORWARD, known)
            except Exception as error:
                self.note(f"{name}, {dtype}: {_summary(error)}", problem.name)
                continue
            if hasattr(contender, "as_numpy") and not issubclass(peer, _ORDINARY):
                theirs = contender.as_numpy(results)["output"]
                distance = errors_of({"output": theirs}, {"output": output})["output"]
                if not distance <= PEER_TOLERANCE[dtype]:
                    self.note(f"{name}, {dtype}: differs by {distance:.1e}", problem.name)
            contenders[name] = contender
        return contenders

    def timings(self, problem, dtype, contenders, which, trials, known):
        name, config = problem.name, problem.config
        runs, long = {}, {}
        for who, contender in contenders.items():
            call = (who, dtype, which)
            if call not in known and who in trials:
                try:
                    self.try_pass(trials[who][1], which, config)
                    _first_call(contender, dtype, which, known)
                except Exception as error:  # a peer without a backward, mostly
                    self.note(f"{who}, {dtype}, {which}: {_summary(error)}", name)
                    continue
            if known.get(call, 0) > self.options.budget_s:
                long[who] = known[call]
            runs[who] = _runner(contender, which)
        timings = race(runs, self.options.budget_s, self.options.repeats, known=long)
        mx.clear_cache()
        return timings


_ORDINARY = (peers.MlxConv2d, peers.TorchConv2d)


def _first_call(contender, dtype, which, known):
    """Its results; the seconds that it took go into `known`."""
    start = time.perf_counter()
    results = contender.run(which)
    known[contender.name, dtype, which] = time.perf_counter() - start
    return results


def _runner(contender, which):
    def run(count=1):
        contender.run(which, count)

    return run


def _summary(error):
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:160]

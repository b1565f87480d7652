"""The whole demo: both networks, all seeds, the table, and the picture."""

import time

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from . import picture, training
from .frames import BEND, NEIGHBOUR_NOISE, NOISE, SHIFT, SIDE, TEST, TRAINING, Frames
from .networks import WIDTHS, Network, count, predictor_count

KINDS = tuple(WIDTHS)


def describe(data, networks, group):
    print(f"data      frames of {SIDE}x{SIDE} from {len(TRAINING)} pictures to train on, ", end="")
    print(f"{len(data.test)} from {len(TEST)} others to test on;")
    print(f"          noise {NOISE:g}; a neighbour with noise {NEIGHBOUR_NOISE:g} ", end="")
    print(f"moved by up to {SHIFT + BEND:g} pixels either way")
    for kind, network in networks.items():
        line = f"network   {kind:<11}{count(network):6} parameters"
        if extra := predictor_count(network):
            line += f", of which {extra} predict offsets"
        print(line)
    if group.size() > 1:
        print(f"processes {group.size()}, each with its share of every batch")


def print_table(data, scores):
    """scores: in dB, by kind, one per seed."""
    seeds = len(scores[KINDS[0]])
    columns = "".join(f"{f'seed {seed}':>9}" for seed in range(seeds))
    print(f"\ntest PSNR, dB        {columns}     mean")
    for kind, values in scores.items():
        row = "".join(f"{value:9.2f}" for value in values)
        print(f"{kind:<21}{row}{np.mean(values):9.2f}")
    noisy = np.mean(training.psnr(data.test.noisy, data.test.truth))
    print(f"{'the noisy frames':<21}{'':{9 * seeds}}{noisy:9.2f}")


def run(options, group):
    """Trains on the processes of the group, of which the first one prints and draws."""
    first = group.rank() == 0
    start = time.perf_counter()
    data = Frames()
    scores = {kind: [] for kind in KINDS}
    networks = {kind: Network(kind) for kind in KINDS}
    if first:
        describe(data, networks, group)

    total = options.seeds * len(KINDS) * options.steps
    with tqdm(total=total, disable=not first, unit="step", mininterval=0.5) as bar:
        for seed in range(options.seeds):
            for kind in KINDS:
                bar.set_description(f"{kind}, seed {seed}")
                mx.random.seed(seed)
                networks[kind] = Network(kind)

                def progress(loss):
                    bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                    bar.update()

                training.train(networks[kind], data, options, seed, group, progress)
                scores[kind].append(training.score(networks[kind], data, group))
    if not first:
        return

    print_table(data, scores)
    picture.draw(networks, data, options.out)
    print(f"\nsaved     {options.out}: where the kernels sample, after seed {options.seeds - 1}")
    print(f"took      {time.perf_counter() - start:.0f} s")

"""The whole demo: both networks, all seeds, the table, and the picture."""

import time

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from . import picture, training
from .digits import TEST_WARPS, Digits
from .networks import WIDTHS, Network, count, predictor_count

KINDS = tuple(WIDTHS)


def describe(data, networks, group):
    digits = len(data.test_labels) // TEST_WARPS
    print(f"data      {len(data)} digits to train on, {digits} others to test on, ", end="")
    print(f"{TEST_WARPS} warps of each:\n          {data.ranges}")
    for kind, network in networks.items():
        line = f"network   {kind:<11}{count(network):6} parameters"
        if extra := predictor_count(network):
            line += f", of which {extra} predict offsets and masks"
        print(line)
    if group.size() > 1:
        print(f"processes {group.size()}, each with its share of every batch")


def print_table(accuracies):
    """accuracies: by kind, one per seed, between 0 and 1."""
    seeds = len(accuracies[KINDS[0]])
    columns = "".join(f"{f'seed {seed}':>9}" for seed in range(seeds))
    print(f"\ntest accuracy, %     {columns}     mean")
    for kind, values in accuracies.items():
        values = 100 * np.array(values)
        row = "".join(f"{value:9.1f}" for value in values)
        print(f"{kind:<21}{row}{values.mean():9.1f}")


def run(options, group):
    """Trains on the processes of the group, of which the first one prints and draws."""
    first = group.rank() == 0
    start = time.perf_counter()
    data = Digits(training=options.digits)
    accuracies = {kind: [] for kind in KINDS}
    networks = {kind: Network(kind) for kind in KINDS}
    if first:
        describe(data, networks, group)

    steps = options.epochs * (len(data) // options.batch_size)
    total = options.seeds * len(KINDS) * steps
    with tqdm(total=total, disable=not first, unit="step", mininterval=0.5) as bar:
        for seed in range(options.seeds):
            for kind in KINDS:
                bar.set_description(f"{kind}, seed {seed}")
                mx.random.seed(seed)
                networks[kind] = Network(kind)

                def progress(loss):
                    bar.set_postfix(loss=f"{loss:.2f}", refresh=False)
                    bar.update()

                training.train(networks[kind], data, options, seed, group, progress)
                accuracies[kind].append(training.accuracy(networks[kind], data, group))
    if not first:
        return

    print_table(accuracies)
    picture.draw(networks, data, options.out)
    print(f"\nsaved     {options.out}: where the kernels sample, after seed {options.seeds - 1}")
    print(f"took      {time.perf_counter() - start:.0f} s")

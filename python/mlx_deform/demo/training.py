"""Training of one network, on one process or data-parallel on several."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np


def loss(network, batch):
    """The mean distance from the truth, smooth where it is below the noise (Charbonnier's)."""
    return mx.sqrt((network(batch) - batch.truth) ** 2 + 1e-4).mean()


def loss_and_gradients(network, batch, group):
    """Of the whole batch, of which every process of the group holds an equal share.

    The network must be the same on all of them.
    """
    value, gradients = nn.value_and_grad(network, lambda: loss(network, batch))()
    if group.size() > 1:
        value = mx.distributed.all_sum(value, group=group) / group.size()
    return value, nn.average_gradients(gradients, group)


def check_batch_size(size, group):
    if size % group.size():
        raise ValueError(
            "the batch size must be divisible by the number of processes; "
            f"got {size} and {group.size()}"
        )


def make_optimizer(learning_rate, steps):
    warm_up = max(1, steps // 20)
    rising = optim.linear_schedule(0, learning_rate, warm_up)
    falling = optim.cosine_decay(learning_rate, max(1, steps - warm_up), learning_rate / 50)
    schedule = optim.join_schedules([rising, falling], [warm_up])
    return optim.Adam(schedule, betas=[0.9, 0.99], bias_correction=True)


def train(network, data, options, seed, group, progress):
    """Trains the network in place.

    options: steps, batch_size, learning_rate. progress(loss) is called after every step.
    """
    check_batch_size(options.batch_size, group)
    rng = np.random.default_rng(seed)
    optimizer = make_optimizer(options.learning_rate, options.steps)
    for batch in data.batches(rng, options.steps, options.batch_size, group.rank(), group.size()):
        value, gradients = loss_and_gradients(network, batch, group)
        optimizer.update(network, gradients)
        mx.eval(network.parameters(), optimizer.state)
        progress(value.item())


def psnr(frames, truth):
    """Of each frame, in dB."""
    from skimage.metrics import peak_signal_noise_ratio

    frames = np.clip(np.array(frames), 0, 1)
    pairs = zip(np.array(truth), frames, strict=True)
    return [peak_signal_noise_ratio(*pair, data_range=1) for pair in pairs]


def score(network, data, group, chunk=8):
    """The mean PSNR over the frames to test on, of which every process restores its share."""
    total = 0.0
    for start in range(group.rank() * chunk, len(data.test), group.size() * chunk):
        batch = data.test[start : start + chunk]
        total += sum(psnr(network(batch), batch.truth))
    if group.size() > 1:
        total = mx.distributed.all_sum(mx.array(total), group=group).item()
    return total / len(data.test)

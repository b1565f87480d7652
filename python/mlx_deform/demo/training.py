"""Training of one network, on one process or data-parallel on several."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np


def loss(network, images, labels):
    return nn.losses.cross_entropy(network(images), labels, reduction="mean")


def loss_and_gradients(network, images, labels, group):
    """Of the whole batch, of which every process of the group holds an equal share.

    The network must be the same on all of them.
    """
    value, gradients = nn.value_and_grad(network, lambda *batch: loss(network, *batch))(
        images, labels
    )
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
    warm_up = max(1, steps // 10)
    rising = optim.linear_schedule(0, learning_rate, warm_up)
    falling = optim.cosine_decay(learning_rate, max(1, steps - warm_up), learning_rate / 50)
    return optim.Adam(optim.join_schedules([rising, falling], [warm_up]))


def train(network, data, options, seed, group, progress):
    """Trains the network in place.

    options: epochs, batch_size, learning_rate. progress(loss) is called after every step.
    """
    check_batch_size(options.batch_size, group)
    rng = np.random.default_rng(seed)
    steps = options.epochs * (len(data) // options.batch_size)
    optimizer = make_optimizer(options.learning_rate, steps)
    for _ in range(options.epochs):
        for batch in data.batches(rng, options.batch_size, group.rank(), group.size()):
            value, gradients = loss_and_gradients(network, *batch, group)
            optimizer.update(network, gradients)
            mx.eval(network.parameters(), optimizer.state)
            progress(value.item())


def accuracy(network, data, group, chunk=150):
    """The share of the test images that the network gets right, between 0 and 1.

    Every process of the group looks at its share of the images.
    """
    right = 0
    total = len(data.test_labels)
    for start in range(group.rank() * chunk, total, group.size() * chunk):
        part = slice(start, start + chunk)
        guesses = mx.argmax(network(data.test_images[part]), axis=-1)
        right += int((np.array(guesses) == data.test_labels[part]).sum())
    if group.size() > 1:
        right = mx.distributed.all_sum(mx.array(right), group=group).item()
    return right / total

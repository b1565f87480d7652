"""mmcv's attention layer on MLX, for tensors."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_deform.nn import MultiScaleDeformableAttention, load_torch_weights

torch = pytest.importorskip("torch", reason="torch is not installed")

import mlx_deform.torch as bridge  # noqa: E402
from torch_cases import DEVICE  # noqa: E402


@pytest.mark.parametrize("numbers", [2, 4])
@pytest.mark.parametrize("batch_first", [False, True])
def test_the_layer_of_mmcv(numbers, batch_first):
    """Beside the layer in mlx_deform.nn with the same weights."""
    shapes, N, Q, C = [(4, 5), (2, 3)], 2, 7, 12
    torch.manual_seed(8)
    settings = {"num_heads": 3, "num_levels": 2, "num_points": 2}
    theirs = bridge.MMCVMultiScaleDeformableAttention(C, **settings, batch_first=batch_first)
    ours = MultiScaleDeformableAttention(C, **settings)
    initial = theirs.sampling_offsets.bias.detach().numpy()
    np.testing.assert_allclose(np.array(ours.sampling_offsets.bias), initial, atol=1e-6)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.3)
    load_torch_weights(ours, theirs.state_dict())
    query, position, value = torch.randn(N, Q, C), torch.randn(N, Q, C), torch.randn(N, 26, C)
    points, mask = torch.rand(N, Q, 2, numbers), torch.rand(N, 26) < 0.3

    def order(x):
        return x if batch_first else x.transpose(0, 1)

    got = theirs.eval().to(DEVICE)(
        *(order(x).to(DEVICE) for x in (query,)),
        value=order(value).to(DEVICE),
        query_pos=order(position).to(DEVICE),
        key_padding_mask=mask.to(DEVICE),
        reference_points=points.to(DEVICE),
        spatial_shapes=torch.tensor(shapes),
    )
    arrays = [mx.array(x.numpy()) for x in (query + position, points, value)]
    want = np.array(ours(*arrays, shapes, mx.array(mask.numpy()))) + query.numpy()
    np.testing.assert_allclose(order(got).detach().cpu().numpy(), want, atol=1e-5)
    with pytest.raises(ValueError, match="reference_points must be given"):
        theirs(order(query).to(DEVICE))
    with pytest.raises(ValueError, match="num_heads must divide"):
        bridge.MMCVMultiScaleDeformableAttention(10, num_heads=3)

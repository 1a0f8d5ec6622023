"""Batch norm over the global batch against PyTorch's over the whole batch."""

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from coca_lit.distributed import rank, world_size
from coca_lit.errors import DataError
from coca_lit.models import create_model
from coca_lit.models.convolutional import GlobalBatchNorm2d, use_global_batch_norms


def plain_norm(momentum: float | None) -> nn.BatchNorm2d:
    norm = BatchNormAct2d(3, momentum=momentum, act_layer=nn.SiLU, inplace=False).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def two_steps(replace: bool, momentum: float | None) -> dict[str, Tensor]:
    """Outputs, gradients by input, weight and bias, and statistics, put together from all ranks as DDP would."""
    torch.manual_seed(0)
    norm = plain_norm(momentum)
    if replace:
        norm = GlobalBatchNorm2d(norm)
    share = 6 // world_size()
    for _ in range(2):
        images, target = 5 + torch.randn(2, 6, 3, 4, 4, dtype=torch.double)
        own = slice(rank() * share, (rank() + 1) * share)
        x = images[own].clone().requires_grad_()
        y = norm(x)
        (y * target[own]).sum().div(share).backward()
    gradients = {"weight gradient": norm.weight.grad, "bias gradient": norm.bias.grad}
    return gradients | norm.state_dict() | {"y": y.detach(), "x gradient": x.grad / world_size()}


@pytest.mark.parametrize("momentum", [0.1, None])
def test_training_on_several_ranks_equals_batch_norm_of_the_whole_batch(on_ranks, momentum: float | None) -> None:
    expected = two_steps(False, momentum)
    for world in (2, 3):
        results = on_ranks(world, two_steps, True, momentum)
        for name, value in expected.items():
            found = [result[name] for result in results]
            if name in ("y", "x gradient"):
                torch.testing.assert_close(torch.cat(found), value, atol=1e-10, rtol=0)
            elif "gradient" in name:
                torch.testing.assert_close(sum(found) / world, value, atol=1e-10, rtol=0)
            else:
                assert all(torch.allclose(f, value, atol=1e-10, rtol=0) for f in found), name


@pytest.mark.parametrize("name", ["resnet10t", "tf_efficientnet_lite0"])
def test_one_process_computes_what_timm_does(name: str) -> None:
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=0)
    ours = timm.create_model(name, num_classes=0)
    ours.load_state_dict(plain.state_dict())
    use_global_batch_norms(ours)
    assert list(ours.state_dict()) == list(plain.state_dict())
    norms = [module for module in ours.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert all(type(module) is GlobalBatchNorm2d for module in norms)
    images = torch.randn(2, 3, 64, 64)
    for mode in (True, False):
        assert torch.equal(ours.train(mode)(images), plain.train(mode)(images))


@pytest.mark.parametrize("channels", [[8, 8, 16, 32], [8, 8, 32, 32]])
def test_frozen_stages_and_the_remaining_ones_are_the_encoder(channels: list[int]) -> None:
    """Unless the frozen ones are as wide as the encoder's output, for which the encoder would take theirs."""
    net = create_model("coca_tiny", image_encoder_args={"channels": channels, "output_stride": 8}).eval()
    net.freeze("image_encoder.trunk.*1", *(f"image_encoder.trunk.layer{i}" for i in (2, 3)))
    encoder, images = net.image_encoder, torch.randn(2, 3, 32, 32)
    if channels[2] == channels[3]:
        with pytest.raises(DataError, match=r"32 wide, as is its output: .*data\.cached_augmentations=0"):
            encoder.frozen_part()(images)
    else:
        torch.testing.assert_close(encoder(encoder.frozen_part()(images)), encoder(images))

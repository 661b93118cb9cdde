"""fuse on models as they are in use, weights random: the same results and gradients, and the expected chains."""

import pytest
import torch
import torch.nn.functional as F
from fusing import fuse_and_compare, fused_functions
from torch import nn

import rawkern
from rawkern.fusion.report import rows_of

CONV = "conv_transpose2d"


class DCGANGenerator(nn.Module):
    """Radford, Metz and Chintala 2016, in the form of PyTorch's examples, with fewer features."""

    def __init__(self, noise=6, features=4, channels=3):
        super().__init__()
        self.main = nn.Sequential(
            nn.ConvTranspose2d(noise, features * 4, 4, 1, 0, bias=False),
            nn.BatchNorm2d(features * 4),
            nn.ReLU(True),
            nn.ConvTranspose2d(features * 4, features * 2, 4, 2, 1, bias=False),
            nn.BatchNorm2d(features * 2),
            nn.ReLU(True),
            nn.ConvTranspose2d(features * 2, channels, 4, 2, 1, bias=False),
            nn.Tanh(),
        )
        self.apply(self._initialise)

    @staticmethod
    def _initialise(module):
        if isinstance(module, nn.ConvTranspose2d):
            nn.init.normal_(module.weight, 0.0, 0.2)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.2)
            nn.init.normal_(module.bias, 0.0, 0.2)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)

    def forward(self, noise):
        return self.main(noise)


class Up(nn.Module):
    """A step of a U-Net's decoder: up-sampling, the skip connection, two convolutions."""

    def __init__(self, in_channels, out_channels, stride=2):
        super().__init__()
        self.up = nn.ConvTranspose2d(in_channels, out_channels, 3, stride, padding=1)
        self.act = nn.LeakyReLU(0.1, inplace=True)
        self.block = nn.Sequential(
            nn.Conv2d(out_channels * 2, out_channels, 3, padding=1),
            nn.GELU(),
            nn.GroupNorm(2, out_channels),
        )

    def forward(self, x, skip):
        x = self.act(self.up(x, output_size=skip.shape[-2:]))
        if x.shape[-2:] != skip.shape[-2:]:
            raise ValueError("the skip connection does not fit")
        return self.block(torch.cat([x, skip], dim=1))


class TracedUp(Up):
    """The same, without the check."""

    def forward(self, x, skip):
        x = F.leaky_relu_(self.up(x, skip.shape[-2:]), 0.1)
        return self.block(torch.cat([x, skip], dim=1))


class UNetDecoder(nn.Module):
    """Features of an encoder, the coarsest last, to a mask."""

    def __init__(self, step, widths=(4, 6, 8)):
        super().__init__()
        self.steps = nn.ModuleList(
            step(coarse, fine) for fine, coarse in zip(widths[-2::-1], widths[:0:-1], strict=True)
        )
        self.head = nn.ConvTranspose2d(widths[0], 1, 2, stride=2)

    def forward(self, features):
        *skips, x = features
        for step, skip in zip(self.steps, reversed(skips), strict=True):
            x = step(x, skip)
        return torch.clamp(self.head(x).sigmoid(), 1e-4, 1 - 1e-4)


class OnList(nn.Module):
    """A model of a list of tensors as one of several tensors."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *tensors):
        return self.model(list(tensors))


def double(device, *shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device) for shape in shapes]


def test_dcgan_in_training(device):
    """Batch normalisation of the batch stays torch's, so that only the last layer has something to take along."""
    torch.manual_seed(0)
    model = DCGANGenerator().double().to(device)
    noise = torch.randn(2, 6, 1, 1, dtype=torch.float64, device=device)
    fused = rawkern.fuse(model)
    # Of the statistics, which a step moves, each of the two models gets its own copy.
    statistics = {name: value.clone() for name, value in model.named_buffers()}
    output = fused(noise)
    moved = {name: value.clone() for name, value in model.named_buffers()}
    for name, value in model.named_buffers():
        value.copy_(statistics[name])
    torch.testing.assert_close(output, model(noise))
    torch.testing.assert_close(dict(model.named_buffers()), moved)
    fuse_and_compare(model, noise)
    assert [row.chain for row in rows_of(fused) if row.fused] == [("ConvTranspose2d main.6", "Tanh main.7")]


def test_dcgan_in_evaluation(device):
    torch.manual_seed(0)
    model = DCGANGenerator().double().to(device).eval()
    fused = fuse_and_compare(model, *double(device, (2, 6, 1, 1)))
    assert fused_functions(fused) == [CONV] * 3
    assert all(row.fused for row in rows_of(fused))


def test_dcgan_in_float32_is_as_exact_as_torch(device):
    torch.manual_seed(0)
    model = DCGANGenerator().to(device).eval()
    fused = rawkern.fuse(model)
    noise = torch.randn(2, 6, 1, 1, device=device)
    found, theirs = fused(noise), model(noise)
    oracle = model.cpu().double()(noise.cpu().double())
    rawkern.testing.assert_as_accurate_as_torch(found, theirs, oracle)


@pytest.mark.parametrize("step, modules", [(TracedUp, {"steps.0", "steps.1", ""}), (Up, {""})])
def test_unet_decoder(step, modules, device):
    torch.manual_seed(0)
    model = OnList(UNetDecoder(step)).double().to(device)
    fused = fuse_and_compare(model, *double(device, (2, 4, 15, 12), (2, 6, 8, 6), (2, 8, 4, 3)))
    rows = rows_of(fused.model)
    assert {row.module for row in rows if row.result == CONV} == modules
    assert fused_functions(fused.model).count("gelu_group_norm") == 2
    unfused = [row for row in rows if not row.fused]
    assert len(unfused) == (2 if step is Up else 0) and all("cannot be traced" in row.result for row in unfused)


def test_unet_decoder_of_other_sizes(device):
    """A fused model is not bound to the sizes it was first called with."""
    torch.manual_seed(0)
    model = OnList(UNetDecoder(TracedUp)).double().to(device)
    fused = rawkern.fuse(model)
    for shapes in [((1, 4, 7, 8), (1, 6, 4, 4), (1, 8, 2, 2)), ((3, 4, 4, 4), (3, 6, 2, 2), (3, 8, 1, 1))]:
        features = double(device, *shapes)
        torch.testing.assert_close(fused(*features), model(*features))


def test_mask_rcnn_head(device):
    """torchvision's mask head and predictor: four convolutions, an up-sampling with ReLU, the logits."""
    pytest.importorskip("torchvision")
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

    torch.manual_seed(0)
    model = nn.Sequential(MaskRCNNHeads(8, (8, 8, 8, 8), 1), MaskRCNNPredictor(8, 6, 3)).double().to(device)
    fused = fuse_and_compare(model, *double(device, (2, 8, 7, 7)))
    assert [(row.module, row.chain, row.result) for row in rows_of(fused)] == [
        ("1", ("ConvTranspose2d 1.conv5_mask", "ReLU 1.relu"), CONV)
    ]


def test_mask_rcnn(device):
    """The whole of it: detection has control flow that nothing can trace, its mask predictor has a chain."""
    pytest.importorskip("torchvision")
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.models.resnet import BasicBlock, ResNet

    torch.manual_seed(0)
    resnet = ResNet(BasicBlock, [1, 1, 1, 1])
    layers = {f"layer{i}": str(i) for i in (1, 2, 3, 4)}
    backbone = BackboneWithFPN(resnet, layers, [64, 128, 256, 512], 32)
    options = {"box_detections_per_img": 4, "box_score_thresh": 0.0, "rpn_post_nms_top_n_test": 8}
    model = MaskRCNN(backbone, 3, min_size=64, max_size=64, **options).to(device).eval()
    fused = rawkern.fuse(model)
    assert [row.module for row in rows_of(fused) if row.result == CONV] == ["roi_heads.mask_predictor"]
    image = torch.rand(3, 64, 64, device=device)
    with torch.no_grad():
        (found,), (expected,) = fused([image]), model([image])
    assert found["masks"].shape[0] > 0
    torch.testing.assert_close(found, expected)

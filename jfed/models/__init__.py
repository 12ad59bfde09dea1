"""Models: the ODENets, their ResNet twins, a small CNN, and what jfed asks of any model."""

from jfed.models.conv_nets import ConvNetConfig, conv_net
from jfed.models.convolutions.convolution import conv
from jfed.models.losses import Batch, Metrics, cross_entropy
from jfed.models.model import Model, Moments
from jfed.models.nnx_models import from_nnx
from jfed.models.ode_nets import ODENetConfig, odenet
from jfed.models.presets import PRESETS, NetworkConfig, build, preset, twin
from jfed.models.resnets import ResNetConfig, resnet
from jfed.models.small_cnn import cnn
from jfed.models.torch_weights import TorchWeights, load_torch

__all__ = [
    "PRESETS",
    "Batch",
    "ConvNetConfig",
    "Metrics",
    "Model",
    "Moments",
    "NetworkConfig",
    "ODENetConfig",
    "ResNetConfig",
    "TorchWeights",
    "build",
    "cnn",
    "conv",
    "conv_net",
    "cross_entropy",
    "from_nnx",
    "load_torch",
    "odenet",
    "preset",
    "resnet",
    "twin",
]

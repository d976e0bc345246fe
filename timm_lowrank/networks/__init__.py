"""Networks for 32 x 32 images, registered with timm when this package is imported.

>>> import timm, timm_lowrank.networks
>>> timm.list_models("*_cifar")
['resnet10_cifar', 'resnet18_cifar', 'resnet50_cifar', 'vgg19_bn_cifar']
"""

from timm_lowrank.networks.cifar import (
    CifarResNet,
    CifarVGG,
    resnet10_cifar,
    resnet18_cifar,
    resnet50_cifar,
    vgg19_bn_cifar,
)

__all__ = [
    "CifarResNet",
    "CifarVGG",
    "resnet10_cifar",
    "resnet18_cifar",
    "resnet50_cifar",
    "vgg19_bn_cifar",
]

"""Start here: the shapes of both networks, their sizes, their first weights.

It needs pytest and the program's own packages, and is run by

    python -m pytest tests/test_shapes.py
"""

import math

import pytest
import torch
from torch import nn

from dcgan_mnist import Discriminator, Generator, weights_init

BATCHES = (1, 2, 50)


def layers(network: nn.Module) -> list[tuple]:
    """List all layers of a network by name: convolutions and BatchNorm with their sizes."""
    found = []
    for layer in network.modules():
        name = type(layer).__name__
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            channels = (layer.in_channels, layer.out_channels)
            found.append((name, *channels, layer.kernel_size[0], layer.stride[0], layer.padding[0]))
        elif isinstance(layer, nn.BatchNorm2d):
            found.append((name, layer.num_features))
        elif not list(layer.children()):
            found.append((name,))
    return found


def test_the_generator_has_these_layers_and_no_others():
    assert layers(Generator()) == [
        ("ConvTranspose2d", 100, 512, 3, 1, 0),
        ("BatchNorm2d", 512),
        ("ReLU",),
        ("ConvTranspose2d", 512, 256, 3, 2, 0),
        ("BatchNorm2d", 256),
        ("ReLU",),
        ("ConvTranspose2d", 256, 128, 4, 2, 1),
        ("BatchNorm2d", 128),
        ("ReLU",),
        ("ConvTranspose2d", 128, 1, 4, 2, 1),
        ("Tanh",),
    ]


def test_the_discriminator_has_these_layers_and_no_others():
    discriminator = Discriminator()
    assert layers(discriminator) == [
        ("Conv2d", 1, 128, 4, 2, 1),
        ("LeakyReLU",),
        ("Conv2d", 128, 256, 4, 2, 1),
        ("BatchNorm2d", 256),
        ("LeakyReLU",),
        ("Conv2d", 256, 512, 3, 2, 0),
        ("BatchNorm2d", 512),
        ("LeakyReLU",),
        ("Conv2d", 512, 1, 3, 1, 0),
    ]
    slopes = {m.negative_slope for m in discriminator.modules() if isinstance(m, nn.LeakyReLU)}
    assert slopes == {0.2}


@pytest.mark.parametrize("n", BATCHES)
def test_the_generator_makes_images_in_their_range_from_noise(n: int):
    images = Generator()(torch.randn(n, 100, 1, 1))
    assert images.shape == (n, 1, 28, 28)
    assert images.abs().max() <= 1


@pytest.mark.parametrize("n", BATCHES)
def test_the_discriminator_gives_one_probability_an_image(n: int):
    discriminator = Discriminator().eval()
    images = torch.rand(n, 1, 28, 28) * 2 - 1
    probabilities = discriminator(images)
    assert probabilities.shape == (n,)
    assert probabilities.min() >= 0
    assert probabilities.max() <= 1
    logits = discriminator.logits(images)
    assert logits.shape == (n,)
    torch.testing.assert_close(logits.sigmoid(), probabilities)


def test_width_and_noise_can_have_other_sizes():
    generator = Generator(latent_dim=7, width=4)
    discriminator = Discriminator(width=4)
    images = generator(torch.randn(2, 7, 1, 1))
    assert images.shape == (2, 1, 28, 28)
    assert discriminator(images).shape == (2,)
    assert layers(generator)[0] == ("ConvTranspose2d", 7, 16, 3, 1, 0)
    assert layers(discriminator)[0] == ("Conv2d", 1, 4, 4, 2, 1)


@pytest.mark.parametrize(
    ("network", "count", "tensors"), [(Generator, 2_169_473, 23), (Discriminator, 1_713_025, 18)]
)
def test_every_parameter_is_counted_and_saved_once(network: type, count: int, tensors: int):
    one = network()
    assert sum(p.numel() for p in one.parameters()) == count
    state = one.state_dict()
    assert len(state) == tensors
    assert len({tensor.data_ptr() for tensor in state.values()}) == tensors


def test_gradients_of_the_discriminators_judgement_reach_every_parameter_of_both():
    generator = Generator()
    discriminator = Discriminator()
    discriminator.logits(generator(torch.randn(2, 100, 1, 1))).sum().backward()
    for parameter in (*generator.parameters(), *discriminator.parameters()):
        assert parameter.grad.abs().max() > 0


@pytest.mark.parametrize("network", [Generator, Discriminator])
def test_weights_start_with_the_papers_distributions(network: type):
    torch.manual_seed(0)
    for layer in network().apply(weights_init).modules():
        if not isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)):
            continue
        mean = 1.0 if isinstance(layer, nn.BatchNorm2d) else 0.0
        n = layer.weight.numel()
        # five standard errors of the mean and of the standard deviation
        assert abs(layer.weight.mean() - mean) < 5 * 0.02 / math.sqrt(n)
        assert abs(layer.weight.std() - 0.02) < 5 * 0.02 / math.sqrt(2 * n)
        # a normal distribution has 68.3 % within one standard deviation, a uniform one 57.7 %
        within = ((layer.weight - mean).abs() < 0.02).float().mean()
        assert abs(within - 0.683) < 5 * math.sqrt(0.683 * 0.317 / n)
        assert not layer.bias.any()

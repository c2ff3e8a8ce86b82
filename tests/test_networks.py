"""The networks: their layers, their first weights, and what importing the program does."""

import copy
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchsummary
from helpers import ROOT, assert_same_run, equal, new_gan
from torch import nn

import dcgan_mnist
from dcgan_mnist import Discriminator, Generator, weights_init

BATCHES = (1, 2, 50, 64)


def layers(network: nn.Module) -> list[tuple]:
    """List a network's layers: convolutions with their sizes, the others by name."""
    found = []
    for layer in network.modules():
        name = type(layer).__name__
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            channels = (layer.in_channels, layer.out_channels)
            found.append((name, *channels, layer.kernel_size[0], layer.stride[0], layer.padding[0]))
        elif isinstance(layer, nn.BatchNorm2d):
            found.append((name, layer.num_features))
        elif isinstance(layer, (nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid)):
            found.append((name,))
    return found


def test_the_generator_has_the_layers_of_the_paper():
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


def test_the_discriminator_has_the_layers_of_the_paper():
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


@pytest.mark.parametrize(
    ("network", "count", "keys"), [(Generator(), 2_169_473, 23), (Discriminator(), 1_713_025, 18)]
)
def test_every_parameter_is_counted_and_saved_once(network: nn.Module, count: int, keys: int):
    assert sum(p.numel() for p in network.parameters()) == count
    state = network.state_dict()
    assert len(state) == keys
    assert len({tensor.data_ptr() for tensor in state.values()}) == keys


@pytest.mark.parametrize("n", BATCHES)
def test_the_generator_makes_images_of_any_batch(n: int):
    images = Generator()(torch.randn(n, 100, 1, 1))
    assert images.shape == (n, 1, 28, 28)
    assert images.abs().max() <= 1


@pytest.mark.parametrize("n", BATCHES)
def test_the_discriminator_gives_one_probability_an_image_also_for_a_single_one(n: int):
    discriminator = Discriminator().eval()
    images = torch.rand(n, 1, 28, 28) * 2 - 1
    probabilities = discriminator(images)
    assert probabilities.shape == (n,)
    assert probabilities.min() >= 0
    assert probabilities.max() <= 1
    logits = discriminator.logits(images)
    torch.testing.assert_close(logits.sigmoid(), probabilities)
    assert logits.shape == (n,)


def test_sizes_can_be_changed():
    assert Generator(latent_dim=7, width=4, channels=3)(torch.randn(2, 7, 1, 1)).shape[1] == 3
    assert Discriminator(width=4, channels=3)(torch.randn(2, 3, 28, 28)).shape == (2,)


@pytest.mark.parametrize("network", [Generator(), Discriminator()])
def test_weights_start_with_the_papers_distributions(network: nn.Module):
    torch.manual_seed(0)
    network.apply(weights_init)
    for layer in network.modules():
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


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(1, 2, 3, bias=False), nn.ConvTranspose2d(1, 2, 3, bias=False)]
)
def test_weights_init_takes_layers_without_bias(layer: nn.Module):
    nn.init.constant_(layer.weight, 9.0)
    layer.apply(weights_init)
    assert layer.weight.abs().max() < 1


def test_weights_init_takes_layers_without_weight():
    nn.BatchNorm2d(2, affine=False).apply(weights_init)


def test_weights_init_leaves_other_layers_alone():
    layer = nn.Linear(2, 2)
    before = layer.weight.clone()
    layer.apply(weights_init)
    assert torch.equal(layer.weight, before)


def test_importing_needs_no_data_and_does_nothing(tmp_path: Path):
    shutil.copy(ROOT / "dcgan_mnist.py", tmp_path)
    code = (
        "import torch; before = torch.get_rng_state(); import dcgan_mnist;"
        "assert torch.equal(before, torch.get_rng_state())"
    )
    command = [sys.executable, "-B", "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [path.name for path in tmp_path.iterdir()] == ["dcgan_mnist.py"]


def test_the_summaries_state_the_true_counts_and_touch_no_random_state(
    capsys: pytest.CaptureFixture[str],
):
    networks = (Generator(), Discriminator())
    before = torch.get_rng_state()
    dcgan_mnist.print_summaries(*networks, 100)
    assert torch.equal(before, torch.get_rng_state())
    printed = capsys.readouterr().out
    assert re.findall(r"Total params: ([\d,]+)", printed) == ["2,169,473", "1,713,025"]


def test_the_summaries_are_of_the_networks_that_are_trained_and_change_nothing_there(
    capsys: pytest.CaptureFixture[str],
):
    gan = new_gan(width=3, latent_dim=5)
    gan.generator.layers.insert(3, nn.Dropout(0.1))
    networks = (gan.generator, gan.discriminator)
    before = [copy.deepcopy(network.state_dict()) for network in networks]
    dcgan_mnist.print_summaries(*networks, 5)
    printed = capsys.readouterr().out
    counts = [sum(p.numel() for p in network.parameters()) for network in networks]
    found = re.findall(r"Total params: ([\d,]+)", printed)
    assert [int(count.replace(",", "")) for count in found] == counts
    assert "Dropout" in printed
    for network, state in zip(networks, before, strict=True):
        assert equal(network.state_dict(), state)
        assert not any(layer._forward_hooks for layer in network.modules())


def test_a_run_without_the_summaries_is_the_same_to_the_bit(run, monkeypatch: pytest.MonkeyPatch):
    assert "Total params" in run("--dry-run", "--output-dir", "with").out
    monkeypatch.setattr(torchsummary, "summary", lambda *_, **__: None)
    assert "Total params" not in run("--dry-run", "--output-dir", "without").out
    assert_same_run("with", "without")

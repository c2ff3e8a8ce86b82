"""The networks: what test_shapes.py leaves out, the summaries, and what importing does."""

import copy
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

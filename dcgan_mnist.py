# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11.0", "torchvision>=0.26.0", "torchsummary>=1.5.1",
#                 "matplotlib>=3.9.0", "numpy>=2.0.0", "Pillow>=11.0.0", "tqdm>=4.66.1"]
# ///
"""DCGAN on MNIST in one file: watch handwritten digits grow out of noise.

    python dcgan_mnist.py --generate 100               draw digits now, with the generator included
    python dcgan_mnist.py --epochs 10                  train on the 10,000 bundled digits, offline
    python dcgan_mnist.py --recipe quick --epochs 2    train for about a minute
    python dcgan_mnist.py --dry-run                    check an installation in six steps
    python dcgan_mnist.py --resume                     go on with the run in the folder "result"

The generator turns noise into images. The noise z is a vector of 100 numbers for each image, drawn
from the normal distribution N(0, 1). The discriminator learns to tell real digits from generated
ones; the generator learns to draw digits that the discriminator takes for real. After Radford, Metz
and Chintala (2016), "Unsupervised Representation Learning with Deep Convolutional Generative
Adversarial Networks", arXiv:1511.06434.

The sections of this file, from top to bottom. The first five are the algorithm:

    networks             generator, discriminator, their first weights (weights_init), summaries
    settings             the numbers that shape a run, each with its flag; the recipes
    data                 digits as images, their order in an epoch, random numbers
    one training step    optimisers, loss, the two halves of the step; drawing from noise
    training             epochs, batches and their noise, log
    dataset              MNIST's files, or pictures of your own
    speed                devices, precision, faster ways to take the same step
    pictures             grids of digits, curves
    scores               how good the drawn digits are
    files                the output folder, checkpoints, trained generators
    commands             train, generate, interpolate, evaluate
    command line         flags, errors, signals

To change something, go there, and try it with --dry-run:

    a layer                     Generator or Discriminator
    first weights               weights_init, which replaces what __init__ has set
    the loss                    training_step, update_generator; curves and signs_of_collapse too
    an optimiser                DCGAN.__init__
    another network             DCGAN.__init__, where it is seeded, and DCGAN.parts; the inputs in
                                update_generator, if that loss trains it
    the noise                   sample_noise, from its stream of random numbers; generators that
                                were trained before draw from it too
    a schedule of the rate      group["lr"] of each optimiser, in train_epochs, before step, from
                                gan.epoch; on a GPU, --graph off. A resumed run starts with the rate
                                of DCGAN.__init__, and torch's schedulers start anew
    a setting and its flag      a line in Settings; networks take it in new_generator and DCGAN
    what may be trained on      read_pictures; as_digit for pictures in a folder
    how digits become images    to_images; draw, for the way back
    a number in the log         STATS, LOG_LINE and the last lines of training_step, in one order
    a score                     a line in SCORES, a line in Scorer.scores
    a picture of a run          its function, among the pictures; a line in PICTURES
    a command                   its function, a line in COMMANDS, a flag in add_drawing_flags; the
                                names of its files in FILES

A run that is resumed by an edited program goes on with the edits, but keeps its settings. README.md
says which files are written, and when.
"""

import argparse
import atexit
import copy
import ctypes
import dataclasses
import errno
import functools
import gc
import gzip
import hashlib
import io
import json
import math
import os
import platform
import re
import shlex
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import time
import traceback
import uuid
import warnings
import zipfile
import zlib
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import (
    AbstractContextManager,
    ExitStack,
    closing,
    contextmanager,
    redirect_stderr,
    redirect_stdout,
    suppress,
)
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, NoReturn

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim.swa_utils import get_ema_multi_avg_fn, update_bn
from tqdm import tqdm

__all__ = [
    "DCGAN",
    "Discriminator",
    "Generator",
    "Settings",
    "draw",
    "load_generator",
    "main",
    "training_step",
    "weights_init",
]

PROGRAM = "dcgan_mnist.py"
TORCH = (2, 11)  # the oldest version of PyTorch with which this program runs
LATENT_DIM = 100  # numbers of noise that make one digit
WIDTH = 128  # channels of the layers next to the image; the others have 2 and 4 times as many
SAMPLES = 50  # digits in the picture of an epoch: five rows of ten
FITTED = 1000  # digits drawn for the statistics of the averaged generator's BatchNorm layers
SCORED = 2000  # digits drawn for the score of an epoch
EVALUATED = 10_000  # digits drawn for the score of a finished run
# a notebook's cell has no file: there, the current folder stands in for the program's
HOME = Path(__file__).resolve().parent if "__file__" in globals() else Path.cwd()
BUNDLED = HOME / "MNIST"  # the data folder
EXAMPLE = HOME / "result" / "example" / "generator.pt"  # a trained generator, to draw with at once


# =========================================== networks ===========================================
class Generator(nn.Module):
    """Turn noise into images: (n, latent_dim, 1, 1) -> (n, 1, 28, 28) in [-1, 1]."""

    def __init__(self, latent_dim: int = LATENT_DIM, width: int = WIDTH) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ConvTranspose2d(latent_dim, 4 * width, kernel_size=3),  # (n, 512, 3, 3)
            nn.BatchNorm2d(4 * width),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(4 * width, 2 * width, kernel_size=3, stride=2),  # (n, 256, 7, 7)
            nn.BatchNorm2d(2 * width),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(2 * width, width, kernel_size=4, stride=2, padding=1),
            nn.BatchNorm2d(width),  # (n, 128, 14, 14)
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(width, 1, kernel_size=4, stride=2, padding=1),
            nn.Tanh(),  # (n, 1, 28, 28)
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z).float()  # layers that compute in bf16 return bf16


class Discriminator(nn.Module):
    """Judge images: (n, 1, 28, 28) in [-1, 1] -> (n,) probabilities of being real."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, kernel_size=4, stride=2, padding=1),  # (n, 128, 14, 14)
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(width, 2 * width, kernel_size=4, stride=2, padding=1),  # (n, 256, 7, 7)
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(2 * width, 4 * width, kernel_size=3, stride=2),  # (n, 512, 3, 3)
            nn.BatchNorm2d(4 * width),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(4 * width, 1, kernel_size=3),  # (n, 1, 1, 1)
        )

    def logits(self, images: Tensor) -> Tensor:
        """Return the log-odds of being real (n,), from which the loss is computed."""
        return self.layers(images).flatten().float()

    def forward(self, images: Tensor) -> Tensor:
        return torch.sigmoid(self.logits(images))


def weights_init(m: nn.Module) -> None:
    """Start a layer as the paper's code does, whatever its network's __init__ has set.

    Weights of convolutions come from N(0, 0.02), those of BatchNorm from N(1, 0.02); biases are 0.
    """
    if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
        mean = 0.0
    elif isinstance(m, nn.BatchNorm2d):
        mean = 1.0
    else:
        return
    if m.weight is not None:
        # assign: a parametrized weight, such as that of spectral_norm, cannot be changed in place
        m.weight = nn.init.normal_(m.weight, mean, std=0.02)
    if m.bias is not None:
        nn.init.zeros_(m.bias)


def print_summaries(generator: nn.Module, discriminator: nn.Module, latent_dim: int) -> None:
    """Print the layers of both networks, the shapes of what they return, and their sizes."""
    from torchsummary import summary  # here and not above, for training can do without it

    with torch.random.fork_rng(devices=[]):  # because summary runs the networks
        summary(copy.deepcopy(generator).cpu(), (latent_dim, 1, 1), device="cpu")
        summary(copy.deepcopy(discriminator).cpu(), (1, 28, 28), device="cpu")


# =========================================== settings ===========================================
RECIPES = {  # defaults that differ from those of Settings
    "article": {},  # as articles and tutorials train it
    "tuned": {"lr": 0.002, "beta2": 0.99, "generator_steps": 2},  # the best digits
    "quick": {  # readable digits in two epochs
        "batch_size": 40,
        "lr": 0.0018,
        "beta1": 0.3,
        "beta2": 0.9,
        "ema": 0.1,
    },
}


def flag(name: str) -> str:
    """Return the flag of an option: "--batch-size" of "batch_size"."""
    return f"--{name.replace('_', '-')}"


def flags_of_recipe(name: str) -> str:
    """Return the flags that a recipe stands for, as one would type them."""
    return " ".join(f"{flag(key)} {value}" for key, value in RECIPES[name].items())


def setting(
    default: object,
    help: str,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    choices: Sequence[object] = (),
) -> Any:
    """Return a field of Settings that has a flag with this help, and either a range or choices."""
    metadata = {"help": help, "low": low, "high": high, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """What shapes a run: the same settings and digits give the same run on the same machine.

    A new setting (bool, int, float or str) needs a line here, and the code that uses it. Its flag,
    its place in the checkpoint and its comparison on --resume follow. For a checkpoint that lacks
    it, its default is used, so let the default be what was done before.
    """

    recipe: str = setting(
        "article",
        "article: DCGAN as articles and tutorials train it; "
        f"tuned: the best digits, with {flags_of_recipe('tuned')}; "
        f"quick: readable digits in two epochs, with {flags_of_recipe('quick')}; "
        "other flags override a recipe",
        choices=tuple(RECIPES),
    )
    batch_size: int = setting(50, "digits in a training step", low=1, high=60_000)
    # lr and beta1 are those of the paper, whose authors saw training oscillate with beta1 = 0.9
    lr: float = setting(0.0002, "learning rate of both networks", low=1e-8, high=1.0)
    beta1: float = setting(0.5, "Adam's decay rate of the mean gradient", low=0.0, high=0.9999)
    beta2: float = setting(
        0.999, "Adam's decay rate of the mean squared gradient", low=0.0, high=0.999999
    )
    generator_steps: int = setting(
        1, "updates of the generator in a training step, each on its own noise", low=1, high=10
    )
    ema: float = setting(
        0.05,
        "draw with the generator's weights averaged over the latest steps; X is their share of all "
        "steps so far; 0: no average",
        low=0.0,
        high=0.5,
    )
    width: int = setting(
        WIDTH,
        "channels of the layers next to the image; the others have 2 and 4 times as many",
        low=1,
        high=1024,
    )
    latent_dim: int = setting(
        LATENT_DIM, "numbers of noise that make one digit", low=2, high=10_000
    )
    seed: int = setting(
        0, "random seed of the run, or of the noise from which to draw", low=0, high=2**32 - 1
    )
    split: str = setting(
        "test",
        "MNIST's 10,000 test digits or 60,000 training digits, or a split of your own files in "
        "MNIST's format",
        choices=("test", "train"),
    )
    # the flags of these two are in add_hardware_flags and add_run_flags
    precision: str = "fp32"  # of the layers' arithmetic, or "bf16"; weights are always in fp32
    dry_run: bool = False  # only three steps an epoch


def new_generator(settings: Settings) -> Generator:
    """Return an untrained generator: a run trains it; a file's weights are loaded into it."""
    return Generator(settings.latent_dim, settings.width)


# ============================================= data =============================================
def to_images(digits: Tensor) -> Tensor:
    """Scale digits (n, 28, 28) of uint8 to images (n, 1, 28, 28) in [-1, 1]."""
    return digits.unsqueeze(1).float() / 127.5 - 1


# Every use of random numbers has a stream of its own, which begins anew from the run's seed, so
# that none depends on what came before it.
FIRST_WEIGHTS = 0
FIXED_NOISE = 1  # the noise of the sample pictures, the same after every epoch
DRAWING = 2  # the noise of scores and of all that a trained generator draws
NORM_STATISTICS = 3  # the noise from which the averaged generator takes BatchNorm's statistics
ORDER = 4  # the order of the digits in an epoch
NOISE = 5  # the noise of the steps of an epoch
LAYERS = 6  # what layers such as dropout draw in an epoch


def stream_seed(seed: int, use: int, epoch: int = 0) -> int:
    """Return the seed of the stream for a use named above, and for an epoch if each has its own.

    numpy mixes the three: on a CPU, torch takes only the last 32 bits of a seed.
    """
    return int(np.random.SeedSequence((seed, use, epoch)).generate_state(1, np.uint64)[0])


def random_stream(
    seed: int, use: int, epoch: int = 0, device: str | torch.device = "cpu"
) -> torch.Generator:
    """Return a torch.Generator at the start of the stream for a use."""
    return torch.Generator(device).manual_seed(stream_seed(seed, use, epoch))


def sample_noise(count: int, latent_dim: int, stream: torch.Generator) -> Tensor:
    """Return noise (count, latent_dim, 1, 1) from N(0, 1), on the device of a stream."""
    return torch.randn(count, latent_dim, 1, 1, generator=stream, device=stream.device)


def make_noise(count: int, latent_dim: int, seed: int, use: int) -> Tensor:
    """Return noise (count, latent_dim, 1, 1), made on the CPU so that it is the same everywhere."""
    return sample_noise(count, latent_dim, random_stream(seed, use))


def order_of_epoch(digits: Tensor, seed: int, epoch: int) -> Tensor:
    """Return the indices (n,) of digits (n, 28, 28) as an epoch sees them, on their device."""
    order = torch.randperm(len(digits), generator=random_stream(seed, ORDER, epoch))
    return order.to(digits.device)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """In a with block, seed torch's default generators of the CPU and of a device.

    All layers take these: for their first weights, or at every call, as dropout does.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU too
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        if device.type != "cpu":
            accelerator = torch.get_device_module(device)
            stack.callback(accelerator.set_rng_state, accelerator.get_rng_state())
            accelerator.manual_seed(seed)
        yield


# ====================================== one training step =======================================
def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return a context in which layers compute in "fp32" or "bf16"; their weights stay in fp32.

    It keeps no weights that it has cast: optimisers change the weights, and the gradients of two
    calls would be added up in bf16.
    """
    enabled = precision == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled, cache_enabled=False)


def place(network: nn.Module, device: torch.device) -> nn.Module:
    """Move a network to a device, in the fastest memory layout that gives right results there."""
    if device.type in ("cpu", "cuda"):
        return network.to(device=device, memory_format=torch.channels_last)
    return network.to(device=device)  # on mps, BatchNorm's gradients are wrong in channels_last


def load_state(part: nn.Module | torch.optim.Optimizer, state: dict) -> None:
    """Load a network or an optimiser, also if it comes from a device with another memory layout.

    Fused optimisers give wrong weights unless all that they keep lies in memory as the weights do.
    """
    part.load_state_dict(state)
    if isinstance(part, torch.optim.Optimizer):
        for weight, kept in part.state.items():
            for name, value in kept.items():
                if torch.is_tensor(value) and value.shape == weight.shape:
                    kept[name] = torch.empty_like(weight).copy_(value)


class DCGAN:
    """Both networks and their optimisers, and the averaged generator, which draws all digits."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        with seeded(stream_seed(settings.seed, FIRST_WEIGHTS), torch.device("cpu")):
            self.generator = new_generator(settings).apply(weights_init)
            self.discriminator = Discriminator(settings.width).apply(weights_init)
        place(self.generator, device)
        place(self.discriminator, device)
        self.average = copy.deepcopy(self.generator).eval().requires_grad_(False)
        adam = functools.partial(
            torch.optim.Adam,
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            fused=True,  # the fastest implementation
        )
        self.optimizer_g = adam(self.generator.parameters())
        self.optimizer_d = adam(self.discriminator.parameters())
        self.settings = settings
        self.device = device
        self.epoch = 0  # epochs done
        self.steps = 0  # steps done in all epochs

    def autocast(self) -> torch.autocast:
        """Return a context in which layers compute in the run's precision."""
        return autocast(self.device, self.settings.precision)

    def update_average(self, steps: int) -> None:
        """Bring the average of the generator's weights up to date after so many steps in all.

        It is an exponential moving average that spans more steps the longer the run is: early
        weights, which draw badly, are soon forgotten; late ones, which waver, are averaged.
        """
        span = max(self.settings.ema * steps, 1)  # with 1 it equals the generator
        move_average = get_ema_multi_avg_fn(decay=1 - 1 / span)
        move_average(list(self.average.parameters()), list(self.generator.parameters()), None)

    def fit_norm_statistics(self) -> None:
        """Give the averaged generator's BatchNorm layers the statistics of its own weights.

        The generator's statistics belong to other weights. All other buffers, such as those of
        spectral_norm, start as copies of the generator's.
        """
        for buffer, source in zip(self.average.buffers(), self.generator.buffers(), strict=True):
            buffer.copy_(source)
        z = make_noise(FITTED, self.settings.latent_dim, self.settings.seed, NORM_STATISTICS)
        with self.autocast():
            update_bn(z.split(100), self.average, self.device)

    def parts(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        """Return all that training changes, by the names under which a checkpoint keeps it."""
        return {
            "generator": self.generator,
            "discriminator": self.discriminator,
            "average": self.average,
            "optimizer_g": self.optimizer_g,
            "optimizer_d": self.optimizer_d,
        }

    def networks(self) -> list[nn.Module]:
        """Return all networks among the parts."""
        return [part for part in self.parts().values() if isinstance(part, nn.Module)]

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Return all optimisers among the parts."""
        return [part for part in self.parts().values() if isinstance(part, torch.optim.Optimizer)]


# The numbers of a step, in the order in which training_step returns them, and their log line. ds is
# the discriminator, gn the generator; true_out is the mean of D(x), fake_out that of D(G(z)) before
# and after the update of the discriminator.
STATS = ("ds_loss", "gn_loss", "true_out", "fake_out_before", "fake_out_after")
LOG_LINE = (
    "({step}/{steps}) ds_loss: {ds_loss:.3f} - gn_loss: {gn_loss:.3f} - true_out: {true_out:.3f}"
    " - fake_out: {fake_out_before:.3f}>>{fake_out_after:.3f}"
)


# The loss of both networks, binary cross-entropy. On logits it has a gradient however sure the
# discriminator is.
bce = nn.functional.binary_cross_entropy_with_logits


def training_step(gan: DCGAN, real: Tensor, z: Tensor) -> Tensor:
    """Update both networks on images (n, 1, 28, 28) in [-1, 1] and noise; return the STATS (5,).

    ``z`` is the noise (n * generator_steps, latent_dim, 1, 1) for all updates of the generator. The
    STATS are those of the first one.

    After Algorithm 1 of Goodfellow et al. (2014), arXiv:1406.2661, with its non-saturating loss.
    The generator's first update takes the noise that the discriminator has learnt from.

    If you change this function, keep to this contract. On a GPU, it is recorded once as a CUDA
    graph and then replayed, so compute only tensors from tensors on one device: no ``.item()``, no
    printing, no Python number that changes from step to step. (``--graph off`` calls it directly.)
    Do not change ``real`` or ``z``. Take random numbers, as dropout does, from torch's default
    generators, which each epoch seeds; those of numpy are not seeded. A graph reads only ``real``,
    ``z`` and the same tensors as when it was recorded. A resumed run has only what is in
    ``DCGAN.parts``, ``gan.epoch`` and ``gan.steps``.
    """
    noises = z.split(len(real))  # one (n, latent_dim, 1, 1) for each update of the generator
    with gan.autocast():
        fake = gan.generator(noises[0])  # (n, 1, 28, 28) in [-1, 1]

    # (1) The discriminator: maximise log D(x) + log(1 - D(G(z))), the negative of its loss.
    gan.optimizer_d.zero_grad()
    with gan.autocast():
        on_real = gan.discriminator.logits(real)  # (n,)
        on_fake = gan.discriminator.logits(fake.detach())  # no gradient for the generator
    ds_loss = bce(on_real, torch.ones_like(on_real)) + bce(on_fake, torch.zeros_like(on_fake))
    ds_loss.backward()
    gan.optimizer_d.step()

    # (2) The generator: maximise log D(G(z)), the negative of its loss, against the updated
    # discriminator.
    on_fake_after, gn_loss = update_generator(gan, fake)
    for noise in noises[1:]:
        with gan.autocast():
            fake = gan.generator(noise)
        update_generator(gan, fake)

    outputs = [logits.sigmoid().mean() for logits in (on_real, on_fake, on_fake_after)]
    return torch.stack([ds_loss, gn_loss, *outputs]).detach()


def update_generator(gan: DCGAN, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Let the generator learn from images (n, 1, 28, 28) that it has made.

    Return the discriminator's logits (n,) for them and the loss, both from before the update.
    """
    gan.optimizer_g.zero_grad()
    with gan.autocast():
        on_fake = gan.discriminator.logits(fake)  # (n,)
    loss = bce(on_fake, torch.ones_like(on_fake))
    # The gradient passes through the discriminator, but none is computed for its weights, nor for
    # those of any network that is not among the inputs.
    loss.backward(inputs=[weight for weight in gan.generator.parameters() if weight.requires_grad])
    gan.optimizer_g.step()
    return on_fake, loss


@torch.no_grad()
def draw(generator: nn.Module, z: Tensor, precision: str = "fp32") -> Tensor:
    """Draw digits from noise (n, latent_dim, 1, 1): uint8 (n, 28, 28) on the CPU, 0 is black.

    The same noise gives the same digits, also if the generator has random layers.
    """
    device = next(generator.parameters()).device
    digits = []
    with seeded(0, device):
        for part in z.split(100):  # a few at a time, for little memory
            with autocast(device, precision):
                images = generator(part.to(device)).squeeze(1)  # in [-1, 1], if it ends with Tanh
            digits.append(((images + 1) * 127.5).round().clamp(0, 255).byte().cpu())
    return torch.cat(digits)


# =========================================== training ===========================================
class Failure(Exception):  # noqa: N818 (not an error in the program)
    """Something outside the program went wrong, such as a full disk. The user gets the message."""


class WrongInput(Failure):
    """Something that the user got wrong, such as a flag."""


# training_step for one DCGAN: (real, z) -> STATS, which the next step may overwrite
Step = Callable[[Tensor, Tensor], Tensor]


def train_epochs(
    gan: DCGAN, step: Step, digits: Tensor, epochs: int, log_every: int
) -> Iterator[Tensor]:
    """Train until ``epochs`` are done; after each, yield the STATS of its steps (steps, 5).

    ``digits`` (n, 28, 28) of uint8 are on the device. At each yield, ``gan`` is complete: it can be
    scored, saved and drawn with. Raises Failure if training diverges.
    """
    settings = gan.settings
    while gan.epoch < epochs:
        epoch = gan.epoch + 1
        title = f"Epoch {epoch}/{epochs}"
        print(title)
        # every digit once, in a new order; all are in one tensor, so that no DataLoader is needed
        batches = order_of_epoch(digits, settings.seed, epoch).split(settings.batch_size)
        if settings.dry_run:
            batches = batches[:3]
        stats = torch.zeros(len(batches), len(STATS), device=gan.device)
        stream = random_stream(settings.seed, NOISE, epoch, gan.device)
        with (
            seeded(stream_seed(settings.seed, LAYERS, epoch), gan.device),
            progress_bar(batches, desc=title, unit="step") as progress,
        ):
            for i, batch in enumerate(progress):
                real = to_images(digits[batch])  # (n, 1, 28, 28) in [-1, 1]
                count = settings.generator_steps * len(real)
                z = sample_noise(count, settings.latent_dim, stream)
                stats[i] = step(real, z)
                gan.steps += 1
                gan.update_average(gan.steps)
                if i % log_every == 0:  # within an epoch, the CPU waits for a GPU only here
                    check_finite(gan, stats[: i + 1], title)
                    values = dict(zip(STATS, stats[i].tolist(), strict=True))
                    tqdm.write(LOG_LINE.format(step=i + 1, steps=len(batches), **values))
            check_finite(gan, stats, title)
            gan.fit_norm_statistics()
        gan.epoch = epoch
        yield stats


def progress_bar(items: Sequence | None = None, **options: object) -> tqdm:
    """Return a tqdm bar over items, shown on a terminal or in a notebook, but not in a log file."""
    if type(sys.stdout).__module__ == "ipykernel.iostream":
        # A notebook is not a terminal but can show a bar. Bar and log share one stream, because a
        # notebook would show two streams one after the other, with pieces of the bar between them.
        return tqdm(items, leave=False, file=sys.stdout, **options)
    return tqdm(items, leave=False, disable=None, **options)  # None: unless it is no terminal


def check_finite(gan: DCGAN, stats: Tensor, title: str) -> None:
    """Raise Failure if a number of the steps so far, (steps, 5), or a weight is not finite."""
    finite = stats.isfinite().all(dim=1)
    weights = [*gan.generator.parameters(), *gan.discriminator.parameters()]
    finite[-1] &= nn.utils.get_total_norm(weights).isfinite()
    if not finite.all():
        step = finite.tolist().index(False) + 1
        raise Failure(f"training diverged at step {step} of {title}; start again with a lower --lr")


# =========================================== dataset ============================================
Errors = type[Exception] | tuple[type[Exception], ...]


def of_machine(error: BaseException) -> bool:
    """Tell whether an error says that memory is used up or that a GPU is lost."""
    if "device-side assert" in str(error):  # a fault in the program, such as an index out of range
        return False
    if isinstance(error, (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)):
        return True
    # "CUBLAS_STATUS_ALLOC_FAILED", or a sentence with these words
    is_full = "_ALLOC" in str(error) or ("memory" in str(error) and "alloc" in str(error))
    return isinstance(error, RuntimeError) and is_full


@contextmanager
def explained(
    what: str, errors: Errors, advice: str = "", failure: type[Exception] = Failure
) -> Iterator[None]:
    """Turn errors into a Failure that says what failed, why, and what to do.

    Errors of the machine stay as they are: a file is not damaged because memory is used up.
    """
    try:
        yield
    except errors as error:
        if isinstance(error, Failure) or of_machine(error):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        message = f"{what} ({textwrap.shorten(reason, 200)})"
        raise failure(f"{message}; {advice}" if advice else message) from error


@contextmanager
def without_warnings() -> Iterator[None]:
    """Suppress what libraries warn of when they read a file, such as that it is large."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Unusable(Failure):
    """A file or folder that holds no pictures of the kind that is wanted; the message says why."""


ACCEPTED = (
    "--data-dir takes a folder of pictures (PNG, JPEG ...), or 28 x 28 pixels of uint8 in MNIST's "
    "format or in an .npy file; README.md says more"
)
MNIST_NAMES = {"train": "train-images", "test": "t10k-images"}
IDX_PICTURES = bytes([0, 0, 8, 3])  # how MNIST's format, IDX, begins: uint8 in three dimensions
GZIP = b"\x1f\x8b"  # how a gzipped file begins
IDX_TYPES = {8: "uint8", 9: "int8", 11: "int16", 12: "int32", 13: "float32", 14: "float64"}
NPY = b"\x93NUMPY"  # how an .npy file begins
SILENCE = 30  # seconds for which a server may send nothing
SPLIT_OF_DIGITS = {  # MNIST's splits by sha256_of all their digits
    "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757": "train",
    "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161": "test",
}


def sha256_of(digits: Tensor) -> str:
    """Return the check sum that tells digits (n, 28, 28) of uint8 from others, in hexadecimal."""
    return hashlib.sha256(digits.contiguous().numpy()).hexdigest()


def load_pictures(
    data_dir: Path | None, split: str, split_given: bool = False
) -> tuple[Tensor, Path, int]:
    """Return the pictures to train on, their file or folder, and how many other files it holds.

    The pictures are (n, 28, 28) of uint8. Without ``data_dir``, read MNIST beside the program, and
    download it if it is missing. ``split_given``: whether the user has named the split, which only
    files in MNIST's format have. Raises WrongInput, or Failure if the program's own files are
    damaged.
    """
    if data_dir is None and not any(BUNDLED.rglob(f"{MNIST_NAMES[split]}*")):
        download_mnist()
    try:
        return read_pictures(data_dir or BUNDLED, split, split_given)
    except Failure as error:
        if data_dir is None:
            raise Failure(f"{error}; git checkout MNIST restores the program's files") from error
        advice = f"; {ACCEPTED}" if isinstance(error, Unusable) else ""
        raise WrongInput(f"argument --data-dir: {error}{advice}") from error


def bundled_digits(split: str) -> Tensor:
    """Return MNIST's digits (n, 28, 28) of uint8. Raises Failure if others are in their place."""
    digits = load_pictures(None, split)[0]
    if SPLIT_OF_DIGITS.get(sha256_of(digits)) != split:
        raise Failure(f"the digits in {BUNDLED} are not MNIST's {split} split; scoring needs them")
    return digits


def read_pictures(path: Path, split: str, split_given: bool) -> tuple[Tensor, Path, int]:
    """Read what a file or folder holds, whichever of the accepted kinds it is. Raises Failure."""
    try:
        is_folder = path.is_dir()
        if not is_folder and not path.is_file():
            raise Unusable(f"there is no regular file or folder {path}")
        files = files_below(path) if is_folder else [path]
        begins = {file: first_bytes(file) for file in files if file.is_file()}
    except OSError as error:
        raise Unusable(f"cannot read {error.filename or path} ({error.strerror})") from error
    in_idx = [file for file in begins if begins[file].startswith(IDX_PICTURES)]
    formats = Image.registered_extensions()  # by the endings of names
    endings = {ending for ending, format in formats.items() if format in Image.OPEN}
    pictures = [file for file in begins if is_folder and file.suffix.lower() in endings]
    source = path
    others = 0
    if in_idx or (not pictures and GZIP in begins.values()):
        damaged = [file for file in begins if begins[file] == GZIP]
        digits, source = read_split(files, in_idx + damaged, split)
        if pictures:
            left = f"{path} holds a file in MNIST's format, so other pictures there are not read"
            print(f"{left}: {len(pictures):,}")
    elif not pictures and begins.get(path) != NPY:
        raise Unusable(f"there are no pictures in {path}: found {listing(begins)}")
    elif split_given:
        raise WrongInput(f"{path} has no splits; leave out --split")
    elif pictures:
        digits = read_folder(pictures)
        others = len(files) - len(pictures)
    else:
        digits = checked(read_array(path), path)
    check_white(digits, path)
    pixels = digits.flatten(1)
    blank = (pixels.amin(dim=1) == pixels.amax(dim=1)).sum().item()
    if blank:
        reason = "perhaps black on transparent"
        print(f"warning: {path} has pictures of a single grey, {reason}: {blank:,}")
    return digits, source, others


def files_below(folder: Path) -> list[Path]:
    """List the files in a folder and below it, sorted by path; none that are hidden.

    Links are followed. Raises OSError for a folder that cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    found = []
    visited = set()
    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(root)
        if real in visited:  # links can lead round in a circle
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted(found)


def open_unpacked(path: Path) -> BinaryIO:
    """Open a file to read it; if it begins like a gzipped one, it is unpacked on the way."""
    with path.open("rb") as file:
        is_gzipped = file.read(2) == GZIP
    return gzip.open(path) if is_gzipped else path.open("rb")


def first_bytes(path: Path) -> bytes:
    """Return the first bytes of a file, unpacked; GZIP if it cannot be unpacked."""
    with open_unpacked(path) as file:
        try:
            return file.read(len(NPY))
        except (gzip.BadGzipFile, EOFError, zlib.error):
            return GZIP


def listing(begins: dict[Path, bytes]) -> str:
    """Name the first three files, and say what their first bytes tell of those in IDX."""
    names = []
    for file, begin in list(begins.items())[:3]:
        name = file.name
        if len(begin) >= 4 and begin[:2] == b"\0\0" and begin[2] in IDX_TYPES:
            name += f" (in MNIST's format, but {IDX_TYPES[begin[2]]}, {begin[3]}-dimensional)"
        names.append(name)
    if len(begins) > 3:
        names.append(f"{len(begins) - 3:,} more")
    return ", ".join(names) or "no files"


def may_hold(file: Path, split: str) -> bool:
    """Tell whether a file of this name can hold a split. One that names no split can."""
    words = re.findall(r"(?<![a-z])(?:train|test|t10k)", file.name.lower())
    splits = {"train" if word == "train" else "test" for word in words}
    return not splits or split in splits


def without_gz(file: Path) -> Path:
    """Return the name that a gzipped file has when it is unpacked."""
    return file.with_suffix("") if file.suffix == ".gz" else file


def read_split(files: list[Path], in_idx: list[Path], split: str) -> tuple[Tensor, Path]:
    """Read the one file in MNIST's format that holds a split, among all the files of a folder.

    Files with the same pictures count as one. Raises Unusable if it is damaged, and WrongInput if
    there is none or if there are several.
    """
    wanted = {without_gz(file) for file in in_idx if may_hold(file, split)}
    if not wanted:
        other = "test" if split == "train" else "train"
        held = f"{in_idx[0]} holds the {other} split"
        raise WrongInput(f"{held}; to train on it, add --split {other}")
    sound: dict[Path, Tensor] = {}
    damaged: dict[Path, Unusable] = {}
    for file in files:
        if without_gz(file) not in wanted:
            continue
        try:
            with explained(f"{file} cannot be read or is damaged", Exception, failure=Unusable):
                sound[file] = checked(read_idx(file), file)
        except Unusable as error:
            damaged[file] = error
    for file in sound:
        twins = [twin for twin in damaged if without_gz(twin) == without_gz(file)]
        for twin in twins:
            del damaged[twin]
            print(f"warning: {twin} holds no sound pictures; {file} is read instead")
    if not sound:
        raise next(iter(damaged.values()))
    source, digits = next(iter(sound.items()))
    if damaged or not all(torch.equal(digits, others) for others in sound.values()):
        names = [str(file) for file in sound]
        names += [f"{file} (damaged, or not 28 x 28)" for file in damaged]
        several = f"each of these may hold the {split} split: {', '.join(names)}"
        raise WrongInput(f"{several}; name the file itself")
    return digits, source


def read_idx(path: Path) -> Tensor:
    """Read a file of uint8 in MNIST's format, IDX. Raises whatever gzip or numpy find wrong."""
    with open_unpacked(path) as file:
        content = file.read()
    zero, kind, dimensions = struct.unpack_from(">HBB", content)
    if (zero, kind) != (0, 8):
        raise ValueError("it is not an IDX file of uint8")
    shape = struct.unpack_from(f">{dimensions}I", content, offset=4)
    values = np.frombuffer(bytearray(content), np.uint8, offset=4 + 4 * dimensions)
    return torch.from_numpy(values.reshape(shape))


def read_array(path: Path) -> Tensor:
    """Read the array in an .npy file, or the only one in an .npz file. Raises Unusable."""
    with (
        explained(f"cannot read {path}", Exception, failure=Unusable),  # whatever numpy raises
        without_warnings(),
        open_unpacked(path) as file,
    ):
        is_array = file.read(len(NPY)) == NPY
        if not is_array and not zipfile.is_zipfile(file):
            raise ValueError("it is neither an .npy file nor an .npz file")
        file.seek(0)
        loaded = np.load(file, allow_pickle=False)
        if not is_array:
            if len(loaded.files) != 1:
                raise ValueError(f"it holds {len(loaded.files)} arrays, not one")
            loaded = loaded[loaded.files[0]]
        return torch.from_numpy(loaded)


def checked(pictures: Tensor, path: Path) -> Tensor:
    """Return pictures as they are if they are of uint8 (n, 28, 28). Raises Unusable if not."""
    shape = tuple(pictures.shape)
    if pictures.dtype != torch.uint8 or shape[1:] != (28, 28) or len(pictures) == 0:
        kind = str(pictures.dtype).removeprefix("torch.")
        raise Unusable(f"{path} holds {kind} of shape {shape}, not uint8 of shape (n, 28, 28)")
    return pictures


def check_white(digits: Tensor, path: Path) -> None:
    """Raise Unusable if values are those of 0 and 1 instead of 0 and 255."""
    if digits.max() <= 1:
        raise Unusable(f"{path} is almost black: no value is above 1, and white is 255")


def read_folder(paths: list[Path]) -> Tensor:
    """Read files that each hold a picture: (n, 28, 28) of uint8. Raises WrongInput."""
    digits = torch.empty(len(paths), 28, 28, dtype=torch.uint8)
    several = 0
    shown = progress_bar(paths, desc="reading", unit="picture") if len(paths) >= 2000 else paths
    for i, path in enumerate(shown):
        what = f"cannot read the picture {path}"
        advice = "remove it, or save it anew"
        # Exception: whatever Pillow finds wrong with it
        with (
            explained(what, Exception, advice, WrongInput),
            without_warnings(),
            Image.open(path) as picture,
        ):
            several += getattr(picture, "is_animated", False)
            digits[i] = torch.from_numpy(np.array(as_digit(picture)))
    if several:
        what = "files with more than one picture, of which the first is taken"
        print(f"warning: {what}: {several:,}")
    return digits


def as_digit(picture: Image.Image) -> Image.Image:
    """Return the centre of a picture, upright, in grey, 28 pixels wide and high, in mode L.

    What is transparent becomes black.
    """
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith(("I", "F")):  # more than 8 bits
        levels = np.asarray(picture)
        may_be_8_bits = picture.mode == "I" and 0 < levels.max() < 256
        if picture.mode == "F" or may_be_8_bits or levels.min() < 0 or levels.max() > 65535:
            raise ValueError("its greys are neither of 8 bits nor of 16 bits")
        levels = np.where(levels == picture.info.get("transparency"), 0, levels)
        picture = Image.fromarray((levels / 257).round().astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture)
    return ImageOps.fit(picture.convert("L"), (28, 28))


def download_mnist() -> None:
    """Download the files of MNIST, gzipped, to where they lie beside the program. Raises Failure.

    A server that is silent for SILENCE is given up.
    """
    print(f"MNIST is not in {BUNDLED}: downloading it", flush=True)
    advice = f"place its files in {BUNDLED}, or name pictures by --data-dir"
    # Exception: whatever a network can cause, or a torchvision that does not fit to torch
    with explained("cannot download MNIST", Exception, advice), ExitStack() as stack:
        from torchvision.datasets import MNIST  # here and not above, for it takes a while

        temporary = stack.enter_context(TemporaryDirectory(prefix=".mnist_", dir=HOME))
        stack.callback(socket.setdefaulttimeout, socket.getdefaulttimeout())
        socket.setdefaulttimeout(SILENCE)
        MNIST(temporary, download=True)
        BUNDLED.mkdir(exist_ok=True)
        for path in Path(temporary).rglob("*.gz"):
            if not (BUNDLED / path.name).exists():
                path.rename(BUNDLED / path.name)


# ============================================ speed =============================================
def started_by_torchrun() -> bool:
    """Tell whether this is one of the processes that torchrun starts."""
    return dist.is_available() and dist.is_torchelastic_launched()


def process_rank() -> int:
    """Return the number of this process; the first one, 0, reads, writes and prints for all."""
    return int(os.environ.get("RANK", 0)) if started_by_torchrun() else 0


def pick_device(name: str) -> torch.device:
    """Return the device to compute on. Raises WrongInput if it is not there or does not work."""
    there = {
        "cuda": torch.cuda.is_available(),
        # gloo, by which processes share gradients, cannot take those on mps
        "mps": torch.backends.mps.is_available() and not started_by_torchrun(),
        "cpu": True,
    }
    kind = next(device for device in there if there[device]) if name == "auto" else name
    if not there[kind]:
        missing = f"this machine has no {kind}, or it cannot be used here"
        raise WrongInput(f"argument --device: {missing}; cpu always works")
    device = torch.device(kind)
    if kind == "cuda":
        number = int(os.environ.get("LOCAL_RANK", 0)) if started_by_torchrun() else 0
        if number >= torch.cuda.device_count():
            # not a Failure: only the first process prints a Failure
            raise OSError(f"there is no GPU number {number}: start fewer processes")
        device = torch.device(kind, number)
    try:
        torch.ones(1, device=device).add(1).item()
    except (RuntimeError, torch.cuda.DeferredCudaCallError) as error:
        fault = f"cannot compute on {device} ({textwrap.shorten(str(error), 200)})"
        if started_by_torchrun():
            raise OSError(fault) from error  # not a Failure, as above
        if name != "auto":
            advice = "pytorch.org has PyTorch for other GPUs; cpu always works"
            raise WrongInput(f"argument --device: {fault}; {advice}") from error
        print(f"warning: {fault}; computing on cpu instead")
        device = torch.device("cpu")
    return device


def has_bf16(device: torch.device) -> bool:
    """Tell whether a device computes in bf16 at least as fast as in fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return False


@contextmanager
def full_fp32() -> Iterator[None]:
    """In a with block, let convolutions and products of tensors in fp32 compute in fp32.

    On recent GPUs, PyTorch otherwise takes TF32 for convolutions, which keeps 10 bits of 23.
    """
    with ExitStack() as stack:
        for library in (torch.backends.cudnn, torch.backends.mkldnn):
            switch(stack, library.conv, "fp32_precision", "ieee")
        for library in (torch.backends.cuda, torch.backends.mkldnn):
            switch(stack, library.matmul, "fp32_precision", "ieee")
        yield


def switch(stack: ExitStack, owner: object, name: str, value: object) -> None:
    """Set an attribute until a stack ends."""
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


@contextmanager
def computing_on(device: torch.device) -> Iterator[None]:
    """Compute the same every time; on a GPU, on a stream on which graphs can be recorded."""
    with full_fp32(), ExitStack() as stack:
        switch(stack, torch.backends.cudnn, "deterministic", True)
        switch(stack, torch.backends.cudnn, "benchmark", False)
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
            stack.enter_context(torch.cuda.stream(torch.cuda.Stream()))
        yield


# On CPUs, a convolution without padding is faster as one product of two matrices: its weights and
# the patches of the image that its kernel sees, a row for each. The transposed convolution is the
# same backwards: the product gives patches, which are added up to an image. Selecting and adding by
# index are each other's derivative. Both are done in fp32 at least: sums in bf16 are not exact.
def pixels_of_patches(layer: nn.Conv2d | nn.ConvTranspose2d, height: int, width: int) -> Tensor:
    """Return where the pixels of a layer's patches lie in an image, counted row by row.

    The shape is (rows, columns, kernel height, kernel width): there is a patch in each row and
    column.
    """
    pixels = torch.arange(height * width).view(height, width)
    pixels = pixels.unfold(0, layer.kernel_size[0], layer.stride[0])
    return pixels.unfold(1, layer.kernel_size[1], layer.stride[1])


def at_least_fp32(values: Tensor) -> Tensor:
    """Return values in fp32, or as they are if they are more exact."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


class ProductConv2d(nn.Conv2d):
    """Conv2d as a product: (n, c, h, w) -> (n, filters, rows, columns)."""

    def forward(self, images: Tensor) -> Tensor:
        pixels = pixels_of_patches(self, *images.shape[2:])
        flat = at_least_fp32(images).permute(0, 2, 3, 1).flatten(1, 2)  # (n, h * w, c)
        patches = flat.index_select(1, pixels.flatten()).unflatten(1, pixels.shape).flatten(3)
        weights = self.weight.permute(0, 2, 3, 1).flatten(1)  # (filters, kernel * kernel * c)
        results = nn.functional.linear(patches, weights, self.bias)
        return results.permute(0, 3, 1, 2)


class ProductConvTranspose2d(nn.ConvTranspose2d):
    """ConvTranspose2d as a product: (n, c, rows, columns) -> (n, filters, h, w)."""

    def forward(self, images: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        if output_size is not None:
            return super().forward(images, output_size)
        height = (images.shape[2] - 1) * self.stride[0] + self.kernel_size[0]
        width = (images.shape[3] - 1) * self.stride[1] + self.kernel_size[1]
        pixels = pixels_of_patches(self, height, width)
        weights = self.weight.permute(0, 2, 3, 1).flatten(1)  # (c, kernel * kernel * filters)
        patches = images.permute(0, 2, 3, 1) @ weights  # (n, rows, columns, as weights)
        rows = at_least_fp32(patches).view(len(images), pixels.numel(), self.out_channels)
        flat = rows.new_zeros(len(images), height * width, self.out_channels)
        results = flat.index_add(1, pixels.flatten(), rows).to(patches.dtype)
        if self.bias is not None:
            results = results + self.bias.to(results.dtype)
        return results.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def use_products(network: nn.Module) -> None:
    """Let a network's convolutions compute as products, where a product gives the same result.

    A layer stays the object that it is, with its weights and hooks; only its class changes.
    """
    products = {nn.Conv2d: ProductConv2d, nn.ConvTranspose2d: ProductConvTranspose2d}
    for layer in network.modules():
        product = products.get(type(layer))  # no subclass, which may compute something else
        if product is None:
            continue
        plain = (layer.padding, layer.output_padding, layer.dilation) == ((0, 0), (0, 0), (1, 1))
        if plain and layer.groups == 1:
            layer.__class__ = product


class GraphedStep:
    """training_step on a GPU, replayed from a CUDA graph: one launch instead of hundreds."""

    def __init__(self, gan: DCGAN) -> None:
        self.gan = gan
        self.replay: Step | None = None  # full batches only: a graph has fixed shapes
        # an optimiser creates its state in its first step
        self.have_begun = all(optimizer.state for optimizer in gan.optimizers())

    def __call__(self, real: Tensor, z: Tensor) -> Tensor:
        if len(real) < self.gan.settings.batch_size or not self.have_begun:
            self.have_begun = True
            return training_step(self.gan, real, z)
        if self.replay is None:
            self.warm_up(real, z)
            self.replay = self.record(real.clone(), z.clone())
        return self.replay(real, z)

    def warm_up(self, real: Tensor, z: Tensor) -> None:
        """Take steps until all that a step needs is allocated; put back what they change."""
        optimizers = self.gan.optimizers()
        states = [state for optimizer in optimizers for state in optimizer.state.values()]
        tensors = [value for state in states for value in state.values() if torch.is_tensor(value)]
        for network in self.gan.networks():
            tensors += [*network.parameters(), *network.buffers()]
        before = [(tensor, tensor.clone()) for tensor in tensors]
        with torch.random.fork_rng([self.gan.device]):
            for _ in range(3):
                training_step(self.gan, real, z)
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)

    def record(self, graph_real: Tensor, graph_z: Tensor) -> Step:
        """Record a step on these tensors; return what copies a batch there and takes the step.

        If recording fails, return the plain step, which shows any error of its own.
        """
        try:
            graph = torch.cuda.CUDAGraph()
            stream = torch.cuda.current_stream()
            with self.capturable(), torch.cuda.graph(graph, stream=stream):
                stats = training_step(self.gan, graph_real, graph_z)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            reason = str(error).split("\n")[0]
            print(f"warning: no CUDA graph, so steps take longer: {reason}")
            return functools.partial(training_step, self.gan)

        def replay(real: Tensor, z: Tensor) -> Tensor:
            graph_real.copy_(real)
            graph_z.copy_(z)
            graph.replay()
            return stats  # which the next replay overwrites

        return replay

    @contextmanager
    def capturable(self) -> Iterator[None]:
        """In a with block, let optimisers such as Adam be recorded; elsewhere they warn of it."""
        groups = [group for optimizer in self.gan.optimizers() for group in optimizer.param_groups]
        with ExitStack() as stack:
            for group in groups:
                if "capturable" in group:
                    stack.callback(group.__setitem__, "capturable", group["capturable"])
                    group["capturable"] = True
            yield


def loss_explained(errors: Errors) -> AbstractContextManager[None]:
    """Return a context in which these errors mean that another process has ended."""
    return explained("a process of this run has ended", errors, "use --resume to continue")


@contextmanager
def connected(device: torch.device) -> Iterator[None]:
    """In a with block, connect the processes that torchrun has started, if any. Raises Failure."""
    if not started_by_torchrun():
        yield
        return
    what = "the processes of this run cannot connect"
    # nothing but the connection can fail here; not a Failure, for each process prints its own
    with explained(what, (RuntimeError, ValueError), failure=ConnectionError):
        store, rank, count = next(dist.rendezvous("env://", timeout=timedelta(minutes=1)))
        store.set_timeout(timedelta(minutes=30))  # later, the others wait while the first scores
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=count)
    went_well = False
    try:
        with loss_explained(dist.DistError):
            yield
        went_well = True
    finally:
        if went_well or backend == "gloo":  # NCCL would wait for processes that wait for this one
            dist.destroy_process_group()


def from_first_process(value: object) -> Any:
    """Return the first process's value in every process. Raises Failure."""
    values = [value]
    if started_by_torchrun():
        with loss_explained(RuntimeError):  # nothing but the connection can fail here
            dist.broadcast_object_list(values)
    return values[0]


class SharedStep:
    """training_step in several processes at once, each with its share of the batch.

    Gradients and STATS are means over the processes, also of a last batch with unequal shares.
    """

    def __init__(self, gan: DCGAN) -> None:
        self.gan = gan
        for network in gan.networks():
            if network is gan.average:  # it is not trained
                continue
            if gan.device.type == "cuda":  # BatchNorm's statistics are then of the whole batch
                nn.SyncBatchNorm.convert_sync_batchnorm(network)
            for parameter in network.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(
                        lambda p: self.average_over_processes(p.grad)
                    )

    def __call__(self, real: Tensor, z: Tensor) -> Tensor:
        own_z = [self.share(noise) for noise in z.split(len(real))]
        # layers such as dropout draw other numbers in each process
        seed = int(torch.randint(2**62, ())) + dist.get_rank()
        with seeded(seed, self.gan.device):
            stats = training_step(self.gan, self.share(real), torch.cat(own_z))
        self.average_over_processes(stats)
        return stats

    def share(self, batch: Tensor) -> Tensor:
        """Return this process's share of a batch (n, ...)."""
        return batch.tensor_split(dist.get_world_size())[dist.get_rank()]

    def average_over_processes(self, tensor: Tensor) -> None:
        """Replace a tensor by its mean over the processes, in all of them. Raises Failure."""
        with loss_explained(RuntimeError):
            dist.all_reduce(tensor)
        tensor /= dist.get_world_size()


def fastest_step(gan: DCGAN, graph: bool = True) -> Step:
    """Return the fastest training step for this device; on a CPU, layers are prepared for it."""
    if gan.device.type == "cpu":
        use_products(gan.generator)
        use_products(gan.discriminator)
    if started_by_torchrun():
        return SharedStep(gan)
    if gan.device.type == "cuda" and graph:
        return GraphedStep(gan)
    return functools.partial(training_step, gan)


# How far a step may be from the same one in fp32 on a CPU, relative to what is compared. Healthy
# gradients differ by up to 0.01 in fp32, for rounding decides whether a ReLU is just on or off, and
# by up to 0.25 in bf16; a wrong one by about 1. A false alarm is worse than a small fault unseen.
TOLERANCE = {"fp32": 0.05, "bf16": 0.6}


class ComparedStep:
    """A training step that raises Failure if it does not compute what is written.

    Each step is taken once more: in fp32 on the CPU, by the layers as they are, from the same
    weights, digits and noise. The losses, the gradients that optimisers take and the updated
    weights of both networks are compared. The plain optimisers are given the device's gradients,
    for Adam turns small differences of gradients into large ones of weights. ``largest`` is the
    largest relative deviation so far, ``result`` what a dry run prints of it.
    """

    def __init__(self, gan: DCGAN, step: Step) -> None:
        self.gan = gan
        self.step = step
        self.largest = 0.0
        self.result = "0.0e+00 (nothing differs)"
        self.plain = DCGAN(dataclasses.replace(gan.settings, precision="fp32"), torch.device("cpu"))
        self.gradients: list[list[Tensor]] = []  # on the device, of each update of a step
        self.recorded: list[list[Tensor]] = []  # the same in a CUDA graph, which replays refill
        self.deviations: dict[str, float] = {}
        for optimizer in gan.optimizers():
            optimizer.register_step_pre_hook(self.keep_gradients)
        for optimizer in self.plain.optimizers():
            optimizer.register_step_pre_hook(self.compare_gradients)

    def __call__(self, real: Tensor, z: Tensor) -> Tensor:
        self.prepare_plain()
        before = {name: weight.detach().clone() for name, weight in named_weights(self.plain)}
        plain_real = real.cpu().clone()
        plain_z = z.cpu().clone()
        random_numbers = torch.get_rng_state()
        self.gradients.clear()
        stats = self.step(real, z)
        self.gradients = self.gradients or list(self.recorded)
        self.deviations.clear()
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(random_numbers)
            expected = training_step(self.plain, plain_real, plain_z)
            layers_draw = not torch.equal(torch.get_rng_state(), random_numbers)
        for name, value, plain in zip(STATS, stats.cpu(), expected, strict=True):
            if name.endswith("loss"):
                scale = plain.norm() + 0.1  # a loss may be near 0, as a difference of others
                self.compare(name, value, plain, scale)
        weights = dict(named_weights(self.gan))
        for name, plain in named_weights(self.plain):
            update = plain - before[name]
            scale = update.norm() + 1e-3 * plain.norm()  # rounding hides very small updates
            self.compare(f"update of {name}", weights[name].cpu(), plain, scale)
        if layers_draw and self.gan.device.type != "cpu":  # devices have other random numbers
            self.result = "not compared: layers draw random numbers, which differ by device"
        else:
            self.judge()
        return stats

    def prepare_plain(self) -> None:
        """Bring the plain DCGAN to where the other one is, but without gradients."""
        parts = self.gan.parts()
        for name, part in self.plain.parts().items():
            load_state(part, copy.deepcopy(parts[name].state_dict()))
        for plain, network in zip(self.plain.networks(), self.gan.networks(), strict=True):
            for copied, weight in zip(plain.parameters(), network.parameters(), strict=True):
                copied.requires_grad_(weight.requires_grad)
        for name, value in vars(self.gan).items():
            if isinstance(value, (int, float)):  # such as epoch, and what an edit makes of it
                setattr(self.plain, name, value)
            elif torch.is_tensor(value):
                setattr(self.plain, name, value.detach().cpu().clone())
        for optimizer in self.plain.optimizers():
            optimizer.zero_grad()  # so that a step that forgets this differs

    def keep_gradients(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Keep the gradients of an update on the device."""
        gradients = [weight.grad.clone() for weight in with_gradient(optimizer)]
        if self.gan.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self.gradients.clear()  # those of the steps that came before the recording
            self.recorded.append(gradients)
        else:
            self.gradients.append(gradients)

    def compare_gradients(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Compare the gradients of a plain update with those on the device, and take the latter.

        Gradients that are zero but for rounding, such as those of biases before BatchNorm, are left
        out. Deviations of small ones count for less: they are sums of much that cancels out.
        """
        names = {weight: name for name, weight in named_weights(self.plain)}
        weights = with_gradient(optimizer)
        gradients = self.gradients.pop(0) if self.gradients else []
        if [weight.shape for weight in weights] != [gradient.shape for gradient in gradients]:
            raise Failure("the same step, taken again, makes other updates; see training_step")
        largest = max((weight.grad.norm() for weight in weights), default=0.0)
        for weight, gradient in zip(weights, gradients, strict=True):
            plain = weight.grad
            weight.grad = torch.empty_like(weight).copy_(gradient)  # in its own memory layout
            if plain.norm() > 1e-4 * largest:
                scale = plain.norm() + 0.1 * largest
                name = names.get(weight, "another network")
                self.compare(f"gradient of {name}", weight.grad, plain, scale)

    def compare(self, name: str, value: Tensor, plain: Tensor, scale: Tensor) -> None:
        """Keep how far a value of the device is from the plain one, relative to a scale."""
        if not torch.equal(value, plain):
            deviation = ((value - plain).norm() / scale).item()
            self.deviations[name] = max(deviation, self.deviations.get(name, 0.0))

    def judge(self) -> None:
        """Raise Failure if a deviation of this step is too large."""
        precision = self.gan.settings.precision
        where = f"{self.gan.device.type} in {precision}"
        flags = []
        if isinstance(self.step, GraphedStep):
            flags.append("--graph off")
        if precision == "bf16":
            flags.append("--precision fp32")
        if self.gan.device.type != "cpu":
            flags.append("--device cpu")
        advice = f"try {' or '.join(flags)}; " if flags else ""
        advice += "after an edit, see what training_step may do"
        limit = TOLERANCE[precision]
        for name, deviation in self.deviations.items():
            if not deviation <= limit:  # also if it is not a number
                wrong = f"{where} does not compute what is written"
                amount = f"the {name} differs by {deviation:.1e} from that in fp32 on the CPU"
                raise Failure(f"{wrong}: {amount}; {advice}")
            if deviation > self.largest:
                self.largest = deviation
                self.result = f"{deviation:.1e} ({name}); up to {limit} may be rounding"


def named_weights(gan: DCGAN) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters of both networks by their names in a DCGAN."""
    generator = list(gan.generator.named_parameters(prefix="generator"))
    return generator + list(gan.discriminator.named_parameters(prefix="discriminator"))


def with_gradient(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return the weights that an optimiser updates."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    return [weight for weight in weights if weight.grad is not None]


# =========================================== pictures ===========================================
def grid(digits: Tensor, caption: str = "") -> Image.Image:
    """Arrange digits (n, 28, 28) of uint8 ten a row, twice their size, under a caption if any."""
    columns = min(len(digits), 10)
    rows = math.ceil(len(digits) / 10)
    cells = digits.new_zeros(rows * columns, 30, 30)  # with a margin of two pixels above and left
    cells[: len(digits), 2:, 2:] = digits
    joined = cells.view(rows, columns, 30, 30).transpose(1, 2).reshape(rows * 30, columns * 30)
    picture = Image.fromarray(joined.numpy())
    picture = ImageOps.expand(picture, (0, 0, 2, 2))  # the margin on the right and below
    picture = ImageOps.scale(picture, 2, Image.Resampling.NEAREST)
    picture = ImageOps.expand(picture, (0, 32 if caption else 0, 0, 0))
    ImageDraw.Draw(picture).text((6, 16), caption, fill=255, font_size=20, anchor="lm")
    return picture


def stages(samples: Callable[[int], Tensor], epochs: int, real: Tensor) -> list[Image.Image]:
    """Return grids of one size: at most ten epochs, evenly chosen, then real samples.

    ``samples`` of an epoch, 1 to ``epochs``, are digits (n, 28, 28) of uint8, as are the real ones.
    """
    shown = torch.linspace(1, epochs, min(epochs, 10)).round().int().tolist()
    pictures = [grid(samples(epoch), f"epoch {epoch}") for epoch in shown]
    last = grid(real, "real samples").crop((0, 0, *pictures[0].size))  # there may be fewer
    return [*pictures, last]


def stacked(pictures: list[Image.Image]) -> Image.Image:
    """Return pictures of one width as one, each below the one before."""
    return Image.fromarray(np.vstack([np.asarray(picture) for picture in pictures]))


def curves(
    stats: dict[str, Tensor], scores: dict[str, Tensor], steps_of_epochs: list[int]
) -> Image.Image:
    """Plot the STATS of a run, each (steps,), and at the end of each epoch the FD of its scores."""
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = len(stats["ds_loss"])
    group = math.ceil(steps / 400)  # steps to a point, so that curves of any length are clear

    def plot(panel: Any, label: str, names: tuple[str, ...]) -> None:
        for name in names:
            points = [part.mean() for part in stats[name].split(group)]
            panel.plot(range(1, steps + 1, group), points, label=name)
        panel.set(ylabel=label)

    scored = scores["fd"].isfinite().any()
    with style.context("default", after_reset=True):  # whatever a notebook has chosen
        figure = Figure(figsize=(10, 10), layout="constrained")
        panels = figure.subplots(3 if scored else 2, sharex=True)
        plot(panels[0], "cross-entropy", ("ds_loss", "gn_loss"))
        plot(panels[-1], "mean output", ("true_out", "fake_out_before", "fake_out_after"))
        panels[-1].set(xlabel=f"step (mean of {group})", ylim=(0, 1))
        if scored:
            ends = np.cumsum(steps_of_epochs)
            panels[1].plot(ends, scores["fd"], marker=".", label="fd")
            panels[1].set(ylabel="Frechet distance to real digits", yscale="log")
        for panel in panels:
            panel.grid(alpha=0.3, which="both")
            panel.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def nearest(digits: Tensor, real: Tensor) -> Image.Image:
    """Show 20 of the digits (n, 28, 28), each above the real one (m, 28, 28) nearest in pixels."""
    digits = digits[torch.arange(20) % len(digits)]
    distances = torch.cdist(digits.flatten(1).float(), real.flatten(1).float())
    found = real[distances.argmin(dim=1)]
    return grid(torch.cat([digits[:10], found[:10], digits[10:], found[10:]]))


def png(picture: Image.Image) -> bytes:
    """Return a picture as the content of a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=3)  # twice as fast as 6, and hardly larger
    return buffer.getvalue()


def animation(pictures: list[Image.Image]) -> bytes:
    """Return pictures of one size as the content of a GIF file that shows them in turn."""
    first, *others = pictures
    times = [600] * len(others) + [2000]  # milliseconds; the last picture stays longer
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=times, loop=0)
    return buffer.getvalue()


# ============================================ scores ============================================
SCORES = {  # of an epoch, as the log shows them; --evaluate adds three
    "fd": "FD {:.1f}",
    "digits": "digits {:.0f}/10",
    "evenness": "evenness {:.2f}",
    "confident": "confident {:.2f}",
}
SCORER = BUNDLED / "scorer.pt"  # made by MNIST/make_scorer.py
# the scores of another judge could not be compared
SCORER_SHA256 = "d782c3e5e0288462ac378926cc78c83b3790ca0ea3258a17bbd15e39732642f4"
UNSEEN = {"train": "test", "test": "train"}  # what a run on a split is compared with
NEIGHBOURS = 5  # a real digit's neighbourhood reaches to its fifth nearest neighbour


class Classifier(nn.Module):
    """Recognise digits: images (n, 1, 28, 28) in [-1, 1] -> features (n, 64) -> logits (n, 10).

    Distances between features depend little on where in its image a digit lies.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *self.convolution(1, 16),
            nn.AvgPool2d(2),  # (n, 16, 14, 14)
            *self.convolution(16, 32),
            *self.convolution(32, 32),
            nn.AvgPool2d(2),  # (n, 32, 7, 7)
            *self.convolution(32, 64),
            *self.convolution(64, 64),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),  # (n, 64)
        )
        self.head = nn.Linear(64, 10)

    @staticmethod
    def convolution(channels: int, filters: int) -> tuple[nn.Module, ...]:
        """Return the layers of a 3x3 convolution that keeps the size of its input."""
        layer = nn.Conv2d(channels, filters, kernel_size=3, padding=1, bias=False)
        return layer, nn.BatchNorm2d(filters), nn.ReLU(inplace=True)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))

    @torch.no_grad()
    def judge(self, digits: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (n, 64) and probabilities (n, 10) of digits (n, 28, 28) of uint8.

        The features are ten times as large as those of the network, for distances of handy size.
        """
        device = self.head.weight.device
        # not by to_images: if that is edited, scores must stay comparable
        scaled = (part.to(device).unsqueeze(1).float() / 127.5 - 1 for part in digits.split(500))
        with full_fp32(), torch.autocast(device.type, enabled=False):  # the same for everyone
            features = torch.cat([self.features(images) for images in scaled])
            probabilities = self.head(features).softmax(dim=1)
        return 10 * features.cpu(), probabilities.cpu()


def read_scorer() -> dict:
    """Read the classifier and the scores of real digits. Raises Failure if they are not ours."""
    with explained(f"cannot read {SCORER}", OSError):
        content = SCORER.read_bytes()
    if hashlib.sha256(content).hexdigest() != SCORER_SHA256:
        raise Failure(f"{SCORER} is not the included scorer; scores of another cannot be compared")
    return torch.load(io.BytesIO(content), weights_only=True)  # runs no code


def load_classifier(content: dict, device: torch.device) -> Classifier:
    """Return the classifier in what read_scorer returns, ready to judge."""
    with torch.random.fork_rng(devices=[]):  # making layers draws random numbers
        classifier = Classifier()
    classifier.load_state_dict(content["classifier"])
    return classifier.to(device).eval().requires_grad_(False)


class Scorer:
    """Score the digits of a model that was trained on one split of MNIST.

    They are compared with the other split, which the model has not seen. ``floors`` maps some
    numbers of digits to the scores of as many real digits from the split that it has seen. A score
    that was added later has no floor.
    """

    def __init__(self, content: dict, seen: str, device: torch.device) -> None:
        self.classifier = load_classifier(content, device)
        self.unseen = UNSEEN[seen]
        self.reference = content["moments"][self.unseen]
        self.floors = content["floors"][seen]

    def __call__(self, digits: Tensor) -> dict[str, float]:
        """Return the SCORES of digits (n, 28, 28) of uint8 by their names."""
        return self.scores(*self.classifier.judge(digits))

    def scores(self, features: Tensor, probabilities: Tensor) -> dict[str, float]:
        """Return the SCORES of what the classifier makes of digits."""
        shares = probabilities.argmax(dim=1).bincount(minlength=10) / len(probabilities)
        return {
            "fd": frechet_distance(moments(features), self.reference),
            "digits": (shares >= 0.02).sum().item(),
            "evenness": torch.special.entr(shares).sum().item() / math.log(10),
            "confident": (probabilities.amax(dim=1) > 0.9).float().mean().item(),
        }

    def evaluate(self, digits: Tensor, seen: Tensor, unseen: Tensor) -> dict[str, float]:
        """Return the SCORES of digits, and density, coverage and copies.

        These three compare with 10,000 of the digits of each split, ``seen`` and ``unseen``.
        """
        features, probabilities = self.classifier.judge(digits)
        seen_features = self.classifier.judge(some(seen, EVALUATED))[0]
        unseen_features = self.classifier.judge(some(unseen, EVALUATED))[0]
        density, coverage = density_and_coverage(features, unseen_features)
        copies = share_of_copies(features, seen_features, unseen_features)
        scores = self.scores(features, probabilities)
        return {**scores, "density": density, "coverage": coverage, "copies": copies}


def score_line(scores: dict[str, float], floor: dict[str, float]) -> str:
    """Return the log's line of an epoch's SCORES, with the FD of real digits if it is known."""
    parts = {name: form.format(scores[name]) for name, form in SCORES.items()}
    if "fd" in floor:
        parts["fd"] += f" (floor {floor['fd']:.1f})"
    return f"score: {' - '.join(parts.values())}"


def some(digits: Tensor, count: int) -> Tensor:
    """Return ``count`` of the digits (n, ...), chosen at random, but the same ones every time."""
    # the floors in scorer.pt come from these numbers, whatever the streams of a run are
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    return digits[order[:count]]


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean (d,) and covariance (d, d) of features (n, d), in double precision."""
    features = features.double()
    return features.mean(dim=0), features.T.cov()


def frechet_distance(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    """Return the squared Frechet distance of the Gaussians with these moments.

    |mean A - mean B|^2 + tr(A) + tr(B) - 2 tr((A B)^(1/2)) of the covariances A and B (Dowson and
    Landau 1982). The eigenvalues of A B are real; their roots add up to the last trace.
    """
    mean_a, cov_a = a
    mean_b, cov_b = b
    roots = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt()
    traces = cov_a.trace() + cov_b.trace() - 2 * roots.sum()
    distance = (mean_a - mean_b).square().sum() + traces
    return max(distance.item(), 0.0)  # rounding can make it less


def density_and_coverage(drawn: Tensor, real: Tensor) -> tuple[float, float]:
    """Return how good drawn digits are, and how much of the variety of real ones they have.

    ``drawn`` (n, d) and ``real`` (m, d) are features. A real digit's neighbourhood reaches to its
    fifth nearest neighbour among the real ones. Density is the mean number of neighbourhoods that a
    drawn digit lies in, divided by five: about 1 for real digits, more for digits that are all
    alike. Coverage is the share of neighbourhoods with a drawn digit in them. After Naeem et al.
    (2020), arXiv:2002.09797.
    """
    radii = []
    for part in real.split(500):  # a few at a time, for little memory
        distances = torch.cdist(part, real)
        radii.append(distances.kthvalue(NEIGHBOURS + 1).values)  # the nearest is the digit itself
    radii = torch.cat(radii)
    drawn_inside = torch.zeros(len(real))
    for part in drawn.split(500):
        drawn_inside += (torch.cdist(part, real) < radii).sum(dim=0)
    density = drawn_inside.sum() / (NEIGHBOURS * len(drawn))
    coverage = (drawn_inside > 0).float().mean()
    return density.item(), coverage.item()


def share_of_copies(drawn: Tensor, seen: Tensor, unseen: Tensor) -> float:
    """Return the share of drawn digits that are nearer to a seen digit than to any unseen one.

    All are features: ``drawn`` (n, d), and of as many seen digits as unseen ones, both (m, d). The
    share is about 0.5 if nothing is copied, and 1 if all are copies of ``seen``.
    """
    copies = 0
    for part in drawn.split(500):
        nearest_seen = torch.cdist(part, seen).amin(dim=1)
        nearest_unseen = torch.cdist(part, unseen).amin(dim=1)
        copies += (nearest_seen < nearest_unseen).sum().item()
    return copies / len(drawn)


def signs_of_collapse(
    ds_loss: Tensor, scores: dict[str, float], before: dict[str, Tensor]
) -> list[str]:
    """List the signs of a collapse in the losses (steps,) and the scores of an epoch.

    One loss in twenty may be higher than the others. ``before`` has the scores of all earlier
    epochs, each (epochs,); those that were not scored have NaN. Scores are compared with the best
    so far, not with a fixed limit.
    """
    signs = []
    if ds_loss.quantile(0.95) < 0.05:
        signs.append("ds_loss stayed under 0.05")
    scored = before["fd"].isfinite()
    if scored.any():
        most = before["digits"][scored].max().item()
        if scores["digits"] <= most - 3:
            signs.append(f"digits fell from {most:.0f} to {scores['digits']:.0f}")
        if scores["fd"] > 2 * before["fd"][scored].min().item():
            signs.append("FD is more than twice its best")
    return signs


# ============================================ files =============================================
CHECKPOINT = "checkpoint.pt"
BEST = "generator_best.pt"
HISTORY = "history.csv"
TIMELINE = "timeline.png"
GENERATED = "generated.png"
GENERATED_DIGITS = "generated.npy"
INTERPOLATION = "interpolation.png"
SCORE = "score.json"
NEAREST = "nearest.png"
# the version of a checkpoint's layout: add 1 if Run.checkpoint changes, and make EXAMPLE anew
FORMAT = 5
KEPT = ("epochs", "stats", "scores", "packed_samples")  # attributes of a Run, in checkpoints


class Run:
    """A run so far: all that its checkpoint holds and its pictures show."""

    def __init__(self, gan: DCGAN, digits: Tensor, data_dir: Path | None, epochs: int) -> None:
        self.gan = gan
        path = None if data_dir is None else os.path.abspath(data_dir)  # None: the bundled digits
        self.data = {"sha256": sha256_of(digits), "path": path}
        order = order_of_epoch(digits, gan.settings.seed, epoch=1)
        self.real = digits[order[:SAMPLES]]  # those that training sees first
        self.epochs = epochs  # how many it is to have in the end
        self.steps: list[int] = []  # of each epoch
        self.stats = {name: torch.empty(0) for name in STATS}  # of each step (steps,)
        self.scores = {name: torch.empty(0) for name in SCORES}  # of each epoch; NaN: not scored
        self.packed_samples: list[Tensor] = []  # of each epoch, compressed
        self.table_bytes = 0  # length of the table of all these numbers

    @property
    def best_epoch(self) -> int:
        """The first epoch with the lowest FD; 0 if none is scored."""
        fds = self.scores["fd"].numpy()
        return int(np.nanargmin(fds)) + 1 if np.isfinite(fds).any() else 0

    def draw(self, count: int, use: int) -> Tensor:
        """Draw digits (count, 28, 28) of uint8 from the noise of one use of random numbers."""
        settings = self.gan.settings
        z = make_noise(count, settings.latent_dim, settings.seed, use)
        return draw(self.gan.average, z, settings.precision)

    def add(self, stats: Tensor, scores: dict[str, float]) -> None:
        """Add an epoch with its STATS (steps, 5), its SCORES if any, and samples."""
        self.steps.append(len(stats))
        columns = dict(zip(STATS, stats.cpu().T, strict=True))
        for name, before in self.stats.items():
            column = columns.get(name, torch.full((len(stats),), math.nan))
            self.stats[name] = torch.cat([before, column])
        for name, before in self.scores.items():
            score = float(scores.get(name, math.nan))
            self.scores[name] = torch.cat([before, torch.tensor([score])])
        packed = zlib.compress(self.draw(SAMPLES, FIXED_NOISE).numpy())
        self.packed_samples.append(torch.frombuffer(bytearray(packed), dtype=torch.uint8))
        self.table_bytes += len(self.table(first_epoch=self.gan.epoch))

    def samples(self, epoch: int) -> Tensor:
        """Return the digits (n, 28, 28) of uint8 that were drawn after an epoch."""
        content = zlib.decompress(self.packed_samples[epoch - 1].numpy())
        return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, 28, 28)

    def table(self, first_epoch: int = 1) -> bytes:
        """Return the numbers of an epoch and all later ones as CSV: a row for each step.

        The names of the columns stand above the first epoch.
        """
        counts = self.steps[first_epoch - 1 :]
        first_step = sum(self.steps[: first_epoch - 1])
        epochs = torch.arange(first_epoch, len(self.steps) + 1)
        epoch = epochs.repeat_interleave(torch.tensor(counts))
        step = torch.cat([torch.arange(1, count + 1) for count in counts])
        columns = {"epoch": epoch, "step": step}
        columns |= {name: column[first_step:] for name, column in self.stats.items()}
        columns |= {name: column[epoch - 1] for name, column in self.scores.items()}
        names = ",".join(columns) if first_epoch == 1 else ""
        rows = torch.column_stack(list(columns.values()))
        buffer = io.BytesIO()
        np.savetxt(buffer, rows, "%.6g", ",", header=names, comments="")
        return buffer.getvalue()

    def header(self) -> dict:
        """Return what tells where a checkpoint comes from."""
        return {
            "format": FORMAT,
            "epoch": self.gan.epoch,
            "settings": dataclasses.asdict(self.gan.settings),
            "data": self.data,
            "made_with": {"torch": str(torch.__version__), "device": self.gan.device.type},
        }

    def checkpoint(self) -> dict:
        """Return all that is needed to go on exactly."""
        parts = {name: part.state_dict() for name, part in self.gan.parts().items()}
        kept = {name: getattr(self, name) for name in KEPT}
        return {**self.header(), **parts, **kept, "steps": self.steps}

    def restore(self, checkpoint: dict, path: Path) -> None:
        """Go back to where a checkpoint was made. STATS and SCORES that it lacks are NaN."""
        load_weights(self.gan.parts(), checkpoint, path)
        with damage_explained(path):
            self.gan.epoch = checkpoint["epoch"]
            self.packed_samples = checkpoint["packed_samples"]
            self.stats = with_columns(STATS, checkpoint["stats"])
            self.scores = with_columns(SCORES, checkpoint["scores"])
            equal = [len(self.stats["ds_loss"]) // self.gan.epoch] * self.gan.epoch
            self.steps = checkpoint.get("steps", equal)  # older files have epochs of one length
            self.gan.steps = sum(self.steps)
            self.table_bytes = len(self.table())


def with_columns(names: Iterable[str], kept: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the kept columns, each (n,), and columns of NaN by those names that are missing."""
    nothing = torch.full_like(next(iter(kept.values())), math.nan)
    return kept | {name: nothing for name in names if name not in kept}


def epoch_picture(epoch: int) -> str:
    """Return the name of the picture of an epoch."""
    return f"generated_epoch_{epoch:03d}.png"


PICTURES: dict[str, Callable[[Run], bytes]] = {  # drawn again after each epoch
    "real_samples.png": lambda run: png(grid(run.real)),
    TIMELINE: lambda run: png(stacked(stages(run.samples, run.gan.epoch, run.real))),
    "training.gif": lambda run: animation(stages(run.samples, run.gan.epoch, run.real)),
    "loss_curve.png": lambda run: png(curves(run.stats, run.scores, run.steps)),
}
FILES = (CHECKPOINT, BEST, HISTORY, *PICTURES)
FILES += (GENERATED, GENERATED_DIGITS, INTERPOLATION, SCORE, NEAREST)


AGAIN = "it is written again after the next epoch, or by --resume"
PATIENCE = 10  # seconds for which to keep trying to write a checkpoint
SHORT_PATIENCE = 1.5 if sys.platform == "win32" else 0  # virus scanners there hold new files
FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
NOT_SUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


def is_ours(name: str) -> bool:
    """Tell whether a file has one of the fixed names under which the program writes."""
    match = re.fullmatch(r"generated_epoch_([0-9]{3,9})\.png", name)
    epoch = int(match[1]) if match else 0
    return name in FILES or (epoch > 0 and name == epoch_picture(epoch))


def command_line(*arguments: object) -> str:
    """Return the command, as this system's shell takes it, that runs the program from here."""
    script = PROGRAM if Path.cwd() == HOME else HOME / PROGRAM
    words = ["python", *(str(word) for word in (script, *arguments))]
    return subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words)


class RunFolder:
    """The output folder: its lock, and what is written when.

    Raises WrongInput if there can be no folder of this name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock_handle: int | None = None
        self.warned_of_fsync = False
        with self.usable(), suppress(FileNotFoundError):  # a missing folder can be made
            os.listdir(path)

    def usable(self) -> AbstractContextManager[None]:
        """Return a context in which whatever is wrong with the folder or its name is WrongInput."""
        what = f"argument --output-dir: {self.path} cannot be used"
        return explained(what, (OSError, ValueError), failure=WrongInput)

    def has_run(self) -> bool:
        """Tell whether a run has saved an epoch here, or was moved from here into a folder below.

        Drawings do not tell, nor does generator_best.pt: a run that was killed in its first epoch
        may have left it.
        """
        paths = [self.path / name for name in (CHECKPOINT, HISTORY, *PICTURES, epoch_picture(1))]
        return any(path.exists() or moved_away(path) for path in paths)

    def begin(self, dry_run: bool) -> None:
        """Make and take the folder, and move the files of an earlier run into one below it.

        A dry run is refused where there are such files. If it raises Failure, all files are where
        they were.
        """
        self.make()
        self.take()
        files = [path for path in sorted(self.path.iterdir()) if is_ours(path.name)]
        if files and dry_run:
            held = f"{self.path} already holds {files[0].name}"
            raise WrongInput(f"argument --output-dir: {held}; choose another folder for a dry run")
        if files:
            self.move_away(files)

    def make(self) -> None:
        """Make the folder if it is missing, and see whether files can be written there.

        Half-written files of killed commands are removed once they are an hour old: another command
        may be writing a younger one. Raises WrongInput.
        """
        with self.usable():
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.temporary(CHECKPOINT)
            try:
                for _ in range(2):  # the second one replaces the first
                    patiently(lambda: self.write_once(probe.name, b""), SHORT_PATIENCE)
            finally:
                patiently(lambda: probe.unlink(missing_ok=True), SHORT_PATIENCE)
            for path in self.path.glob(".*.tmp"):
                match = re.fullmatch(r"\.+(.+?)(?:\.[0-9a-f]{32}\.tmp)+", path.name)
                name = match[1] if match else ""
                ours = is_ours(name) or name.endswith((f"_{SCORE}", f"_{NEAREST}"))
                with suppress(OSError):  # another command may be cleaning, or another user own it
                    if ours and time.time() - path.stat().st_mtime > 3600:
                        path.unlink()

    def temporary(self, name: str) -> Path:
        """Return the path of a file before it is moved to its name: no other command has it."""
        return self.path / f".{name}.{uuid.uuid4().hex}.tmp"

    def take(self) -> None:
        """Keep other runs out until ``close``. Raises Failure if one is in the folder."""
        try:
            import fcntl
        except ImportError:  # on Windows, which can lock no folder
            return
        self.lock_handle = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self.lock_handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            held = f"another run is using {self.path}"
            raise Failure(f"{held}; choose another --output-dir") from error
        except OSError as error:  # some network drives have no locks
            reason = error.strerror
            print(f"warning: cannot lock {self.path} ({reason}); do not start another run there")

    def close(self) -> None:
        """Give up the lock. The system does so too, however the process ends."""
        if self.lock_handle is not None:
            os.close(self.lock_handle)
            self.lock_handle = None

    def move_away(self, files: list[Path]) -> None:
        """Move files of an earlier run into the next free folder previous_NNN: all or none."""
        number = 1
        while (self.path / f"previous_{number:03d}").exists():
            number += 1
        previous = self.path / f"previous_{number:03d}"
        what = f"cannot move the earlier run to {previous}"
        advice = "close any program that has its files open, or choose another --output-dir"
        try:
            with explained(what, OSError, advice):
                previous.mkdir()
                for path in files:
                    path.rename(previous / path.name)
        except BaseException:  # Ctrl-C too must not leave half a run in each folder
            for path in files:
                if (previous / path.name).exists():
                    (previous / path.name).rename(path)
            if previous.exists():
                previous.rmdir()
            raise
        print(f"Moved the earlier files in {self.path} to {previous}")
        if self.path / CHECKPOINT in files:
            print(f"To go on with that run: {command_line('--resume', '--output-dir', previous)}")

    def save(self, name: str, content: dict) -> None:
        """Write a checkpoint or a generator, if need be after some tries. Raises Failure."""
        buffer = io.BytesIO()
        torch.save(content, buffer)
        self.write(name, buffer.getbuffer(), PATIENCE)

    def write(self, name: str, content: bytes | memoryview, patience: float = 0) -> None:
        """Write a file whole or, with a Failure, not at all; what was there is then still there."""
        with explained(f"cannot write {self.path / name}", OSError):
            patiently(lambda: self.write_once(name, content), max(patience, SHORT_PATIENCE))

    def write_once(self, name: str, content: bytes | memoryview) -> None:
        """Write a file whole or, with an OSError, not at all."""
        temporary = self.temporary(name)
        try:
            with temporary.open("xb") as file:
                file.write(content)
                self.flush(file)
            temporary.replace(self.path / name)
        finally:
            with suppress(OSError):  # the folder may be gone
                temporary.unlink(missing_ok=True)

    def flush(self, file: BinaryIO) -> None:
        """Force what is written to a file onto the disk, where the file system supports that."""
        file.flush()
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in NOT_SUPPORTED:
                raise
            if not self.warned_of_fsync:
                risk = "a crash of the system can cost the last epoch"
                print(f"warning: {self.path} has no fsync ({error.strerror}); {risk}")
            self.warned_of_fsync = True

    def write_pictures(self, run: Run) -> None:
        """Bring table and pictures up to date; one that cannot be written costs a warning."""
        with only_warned(f"cannot write {self.path / HISTORY}"):
            self.write_table(run)
        for epoch in range(1, run.gan.epoch + 1):
            path = self.path / epoch_picture(epoch)
            if not path.exists():
                with only_warned(f"cannot draw {path}"):
                    self.write(path.name, png(grid(run.samples(epoch))))
        for name, picture in PICTURES.items():
            with only_warned(f"cannot draw {self.path / name}"):
                self.write(name, picture(run))

    def write_table(self, run: Run) -> None:
        """Append the last epoch to history.csv, or write all of it if the file is not as it was."""
        path = self.path / HISTORY
        rows = run.table(first_epoch=run.gan.epoch)
        with explained(f"cannot write {path}", OSError):
            length = path.stat().st_size if path.exists() else 0
            if length == run.table_bytes - len(rows):
                with path.open("ab") as file:
                    file.write(rows)
                    self.flush(file)
            elif length != run.table_bytes:
                self.write(HISTORY, run.table())


def patiently(action: Callable[[], None], patience: float) -> None:
    """Repeat what fails for ``patience`` seconds, unless the disk is full. Raises OSError."""
    end = time.monotonic() + patience
    while True:
        try:
            action()
            return
        except OSError as error:
            if error.errno in FULL or time.monotonic() > end:
                raise
        time.sleep(0.1)


@contextmanager
def only_warned(what: str) -> Iterator[None]:
    """Turn any error in a with block into a warning, for training can go on without the block."""
    try:
        yield
    except Failure as failure:
        print(f"warning: {failure}; {AGAIN}")
    except Exception as error:
        frames = traceback.walk_tb(error.__traceback__)
        lines = [line for frame, line in frames if frame.f_globals is globals()]
        reason = textwrap.shorten(str(error), 200)
        fault = f"{type(error).__name__} from line {lines[-1]} of {PROGRAM}: {reason}"
        print(f"warning: {what} ({fault})")


def moved_away(path: Path) -> list[Path]:
    """Return where new runs have moved files of this path, the earliest first."""
    found = path.parent.glob(f"previous_*/{path.name}")
    return sorted(found, key=lambda path: (len(path.parent.name), path))


def read_checkpoint(path: Path, *more: str) -> dict:
    """Read a file that holds a generator and ``more``. Raises Failure if it is not sound."""
    if not path.exists():
        advice = "train first, or choose another --output-dir"
        moved = moved_away(path)
        if moved:  # by a run that then ended within its first epoch
            advice += f": the latest earlier run is in {moved[-1].parent}"
        raise Failure(f"there is no {path}; {advice}")
    data = io.BytesIO(path.read_bytes())
    with damage_explained(path):
        with zipfile.ZipFile(data) as archive:
            wrong = archive.testzip()
        if wrong is not None:
            raise ValueError(f"wrong check sum of {wrong}")
        data.seek(0)
        checkpoint = torch.load(data, map_location="cpu", weights_only=True)  # runs no code
        found = checkpoint.get("format", 1)
        if found != FORMAT:
            raise another_version(path, f"it has format {found}, this one {FORMAT}")
        missing = {"epoch", "settings", "data", "made_with", "average", *more} - checkpoint.keys()
        if missing:
            raise ValueError(f"it lacks {' and '.join(sorted(missing))}")
        known = {field.name for field in dataclasses.fields(Settings)}
        unknown = checkpoint["settings"].keys() - known
        if unknown:
            names = " and ".join(sorted(unknown))
            raise another_version(path, f"this one has no setting named {names}")
        checkpoint["settings"] = Settings(**checkpoint["settings"])
    return checkpoint


def damage_explained(path: Path) -> AbstractContextManager[None]:
    """Return a context in which whatever zipfile or torch raises means that a file is damaged."""
    return explained(f"{path} is damaged or is not a checkpoint of this program", Exception)


def another_version(path: Path, difference: str) -> Failure:
    """Return what to raise for a checkpoint that this version cannot read."""
    return Failure(f"{path} is from another version of this program: {difference}; train again")


def load_weights(
    parts: dict[str, nn.Module | torch.optim.Optimizer], checkpoint: dict, path: Path
) -> None:
    """Load networks and optimisers by their names. Raises Failure if they are others."""
    advice = "use the version that wrote it, or train again"
    with explained(f"{path} holds other networks than {PROGRAM}", Exception, advice):
        for name, part in parts.items():
            content = checkpoint[name]
            if isinstance(part, torch.optim.Optimizer):  # its rates stay those of this program
                groups = part.state_dict()["param_groups"]
                if kinds(content["param_groups"]) != kinds(groups):
                    raise ValueError(f"{name} is of another kind")
                content = {"state": content["state"], "param_groups": groups}
            load_state(part, content)


def kinds(groups: list[dict]) -> list[tuple]:
    """Return what must be equal for an optimiser's state to fit: options and parameters."""
    return [(sorted(group), group["params"]) for group in groups]


class TrainedGenerator:
    """The averaged generator in a file, ready to draw. Raises Failure if there is none."""

    def __init__(self, path: Path, device: torch.device, seed: int = Settings.seed) -> None:
        self.path = path
        self.seed = seed  # of the noise from which it draws
        self.checkpoint = read_checkpoint(path)
        self.settings: Settings = self.checkpoint["settings"]
        with torch.random.fork_rng(devices=[]):  # making layers draws random numbers
            self.network = new_generator(self.settings)
        load_weights({"average": self.network}, self.checkpoint, path)
        place(self.network, device).eval().requires_grad_(False)

    def noise(self, count: int) -> Tensor:
        """Return noise (count, latent_dim, 1, 1) to draw from."""
        return make_noise(count, self.settings.latent_dim, self.seed, DRAWING)

    def draw(self, z: Tensor) -> Tensor:
        """Draw digits (n, 28, 28) of uint8 from noise (n, latent_dim, 1, 1), as the run does."""
        return draw(self.network, z, self.settings.precision)


def load_generator(
    folder: Path | str | None = None, best: bool = False, device: str | torch.device = "cpu"
) -> Generator:
    """Load the generator of a run's last epoch, or of its best one, to draw with.

    Without a folder, it is the one that comes with the program. It takes noise (n, latent_dim, 1,
    1) on its device, returns images (n, 1, 28, 28) in [-1, 1], is in eval mode, in fp32, and needs
    no gradient. Raises Failure if there is none or it is damaged.
    """
    path = EXAMPLE if folder is None else Path(folder) / (BEST if best else CHECKPOINT)
    return TrainedGenerator(path, torch.device(device)).network


# =========================================== commands ===========================================
OUTPUT_DIR = Path("result")  # in the current folder
EPOCHS = 10  # of a run, unless --epochs says otherwise
LOG_EVERY = 100  # steps from one line of the log to the next, unless --log-every says otherwise
THE_RUN = object()  # what --evaluate scores if no file is named: the run in the output folder


class Stopped(KeyboardInterrupt):
    """The user or the system wants the program to end; the message says how to go on."""

    def __init__(self, signum: int, message: str = "to try again, run the same command") -> None:
        super().__init__(message)
        self.signum = signum


def train(options: Namespace, device: torch.device, folder: RunFolder) -> None:
    """Begin a run, or go on with the one in the folder, and train to its last epoch."""
    with connected(device):
        first = process_rank() == 0
        settled = settle(options, device, folder) if first else None
        settings, epochs, digits, where, data_dir, checkpoint = from_first_process(settled)
        gan = DCGAN(settings, device)
        run = Run(gan, digits, data_dir, epochs)
        if checkpoint is not None:
            run.restore(checkpoint, folder.path / CHECKPOINT)
        elif first:  # only now, for it moves an earlier run away
            folder.begin(settings.dry_run)
            with only_warned("no summary of the networks"):
                print_summaries(gan.generator, gan.discriminator, settings.latent_dim)
        step = fastest_step(gan, graph=options.graph == "auto")
        if settings.dry_run and not started_by_torchrun():  # each process computes a part only
            step = ComparedStep(gan, step)
        loop = train_epochs(gan, step, digits.to(device), epochs, options.log_every or LOG_EVERY)
        if not first:
            for _ in loop:  # the first process scores, saves and draws
                pass
            return
        if checkpoint is not None:
            folder.write_pictures(run)  # the command before may have failed to write some
        if gan.epoch >= epochs:
            done = f"The run in {folder.path} already has {gan.epoch} epochs"
            print(f"{done}; to add more, give a larger --epochs")
            return
        scorer = find_scorer(run.data["sha256"], device)
        announce(settings, device, f"{len(digits):,} pictures from {where}", folder)
        score_save_draw(run, loop, scorer, folder)
        if isinstance(step, ComparedStep):
            print(f"Largest deviation from fp32 on the CPU: {step.result}")


def settle(
    options: Namespace, device: torch.device, folder: RunFolder
) -> tuple[Settings, int, Tensor, str, Path | None, dict | None]:
    """Return settings, number of epochs, digits, where they were found, --data-dir, checkpoint.

    A flag wins over the recipe, and the recipe over the defaults. A run that goes on keeps its
    settings. Raises Failure.
    """
    given = given_settings(options)
    if options.resume and folder.has_run():
        checkpoint = checkpoint_to_resume(given, folder)
        settings = checkpoint["settings"]
        epochs = options.epochs or checkpoint["epochs"]
    else:
        if options.resume:
            print(f"There is no run in {folder.path} yet: a new one begins")
        checkpoint = None
        recipe = RECIPES[given.get("recipe", Settings.recipe)]
        precision = "bf16" if has_bf16(device) else "fp32"
        chosen = {"precision": precision} | recipe | given  # the last one wins
        settings = Settings(**chosen, dry_run=options.dry_run)
        epochs = 2 if options.dry_run else options.epochs or EPOCHS
    data_dir = options.data_dir
    if checkpoint is not None and data_dir is None and checkpoint["data"]["path"] is not None:
        data_dir = Path(checkpoint["data"]["path"])
        if not data_dir.exists():
            gone = f"the run began with the pictures in {data_dir}, which is not there now"
            raise WrongInput(f"argument --data-dir: {gone}; name the place where they are")
    digits, where = pictures_of_run(data_dir, settings.split, "split" in given, checkpoint, folder)
    count = len(digits)
    if settings.batch_size > count:
        few = f"a batch has {settings.batch_size} pictures, but there are only {count} in all"
        raise WrongInput(f"argument --batch-size: {few}; give a smaller number")
    processes = dist.get_world_size() if started_by_torchrun() else 1
    if settings.batch_size % processes or 0 < count % settings.batch_size < processes:
        shares = f"{processes} processes cannot share every batch; choose another size"
        raise WrongInput(f"argument --batch-size: {shares}")
    return settings, epochs, digits, where, data_dir, checkpoint


def pictures_of_run(
    data_dir: Path | None, split: str, split_given: bool, checkpoint: dict | None, folder: RunFolder
) -> tuple[Tensor, str]:
    """Return the pictures to train on and where they were found. Raises Failure.

    They must be those that the run began with, and not among what the program writes.
    """
    digits, source, others = load_pictures(data_dir, split, split_given)
    if checkpoint is not None and checkpoint["data"]["sha256"] != sha256_of(digits):
        changed = f"{source} holds other pictures than those the run started with"
        raise WrongInput(f"argument --data-dir: {changed}; name the place where they are")
    if data_dir is not None:
        check_apart(source, folder.path)
    return digits, f"{source} (other files there: {others:,})" if others else str(source)


def check_apart(source: Path, output: Path) -> None:
    """Raise WrongInput if pictures to train on are, or would be, among what the program writes."""
    source = source.resolve()
    output = output.resolve()
    if output.is_relative_to(source) or source.is_relative_to(output):
        mixed = f"the pictures to train on ({source}) and the output folder must be kept apart"
        raise WrongInput(f"argument --output-dir: {mixed}; choose another folder")
    files = files_below(source) if source.is_dir() else []
    written = [path for path in files if is_ours(path.name)]
    if written:
        mixed = f"{written[0]} has the name of a picture that this program writes"
        raise WrongInput(f"argument --data-dir: {mixed}; name a folder without such files")


def checkpoint_to_resume(given: dict[str, object], folder: RunFolder) -> dict:
    """Take the folder and return the checkpoint of its run. Raises Failure if it cannot go on.

    The settings that are given must be the run's own.
    """
    folder.make()
    folder.take()
    checkpoint = read_checkpoint(folder.path / CHECKPOINT, *KEPT)
    settings = checkpoint["settings"]
    if settings.dry_run:
        raise WrongInput(f"argument --resume: {folder.path} holds a dry run, which cannot go on")
    for name, value in given.items():
        kept = getattr(settings, name)
        if value != kept:
            advice = "omit it, or start a new run without --resume"
            raise WrongInput(f"argument {flag(name)}: {value}, but the run has {kept}; {advice}")
    return checkpoint


def given_settings(options: Namespace) -> dict[str, object]:
    """Return the training flags that the command line gives, without any defaults."""
    names = {field.name for field in dataclasses.fields(Settings)} - {"dry_run"}
    if options.precision == "auto":
        names.remove("precision")
    return {name: value for name, value in vars(options).items() if name in names}


def find_scorer(digits_sha256: str, device: torch.device) -> Scorer | None:
    """Return the scorer of a run on these digits, or None, and print which."""
    seen = SPLIT_OF_DIGITS.get(digits_sha256)
    if seen is None:
        print("This run will have no scores: its pictures are not those of MNIST")
        return None
    try:
        scorer = Scorer(read_scorer(), seen, device)
    except Failure as failure:
        print(f"This run will have no scores: {failure}")
        return None
    print(f"Scores compare with MNIST's {scorer.unseen} split, which this run does not see")
    return scorer


def announce(settings: Settings, device: torch.device, what: str, folder: RunFolder) -> None:
    """Print what a run trains on, where it computes and which picture to watch."""
    print(f"Training on {what}")
    if settings.precision == "bf16" and not has_bf16(device):
        print(f"warning: this {device.type} may be slow in bf16; --precision fp32 may be faster")
    print(f"Computing on {device.type} in {settings.precision}")
    if not settings.dry_run:
        print(f"After each epoch, look at {folder.path / TIMELINE}")


def outside(error: BaseException) -> bool:
    """Tell whether something outside the program has caused an error, such as a full disk."""
    return isinstance(error, OSError) or of_machine(error)


def message_of(error: Exception) -> str:
    """Return what to print of an error; a MemoryError has no message."""
    return str(error) or "out of memory"


def score_save_draw(
    run: Run, loop: Iterator[Tensor], scorer: Scorer | None, folder: RunFolder
) -> None:
    """Take the training loop to its end; after each epoch: score, save, draw."""
    gan = run.gan
    done_before = gan.epoch  # epochs done before this command
    saved = gan.epoch  # epochs in the checkpoint
    start = time.perf_counter()
    try:
        for stats in loop:
            lines = score(run, stats, scorer)
            if run.best_epoch == gan.epoch:
                folder.save(BEST, {**run.header(), "average": gan.average.state_dict()})
            folder.save(CHECKPOINT, run.checkpoint())
            saved = gan.epoch
            for line in lines:
                print(line)
            folder.write_pictures(run)
            taken = time.perf_counter() - start
            left = taken / (saved - done_before) * (run.epochs - saved)
            after = f"after {tqdm.format_interval(taken)}, {tqdm.format_interval(left)} left"
            print(f"saved to {folder.path} {after}")
    except (KeyboardInterrupt, Exception) as error:
        if saved == 0 or gan.settings.dry_run:
            raise
        to_go_on = f"epoch {saved} is saved; to continue, run the same command with --resume"
        if isinstance(error, KeyboardInterrupt):
            raise Stopped(getattr(error, "signum", signal.SIGINT), to_go_on) from error
        if isinstance(error, BrokenPipeError) or not outside(error.__cause__ or error):
            raise
        raise Failure(f"{message_of(error)}; {to_go_on}") from error
    if gan.settings.dry_run:
        end_dry_run(folder)
    elif 0 < run.best_epoch < gan.epoch:
        print(f"The best epoch was {run.best_epoch}; --generate N --best draws from its {BEST}")


def end_dry_run(folder: RunFolder) -> None:
    """Say that a dry run went well. Raises Failure if a picture or the table is missing."""
    drawn = (HISTORY, epoch_picture(1), epoch_picture(2), *PICTURES)
    missing = [name for name in drawn if not (folder.path / name).exists()]
    if missing:
        raise Failure(f"the dry run could not write {' and '.join(missing)}; see its warnings")
    print("The dry run went well: reading, training, saving and drawing work")
    print("After so few steps, digits and scores mean nothing")


def score(run: Run, stats: Tensor, scorer: Scorer | None) -> list[str]:
    """Add an epoch's STATS (steps, 5), scores and samples to a run; return lines for the log.

    One may warn of a collapse.
    """
    lines = []
    scores = dict.fromkeys(SCORES, math.nan)
    if scorer is not None:
        scores = scorer(run.draw(SCORED, DRAWING))
        lines.append(score_line(scores, scorer.floors.get(SCORED, {})))
    ds_loss = stats[:, STATS.index("ds_loss")]
    signs = signs_of_collapse(ds_loss, scores, run.scores)
    if signs and not run.gan.settings.dry_run:
        lines.append(f"warning: {' and '.join(signs)}; README.md says what to do")
    run.add(stats, scores)
    return lines


def find_generator(options: Namespace, device: torch.device, folder: RunFolder) -> TrainedGenerator:
    """Return the generator of the run's last or best epoch.

    Without a run, and if no folder is named, it is the one that comes with the program.
    """
    path = folder.path / (BEST if options.best else CHECKPOINT)
    if options.output_dir is None and not folder.has_run() and EXAMPLE.exists():
        print(f"{folder.path} holds no run: using the included generator, {EXAMPLE}")
        path = EXAMPLE
    elif options.best and not path.exists() and (folder.path / CHECKPOINT).exists():
        raise WrongInput(f"argument --best: the run in {folder.path} has no scores; leave it out")
    return TrainedGenerator(path, device, getattr(options, "seed", Settings.seed))


def generate(options: Namespace, device: torch.device, folder: RunFolder) -> list[str]:
    """Draw digits with a trained generator, of all kinds or of one; return the files' names."""
    trained = find_generator(options, device, folder)
    folder.make()
    if options.digit is None:
        digits = trained.draw(trained.noise(options.generate))
    else:
        digits = draw_one_kind(trained, options.digit, options.generate, device)
    content = io.BytesIO()
    np.save(content, digits.numpy())
    folder.write(GENERATED_DIGITS, content.getbuffer())
    folder.write(GENERATED, png(grid(digits[:100])))
    return [GENERATED, GENERATED_DIGITS]


def draw_one_kind(trained: TrainedGenerator, kind: int, count: int, device: torch.device) -> Tensor:
    """Draw digits (count, 28, 28) of uint8 of one kind, 0 to 9, as the scorer recognises it.

    Raises Failure if less than one drawing in 200 is one of these, among the first 2,000.
    """
    classifier = load_classifier(read_scorer(), device)
    stream = random_stream(trained.seed, DRAWING)
    found = torch.empty(0, 28, 28, dtype=torch.uint8)
    with progress_bar(total=count, unit="digit") as progress:
        while len(found) < count:
            digits = trained.draw(sample_noise(2000, trained.settings.latent_dim, stream))
            probabilities = classifier.judge(digits)[1]
            kept = digits[probabilities[:, kind] >= 0.9]
            if len(kept) < 10 and len(found) == 0:
                few = f"only {len(kept)} of 2,000 drawings are a clear {kind}"
                raise Failure(f"{few}; train for longer, or ask for another --digit")
            found = torch.cat([found, kept])
            progress.update(len(kept))
    return found[:count]


def interpolate(options: Namespace, device: torch.device, folder: RunFolder) -> list[str]:
    """Draw ten walks from one digit to another, one a row; return the file's name."""
    trained = find_generator(options, device, folder)
    folder.make()
    z = trained.noise(20)
    digits = trained.draw(walk(z[:10], z[10:]))
    folder.write(INTERPOLATION, png(grid(digits)))
    return [INTERPOLATION]


def walk(a: Tensor, b: Tensor) -> Tensor:
    """Return ten steps from each noise of a (n, ...) to that of b: (10 n, ...).

    They go along a sphere (Shoemake 1985), since noise has about the same length everywhere.
    """
    angle = torch.cosine_similarity(a, b, dim=1).acos()[:, None, None]  # (n, 1, 1, 1, 1)
    t = torch.linspace(0, 1, 10).view(1, 10, 1, 1, 1) * angle
    return (((angle - t).sin() * a[:, None] + t.sin() * b[:, None]) / angle.sin()).flatten(0, 1)


def evaluate(options: Namespace, device: torch.device, folder: RunFolder) -> list[str]:
    """Score 10,000 digits of a trained generator, or those in a file; return the files' names."""
    content = read_scorer()
    if options.evaluate is THE_RUN:
        trained = find_generator(options, device, folder)
        seen = SPLIT_OF_DIGITS.get(trained.checkpoint["data"]["sha256"])
        if seen is None:
            others = f"the run in {folder.path} was trained on pictures other than MNIST's digits"
            raise WrongInput(f"argument --evaluate: {others}, which cannot be scored")
        digits = trained.draw(trained.noise(EVALUATED))
        prefix = ""
        source = {
            "of": str(trained.path),
            "epoch": trained.checkpoint["epoch"],
            "drawn_with_seed": trained.seed,
            **trained.checkpoint["made_with"],
            "settings": dataclasses.asdict(trained.settings),
        }
    else:
        digits = read_drawings(options.evaluate)
        prefix = f"{options.evaluate.stem}_"
        seen = getattr(options, "split", Settings.split)
        source = {"of": str(options.evaluate)}
    folder.make()
    scorer = Scorer(content, seen, device)
    real = bundled_digits(seen)
    scores = scorer.evaluate(digits, real, bundled_digits(scorer.unseen))
    floor = scorer.floors.get(len(digits), {})
    if not floor and len(digits) <= len(real):
        floor = {"fd": scorer(some(real, len(digits)))["fd"]}
    print(score_table(scores, floor, len(digits), seen))
    report = {
        **scores,
        "floor": floor,
        "count": len(digits),
        "seen": seen,
        "compared_with": scorer.unseen,
        "scorer_sha256": SCORER_SHA256,
        **source,
    }
    names = [f"{prefix}{SCORE}", f"{prefix}{NEAREST}"]
    folder.write(names[0], json.dumps(report, indent=1, default=float).encode())
    folder.write(names[1], png(nearest(digits, real)))
    return names


def score_table(scores: dict[str, float], floor: dict[str, float], count: int, seen: str) -> str:
    """Lay out scores by their names, beside them those of real digits where they are known."""
    model = f"{count:,} digits of a model that has seen MNIST's {seen} split"
    lines = [f"{model}, compared with its {UNSEEN[seen]} split"]
    lines.append(f"{'':<10}{'score':>8}{'real digits' if floor else '':>14}")
    for name, value in scores.items():
        known = name in floor and name != "copies"  # real digits of that split are copies: 1
        real = f"{floor[name]:.4g}" if known else ""
        lines.append(f"{name:<10}{value:>8.4g}{real:>14}")
    lines.append("copies: about 0.5 if nothing is copied, 1 for copies")
    return "\n".join(line.rstrip() for line in lines)


def read_drawings(path: Path) -> Tensor:
    """Read drawings (n, 28, 28) of uint8 to score. Raises WrongInput if they cannot be scored."""
    try:
        digits = checked(read_array(path), path)
        if len(digits) < 2:
            raise Unusable(f"{path} holds only one picture")
        check_white(digits, path)
    except Unusable as error:
        accepted = "--evaluate takes an .npy file, or an .npz file with one array, of uint8"
        raise WrongInput(f"argument --evaluate: {error}; {accepted} (n, 28, 28)") from error
    if len(digits) < SCORED:
        few = f"FD depends on the number of pictures, and {len(digits):,} say little"
        print(f"warning: {few}; {EVALUATED:,} are usual")
    at_rim = torch.ones(28, 28, dtype=torch.bool)
    at_rim[2:-2, 2:-2] = False
    if digits[:, 7:21, 7:21].float().mean() < digits[:, at_rim].float().mean():
        print(f"warning: {path} is darker in the middle than at the rim; MNIST is light on dark")
    return digits


COMMANDS = {"generate": generate, "interpolate": interpolate, "evaluate": evaluate}


# ========================================= command line =========================================
NO_READER = 141  # exit code: 128 and the number of SIGPIPE
HELP_EXAMPLES = f"""\
examples:
  python {PROGRAM} --epochs 10               train, ten times on every digit
  python {PROGRAM} --resume --epochs 20      add ten epochs to that run
  python {PROGRAM} --generate 50 --digit 7   draw fifty sevens
"""


class Parser(argparse.ArgumentParser):
    """A parser that leaves it to ``main`` to print an error and to end the program."""

    def error(self, message: str) -> NoReturn:
        raise WrongInput(f"{message}; --help lists all flags")


def number_between(kind: type, low: float, high: float) -> Callable[[str], float]:
    """Return a function that reads a number from ``low`` to ``high``, for argparse."""
    noun = "whole number" if kind is int else "number"

    def read(text: str) -> float:
        with suppress(ValueError):
            value = kind(text)
            if low <= value <= high:
                return value
        raise argparse.ArgumentTypeError(f"must be a {noun} from {low} to {high}, not {text!r}")

    return read


def named_path(text: str) -> Path:
    """Read a path, for argparse; an empty one, as of a missing variable, would mean this folder."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return Path(text)


def add_training_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags of Settings; what is not given is not among the options."""
    for field in dataclasses.fields(Settings):
        if not field.metadata:
            continue
        help = field.metadata["help"]
        low = field.metadata["low"]
        high = field.metadata["high"]
        choices = field.metadata["choices"]
        if field.type is bool:
            arguments = {"action": argparse.BooleanOptionalAction}
        elif choices:
            arguments = {"type": field.type, "choices": choices}
        else:
            read = str if field.type is str else number_between(field.type, low, high)
            arguments = {"type": read, "metavar": "N" if field.type is int else "X"}
        text = f"{help} (default: {field.default})".replace("%", "%%")  # argparse formats it
        group.add_argument(flag(field.name), help=text, **arguments)


def add_run_flags(group: argparse._ArgumentGroup) -> None:
    """Add how long a run goes on, and what it reads and writes."""
    help = "epochs in all, including those already done; --resume alone keeps the run's number "
    help += f"(default: {EPOCHS})"
    group.add_argument("--epochs", type=number_between(int, 1, 100_000), metavar="N", help=help)
    help = f"folder for the results (default: {OUTPUT_DIR})"
    group.add_argument("--output-dir", type=named_path, metavar="DIR", help=help)
    help = "your own pictures: a folder with them, a file in MNIST's format or a folder with one, "
    help += "or an .npy file, uint8 of shape (n, 28, 28) (default: MNIST, beside the program)"
    group.add_argument("--data-dir", type=named_path, metavar="PATH", help=help)
    help = f"print a line of the log every N steps (default: {LOG_EVERY})"
    every = number_between(int, 1, 10**6)
    group.add_argument("--log-every", type=every, metavar="N", help=help)
    help = "go on with the run in the output folder (default: begin a new one)"
    group.add_argument("--resume", action="store_true", help=help)
    help = "check an installation: two epochs of three steps, in a temporary folder unless "
    help += "--output-dir names one (default: off)"
    group.add_argument("--dry-run", action="store_true", help=help)
    group.add_argument("-h", "--help", action="help", help="show this page and exit (default: off)")


def add_hardware_flags(group: argparse._ArgumentGroup) -> None:
    """Add where and how to compute."""
    help = "auto: a GPU if there is one (default: auto)"
    devices = ("auto", "cpu", "cuda", "mps")
    group.add_argument("--device", choices=devices, default="auto", help=help)
    help = "auto: bf16 on GPUs from Ampere on and CPUs with AVX512-BF16 or AMX (default: auto)"
    precisions = ("auto", "fp32", "bf16")
    group.add_argument("--precision", choices=precisions, default="auto", help=help)
    help = "auto: on a CUDA GPU, record a training step as a graph and replay it, which is faster; "
    help += "off: take every step as it is written (default: auto)"
    group.add_argument("--graph", choices=("auto", "off"), default="auto", help=help)


def add_drawing_flags(group: argparse._ArgumentGroup) -> None:
    """Add what to do with a trained generator."""
    help = "draw N digits (default: off)"
    group.add_argument("--generate", type=number_between(int, 1, 100_000), metavar="N", help=help)
    help = "with --generate: only the digit D, 0 to 9, as the scorer recognises it with a "
    help += "probability of at least 0.9 (default: all ten)"
    group.add_argument("--digit", type=number_between(int, 0, 9), metavar="D", help=help)
    help = "draw ten walks from one digit to another (default: off)"
    group.add_argument("--interpolate", action="store_true", help=help)
    help = "score 10,000 digits; or those in an .npy or .npz file, uint8 of shape (n, 28, 28), "
    help += "drawn by a model that was trained on --split (default: off)"
    group.add_argument(
        "--evaluate", type=named_path, nargs="?", const=THE_RUN, metavar="FILE", help=help
    )
    help = "use the generator of the epoch with the lowest FD (default: of the last epoch)"
    group.add_argument("--best", action="store_true", help=help)


def parse_options(argv: Sequence[str]) -> Namespace:
    """Read a command line. Raises WrongInput."""
    parser = Parser(
        usage=f"python {PROGRAM} [flags]",
        description=(__doc__ or PROGRAM).splitlines()[0],  # python -OO leaves it out
        epilog=HELP_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    add_training_flags(parser.add_argument_group("training", argument_default=argparse.SUPPRESS))
    add_run_flags(parser.add_argument_group("run"))
    add_hardware_flags(parser.add_argument_group("hardware"))
    add_drawing_flags(parser.add_argument_group("drawing", "Use a trained generator; no training."))
    options = parser.parse_args(argv)
    modes = [flag(name) for name in ("resume", "dry_run", *COMMANDS) if getattr(options, name)]
    if len(modes) > 1:
        parser.error(f"{' and '.join(modes)} cannot be combined")
    drawing = any(getattr(options, name) for name in COMMANDS)
    from_file = isinstance(options.evaluate, Path)
    if drawing:
        used = {"split"} if from_file else {"seed"}
        of_runs = {name for name in ("epochs", "data_dir", "log_every") if getattr(options, name)}
        extra = sorted((given_settings(options).keys() | of_runs) - used)
        if extra:
            wrong = f"{flag(extra[0])} is a training flag"
            parser.error(f"{wrong} and cannot be combined with {modes[0]}")
    if options.digit is not None and not options.generate:
        parser.error("--digit requires --generate N")
    if options.best and (from_file or not drawing):
        parser.error("--best requires --generate N, --interpolate or --evaluate without a file")
    return options


def run_command(options: Namespace) -> None:
    """Do what the command line asks for; a dry run in a temporary folder, if none is named."""
    device = pick_device(options.device)
    chosen = [command for name, command in COMMANDS.items() if getattr(options, name)]
    is_temporary = options.dry_run and options.output_dir is None
    with ExitStack() as stack:
        path = options.output_dir or OUTPUT_DIR
        if is_temporary:
            temporary = TemporaryDirectory(prefix="dcgan_mnist_", ignore_cleanup_errors=True)
            path = Path(stack.enter_context(temporary))
        folder = stack.enter_context(closing(RunFolder(path)))
        stack.enter_context(computing_on(device))
        if not chosen:
            train(options, device, folder)
        elif process_rank() == 0:
            names = chosen[0](options, device, folder)
            print(f"saved {' and '.join(str(path / name) for name in names)}")
    if is_temporary:
        print("The dry run's temporary folder is removed")


def last_line(kind: str, message: object, rank: int) -> None:
    """Print the line with which a process ends; the first one needs no number."""
    process = f"process {rank}: " if rank > 0 else ""
    with suppress(OSError):  # where nobody reads it, the exit code still tells
        print(f"{PROGRAM}: {process}{kind}: {' '.join(str(message).split())}", file=sys.stderr)


@contextmanager
def own_torch() -> Iterator[None]:
    """In a with block, compute as in a new process, whatever a notebook has switched in torch."""
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        stack.callback(torch.set_deterministic_debug_mode, torch.get_deterministic_debug_mode())
        torch.set_deterministic_debug_mode("default")
        for device in ("cpu", "cuda", "mps"):
            enabled = torch.is_autocast_enabled(device)
            stack.callback(torch.set_autocast_enabled, device, enabled)
            torch.set_autocast_enabled(device, False)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(False))  # which also switches gradients on
        yield


def check_torch() -> None:
    """Raise Failure if PyTorch is too old for this program."""
    version = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])
    if version < TORCH:
        needed = ".".join(map(str, TORCH))
        advice = "pip install -r requirements.txt brings it"
        raise Failure(f"this is torch {torch.__version__}, but {needed} is needed; {advice}")


def main(argv: Sequence[str] = ()) -> int:
    """Run a command line, such as ["--epochs", "2"], and return the exit code.

    0: done; 1: something outside went wrong; 2: wrong input; 128 and its number: stopped by a
    signal; 141: nobody reads the output any more.
    """
    rank = process_rank()
    # only the first process prints, and where a stream is closed, none
    output = (sys.stdout if rank == 0 else None) or io.StringIO()
    bars = (sys.stderr if rank == 0 else None) or io.StringIO()
    try:
        with redirect_stdout(output), redirect_stderr(bars):
            check_torch()
            try:
                options = parse_options(argv)
            except SystemExit:
                return 0  # of argparse, after --help
            with own_torch():
                run_command(options)
        return 0
    except Failure as error:
        if rank == 0:  # it speaks for all, which fail alike
            last_line("error", error, rank)
        return 2 if isinstance(error, WrongInput) else 1
    except BrokenPipeError:
        return NO_READER
    except KeyboardInterrupt as interrupt:
        stopped = interrupt if isinstance(interrupt, Stopped) else Stopped(signal.SIGINT)
        last_line("stopped", stopped, rank)
        return 128 + stopped.signum
    except Exception as error:
        if not outside(error):
            raise
        last_line("error", message_of(error), rank)
        return 1


@contextmanager
def own_process() -> Iterator[None]:
    """In a with block, set up what a process of its own needs: signals, streams, pictures.

    It is undone at the end, for a notebook's %run goes on in the same process. The first signal
    stops the program in good order, a second one at once. Under torchrun, which may send a signal
    twice, the first process ignores a second one; any signal ends the other processes at once. A
    signal that was ignored before, as with nohup, stays ignored. A line appears when it is printed.
    Characters that the console lacks are shown as escapes.
    """
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    known = [getattr(signal, name) for name in names if hasattr(signal, name)]
    left = (signal.SIG_IGN, None)  # ignored, or with a handler that Python cannot put back
    signals = [signum for signum in known if signal.getsignal(signum) not in left]

    def stop(signum: int, frame: object) -> NoReturn:
        later = signal.SIG_IGN if started_by_torchrun() else signal.SIG_DFL
        for each in signals:
            signal.signal(each, later)
        raise Stopped(signum)

    with ExitStack() as stack:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # it is something else in a notebook
                before = {"errors": stream.errors, "line_buffering": stream.line_buffering}
                stack.callback(stream.reconfigure, **before)
                stream.reconfigure(errors="backslashreplace", line_buffering=True)
        backend = os.environ.pop("MPLBACKEND", None)  # that of a notebook may not be installed here
        if backend is not None:
            stack.callback(os.environ.__setitem__, "MPLBACKEND", backend)
        handler = stop if process_rank() == 0 else signal.SIG_DFL
        for signum in signals:
            stack.callback(signal.signal, signum, signal.signal(signum, handler))
        yield


def keep_freed_memory() -> None:
    """Let glibc, on Linux, keep what a training step frees for the next one.

    It otherwise gives memory back to the system, which clears it before it is used again.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        trim_threshold = -1  # this and the next one: numbers of settings in malloc.h
        mmap_threshold = -3
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, 2**30)  # bytes that it keeps
        libc.mallopt(mmap_threshold, 2**25)  # bytes of the largest piece; glibc takes no more


def run_script() -> NoReturn:
    """Run this process's command line."""
    keep_freed_memory()
    with own_process():
        code = main(sys.argv[1:])
        if code == NO_READER:  # or Python complains at exit of what it cannot print
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    atexit.register(gc.freeze)  # or Python takes half a second to look for garbage as it exits
    sys.exit(code)


if __name__ == "__main__" and "__file__" in globals():  # not when pasted into a notebook
    run_script()

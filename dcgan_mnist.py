# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11.0", "torchvision>=0.26.0", "torchsummary>=1.5.1",
#                 "matplotlib>=3.9.0", "Pillow>=11.0.0", "tqdm>=4.66.1"]
# ///
"""DCGAN on MNIST in one file: watch handwritten digits grow out of noise.

    python dcgan_mnist.py --generate 100               draw digits now, with the generator included
    python dcgan_mnist.py --epochs 10                  train on the 10,000 bundled digits, offline
    python dcgan_mnist.py --recipe quick --epochs 2    train for less than a minute
    python dcgan_mnist.py --dry-run                    check an installation in six steps
    python dcgan_mnist.py --resume                     go on with the run in the folder "result"

The generator turns noise into images. The noise z is a vector of 100 numbers for each image, drawn
from the normal distribution N(0, 1). The discriminator learns to tell real digits from generated
ones; the generator learns to draw digits that the discriminator takes for real. After Radford, Metz
and Chintala (2016), "Unsupervised Representation Learning with Deep Convolutional Generative
Adversarial Networks", arXiv:1511.06434.

Read the file from top to bottom. The algorithm comes first:

    networks             generator, discriminator, their first weights (weights_init), summaries
    settings             the numbers that shape a run
    data                 the real digits, their order in an epoch, random numbers
    one training step    optimisers, loss, the two halves of the step; drawing from noise
    training             epochs, batches and their noise, log

The rest makes it a tool: speed, pictures (grids of digits), scores, files, commands, command line.
README.md says which files are written, and when.
"""

import copy
import dataclasses
import functools
import gzip
import hashlib
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
from argparse import (
    SUPPRESS,
    ArgumentParser,
    ArgumentTypeError,
    Namespace,
    RawDescriptionHelpFormatter,
    _ArgumentGroup,
)
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim.swa_utils import get_ema_multi_avg_fn, update_bn
from torchsummary import summary
from tqdm import tqdm

LATENT_DIM = 100  # numbers of noise that make one digit
WIDTH = 128  # channels of the layers next to the image; the others have 2 and 4 times as many
SAMPLES = 50  # digits in the picture of an epoch: five rows of ten
SCORED = 2000  # digits drawn for the score of an epoch
EVALUATED = 10_000  # digits drawn for the score of a finished run
PROGRAM = "dcgan_mnist.py"
NORM_SAMPLES = 1000  # digits drawn for the statistics of the averaged generator's BatchNorm layers
HOME = Path(__file__).resolve().parent
BUNDLED = HOME / "MNIST"  # the data folder
EXAMPLE = HOME / "result" / "example" / "generator.pt"  # a trained generator, to draw with at once


class Failure(Exception):  # noqa: N818 (no error of the program)
    """Something outside the program went wrong, a full disk for one. The user gets the message."""


class WrongInput(Failure):
    """Something that the user got wrong, such as a flag."""


class Stopped(KeyboardInterrupt):
    """The user or the system wants the program to end; the message says how to go on."""

    def __init__(self, signum: int, message: str = "to start over, run the same command") -> None:
        super().__init__(message)
        self.signum = signum


# =========================================== networks ===========================================
class Generator(nn.Module):
    """Turn noise into images: (n, latent_dim, 1, 1) -> (n, channels, 28, 28) in [-1, 1]."""

    def __init__(self, latent_dim: int = LATENT_DIM, width: int = WIDTH, channels: int = 1) -> None:
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
            nn.ConvTranspose2d(width, channels, kernel_size=4, stride=2, padding=1),
            nn.Tanh(),  # (n, 1, 28, 28)
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z).float()  # layers that compute in bf16 return bf16


class Discriminator(nn.Module):
    """Judge images: (n, channels, 28, 28) in [-1, 1] -> (n,) probabilities of being real."""

    def __init__(self, width: int = WIDTH, channels: int = 1) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, kernel_size=4, stride=2, padding=1),  # (n, 128, 14, 14)
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
        """Return the log-odds of being real (n,), of which the loss is computed."""
        return self.layers(images).flatten().float()

    def forward(self, images: Tensor) -> Tensor:
        return torch.sigmoid(self.logits(images))


def weights_init(m: nn.Module) -> None:
    """Start a layer as the paper's code does.

    Weights of convolutions come from N(0, 0.02), those of BatchNorm from N(1, 0.02); biases are 0.
    """
    if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
        mean = 0.0
    elif isinstance(m, nn.BatchNorm2d):
        mean = 1.0
    else:
        return
    if m.weight is not None:
        nn.init.normal_(m.weight, mean, std=0.02)
    if m.bias is not None:
        nn.init.zeros_(m.bias)


def print_summaries() -> None:
    """Print the layers of both networks, the shapes of what they return, and their sizes."""
    with torch.random.fork_rng(devices=[]):  # because summary runs the networks
        summary(Generator(LATENT_DIM, WIDTH), (LATENT_DIM, 1, 1), device="cpu")
        summary(Discriminator(WIDTH), (1, 28, 28), device="cpu")


# =========================================== settings ===========================================
@dataclass(frozen=True)
class Settings:
    """What shapes a run: the same settings and digits give the same run on the same machine."""

    recipe: str = "article"  # which of the RECIPES the other defaults come from
    batch_size: int = 50  # digits in a training step
    lr: float = 0.0002  # learning rate of both networks; the paper's
    beta1: float = 0.5  # Adam's decay of the mean gradient; the paper found 0.9 to oscillate
    beta2: float = 0.999  # Adam's decay of the mean squared gradient
    generator_steps: int = 1  # updates of the generator in a training step
    ema: float = 0.05  # share of the steps so far that the generator's average spans; 0: none
    seed: int = 0  # where all random numbers start
    split: str = "test"  # MNIST's "test" split has 10,000 digits, its "train" split 60,000
    precision: str = "fp32"  # of the layers' arithmetic, or "bf16"; weights are always in fp32
    dry_run: bool = False  # only three steps an epoch


RECIPES = {  # defaults that differ from those above
    "article": {},  # as articles and tutorials train it
    "tuned": {"lr": 0.002, "beta2": 0.99, "generator_steps": 2},  # the best digits
    "quick": {"lr": 0.002, "beta2": 0.99, "batch_size": 25},  # readable digits in two epochs
}


# ============================================= data =============================================
def load_digits(data_dir: Path, split: str) -> tuple[Tensor, Tensor]:
    """Read a split, downloaded if it is missing: digits (n, 28, 28) of uint8, labels (n,).

    The files may be plain or gzipped; nothing is unpacked. Raises Failure.
    """
    prefix = {"train": "train", "test": "t10k"}[split]
    names = (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
    folder = folder_of_digits(data_dir, prefix)
    if folder is None:
        folder = data_dir / "MNIST" / "raw"
        download_digits(names, folder)
    try:
        digits, labels = (read_idx(folder / name) for name in names)
        if digits.shape[1:] != (28, 28) or len(digits) != len(labels):
            raise ValueError(f"found {tuple(digits.shape)} and {tuple(labels.shape)}")
    except Exception as error:  # whatever the bytes of a damaged file can cause
        both = " and ".join(names)
        raise Failure(
            f"{both} are missing or damaged ({error}); place sound ones in {folder}"
        ) from error
    return digits, labels.long()


def folder_of_digits(data_dir: Path, prefix: str) -> Path | None:
    """Return the folder with a split's files: MNIST/raw in the data folder, or else any there.

    Return None if there is none. Raises WrongInput if there are several.
    """
    pattern = f"{prefix}-*-ubyte*"
    usual = data_dir / "MNIST" / "raw"
    if any(usual.glob(pattern)):
        return usual
    found = sorted({path.parent for path in data_dir.rglob(pattern)})
    if len(found) > 1:
        raise WrongInput(
            f"argument --data-dir: digits are in {found[0]} and {found[1]}; choose one of them"
        )
    return found[0] if found else None


def read_idx(path: Path) -> Tensor:
    """Read a file in MNIST's format, or the same file gzipped, as a tensor of uint8."""
    if path.exists():
        content = path.read_bytes()
    else:
        content = gzip.decompress(path.with_name(f"{path.name}.gz").read_bytes())
    zero, kind, dimensions = struct.unpack_from(">HBB", content)
    if (zero, kind) != (0, 8):
        raise ValueError(f"{path.name} is not an IDX file of uint8")
    shape = struct.unpack_from(f">{dimensions}I", content, offset=4)
    values = torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=4 + 4 * dimensions)
    return values.reshape(shape)


def download_digits(names: tuple[str, str], folder: Path) -> None:
    """Download a split's two files, gzipped, into a folder. Raises Failure."""
    from torchvision.datasets import MNIST  # here and not above, for it takes a while

    wanted = [source for source in MNIST.resources if source[0].removesuffix(".gz") in names]
    with TemporaryDirectory() as temporary:

        class OneSplit(MNIST):  # which wants the files of both splits, this one only those named
            resources = wanted
            raw_folder = temporary

        try:
            OneSplit(temporary, train=names[0].startswith("train"), download=True)
            folder.mkdir(parents=True, exist_ok=True)
            for name in names:
                shutil.move(Path(temporary, f"{name}.gz"), folder)
        except Exception as error:  # whatever the network can cause
            both = " and ".join(names)
            raise Failure(
                f"{both} are missing and cannot be downloaded ({error}); place them in {folder}"
            ) from error


def sha256_of(digits: Tensor) -> str:
    """Return the check sum that tells digits (n, 28, 28) of uint8 from others, in hexadecimal."""
    return hashlib.sha256(digits.cpu().contiguous().numpy()).hexdigest()


SPLIT_OF_DIGITS = {  # MNIST's splits by sha256_of all its digits
    "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757": "train",
    "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161": "test",
}


def bundled_digits(split: str) -> Tensor:
    """Return MNIST's digits (n, 28, 28) of uint8. Raises Failure if others are in their place."""
    digits = load_digits(BUNDLED, split)[0]
    if SPLIT_OF_DIGITS.get(sha256_of(digits)) != split:
        raise Failure(f"the digits in {BUNDLED} are not MNIST's {split} split; scoring needs them")
    return digits


def to_images(digits: Tensor) -> Tensor:
    """Scale digits (n, 28, 28) of uint8 to images (n, 1, 28, 28) in [-1, 1]."""
    return digits.unsqueeze(1).float() / 127.5 - 1


# Every use of random numbers starts anew from the run's seed, so that none depends on what came
# before it. Epochs 1, 2, ... have the streams 1, 2, ...: the order of the digits and the noise.
FIXED_NOISE = 0  # the noise of the pictures, the same after every epoch
DRAWING = -1  # the noise of scores and of --generate
NORM_STATISTICS = -2  # the noise from which the averaged generator takes BatchNorm's statistics


def random_stream(seed: int, stream: int, device: str | torch.device = "cpu") -> torch.Generator:
    """Return the random numbers of an epoch or of another use named above, from their start."""
    return torch.Generator(device).manual_seed(seed * 2**20 + stream)


def make_noise(count: int, seed: int, stream: int) -> Tensor:
    """Draw noise (count, latent_dim, 1, 1) on the CPU, so that it is the same for any device."""
    return torch.randn(count, LATENT_DIM, 1, 1, generator=random_stream(seed, stream))


def order_of_epoch(digits: Tensor, seed: int, epoch: int) -> Tensor:
    """Return the indices (n,) of digits (n, 28, 28) as an epoch sees them, on their device."""
    order = torch.randperm(len(digits), generator=random_stream(seed, epoch))
    return order.to(digits.device)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let torch's default random numbers on the CPU start at a seed, for a while."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU too
        yield


# ====================================== one training step =======================================
def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return a context in which layers compute in "fp32" or "bf16"; their weights stay in fp32.

    It keeps the weights that it has cast, so it must end before an optimiser changes them. Each
    call of a network has one of its own: within one, bf16 gradients would be summed in bf16.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


class DCGAN:
    """Both networks and their optimisers, and the averaged generator, which draws all digits."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        with seeded(settings.seed):
            self.generator = Generator(LATENT_DIM, WIDTH).apply(weights_init)
            self.discriminator = Discriminator(WIDTH).apply(weights_init)
        for network in (self.generator, self.discriminator):
            network.to(device=device, memory_format=torch.channels_last)  # the fastest layout
        self.average = copy.deepcopy(self.generator).eval().requires_grad_(False)
        betas = (settings.beta1, settings.beta2)
        adam = functools.partial(
            torch.optim.Adam,
            lr=settings.lr,
            betas=betas,
            fused=True,  # the fastest implementation
            capturable=True,  # so that a CUDA graph can record it
        )
        self.optimizer_g = adam(self.generator.parameters())
        self.optimizer_d = adam(self.discriminator.parameters())
        self.settings = settings
        self.device = device
        self.epoch = 0  # epochs done

    def autocast(self) -> torch.autocast:
        """Return a context in which layers compute in the run's precision."""
        return autocast(self.device, self.settings.precision)

    def update_average(self, steps: int) -> None:
        """Bring the average of the generator's weights up to date after so many steps in all.

        It is an exponential moving average that spans more steps the longer the run is: early
        weights, which draw badly, are soon forgotten; late ones, which waver, are averaged.
        """
        span = max(self.settings.ema * steps, 1)  # with 1 it equals the generator
        average = get_ema_multi_avg_fn(decay=1 - 1 / span)
        average(list(self.average.parameters()), list(self.generator.parameters()), None)

    def fit_norm_statistics(self) -> None:
        """Give the averaged generator's BatchNorm layers the statistics of its own weights."""
        z = make_noise(NORM_SAMPLES, self.settings.seed, NORM_STATISTICS)
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

    def restore(self, checkpoint: dict) -> None:
        """Go back to where a checkpoint was made."""
        for name, part in self.parts().items():
            part.load_state_dict(checkpoint[name])
        self.epoch = checkpoint["epoch"]


# The figures of a step, in the order in which training_step returns them, and their log line. ds is
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
    """
    noise, *more_noise = z.split(len(real))
    with gan.autocast():
        fake = gan.generator(noise)  # (n, 1, 28, 28) in [-1, 1]

    # (1) The discriminator: maximise log D(x) + log(1 - D(G(z))), the negative of its loss.
    gan.discriminator.requires_grad_(True)
    gan.optimizer_d.zero_grad()
    with gan.autocast():
        on_real = gan.discriminator.logits(real)  # (n,)
    with gan.autocast():
        on_fake = gan.discriminator.logits(fake.detach())  # no gradient for the generator
    ds_loss = bce(on_real, torch.ones_like(on_real)) + bce(on_fake, torch.zeros_like(on_fake))
    ds_loss.backward()
    gan.optimizer_d.step()

    # (2) The generator: maximise log D(G(z)), the negative of its loss, against the updated
    # discriminator. That one is frozen: the gradient passes through it, but none is computed for
    # its weights.
    gan.discriminator.requires_grad_(False)
    on_fake_after, gn_loss = update_generator(gan, fake)
    for noise in more_noise:
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
    loss.backward()
    gan.optimizer_g.step()
    return on_fake, loss


@torch.no_grad()
def draw(generator: nn.Module, z: Tensor, precision: str = "fp32") -> Tensor:
    """Draw digits from noise (n, latent_dim, 1, 1): uint8 (n, 28, 28) on the CPU, 0 is black."""
    device = next(generator.parameters()).device
    digits = []
    for part in z.split(100):  # a few at a time, for little memory
        with autocast(device, precision):
            images = generator(part.to(device)).squeeze(1)  # in [-1, 1]
        digits.append(((images + 1) * 127.5).round().byte().cpu())
    return torch.cat(digits)


# =========================================== training ===========================================
# training_step for one DCGAN: (real, z) -> STATS, which the next step may overwrite
Step = Callable[[Tensor, Tensor], Tensor]


def train_epochs(
    gan: DCGAN, step: Step, digits: Tensor, epochs: int, log_every: int
) -> Iterator[Tensor]:
    """Train until ``epochs`` are done; after each, yield the STATS of its steps (steps, 5).

    ``gan`` is then complete: it can be scored, saved and drawn with. Raises Failure if training
    diverges.
    """
    while gan.epoch < epochs:
        title = f"Epoch {gan.epoch + 1}/{epochs}"
        print(title)
        stats = train_epoch(gan, step, digits, title, log_every)
        gan.epoch += 1
        gan.fit_norm_statistics()
        yield stats


def train_epoch(gan: DCGAN, step: Step, digits: Tensor, title: str, log_every: int) -> Tensor:
    """Train on every digit once, in a new order; return the STATS of each step (steps, 5).

    A dry run takes three steps only.
    """
    seed = gan.settings.seed
    epoch = gan.epoch + 1
    # no DataLoader is needed: all digits are in one tensor, on the device
    batches = order_of_epoch(digits, seed, epoch).split(gan.settings.batch_size)
    if gan.settings.dry_run:
        batches = batches[:3]
    noise = random_stream(seed, epoch, gan.device)
    stats = torch.zeros(len(batches), len(STATS), device=gan.device)
    with progress_bar(batches, desc=title, unit="step") as progress:
        for i, index in enumerate(progress):
            count = gan.settings.generator_steps * len(index)
            z = torch.randn(count, LATENT_DIM, 1, 1, generator=noise, device=gan.device)
            stats[i] = step(to_images(digits[index]), z)
            gan.update_average(gan.epoch * len(batches) + i + 1)
            logged = i % log_every == 0
            if logged or i + 1 == len(batches):  # only here the CPU waits for a GPU
                check_finite(gan, stats[: i + 1], title)
            if logged:
                figures = dict(zip(STATS, stats[i].tolist(), strict=True))
                tqdm.write(LOG_LINE.format(step=i + 1, steps=len(batches), **figures))
    return stats


def progress_bar(items: Sequence | None = None, **options: object) -> tqdm:
    """Return a tqdm bar over items, shown on a terminal or in a notebook, but not in a log file."""
    if type(sys.stdout).__module__ == "ipykernel.iostream":
        # A notebook is no terminal but can show a bar. It gets bar and log in one stream, because
        # it would show two streams one after the other, with pieces of the bar between them.
        return tqdm(items, leave=False, file=sys.stdout, **options)
    return tqdm(items, leave=False, disable=None, **options)  # None: unless it is no terminal


def check_finite(gan: DCGAN, stats: Tensor, title: str) -> None:
    """Raise Failure if a figure of the steps so far, (steps, 5), or a weight is not finite."""
    finite = stats.isfinite().all(dim=1)
    weights = [*gan.generator.parameters(), *gan.discriminator.parameters()]
    finite[-1] &= nn.utils.get_total_norm(weights).isfinite()
    if not finite.all():
        step = finite.tolist().index(False) + 1
        raise Failure(f"training diverged at step {step} of {title}; start again with a lower --lr")


# ============================================ speed =============================================
def pick_device(name: str, local_rank: int) -> torch.device:
    """Return the device to compute on. Raises WrongInput if it is not there."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(device for device in there if there[device])  # the fastest
    if not there[name]:
        missing = f"this machine has no {name}, or its PyTorch cannot use it"
        raise WrongInput(f"argument --device: {missing}; cpu always works")
    if name == "cuda" and local_rank >= torch.cuda.device_count():
        raise OSError(f"there is no GPU number {local_rank}: start fewer processes")
    return torch.device(name, local_rank) if name == "cuda" else torch.device(name)


def has_bf16(device: torch.device) -> bool:
    """Tell whether a device computes in bf16 as fast as in fp32 or faster."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return False


@contextmanager
def computing_on(device: torch.device) -> Iterator[None]:
    """Compute the same every time; on a GPU, on a stream on which graphs can be recorded."""
    deterministic = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        if device.type == "cuda":
            with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream()):
                yield
        else:
            yield
    finally:
        torch.backends.cudnn.deterministic = deterministic


# On CPUs, a convolution without padding is faster as one product of two matrices: its weights and
# the patches of the image that its kernel sees, a row for each. The transposed convolution is the
# same backwards: the product gives patches, which are added up to an image.
class Patches(torch.autograd.Function):
    """Copy all patches out of images: (n, h, w, c) -> (n, rows, columns, kernel, kernel, c).

    The patches must reach the last pixel. The gradient is a PatchSum.
    """

    @staticmethod
    def forward(ctx, images: Tensor, kernel: int, stride: int) -> Tensor:
        ctx.stride = stride
        patches = images.unfold(1, kernel, stride).unfold(2, kernel, stride)
        return patches.permute(0, 1, 2, 4, 5, 3).contiguous()  # the channels come last

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return PatchSum.apply(gradient, ctx.stride), None, None


class PatchSum(torch.autograd.Function):
    """Add patches up to images: (n, rows, columns, kernel, kernel, c) -> (n, h, w, c).

    The gradient is that of a sum: the Patches of the images' gradient.
    """

    @staticmethod
    def forward(ctx, patches: Tensor, stride: int) -> Tensor:
        n, rows, columns, kernel, _, channels = patches.shape
        ctx.kernel = kernel
        ctx.stride = stride
        height = (rows - 1) * stride + kernel
        width = (columns - 1) * stride + kernel
        wide = torch.promote_types(patches.dtype, torch.float32)  # sums in bf16 would lose digits
        images = patches.new_zeros(n, height, width, channels, dtype=wide)
        for y in range(kernel):
            for x in range(kernel):
                end_y = y + rows * stride
                end_x = x + columns * stride
                images[:, y:end_y:stride, x:end_x:stride] += patches[:, :, :, y, x]
        return images.to(patches.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return Patches.apply(gradient, ctx.kernel, ctx.stride), None


class Product(nn.Module):
    """A convolution without padding that is computed as a product, with the layer's parameters."""

    def __init__(self, layer: nn.Conv2d | nn.ConvTranspose2d) -> None:
        super().__init__()
        self.weight = layer.weight
        self.bias = layer.bias
        self.stride = layer.stride[0]


class ProductConv2d(Product):
    """Conv2d: (n, c, h, w) -> (n, filters, rows, columns)."""

    def forward(self, images: Tensor) -> Tensor:
        weights = self.weight.permute(0, 2, 3, 1)  # (filters, kernel, kernel, c)
        patches = Patches.apply(images.permute(0, 2, 3, 1), weights.shape[1], self.stride)
        results = nn.functional.linear(patches.flatten(3), weights.flatten(1), self.bias)
        return results.permute(0, 3, 1, 2)


class ProductConvTranspose2d(Product):
    """ConvTranspose2d: (n, c, rows, columns) -> (n, filters, h, w)."""

    def forward(self, images: Tensor) -> Tensor:
        weights = self.weight.permute(0, 2, 3, 1)  # (c, kernel, kernel, filters)
        patches = images.permute(0, 2, 3, 1) @ weights.flatten(1)
        results = PatchSum.apply(patches.unflatten(3, weights.shape[1:]), self.stride)
        results = results + self.bias.to(results.dtype)
        return results.permute(0, 3, 1, 2)


def use_products(network: Generator | Discriminator) -> None:
    """Replace the convolutions without padding by products; the parameters stay the same."""
    for i, layer in enumerate(network.layers):
        if isinstance(layer, nn.Conv2d) and layer.padding == (0, 0):
            network.layers[i] = ProductConv2d(layer)
        elif isinstance(layer, nn.ConvTranspose2d) and layer.padding == (0, 0):
            network.layers[i] = ProductConvTranspose2d(layer)


class GraphedStep:
    """training_step on a GPU, replayed from a CUDA graph: one launch instead of hundreds."""

    WARM_UP = 3  # full batches before the recording; by then everything is allocated

    def __init__(self, gan: DCGAN) -> None:
        self.gan = gan
        self.full_batches = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.real: Tensor | None = None  # what the graph reads
        self.z: Tensor | None = None
        self.stats: Tensor | None = None  # what it writes; the next replay overwrites it

    def __call__(self, real: Tensor, z: Tensor) -> Tensor:
        if len(real) < self.gan.settings.batch_size:  # the rest of an epoch fits no graph
            return training_step(self.gan, real, z)
        self.full_batches += 1
        if self.full_batches == self.WARM_UP + 1:
            self.record(real, z)
        if self.graph is None:
            return training_step(self.gan, real, z)
        self.real.copy_(real)
        self.z.copy_(z)
        self.graph.replay()
        return self.stats

    def record(self, real: Tensor, z: Tensor) -> None:
        """Record the step in a graph that reads copies of the batch; nothing is computed yet."""
        self.real = real.clone()
        self.z = z.clone()
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                self.stats = training_step(self.gan, self.real, self.z)
            self.graph = graph
        except RuntimeError as error:
            reason = str(error).split("\n")[0]
            print(f"warning: no CUDA graph, so steps take longer: {reason}")


@dataclass(frozen=True)
class Processes:
    """The processes of a run that torchrun started: which one this is, and what they exchange."""

    rank: int = 0  # of this process; the first one, 0, reads, writes and prints
    count: int = 1
    local_rank: int = 0  # of this process among those on its machine: the number of its GPU

    @contextmanager
    def connected(self, device: torch.device) -> Iterator[None]:
        """Connect the processes for a while. Raises Failure if they lose each other."""
        if self.count == 1:
            yield
            return
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        except (dist.DistError, ValueError) as error:
            raise Failure(f"the processes of this run cannot connect: {error}") from error
        try:
            with lost_process_is_failure(dist.DistError):
                yield
        finally:
            dist.destroy_process_group()

    def broadcast(self, value: object) -> object:
        """Return the first process's value in every process. Raises Failure."""
        values = [value]
        if self.count > 1:
            with lost_process_is_failure(RuntimeError):
                dist.broadcast_object_list(values)
        return values[0]

    def average(self, tensor: Tensor) -> None:
        """Replace a tensor by its mean over the processes, in all of them. Raises Failure."""
        with lost_process_is_failure(RuntimeError):
            dist.all_reduce(tensor)
        tensor /= self.count


@contextmanager
def lost_process_is_failure(kind: type[Exception]) -> Iterator[None]:
    """Turn an error of the communication into the line that says what happened.

    ``kind`` is RuntimeError around a call that only communicates, DistError around all else.
    """
    try:
        yield
    except kind as error:
        reason = textwrap.shorten(str(error), 200)
        raise Failure(
            f"a process of this run has ended; use --resume to continue ({reason})"
        ) from error


class SharedStep:
    """training_step in several processes at once, each with its share of the batch.

    Gradients and figures are means over the processes, also of a last batch with unequal shares.
    """

    def __init__(self, gan: DCGAN, processes: Processes) -> None:
        self.gan = gan
        self.processes = processes
        for network in (gan.generator, gan.discriminator):
            if gan.device.type == "cuda":  # BatchNorm's statistics are then of the whole batch
                nn.SyncBatchNorm.convert_sync_batchnorm(network)
            for parameter in network.parameters():
                parameter.register_post_accumulate_grad_hook(self.average_gradient)

    def __call__(self, real: Tensor, z: Tensor) -> Tensor:
        own_z = [self.share(noise) for noise in z.split(len(real))]
        stats = training_step(self.gan, self.share(real), torch.cat(own_z))
        self.processes.average(stats)
        return stats

    def share(self, batch: Tensor) -> Tensor:
        """Return this process's share of a batch (n, ...)."""
        return batch.tensor_split(self.processes.count)[self.processes.rank]

    def average_gradient(self, parameter: Tensor) -> None:
        self.processes.average(parameter.grad)


def fastest_step(gan: DCGAN, processes: Processes) -> Step:
    """Return the fastest training step for this device; on a CPU, layers are replaced for it."""
    if gan.device.type == "cpu":
        use_products(gan.generator)
        use_products(gan.discriminator)
    if processes.count > 1:
        return SharedStep(gan, processes)
    if gan.device.type == "cuda":
        return GraphedStep(gan)
    return functools.partial(training_step, gan)


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


def stages(samples: Tensor, real: Tensor) -> list[Image.Image]:
    """Return grids of one size: at most ten epochs of samples (epochs, n, 28, 28), evenly chosen,
    then the real digits (m, 28, 28)."""
    epochs = len(samples)
    shown = torch.linspace(1, epochs, min(epochs, 10)).round().int().tolist()
    pictures = [grid(samples[epoch - 1], f"epoch {epoch}") for epoch in shown]
    last = grid(real, "real digits").crop((0, 0, *pictures[0].size))  # m may be smaller than n
    return [*pictures, last]


def stacked(pictures: list[Image.Image]) -> Image.Image:
    """Return pictures of one width as one, each below the one before."""
    return Image.fromarray(np.vstack([np.asarray(picture) for picture in pictures]))


def curves(history: dict[str, Tensor]) -> Image.Image:
    """Draw a run's figures, each (steps,), over the steps: losses, distance, outputs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = len(history["ds_loss"])
    group = math.ceil(steps / 400)  # steps to a point, so that curves of any length are clear

    def plot(panel, label: str, scale: str, names: tuple[str, ...]) -> None:
        for name in names:
            points = [part.mean() for part in history[name].split(group)]
            panel.plot(range(1, steps + 1, group), points, label=name)
        panel.set(ylabel=label, yscale=scale)
        panel.grid(alpha=0.3)
        panel.legend(loc="center left", bbox_to_anchor=(1, 0.5))

    figure = Figure(figsize=(10, 10), layout="constrained")
    losses, distance, outputs = figure.subplots(3, sharex=True)
    plot(losses, "cross-entropy", "linear", ("ds_loss", "gn_loss"))
    plot(distance, "Frechet distance to real digits", "log", ("fd",))
    plot(outputs, "mean output", "linear", ("true_out", "fake_out_before", "fake_out_after"))
    outputs.set(xlabel=f"step (mean of {group})", ylim=(0, 1))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def nearest(digits: Tensor, real: Tensor) -> Image.Image:
    """Show 20 of the digits (n, 28, 28), each above the real one (m, 28, 28) nearest in pixels."""
    digits = digits[torch.arange(20) % len(digits)]
    distances = torch.cdist(digits.flatten(1).float(), real.flatten(1).float())
    found = real[distances.argmin(dim=1)]
    return grid(torch.cat([digits[:10], found[:10], digits[10:], found[10:]]))


# ============================================ scores ============================================
SCORES = ("fd", "digits", "evenness", "confident")  # of an epoch; --evaluate adds three
SCORE_LINE = (
    "score: FD {fd:.1f} (floor {floor:.1f}) - digits {digits}/10 - evenness {evenness:.2f}"
    " - confident {confident:.2f}"
)
SCORER = BUNDLED / "scorer.pt"  # made by MNIST/make_scorer.py
# the figures of another judge could not be compared
SCORER_SHA256 = "d782c3e5e0288462ac378926cc78c83b3790ca0ea3258a17bbd15e39732642f4"
UNSEEN = {"train": "test", "test": "train"}  # what a run on a split is compared with
NEIGHBOURS = 5  # of a real digit that bound its neighbourhood, as in Naeem et al.


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
        images = (to_images(part.to(device)) for part in digits.split(500))
        features = torch.cat([self.features(part) for part in images])
        probabilities = self.head(features).softmax(dim=1)
        return 10 * features.cpu(), probabilities.cpu()


def read_scorer() -> dict:
    """Read the classifier and the figures of real digits. Raises Failure if they are not ours."""
    try:
        content = SCORER.read_bytes()
    except OSError as error:
        raise Failure(f"cannot read {SCORER} ({error.strerror})") from error
    if hashlib.sha256(content).hexdigest() != SCORER_SHA256:
        raise Failure(f"{SCORER} is not the included scorer; scores of another cannot be compared")
    return torch.load(io.BytesIO(content), weights_only=True)  # runs no code


def load_classifier(content: dict, device: torch.device) -> Classifier:
    """Return the classifier in what read_scorer returns, ready to judge."""
    with torch.random.fork_rng(devices=[]):  # new weights draw from the caller's random numbers
        classifier = Classifier()
    classifier.load_state_dict(content["classifier"])
    return classifier.to(device).eval().requires_grad_(False)


class Scorer:
    """Tell how good the digits of a model are that was trained on a split of MNIST.

    They are compared with the other split, which the model has not seen. ``floors`` has, by the
    number of digits, what as many real ones of the split that it has seen get.
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


def some(digits: Tensor, count: int) -> Tensor:
    """Return ``count`` of the digits (n, ...), chosen at random, but the same ones every time."""
    order = torch.randperm(len(digits), generator=random_stream(seed=0, stream=0))
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

    All are features, (n, d) and twice (m, d), of as many digits that training saw as it did not.
    The share is about 0.5 if nothing is copied, and 1 if all are copies of those given.
    """
    copies = 0
    for part in drawn.split(500):
        nearest_seen = torch.cdist(part, seen).amin(dim=1)
        nearest_unseen = torch.cdist(part, unseen).amin(dim=1)
        copies += (nearest_seen < nearest_unseen).sum().item()
    return copies / len(drawn)


def signs_of_collapse(epoch: dict[str, Tensor], before: dict[str, Tensor]) -> list[str]:
    """List the signs of a collapse in the figures of an epoch's steps, each (steps,) by its name.

    ``before`` has the figures of all earlier steps. A score is bad only beside a better one there.
    """
    signs = []
    if epoch["ds_loss"].max() < 0.05:
        signs.append("ds_loss stayed under 0.05")
    scored = before["fd"].isfinite()  # an epoch without scores has NaN
    if scored.any():
        digits = epoch["digits"][0]
        most = before["digits"][scored].max()
        if digits <= most - 3:
            signs.append(f"digits fell from {most:.0f} to {digits:.0f}")
        if epoch["fd"][0] > 2 * before["fd"][scored].min():
            signs.append("FD is more than twice its best")
    return signs


# ============================================ files =============================================
CHECKPOINT = "checkpoint.pt"
BEST = "generator_best.pt"
REAL_SAMPLES = "real_samples.png"
TIMELINE = "timeline.png"
ANIMATION = "training.gif"
CURVES = "loss_curve.png"
HISTORY = "history.csv"
GENERATED = "generated.png"
GENERATED_DIGITS = "generated.npy"
INTERPOLATION = "interpolation.png"
SCORE = "score.json"
NEAREST = "nearest.png"
# of a checkpoint: one more whenever networks, figures or Run.checkpoint change; EXAMPLE has it too
FORMAT = 4


def epoch_picture(epoch: int) -> str:
    """Return the name of the picture of an epoch."""
    return f"generated_epoch_{epoch:03d}.png"


def is_ours(name: str) -> bool:
    """Tell whether a file's name is exactly one that the program writes."""
    names = {CHECKPOINT, BEST, REAL_SAMPLES, TIMELINE, ANIMATION, CURVES, HISTORY}
    names |= {GENERATED, GENERATED_DIGITS, INTERPOLATION, SCORE, NEAREST}
    if name in names:
        return True
    match = re.fullmatch(r"generated_epoch_([0-9]{3,9})\.png", name)
    epoch = int(match[1]) if match else 0
    return epoch > 0 and name == epoch_picture(epoch)


def command_line(*arguments: object) -> str:
    """Return the command, as this system's shell takes it, that runs the program from here."""
    path = Path(__file__).resolve()
    script = path.name if path.parent == Path.cwd() else path
    words = ["python", *(str(word) for word in (script, *arguments))]
    return subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words)


@contextmanager
def unusable_is_wrong_input(folder: Path) -> Iterator[None]:
    """Raise WrongInput for whatever is wrong with an output folder or its name."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise WrongInput(f"argument --output-dir: {folder} cannot be used: {reason}") from error


class RunFolder:
    """The output folder: its lock, what is written when, what is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock_handle: int | None = None

    def has_run(self) -> bool:
        """Tell whether the folder holds a run, be it one that was moved into a folder below it."""
        checkpoint = self.path / CHECKPOINT
        return checkpoint.exists() or bool(moved_away(checkpoint))

    def begin(self, dry_run: bool) -> None:
        """Make and lock the folder, and move the files of an earlier run into one below it.

        A dry run is refused where a run is. Raises Failure and leaves all files where they were.
        """
        self.make()
        self.lock()
        for path in self.path.glob(".*.tmp"):  # half-written by a run that was killed
            if is_ours(path.name.removeprefix(".").removesuffix(".tmp")):
                path.unlink()
        files = [path for path in sorted(self.path.iterdir()) if is_ours(path.name)]
        if files and dry_run:
            held = f"{self.path} already holds {files[0].name}"
            raise WrongInput(f"argument --output-dir: {held}; choose another folder for a dry run")
        if files:
            self.move_away(files)

    def resume(self) -> dict:
        """Lock the folder and return the checkpoint of its run. Raises Failure."""
        if self.path.is_dir():
            self.make()
            self.lock()
        return read_checkpoint(self.path / CHECKPOINT)

    def make(self) -> None:
        """Make the folder if it is missing. Raises WrongInput if nothing can be written there."""
        with unusable_is_wrong_input(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable.tmp"
            probe.touch()
            probe.unlink()

    def lock(self) -> None:
        """Keep other runs out until ``close``. Raises Failure if one is in the folder."""
        try:
            import fcntl
        except ImportError:  # on Windows, which can lock no folder
            return
        self.lock_handle = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self.lock_handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Failure(
                f"another run is using {self.path}; choose another --output-dir"
            ) from error
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
        try:
            previous.mkdir()
            for path in files:
                path.rename(previous / path.name)
        except BaseException as error:  # Ctrl-C too must not leave half a run in each folder
            for path in files:
                if (previous / path.name).exists():
                    (previous / path.name).rename(path)
            if previous.exists():
                previous.rmdir()
            if isinstance(error, OSError):
                advice = "close any program that has its files open, or choose another --output-dir"
                raise Failure(
                    f"cannot move the earlier run to {previous} ({error}); {advice}"
                ) from error
            raise
        print(f"Moved the earlier files in {self.path} to {previous}")
        if self.path / CHECKPOINT in files:
            print(f"To go on with that run: {command_line('--resume', '--output-dir', previous)}")

    def save(self, checkpoint: dict, best_generator: dict | None) -> None:
        """Write the checkpoint of an epoch, after the best generator if it is a new one."""
        if best_generator is not None:
            with self.writing(BEST) as file:
                torch.save(best_generator, file)
        with self.writing(CHECKPOINT) as file:
            torch.save(checkpoint, file)

    def write_pictures(self, samples: Tensor, real: Tensor, history: dict[str, Tensor]) -> None:
        """Bring pictures and table up to date; one that cannot be written costs a warning.

        ``samples`` (epochs, n, 28, 28) and ``real`` (m, 28, 28) are digits of uint8; ``history``
        has the figures of each step (steps,) by their names.
        """
        with self.redrawing(REAL_SAMPLES) as file:
            grid(real).save(file, "PNG")
        for epoch, digits in enumerate(samples, start=1):
            if not (self.path / epoch_picture(epoch)).exists():
                with self.redrawing(epoch_picture(epoch)) as file:
                    grid(digits).save(file, "PNG")
        frames = stages(samples, real)
        with self.redrawing(TIMELINE) as file:
            stacked(frames).save(file, "PNG")
        with self.redrawing(ANIMATION) as file:
            times = [600] * (len(frames) - 1) + [2000]  # ms; the real digits stay longer
            frames[0].save(
                file, "GIF", save_all=True, append_images=frames[1:], duration=times, loop=0
            )
        with self.redrawing(HISTORY) as file:
            table = torch.column_stack(list(history.values()))
            np.savetxt(file, table, "%.6g", ",", header=",".join(history), comments="")
        with self.redrawing(CURVES) as file:
            curves(history).save(file, "PNG")

    @contextmanager
    def redrawing(self, name: str) -> Iterator[io.BytesIO]:
        """Like ``writing``, for a file that can be drawn again: warn if it cannot be written."""
        try:
            with self.writing(name) as file:
                yield file
        except Failure as failure:
            print(f"warning: {failure}; it is drawn again after the next epoch, or by --resume")

    @contextmanager
    def writing(self, name: str) -> Iterator[io.BytesIO]:
        """Give a buffer whose content becomes the file at the end: whole, or not at all.

        Raises Failure if it cannot be written; what was there before is then still there.
        """
        buffer = io.BytesIO()
        yield buffer
        path = self.path / name
        temporary = self.path / f".{name}.tmp"
        try:
            with temporary.open("wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            move_into_place(temporary, path)
        except OSError as error:
            raise Failure(f"cannot write {path} ({error.strerror or error})") from error
        finally:
            with suppress(OSError):  # the folder may be gone
                temporary.unlink(missing_ok=True)


def moved_away(path: Path) -> list[Path]:
    """Return where new runs have moved files of this path, the earliest first."""
    return sorted(path.parent.glob(f"previous_*/{path.name}"))


def move_into_place(temporary: Path, path: Path) -> None:
    """Rename a file. On Windows, wait up to 1.5 s for a virus scanner that holds one of them."""
    waits = (0.1, 0.2, 0.4, 0.8) if sys.platform == "win32" else ()
    for wait in waits:
        try:
            temporary.replace(path)
            return
        except PermissionError:
            time.sleep(wait)
    temporary.replace(path)


def read_checkpoint(path: Path) -> dict:
    """Read a checkpoint or a best generator. Raises Failure if it is missing or damaged."""
    if not path.exists():
        advice = "train first, or choose another --output-dir"
        moved = moved_away(path)
        if moved:  # by a run that then ended before its first epoch did
            advice += f": the latest earlier run is in {moved[-1].parent}"
        raise Failure(f"there is no {path}; {advice}")
    data = io.BytesIO(path.read_bytes())
    with damage_is_failure(path):
        with zipfile.ZipFile(data) as archive:
            wrong = archive.testzip()
        if wrong is not None:
            raise ValueError(f"wrong check sum of {wrong}")
        data.seek(0)
        checkpoint = torch.load(data, map_location="cpu", weights_only=True)  # runs no code
        found = checkpoint.get("format", 1)
        if found == FORMAT:
            missing = {"epoch", "digits_sha256", "made_with", "average"} - checkpoint.keys()
            if missing:
                raise ValueError(f"it lacks {' and '.join(sorted(missing))}")
            checkpoint["settings"] = Settings(**checkpoint["settings"])
    if found != FORMAT:
        versions = f"it has format {found}, this one {FORMAT}"
        raise Failure(f"{path} is from another version of this program: {versions}; train again")
    return checkpoint


@contextmanager
def damage_is_failure(path: Path) -> Iterator[None]:
    """Raise Failure for whatever zipfile or torch raises on a damaged or foreign file."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = textwrap.shorten(str(error), 200)
        raise Failure(
            f"{path} is damaged or is not a checkpoint of this program: {reason}"
        ) from error


def read_generator(path: Path, device: torch.device) -> tuple[Generator, dict]:
    """Return the averaged generator in a checkpoint, and the checkpoint. Raises Failure."""
    checkpoint = read_checkpoint(path)
    with torch.random.fork_rng(devices=[]):  # new weights draw from the caller's random numbers
        generator = Generator(LATENT_DIM, WIDTH)
    with damage_is_failure(path):
        generator.load_state_dict(checkpoint["average"])
    generator.to(device=device, memory_format=torch.channels_last)
    return generator.eval().requires_grad_(False), checkpoint


def load_generator(
    folder: Path | str | None = None, best: bool = False, device: str | torch.device = "cpu"
) -> Generator:
    """Load the generator of a run's last epoch, or of its best one, to draw with.

    Without a folder, it is the one that comes with the program. It takes noise (n, 100, 1, 1) on
    its device, returns images (n, 1, 28, 28) in [-1, 1], is in eval mode, in fp32, and needs no
    gradient. Raises Failure if there is none or it is damaged.
    """
    path = EXAMPLE if folder is None else Path(folder) / (BEST if best else CHECKPOINT)
    return read_generator(path, torch.device(device))[0]


# =========================================== commands ===========================================
OUTPUT_DIR = Path("result")  # in the current folder
EPOCHS = 10  # of a run, unless --epochs says otherwise
THE_RUN = object()  # what --evaluate scores if no file is named: the run in the output folder


class Run:
    """A run so far: all that its checkpoint holds and its pictures show."""

    def __init__(self, gan: DCGAN, digits: Tensor, epochs: int) -> None:
        self.gan = gan
        self.epochs = epochs  # that it is to have in the end
        self.digits_sha256 = sha256_of(digits)
        self.real = digits[order_of_epoch(digits, gan.settings.seed, epoch=1)[:SAMPLES]]
        self.samples = torch.empty(0, SAMPLES, 28, 28, dtype=torch.uint8)  # after each epoch
        names = ("epoch", "step", *STATS, *SCORES)
        self.history = {name: torch.empty(0) for name in names}  # of each step (steps,)
        self.best_epoch = 0
        self.best_fd = math.inf

    def header(self) -> dict:
        """Return what tells where a checkpoint comes from."""
        return {
            "format": FORMAT,
            "epoch": self.gan.epoch,
            "settings": dataclasses.asdict(self.gan.settings),
            "digits_sha256": self.digits_sha256,
            "made_with": {"torch": str(torch.__version__), "device": self.gan.device.type},
        }

    def checkpoint(self) -> dict:
        """Return all that is needed to go on exactly."""
        return {
            **self.header(),
            "epochs": self.epochs,
            **{name: part.state_dict() for name, part in self.gan.parts().items()},
            "samples": self.samples,
            "history": self.history,
            "best_epoch": self.best_epoch,
            "best_fd": self.best_fd,
        }

    def restore(self, checkpoint: dict) -> None:
        """Go back to where a checkpoint was made."""
        self.gan.restore(checkpoint)
        self.samples = checkpoint["samples"]
        self.history = checkpoint["history"]
        self.best_epoch = checkpoint["best_epoch"]
        self.best_fd = checkpoint["best_fd"]

    def best_generator(self) -> dict | None:
        """Return what draws the digits of this epoch, or None if an earlier one was better."""
        if self.best_epoch != self.gan.epoch:
            return None
        return {**self.header(), "average": self.gan.average.state_dict()}

    def draw(self, count: int, stream: int) -> Tensor:
        """Draw digits (count, 28, 28) of uint8 from the noise of a random stream."""
        z = make_noise(count, self.gan.settings.seed, stream)
        return draw(self.gan.average, z, self.gan.settings.precision)

    def end_epoch(self, stats: Tensor, scorer: Scorer | None) -> None:
        """Add an epoch's STATS (steps, 5), digits and score to the run; warn of a collapse."""
        self.samples = torch.cat([self.samples, self.draw(SAMPLES, FIXED_NOISE)[None]])
        score = dict.fromkeys(SCORES, math.nan)
        if scorer is not None:
            score = scorer(self.draw(SCORED, DRAWING))
            print(SCORE_LINE.format(floor=scorer.floors[SCORED]["fd"], **score))
        count = len(stats)
        figures = {
            "epoch": torch.full((count,), self.gan.epoch),
            "step": torch.arange(1, count + 1),
            **dict(zip(STATS, stats.cpu().T, strict=True)),
            **{name: torch.full((count,), value) for name, value in score.items()},
        }
        signs = signs_of_collapse(figures, self.history)
        if signs and not self.gan.settings.dry_run:
            print(f"warning: {' and '.join(signs)}; README.md says what to do")
        self.history = {name: torch.cat([self.history[name], figures[name]]) for name in figures}
        if score["fd"] < self.best_fd:
            self.best_fd = score["fd"]
            self.best_epoch = self.gan.epoch


def train(
    options: Namespace, device: torch.device, folder: RunFolder, processes: Processes
) -> None:
    """Begin a run, or go on with the one in the folder, and train to its last epoch."""
    with processes.connected(device):
        start = None
        if processes.rank == 0:
            start = read_run(options, folder) if options.resume else new_run(options, device)
        settings, digits, epochs, checkpoint = processes.broadcast(start)
        run = Run(DCGAN(settings, device), digits, epochs)
        if checkpoint is not None:
            check_digits(run, checkpoint, options.data_dir)
            with damage_is_failure(folder.path / CHECKPOINT):
                run.restore(checkpoint)
        check_batches(settings.batch_size, len(digits), processes.count)
        step = fastest_step(run.gan, processes)
        loop = train_epochs(run.gan, step, digits.to(device), epochs, options.log_every)
        if processes.rank > 0:
            for _ in loop:  # the first process scores, saves and draws
                pass
            return
        if checkpoint is not None:
            folder.write_pictures(run.samples, run.real, run.history)  # if any are missing
        if run.gan.epoch >= epochs:
            done = f"The run in {folder.path} already has {run.gan.epoch} epochs"
            print(f"{done}; to add more, give a larger --epochs")
            return
        if checkpoint is None:  # only now, for it moves an earlier run away
            folder.begin(settings.dry_run)
            print_summaries()
        scorer = find_scorer(run.digits_sha256, device)
        announce(settings, device, len(digits), folder)
        score_save_draw(run, loop, scorer, folder)


def new_run(options: Namespace, device: torch.device) -> tuple[Settings, Tensor, int, None]:
    """Return the settings, digits and number of epochs of a new run.

    Settings are those given; what is not given comes from the recipe, and then from the defaults.
    """
    given = given_settings(options)
    recipe = RECIPES[given.get("recipe", Settings.recipe)]
    precision = "bf16" if has_bf16(device) else "fp32"
    chosen = {"precision": precision} | recipe | given  # the last one wins
    settings = Settings(**chosen, dry_run=options.dry_run)
    epochs = 2 if options.dry_run else options.epochs or EPOCHS
    return settings, load_digits(options.data_dir, settings.split)[0], epochs, None


def read_run(options: Namespace, folder: RunFolder) -> tuple[Settings, Tensor, int, dict]:
    """Return the settings, digits, number of epochs and checkpoint of a run to go on with.

    Raises Failure.
    """
    checkpoint = folder.resume()
    settings = checkpoint["settings"]
    if settings.dry_run:
        raise WrongInput(f"argument --resume: {folder.path} holds a dry run, which cannot go on")
    for name, given in given_settings(options).items():
        kept = getattr(settings, name)
        if given != kept:
            advice = "omit it, or start a new run without --resume"
            raise WrongInput(f"argument {flag(name)}: {given}, but the run has {kept}: {advice}")
    with damage_is_failure(folder.path / CHECKPOINT):
        epochs = options.epochs or checkpoint["epochs"]
    return settings, load_digits(options.data_dir, settings.split)[0], epochs, checkpoint


def flag(name: str) -> str:
    """Return the flag of an option: "--batch-size" of "batch_size"."""
    return f"--{name.replace('_', '-')}"


def given_settings(options: Namespace) -> dict[str, object]:
    """Return the training flags that the command line gives, without any defaults."""
    names = {field.name for field in dataclasses.fields(Settings)} - {"dry_run"}
    given = {name: value for name, value in vars(options).items() if name in names}
    return {name: value for name, value in given.items() if value != "auto"}


def check_digits(run: Run, checkpoint: dict, data_dir: Path) -> None:
    """Raise WrongInput if a run would go on with other digits than it began with."""
    if checkpoint["digits_sha256"] != run.digits_sha256:
        others = f"{data_dir} holds other digits than those the run started with"
        raise WrongInput(f"argument --data-dir: {others}; name their folder")


def check_batches(batch_size: int, count: int, processes: int) -> None:
    """Raise WrongInput if ``count`` digits do not make batches that all processes can share."""
    if batch_size > count:
        raise WrongInput(f"argument --batch-size: there are only {count} digits")
    if batch_size % processes or 0 < count % batch_size < processes:
        shares = f"{processes} processes cannot share every batch; choose another size"
        raise WrongInput(f"argument --batch-size: {shares}")


def find_scorer(digits_sha256: str, device: torch.device) -> Scorer | None:
    """Return the scorer of a run on these digits, or None, and print which."""
    seen = SPLIT_OF_DIGITS.get(digits_sha256)
    if seen is None:
        print("This run will have no scores: its digits are not those of MNIST")
        return None
    try:
        scorer = Scorer(read_scorer(), seen, device)
    except Failure as failure:
        print(f"This run will have no scores: {failure}")
        return None
    print(f"Scores compare with MNIST's {scorer.unseen} split, which this run does not see")
    return scorer


def announce(settings: Settings, device: torch.device, count: int, folder: RunFolder) -> None:
    """Print on how many digits training begins, where it computes and what there will be to see."""
    if settings.precision == "bf16" and not has_bf16(device):
        print(f"warning: this {device.type} has no bf16 arithmetic; fp32 is many times faster")
    print(f"Training on {count:,} digits on {device.type} in {settings.precision}")
    if not settings.dry_run:
        print(f"After each epoch, look at {folder.path / TIMELINE}")


def score_save_draw(
    run: Run, loop: Iterator[Tensor], scorer: Scorer | None, folder: RunFolder
) -> None:
    """Take the training loop to its end; after each epoch: score, save, draw."""
    gan = run.gan
    first = gan.epoch  # epochs done before this command
    saved = gan.epoch  # epochs in the checkpoint
    start = time.perf_counter()
    try:
        for stats in loop:
            run.end_epoch(stats, scorer)
            folder.save(run.checkpoint(), run.best_generator())
            saved = gan.epoch
            folder.write_pictures(run.samples, run.real, run.history)
            taken = time.perf_counter() - start
            left = taken / (saved - first) * (run.epochs - saved)
            print(
                f"saved to {folder.path} after {tqdm.format_interval(taken)}, "
                f"{tqdm.format_interval(left)} left"
            )
    except KeyboardInterrupt as interrupt:
        if saved == 0 or gan.settings.dry_run:
            raise
        signum = getattr(interrupt, "signum", signal.SIGINT)
        message = f"epoch {saved} is saved; to continue, run the same command with --resume"
        raise Stopped(signum, message) from interrupt
    if gan.settings.dry_run:
        print("The dry run went well: reading, training, saving and drawing work")
        print("After so few steps, digits and scores mean nothing")
    elif run.best_epoch:
        print(f"The best epoch was {run.best_epoch}: {BEST}, for --generate N --best")


def generator_file(options: Namespace, folder: RunFolder) -> Path:
    """Return the file of the generator to draw with: that of the run's last or best epoch.

    Without a run, and if no folder is named, it is the one that comes with the program.
    """
    path = folder.path / (BEST if options.best else CHECKPOINT)
    if options.output_dir is None and not folder.has_run() and EXAMPLE.exists():
        print(f"{folder.path} holds no run: using the included generator, {EXAMPLE}")
        return EXAMPLE
    if options.best and not path.exists() and (folder.path / CHECKPOINT).exists():
        raise WrongInput(f"argument --best: the run in {folder.path} has no scores; leave it out")
    return path


def generate(options: Namespace, device: torch.device, folder: RunFolder) -> list[str]:
    """Draw digits with a trained generator, of all kinds or of one; return the files' names."""
    generator, checkpoint = read_generator(generator_file(options, folder), device)
    folder.make()
    precision = checkpoint["settings"].precision
    if options.digit is None:
        digits = draw(generator, drawing_noise(options.generate, options), precision)
    else:
        digits = draw_one_kind(generator, precision, options)
    with folder.writing(GENERATED_DIGITS) as file:
        np.save(file, digits.numpy())
    with folder.writing(GENERATED) as file:
        grid(digits[:100]).save(file, "PNG")
    return [GENERATED, GENERATED_DIGITS]


def draw_one_kind(generator: Generator, precision: str, options: Namespace) -> Tensor:
    """Draw digits (n, 28, 28) of uint8 until there are enough that are taken for one kind.

    Raises Failure if less than one drawing in 200 is one of these, among the first 2,000.
    """
    classifier = load_classifier(read_scorer(), next(generator.parameters()).device)
    noise = random_stream(drawing_seed(options), DRAWING)
    found = torch.empty(0, 28, 28, dtype=torch.uint8)
    with progress_bar(total=options.generate, unit="digit") as progress:
        while len(found) < options.generate:
            z = torch.randn(2000, LATENT_DIM, 1, 1, generator=noise)
            drawn = draw(generator, z, precision)
            probabilities = classifier.judge(drawn)[1]
            kept = drawn[probabilities[:, options.digit] >= 0.9]
            if len(kept) < 10 and len(found) == 0:
                few = f"only {len(kept)} of 2,000 drawings are a clear {options.digit}"
                raise Failure(f"{few}; train for longer, or ask for another --digit")
            found = torch.cat([found, kept])
            progress.update(len(kept))
    return found[: options.generate]


def interpolate(options: Namespace, device: torch.device, folder: RunFolder) -> list[str]:
    """Draw ten walks from one digit to another, one a row; return the file's name."""
    generator, checkpoint = read_generator(generator_file(options, folder), device)
    folder.make()
    z = drawing_noise(20, options)
    digits = draw(generator, walk(z[:10], z[10:]), checkpoint["settings"].precision)
    with folder.writing(INTERPOLATION) as file:
        grid(digits).save(file, "PNG")
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
        path = generator_file(options, folder)
        generator, checkpoint = read_generator(path, device)
        seen = SPLIT_OF_DIGITS.get(checkpoint["digits_sha256"])
        if seen is None:
            others = f"the run in {folder.path} was trained on digits other than those of MNIST"
            raise WrongInput(f"argument --evaluate: {others}, which cannot be scored")
        z = drawing_noise(EVALUATED, options)
        digits = draw(generator, z, checkpoint["settings"].precision)
        source = {
            "of": str(path),
            "epoch": checkpoint["epoch"],
            **checkpoint["made_with"],
            "settings": dataclasses.asdict(checkpoint["settings"]),
        }
    else:
        digits = read_digits(options.evaluate)
        seen = given_settings(options).get("split", Settings.split)
        source = {"of": str(options.evaluate)}
    folder.make()
    scorer = Scorer(content, seen, device)
    real = bundled_digits(seen)
    scores = scorer.evaluate(digits, real, bundled_digits(scorer.unseen))
    floor = scorer.floors.get(len(digits), {})
    model = f"{len(digits):,} digits of a model that has seen MNIST's {seen} split"
    print(f"{model}, compared with its {scorer.unseen} split")
    print(score_table(scores, floor))
    print("copies: about 0.5 if nothing is copied, 1 for copies")
    report = {
        **scores,
        "floor": floor,
        "count": len(digits),
        "seen": seen,
        "compared_with": scorer.unseen,
        "scorer_sha256": SCORER_SHA256,
        **source,
    }
    with folder.writing(SCORE) as file:
        file.write(json.dumps(report, indent=1).encode())
    with folder.writing(NEAREST) as file:
        nearest(digits, real).save(file, "PNG")
    return [SCORE, NEAREST]


def score_table(scores: dict[str, float], floor: dict[str, float]) -> str:
    """Lay out scores by their names, beside them the floor, if any: those of real digits."""
    lines = [f"{'':<10}{'score':>8}{'real digits' if floor else '':>14}"]
    for name, score in scores.items():
        real = f"{floor[name]:.4g}" if floor and name != "copies" else ""  # 1: they are those seen
        lines.append(f"{name:<10}{score:>8.4g}{real:>14}")
    return "\n".join(line.rstrip() for line in lines)


def drawing_seed(options: Namespace) -> int:
    """Return the seed of the noise from which a trained generator draws."""
    return given_settings(options).get("seed", Settings.seed)


def drawing_noise(count: int, options: Namespace) -> Tensor:
    """Return the noise (count, latent_dim, 1, 1) from which a trained generator draws."""
    return make_noise(count, drawing_seed(options), DRAWING)


def read_digits(path: Path) -> Tensor:
    """Read digits (n, 28, 28) of uint8 that numpy has saved. Raises WrongInput."""
    try:
        digits = torch.from_numpy(np.load(path, allow_pickle=False))
        if digits.dtype != torch.uint8 or digits.shape[1:] != (28, 28) or len(digits) < 2:
            found = f"{digits.dtype} of shape {tuple(digits.shape)}"
            raise ValueError(f"it holds {found}, not uint8 of shape (n, 28, 28) with n at least 2")
        return digits
    except Exception as error:  # whatever numpy finds wrong with it
        raise WrongInput(f"argument --evaluate: {path}: {error}") from error


# ========================================= command line =========================================
HELP_EXAMPLES = f"""\
examples:
  python {PROGRAM} --epochs 10               train, ten times on every digit
  python {PROGRAM} --resume --epochs 20      add ten epochs to that run
  python {PROGRAM} --generate 50 --digit 7   draw fifty sevens
"""


class Parser(ArgumentParser):
    """A parser that leaves it to ``main`` to print an error and to end the program."""

    def error(self, message: str) -> NoReturn:
        raise WrongInput(message)


def number_between(kind: type, low: float, high: float) -> Callable[[str], float]:
    """Return a function that reads a number from ``low`` to ``high``, for argparse."""
    noun = "whole number" if kind is int else "number"

    def read(text: str) -> float:
        refusal = ArgumentTypeError(f"must be a {noun} from {low} to {high}, not {text!r}")
        try:
            value = kind(text)
        except ValueError as error:
            raise refusal from error
        if not low <= value <= high:
            raise refusal
        return value

    return read


def add_training_flags(group: _ArgumentGroup) -> None:
    """Add the settings of a run; what is not given is not among the options."""
    group.add_argument(
        "--recipe",
        choices=list(RECIPES),
        help="article: DCGAN as articles and tutorials train it; "
        f"tuned: the best digits, with {flags_of_recipe('tuned')}; "
        f"quick: digits in two epochs, with {flags_of_recipe('quick')}; "
        f"other flags override a recipe (default: {Settings.recipe})",
    )
    group.add_argument(
        "--batch-size",
        type=number_between(int, 1, 60_000),
        metavar="N",
        help=f"digits in a training step (default: {Settings.batch_size})",
    )
    add_optimizer_flags(group)
    group.add_argument(
        "--generator-steps",
        type=number_between(int, 1, 10),
        metavar="N",
        help="updates of the generator in a training step, 1 to 10, each on noise of its own "
        f"(default: {Settings.generator_steps})",
    )
    group.add_argument(
        "--ema",
        type=number_between(float, 0.0, 0.5),
        metavar="X",
        help="draw with the generator's weights averaged over the last part of the steps so far: "
        f"this share of them, 0 to 0.5; 0: no average (default: {Settings.ema})",
    )
    group.add_argument(
        "--seed",
        type=number_between(int, 0, 2**32 - 1),
        metavar="N",
        help="random seed of the run; with --generate, --interpolate and --evaluate, of the noise "
        f"(default: {Settings.seed})",
    )
    group.add_argument(
        "--split",
        choices=["test", "train"],
        help="train on MNIST's 10,000 test digits or its 60,000 training digits "
        f"(default: {Settings.split})",
    )


def flags_of_recipe(name: str) -> str:
    """Return the flags that a recipe stands for, as one would type them."""
    return " ".join(f"{flag(setting)} {value}" for setting, value in RECIPES[name].items())


def add_optimizer_flags(group: _ArgumentGroup) -> None:
    """Add the settings of both networks' optimisers."""
    group.add_argument(
        "--lr",
        type=number_between(float, 1e-8, 1.0),
        metavar="X",
        help=f"learning rate of both networks (default: {Settings.lr})",
    )
    group.add_argument(
        "--beta1",
        type=number_between(float, 0.0, 0.9999),
        metavar="X",
        help=f"Adam's decay rate of the mean gradient (default: {Settings.beta1})",
    )
    group.add_argument(
        "--beta2",
        type=number_between(float, 0.0, 0.999999),
        metavar="X",
        help=f"Adam's decay rate of the mean squared gradient (default: {Settings.beta2})",
    )


def add_run_flags(group: _ArgumentGroup) -> None:
    """Add how long a run goes on, and what it reads and writes."""
    group.add_argument(
        "--epochs",
        type=number_between(int, 1, 100_000),
        metavar="N",
        help="passes over all digits, with those of a resumed run; --resume alone keeps its number "
        f"(default: {EPOCHS})",
    )
    group.add_argument(
        "--output-dir",
        type=Path,
        metavar="DIR",
        help=f"folder for the results (default: {OUTPUT_DIR})",
    )
    group.add_argument(
        "--data-dir",
        type=Path,
        default=BUNDLED,
        metavar="DIR",
        help="folder with the files of the digits (default: MNIST, beside the program)",
    )
    group.add_argument(
        "--log-every",
        type=number_between(int, 1, 10**6),
        default=100,
        metavar="N",
        help="print a line of the log every N steps (default: 100)",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in the output folder (default: begin a new one)",
    )
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="check an installation: two epochs of three steps, in a temporary folder unless "
        "--output-dir names one (default: off)",
    )
    group.add_argument("-h", "--help", action="help", help="show this page and exit (default: off)")


def add_hardware_flags(group: _ArgumentGroup) -> None:
    """Add where and how to compute."""
    group.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda", "mps"],
        default="auto",
        help="auto: a GPU if there is one (default: auto)",
    )
    group.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16"],
        default="auto",
        help="auto: bf16 on GPUs from Ampere on and CPUs with AVX512-BF16 or AMX (default: auto)",
    )


def add_drawing_flags(group: _ArgumentGroup) -> None:
    """Add what to do with a trained generator."""
    group.add_argument(
        "--generate",
        type=number_between(int, 1, 100_000),
        metavar="N",
        help="draw N digits (default: off)",
    )
    group.add_argument(
        "--digit",
        type=number_between(int, 0, 9),
        metavar="D",
        help="with --generate: only the digit D, 0 to 9, as the scorer recognises it with a "
        "probability of at least 0.9 (default: all ten)",
    )
    group.add_argument(
        "--interpolate",
        action="store_true",
        help="draw ten walks from one digit to another (default: off)",
    )
    group.add_argument(
        "--evaluate",
        type=Path,
        nargs="?",
        const=THE_RUN,
        metavar="FILE",
        help="score 10,000 digits; or those in an .npy file, uint8 of shape (n, 28, 28), drawn by "
        "a model that was trained on --split (default: off)",
    )
    group.add_argument(
        "--best",
        action="store_true",
        help="use the generator of the epoch with the lowest FD (default: of the last epoch)",
    )


def parse_options(argv: list[str] | None) -> Namespace:
    """Read a command line, the process's own if None. Raises WrongInput."""
    parser = Parser(
        usage=f"python {PROGRAM} [flags]",
        description=__doc__.splitlines()[0],
        epilog=HELP_EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    add_training_flags(parser.add_argument_group("training", argument_default=SUPPRESS))
    add_run_flags(parser.add_argument_group("run"))
    add_hardware_flags(parser.add_argument_group("hardware"))
    add_drawing_flags(parser.add_argument_group("drawing", "Use a trained generator; no training."))
    options = parser.parse_args(argv)
    names = ("resume", "dry_run", "generate", "interpolate", "evaluate")
    modes = [flag(name) for name in names if getattr(options, name)]
    if len(modes) > 1:
        parser.error(f"{' and '.join(modes)} cannot be combined")
    drawing = options.generate or options.interpolate or options.evaluate
    from_file = isinstance(options.evaluate, Path)
    if drawing:
        used = {"seed", "split"} if from_file else {"seed"}
        for name in sorted(given_settings(options).keys() - used):
            parser.error(f"{flag(name)} is a training flag and cannot be combined with {modes[0]}")
    if options.digit is not None and not options.generate:
        parser.error("--digit requires --generate N")
    if options.best and (from_file or not drawing):
        parser.error("--best requires --generate N, --interpolate or --evaluate without a file")
    return options


def processes_of_torchrun() -> Processes:
    """Return what torchrun says in the environment. Raises WrongInput if it says half of it."""
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return Processes()
    hint = "start several processes with torchrun, or unset RANK and WORLD_SIZE"
    missing = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys()
    if missing:
        raise WrongInput(f"the environment has no {' and no '.join(sorted(missing))}; {hint}")
    try:
        rank = int(os.environ["RANK"])
        count = int(os.environ["WORLD_SIZE"])
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    except ValueError as error:
        raise WrongInput(
            f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers: {error}"
        ) from error
    if not 0 <= rank < count:
        raise WrongInput(f"the environment has RANK={rank}, but WORLD_SIZE={count}; {hint}")
    return Processes(rank, count, local_rank)


@contextmanager
def stop_signals(rank: int) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM raise Stopped for a while; the second one ends the program at once.

    The first process says how it ends; in the others, the first signal ends the program at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread gets signals
        return

    def stop(signum: int, frame: object) -> NoReturn:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        raise Stopped(signum)

    handler = stop if rank == 0 else signal.SIG_DFL
    before = {signum: signal.signal(signum, handler) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, previous in before.items():
            signal.signal(signum, previous)


@contextmanager
def escaped_output() -> Iterator[None]:
    """For a while, print characters that the console lacks as escapes instead of failing."""
    streams = [s for s in (sys.stdout, sys.stderr) if isinstance(s, io.TextIOWrapper)]
    before = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in zip(streams, before, strict=True):
            stream.reconfigure(errors=errors)


@contextmanager
def muted(rank: int) -> Iterator[None]:
    """For a while, let no other process than the first one print."""
    if rank > 0:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    else:
        yield


@contextmanager
def output_folder(options: Namespace) -> Iterator[Path]:
    """Give the folder to write to; that of a dry run is temporary if none is named."""
    if options.dry_run and options.output_dir is None:
        with TemporaryDirectory(prefix="dcgan_mnist_", ignore_cleanup_errors=True) as path:
            yield Path(path)
        print("The dry run's temporary folder is removed")
    else:
        path = options.output_dir or OUTPUT_DIR
        check_folder_name(path)
        yield path


def check_folder_name(path: Path) -> None:
    """Raise WrongInput if there can be no folder of this name, one that is too long for example."""
    with unusable_is_wrong_input(path), suppress(FileNotFoundError):  # such a folder can be made
        path.stat()


def run_command(options: Namespace, processes: Processes) -> None:
    """Do what the command line asks for."""
    device = pick_device(options.device, processes.local_rank)
    command = None
    if options.generate:
        command = generate
    elif options.interpolate:
        command = interpolate
    elif options.evaluate:
        command = evaluate
    with (
        output_folder(options) as path,
        closing(RunFolder(path)) as folder,
        computing_on(device),
    ):
        if command is None:
            train(options, device, folder, processes)
        elif processes.rank == 0:
            names = command(options, device, folder)
            print(f"saved {' and '.join(str(folder.path / name) for name in names)}")


def last_line(kind: str, message: object, rank: int) -> None:
    """Print the line with which a process ends; the first one needs no number."""
    process = f"process {rank}: " if rank > 0 else ""
    print(f"{PROGRAM}: {process}{kind}: {' '.join(str(message).split())}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Run a command line, the process's own if None, and return the exit code.

    0: done; 1: something outside went wrong; 2: wrong input; 130 or 143: stopped by a signal.
    """
    rank = 0
    with escaped_output():
        try:
            processes = processes_of_torchrun()
            rank = processes.rank
            with stop_signals(rank), muted(rank):
                run_command(parse_options(argv), processes)
            return 0
        except Failure as error:
            if rank == 0:  # it speaks for all, which fail alike
                last_line("error", error, rank)
            return 2 if isinstance(error, WrongInput) else 1
        except (OSError, torch.OutOfMemoryError) as error:
            last_line("error", error, rank)
            return 1
        except KeyboardInterrupt as interrupt:
            stopped = interrupt if isinstance(interrupt, Stopped) else Stopped(signal.SIGINT)
            last_line("stopped", stopped, rank)
            return 128 + stopped.signum
        except SystemExit:  # of argparse, after --help
            return 0


if __name__ == "__main__":
    sys.exit(main())

"""DCGAN on MNIST in one file: watch handwritten digits grow out of noise.

    python dcgan_mnist.py --epochs 10       train on the 10,000 bundled digits, no network needed
    python dcgan_mnist.py --dry-run         six steps in all, to check an installation
    python dcgan_mnist.py --generate 1000   draw digits with the generator trained last

Two networks play against each other. The discriminator learns to tell real digits from
generated ones; the generator turns noise into digits and learns to be taken for real. The
networks and their training follow Radford, Metz and Chintala, "Unsupervised Representation
Learning with Deep Convolutional Generative Adversarial Networks" (2016), arXiv:1511.06434.

After every epoch the folder `result` holds, up to date: a picture of that epoch's digits, all
drawn from the same noise; `timeline.png` and `training.gif`, the epochs side by side;
`loss_curve.png` and `history.csv`, the figures; and `checkpoint.pt`, the trained networks.

The file reads from top to bottom: networks, data, one training step, one epoch and the run,
pictures, checkpoints, command line. The first three are the algorithm, the rest is the tool.
"""

import argparse
import hashlib
import io
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch
import torch.nn.functional as F  # noqa: N812 (the name everyone knows it by)
from torch import Tensor, nn
from torch.optim import Adam
from tqdm import tqdm

if TYPE_CHECKING:
    from PIL.Image import Image

LATENT_DIM = 100  # numbers of noise that one digit is made from
WIDTH = 128  # channels of the layer next to the image; the others have 2 and 4 times as many
CHANNELS = 1  # grey
SAMPLES = 50  # digits in each picture
PER_ROW = 10
TIMELINE_EPOCHS = 10
STATS = ("ds_loss", "gn_loss", "true_out", "fake_out_before", "fake_out_after")

PROGRAM = "dcgan_mnist.py"
MAX_EPOCHS = 100_000
GENERATE_EPOCH = 2**20 - 1  # names the random numbers of --generate; no run gets there
CHECKPOINT_FORMAT = 1
CHECKSUM_LENGTH = 64
GAN_PARTS = ("generator", "discriminator", "optimizer_g", "optimizer_d")
SHAPING_OPTIONS = ("batch_size", "lr", "beta1", "seed", "split", "dry_run")
RUN_FILES = re.compile(
    r"(real_samples|generated_epoch_\d{3,}|timeline|loss_curve)\.png"
    r"|training\.gif|history\.csv|checkpoint\.pt"
)


# ---------------------------------------- networks ----------------------------------------


class Generator(nn.Module):
    """Turn noise into images: (n, latent_dim, 1, 1) -> (n, channels, 28, 28) in [-1, 1]."""

    def __init__(
        self, latent_dim: int = LATENT_DIM, width: int = WIDTH, channels: int = CHANNELS
    ) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ConvTranspose2d(latent_dim, 4 * width, kernel_size=3, stride=1),  # (n, 512, 3, 3)
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
        return self.layers(z)


class Discriminator(nn.Module):
    """Judge images: (n, channels, 28, 28) in [-1, 1] -> (n,) probabilities of being real."""

    def __init__(self, width: int = WIDTH, channels: int = CHANNELS) -> None:
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
        """Return the log-odds of being real, (n,), any real number.

        Training uses these instead of the probabilities: the loss is the same, but it does not
        go flat where the sigmoid rounds to 0 or 1.
        """
        return self.layers(images).flatten()

    def forward(self, images: Tensor) -> Tensor:
        return torch.sigmoid(self.logits(images))


def weights_init(m: nn.Module) -> None:
    """Give one layer the paper's starting weights; used as ``network.apply(weights_init)``.

    Convolutions get N(0, 0.02), BatchNorm scales N(1, 0.02), the biases of both 0. Other layers,
    and parameters that a layer was made without, are left alone.
    """
    if not isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)):
        return
    if m.weight is not None:
        nn.init.normal_(m.weight, mean=float(isinstance(m, nn.BatchNorm2d)), std=0.02)
    if m.bias is not None:
        nn.init.zeros_(m.bias)


# ------------------------------------------ data ------------------------------------------


def load_digits(data_dir: Path, split: str) -> Tensor:
    """Read the digits of a split, "test" or "train", as one tensor (n, 28, 28) of uint8.

    They are read from ``data_dir/MNIST/raw``, where torchvision downloads them if they are not
    there. Other data in the same files and format will do. Raises RunError if they cannot be
    had or are damaged.
    """
    from torchvision.datasets import MNIST

    prefix = {"train": "train", "test": "t10k"}[split]
    raw = data_dir / "MNIST" / "raw"
    files = [raw / f"{prefix}-images-idx3-ubyte", raw / f"{prefix}-labels-idx1-ubyte"]
    names = f"{files[0].name} and {files[1].name}"

    class OneSplit(MNIST):
        """torchvision's MNIST wants all four files; this one only those of its split."""

        resources = [r for r in MNIST.resources if r[0].startswith(prefix)]  # noqa: RUF012
        raw_folder = str(raw)

    # torchvision lets through whatever the network or the bytes of a damaged file cause
    try:
        dataset = OneSplit(str(data_dir), train=split == "train", download=True)
    except Exception as error:
        if all(file.is_file() for file in files):
            hint = "replace them, or delete them to have MNIST's downloaded"
            raise RunError(
                f"{names} in {raw} are damaged or not in MNIST's format; {hint}"
            ) from error
        reason = str(error).splitlines()[-1:] or [type(error).__name__]
        raise RunError(
            f"cannot download MNIST's {split} split ({reason[0]}); "
            f"place {names} (unpacked) in {raw} and run again"
        ) from error
    digits = dataset.data
    if digits.shape[1:] != (28, 28) or len(digits) != len(dataset.targets):
        found = f"{' x '.join(map(str, digits.shape))} images and {len(dataset.targets)} labels"
        raise RunError(f"{names} in {raw} hold {found}; n x 28 x 28 and n are needed")
    return digits


def make_batch(digits: Tensor, index: Tensor) -> Tensor:
    """Pick digits (m, 28, 28) of uint8 by index (n,) and scale: (n, 1, 28, 28) in [-1, 1]."""
    return digits[index].unsqueeze(1).float() / 127.5 - 1


def random_stream(seed: int, epoch: int, device: str | torch.device = "cpu") -> torch.Generator:
    """Return the random numbers of one epoch (epoch 0: those needed before the first).

    As every epoch has a stream of its own, named by the seed and its number, a run that goes on
    after an epoch needs no saved random state, and nothing that happens between two epochs can
    disturb the training.
    """
    return torch.Generator(device).manual_seed(seed * 2**20 + epoch)


def shuffled(count: int, seed: int, epoch: int) -> Tensor:
    """Return the order (count,) in which an epoch takes the digits, the same on every device."""
    return torch.randperm(count, generator=random_stream(seed, epoch))


# ------------------------------------ one training step -----------------------------------


@dataclass
class GAN:
    """The two networks, each with its own optimiser."""

    generator: Generator
    discriminator: Discriminator
    optimizer_g: Adam
    optimizer_d: Adam


def build_gan(seed: int, lr: float, beta1: float, device: torch.device) -> GAN:
    """Make both networks, with the weights that follow from the seed, and their optimisers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        networks = Generator(LATENT_DIM, WIDTH, CHANNELS), Discriminator(WIDTH, CHANNELS)
        for network in networks:
            network.apply(weights_init)
    generator, discriminator = (network.to(device) for network in networks)
    return GAN(
        generator,
        discriminator,
        Adam(generator.parameters(), lr=lr, betas=(beta1, 0.999)),
        Adam(discriminator.parameters(), lr=lr, betas=(beta1, 0.999)),
    )


def bce(logits: Tensor, target: float) -> Tensor:
    """Return the mean binary cross-entropy of the logits' probabilities against one target."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def training_step(gan: GAN, real: Tensor, z: Tensor) -> Tensor:
    """Update the discriminator, then the generator, on one batch.

    This is Algorithm 1 of Goodfellow et al., "Generative Adversarial Nets" (2014), with its
    non-saturating loss for the generator.

    Takes real images (n, 1, 28, 28) in [-1, 1] and noise (n, latent_dim, 1, 1); returns the
    figures that STATS names, (5,), on the device: reading them would make it wait.
    """
    generator, discriminator = gan.generator, gan.discriminator
    fake = generator(z)  # (n, 1, 28, 28) in [-1, 1]

    # (1) The discriminator: maximise log D(x) + log(1 - D(G(z))).
    discriminator.requires_grad_(True)
    gan.optimizer_d.zero_grad()
    on_real = discriminator.logits(real)  # (n,)
    on_fake = discriminator.logits(fake.detach())  # detached: no gradient for the generator
    ds_loss = bce(on_real, 1) + bce(on_fake, 0)
    ds_loss.backward()
    gan.optimizer_d.step()

    # (2) The generator: maximise log D(G(z)) against the updated discriminator, which is frozen,
    # so that the gradient flows through it but none is computed for its weights.
    discriminator.requires_grad_(False)
    gan.optimizer_g.zero_grad()
    on_fake_after = discriminator.logits(fake)  # (n,)
    gn_loss = bce(on_fake_after, 1)
    gn_loss.backward()
    gan.optimizer_g.step()

    outputs = [logits.sigmoid().mean() for logits in (on_real, on_fake, on_fake_after)]
    return torch.stack([ds_loss, gn_loss, *outputs]).detach()


# ---------------------------------- one epoch and the run ---------------------------------


@dataclass
class Run:
    """What a run has reached: all that a checkpoint holds."""

    settings: dict[str, int | float | str]
    gan: GAN
    fixed_noise: Tensor  # (SAMPLES, latent_dim, 1, 1), what every epoch's picture is drawn from
    epoch: int = 0  # epochs done
    history: Tensor = field(default_factory=lambda: torch.empty(0, len(STATS)))  # a row a step
    samples: Tensor = field(  # every epoch's picture, uint8
        default_factory=lambda: torch.empty(0, SAMPLES, 28, 28, dtype=torch.uint8)
    )


def start_run(options: argparse.Namespace, device: torch.device) -> Run:
    """Begin a run with the options that shape its training."""
    settings = {name: getattr(options, name) for name in SHAPING_OPTIONS}
    noise = torch.randn(SAMPLES, LATENT_DIM, 1, 1, generator=random_stream(options.seed, 0))
    gan = build_gan(options.seed, options.lr, options.beta1, device)
    return Run(settings, gan, noise.to(device))


def print_summaries(gan: GAN) -> None:
    """Print torchsummary's table of each network, without any effect on the run.

    The tables come from copies on the CPU, because torchsummary runs a random batch through a
    network in training mode and knows no devices but CPU and CUDA.
    """
    from torchsummary import summary

    with torch.random.fork_rng(devices=[]):
        for title, network, input_size in (
            ("Generator", gan.generator, (LATENT_DIM, 1, 1)),
            ("Discriminator", gan.discriminator, (CHANNELS, 28, 28)),
        ):
            print(title)
            summary(deepcopy(network).cpu(), input_size, device="cpu")


def train_epoch(run: Run, digits: Tensor, epochs: int, log_every: int) -> Tensor:
    """Train on every digit once, with a log line every ``log_every`` steps.

    Returns a row of STATS for each step, (steps, 5), on the CPU.
    """
    epoch, settings = run.epoch + 1, run.settings
    order = shuffled(len(digits), settings["seed"], epoch).to(digits.device)
    batches = order.split(settings["batch_size"])
    if settings["dry_run"]:
        batches = batches[:3]
    noise_stream = random_stream(settings["seed"], epoch, digits.device)
    stats = torch.empty(len(batches), len(STATS), device=digits.device)

    tqdm.write(f"Epoch {epoch}/{epochs}")
    title = f"Epoch {epoch}/{epochs}"
    for i, index in enumerate(tqdm(batches, title, unit="step", leave=False, disable=None)):
        z = torch.randn(len(index), LATENT_DIM, 1, 1, generator=noise_stream, device=digits.device)
        stats[i] = training_step(run.gan, make_batch(digits, index), z)
        if i % log_every == 0:  # the only place in the epoch that waits for the device
            ds_loss, gn_loss, true_out, before, after = stats[i].tolist()
            tqdm.write(
                f"({i + 1}/{len(batches)}) ds_loss: {ds_loss:.3f} - gn_loss: {gn_loss:.3f}"
                f" - true_out: {true_out:.3f} - fake_out: {before:.3f}>>{after:.3f}"
            )
    return stats.cpu()


def train(options: argparse.Namespace) -> None:
    """Train from the first epoch to the last, and keep the output folder up to date."""
    device = pick_device(options.device)
    digits = load_digits(options.data_dir, options.split).to(device)
    if options.batch_size > len(digits):
        raise UsageError(
            f"argument --batch-size: {options.batch_size} is more than the {len(digits)} digits"
        )
    folder = options.output_dir
    prepare_folder(folder)
    run = start_run(options, device)
    print_summaries(run.gan)
    print(f"Training on {len(digits):,} digits, on {device}, in batches of {options.batch_size}")

    real = digits[shuffled(len(digits), options.seed, 1)[:SAMPLES].to(device)].cpu()
    start = time.perf_counter()
    while run.epoch < options.epochs:
        run.history = torch.cat(
            [run.history, train_epoch(run, digits, options.epochs, options.log_every)]
        )
        run.epoch += 1
        run.samples = torch.cat([run.samples, draw(run.gan.generator, run.fixed_noise)[None]])
        write_pictures(run, real, folder)
        write_history(run, folder)
        save_checkpoint(run, folder / "checkpoint.pt")
        print(f"saved to {folder} after {time.perf_counter() - start:.1f} s")


# ----------------------------------------- pictures ---------------------------------------


@torch.no_grad()
def draw(generator: Generator, z: Tensor) -> Tensor:
    """Draw digits from noise (n, latent_dim, 1, 1): uint8 (n, 28, 28) on the CPU, 0 is black.

    The generator is in eval mode meanwhile, which leaves its BatchNorm statistics alone.
    """
    generator.eval()
    images = generator(z).squeeze(1)  # (n, 28, 28) in [-1, 1]
    generator.train()
    return ((images + 1) * 127.5).round().to(torch.uint8).cpu()


def grid(digits: Tensor, scale: int = 1) -> "Image":
    """Arrange digits (n, 28, 28) of uint8 in rows of ten; each pixel becomes scale x scale."""
    from PIL import Image
    from torchvision.utils import make_grid

    rows = make_grid(digits.unsqueeze(1), nrow=PER_ROW)[0]  # (height, width)
    image = Image.fromarray(rows.numpy())
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def captioned_grid(digits: Tensor, caption: str, scale: int = 1) -> "Image":
    """Return the grid of the digits under a line that says what they are."""
    from PIL import Image, ImageDraw, ImageFont

    picture = grid(digits, scale)
    margin = 14 + 10 * scale  # pixels for the caption
    result = Image.new("L", (picture.width, picture.height + margin))
    result.paste(picture, (0, margin))
    font = ImageFont.load_default(size=margin * 0.6)
    ImageDraw.Draw(result).text((4, margin / 2), caption, fill=255, font=font, anchor="lm")
    return result


def write_pictures(run: Run, real: Tensor, folder: Path) -> None:
    """Write the last epoch's picture and bring the pictures of the whole run up to date.

    ``real`` are the first digits (n, 28, 28) that training saw, uint8.
    """
    from PIL import Image

    with replacing(folder / "real_samples.png") as file:
        grid(real, scale=2).save(file, "PNG")
    with replacing(folder / f"generated_epoch_{run.epoch:03d}.png") as file:
        grid(run.samples[-1], scale=2).save(file, "PNG")

    shown = torch.linspace(1, run.epoch, min(run.epoch, TIMELINE_EPOCHS)).round().int().tolist()
    stages = [(run.samples[epoch - 1], f"epoch {epoch}") for epoch in shown]
    stages.append((real, "real digits"))

    rows = [captioned_grid(digits, caption) for digits, caption in stages]
    timeline = Image.new("L", (max(r.width for r in rows), sum(r.height for r in rows)))
    top = 0
    for row in rows:
        timeline.paste(row, (0, top))
        top += row.height
    with replacing(folder / "timeline.png") as file:
        timeline.save(file, "PNG")

    frames = [captioned_grid(digits, caption, scale=2) for digits, caption in stages]
    durations = [600] * (len(frames) - 1) + [2000]  # milliseconds
    with replacing(folder / "training.gif") as file:
        frames[0].save(
            file, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0
        )


def write_history(run: Run, folder: Path) -> None:
    """Write the figures of every step as numbers and as curves."""
    from matplotlib.figure import Figure

    steps_per_epoch = len(run.history) // run.epoch
    lines = [",".join(("epoch", "step", *STATS))]
    for i, row in enumerate(run.history.tolist()):
        figures = ",".join(f"{value:.6g}" for value in row)
        lines.append(f"{i // steps_per_epoch + 1},{i % steps_per_epoch + 1},{figures}")
    with replacing(folder / "history.csv") as file:
        file.write("\n".join([*lines, ""]).encode())

    figure = Figure(figsize=(10, 8), layout="constrained")
    losses, outputs = figure.subplots(2, 1, sharex=True)
    epochs = torch.arange(1, len(run.history) + 1) / steps_per_epoch
    names = ("discriminator", "generator", "real", "generated, before update", "generated, after")
    for i, name in enumerate(names):
        panel = losses if i < 2 else outputs
        panel.plot(epochs, run.history[:, i], label=name, linewidth=0.8)
    losses.set(title="Losses", ylabel="binary cross-entropy")
    outputs.set(
        title="What the discriminator thinks",
        ylabel="mean probability of being real",
        xlabel="epoch",
        ylim=(0, 1),
    )
    for panel in (losses, outputs):
        panel.grid(alpha=0.3)
        panel.legend(loc="upper right")
    with replacing(folder / "loss_curve.png") as file:
        figure.savefig(file, format="png", dpi=100)


# --------------------------------------- checkpoints --------------------------------------


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file beside ``path`` for writing; when it is whole and on disk, move it there.

    Whatever happens meanwhile, ``path`` holds either what it held before or all of the new.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(run: Run, path: Path) -> None:
    """Write all of a run to ``path``, with a check sum over every byte.

    torch writes a zip archive; the check sum (SHA-256) stands at its end as the archive's
    comment, so that ``torch.load`` reads the file as any other.
    """
    content = {
        "format": CHECKPOINT_FORMAT,
        "settings": run.settings,
        "epoch": run.epoch,
        "fixed_noise": run.fixed_noise,
        "history": run.history,
        "samples": run.samples,
    }
    for part in GAN_PARTS:
        content[part] = getattr(run.gan, part).state_dict()
    buffer = io.BytesIO()
    torch.save(content, buffer)
    buffer.seek(-2, os.SEEK_END)  # the length of the comment
    buffer.write(CHECKSUM_LENGTH.to_bytes(2, "little"))
    with replacing(path) as file:
        file.write(buffer.getbuffer())
        file.write(checksum(buffer.getbuffer()))


def checksum(content: bytes | memoryview) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def load_checkpoint(path: Path) -> dict:
    """Read what save_checkpoint wrote, onto the CPU.

    Raises RunError if there is no such file, or it is damaged or of another kind. Nothing in
    the file is run.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise RunError(
            f"no checkpoint at {path}: train first, or name the run's --output-dir"
        ) from None
    content, end = memoryview(data)[:-CHECKSUM_LENGTH], data[-CHECKSUM_LENGTH:]
    if checksum(content) != end:
        raise RunError(f"{path} is damaged or no checkpoint of this program (wrong check sum)")
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


# -------------------------------------- command line --------------------------------------


class UsageError(Exception):
    """What the user asked for cannot be done."""


class RunError(Exception):
    """The world did not play along: a file, the network, the disk."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UsageError(message)


def number(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], float]:
    """Return an argparse type that takes a number from low to high."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            noun = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{noun} from {low} to {high} is needed, not {text!r}")
        return value

    return parse


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; raises UsageError."""
    parser = Parser(
        prog=PROGRAM,
        description="Train a DCGAN on MNIST and watch digits grow out of noise.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--epochs", type=number(int, 1, MAX_EPOCHS), default=10, help="times to see every digit")
    add("--batch-size", type=number(int, 1, 60_000), default=50, help="digits in a training step")
    add("--output-dir", type=Path, default=Path("result"), help="folder for all that is written")
    add(
        "--data-dir",
        type=Path,
        default=Path(__file__).resolve().parent / "MNIST",
        help="folder that holds MNIST/raw with the data",
    )
    add(
        "--split",
        choices=("test", "train"),
        default="test",
        help="test: the 10,000 bundled digits; train: 60,000, downloaded once",
    )
    add("--lr", type=number(float, 1e-8, 1), default=0.0002, help="Adam's learning rate")
    add("--beta1", type=number(float, 0, 0.9999), default=0.5, help="Adam's momentum")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="start of all random numbers")
    add(
        "--device",
        choices=("auto", "cpu", "cuda", "mps"),
        default="auto",
        help="where to compute; auto takes a GPU if there is one",
    )
    add("--log-every", type=number(int, 1, 10**6), default=100, help="steps between log lines")
    add(
        "--dry-run",
        action="store_true",
        help="two epochs of three steps, to check an installation",
    )
    add(
        "--generate",
        type=number(int, 1, 10**6),
        metavar="N",
        help="train nothing; draw N digits with the generator in --output-dir",
    )
    options = parser.parse_args(argv)
    if options.dry_run:
        options.epochs = 2
    return options


def pick_device(name: str) -> torch.device:
    """Return the device of that name, for "auto" the fastest there is; raises UsageError."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(device for device in there if there[device])
    if not there[name]:
        raise UsageError(
            f"argument --device: this machine has no {name}; --device cpu always works"
        )
    return torch.device(name)


def prepare_folder(folder: Path) -> None:
    """Make the output folder, and clear it of an earlier run's files, but for its checkpoint."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(
            f"argument --output-dir: cannot write to {folder} ({error.strerror})"
        ) from error
    old = [path for path in folder.iterdir() if RUN_FILES.fullmatch(path.name)]
    if not old:
        return
    print(
        f"Replacing the earlier run in {folder}; its checkpoint is kept as checkpoint.previous.pt"
    )
    for path in old:
        if path.name == "checkpoint.pt":
            path.replace(folder / "checkpoint.previous.pt")
        else:
            path.unlink()


def generate(options: argparse.Namespace) -> None:
    """Draw digits with the checkpoint's generator: all as numbers, the first 100 as a picture."""
    from numpy.lib import format as npy

    folder, count = options.output_dir, options.generate
    device = pick_device(options.device)
    generator = Generator(LATENT_DIM, WIDTH, CHANNELS)
    generator.load_state_dict(load_checkpoint(folder / "checkpoint.pt")["generator"])
    generator.to(device)
    stream = random_stream(options.seed, GENERATE_EPOCH)
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, 28, 28)}
    with replacing(folder / "generated.npy") as file:
        npy.write_array_header_1_0(file, header)
        for start in range(0, count, 500):  # in parts, so that memory does not grow with N
            z = torch.randn(min(500, count - start), LATENT_DIM, 1, 1, generator=stream)
            digits = draw(generator, z.to(device))
            file.write(digits.numpy().tobytes())
            if start == 0:
                picture = grid(digits[:100], scale=2)
    with replacing(folder / "generated.png") as file:
        picture.save(file, "PNG")
    print(
        f"wrote {count:,} digits to {folder / 'generated.npy'}, the first of them to generated.png"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        options = parse_options(argv)
        if options.generate:
            generate(options)
        else:
            train(options)
    except UsageError as error:
        code, message = 2, str(error)
    except (RunError, OSError, torch.OutOfMemoryError) as error:
        code, message = 1, str(error)
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    else:
        return 0
    print(f"{PROGRAM}: error: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())

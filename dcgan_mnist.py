"""DCGAN on MNIST in one file: watch handwritten digits grow out of noise.

    python dcgan_mnist.py --epochs 10       train on the 10,000 bundled digits, offline
    python dcgan_mnist.py --dry-run         train for six steps, to check an installation
    python dcgan_mnist.py --generate 1000   draw digits with the trained generator

The discriminator learns to tell real digits from generated ones; the generator learns to turn
noise into digits that the discriminator takes for real. Networks and training follow Radford,
Metz and Chintala, "Unsupervised Representation Learning with Deep Convolutional Generative
Adversarial Networks" (2016), arXiv:1511.06434. README.md says what is written, and when.
"""

import argparse
import hashlib
import io
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torchsummary import summary
from tqdm import tqdm

LATENT_DIM = 100  # numbers of noise that make one digit
WIDTH = 128  # channels of the layers next to the image; the others have 2 and 4 times as many
SAMPLES = 50  # digits in an epoch's picture
STATS = ("ds_loss", "gn_loss", "true_out", "fake_out_before", "fake_out_after")
LOG_LINE = "({}/{}) ds_loss: {:.3f} - gn_loss: {:.3f} - true_out: {:.3f} - fake_out: {:.3f}>>{:.3f}"


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
        return self.layers(z).float()


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
        """Return the log-odds of being real, (n,), on which the loss never goes flat."""
        return self.layers(images).flatten().float()

    def forward(self, images: Tensor) -> Tensor:
        return torch.sigmoid(self.logits(images))


def weights_init(m: nn.Module) -> None:
    """Start a layer as the paper does: convolutions N(0, 0.02), BatchNorm N(1, 0.02), biases 0."""
    if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)):
        if m.weight is not None:
            nn.init.normal_(m.weight, mean=float(isinstance(m, nn.BatchNorm2d)), std=0.02)
        if m.bias is not None:
            nn.init.zeros_(m.bias)


# ============================================= data =============================================
def load_digits(data_dir: Path, split: str) -> Tensor:
    """Read the digits of a split, "test" or "train", as one tensor (n, 28, 28) of uint8.

    Files missing in ``data_dir/MNIST/raw`` are downloaded; others of MNIST's format will do.
    """
    from torchvision.datasets import MNIST  # here and not above, for it takes a while

    prefix = {"train": "train", "test": "t10k"}[split]
    raw = data_dir / "MNIST" / "raw"
    files = [raw / f"{prefix}-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1")]
    names = " and ".join(file.name for file in files)

    class OneSplit(MNIST):  # which wants the files of both splits, this one only those it reads
        resources = [r for r in MNIST.resources if r[0].startswith(prefix)]  # noqa: RUF012
        raw_folder = str(raw)

    try:
        data = OneSplit(str(data_dir), train=split == "train", download=True)
        if data.data.shape[1:] != (28, 28) or len(data.data) != len(data.targets):
            raise ValueError(f"found {tuple(data.data.shape)} and ({len(data.targets)},)")
    except Exception as error:  # whatever the network or the bytes of a damaged file can cause
        reason = (str(error).splitlines() or [type(error).__name__])[-1]
        fault = "are damaged" if all(file.is_file() for file in files) else "cannot be downloaded"
        raise Failure(f"{names} in {raw} {fault} ({reason}); place sound ones there") from error
    return data.data


def make_batch(digits: Tensor, index: Tensor) -> Tensor:
    """Pick digits (m, 28, 28) of uint8 by index (n,) and scale: (n, 1, 28, 28) in [-1, 1]."""
    return digits[index].unsqueeze(1).float() / 127.5 - 1


def random_stream(seed: int, epoch: int, device: str | torch.device = "cpu") -> torch.Generator:
    """Return the random numbers of an epoch; 0: before the first, -1: of --generate."""
    return torch.Generator(device).manual_seed(seed * 2**20 + epoch)


def shuffled(count: int, seed: int, epoch: int) -> Tensor:
    """Return the order (count,) in which an epoch takes the digits, the same on any device."""
    return torch.randperm(count, generator=random_stream(seed, epoch))


# ====================================== one training step =======================================
class DCGAN:
    """Both networks and optimisers, and how far their training has come: all of a checkpoint."""

    def __init__(self, settings: dict, device: torch.device) -> None:
        place = {"device": device, "memory_format": torch.channels_last}  # the fastest layout
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings["seed"])
            self.generator = Generator(LATENT_DIM, WIDTH).apply(weights_init).to(**place)
            self.discriminator = Discriminator(WIDTH).apply(weights_init).to(**place)
        if settings["precision"] == "bf16":  # weights, losses and optimisers stay in fp32
            mixed = torch.autocast(device.type, torch.bfloat16)
            self.generator.forward = mixed(self.generator.forward)
            self.discriminator.logits = mixed(self.discriminator.logits)
        adam = {"betas": (settings["beta1"], 0.999), "fused": True, "capturable": True}
        self.optimizer_g = torch.optim.Adam(self.generator.parameters(), settings["lr"], **adam)
        self.optimizer_d = torch.optim.Adam(self.discriminator.parameters(), settings["lr"], **adam)
        self.settings = settings
        self.epoch = 0  # epochs done
        stream = random_stream(settings["seed"], epoch=0)
        self.fixed_noise = torch.randn(SAMPLES, LATENT_DIM, 1, 1, generator=stream)
        self.samples = torch.empty(0, SAMPLES, 28, 28).byte()  # drawn from it after each epoch
        self.history = torch.empty(0, len(STATS))  # a row for each step


def training_step(gan: DCGAN, real: Tensor, z: Tensor) -> Tensor:
    """Update the discriminator, then the generator, on one batch.

    Algorithm 1 of Goodfellow et al. (2014), arXiv:1406.2661, with its non-saturating loss. Takes
    images (n, 1, 28, 28) in [-1, 1] and noise (n, latent_dim, 1, 1); returns the STATS, (5,).
    """
    generator, discriminator = gan.generator, gan.discriminator
    bce, ones, zeros = nn.BCEWithLogitsLoss(), real.new_ones(len(real)), real.new_zeros(len(real))
    fake = generator(z)  # (n, 1, 28, 28) in [-1, 1]

    # (1) The discriminator: maximise log D(x) + log(1 - D(G(z))).
    discriminator.requires_grad_(True)
    gan.optimizer_d.zero_grad()
    on_real = discriminator.logits(real)  # (n,)
    on_fake = discriminator.logits(fake.detach())  # detached: no gradient for the generator
    ds_loss = bce(on_real, ones) + bce(on_fake, zeros)
    ds_loss.backward()
    gan.optimizer_d.step()

    # (2) The generator: maximise log D(G(z)) against the updated discriminator, frozen so that
    # the gradient passes through it but none is computed for its weights.
    discriminator.requires_grad_(False)
    gan.optimizer_g.zero_grad()
    on_fake_after = discriminator.logits(fake)  # (n,)
    gn_loss = bce(on_fake_after, ones)
    gn_loss.backward()
    gan.optimizer_g.step()

    outputs = [logits.sigmoid().mean() for logits in (on_real, on_fake, on_fake_after)]
    return torch.stack([ds_loss, gn_loss, *outputs]).detach()


class GraphedStep:
    """training_step, on a GPU replayed from a CUDA graph: one launch instead of hundreds."""

    def __init__(self, gan: DCGAN) -> None:
        self.gan, self.full_steps, self.graph = gan, 0, None

    def __call__(self, real: Tensor, z: Tensor) -> Tensor:
        self.full_steps += len(real) == self.gan.settings["batch_size"]
        if self.full_steps == 4 and real.is_cuda:  # a GPU is warm by then
            self.record(real.clone(), z.clone())
        if self.graph is None or real.shape != self.real.shape:
            return training_step(self.gan, real, z)
        self.real.copy_(real)
        self.z.copy_(z)
        self.graph.replay()
        return self.stats

    def record(self, real: Tensor, z: Tensor) -> None:
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                self.stats = training_step(self.gan, real, z)  # computes nothing until replayed
            self.real, self.z, self.graph = real, z, graph
        except RuntimeError as error:
            print(f"No CUDA graph, so steps take longer: {error}".splitlines()[0])


# ==================================== one epoch and the run =====================================
def print_summaries() -> None:
    """Print torchsummary's tables, of new networks: it would change those it is given."""
    with torch.random.fork_rng(devices=[]):
        print("Generator")
        summary(Generator(LATENT_DIM, WIDTH), (LATENT_DIM, 1, 1), device="cpu")
        print("Discriminator")
        summary(Discriminator(WIDTH), (1, 28, 28), device="cpu")


def train_epoch(step: GraphedStep, digits: Tensor, title: str, every: int, stop: list) -> Tensor:
    """Train on every digit once; return the STATS of each step, (steps, 5). Raises Failure."""
    gan = step.gan
    seed, epoch, device = gan.settings["seed"], gan.epoch + 1, digits.device
    batches = shuffled(len(digits), seed, epoch).to(device).split(gan.settings["batch_size"])
    if gan.settings["dry_run"]:
        batches = batches[:3]
    noise = random_stream(seed, epoch, device)
    stats = torch.zeros(len(batches), len(STATS), device=device)
    print(title)
    for i, index in enumerate(tqdm(batches, title, unit="step", leave=False, disable=None)):
        z = torch.randn(len(index), LATENT_DIM, 1, 1, generator=noise, device=device)
        stats[i] = step(make_batch(digits, index), z)
        if i % every == 0:  # only here, and after the last step, the CPU waits for a GPU
            check_finite(gan, stats[: i + 1], title)
            tqdm.write(LOG_LINE.format(i + 1, len(batches), *stats[i].tolist()))
        if stop:
            break
    check_finite(gan, stats, title)
    return stats.cpu()


def check_finite(gan: DCGAN, stats: Tensor, title: str) -> None:
    """Raise Failure if a figure of a step (a row of stats) or a weight is no finite number."""
    sound = stats.isfinite().all(dim=1)
    weights = [*gan.generator.parameters(), *gan.discriminator.parameters()]
    sound[-1] &= nn.utils.get_total_norm(weights).isfinite()
    if not sound.all():
        raise Failure(f"diverged at step {sound.int().argmin() + 1} of {title}; try a lower --lr")


def train(options: argparse.Namespace) -> None:
    """Train up to the last epoch; bring the output folder up to date after each."""
    device, gan, folder = pick_hardware(options), None, options.output_dir
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())  # no graph can be recorded on the default one
    if options.resume:
        gan = load_checkpoint(folder / "checkpoint.pt", device)
        options = parse_options(options.argv, gan.settings)
        for name, value in gan.settings.items():
            if getattr(options, name) != value:
                given = f"argument --{name.replace('_', '-')}: {getattr(options, name)}"
                raise Failure(f"{given}, but the run to resume has {value}", 2)
        if gan.epoch >= options.epochs:
            print(f"{folder} already holds {gan.epoch} epochs; to go on, give a larger --epochs")
            return
    digits = load_digits(options.data_dir, options.split).to(device)
    if options.batch_size > len(digits):
        raise Failure(f"argument --batch-size: there are only {len(digits)} digits", 2)
    real = digits[shuffled(len(digits), options.seed, epoch=1)[:SAMPLES].to(device)].cpu()
    with folder_lock(folder), stop_signals() as stop:
        if gan is None:
            clear_folder(folder)
            gan = DCGAN({name: getattr(options, name) for name in SHAPING}, device)
        step = GraphedStep(gan)
        print_summaries()
        print(f"Training on {len(digits):,} digits on {device} in {options.precision}")
        start = time.perf_counter()
        while gan.epoch < options.epochs:
            title = f"Epoch {gan.epoch + 1}/{options.epochs}"
            stats = train_epoch(step, digits, title, options.log_every, stop)
            if stop:
                resume = ["--resume"] if gan.epoch and not options.resume else []
                command = shlex.join(["python", sys.argv[0], *options.argv, *resume])
                raise Failure(f"saved up to epoch {gan.epoch}; to go on: {command}", 128 + stop[0])
            gan.epoch += 1
            gan.history = torch.cat([gan.history, stats])
            gan.samples = torch.cat([gan.samples, draw(gan.generator, gan.fixed_noise)[None]])
            write_pictures(gan, real, folder)
            write_history(gan, folder)
            save_checkpoint(gan, folder / "checkpoint.pt")
            print(f"saved to {folder} after {time.perf_counter() - start:.1f} s")


# =========================================== pictures ===========================================
@torch.no_grad()
def draw(generator: Generator, z: Tensor) -> Tensor:
    """Draw digits from noise (n, latent_dim, 1, 1): uint8 (n, 28, 28) on the CPU, 0 is black."""
    device, digits = next(generator.parameters()).device, []
    generator.eval()  # which leaves its BatchNorm statistics alone
    for part in z.split(500):  # to spare memory
        images = generator(part.to(device)).squeeze(1)  # (500, 28, 28) in [-1, 1]
        digits.append(((images + 1) * 127.5).round().byte().cpu())
    generator.train()
    return torch.cat(digits)


def grid(digits: Tensor, caption: str = "") -> Image.Image:
    """Arrange digits (n, 28, 28) of uint8 ten a row, twice their size, under a caption if any."""
    from torchvision.utils import make_grid

    rows = Image.fromarray(make_grid(digits[:, None], nrow=10)[0].numpy())
    width, height, margin = 2 * rows.width, 2 * rows.height, 32 if caption else 0
    picture = Image.new("L", (width, margin + height))
    picture.paste(rows.resize((width, height), Image.Resampling.NEAREST), (0, margin))
    font = ImageFont.load_default(size=20)
    ImageDraw.Draw(picture).text((6, margin / 2), caption, fill=255, font=font, anchor="lm")
    return picture


def write_pictures(gan: DCGAN, real: Tensor, folder: Path) -> None:
    """Write the last epoch's picture, and those of all the run with ``real`` (n, 28, 28) ones."""
    shown = torch.linspace(1, gan.epoch, min(gan.epoch, 10)).round().int().tolist()
    frames = [grid(gan.samples[epoch - 1], f"epoch {epoch}") for epoch in shown]
    frames.append(grid(real, "real digits"))
    timeline = Image.new("L", (frames[0].width, sum(frame.height for frame in frames)))
    for i, frame in enumerate(frames):
        timeline.paste(frame, (0, i * frames[0].height))
    pictures = {"real_samples": grid(real), "timeline": timeline}
    pictures[f"generated_epoch_{gan.epoch:03d}"] = grid(gan.samples[-1])
    for name, picture in pictures.items():
        with replacing(folder / f"{name}.png") as file:
            picture.save(file, "PNG")
    times = [600] * len(shown) + [2000]  # milliseconds
    with replacing(folder / "training.gif") as file:
        frames[0].save(file, "GIF", append_images=frames[1:], save_all=True, duration=times, loop=0)


def write_history(gan: DCGAN, folder: Path) -> None:
    """Write the figures of every step as numbers, and their course as curves."""
    from matplotlib.figure import Figure

    steps = len(gan.history) // gan.epoch  # in an epoch
    index = torch.arange(len(gan.history))
    table = torch.column_stack([index // steps + 1, index % steps + 1, gan.history])
    formats, header = ["%d", "%d"] + ["%.6g"] * len(STATS), ",".join(("epoch", "step", *STATS))
    with replacing(folder / "history.csv") as file:
        np.savetxt(file, table, formats, ",", header=header, comments="")
    group = -(-len(gan.history) // 400)  # steps to a point, so that curves of any length are clear
    points = torch.stack([part.mean(0) for part in gan.history.split(group)])
    x = torch.arange(len(points)) * group + 1
    figure = Figure(figsize=(10, 7), layout="constrained")
    losses, outputs = figure.subplots(2, sharex=True)
    losses.plot(x, points[:, :2], label=["discriminator", "generator"])
    losses.set(title="Losses", ylabel="binary cross-entropy")
    outputs.plot(x, points[:, 2:], label=["real", "generated, before", "generated, after"])
    outputs.set(title="What the discriminator takes for real, before and after its update")
    outputs.set(ylabel="mean probability", xlabel=f"step (mean of {group})", ylim=(0, 1))
    for panel in (losses, outputs):
        panel.grid(alpha=0.3)
        panel.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    with replacing(folder / "loss_curve.png") as file:
        figure.savefig(file, format="png", dpi=100)


# ==================================== files and checkpoints =====================================
CHECKSUM_LENGTH = hashlib.sha256().digest_size  # bytes


@contextmanager
def replacing(path: Path) -> Iterator[io.BufferedWriter]:
    """Open a file and move it to ``path`` once it is whole and on disk. Raises Failure."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise Failure(f"cannot write {path} ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Make the output folder and keep other runs out. Raises Failure if it cannot be used."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("no permission to write")
    except OSError as error:
        raise Failure(f"argument --output-dir: cannot write to {folder} ({error})", 2) from error
    if os.name == "nt":  # Windows can lock no folder
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)  # the system frees the lock however the process ends
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise Failure(f"another run is using {folder}; name another --output-dir") from error
    finally:
        os.close(handle)


def clear_folder(folder: Path) -> None:
    """Remove the files of an earlier run; its checkpoint stays, as checkpoint.previous.pt."""
    names = r"((real_samples|generated_epoch_\d{3,}|timeline|loss_curve)\.png|training\.gif"
    names += r"|history\.csv|checkpoint\.pt)"
    ours = re.compile(rf"{names}|\.{names}\.tmp")
    old = [path for path in folder.iterdir() if ours.fullmatch(path.name)]
    if old:
        print(f"Replacing the earlier run in {folder}; checkpoint.previous.pt keeps its networks")
    for path in old:
        if path.name == "checkpoint.pt":
            path.replace(folder / "checkpoint.previous.pt")
        else:
            path.unlink()


def save_checkpoint(gan: DCGAN, path: Path) -> None:
    """Write all of a run and a SHA-256 of it, which torch.load takes for the archive's comment."""
    content = {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in vars(gan).items()}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    buffer.seek(-2, os.SEEK_END)  # where a zip archive has the length of its comment
    buffer.write(CHECKSUM_LENGTH.to_bytes(2, "little"))
    with replacing(path) as file:
        file.write(buffer.getbuffer())
        file.write(hashlib.sha256(buffer.getbuffer()).digest())


def load_checkpoint(path: Path, device: torch.device) -> DCGAN:
    """Read what save_checkpoint wrote. Raises Failure if it is missing, damaged or foreign."""
    if not path.exists():
        raise Failure(f"there is no {path}; train first, or name another --output-dir")
    data = path.read_bytes()
    if hashlib.sha256(memoryview(data)[:-CHECKSUM_LENGTH]).digest() != data[-CHECKSUM_LENGTH:]:
        raise Failure(f"{path} is damaged or not a checkpoint of this program (wrong check sum)")
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)  # no code
        if set(content["settings"]) != set(SHAPING):
            raise ValueError("it was made with other options")
        gan = DCGAN(content["settings"], device)
        for name, part in vars(gan).items():
            if hasattr(part, "load_state_dict"):
                part.load_state_dict(content[name])
            else:
                setattr(gan, name, content[name])
        return gan
    except Exception as error:  # whatever another version or a forger can put in a file
        raise Failure(f"{path} is not of this version ({str(error)[:200]})") from error


# ========================================= command line =========================================
class Failure(Exception):  # noqa: N818 (being stopped is no error)
    """The program's last line. Exit codes: 1 the world, 2 what the user gave, 128 + a signal."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT (Ctrl-C) and SIGTERM in the list; after the first, the next ends at once."""
    received = []

    def note(signum: int, frame: object) -> None:
        received.append(signum)
        for each in handlers:
            signal.signal(each, signal.SIG_DFL)

    handlers = {each: signal.signal(each, note) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)


FLAGS = {  # name: (default, lowest and highest number or the words allowed, help)
    "epochs": (10, (1, 100_000), "how often to see every digit"),
    "batch_size": (50, (1, 60_000), "digits in a training step"),
    "output_dir": (Path("result"), (), "folder for everything that is written"),
    "data_dir": (Path(__file__).resolve().parent / "MNIST", (), "folder of the digits' files"),
    "split": ("test", ("test", "train"), "the 10,000 bundled digits, or 60,000 to download once"),
    "lr": (0.0002, (1e-8, 1.0), "learning rate of both networks"),
    "beta1": (0.5, (0.0, 0.9999), "Adam's decay rate of the mean gradient"),
    "seed": (0, (0, 2**32 - 1), "where all random numbers start"),
    "device": ("auto", ("auto", "cpu", "cuda", "mps"), "where to compute; auto: on a GPU if any"),
    "precision": ("auto", ("auto", "fp32", "bf16"), "auto: bf16 where the hardware has it"),
    "log_every": (100, (1, 10**6), "steps from one log line to the next"),
    "resume": (False, (), "go on with the run in the output folder"),
    "dry_run": (False, (), "two epochs of three steps, to check an installation"),
    "generate": (None, (1, 100_000), "train nothing, draw this many digits"),
}
SHAPING = ("batch_size", "lr", "beta1", "seed", "split", "precision", "dry_run")  # kept by a run


def parse_options(argv: list[str], settings: dict | None = None) -> argparse.Namespace:
    """Read the command line, with the settings for defaults if given. Raises Failure."""

    def error(message: str) -> None:
        raise Failure(message, 2)

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = error
    for name, (default, allowed, text) in FLAGS.items():
        kind = {"type": type(allowed[0]) if allowed else type(default)}
        if default is False:
            kind = {"action": "store_true"}
        elif isinstance(default, str):
            kind = {"choices": allowed}
        text = f"{text} (default: {default})".replace("%", "%%")
        default = (settings or {}).get(name, default)
        parser.add_argument("--" + name.replace("_", "-"), default=default, help=text, **kind)
    options = parser.parse_args(argv, argparse.Namespace(argv=argv))
    for name, (_, allowed, _) in FLAGS.items():
        value = getattr(options, name)
        if isinstance(value, (int, float)) and allowed and not allowed[0] <= value <= allowed[1]:
            flag = name.replace("_", "-")
            error(f"argument --{flag}: from {allowed[0]} to {allowed[1]}, please, not {value}")
    if options.generate and (options.resume or options.dry_run):
        error("--generate trains nothing: leave out --resume and --dry-run")
    if options.dry_run:
        options.epochs = 2
    return options


def pick_hardware(options: argparse.Namespace) -> torch.device:
    """Return the device, and replace "auto" in options.precision. Raises Failure."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    name = options.device
    if name == "auto":
        name = next((device for device in there if there[device]), "cpu")
    if not there.get(name, True):
        raise Failure(f"argument --device: this machine has no {name}; cpu always works", 2)
    if options.precision == "auto":  # bf16 where the hardware computes in it
        cpu = torch.cpu.get_capabilities()
        native = name == "cpu" and (cpu.get("avx512_bf16") or cpu.get("amx_bf16"))
        if name == "cuda":
            native = torch.cuda.get_device_capability() >= (8, 0)
        options.precision = "bf16" if native else "fp32"
    torch.backends.cudnn.deterministic = True  # the same seed gives the same run
    return torch.device(name)


def generate(options: argparse.Namespace) -> None:
    """Draw digits with a trained generator: all as numbers, the first 100 as a picture too."""
    folder = options.output_dir
    gan = load_checkpoint(folder / "checkpoint.pt", pick_hardware(options))
    z = torch.randn(options.generate, LATENT_DIM, 1, 1, generator=random_stream(options.seed, -1))
    digits = draw(gan.generator, z)
    with replacing(folder / "generated.npy") as file:
        np.save(file, digits.numpy())
    with replacing(folder / "generated.png") as file:
        grid(digits[:100]).save(file, "PNG")
    print(f"wrote {len(z):,} digits to {folder / 'generated.npy'}, the first to generated.png")


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    try:
        options = parse_options(sys.argv[1:] if argv is None else argv)
        command = generate if options.generate else train
        command(options)
        return 0
    except Failure as failure:
        code, message = failure.code, str(failure)
    except (OSError, torch.OutOfMemoryError) as error:
        code, message = 1, str(error)
    except KeyboardInterrupt:
        code, message = 130, "training had not begun"
    kind = "stopped" if code > 128 else "error"
    print(f"dcgan_mnist.py: {kind}: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())

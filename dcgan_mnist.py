# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11.0", "torchvision>=0.26.0", "torchsummary>=1.5.1",
#                 "matplotlib>=3.9.0", "Pillow>=11.0.0", "tqdm>=4.66.1"]
# ///
"""DCGAN on MNIST in one file: watch handwritten digits grow out of noise.

    python dcgan_mnist.py --epochs 10       train on the 10,000 bundled digits, offline
    python dcgan_mnist.py --dry-run         train for six steps, to check an installation
    python dcgan_mnist.py --generate 1000   draw digits with the trained generator

The discriminator learns to tell real digits from generated ones; the generator learns to turn
noise into digits that the discriminator takes for real. After Radford, Metz and Chintala (2016),
"Unsupervised Representation Learning with Deep Convolutional Generative Adversarial Networks",
arXiv:1511.06434. README.md says what is written, and when.
"""

import copy
import hashlib
import io
import json
import math
import os
import re
import shlex
import signal
import sys
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

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
SAMPLES, SCORED, SCORER_EPOCHS = 50, 2000, 10  # digits in a picture and in a score; epochs of the scorer
STATS = ("ds_loss", "gn_loss", "true_out", "fake_out_before", "fake_out_after")
LOG_LINE = "({}/{}) ds_loss: {:.3f} - gn_loss: {:.3f} - true_out: {:.3f} - fake_out: {:.3f}>>{:.3f}"
SCORES = ("fd", "digits", "evenness", "confident")
SCORE_LINE = "score: FD {:.1f} - digits {}/10 - evenness {:.2f} - confident {:.2f}"
RANK = int(os.environ.get("RANK", "0"))  # among torchrun's processes; 0 alone prints and writes
PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))


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
def load_digits(data_dir: Path, split: str) -> tuple[Tensor, Tensor]:
    """Read or download a split: digits (n, 28, 28) of uint8, labels (n,). Raises Failure."""
    from torchvision.datasets import MNIST  # here and not above, for it takes a while

    prefix, raw = {"train": "train", "test": "t10k"}[split], data_dir / "MNIST" / "raw"

    class OneSplit(MNIST):  # which wants the files of both splits, this one only those it reads
        resources = [r for r in MNIST.resources if r[0].startswith(prefix)]  # noqa: RUF012
        raw_folder = str(raw)

    try:
        data = OneSplit(str(data_dir), train=split == "train", download=True)
        if data.data.shape[1:] != (28, 28) or len(data.data) != len(data.targets):
            raise ValueError(f"found {tuple(data.data.shape)} and ({len(data.targets)},)")
        return data.data, data.targets
    except Exception as error:  # whatever the network or the bytes of a damaged file can cause
        names = f"{prefix}-images-idx3-ubyte and {prefix}-labels-idx1-ubyte"
        raise Failure(f"{names} are missing or damaged ({error}); place sound ones in {raw}") from error


def to_images(digits: Tensor) -> Tensor:
    """Scale digits (n, 28, 28) of uint8 to images (n, 1, 28, 28) in [-1, 1]."""
    return digits.unsqueeze(1).float() / 127.5 - 1


def random_stream(seed: int, epoch: int, device: str | torch.device = "cpu") -> torch.Generator:
    """Return the random numbers of an epoch; 0: before the first, below 0: of drawing."""
    return torch.Generator(device).manual_seed(seed * 2**20 + epoch)


def make_noise(count: int, seed: int, epoch: int) -> Tensor:
    """Draw noise (count, latent_dim, 1, 1) on the CPU, so that it is the same on any device."""
    return torch.randn(count, LATENT_DIM, 1, 1, generator=random_stream(seed, epoch))


# ====================================== one training step =======================================
class DCGAN:
    """Both networks and optimisers, and how far their training has come: all of a checkpoint."""

    def __init__(self, settings: dict, device: torch.device) -> None:
        place = {"device": device, "memory_format": torch.channels_last}  # the fastest layout
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings["seed"])
            self.generator = Generator(LATENT_DIM, WIDTH).apply(weights_init).to(**place)
            self.discriminator = Discriminator(WIDTH).apply(weights_init).to(**place)
        self.average = copy.deepcopy(self.generator).eval().requires_grad_(False)
        if settings["precision"] == "bf16":  # weights, losses and optimisers stay in fp32
            mixed = torch.autocast(device.type, torch.bfloat16)
            self.generator.forward = mixed(self.generator.forward)
            self.average.forward = mixed(self.average.forward)
            self.discriminator.logits = mixed(self.discriminator.logits)
        adam = {"betas": (settings["beta1"], settings["beta2"]), "fused": True, "capturable": True}
        self.optimizer_g = torch.optim.Adam(self.generator.parameters(), settings["lr"], **adam)
        self.optimizer_d = torch.optim.Adam(self.discriminator.parameters(), settings["lr"], **adam)
        self.settings, self.epoch = settings, 0  # epochs done
        self.fixed_noise = make_noise(SAMPLES, settings["seed"], epoch=0)
        self.samples = torch.empty(0, SAMPLES, 28, 28).byte()  # drawn from it after each epoch
        self.history = torch.empty(0, len(STATS + SCORES))  # a row for each step
        self.best_fd, self.best_epoch = math.inf, 0


def training_step(gan: DCGAN, real: Tensor, z: Tensor) -> Tensor:
    """Update both networks on images (n, 1, 28, 28) in [-1, 1] and noise; return the STATS (5,).

    Algorithm 1 of Goodfellow et al. (2014), arXiv:1406.2661, with its non-saturating loss.
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
    update_average = get_ema_multi_avg_fn(gan.settings["ema"])  # which draws the better digits
    update_average(list(gan.average.parameters()), list(generator.parameters()), None)
    outputs = [logits.sigmoid().mean() for logits in (on_real, on_fake, on_fake_after)]
    return torch.stack([ds_loss, gn_loss, *outputs]).detach()


class GraphedStep:
    """training_step, on a GPU replayed from a CUDA graph: one launch instead of hundreds."""

    def __init__(self, gan: DCGAN) -> None:
        self.gan, self.full_steps, self.graph = gan, 0, None

    def __call__(self, real: Tensor, z: Tensor) -> Tensor:
        self.full_steps += len(real) == self.gan.settings["batch_size"]
        if self.full_steps == 4 and real.is_cuda:  # a GPU is warm by then
            self.real, self.z = real.clone(), z.clone()
            try:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                    self.stats = training_step(self.gan, self.real, self.z)  # not yet computed
                self.graph = graph
            except RuntimeError as error:
                print(f"No CUDA graph, so steps take longer: {error}".splitlines()[0])
        if self.graph is None or real.shape != self.real.shape:
            return training_step(self.gan, real, z)
        self.real.copy_(real)
        self.z.copy_(z)
        self.graph.replay()
        return self.stats


class SharedStep:
    """training_step in several processes at once, each with its share of the batch."""

    def __init__(self, gan: DCGAN) -> None:
        self.gan = gan
        for network in (gan.generator, gan.discriminator):
            for parameter in network.parameters():
                parameter.register_post_accumulate_grad_hook(lambda p: self.average(p.grad))
            if parameter.is_cuda:
                nn.SyncBatchNorm.convert_sync_batchnorm(network)  # statistics of the whole batch

    def __call__(self, real: Tensor, z: Tensor) -> Tensor:
        real, z = (part.tensor_split(PROCESSES)[RANK] for part in (real, z))
        stats = training_step(self.gan, real, z)
        self.average(stats)
        return stats

    def average(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor)
        tensor /= PROCESSES


# ==================================== one epoch and the run =====================================
def train_epoch(step: GraphedStep | SharedStep, digits: Tensor, title: str, every: int) -> Tensor:
    """Train on every digit once; return the STATS of each step, (steps, 5). Raises Failure."""
    gan = step.gan
    seed, epoch, device = gan.settings["seed"], gan.epoch + 1, digits.device
    order = torch.randperm(len(digits), generator=random_stream(seed, epoch))  # on any device
    batches = order.to(device).split(gan.settings["batch_size"])
    if gan.settings["dry_run"]:
        batches = batches[:3]
    noise = random_stream(seed, epoch, device)
    stats = torch.zeros(len(batches), len(STATS), device=device)
    print(title)
    for i, index in enumerate(tqdm(batches, title, unit="step", leave=False, disable=RANK > 0 or None)):
        z = torch.randn(len(index), LATENT_DIM, 1, 1, generator=noise, device=device)
        stats[i] = step(to_images(digits[index]), z)
        if i % every == 0 or i + 1 == len(batches):  # only here the CPU waits for a GPU
            sound = stats[: i + 1].isfinite().all(dim=1)
            weights = [*gan.generator.parameters(), *gan.discriminator.parameters()]
            sound[i] &= nn.utils.get_total_norm(weights).isfinite()
            if not sound.all():
                raise Failure(f"diverged at step {sound.int().argmin() + 1} of {title}; lower --lr")
        if i % every == 0:
            tqdm.write(LOG_LINE.format(i + 1, len(batches), *stats[i].tolist()))
    return stats


def train(gan: DCGAN, digits: Tensor, scorer: Callable | None, options: Namespace) -> None:
    """Train up to the last epoch; bring the output folder up to date after each."""
    step = SharedStep(gan) if PROCESSES > 1 else GraphedStep(gan)
    folder, saved, start = options.output_dir, gan.epoch, time.perf_counter()
    first = torch.randperm(len(digits), generator=random_stream(gan.settings["seed"], epoch=1))
    real = digits[first[:SAMPLES].to(digits.device)].cpu()
    try:
        while saved < options.epochs:
            title = f"Epoch {saved + 1}/{options.epochs}"
            end_epoch(gan, train_epoch(step, digits, title, options.log_every), scorer)
            write_results(gan, real, folder)
            if gan.best_epoch == gan.epoch:
                save_checkpoint(gan, folder / "generator_best.pt", DRAWING)
            save_checkpoint(gan, folder / "checkpoint.pt")
            saved = gan.epoch
            print(f"saved to {folder} after {time.perf_counter() - start:.1f} s")
    except KeyboardInterrupt as stopped:
        resume = ["--resume"] if saved and not options.resume else []
        launcher = f"torchrun --nproc-per-node={PROCESSES}" if PROCESSES > 1 else "python"
        command = f"{launcher} {shlex.join([sys.argv[0], *options.argv, *resume])}"
        raise Failure(f"saved up to epoch {saved}; to go on: {command}", 128 + stopped.args[0]) from stopped
    if gan.best_epoch:
        print(f"The best epoch was {gan.best_epoch}: generator_best.pt, for --generate N --best")


def end_epoch(gan: DCGAN, stats: Tensor, scorer: Callable | None) -> None:
    """Add an epoch's figures, pictures and score to the run; warn of a collapse."""
    gan.epoch += 1
    # BatchNorm statistics that fit the averaged weights:
    update_bn(make_noise(1000, gan.settings["seed"], epoch=-2).split(100), gan.average, stats.device)
    gan.samples = torch.cat([gan.samples, draw(gan.average, gan.fixed_noise)[None]])
    score = dict.fromkeys(SCORES, math.nan)
    if scorer:
        score = scorer(draw(gan.average, make_noise(SCORED, gan.settings["seed"], epoch=-1)))
        print(SCORE_LINE.format(*score.values()))
    rows = torch.cat([stats.cpu(), torch.tensor([*score.values()]).expand(len(stats), -1)], dim=1)
    gan.history = torch.cat([gan.history, rows])
    if score["fd"] < gan.best_fd:
        gan.best_fd, gan.best_epoch = score["fd"], gan.epoch
    signs = {
        f"only {score['digits']} of the ten digits appear": score["digits"] < 8,
        "FD is more than twice its best": score["fd"] > 2 * gan.best_fd,
        "ds_loss stayed under 0.05": rows[:, 0].max() < 0.05,
    }
    seen = " and ".join(sign for sign, there in signs.items() if there)
    if seen and not gan.settings["dry_run"]:
        print(f"warning: {seen}; README.md says what to do")


# =========================================== pictures ===========================================
@torch.no_grad()
def draw(generator: nn.Module, z: Tensor) -> Tensor:
    """Draw digits from noise (n, latent_dim, 1, 1): uint8 (n, 28, 28) on the CPU, 0 is black."""
    device = next(generator.parameters()).device
    parts = [generator(part.to(device)).squeeze(1) for part in z.split(100)]  # in [-1, 1]
    return torch.cat([((part + 1) * 127.5).round().byte().cpu() for part in parts])


def grid(digits: Tensor, caption: str = "") -> Image.Image:
    """Arrange digits (n, 28, 28) of uint8 ten a row, twice their size, under a caption if any."""
    from torchvision.utils import make_grid

    rows = Image.fromarray(make_grid(digits[:, None], nrow=10)[0].numpy())
    rows = ImageOps.scale(rows, 2, Image.Resampling.NEAREST)
    picture = ImageOps.expand(rows, (0, 32 if caption else 0, 0, 0))  # above
    ImageDraw.Draw(picture).text((6, 16), caption, fill=255, font_size=20, anchor="lm")
    return picture


def write_results(gan: DCGAN, real: Tensor, folder: Path) -> None:
    """Write the pictures, with ``real`` digits (n, 28, 28), and the history as table and curves."""
    from matplotlib.figure import Figure

    shown = torch.linspace(1, gan.epoch, min(gan.epoch, 10)).round().int().tolist()
    frames = [grid(gan.samples[epoch - 1], f"epoch {epoch}") for epoch in shown]
    frames.append(grid(real, "real digits").crop((0, 0, *frames[0].size)))  # if fewer than 50
    write(folder / "real_samples.png", grid(real).save, "PNG")
    write(folder / f"generated_epoch_{gan.epoch:03d}.png", grid(gan.samples[-1]).save, "PNG")
    write(folder / "timeline.png", Image.fromarray(np.vstack(frames)).save, "PNG")
    animation = {"append_images": frames[1:], "duration": [600] * len(shown) + [2000], "loop": 0}
    write(folder / "training.gif", frames[0].save, "GIF", save_all=True, **animation)
    rows, steps = torch.arange(len(gan.history)), len(gan.history) // gan.epoch
    table = torch.column_stack([rows // steps + 1, rows % steps + 1, gan.history])
    names = ("epoch", "step", *STATS, *SCORES)
    write(folder / "history.csv", np.savetxt, table, "%.6g", ",", header=",".join(names), comments="")
    group = -(-len(rows) // 400)  # steps to a point, so that curves of any length are clear
    points = torch.stack([part.mean(0) for part in table.split(group)])
    figure = Figure(figsize=(10, 10), layout="constrained")
    panels = figure.subplots(3, sharex=True)
    axes = ("cross-entropy", "linear"), ("Frechet distance to real digits", "log"), ("mean output", "linear")
    for panel, (axis, scale), columns in zip(panels, axes, ([2, 3], [7], [4, 5, 6]), strict=True):
        panel.plot(rows[::group] + 1, points[:, columns], label=[names[c] for c in columns])
        panel.set(ylabel=axis, yscale=scale)
        panel.grid(alpha=0.3)
        panel.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    panels[-1].set(xlabel=f"step (mean of {group})", ylim=(0, 1))
    write(folder / "loss_curve.png", figure.savefig, format="png", dpi=100)


def walk(a: Tensor, b: Tensor) -> Tensor:
    """Return noise (10 n, ...) from each of a (n, ...) to that of b, on spheres (Shoemake 1985)."""
    angle = torch.cosine_similarity(a, b, dim=1).acos()[:, None, None]  # (n, 1, 1, 1, 1)
    t = torch.linspace(0, 1, 10).view(1, 10, 1, 1, 1) * angle
    return (((angle - t).sin() * a[:, None] + t.sin() * b[:, None]) / angle.sin()).flatten(0, 1)


def above_nearest(digits: Tensor, real: Tensor) -> Tensor:
    """Return 40 digits for a grid: ten given ones, the real ones nearest in pixels, ten more."""
    digits = digits[torch.arange(20) % len(digits)]
    nearest = torch.cdist(digits.flatten(1).float(), real.flatten(1).float()).argmin(dim=1)
    return torch.cat([digits[:10], real[nearest[:10]], digits[10:], real[nearest[10:]]])


# ============================================ scores ============================================
class Scorer:
    """Tell how good generated digits are, by a small classifier that learns the bundled ones."""

    def __init__(self, device: torch.device) -> None:
        digits, labels = (part.to(device) for part in load_digits(FLAGS["data_dir"][0], "test"))
        stream = random_stream(seed=0, epoch=0)
        order = torch.randperm(len(digits), generator=stream)
        held_out, seen = order[:1000], order[1000:]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            body = Discriminator(width=16).layers[:-1]  # (n, 64, 3, 3)
            head = nn.Flatten(), nn.Linear(576, 64), nn.ReLU(), nn.Linear(64, 10)
            self.classifier = nn.Sequential(*body, *head).to(device)
        optimizer = torch.optim.Adam(self.classifier.parameters(), fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.005, SCORER_EPOCHS * len(seen) // 100)
        for _ in range(SCORER_EPOCHS):
            for index in seen[torch.randperm(len(seen), generator=stream)].split(100):
                shift = torch.randint(-2, 3, (2,), generator=stream).tolist()  # pixels
                images = to_images(digits[index]).roll(shift, dims=(2, 3))
                loss = nn.functional.cross_entropy(self.classifier(images), labels[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        self.classifier.eval()
        self.reference = self.judge(digits[order[SCORED:]])[0]
        self.floor = frechet_distance(self.judge(digits[order[:SCORED]])[0], self.reference)
        right = (self.judge(digits[held_out])[1].argmax(1) == labels[held_out].cpu()).float().mean()
        print(f"scorer: {right:.1%} of 1,000 held-out digits right - floor: FD {self.floor:.1f}")

    @torch.no_grad()
    def judge(self, digits: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (n, 64) and probabilities (n, 10) of digits (n, 28, 28) of uint8."""
        device = self.classifier[0].weight.device
        images = (to_images(part.to(device)) for part in digits.split(500))
        features = torch.cat([self.classifier[:-1](part) for part in images])
        return features.cpu(), self.classifier[-1](features).softmax(dim=1).cpu()

    def __call__(self, digits: Tensor) -> dict[str, float]:
        """Return the SCORES of digits (n, 28, 28) of uint8 by their names."""
        features, probabilities = self.judge(digits)
        shares = probabilities.argmax(1).bincount(minlength=10) / len(digits)
        return {
            "fd": frechet_distance(features, self.reference),
            "digits": (shares >= 0.02).sum().item(),
            "evenness": torch.special.entr(shares).sum().item() / math.log(10),
            "confident": (probabilities.amax(1) > 0.9).float().mean().item(),
        }


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Return the squared Frechet distance of the Gaussians that fit features (n, d) and (m, d).

    |mean A - mean B|^2 + tr(A) + tr(B) - 2 tr((A B)^(1/2)) of the covariances A and B (Dowson and
    Landau 1982). The eigenvalues of A B are real; their roots add up to the last trace.
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    roots = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt()
    traces = cov_a.trace() + cov_b.trace() - 2 * roots.sum()
    return ((a.mean(dim=0) - b.mean(dim=0)).square().sum() + traces).item()


# ==================================== files and checkpoints =====================================
DRAWING = ("settings", "epoch", "average")  # the parts of a run that draw its digits
CHECKSUM_LENGTH = hashlib.sha256().digest_size  # bytes


def write(path: Path, save: Callable, *arguments: object, **options: object) -> None:
    """Call ``save(file, ...)`` and move the file to ``path`` once it is on disk. Raises Failure."""
    if RANK > 0:
        return
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            save(file, *arguments, **options)
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
    if os.name == "nt" or RANK > 0:  # Windows can lock no folder
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
    names = r"real_samples|generated_epoch_\d{3,}|timeline|loss_curve|training|history|checkpoint"
    ours = re.compile(rf"\.?({names}|generator_best)\.(png|gif|csv|pt)(\.tmp)?")
    old = [path for path in folder.iterdir() if ours.fullmatch(path.name)]
    if old:
        print(f"Replacing the earlier run in {folder}; checkpoint.previous.pt keeps its networks")
    for path in old if RANK == 0 else []:
        if path.name == "checkpoint.pt":
            path.replace(folder / "checkpoint.previous.pt")
        else:
            path.unlink()


def save_checkpoint(gan: DCGAN, path: Path, parts: tuple = ()) -> None:
    """Write a run, or parts of it, and a SHA-256 that torch.load takes for an archive's comment."""
    content = {name: getattr(gan, name) for name in parts or vars(gan)}
    content = {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in content.items()}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    buffer.seek(-2, os.SEEK_END)  # where a zip archive has the length of its comment
    buffer.write(CHECKSUM_LENGTH.to_bytes(2, "little"))
    buffer.write(hashlib.sha256(buffer.getbuffer()).digest())
    write(path, lambda file: file.write(buffer.getbuffer()))


def load_checkpoint(path: Path, device: torch.device, parts: tuple = ()) -> DCGAN:
    """Read what save_checkpoint wrote. Raises Failure if it is missing, damaged or foreign."""
    if not path.exists():
        raise Failure(f"there is no {path}; train first, or name another --output-dir")
    data = path.read_bytes()
    if hashlib.sha256(memoryview(data)[:-CHECKSUM_LENGTH]).digest() != data[-CHECKSUM_LENGTH:]:
        raise Failure(f"{path} is damaged or not a checkpoint of this program (wrong check sum)")
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)  # no code
        if set(content["settings"]) != set(SETTINGS):
            raise ValueError(f"its settings are {', '.join(content['settings'])}")
        gan = DCGAN(content["settings"], device)
        for name in parts or vars(gan):
            part = getattr(gan, name)
            if hasattr(part, "load_state_dict"):
                part.load_state_dict(content[name])
            else:
                setattr(gan, name, content[name])
        return gan
    except Exception as error:  # whatever another version or a forger can put in a file
        raise Failure(f"{path} is not of this version ({str(error)[:200]})") from error


def load_generator(folder: Path | str, best: bool = False, device: str = "cpu") -> Generator:
    """Load the generator of the last epoch, or the best one; in eval mode. Raises Failure."""
    path = Path(folder) / ("generator_best.pt" if best else "checkpoint.pt")
    return load_checkpoint(path, torch.device(device), DRAWING).average


# ========================================= command line =========================================
class Failure(Exception):  # noqa: N818 (being stopped is no error)
    """The program's last line. Exit codes: 1 the world, 2 what the user gave, 128 + a signal."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def stop(signum: int, frame: object) -> None:
    """Handle SIGINT (Ctrl-C) or SIGTERM; the next one ends at once."""
    signal.signal(signum, signal.SIG_DFL)
    raise KeyboardInterrupt(signum)


FLAGS = {  # name: (default, lowest and highest number or the words allowed, help)
    "recipe": ("article", ("article", "tuned"), "training as published, or for better digits"),
    "epochs": (10, (1, 100_000), "how often to see every digit"),
    "batch_size": (50, (1, 60_000), "digits in a training step"),
    "output_dir": (Path("result"), (), "folder for everything that is written"),
    "data_dir": (Path(__file__).resolve().parent / "MNIST", (), "folder of the digits' files"),
    "split": ("test", ("test", "train"), "the 10,000 bundled digits, or 60,000 to download once"),
    "lr": (0.0002, (1e-8, 1.0), "learning rate of both networks"),
    "beta1": (0.5, (0.0, 0.9999), "Adam's decay rate of the mean gradient"),
    "beta2": (0.999, (0.0, 0.999999), "Adam's decay rate of the mean squared gradient"),
    "ema": (0.99, (0.0, 0.9999), "decay of the averaged weights that draw; 0: no average"),
    "seed": (0, (0, 2**32 - 1), "where all random numbers start"),
    "device": ("auto", ("auto", "cpu", "cuda", "mps"), "where to compute; auto: on a GPU if any"),
    "precision": ("auto", ("auto", "fp32", "bf16"), "auto: bf16 where the hardware has it"),
    "log_every": (100, (1, 10**6), "steps from one log line to the next"),
    "resume": (False, (), "go on with the run in the output folder"),
    "dry_run": (False, (), "two epochs of three steps, to check an installation"),
    "generate": (None, (1, 100_000), "train nothing, draw this many digits"),
    "interpolate": (False, (), "train nothing, draw ten walks from one digit to another"),
    "evaluate": (None, (), "train nothing, score the checkpoint, or digits in the .npy file named"),
    "best": (False, (), "draw or evaluate with the best epoch's generator"),
    "no_score": (False, (), "train without scores"),
}
RECIPES = {"article": {}, "tuned": {"lr": 0.002, "beta2": 0.99}}  # defaults of other flags
SETTINGS = ("recipe", "batch_size", "lr", "beta1", "beta2", "ema", "seed", "split", "precision", "dry_run")


def parse_options(argv: list[str], settings: dict | None = None) -> Namespace:
    """Read the command line, with the settings for defaults if given. Raises Failure."""

    def error(message: str) -> None:
        raise Failure(message, 2)

    parser = ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error, parser.formatter_class = error, ArgumentDefaultsHelpFormatter
    modes = parser.add_mutually_exclusive_group()
    for name, (default, allowed, text) in FLAGS.items():
        kind = {"type": type(allowed[0]) if allowed else type(default)}
        if default is False:
            kind = {"action": "store_true"}
        elif isinstance(default, str):
            kind = {"choices": allowed}
        elif name == "evaluate":
            kind = {"nargs": "?", "const": Path(), "type": Path, "metavar": "FILE"}
        group = modes if name in ("resume", "generate", "interpolate", "evaluate") else parser
        group.add_argument("--" + name.replace("_", "-"), default=default, help=text, **kind)
    recipe = RECIPES[parser.parse_args(argv).recipe]
    options = parser.parse_args(argv, Namespace(argv=argv, **recipe | (settings or {})))
    for name, (_, allowed, _) in FLAGS.items():
        value = getattr(options, name)
        if isinstance(value, (int, float)) and allowed and not allowed[0] <= value <= allowed[1]:
            flag = name.replace("_", "-")
            error(f"argument --{flag}: from {allowed[0]} to {allowed[1]}, please, not {value}")
    options.trained = options.generate or options.interpolate or options.evaluate
    if (options.best and not options.trained) or (options.dry_run and options.trained):
        error("--best goes with --generate, --interpolate or --evaluate, --dry-run with none")
    if options.dry_run:
        options.epochs = 2
    return options


def pick_hardware(options: Namespace) -> torch.device:
    """Return the device, and replace "auto" in options.precision. Raises Failure."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    name = options.device if options.device != "auto" else next((d for d in there if there[d]), "cpu")
    if not there.get(name, True):
        raise Failure(f"argument --device: this machine has no {name}; cpu always works", 2)
    if options.precision == "auto":
        cpu = torch.cpu.get_capabilities() if name == "cpu" else {}
        native = cpu.get("avx512_bf16") or cpu.get("amx_bf16")
        if name == "cuda":
            native = torch.cuda.get_device_capability() >= (8, 0)
        options.precision = "bf16" if native else "fp32"
    torch.backends.cudnn.deterministic = True  # the same seed gives the same run
    return torch.device(name)


def start(options: Namespace) -> None:
    """Begin a run, or take up that in the output folder, and train. Raises Failure."""
    device, gan, folder = pick_hardware(options), None, options.output_dir
    if PROCESSES > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_stream(torch.cuda.Stream())  # no graph can be recorded on the default one
    if options.resume:
        gan = load_checkpoint(folder / "checkpoint.pt", device)
        options = parse_options(options.argv, gan.settings)
        for name, kept in gan.settings.items():
            if (given := getattr(options, name)) != kept:
                raise Failure(f"argument --{name.replace('_', '-')}: {given}, but the run has {kept}", 2)
        if gan.epoch >= options.epochs:
            print(f"{folder} already holds {gan.epoch} epochs; to go on, give a larger --epochs")
            return
    data = [load_digits(options.data_dir, options.split)[0] if RANK == 0 else None]
    if PROCESSES > 1:
        dist.broadcast_object_list(data)
    digits = data[0].to(device)
    if options.batch_size > len(digits):
        raise Failure(f"argument --batch-size: there are only {len(digits)} digits", 2)
    if options.batch_size % PROCESSES or 0 < len(digits) % options.batch_size < PROCESSES:
        raise Failure(f"argument --batch-size: {PROCESSES} processes cannot share every batch", 2)
    with folder_lock(folder):
        scorer = None if options.no_score or RANK > 0 else Scorer(device)
        if gan is None:
            clear_folder(folder)
            gan = DCGAN({name: getattr(options, name) for name in SETTINGS}, device)
        with torch.random.fork_rng(devices=[]):  # for summary runs the networks
            summary(Generator(LATENT_DIM, WIDTH), (LATENT_DIM, 1, 1), device="cpu")
            summary(Discriminator(WIDTH), (1, 28, 28), device="cpu")
        print(f"Training on {len(digits):,} digits on {device} in {options.precision}")
        train(gan, digits, scorer, options)
    if PROCESSES > 1:
        dist.destroy_process_group()


def use(options: Namespace) -> None:
    """Draw digits with a trained generator, or walks between some, or score it or a file."""
    device, folder, source = pick_hardware(options), options.output_dir, options.evaluate
    if source in (None, Path()):
        source = folder / ("generator_best.pt" if options.best else "checkpoint.pt")
        gan = load_checkpoint(source, device, DRAWING)
        options.split = gan.settings["split"]
        z = make_noise(options.generate or 10_000, options.seed, epoch=-1)
        if options.interpolate:
            z = walk(z[:10], z[10:20])
        digits = draw(gan.average, z)
    else:
        try:
            digits = torch.from_numpy(np.load(source, allow_pickle=False))
            if digits.dtype != torch.uint8 or digits.shape[1:] != (28, 28) or len(digits) < 2:
                raise ValueError(f"it holds {digits.dtype} of shape {tuple(digits.shape)}")
        except Exception as error:  # whatever numpy finds wrong with it
            raise Failure(f"argument --evaluate: {source}: {error}", 2) from error
    if options.generate:
        write(folder / "generated.npy", np.save, digits.numpy())
        write(folder / "generated.png", grid(digits[:100]).save, "PNG")
    elif options.interpolate:
        write(folder / "interpolation.png", grid(digits).save, "PNG")
    else:
        real, scorer = load_digits(options.data_dir, options.split)[0], Scorer(device)
        score = scorer(digits)
        print(SCORE_LINE.format(*score.values()))
        score |= {"floor": scorer.floor, "count": len(digits), "of": str(source)}
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "score.json", lambda file: file.write(json.dumps(score, indent=1).encode()))
        write(folder / "nearest.png", grid(above_nearest(digits, real)).save, "PNG")
    print(f"saved to {folder}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, stop if RANK == 0 else signal.SIG_DFL)
    try:
        with redirect_stdout(io.StringIO() if RANK > 0 else sys.stdout):
            options = parse_options(sys.argv[1:] if argv is None else argv)
            (use if options.trained else start)(options)
        return 0
    except Failure as failure:
        code, message = failure.code, str(failure)
    except (OSError, torch.OutOfMemoryError) as error:
        code, message = 1, str(error)
    except RuntimeError as error:
        if not dist.is_initialized():
            raise
        code, message = 1, f"a process of this run has ended; --resume goes on ({str(error)[:200]})"
    except KeyboardInterrupt as stopped:
        code, message = 128 + stopped.args[0], "training had not begun"
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which torchrun sends when a process ends
    if RANK == 0:
        kind = "stopped" if code > 128 else "error"
        print(f"dcgan_mnist.py: {kind}: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())

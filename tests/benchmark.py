"""How fast the program is, and how soon its digits are good, beside a textbook loop.

    python tests/benchmark.py                the speed of a step: two minutes on two cores
    python tests/benchmark.py --to-quality   from the textbook loop to the record: two hours

All that is compared takes turns, so that a change of the machine's speed meets all of it. The speed
of a step is the median over the rounds. For the ladder, whole commands are timed, from launch to
exit, and their digits scored; each rung adds one thing to the one above, down to the record. Below
it stand the recipes. All numbers of epochs were fixed before these runs, and the record's settings
were chosen with other seeds.
"""

import argparse
import dataclasses
import io
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import MNIST, VisionDataset

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dcgan_mnist  # noqa: E402
from dcgan_mnist import Settings  # noqa: E402

BATCH_SIZE = 50
# Multiply-adds of an image: channels in and out, pixels of the kernel, places where it lies.
DISCRIMINATOR = 128 * 16 * 14**2 + 128 * 256 * 16 * 7**2 + 256 * 512 * 9 * 3**2 + 512 * 9
GENERATOR = 100 * 512 * 9 + 512 * 256 * 9 * 3**2 + 256 * 128 * 16 * 7**2 + 128 * 16 * 14**2
# A step passes three times through the generator: forward, and backward for weights and for inputs;
# eight times through the discriminator: forward on real and fake images, and on fake ones after its
# update; backward for inputs in all three cases, for weights in the first two.
STEP_GFLOP = 2 * BATCH_SIZE * (8 * DISCRIMINATOR + 3 * GENERATOR) / 1e9
SIDE = 2048  # rows and columns of the matrices whose product is the limit of speed
PRODUCT_GFLOP = 2 * SIDE**3 / 1e9
STEPS = 5  # in a round
ROUNDS = 20
EPOCHS = 10  # of the textbook loop and of the recipes article and tuned
RECORD_EPOCHS = 2  # the fewest in which the record reaches the textbook loop's digits
SAME_TIME_EPOCHS = 12  # of the recipe tuned, in no more than the textbook loop's time
SEEDS = (0, 1, 2)
RECORD_SEEDS = tuple(range(100, 110))
EVALUATED = 10_000  # digits drawn to score a run
PICTURE = ROOT / "result" / "same_time.png"
Round = Callable[[], float]  # takes some steps, or multiplies some matrices: seconds of one


class BundledDigits(MNIST):
    """torchvision's MNIST with the bundled test split, which it cannot read gzipped."""

    def __init__(self, transform: Callable) -> None:
        VisionDataset.__init__(self, dcgan_mnist.BUNDLED, transform=transform)
        self.data = dcgan_mnist.load_pictures(None, "test")[0]
        labels = dcgan_mnist.BUNDLED / "t10k-labels-idx1-ubyte.gz"
        self.targets = dcgan_mnist.read_idx(labels)


def textbook_loop(
    generator: nn.Module, discriminator: nn.Module, settings: Settings, device: torch.device
) -> Iterator[None]:
    """Train two networks as tutorials do; stop after each step."""
    scale = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])
    loader = DataLoader(BundledDigits(scale), batch_size=settings.batch_size, shuffle=True)
    adam = {"lr": settings.lr, "betas": (settings.beta1, settings.beta2)}
    optimizer_g = torch.optim.Adam(generator.parameters(), **adam)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), **adam)
    criterion = nn.BCELoss()
    while True:
        for batch, _ in loader:
            real = batch.to(device)
            ones = torch.ones(len(real), device=device)
            zeros = torch.zeros(len(real), device=device)
            discriminator.zero_grad()
            on_real = discriminator(real)
            loss_real = criterion(on_real, ones)
            loss_real.backward()
            fake = generator(torch.randn(len(real), settings.latent_dim, 1, 1, device=device))
            loss_fake = criterion(discriminator(fake.detach()), zeros)
            loss_fake.backward()
            optimizer_d.step()
            generator.zero_grad()
            loss_g = criterion(discriminator(fake), ones)
            loss_g.backward()
            optimizer_g.step()
            for figure in (loss_real + loss_fake, loss_g, on_real.mean()):
                figure.item()  # for the log
            yield


def textbook_networks(settings: Settings, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """Return a generator and a discriminator with the first weights of DCGAN."""
    generator = dcgan_mnist.Generator(settings.latent_dim, settings.width)
    discriminator = dcgan_mnist.Discriminator(settings.width)
    for network in (generator, discriminator):
        network.apply(dcgan_mnist.weights_init).to(device)
    return generator, discriminator


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def textbook_round(device: torch.device, sizes: Settings, count: int) -> Round:
    """Return what takes some steps of the textbook loop."""
    loop = textbook_loop(*textbook_networks(sizes, device), sizes, device)

    def take_steps() -> float:
        start = time.perf_counter()
        for _ in range(count):
            next(loop)
        wait_for(device)
        return (time.perf_counter() - start) / count

    return take_steps


def program_round(device: torch.device, settings: Settings, count: int) -> Round:
    """Return what takes some steps of the program, as a run takes them: from one to the next."""
    gan = dcgan_mnist.DCGAN(settings, device)
    step = dcgan_mnist.fastest_step(gan)
    digits = dcgan_mnist.load_pictures(None, "test")[0][: (count + 1) * settings.batch_size]
    digits = digits.to(device)
    starts: list[float] = []

    def timed_step(real: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        if len(starts) in (0, count):
            wait_for(device)
        starts.append(time.perf_counter())
        return step(real, z)

    def take_steps() -> float:
        starts.clear()
        epochs = gan.epoch + 1
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            next(dcgan_mnist.train_epochs(gan, timed_step, digits, epochs, log_every=100))
        return (starts[-1] - starts[0]) / count

    return take_steps


def product_round(device: torch.device, dtype: torch.dtype, count: int) -> Round:
    """Return what multiplies two square matrices of random numbers some times."""
    a = torch.randn(SIDE, SIDE, device=device).to(dtype)
    b = torch.randn(SIDE, SIDE, device=device).to(dtype)

    def multiply() -> float:
        start = time.perf_counter()
        for _ in range(count):
            a @ b
        wait_for(device)
        return (time.perf_counter() - start) / count

    return multiply


def medians(rounds_of: dict[str, Round]) -> dict[str, float]:
    """Return the median seconds of a step or product of each, all taking turns."""
    for take_steps in rounds_of.values():  # to warm up
        take_steps()
    seconds = {name: [] for name in rounds_of}
    for _ in range(ROUNDS):
        for name, take_steps in rounds_of.items():
            seconds[name].append(take_steps())
    return {name: statistics.median(times) for name, times in seconds.items()}


def speed_table(device: torch.device, sizes: Settings, count: int) -> str:
    """Measure steps and products; return a table of them and the speed of the products."""
    precisions = {"fp32": torch.float32, "bf16": torch.bfloat16}
    rounds_of = {"textbook loop, fp32": textbook_round(device, sizes, count)}
    for precision, dtype in precisions.items():
        settings = dataclasses.replace(sizes, batch_size=BATCH_SIZE, precision=precision)
        rounds_of[f"this program, {precision}"] = program_round(device, settings, count)
        rounds_of[f"matrix product, {precision}"] = product_round(device, dtype, count)
    seconds = medians(rounds_of)

    textbook = seconds["textbook loop, fp32"]
    rows = [("", "ms a step", "images a second", "times the textbook", "share of the limit")]
    for name, precision in (
        ("textbook loop, fp32", "fp32"),
        ("this program, fp32", "fp32"),
        ("this program, bf16", "bf16"),
    ):
        each = seconds[name]
        limit = STEP_GFLOP / PRODUCT_GFLOP * seconds[f"matrix product, {precision}"]
        ratio = textbook / each
        share = limit / each
        speed = BATCH_SIZE / each
        rows.append((name, f"{1000 * each:.2f}", f"{speed:.0f}", f"{ratio:.2f}", f"{share:.0%}"))
    lines = [table(rows)]
    for precision in precisions:
        rate = PRODUCT_GFLOP / seconds[f"matrix product, {precision}"]
        lines.append(f"matrix product in {precision}: {rate:.0f} GFLOP/s")
    return "\n".join(lines)


def table(rows: list[tuple[str, ...]]) -> str:
    """Lay out rows in columns, the first to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def train_textbook(path: Path, settings: Settings, epochs: int, device: torch.device) -> None:
    """Train the textbook loop; save its generator, and one with its weights averaged.

    It is a command of its own, so that it is timed from launch to exit like the program.
    """
    torch.manual_seed(settings.seed)
    gan = dcgan_mnist.DCGAN(settings, device)  # to average the weights
    gan.generator, discriminator = textbook_networks(settings, device)
    loop = textbook_loop(gan.generator, discriminator, settings, device)
    for step in range(1, steps_of(settings, epochs) + 1):
        next(loop)
        gan.update_average(step)
    gan.fit_norm_statistics()
    content = {"generator": gan.generator.state_dict(), "average": gan.average.state_dict()}
    torch.save(content, path)


def steps_of(settings: Settings, epochs: int) -> int:
    """Return how many steps some epochs on the bundled digits have."""
    digits = dcgan_mnist.load_pictures(None, settings.split)[0]
    return epochs * math.ceil(len(digits) / settings.batch_size)


@dataclass
class Rung:
    """A way to train that is timed and scored."""

    name: str
    settings: Settings
    epochs: int
    seeds: tuple[int, ...]
    is_textbook: bool = False
    resumes: str = ""  # the name of the rung whose runs this one goes on with

    def path(self, folder: Path, seed: int) -> Path:
        """Return the file or folder in which the run with a seed leaves its generator."""
        return folder / f"{self.resumes or self.name}, seed {seed}"

    def command(self, folder: Path, seed: int) -> list[str]:
        """Return what trains with a seed and leaves its generator."""
        path = self.path(folder, seed)
        settings = dataclasses.replace(self.settings, seed=seed)
        flags = []
        for field in dataclasses.fields(Settings):
            if field.name not in ("recipe", "dry_run"):
                flags += [dcgan_mnist.flag(field.name), str(getattr(settings, field.name))]
        flags += ["--epochs", str(self.epochs)]
        if self.is_textbook:
            return [sys.executable, __file__, "--train-textbook", str(path), *flags]
        if self.resumes:
            flags.append("--resume")
        program = [sys.executable, str(ROOT / "dcgan_mnist.py")]
        return [*program, "--output-dir", str(path), *flags]


def seconds_of(command: list[str]) -> float:
    """Return how long a command takes from launch to exit. Raises CalledProcessError."""
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def generators(rung: Rung, path: Path) -> list[nn.Module]:
    """Return the generator that a command left, after that without averaged weights if it did."""
    if not rung.is_textbook:
        return [dcgan_mnist.load_generator(path)]
    content = torch.load(path, weights_only=True)
    found = []
    for name in ("generator", "average"):
        found.append(dcgan_mnist.new_generator(rung.settings).eval())
        found[-1].load_state_dict(content[name])
    return found


def distance(generator: nn.Module, settings: Settings, scorer: dcgan_mnist.Scorer) -> float:
    """Return the FD of 10,000 digits that a generator draws."""
    z = dcgan_mnist.make_noise(EVALUATED, settings.latent_dim, seed=0, use=dcgan_mnist.DRAWING)
    return scorer(dcgan_mnist.draw(generator, z))["fd"]


def rungs_of(sizes: Settings) -> list[Rung]:
    """Return the ladder, the other recipes, and tuned in no more than the textbook loop's time."""
    quick = dataclasses.replace(sizes, **dcgan_mnist.RECIPES["quick"])
    quick_bf16 = dataclasses.replace(quick, precision="bf16")
    article = Rung("recipe article", dataclasses.replace(sizes, precision="bf16"), EPOCHS, SEEDS)
    tuned_settings = dataclasses.replace(article.settings, **dcgan_mnist.RECIPES["tuned"])
    tuned = Rung("recipe tuned", tuned_settings, EPOCHS, SEEDS)
    return [
        Rung("textbook loop", sizes, EPOCHS, SEEDS, is_textbook=True),
        Rung("with the record's settings", quick, RECORD_EPOCHS, SEEDS, is_textbook=True),
        Rung("by this program, fp32", quick, RECORD_EPOCHS, SEEDS),
        Rung("in bf16: the record", quick_bf16, RECORD_EPOCHS, RECORD_SEEDS),
        article,
        tuned,
        Rung("recipe tuned, resumed", tuned_settings, SAME_TIME_EPOCHS, SEEDS, resumes=tuned.name),
    ]


def print_ladder(sizes: Settings, device: torch.device, folder: Path) -> None:
    """Run all rungs with their seeds, in turn; print a line for each, and draw the same time."""
    scorer = dcgan_mnist.Scorer(dcgan_mnist.read_scorer(), "test", device)
    rungs = rungs_of(sizes)
    seconds: dict[str, list[float]] = {rung.name: [] for rung in rungs}
    scores: dict[str, list[float]] = {}
    for turn in range(max(len(rung.seeds) for rung in rungs)):
        for rung in rungs:
            if turn >= len(rung.seeds):
                continue
            seed = rung.seeds[turn]
            duration = seconds_of(rung.command(folder, seed))
            if rung.resumes:
                duration += seconds[rung.resumes][turn]
            seconds[rung.name].append(duration)
            print(f"{rung.name}, seed {seed}: {duration:.1f} s")
            found = generators(rung, rung.path(folder, seed))
            names = [rung.name, f"{rung.name}, averaged"][: len(found)]
            for name, generator in zip(names, found, strict=True):
                fd = distance(generator.to(device), rung.settings, scorer)
                scores.setdefault(name, []).append(fd)
                print(f"{name}, seed {seed}: FD {fd:.1f}", flush=True)
    print(ladder_table(rungs, seconds, scores))
    draw_same_time(rungs[0], rungs[-1], folder)


def ladder_table(
    rungs: list[Rung], seconds: dict[str, list[float]], scores: dict[str, list[float]]
) -> str:
    """Lay out what the runs of each rung come to, and how many records reach the textbook loop."""
    rows = [("", "seeds", "steps", "seconds", "times the textbook", "FD", "lowest", "highest")]
    textbook = statistics.median(seconds[rungs[0].name])
    for name, fds in scores.items():
        (rung,) = (rung for rung in rungs if name.removesuffix(", averaged") == rung.name)
        median = statistics.median(seconds[rung.name])
        steps = steps_of(rung.settings, rung.epochs)
        row = [name, str(len(fds)), f"{steps:,}", f"{median:.1f}", f"{textbook / median:.1f}"]
        figures = [statistics.mean(fds), min(fds), max(fds)]
        rows.append((*row, *(f"{figure:.1f}" for figure in figures)))
    target = statistics.mean(scores[rungs[0].name])
    record = scores[rungs[3].name]
    reached = sum(fd <= target for fd in record)
    return f"{table(rows)}\n{reached} of {len(record)} records are at or below {target:.1f}"


def draw_same_time(textbook: Rung, tuned: Rung, folder: Path) -> None:
    """Draw the same noise with the generators of two rungs that take about the same time."""
    use = dcgan_mnist.FIXED_NOISE
    latent_dim = tuned.settings.latent_dim
    z = dcgan_mnist.make_noise(dcgan_mnist.SAMPLES, latent_dim, seed=0, use=use)
    pictures = []
    for rung in (textbook, tuned):
        generator = generators(rung, rung.path(folder, rung.seeds[0]))[0]
        digits = dcgan_mnist.draw(generator, z)
        pictures.append(np.asarray(dcgan_mnist.grid(digits, f"{rung.name}, {rung.epochs} epochs")))
    PICTURE.parent.mkdir(exist_ok=True)
    Image.fromarray(np.hstack(pictures)).save(PICTURE)
    print(f"saved {PICTURE}: the same noise, drawn by both after about the same time")


def main() -> None:
    """Print the figures that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    help = "print the ladder from the textbook loop to the record"
    parser.add_argument("--to-quality", action="store_true", help=help)
    parser.add_argument("--train-textbook", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--epochs", type=int, help=argparse.SUPPRESS)
    group = parser.add_argument_group("as of the program", argument_default=argparse.SUPPRESS)
    dcgan_mnist.add_training_flags(group)
    parser.add_argument("--precision", default="fp32", help=argparse.SUPPRESS)
    options = parser.parse_args()
    settings = Settings(**dcgan_mnist.given_settings(options))
    device = dcgan_mnist.pick_device("auto")
    if options.train_textbook is not None:
        train_textbook(options.train_textbook, settings, options.epochs, device)
        return
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        capabilities = torch.cpu.get_capabilities()
        cpu = capabilities.get("cpu_name", "CPU")
        amx = "with" if capabilities.get("amx_bf16") else "without"
        name = f"{cpu} {amx} AMX, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}")
    with dcgan_mnist.computing_on(device), tempfile.TemporaryDirectory() as folder:
        if options.to_quality:
            print_ladder(settings, device, Path(folder))
        else:
            print(f"batches of {BATCH_SIZE}")
            print(speed_table(device, settings, STEPS * (50 if device.type == "cuda" else 1)))


if __name__ == "__main__":
    main()

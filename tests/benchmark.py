"""How fast the program is, and how soon its digits are good, beside a textbook loop.

    python tests/benchmark.py                the speed of a step: two minutes on two cores
    python tests/benchmark.py --to-quality   from the textbook loop to the record: 60 to 90 minutes

What is compared takes turns, so that drift in the machine's speed affects all of it alike. The
speed of a step is the median over the rounds. For the ladder, whole commands are timed, from launch
to exit, and their digits scored. Each rung keeps what the one above adds, down to the record, which
has more seeds than the others: its last runs follow one another. Below it stand the recipes. All
numbers of epochs were fixed before these runs, and the record's settings were chosen with other
seeds.

The program's seconds include its scores, checkpoints and pictures. The textbook loop saves only its
generator; it spends some of its time on the average of its weights, for the rows named "averaged".
The pictures go to the folder result; README.md shows copies of them in result/example.
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
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import MNIST, VisionDataset

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dcgan_mnist  # noqa: E402
from dcgan_mnist import Settings  # noqa: E402

STEPS = 5  # in a round
ROUNDS = 20
TEXTBOOK = "textbook loop"  # this and the next ones: names in the tables and pictures
RECORD = "in bf16: the record"
ARTICLE = "recipe article"
TUNED = "recipe tuned"
SAME_TIME = "recipe tuned, resumed"
INCLUDED = "included generator"
EPOCHS = 10  # of the textbook loop and of the recipes article and tuned
RECORD_EPOCHS = 2
SAME_TIME_EPOCHS = 12  # of the recipe tuned, in no more than the textbook loop's time
SEEDS = (0, 1, 2)
RECORD_SEEDS = tuple(range(150, 160))
PICTURES = ROOT / "result"  # their folder
Round = Callable[[], float]  # takes some steps: seconds of one


class BundledDigits(MNIST):
    """torchvision's MNIST with the bundled test split, which it cannot read gzipped."""

    def __init__(self, transform: Callable) -> None:
        VisionDataset.__init__(self, dcgan_mnist.BUNDLED, transform=transform)
        self.data = dcgan_mnist.load_pictures(None, "test")[0]
        labels = dcgan_mnist.BUNDLED / "t10k-labels-idx1-ubyte.gz"
        self.targets = dcgan_mnist.read_idx(labels)


def textbook_loop(
    generator: nn.Module,
    discriminator: nn.Module,
    settings: Settings,
    device: torch.device,
    on_logits: bool = False,
) -> Iterator[None]:
    """Train two networks as tutorials do; stop at each step.

    The loss is computed from probabilities, as there, or from logits.
    """
    scale = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])
    loader = DataLoader(BundledDigits(scale), batch_size=settings.batch_size, shuffle=True)
    adam = {"lr": settings.lr, "betas": (settings.beta1, settings.beta2)}
    optimizer_g = torch.optim.Adam(generator.parameters(), **adam)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), **adam)
    if on_logits:
        judge = discriminator.logits
        criterion = nn.BCEWithLogitsLoss()
    else:
        judge = discriminator
        criterion = nn.BCELoss()
    while True:
        for batch, _ in loader:
            real = batch.to(device)
            ones = torch.ones(len(real), device=device)
            zeros = torch.zeros(len(real), device=device)
            discriminator.zero_grad()
            on_real = judge(real)
            loss_real = criterion(on_real, ones)
            loss_real.backward()
            noise = torch.randn(len(real), settings.latent_dim, 1, 1, device=device)
            fake = generator(noise)
            loss_fake = criterion(judge(fake.detach()), zeros)
            loss_fake.backward()
            optimizer_d.step()
            generator.zero_grad()
            loss_g = criterion(judge(fake), ones)
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
    if device.type != "cpu":
        torch.accelerator.synchronize()


def textbook_round(device: torch.device, sizes: Settings, count: int) -> Round:
    """Return a function that takes some steps of the textbook loop."""
    loop = textbook_loop(*textbook_networks(sizes, device), sizes, device)

    def take_steps() -> float:
        start = time.perf_counter()
        for _ in range(count):
            next(loop)
        wait_for(device)
        return (time.perf_counter() - start) / count

    return take_steps


def program_round(device: torch.device, settings: Settings, count: int) -> Round:
    """Return a function that takes some steps of the program, as a run does."""
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


def medians(rounds_of: dict[str, Round]) -> dict[str, float]:
    """Return the median seconds of a step of each, all taking turns."""
    for take_steps in rounds_of.values():  # to warm up
        take_steps()
    seconds = {name: [] for name in rounds_of}
    for _ in range(ROUNDS):
        for name, take_steps in rounds_of.items():
            seconds[name].append(take_steps())
    return {name: statistics.median(times) for name, times in seconds.items()}


def speed_table(device: torch.device, sizes: Settings, count: int) -> str:
    """Measure steps of the textbook loop and of the program; return a table of them."""
    rounds_of = {"textbook loop, fp32": textbook_round(device, sizes, count)}
    for precision in ("fp32", "bf16"):
        settings = dataclasses.replace(sizes, precision=precision)
        rounds_of[f"this program, {precision}"] = program_round(device, settings, count)
    rows = [("", "ms a step", "speed-up")]
    seconds = medians(rounds_of)
    textbook = seconds["textbook loop, fp32"]
    for name, each in seconds.items():
        rows.append((name, f"{1000 * each:.2f}", f"{textbook / each:.2f}"))
    return table(rows)


def table(rows: list[tuple[str, ...]]) -> str:
    """Lay out rows in columns, the first to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def train_textbook(
    path: Path, settings: Settings, epochs: int, device: torch.device, on_logits: bool
) -> None:
    """Train the textbook loop; save its generator, and one with its weights averaged.

    It is a command of its own, so that it is timed from launch to exit like the program.
    """
    torch.manual_seed(settings.seed)
    gan = dcgan_mnist.DCGAN(settings, device)  # to average the weights
    gan.generator, discriminator = textbook_networks(settings, device)
    loop = textbook_loop(gan.generator, discriminator, settings, device, on_logits)
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


@dataclasses.dataclass
class Rung:
    """A way to train that is timed and scored."""

    name: str
    settings: Settings
    epochs: int
    seeds: tuple[int, ...]
    is_textbook: bool = False
    on_logits: bool = False  # of the textbook loop: how it computes the loss
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
        if self.on_logits:
            flags.append("--on-logits")
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


def generators(rung: Rung, path: Path) -> dict[str, nn.Module]:
    """Return the generators that a command left: the textbook loop leaves an averaged one too."""
    if not rung.is_textbook:
        return {rung.name: dcgan_mnist.load_generator(path)}
    content = torch.load(path, weights_only=True)
    found = {}
    for name, weights in ((rung.name, "generator"), (f"{rung.name}, averaged", "average")):
        found[name] = dcgan_mnist.new_generator(rung.settings).eval()
        found[name].load_state_dict(content[weights])
    return found


def distance(generator: nn.Module, settings: Settings, scorer: dcgan_mnist.Scorer) -> float:
    """Return the FD of 10,000 digits that a generator draws in fp32."""
    count = dcgan_mnist.EVALUATED
    z = dcgan_mnist.make_noise(count, settings.latent_dim, seed=0, use=dcgan_mnist.DRAWING)
    return scorer(dcgan_mnist.draw(generator, z))["fd"]


def rungs_of(sizes: Settings) -> list[Rung]:
    """Return the ladder, the other recipes, and tuned in no more than the textbook loop's time."""
    quick = dataclasses.replace(sizes, **dcgan_mnist.RECIPES["quick"])
    quick_bf16 = dataclasses.replace(quick, precision="bf16")
    article = dataclasses.replace(sizes, precision="bf16")
    tuned = dataclasses.replace(article, **dcgan_mnist.RECIPES["tuned"])
    return [
        Rung(TEXTBOOK, sizes, EPOCHS, SEEDS, is_textbook=True),
        Rung("with the record's settings", quick, RECORD_EPOCHS, SEEDS, is_textbook=True),
        Rung("loss on logits", quick, RECORD_EPOCHS, SEEDS, is_textbook=True, on_logits=True),
        Rung("by this program, fp32", quick, RECORD_EPOCHS, SEEDS),
        Rung(RECORD, quick_bf16, RECORD_EPOCHS, RECORD_SEEDS),
        Rung(ARTICLE, article, EPOCHS, SEEDS),
        Rung(TUNED, tuned, EPOCHS, SEEDS),
        Rung(SAME_TIME, tuned, SAME_TIME_EPOCHS, SEEDS, resumes=TUNED),
    ]


def print_ladder(sizes: Settings, device: torch.device, folder: Path) -> None:
    """Run all rungs with their seeds, in turn; print a line for each, the table, and draw."""
    scorer = dcgan_mnist.Scorer(dcgan_mnist.read_scorer(), "test", device)
    rungs = rungs_of(sizes)
    seconds: dict[str, list[float]] = {rung.name: [] for rung in rungs}
    scores: dict[str, dict[str, list[float]]] = {rung.name: {} for rung in rungs}
    first: dict[str, nn.Module] = {INCLUDED: dcgan_mnist.load_generator()}
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
            for name, generator in generators(rung, rung.path(folder, seed)).items():
                fd = distance(generator.to(device), rung.settings, scorer)
                scores[rung.name].setdefault(name, []).append(fd)
                first.setdefault(name, generator)
                print(f"{name}, seed {seed}: FD {fd:.1f}", flush=True)
    print(ladder_table(rungs, seconds, scores))
    draw_beside("same_time.png", {name: first[name] for name in (TEXTBOOK, SAME_TIME)})
    recipes = {ARTICLE: ARTICLE, "recipe quick": RECORD, TUNED: TUNED, INCLUDED: INCLUDED}
    draw_beside("recipes.png", {label: first[name] for label, name in recipes.items()})


def ladder_table(
    rungs: list[Rung], seconds: dict[str, list[float]], scores: dict[str, dict[str, list[float]]]
) -> str:
    """Lay out what the runs of each rung come to, and how many records reach the textbook loop."""
    rows = [("", "seeds", "steps", "median s", "speed-up", "mean FD", "lowest", "highest")]
    textbook = statistics.median(seconds[TEXTBOOK])
    for rung in rungs:
        median = statistics.median(seconds[rung.name])
        steps = steps_of(rung.settings, rung.epochs)
        times = [str(len(rung.seeds)), f"{steps:,}", f"{median:.1f}", f"{textbook / median:.1f}"]
        for name, fds in scores[rung.name].items():
            figures = [statistics.mean(fds), min(fds), max(fds)]
            rows.append((name, *times, *(f"{figure:.1f}" for figure in figures)))
    lines = [table(rows)]
    records = scores[RECORD][RECORD]
    for name, fds in scores[TEXTBOOK].items():
        target = statistics.mean(fds)
        reached = sum(fd <= target for fd in records)
        lines.append(f"{reached} of {len(records)} records reach the {name}: {target:.1f}")
    return "\n".join(lines)


def draw_beside(file_name: str, generators: dict[str, nn.Module]) -> None:
    """Draw the same noise with several generators, side by side below their names."""
    pictures = []
    for name, generator in generators.items():
        latent_dim = generator.layers[0].in_channels
        use = dcgan_mnist.FIXED_NOISE
        z = dcgan_mnist.make_noise(dcgan_mnist.SAMPLES, latent_dim, seed=0, use=use)
        picture = dcgan_mnist.grid(dcgan_mnist.draw(generator, z), name)
        pictures.append(np.asarray(ImageOps.expand(picture, (12, 0), fill=80)))
    PICTURES.mkdir(exist_ok=True)
    Image.fromarray(np.hstack(pictures)).save(PICTURES / file_name)
    print(f"saved {PICTURES / file_name}")


def main() -> None:
    """Print the figures that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    help = "print the ladder from the textbook loop to the record"
    parser.add_argument("--to-quality", action="store_true", help=help)
    parser.add_argument("--train-textbook", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--epochs", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--on-logits", action="store_true", help=argparse.SUPPRESS)
    group = parser.add_argument_group("as of the program", argument_default=argparse.SUPPRESS)
    dcgan_mnist.add_training_flags(group)
    parser.add_argument("--precision", default="auto", help=argparse.SUPPRESS)
    options = parser.parse_args()
    given = dcgan_mnist.given_settings(options)
    chosen = given.keys() - {"width", "latent_dim"} or options.epochs or options.on_logits
    if options.train_textbook is None and chosen:
        parser.error("only --width and --latent-dim can be chosen")
    settings = Settings(**given)
    device = dcgan_mnist.pick_device("auto")
    if options.train_textbook is not None:
        with dcgan_mnist.computing_on(device):
            train_textbook(
                options.train_textbook, settings, options.epochs, device, options.on_logits
            )
        return
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        capabilities = torch.cpu.get_capabilities()
        cpu = capabilities.get("cpu_name", "CPU")
        amx = "with" if capabilities.get("amx_bf16") else "without"
        name = f"{cpu} {amx} AMX, {torch.get_num_threads()} threads"
    bf16 = "fast" if dcgan_mnist.has_bf16(device) else "slow"
    print(f"{name}, {bf16} in bf16, torch {torch.__version__}")
    with dcgan_mnist.computing_on(device), tempfile.TemporaryDirectory() as folder:
        if options.to_quality:
            print_ladder(settings, device, Path(folder))
        else:
            print(f"batches of {settings.batch_size}")
            print(speed_table(device, settings, STEPS * (20 if device.type == "cuda" else 1)))


if __name__ == "__main__":
    main()

"""How fast the program is, beside a textbook loop and the machine's own arithmetic.

    python tests/benchmark.py                         the speed of a step: four minutes on two cores
    python tests/benchmark.py --to-quality            the time to equal digits: half an hour
    python tests/benchmark.py --quick [--to-quality]  the same from fewer steps: under a minute

All variants take turns, so that a change of the machine's speed meets all of them. The speed of a
step is the median over the rounds. For the time to quality, whole runs are timed and their digits
scored: the textbook loop's ten epochs, whose score is the target, and the record, whose number of
epochs was fixed beforehand. The settings of the record were chosen with other seeds than these.
"""

import argparse
import dataclasses
import importlib.util
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
STARTS = 5  # of the program, to time its start
PROGRAM = str(ROOT / "dcgan_mnist.py")
IMPORTS = [sys.executable, "-c", "import torch, torchvision"]
TEXTBOOK_STEPS = 2000  # ten epochs
TEXTBOOK_SEEDS = (0, 1, 2)
RECORD = ("--recipe", "quick", "--epochs", "2")  # the shortest run to the textbook's quality
RECORD_SEEDS = tuple(range(100, 110))
EVALUATED = 10_000  # digits drawn to score a run
PICTURE = ROOT / "result" / "same_time.png"
Round = Callable[[], float]  # takes some steps, or multiplies some matrices: seconds of one


def command_of(sizes: Settings, *flags: str) -> list[str]:
    """Return the command that runs the program with networks of these sizes and these flags."""
    own = ["--width", str(sizes.width), "--latent-dim", str(sizes.latent_dim)]
    return [sys.executable, "-u", PROGRAM, *own, *flags]


class BundledDigits(MNIST):
    """torchvision's MNIST with the bundled test split, which it cannot read gzipped."""

    def __init__(self, transform: Callable) -> None:
        VisionDataset.__init__(self, dcgan_mnist.BUNDLED, transform=transform)
        self.data = dcgan_mnist.load_pictures(None, "test")[0]
        labels = dcgan_mnist.BUNDLED / "t10k-labels-idx1-ubyte.gz"
        self.targets = dcgan_mnist.read_idx(labels)


def textbook_loop(device: torch.device, sizes: Settings) -> Iterator[nn.Module]:
    """Train as tutorials do; yield the generator after each step."""
    scale = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])
    dataset = BundledDigits(scale)
    loader = DataLoader(dataset, batch_size=BATCH_SIZE, shuffle=True)
    generator = dcgan_mnist.Generator(sizes.latent_dim, sizes.width).to(device)
    discriminator = dcgan_mnist.Discriminator(sizes.width).to(device)
    for network in (generator, discriminator):
        network.apply(dcgan_mnist.weights_init)
    optimizer_g = torch.optim.Adam(generator.parameters(), lr=0.0002, betas=(0.5, 0.999))
    optimizer_d = torch.optim.Adam(discriminator.parameters(), lr=0.0002, betas=(0.5, 0.999))
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
            fake = generator(torch.randn(len(real), sizes.latent_dim, 1, 1, device=device))
            loss_fake = criterion(discriminator(fake.detach()), zeros)
            loss_fake.backward()
            optimizer_d.step()
            generator.zero_grad()
            loss_g = criterion(discriminator(fake), ones)
            loss_g.backward()
            optimizer_g.step()
            for figure in (loss_real + loss_fake, loss_g, on_real.mean()):
                figure.item()  # for the log
            yield generator


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def textbook_round(device: torch.device, sizes: Settings, count: int) -> Round:
    """Return what takes some steps of the textbook loop."""
    loop = textbook_loop(device, sizes)

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


def medians(rounds_of: dict[str, Round], rounds: int) -> dict[str, float]:
    """Return the median seconds of a step or product of each, all taking turns."""
    for take_steps in rounds_of.values():  # to warm up
        take_steps()
    seconds = {name: [] for name in rounds_of}
    for _ in range(rounds):
        for name, take_steps in rounds_of.items():
            seconds[name].append(take_steps())
    return {name: statistics.median(times) for name, times in seconds.items()}


def speed_table(device: torch.device, sizes: Settings, count: int, rounds: int) -> str:
    """Measure steps and products; return a table of them and the speed of the products."""
    precisions = {"fp32": torch.float32, "bf16": torch.bfloat16}
    rounds_of = {"textbook loop, fp32": textbook_round(device, sizes, count)}
    for precision, dtype in precisions.items():
        settings = dataclasses.replace(sizes, batch_size=BATCH_SIZE, precision=precision)
        rounds_of[f"this program, {precision}"] = program_round(device, settings, count)
        rounds_of[f"matrix product, {precision}"] = product_round(device, dtype, count)
    seconds = medians(rounds_of, rounds)

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


def seconds_of(command: list[str]) -> float:
    """Return how long a command takes from launch to exit."""
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def seconds_to_first_step(folder: str, sizes: Settings) -> float:
    """Return how long the program takes from its launch to its first log line."""
    command = command_of(sizes, "--output-dir", folder)
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("(1/"):
                seconds = time.perf_counter() - start
                process.kill()
                return seconds
    raise subprocess.CalledProcessError(process.returncode, command)


def seconds_between_epochs(folder: str, sizes: Settings, epochs: int) -> list[float]:
    """Return how long each epoch of a run takes from its last step until all is saved and drawn."""
    half = len(dcgan_mnist.load_pictures(None, "test")[0]) // 2
    flags = ["--output-dir", folder, "--epochs", str(epochs), "--log-every", "1"]
    command = command_of(sizes, *flags, "--batch-size", str(half))  # two steps an epoch
    seconds = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("(2/2)"):
                start = time.perf_counter()
            elif line.startswith("saved to"):
                seconds.append(time.perf_counter() - start)
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, command)
    return seconds


def start_and_end_lines(folder: str, sizes: Settings, rounds: int) -> str:
    """Measure the start of a run beside the imports alone, and the end of an epoch."""
    imports = []
    starts = []
    for _ in range(rounds):
        imports.append(seconds_of(IMPORTS))
        starts.append(seconds_to_first_step(folder, sizes))
    start = statistics.median(starts)
    ratio = start / statistics.median(imports)
    first, *others = seconds_between_epochs(folder, sizes, rounds + 1)
    return (
        f"from launch to the first step: {start:.1f} s, {ratio:.1f} times importing torch and "
        f"torchvision\nfrom an epoch's last step to the next epoch: "
        f"{statistics.median(others):.2f} s, {first:.2f} s the first time"
    )


def distance(generator: nn.Module, sizes: Settings, scorer: dcgan_mnist.Scorer) -> float:
    """Return the FD of 10,000 digits that a generator draws in eval mode."""
    z = dcgan_mnist.make_noise(EVALUATED, sizes.latent_dim, seed=0, use=dcgan_mnist.DRAWING)
    return scorer(dcgan_mnist.draw(generator.eval(), z))["fd"]


def run_textbook(seed: int, device: torch.device, sizes: Settings) -> tuple[float, nn.Module]:
    """Train the textbook loop for ten epochs; return the seconds that it took, and its generator.

    The start of the process and its imports are not in the seconds.
    """
    torch.manual_seed(seed)
    loop = textbook_loop(device, sizes)
    start = time.perf_counter()
    for _ in range(TEXTBOOK_STEPS):
        generator = next(loop)
    wait_for(device)
    return time.perf_counter() - start, generator


def run_record(seed: int, folder: str, sizes: Settings) -> tuple[float, nn.Module]:
    """Run the record's command; return its seconds from launch to exit, and its generator."""
    flags = (*RECORD, "--seed", str(seed), "--output-dir", folder)
    return seconds_of(command_of(sizes, *flags)), dcgan_mnist.load_generator(folder)


def settings_of_record(device: torch.device, folder: str, sizes: Settings) -> tuple[Settings, int]:
    """Return the record's settings, and how many steps it takes."""
    _, _, _, *flags = command_of(sizes, *RECORD)
    options = dcgan_mnist.parse_options(flags)
    new_folder = dcgan_mnist.RunFolder(Path(folder))
    settings, epochs, digits, *_ = dcgan_mnist.settle(options, device, new_folder)
    return settings, epochs * math.ceil(len(digits) / settings.batch_size)


def time_to_quality(device: torch.device, folder: str, sizes: Settings) -> None:
    """Run the textbook loop and the record with all their seeds, taking turns; print a table."""
    scorer = dcgan_mnist.Scorer(dcgan_mnist.read_scorer(), "test", device)
    textbook = []  # seconds and distance of each run
    record = []
    share = math.ceil(len(RECORD_SEEDS) / len(TEXTBOOK_SEEDS))
    for i, textbook_seed in enumerate(TEXTBOOK_SEEDS):
        for seed in RECORD_SEEDS[i * share : (i + 1) * share]:
            seconds, generator = run_record(seed, f"{folder}/{seed}", sizes)
            record.append((seconds, distance(generator.to(device), sizes, scorer)))
            print(f"this program, seed {seed}: {seconds:.1f} s, FD {record[-1][1]:.1f}")
        seconds, generator = run_textbook(textbook_seed, device, sizes)
        textbook.append((seconds, distance(generator, sizes, scorer)))
        print(f"textbook loop, seed {textbook_seed}: {seconds:.1f} s, FD {textbook[-1][1]:.1f}")
    _, steps = settings_of_record(device, folder, sizes)
    print(quality_table(textbook, record, steps))
    generator = dcgan_mnist.load_generator(f"{folder}/{RECORD_SEEDS[0]}")
    draw_after_same_time(generator, record[0][0], device, sizes)


def quality_table(
    textbook: list[tuple[float, float]], record: list[tuple[float, float]], steps: int
) -> str:
    """Lay out the seconds and the distances of the runs of both, and what they come to."""
    rows = [("", "seeds", "steps", "seconds", "times the textbook", "FD", "lowest", "highest")]
    textbook_seconds = statistics.median(seconds for seconds, _ in textbook)
    for name, count, runs in (
        ("textbook loop, fp32", TEXTBOOK_STEPS, textbook),
        ("this program", steps, record),
    ):
        seconds = statistics.median(seconds for seconds, _ in runs)
        ratio = textbook_seconds / seconds
        distances = [fd for _, fd in runs]
        figures = [statistics.mean(distances), min(distances), max(distances)]
        row = [name, str(len(runs)), f"{count:,}", f"{seconds:.1f}", f"{ratio:.1f}"]
        rows.append((*row, *(f"{figure:.1f}" for figure in figures)))
    target = statistics.mean(fd for _, fd in textbook)
    reached = sum(fd <= target for _, fd in record)
    return f"{table(rows)}\n{reached} of {len(record)} seeds are at or below {target:.1f}"


def draw_after_same_time(
    generator: nn.Module, seconds: float, device: torch.device, sizes: Settings
) -> None:
    """Draw the same noise with a record's generator and with the textbook loop after its time."""
    use = dcgan_mnist.FIXED_NOISE
    z = dcgan_mnist.make_noise(dcgan_mnist.SAMPLES, sizes.latent_dim, seed=0, use=use)
    ours = dcgan_mnist.draw(generator, z)
    torch.manual_seed(TEXTBOOK_SEEDS[0])
    loop = textbook_loop(device, sizes)
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        textbook_generator = next(loop)
        wait_for(device)
    textbook = dcgan_mnist.draw(textbook_generator.eval(), z)
    pictures = [
        dcgan_mnist.grid(textbook, f"textbook loop after {seconds:.0f} seconds"),
        dcgan_mnist.grid(ours, f"this program after {seconds:.0f} seconds"),
    ]
    PICTURE.parent.mkdir(exist_ok=True)
    Image.fromarray(np.hstack([np.asarray(picture) for picture in pictures])).save(PICTURE)
    print(f"saved {PICTURE}: the same noise, drawn by both after the same time")


def estimate_time_to_quality(device: torch.device, folder: str, sizes: Settings) -> None:
    """Print both times, estimated from short stretches; without scores."""
    settings, steps = settings_of_record(device, folder, sizes)
    rounds_of = {
        "textbook": textbook_round(device, sizes, 3),
        "record": program_round(device, settings, 3),
    }
    seconds = medians(rounds_of, 4)
    six_steps = command_of(sizes, *RECORD, "--dry-run", "--output-dir", folder)
    dry_run = seconds_of(six_steps)
    textbook = TEXTBOOK_STEPS * seconds["textbook"]
    record = dry_run + (steps - 6) * seconds["record"]
    print("estimated from a few steps of both, without scores:")
    print(f"textbook loop, {TEXTBOOK_STEPS:,} steps: about {textbook:.0f} s")
    print(f"this program, {steps:,} steps, from launch to exit: about {record:.0f} s")
    print(f"ratio: about {textbook / record:.1f}")


def peak_memory(command: list[str]) -> float:
    """Return the peak resident memory in MB of a command."""
    code = (
        "import resource, subprocess, sys\n"
        "subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )  # in a process of its own, because the figure is that of all children
    measuring = [sys.executable, "-c", code, *command]
    done = subprocess.run(measuring, capture_output=True, text=True, check=True)
    return float(done.stdout) / (1024**2 if sys.platform == "darwin" else 1024)


def memory_lines(sizes: Settings) -> str:
    """Measure how much memory a dry run takes, with either split."""
    imports = peak_memory(IMPORTS)
    default = peak_memory(command_of(sizes, "--dry-run"))
    train = peak_memory(command_of(sizes, "--dry-run", "--split", "train"))
    return (
        f"peak memory: {default:.0f} MB, {default - imports:.0f} more than the imports alone\n"
        f"peak memory with --split train: {train - default:.0f} MB more"
    )


def main() -> None:
    """Print the figures that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps: under a minute")
    parser.add_argument(
        "--to-quality", action="store_true", help="time whole runs to the same quality of digits"
    )
    help = "as of the program; the share of the limit is right only with the default sizes"
    parser.add_argument("--width", type=int, default=Settings.width, metavar="N", help=help)
    default = Settings.latent_dim
    parser.add_argument("--latent-dim", type=int, default=default, metavar="N", help=help)
    options = parser.parse_args()
    sizes = Settings(width=options.width, latent_dim=options.latent_dim)
    quick = options.quick
    count = 2 if quick else STEPS
    rounds = 4 if quick else ROUNDS
    starts = 1 if quick else STARTS
    device = dcgan_mnist.pick_device("auto")
    if device.type == "cuda":
        count *= 50
        name = torch.cuda.get_device_name()
    else:
        cpu = torch.cpu.get_capabilities().get("cpu_name", "CPU")
        name = f"{cpu}, {torch.get_num_threads()} threads"

    print(f"{name}, torch {torch.__version__}")
    if options.to_quality:
        with tempfile.TemporaryDirectory() as folder, dcgan_mnist.computing_on(device):
            if quick:
                estimate_time_to_quality(device, folder, sizes)
            else:
                time_to_quality(device, folder, sizes)
        return
    with dcgan_mnist.computing_on(device):
        print(f"batches of {BATCH_SIZE}")
        print(speed_table(device, sizes, count, rounds))
    with tempfile.TemporaryDirectory() as folder:
        print(start_and_end_lines(folder, sizes, starts))
    if importlib.util.find_spec("resource") is None:
        print("peak memory: not measured on this system")
    else:
        print(memory_lines(sizes))


if __name__ == "__main__":
    main()

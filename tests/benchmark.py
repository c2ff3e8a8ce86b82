"""How fast the program is, beside a textbook loop and the machine's own arithmetic, in one table.

    python tests/benchmark.py            about two minutes on two cores
    python tests/benchmark.py --quick    under a minute

All variants take turns in one process, so that a change of the machine's speed meets all of them;
a figure is the median over the rounds.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import MNIST

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dcgan_mnist  # noqa: E402

BATCH_SIZE = 50
STEP_GFLOP = 2 * BATCH_SIZE * (8 * 36.7 + 3 * 37.2) / 1000  # passes x million multiply-adds
Loop = Iterator[None]


class BundledDigits(MNIST):
    """torchvision's MNIST with the bundled split alone."""

    resources = tuple(r for r in MNIST.resources if r[0].startswith("t10k"))
    raw_folder = str(ROOT / "MNIST" / "MNIST" / "raw")


def textbook_loop(device: torch.device) -> Loop:
    """Train as tutorials do; a step for each item."""
    scale = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])
    dataset = BundledDigits(ROOT / "MNIST", train=False, transform=scale)
    loader = DataLoader(dataset, batch_size=BATCH_SIZE, shuffle=True)
    generator = dcgan_mnist.Generator().apply(dcgan_mnist.weights_init).to(device)
    discriminator = dcgan_mnist.Discriminator().apply(dcgan_mnist.weights_init).to(device)
    optimizer_g = torch.optim.Adam(generator.parameters(), lr=0.0002, betas=(0.5, 0.999))
    optimizer_d = torch.optim.Adam(discriminator.parameters(), lr=0.0002, betas=(0.5, 0.999))
    criterion = nn.BCELoss()
    while True:
        for batch, _ in loader:
            real = batch.to(device)
            ones, zeros = (torch.full((len(real),), v, device=device) for v in (1.0, 0.0))
            discriminator.zero_grad()
            on_real = discriminator(real)
            loss_real = criterion(on_real, ones)
            loss_real.backward()
            fake = generator(torch.randn(len(real), 100, 1, 1, device=device))
            loss_fake = criterion(discriminator(fake.detach()), zeros)
            loss_fake.backward()
            optimizer_d.step()
            generator.zero_grad()
            loss_g = criterion(discriminator(fake), ones)
            loss_g.backward()
            optimizer_g.step()
            _ = (loss_real + loss_fake).item(), loss_g.item(), on_real.mean().item()
            yield


def program_loop(device: torch.device, precision: str) -> Loop:
    """Train as the program does; a step for each item."""
    names = dcgan_mnist.SETTINGS
    settings = {name: dcgan_mnist.FLAGS[name][0] for name in names} | {"precision": precision}
    step = dcgan_mnist.GraphedStep(dcgan_mnist.DCGAN(settings, device))
    digits = dcgan_mnist.load_digits(ROOT / "MNIST", "test")[0].to(device)
    noise = dcgan_mnist.random_stream(0, 1, device)
    while True:
        for index in torch.randperm(len(digits)).to(device).split(BATCH_SIZE):
            z = torch.randn(BATCH_SIZE, 100, 1, 1, generator=noise, device=device)
            step(dcgan_mnist.to_images(digits[index]), z)
            yield


def product_loop(device: torch.device, dtype: torch.dtype) -> Loop:
    """Multiply two 2048 x 2048 matrices of random numbers; a product for each item."""
    a, b = (torch.randn(2048, 2048, device=device).to(dtype) for _ in range(2))
    while True:
        a @ b
        yield


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def medians(loops: dict[str, Loop], counts: dict[str, int], rounds: int, device) -> dict[str, float]:
    """Return the median seconds an item of each loop takes, all loops taking turns."""
    seconds = {name: [] for name in loops}
    for name, loop in loops.items():
        for _ in range(counts[name]):
            next(loop)
    for _ in range(rounds):
        for name, loop in loops.items():
            wait_for(device)
            start = time.perf_counter()
            for _ in range(counts[name]):
                next(loop)
            wait_for(device)
            seconds[name].append((time.perf_counter() - start) / counts[name])
    return {name: statistics.median(times) for name, times in seconds.items()}


def measured_run(command: list[str], until: Callable[[str], bool] | None = None) -> float:
    """Return the seconds until a line of the command's output, or its peak memory in MB.

    The memory is read in a process of its own, because it is that of all children.
    """
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if until and until(line):
                elapsed = time.perf_counter() - start
                process.kill()
                return elapsed
    usage = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return usage / (1024**2 if sys.platform == "darwin" else 1024)


def peak_memory(*command: str) -> float:
    """Return the peak resident memory in MB of a Python command, from a fresh process."""
    code = f"import benchmark; print(benchmark.measured_run({[sys.executable, *command]!r}))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True, check=True)
    return float(done.stdout)


def write_training_split(data_dir: Path) -> None:
    """Write 60,000 blank digits in MNIST's format: memory does not depend on what they show."""
    raw = data_dir / "MNIST" / "raw"
    raw.mkdir(parents=True)
    sizes = (60_000).to_bytes(4, "big"), (28).to_bytes(4, "big") * 2
    images = bytes([0, 0, 8, 3]) + sizes[0] + sizes[1] + bytes(60_000 * 28 * 28)
    (raw / "train-images-idx3-ubyte").write_bytes(images)
    labels = bytes([0, 0, 8, 1]) + sizes[0] + bytes(60_000)
    (raw / "train-labels-idx1-ubyte").write_bytes(labels)


def table(rows: list[tuple]) -> str:
    """Lay out rows in columns, the first to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds: under a minute")
    quick = parser.parse_args().quick
    device = dcgan_mnist.pick_hardware(dcgan_mnist.parse_options([]))
    steps, rounds = (2, 4) if quick else (5, 20)
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())  # as the program does
        steps, name = 50 * steps, torch.cuda.get_device_name()
    else:
        cpu = torch.cpu.get_capabilities().get("cpu_name", "CPU")
        name = f"{cpu}, {torch.get_num_threads()} threads"
    precisions = {"fp32": torch.float32, "bf16": torch.bfloat16}
    loops = {"textbook loop, fp32": textbook_loop(device)}
    for precision, dtype in precisions.items():
        loops[f"this program, {precision}"] = program_loop(device, precision)
        loops[f"matrix product, {precision}"] = product_loop(device, dtype)
    seconds = medians(loops, dict.fromkeys(loops, steps), rounds, device)

    textbook = seconds["textbook loop, fp32"]
    rows = [("", "ms a step", "images a second", "times the textbook", "share of the limit")]
    for loop, each in seconds.items():
        if loop.startswith("matrix"):
            continue
        precision = loop[-4:]
        limit = STEP_GFLOP / (2 * 2048**3 / 1e9) * seconds[f"matrix product, {precision}"]
        speeds = f"{1000 * each:.2f}", f"{BATCH_SIZE / each:.0f}", f"{textbook / each:.2f}"
        rows.append((loop, *speeds, f"{limit / each:.0%}"))
    print(f"{name}, torch {torch.__version__}, batches of {BATCH_SIZE}")
    print(table(rows))
    for precision in precisions:
        rate = 2 * 2048**3 / 1e9 / seconds[f"matrix product, {precision}"]
        print(f"matrix product in {precision}: {rate:.0f} GFLOP/s")

    program = str(ROOT / "dcgan_mnist.py")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-u", program, "--output-dir", f"{folder}/a"]
        starts = [
            measured_run(command, until=lambda line: line.startswith("(1/")) for _ in range(1 if quick else 5)
        ]
        print(f"from launch to the first step: {statistics.median(starts):.1f} s")
        imports = peak_memory("-c", "import torch, torchvision")
        dry_run = (program, "--dry-run", "--output-dir", f"{folder}/b")
        default = peak_memory(*dry_run)
        print(f"peak memory: {default:.0f} MB, {default - imports:.0f} more than the imports alone")
        write_training_split(Path(folder))
        train = peak_memory(*dry_run, "--split", "train", "--data-dir", folder)
        print(f"peak memory with --split train: {train - default:.0f} MB more")


if __name__ == "__main__":
    main()

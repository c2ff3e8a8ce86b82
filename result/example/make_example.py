"""Make what is in this folder from two finished runs.

    python dcgan_mnist.py --output-dir article
    python dcgan_mnist.py --recipe tuned --split train --epochs 30 --output-dir long
    python result/example/make_example.py article long

The pictures of the first run are copied. generator.pt is the last generator of the long run, with
weights rounded to half precision, which makes the file half as large; its scores before and after
the rounding are printed. recipes.png and same_time.png are made by tests/benchmark.py --to-quality.
"""

import argparse
import dataclasses
import shutil
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

import dcgan_mnist  # noqa: E402
from dcgan_mnist import DRAWING, EVALUATED  # noqa: E402


def rounded(checkpoint: dict) -> dict:
    """Return what generator.pt holds of a run's checkpoint: its origin, and weights in fp16."""
    weights = {
        name: weight.half() if weight.is_floating_point() else weight
        for name, weight in checkpoint["average"].items()
    }
    # any machine draws in fp32, few are fast in the bf16 of training
    settings = dataclasses.replace(checkpoint["settings"], precision="fp32")
    origin = ("format", "epoch", "data", "made_with")
    kept = {name: checkpoint[name] for name in origin}
    return {**kept, "settings": dataclasses.asdict(settings), "average": weights}


def main() -> None:
    """Make the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("article", "long"):
        parser.add_argument(name, type=Path, help="folder of that run")
    options = parser.parse_args()

    checkpoint = dcgan_mnist.read_checkpoint(options.long / dcgan_mnist.CHECKPOINT)
    exact = dcgan_mnist.load_generator(options.long)
    for name in ("timeline.png", "training.gif", "loss_curve.png"):
        shutil.copy(options.article / name, HERE)
    torch.save(rounded(checkpoint), dcgan_mnist.EXAMPLE)
    included = dcgan_mnist.load_generator()

    split = dcgan_mnist.SPLIT_OF_DIGITS[checkpoint["data"]["sha256"]]
    latent_dim = checkpoint["settings"].latent_dim
    scorer = dcgan_mnist.Scorer(dcgan_mnist.read_scorer(), split, torch.device("cpu"))
    z = dcgan_mnist.make_noise(EVALUATED, latent_dim, 0, DRAWING)
    print(f"before the rounding: {scorer(dcgan_mnist.draw(exact, z))}")
    print(f"after it: {scorer(dcgan_mnist.draw(included, z))}")


if __name__ == "__main__":
    main()

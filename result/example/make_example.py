"""Make what is in this folder from three finished runs.

    python dcgan_mnist.py --output-dir article
    python dcgan_mnist.py --recipe tuned --output-dir tuned
    python dcgan_mnist.py --recipe tuned --split train --epochs 30 --output-dir long
    python result/example/make_example.py article tuned long

The pictures of the first run are copied. generator.pt is the last generator of the long run, with
weights rounded to half precision, which makes the file half as large; its scores before and after
the rounding are printed. same_time.png is made by tests/benchmark.py --to-quality.
"""

import argparse
import dataclasses
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

import dcgan_mnist  # noqa: E402
from dcgan_mnist import DRAWING, EVALUATED, FIXED_NOISE, SAMPLES  # noqa: E402


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
    for name in ("article", "tuned", "long"):
        parser.add_argument(name, type=Path, help="folder of that run")
    options = parser.parse_args()

    checkpoint = dcgan_mnist.read_checkpoint(options.long / dcgan_mnist.CHECKPOINT)
    article = dcgan_mnist.load_generator(options.article)
    tuned = dcgan_mnist.load_generator(options.tuned)
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

    z = dcgan_mnist.make_noise(SAMPLES, latent_dim, 0, FIXED_NOISE)
    shown = {"--recipe article": article, "--recipe tuned": tuned, "included": included}
    grids = [dcgan_mnist.grid(dcgan_mnist.draw(g, z), caption) for caption, g in shown.items()]
    apart = [ImageOps.expand(grid, (12, 0), fill=80) for grid in grids]
    row = np.hstack([np.asarray(grid) for grid in apart])[:, 12:-12]
    Image.fromarray(row).save(HERE / "recipes.png")


if __name__ == "__main__":
    main()

"""The program with small networks, for tests that need it in a process of its own."""

import os
import sys
from pathlib import Path

# unused here: so that processes forked after this need not import them
import matplotlib.figure  # noqa: F401
import torchvision  # noqa: F401

import dcgan_mnist


def main(argv: list[str]) -> int:
    dcgan_mnist.WIDTH = 4
    dcgan_mnist.LATENT_DIM = 8
    return dcgan_mnist.main(argv)


def run_silently(folder: Path, argv: list[str]) -> None:
    """Run the program in a folder, with what it prints in a file there."""
    os.chdir(folder)
    with Path("printed.txt").open("a") as printed:
        sys.stdout = sys.stderr = printed
        code = main(argv)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    sys.exit(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

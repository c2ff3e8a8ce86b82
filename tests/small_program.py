"""The program with small networks, for tests that need it in a process of its own."""

import os
import sys
from pathlib import Path

import matplotlib.figure  # noqa: F401 (a server that forks from here need not import it again)

import dcgan_mnist

dcgan_mnist.WIDTH = 4
dcgan_mnist.LATENT_DIM = 8


def run_silently(folder: Path, argv: list[str]) -> None:
    """Run the program in a folder, with what it prints in a file there."""
    os.chdir(folder)
    with Path("printed.txt").open("a") as printed:
        sys.stdout = sys.stderr = printed
        code = dcgan_mnist.main(argv)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    sys.exit(code)


if __name__ == "__main__":
    sys.exit(dcgan_mnist.main())

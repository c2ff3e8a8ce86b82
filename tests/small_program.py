"""The program with small networks, for tests that need it in a process of its own."""

import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

# unused here: so that processes forked after this need not import them
import matplotlib.figure  # noqa: F401
import torchvision  # noqa: F401

import dcgan_mnist


def main(argv: list[str]) -> int:
    """Run a command line with small networks; return the exit code."""
    dcgan_mnist.WIDTH = 4
    dcgan_mnist.LATENT_DIM = 8
    return dcgan_mnist.main(argv)


def run_silently(folder: Path, argv: list[str]) -> None:
    """Run a command line in a folder, with what it prints in a file there; end the process."""
    os.chdir(folder)
    with Path("printed.txt").open("a") as file, redirect_stdout(file), redirect_stderr(file):
        code = main(argv)
    sys.exit(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The small program for torchrun; each process keeps what it trains on and what it ends with."""

import os
import sys
from pathlib import Path

import small_program
import torch

import dcgan_mnist

if __name__ == "__main__":
    Path(f"pid_{dcgan_mnist.RANK}").write_text(str(os.getpid()))
    steps = []
    original = dcgan_mnist.training_step

    def step(gan: dcgan_mnist.DCGAN, real: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        steps.append((gan, real.clone(), z.clone()))
        return original(gan, real, z)

    dcgan_mnist.training_step = step
    code = small_program.main(sys.argv[1:])
    gans, real, z = zip(*steps, strict=True)
    networks = (gans[0].generator, gans[0].discriminator, gans[0].average)
    weights = [p.detach() for network in networks for p in network.parameters()]
    torch.save({"real": real, "z": z, "weights": weights}, f"kept_{dcgan_mnist.RANK}.pt")
    sys.exit(code)

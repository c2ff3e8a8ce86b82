"""Digits as images, and the random numbers of a run."""

import torch

import dcgan_mnist
from dcgan_mnist import random_stream, to_images


def test_images_go_from_minus_one_for_black_to_one_for_white():
    digits = torch.tensor([255, 0, 255], dtype=torch.uint8).view(3, 1, 1).expand(3, 28, 28)
    images = to_images(digits)
    assert images.shape == (3, 1, 28, 28)
    assert images[:, 0, 0, 0].tolist() == [1.0, -1.0, 1.0]


USES = ("FIRST_WEIGHTS", "FIXED_NOISE", "DRAWING", "NORM_STATISTICS", "ORDER", "NOISE", "LAYERS")
OF_AN_EPOCH = ("ORDER", "NOISE", "LAYERS")
SEEDS = (0, 1, 2, 4096, 4097, 2**20, 2**20 + 1, 2**32 - 1)


def test_every_use_and_epoch_and_seed_has_random_numbers_of_its_own():
    epochs = (1, 2, 3, 4095, 4096, 4097, 99_999, 100_000)
    streams = [
        (seed, getattr(dcgan_mnist, use), epoch)
        for seed in SEEDS
        for use in USES
        for epoch in (epochs if use in OF_AN_EPOCH else (0,))
    ]
    first_numbers = {
        tuple(torch.randn(4, generator=random_stream(*stream)).tolist()) for stream in streams
    }
    assert len(first_numbers) == len(streams)


def test_random_numbers_are_the_same_from_their_start():
    first = torch.randn(4, generator=random_stream(3, dcgan_mnist.NOISE, 7))
    assert torch.equal(first, torch.randn(4, generator=random_stream(3, dcgan_mnist.NOISE, 7)))

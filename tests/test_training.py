"""The training loop: the order of the digits, the log, what it yields, and divergence."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import (
    LOG_LINE,
    THREE_STEPS,
    assert_same_run,
    batch,
    change_steps,
    contents,
    new_gan,
    parameters,
    same,
    saved,
    write_split,
)
from torch import nn

import dcgan_mnist
from dcgan_mnist import STATS, Failure, draw, train_epochs, training_step


@pytest.fixture
def digits() -> torch.Tensor:
    """60 random digits."""
    stream = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (60, 28, 28), generator=stream).byte()


# ------------------------------------ the digits and the noise ------------------------------------
def test_every_digit_is_seen_once_an_epoch_in_a_new_order(
    run, data_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    digits = write_split(data_dir, 25)
    seen = []
    sizes = []

    def spy(gan: dcgan_mnist.DCGAN, real: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        assert z.shape == (len(real), 8, 1, 1)
        sizes.append(len(real))
        seen.extend(((real + 1) * 127.5).round().byte().squeeze(1))
        return training_step(gan, real, z)

    monkeypatch.setattr(dcgan_mnist, "training_step", spy)
    assert run("--epochs", 2, "--batch-size", 10).code == 0
    assert sizes == [10, 10, 5, 10, 10, 5]
    first = torch.stack(seen[:25])
    second = torch.stack(seen[25:])
    assert not torch.equal(first, second)
    for epoch in (first, second):
        assert sorted(epoch.flatten(1).tolist()) == sorted(digits.flatten(1).tolist())


def test_every_step_has_noise_of_its_own(digits: torch.Tensor):
    noise = []

    def step(real: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        noise.extend(z.flatten(1).tolist())
        return torch.ones(5)

    gan = new_gan(batch_size=20)
    for _ in train_epochs(gan, step, digits, epochs=2, log_every=100):
        pass
    assert len(noise) == 120
    assert len(set(map(tuple, noise))) == 120


@pytest.mark.parametrize("generator_steps", [1, 3])
def test_a_step_gets_noise_for_every_update_of_the_generator(
    digits: torch.Tensor, generator_steps: int
):
    shapes = []

    def step(real: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        shapes.append((len(real), z.shape))
        return torch.ones(5)

    gan = new_gan(batch_size=40, generator_steps=generator_steps)
    for _ in train_epochs(gan, step, digits, epochs=1, log_every=100):
        pass
    assert shapes == [(n, (generator_steps * n, 8, 1, 1)) for n in (40, 20)]


@pytest.mark.parametrize("steps", [(3, 3, 3), (3, 1, 2)])
def test_the_average_spans_the_same_share_of_the_run_in_every_epoch(
    digits: torch.Tensor, monkeypatch: pytest.MonkeyPatch, steps: tuple[int, ...]
):
    original = dcgan_mnist.order_of_epoch

    def shorter(digits: torch.Tensor, seed: int, epoch: int) -> torch.Tensor:
        return original(digits, seed, epoch)[: 20 * steps[epoch - 1]]

    monkeypatch.setattr(dcgan_mnist, "order_of_epoch", shorter)
    gan = new_gan(batch_size=20, ema=0.5)
    count = 0

    @torch.no_grad()
    def step(real: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        for weights in gan.generator.parameters():
            weights.fill_(count)
        return torch.ones(5)

    for _ in train_epochs(gan, step, digits, epochs=3, log_every=100):
        pass
    expected = 0.0
    for number in range(1, sum(steps) + 1):
        expected += (number - expected) / max(0.5 * number, 1)
    for weights in gan.average.parameters():
        torch.testing.assert_close(weights, torch.full_like(weights, expected))


def test_the_same_seed_gives_the_same_run_and_another_seed_another(run):
    for folder, seed in (("a", 5), ("b", 5), ("c", 6)):
        run(*THREE_STEPS, "--epochs", 2, "--seed", seed, "--output-dir", folder)
    assert_same_run("a", "b")
    first = contents("a")
    other = contents("c")
    assert all(first[name] != other[name] for name in first)


def test_true_out_moves_from_epoch_to_epoch(run):
    run(*THREE_STEPS, "--epochs", 3)
    at_the_first_steps = saved()["stats"]["true_out"][::3].tolist()
    assert len(set(at_the_first_steps)) == 3


# ------------------------------------ random numbers of layers ------------------------------------
def numbers_of_layers(
    digits: torch.Tensor, epochs: int, done: int = 0, seed: int = 0
) -> list[list[float]]:
    """Train; return the numbers that a layer such as dropout would take, a list for each epoch."""
    gan = new_gan(batch_size=20, seed=seed)
    gan.epoch = done
    taken: list[float] = []

    def step(real: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        taken.append(torch.rand(1).item())
        return torch.ones(5)

    for _ in train_epochs(gan, step, digits, epochs, log_every=100):
        pass
    return [taken[i : i + 3] for i in range(0, len(taken), 3)]


def test_layers_such_as_dropout_take_the_same_numbers_in_every_run_and_new_ones_in_every_epoch(
    digits: torch.Tensor,
):
    torch.manual_seed(1)
    numbers = numbers_of_layers(digits, epochs=3)
    torch.manual_seed(2)
    assert numbers_of_layers(digits, epochs=3) == numbers
    assert numbers_of_layers(digits, epochs=3, done=1) == numbers[1:]  # as a resumed run
    everywhere = numbers + numbers_of_layers(digits, epochs=3, seed=1)
    assert len({number for epoch in everywhere for number in epoch}) == 18


def test_training_leaves_the_callers_random_numbers_as_they_were(digits: torch.Tensor):
    gan = new_gan(batch_size=20)
    before = torch.get_rng_state()

    def step(real: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        torch.rand(1)
        if gan.epoch == 2:
            raise InterruptedError
        return torch.ones(5)

    loop = train_epochs(gan, step, digits, epochs=3, log_every=100)
    for _ in range(2):
        next(loop)
        assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(InterruptedError):
        next(loop)
    assert torch.equal(torch.get_rng_state(), before)


# -------------------------------------------- the log ---------------------------------------------
def test_log_lines_come_at_steps_1_and_101_of_200(run, data_dir: Path, monkeypatch):
    write_split(data_dir, 200)
    monkeypatch.setattr(dcgan_mnist, "training_step", lambda *_: torch.full((5,), 0.5))
    log = []
    for line in run("--epochs", 2, "--batch-size", 1).out.splitlines():
        match = LOG_LINE.fullmatch(line)
        if match:
            log.append((match["step"], match["steps"]))
        elif line.startswith(("Epoch", "(")):
            log.append(line)
    one_epoch = [("1", "200"), ("101", "200")]
    assert log == ["Epoch 1/2", *one_epoch, "Epoch 2/2", *one_epoch]


def test_log_every_sets_the_distance_of_log_lines(run):
    out = run("--epochs", 1, "--batch-size", 10, "--log-every", 2).out
    assert re.findall(r"^\((\d+)/6\)", out, re.MULTILINE) == ["1", "3", "5"]


def test_a_last_smaller_batch_is_a_step_and_has_its_log_line(run, monkeypatch: pytest.MonkeyPatch):
    sizes = []
    original = dcgan_mnist.training_step

    def step(gan: dcgan_mnist.DCGAN, real: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        sizes.append((len(real), len(z)))
        return original(gan, real, z)

    monkeypatch.setattr(dcgan_mnist, "training_step", step)
    out = run("--epochs", 1, "--batch-size", 25, "--log-every", 1).out
    assert sizes == [(25, 25), (25, 25), (10, 10)]
    assert re.findall(r"^\((\d+)/3\) ds_loss: \d", out, re.MULTILINE) == ["1", "2", "3"]


def test_the_log_and_the_history_give_the_same_figures(run):
    out = run(*THREE_STEPS, "--epochs", 1, "--log-every", 1).out
    logged = []
    for line in out.splitlines():
        match = LOG_LINE.fullmatch(line)
        if match:
            logged.append(list(match.groups()[2:]))
    rows = [line.split(",") for line in Path("result/history.csv").read_text().splitlines()]
    assert rows[0] == ["epoch", "step", *STATS, *dcgan_mnist.SCORES]
    assert [[f"{float(value):.3f}" for value in row[2:7]] for row in rows[1:]] == logged
    assert [row[:2] for row in rows[1:]] == [["1", "1"], ["1", "2"], ["1", "3"]]


# ----------------------------------------- what it yields -----------------------------------------
def norm_statistics(network: nn.Module) -> list[torch.Tensor]:
    """Return copies of what a network's BatchNorm layers know of the data."""
    return [buffer.clone() for buffer in network.buffers()]


def state(gan: dcgan_mnist.DCGAN) -> list[torch.Tensor]:
    """Return copies of all weights, and of the averaged generator's BatchNorm statistics."""
    networks = (gan.generator, gan.discriminator, gan.average)
    weights = [weight for network in networks for weight in parameters(network)]
    return weights + norm_statistics(gan.average)


def test_after_each_epoch_all_of_the_gan_is_up_to_date(digits: torch.Tensor):
    gan = new_gan(batch_size=20, lr=0.01)
    before = state(gan)
    for epoch, stats in enumerate(
        train_epochs(gan, partial(training_step, gan), digits, 3, 100), 1
    ):
        assert gan.epoch == epoch
        assert stats.shape == (3, len(STATS))
        assert stats.isfinite().all()
        now = state(gan)
        assert not same(now, before)
        gan.fit_norm_statistics()  # again: nothing must be left to do
        assert same(state(gan), now)
        before = now
    assert gan.epoch == 3


def test_a_loop_that_is_closed_half_way_leaves_a_gan_to_go_on_with(digits: torch.Tensor):
    whole = new_gan(batch_size=20)
    figures = list(train_epochs(whole, partial(training_step, whole), digits, 3, 100))

    gan = new_gan(batch_size=20)
    loop = train_epochs(gan, partial(training_step, gan), digits, 3, 100)
    first = next(loop)
    before = state(gan)
    loop.close()
    assert gan.epoch == 1
    assert same(state(gan), before)
    assert draw(gan.average, batch()[1]).shape == (20, 28, 28)
    rest = list(train_epochs(gan, partial(training_step, gan), digits, 3, 100))
    assert same([first, *rest], figures)
    assert same(state(gan), state(whole))


def test_a_gan_that_has_had_its_epochs_is_left_alone(digits: torch.Tensor):
    gan = new_gan(batch_size=20)
    gan.epoch = 3
    before = state(gan)
    assert list(train_epochs(gan, partial(training_step, gan), digits, 3, 100)) == []
    assert same(state(gan), before)


# ------------------------------------------- divergence -------------------------------------------
INFINITE = torch.tensor([1, torch.inf, 1, 1, 1])


@pytest.mark.parametrize("figure", range(5))
def test_a_figure_that_is_not_finite_is_found_at_the_next_log_line(run, monkeypatch, figure: int):
    taken = []

    def spoil(step: int, stats: torch.Tensor) -> torch.Tensor:
        taken.append(step)
        if step == 2:
            stats[figure] = torch.inf
        return stats

    change_steps(monkeypatch, spoil)
    outcome = run("--epochs", 1, "--batch-size", 10, "--log-every", 4)
    assert outcome.is_one_line(1, "error: training diverged at step 2 of Epoch 1/1", "--lr")
    assert taken == [1, 2, 3, 4, 5]
    assert re.findall(r"^\((\d+)/6\)", outcome.out, re.MULTILINE) == ["1"]


def test_a_figure_that_is_not_finite_is_found_at_the_end_of_an_epoch(run, monkeypatch):
    change_steps(monkeypatch, lambda step, stats: stats * INFINITE if step == 3 else stats)
    outcome = run(*THREE_STEPS, "--epochs", 2)
    assert outcome.is_one_line(1, "error: training diverged at step 3 of Epoch 1/2", "--lr")
    assert not Path("result/checkpoint.pt").exists()


def test_a_run_that_diverges_keeps_the_last_sound_checkpoint(run, monkeypatch):
    run(*THREE_STEPS, "--epochs", 2, "--output-dir", "whole")
    change_steps(monkeypatch, lambda step, stats: stats * INFINITE if step == 8 else stats)
    outcome = run(*THREE_STEPS, "--epochs", 4)
    assert outcome.is_one_line(1, "error: training diverged at step 2 of Epoch 3/4", "--lr")
    assert_same_run("result", "whole")


@pytest.mark.parametrize("name", ["generator", "discriminator"])
def test_a_weight_that_is_not_finite_stops_training_too(digits: torch.Tensor, name: str):
    gan = new_gan(batch_size=20)
    count = 0

    def step(real: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        stats = training_step(gan, real, z)
        if count == 6:
            getattr(gan, name).layers[0].weight.data[0, 0] = torch.nan
        return stats

    loop = train_epochs(gan, step, digits, epochs=3, log_every=100)
    next(loop)
    with pytest.raises(Failure, match="training diverged at step 3 of Epoch 2/3"):
        next(loop)
    assert gan.epoch == 1

"""One training step, the networks that it trains, their precision, and the averaged weights."""

import copy
import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import THREE_STEPS, MeanScorer, batch, new_gan, parameters, same, saved
from torch import nn

import dcgan_mnist
from dcgan_mnist import (
    DRAWING,
    FIXED_NOISE,
    NORM_STATISTICS,
    SAMPLES,
    SCORED,
    Run,
    draw,
    make_noise,
    training_step,
)


# --------------------------------------- one training step ----------------------------------------
def test_each_half_of_a_step_changes_only_its_own_network():
    gan = new_gan()
    generator_before = parameters(gan.generator)
    discriminator_before = parameters(gan.discriminator)
    generator_between = []
    discriminator_between = []

    def look(*_: object) -> None:
        generator_between.extend(parameters(gan.generator))
        discriminator_between.extend(parameters(gan.discriminator))

    gan.optimizer_d.register_step_post_hook(look)
    training_step(gan, *batch())
    assert same(generator_between, generator_before)
    for after, before in zip(discriminator_between, discriminator_before, strict=True):
        assert not torch.equal(after, before)
    assert same(parameters(gan.discriminator), discriminator_between)
    assert not same(parameters(gan.generator), generator_before)


def test_the_generators_half_computes_no_gradient_for_the_discriminator():
    gan = new_gan()
    own = []

    def look(*_: object) -> None:
        own.extend(p.grad.clone() for p in gan.discriminator.parameters())

    gan.optimizer_d.register_step_post_hook(look)
    training_step(gan, *batch())
    assert same([p.grad for p in gan.discriminator.parameters()], own)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_frozen_discriminator_shows_in_fake_out(frozen: bool):
    gan = new_gan()
    if frozen:
        gan.optimizer_d.param_groups[0]["lr"] = 0.0
    for _ in range(3):
        stats = training_step(gan, *batch())
        figures = dict(zip(dcgan_mnist.STATS, stats.tolist(), strict=True))
        assert (figures["fake_out_before"] == figures["fake_out_after"]) == frozen


def test_the_losses_equal_cross_entropy_on_the_probabilities():
    real, z = batch()
    twin = new_gan()
    cross_entropy = nn.BCELoss()
    fake = twin.generator(z)
    on_real = twin.discriminator(real)
    on_fake = twin.discriminator(fake.detach())
    ds_loss = cross_entropy(on_real, torch.ones(20)) + cross_entropy(on_fake, torch.zeros(20))
    ds_loss.backward()
    twin.optimizer_d.step()
    on_fake_after = twin.discriminator(fake)
    gn_loss = cross_entropy(on_fake_after, torch.ones(20))

    stats = training_step(new_gan(), real, z)
    means = [outputs.mean() for outputs in (on_real, on_fake, on_fake_after)]
    torch.testing.assert_close(stats, torch.stack([ds_loss, gn_loss, *means]), rtol=0, atol=1e-5)


def test_more_generator_steps_are_updates_on_noise_of_their_own():
    real, z = batch(60)
    gan = new_gan(generator_steps=3)
    seen = []
    gan.generator.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    figures = training_step(gan, real[:20], z)
    assert torch.equal(torch.cat(seen), z)
    updates = [
        {state["step"].item() for state in optimizer.state.values()}
        for optimizer in (gan.optimizer_d, gan.optimizer_g)
    ]
    assert updates == [{1}, {3}]

    twin = new_gan()
    assert torch.equal(training_step(twin, real[:20], z[:20]), figures)
    assert same(parameters(gan.discriminator), parameters(twin.discriminator))
    assert not same(parameters(gan.generator), parameters(twin.generator))


def test_a_confident_discriminator_still_gives_a_gradient():
    gan = new_gan()
    with torch.no_grad():
        gan.discriminator.layers[-1].bias.fill_(-200)  # the probability of real rounds to 0
    stats = training_step(gan, *batch())
    assert stats.isfinite().all()
    assert gan.generator.layers[0].weight.grad.any()


def test_the_generator_learns_the_brightness_of_its_data():
    gan = new_gan(lr=0.002)
    white = torch.ones(32, 1, 28, 28)
    z = batch(32)[1]
    for _ in range(150):
        training_step(gan, white, z)
    assert draw(gan.generator, z).float().mean() > 200


def test_settings_reach_both_optimisers():
    gan = new_gan(lr=0.01, beta1=0.7, beta2=0.9)
    for optimizer in (gan.optimizer_g, gan.optimizer_d):
        assert optimizer.param_groups[0]["lr"] == 0.01
        assert optimizer.param_groups[0]["betas"] == (0.7, 0.9)


# ------------------------------------------ the networks ------------------------------------------
@pytest.fixture
def seeds_of_gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds that the GPUs get, if there are any; torch.manual_seed gives them one."""
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    torch.manual_seed(7)
    assert seeds == [7]
    seeds.clear()
    return seeds


def test_width_and_latent_dim_reach_both_networks():
    gan = new_gan(width=3, latent_dim=5)
    assert [p.shape for p in gan.generator.parameters()] == [
        p.shape for p in dcgan_mnist.Generator(latent_dim=5, width=3).parameters()
    ]
    assert [p.shape for p in gan.discriminator.parameters()] == [
        p.shape for p in dcgan_mnist.Discriminator(width=3).parameters()
    ]


class Moved(nn.Module):
    """A network that keeps how it was moved."""

    def to(self, **how: object) -> "Moved":
        self.how = how
        return self


@pytest.mark.parametrize(
    ("device", "layout"),
    [("cpu", torch.channels_last), ("cuda", torch.channels_last), ("mps", None)],
)
def test_a_network_gets_the_fastest_layout_of_its_device_that_is_right(
    device: str, layout: torch.memory_format | None
):
    how = dcgan_mnist.place(Moved(), torch.device(device)).how
    assert how["device"] == torch.device(device)
    assert how.get("memory_format") is layout  # on mps, channels_last would give wrong gradients


@pytest.fixture
def gan_of_a_mac(monkeypatch: pytest.MonkeyPatch) -> dcgan_mnist.DCGAN:
    """Networks on the CPU in the memory layout that they have on mps."""
    with monkeypatch.context() as patch:
        patch.setattr(dcgan_mnist, "place", lambda network, device: network.to(device))
        return new_gan(lr=0.01)


def test_a_run_that_was_begun_on_a_mac_goes_on_elsewhere_as_it_is_written(
    gan_of_a_mac: dcgan_mnist.DCGAN,
):
    for _ in range(2):
        training_step(gan_of_a_mac, *batch())
    kept = {name: part.state_dict() for name, part in gan_of_a_mac.parts().items()}
    gone_on = new_gan(lr=0.01)
    dcgan_mnist.load_weights(gone_on.parts(), copy.deepcopy(kept), Path("checkpoint.pt"))
    for gan in (gan_of_a_mac, gone_on):
        training_step(gan, *batch())
    for name in ("generator", "discriminator"):
        there = parameters(getattr(gan_of_a_mac, name))
        here = parameters(getattr(gone_on, name))
        for one, other in zip(there, here, strict=True):
            if one.dim() == 4:  # gradients of biases before BatchNorm are rounding
                assert (one - other).abs().mean() < 1e-4


def test_a_device_with_another_memory_layout_raises_no_false_alarm(
    gan_of_a_mac: dcgan_mnist.DCGAN,
):
    step = dcgan_mnist.ComparedStep(gan_of_a_mac, partial(training_step, gan_of_a_mac))
    for _ in range(3):
        step(*batch())
    assert step.largest < 0.01


def test_making_networks_touches_no_random_state_of_the_caller(seeds_of_gpus: list[int]):
    before = torch.get_rng_state()
    new_gan(seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert seeds_of_gpus == []


@pytest.mark.parametrize("way", ["library", "--generate", "--resume"])
def test_loading_networks_touches_no_random_state_of_the_caller(
    run, seeds_of_gpus: list[int], way: str
):
    run(*THREE_STEPS, "--epochs", 1)
    before = torch.get_rng_state()
    if way == "library":
        dcgan_mnist.load_generator("result")
    elif way == "--generate":
        assert run("--generate", 3).code == 0
    else:
        assert run("--resume", "--epochs", 2).code == 0
    assert torch.equal(torch.get_rng_state(), before)
    assert seeds_of_gpus == []


def test_the_seed_alone_decides_the_first_weights():
    first = parameters(new_gan(seed=3).generator)
    torch.manual_seed(1)
    assert same(parameters(new_gan(seed=3).generator), first)
    assert not same(parameters(new_gan(seed=4).generator), first)


def change(generator: nn.Module) -> None:
    """Let a generator draw brighter images."""
    with torch.no_grad():
        generator.layers[-2].bias += 1


@pytest.mark.parametrize("name", ["generator", "average"])
def test_a_copy_of_a_generator_computes_with_its_own_weights(name: str):
    gan = new_gan(precision="bf16")
    training_step(gan, *batch())
    generator = getattr(gan, name).eval()
    z = batch()[1]
    images = generator(z)
    twin = copy.deepcopy(generator)
    assert torch.equal(twin(z), images)
    change(twin)
    assert (twin(z) > images).all()
    assert torch.equal(generator(z), images)
    change(generator)
    assert torch.equal(twin(z), generator(z))


@pytest.mark.parametrize("name", ["generator", "average"])
def test_a_generator_can_be_pickled_and_saved(name: str, tmp_path: Path):
    gan = new_gan(precision="bf16")
    training_step(gan, *batch())
    generator = getattr(gan, name).eval()
    torch.save(generator, tmp_path / "generator.pt")
    loaded = torch.load(tmp_path / "generator.pt", weights_only=False)
    pickled = pickle.loads(pickle.dumps(generator))
    z = batch()[1]
    images = generator(z)
    for twin in (loaded, pickled):
        assert torch.equal(twin(z), images)
        change(twin)
        assert (twin(z) > images).all()
    assert torch.equal(generator(z), images)


# -------------------------------------------- drawing ---------------------------------------------
class Pictures(nn.Module):
    """A generator that makes an image of each number of noise."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.scale * z.expand(-1, -1, 28, 28)


def test_digits_are_black_at_minus_one_and_white_at_one():
    digits = draw(Pictures(), torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0]).view(5, 1, 1, 1))
    assert digits.shape == (5, 28, 28)
    assert digits.dtype == torch.uint8
    assert digits[:, 0, 0].tolist() == [0, 64, 128, 191, 255]


def test_every_noise_has_its_digit_however_many_there_are():
    z = torch.linspace(-1, 1, 256).view(256, 1, 1, 1)
    assert draw(Pictures(), z)[:, 5, 5].tolist() == list(range(256))


# ------------------------------------------- precision --------------------------------------------
@pytest.mark.parametrize(
    ("device", "cpu", "capability", "expected"),
    [
        ("cpu", {"avx512_bf16": True}, (0, 0), True),
        ("cpu", {"amx_bf16": True}, (0, 0), True),
        ("cpu", {"avx512_bf16": False}, (9, 0), False),
        ("cpu", {}, (9, 0), False),
        ("cuda", {}, (8, 0), True),
        ("cuda", {}, (9, 0), True),
        ("cuda", {"avx512_bf16": True}, (7, 5), False),
        ("mps", {"avx512_bf16": True}, (9, 0), False),
    ],
)
def test_bf16_is_taken_only_where_the_hardware_has_it(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    cpu: dict[str, bool],
    capability: tuple[int, int],
    expected: bool,
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert dcgan_mnist.has_bf16(torch.device(device)) == expected


@pytest.mark.parametrize(
    ("hardware", "asked", "given", "warnings"),
    [
        (False, "auto", "fp32", 0),
        (True, "auto", "bf16", 0),
        (True, "fp32", "fp32", 0),
        (False, "bf16", "bf16", 1),
    ],
)
def test_auto_precision_is_the_fastest_and_another_can_be_asked_for(
    run, monkeypatch: pytest.MonkeyPatch, hardware: bool, asked: str, given: str, warnings: int
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": hardware})
    outcome = run(*THREE_STEPS, "--epochs", 1, "--precision", asked)
    assert saved()["settings"]["precision"] == given
    assert f"Computing on cpu in {given}" in outcome.out.splitlines()
    assert len(outcome.warnings()) == warnings


def test_bf16_computes_in_bf16_and_keeps_everything_in_fp32():
    gan = new_gan(precision="bf16")
    real, z = batch()
    inside = []
    for network in (gan.generator, gan.discriminator):
        network.layers[0].register_forward_hook(lambda *call: inside.append(call[2].dtype))
    stats = training_step(gan, real, z)
    assert set(inside) == {torch.bfloat16}
    assert stats.dtype == torch.float32
    with gan.autocast():
        assert gan.generator(z).dtype == torch.float32
    with gan.autocast():
        assert gan.discriminator.logits(real).dtype == torch.float32
    for network in (gan.generator, gan.discriminator):
        floats = [t for t in network.state_dict().values() if t.is_floating_point()]
        assert {t.dtype for t in floats} == {torch.float32}
        assert {p.grad.dtype for p in network.parameters()} == {torch.float32}
    for optimizer in (gan.optimizer_g, gan.optimizer_d):
        states = [t for state in optimizer.state.values() for t in state.values()]
        assert {t.dtype for t in states} == {torch.float32}


def test_bf16_gives_the_figures_of_fp32_but_for_rounding():
    exact = training_step(new_gan(precision="fp32"), *batch())
    rounded = training_step(new_gan(precision="bf16"), *batch())
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0.02)


def test_bf16_draws_the_digits_of_fp32_but_for_rounding():
    gan = new_gan(lr=0.01)
    for _ in range(5):
        training_step(gan, *batch())
    z = batch()[1]
    exact = draw(gan.generator, z).int()
    rounded = draw(gan.generator, z, "bf16").int()
    assert not torch.equal(exact, rounded)
    assert (rounded - exact).abs().max() <= 4


# -------------------------------------- the averaged weights --------------------------------------
def test_averaged_weights_span_a_share_of_all_steps():
    gan = new_gan(ema=0.5)
    w0 = parameters(gan.generator)
    training_step(gan, *batch())
    w1 = parameters(gan.generator)
    gan.update_average(steps=4)  # spans two steps
    training_step(gan, *batch())
    w2 = parameters(gan.generator)
    gan.update_average(steps=8)  # spans four steps
    for average, a, b, c in zip(gan.average.parameters(), w0, w1, w2, strict=True):
        torch.testing.assert_close(average, 0.75 * (0.5 * a + 0.5 * b) + 0.25 * c)


def test_the_first_steps_which_draw_badly_do_not_stay_in_the_average():
    gan = new_gan(ema=0.5)
    training_step(gan, *batch())
    gan.update_average(steps=2)
    assert same(parameters(gan.average), parameters(gan.generator))


def test_without_averaging_the_generators_own_weights_draw():
    gan = new_gan(ema=0.0)
    training_step(gan, *batch())
    gan.update_average(steps=1000)
    assert same(parameters(gan.average), parameters(gan.generator))


def test_batchnorm_statistics_fit_the_averaged_weights(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dcgan_mnist, "FITTED", 1000)  # as in a run: ten parts
    gan = new_gan()
    for step in range(1, 4):
        training_step(gan, *batch())
        gan.update_average(step)
    gan.fit_norm_statistics()
    first, norm = gan.average.layers[:2]
    with torch.no_grad():
        values = first(make_noise(1000, 8, gan.settings.seed, NORM_STATISTICS))
    torch.testing.assert_close(norm.running_mean, values.mean(dim=(0, 2, 3)), rtol=1e-3, atol=1e-5)
    variance = values.var(dim=(0, 2, 3))
    torch.testing.assert_close(norm.running_var, variance, rtol=0.02, atol=1e-5)
    assert not gan.average.training


@pytest.mark.usefixtures("mean_scorer")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_pictures_scores_and_generate_draw_with_the_averaged_weights(
    run, data_dir: Path, monkeypatch: pytest.MonkeyPatch, precision: str
):
    scored = []

    def score(_: MeanScorer, digits: torch.Tensor) -> dict[str, float]:
        scored.append(digits)
        return dict.fromkeys(dcgan_mnist.SCORES, 1)

    monkeypatch.setattr(MeanScorer, "__call__", score)
    run(*THREE_STEPS, "--epochs", 3, "--lr", 0.01, "--precision", precision)
    gan = new_gan()
    trained = Run(gan, dcgan_mnist.load_pictures(data_dir, "test")[0], None, epochs=3)
    trained.restore(saved(), Path("result/checkpoint.pt"))
    z = make_noise(SCORED, 8, 0, DRAWING)
    assert torch.equal(scored[-1], draw(gan.average, z, precision))
    assert not torch.equal(scored[-1], draw(gan.generator.eval(), z, precision))
    z = make_noise(SAMPLES, 8, 0, FIXED_NOISE)
    assert torch.equal(trained.samples(3), draw(gan.average, z, precision))
    run("--generate", 20)
    assert (np.load("result/generated.npy") == scored[-1][:20].numpy()).all()

import contextlib
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from conftest import LOG_LINE, new_gan, write_split
from torch import nn

import dcgan_mnist
from dcgan_mnist import random_stream, to_images, training_step

pytestmark = pytest.mark.usefixtures("small_networks")


def batch(n: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    stream = torch.Generator().manual_seed(1)
    images = torch.rand(n, 1, 28, 28, generator=stream) * 2 - 1
    return images, torch.randn(n, dcgan_mnist.LATENT_DIM, 1, 1, generator=stream)


def parameters(network: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in network.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_each_half_of_a_step_changes_only_its_own_network():
    gan = new_gan()
    g_before, d_before = parameters(gan.generator), parameters(gan.discriminator)
    between = {}

    def look(*_: object) -> None:
        between["g"], between["d"] = parameters(gan.generator), parameters(gan.discriminator)

    gan.optimizer_d.register_step_post_hook(look)
    training_step(gan, *batch())
    assert same(between["g"], g_before)
    assert not any(torch.equal(x, y) for x, y in zip(between["d"], d_before, strict=True))
    assert same(parameters(gan.discriminator), between["d"])
    assert not same(parameters(gan.generator), g_before)


def test_the_generators_half_computes_no_gradient_for_the_discriminator():
    gan = new_gan()
    own = {}

    def look(*_: object) -> None:
        own["gradients"] = [p.grad.clone() for p in gan.discriminator.parameters()]

    gan.optimizer_d.register_step_post_hook(look)
    training_step(gan, *batch())
    assert same([p.grad for p in gan.discriminator.parameters()], own["gradients"])


def is_frozen(stats: torch.Tensor) -> bool:
    """Whether the discriminator's outputs (steps, 5) show that its updates do nothing."""
    before, after = stats[:, 3], stats[:, 4]
    return torch.equal(before, after)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_frozen_discriminator_shows_in_fake_out(frozen: bool):
    gan = new_gan()
    if frozen:
        gan.optimizer_d.param_groups[0]["lr"] = 0.0
    stats = torch.stack([training_step(gan, *batch()) for _ in range(3)])
    assert is_frozen(stats) == frozen


def test_true_out_moves_from_epoch_to_epoch(run):
    run("--epochs", 3, "--batch-size", 10, "--log-every", 6)
    history = torch.load("result/checkpoint.pt", weights_only=True)["history"]
    assert len(set(history[::6, 2].tolist())) == 3


def test_the_losses_equal_cross_entropy_on_the_probabilities():
    gan, (real, z) = new_gan(), batch()
    twin = new_gan()
    fake = twin.generator(z)
    on_real, on_fake = twin.discriminator(real), twin.discriminator(fake.detach())
    ds_loss = F.binary_cross_entropy(on_real, torch.ones(len(real)))
    ds_loss = ds_loss + F.binary_cross_entropy(on_fake, torch.zeros(len(real)))
    ds_loss.backward()
    twin.optimizer_d.step()
    on_fake_after = twin.discriminator(fake)
    gn_loss = F.binary_cross_entropy(on_fake_after, torch.ones(len(real)))

    stats = training_step(gan, real, z)
    means = [outputs.mean() for outputs in (on_real, on_fake, on_fake_after)]
    torch.testing.assert_close(stats, torch.stack([ds_loss, gn_loss, *means]), rtol=0, atol=1e-5)


def test_a_confident_discriminator_still_gives_a_gradient():
    gan = new_gan()
    with torch.no_grad():
        gan.discriminator.layers[-1].bias.fill_(-200)  # the probability of real rounds to 0
    stats = training_step(gan, *batch())
    assert stats.isfinite().all()
    assert gan.generator.layers[0].weight.grad.any()


@pytest.mark.parametrize(
    ("device", "cpu", "capability", "expected"),
    [
        ("cpu", {"avx512_bf16": True}, None, "bf16"),
        ("cpu", {"amx_bf16": True}, None, "bf16"),
        ("cpu", {"avx512_bf16": False}, None, "fp32"),
        ("cpu", {}, None, "fp32"),
        ("cuda", {}, (8, 0), "bf16"),
        ("cuda", {}, (9, 0), "bf16"),
        ("cuda", {"avx512_bf16": True}, (7, 5), "fp32"),
        ("mps", {"avx512_bf16": True}, None, "fp32"),
    ],
)
def test_auto_precision_is_bf16_where_the_hardware_has_it(
    monkeypatch, device: str, cpu: dict, capability: tuple | None, expected: str
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: device == "mps")
    for asked, given in (("auto", expected), ("fp32", "fp32"), ("bf16", "bf16")):
        options = dcgan_mnist.parse_options(["--device", device, "--precision", asked])
        dcgan_mnist.pick_hardware(options)
        assert options.precision == given


def test_bf16_computes_in_bf16_and_keeps_everything_in_fp32():
    gan, (real, z) = new_gan(precision="bf16"), batch()
    inside = []
    for network in (gan.generator, gan.discriminator):
        network.layers[0].register_forward_hook(lambda *call: inside.append(call[2].dtype))
    stats = training_step(gan, real, z)
    assert set(inside) == {torch.bfloat16}
    assert gan.generator(z).dtype == gan.discriminator(real).dtype == torch.float32
    assert gan.discriminator.logits(real).dtype == stats.dtype == torch.float32
    for network in (gan.generator, gan.discriminator):
        floats = [t for t in network.state_dict().values() if t.is_floating_point()]
        assert {t.dtype for t in floats} == {torch.float32}
        assert {p.grad.dtype for p in network.parameters()} == {torch.float32}
    for optimizer in (gan.optimizer_g, gan.optimizer_d):
        states = [t for state in optimizer.state.values() for t in state.values()]
        assert {t.dtype for t in states} == {torch.float32}


def test_bf16_gives_the_figures_of_fp32_but_for_rounding():
    exact, rounded = (training_step(new_gan(precision=p), *batch()) for p in ("fp32", "bf16"))
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0.02)


def test_settings_reach_both_optimisers():
    gan = new_gan(lr=0.01, beta1=0.7)
    for optimizer in (gan.optimizer_g, gan.optimizer_d):
        assert optimizer.param_groups[0]["lr"] == 0.01
        assert optimizer.param_groups[0]["betas"] == (0.7, 0.999)


def test_batches_are_scaled_from_minus_one_to_one():
    digits = torch.tensor([255, 0, 255], dtype=torch.uint8).view(3, 1, 1).expand(3, 28, 28)
    images = to_images(digits)
    assert images.shape == (3, 1, 28, 28)
    assert images[:, 0, 0, 0].tolist() == [1.0, -1.0, 1.0]


def test_every_digit_is_seen_once_an_epoch_in_a_new_order(run, tmp_path, monkeypatch):
    digits = write_split(tmp_path / "data", 25)
    seen, sizes = [], []
    original = training_step

    def spy(gan: object, real: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        assert z.shape == (len(real), dcgan_mnist.LATENT_DIM, 1, 1)
        sizes.append(len(real))
        seen.extend(((real + 1) * 127.5).round().byte().squeeze(1))
        return original(gan, real, z)

    monkeypatch.setattr(dcgan_mnist, "training_step", spy)
    assert run("--epochs", 2, "--batch-size", 10).code == 0
    assert sizes == [10, 10, 5, 10, 10, 5]
    epochs = [torch.stack(seen[:25]), torch.stack(seen[25:])]
    assert not torch.equal(*epochs)
    for epoch in epochs:
        assert sorted(epoch.flatten(1).tolist()) == sorted(digits.flatten(1).tolist())


def test_epochs_and_seeds_have_their_own_random_numbers():
    noises = [
        torch.randn(1, generator=random_stream(seed, epoch)).item()
        for seed in (0, 1)
        for epoch in (-2, -1, 0, 1, 2)
    ]
    assert len(set(noises)) == len(noises)
    first = torch.randn(4, generator=random_stream(3, 7))
    assert torch.equal(first, torch.randn(4, generator=random_stream(3, 7)))


def test_log_lines_come_at_steps_1_and_101_of_200(run, tmp_path):
    write_split(tmp_path / "data", 200)
    out = run("--epochs", 2, "--batch-size", 1).out
    lines = [line for line in out.splitlines() if line.startswith(("Epoch", "("))]
    heads = [LOG_LINE.fullmatch(line) or line for line in lines]
    steps = [m if isinstance(m, str) else (m["step"], m["steps"]) for m in heads]
    one_epoch = [("1", "200"), ("101", "200")]
    assert steps == ["Epoch 1/2", *one_epoch, "Epoch 2/2", *one_epoch]


def test_log_every_sets_the_distance_of_log_lines(run):
    out = run("--epochs", 1, "--batch-size", 10, "--log-every", 2).out
    assert re.findall(r"^\((\d+)/6\)", out, re.M) == ["1", "3", "5"]


def test_the_log_and_the_history_give_the_same_figures(run):
    out = run("--epochs", 1, "--batch-size", 20, "--log-every", 1).out
    logged = [m.groups()[2:] for m in map(LOG_LINE.fullmatch, out.splitlines()) if m]
    rows = [line.split(",") for line in Path("result/history.csv").read_text().splitlines()]
    assert rows[0] == ["epoch", "step", *dcgan_mnist.STATS, *dcgan_mnist.SCORES]
    assert [tuple(f"{float(value):.3f}" for value in row[2:7]) for row in rows[1:]] == logged
    assert [row[:2] for row in rows[1:]] == [["1", "1"], ["1", "2"], ["1", "3"]]


def test_the_same_seed_gives_the_same_run_and_another_seed_another(run):
    for folder, seed in (("a", 5), ("b", 5), ("c", 6)):
        run("--epochs", 2, "--batch-size", 20, "--seed", seed, "--output-dir", folder)
    a, b, c = ({path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())} for folder in "abc")
    assert a == b
    assert all(a[name] != c[name] for name in a)


def test_the_generator_learns_the_brightness_of_its_data():
    gan = new_gan(lr=0.002)
    white = torch.ones(32, 1, 28, 28)
    z = torch.randn(32, dcgan_mnist.LATENT_DIM, 1, 1, generator=torch.Generator().manual_seed(0))
    for _ in range(150):
        training_step(gan, white, z)
    assert dcgan_mnist.draw(gan.generator, z).float().mean() > 200


class FakeGraph:
    """Stands in for a CUDA graph: while recording, steps compute nothing; a replay takes one."""

    recording = False

    def __init__(self, graphed: dcgan_mnist.GraphedStep) -> None:
        self.graphed = graphed

    def replay(self) -> None:
        graphed = self.graphed
        graphed.stats.copy_(training_step(graphed.gan, graphed.real, graphed.z))


def fake_graphs(monkeypatch: pytest.MonkeyPatch, graphed: dcgan_mnist.GraphedStep) -> list[str]:
    """Let a step on the CPU record graphs; return the list of what it does besides replays."""
    events = []

    def step(gan: object, real: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        events.append("record" if FakeGraph.recording else "step")
        return torch.full((5,), torch.nan) if FakeGraph.recording else training_step(gan, real, z)

    @contextlib.contextmanager
    def record(graph: FakeGraph, stream: object) -> Iterator[None]:
        FakeGraph.recording = True
        yield
        FakeGraph.recording = False

    monkeypatch.setattr(dcgan_mnist, "training_step", step)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: FakeGraph(graphed))
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    return events


SIZES = [20, 20, 7, 20, 20, 20, 7, 20]


def take_steps(step: dcgan_mnist.GraphedStep) -> list[torch.Tensor]:
    """Take a step with a batch of each of the SIZES; return all figures, then all weights."""
    figures = []
    for i, size in enumerate(SIZES):
        real, z = batch(size)
        share = (i + 1) / len(SIZES)
        figures.append(step(real * share, z * share).clone())
    return figures + parameters(step.gan.generator) + parameters(step.gan.discriminator)


def test_graphed_steps_give_what_plain_steps_give(monkeypatch):
    plain = take_steps(dcgan_mnist.GraphedStep(new_gan(batch_size=20)))
    graphed = dcgan_mnist.GraphedStep(new_gan(batch_size=20))
    events = fake_graphs(monkeypatch, graphed)
    assert same(take_steps(graphed), plain)
    assert events == ["step"] * 4 + ["record", "step"]


def test_a_graph_that_cannot_be_recorded_leaves_plain_steps_and_one_line(monkeypatch, capsys):
    plain = take_steps(dcgan_mnist.GraphedStep(new_gan(batch_size=20)))
    graphed = dcgan_mnist.GraphedStep(new_gan(batch_size=20))
    events = fake_graphs(monkeypatch, graphed)

    def refuse() -> None:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", refuse)
    assert same(take_steps(graphed), plain)
    assert events == ["step"] * len(SIZES)
    printed = capsys.readouterr().out
    assert printed == "No CUDA graph, so steps take longer: operation not permitted\n"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_cuda_graph_gives_what_plain_steps_give():
    device = torch.device("cuda")
    runs = []
    with torch.cuda.stream(torch.cuda.Stream()):
        for make in (dcgan_mnist.GraphedStep, lambda gan: functools.partial(training_step, gan)):
            gan = dcgan_mnist.DCGAN(new_gan(batch_size=20).settings, device)
            step = make(gan)
            for size in SIZES:
                real, z = batch(size)
                figures = step(real.to(device), z.to(device)).clone()
            runs.append([figures, *parameters(gan.generator), *parameters(gan.discriminator)])
    for graphed, plain in zip(*runs, strict=True):
        torch.testing.assert_close(graphed, plain, rtol=1e-3, atol=1e-4)

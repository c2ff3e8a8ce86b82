"""The same step in kept memory, as products of matrices, as a CUDA graph, in several processes."""

import contextlib
import copy
import mmap
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    ROOT,
    RUN_FILES,
    SMALL,
    THREE_STEPS,
    assert_same_run,
    batch,
    change_steps,
    contents,
    finished,
    new_gan,
    raising,
    same,
    saved,
    write_split,
)
from torch import distributed, nn
from torch.nn.utils.parametrizations import spectral_norm

import dcgan_mnist
from dcgan_mnist import (
    DCGAN,
    Settings,
    SharedStep,
    Step,
    fastest_step,
    random_stream,
    train_epochs,
    training_step,
)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


# ---------------------------------------- memory of a step ----------------------------------------
FAULTS_AFTER_A_COMMAND = """
import resource
import sys
import torch
import dcgan_mnist

try:
    dcgan_mnist.run_script()
except SystemExit:
    pass

def use_memory():
    pieces = [torch.ones(2**20) for _ in range(50)]  # 200 MiB

use_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    use_memory()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_elsewhere_than_on_linux_the_kind_of_libc_is_not_asked_for(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(sys, "platform", "win32")
    unreadable = OSError("the Python of an app store cannot be read")
    monkeypatch.setattr(platform, "libc_ver", raising(unreadable))
    dcgan_mnist.keep_freed_memory()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc keeps the memory")
def test_what_a_step_frees_is_kept_for_the_next_one():
    done = finished([sys.executable, "-c", FAULTS_AFTER_A_COMMAND, "--help"], ROOT)
    assert done.code == 0, done.err
    faults = int(done.out.splitlines()[-1])  # pages that the system cleared
    assert faults < 0.05 * 5 * 200 * 2**20 / mmap.PAGESIZE


# ------------------------------------ convolutions as products ------------------------------------
INPUTS = {dcgan_mnist.Generator: (100, 1, 1), dcgan_mnist.Discriminator: (1, 28, 28)}


def gradients(network: nn.Module, inputs: torch.Tensor) -> list[torch.Tensor]:
    """Return what a network makes of its inputs, and the gradients of both of them and weights."""
    inputs = inputs.clone().requires_grad_()
    outputs = network(inputs)
    outputs.square().sum().backward()
    return [outputs, inputs.grad, *(parameter.grad for parameter in network.parameters())]


def plain_and_products(kind: type[nn.Module]) -> tuple[nn.Module, nn.Module]:
    """Return the layers of two networks with the same weights, the second ones with products."""
    with dcgan_mnist.seeded(0, torch.device("cpu")):
        plain = kind(width=4).apply(dcgan_mnist.weights_init).layers
    plain.to(memory_format=torch.channels_last)
    products = copy.deepcopy(plain)
    dcgan_mnist.use_products(products)
    return plain, products


def inputs_of(kind: type[nn.Module], n: int) -> torch.Tensor:
    """Return random inputs (n, ...) of a network, the same for every call."""
    return torch.randn(n, *INPUTS[kind], generator=random_stream(seed=0, use=0))


@pytest.mark.parametrize("kind", INPUTS)
def test_products_give_what_convolutions_give(kind: type[nn.Module]):
    plain, products = plain_and_products(kind)
    inputs = inputs_of(kind, 3).double()
    for expected, found in zip(
        gradients(plain.double(), inputs), gradients(products.double(), inputs), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", INPUTS)
def test_products_in_bf16_are_as_exact_as_convolutions_in_bf16(kind: type[nn.Module]):
    plain, products = plain_and_products(kind)
    inputs = inputs_of(kind, 20)
    exact = gradients(copy.deepcopy(plain).double(), inputs.double())
    with torch.autocast("cpu", torch.bfloat16):
        of_plain = gradients(plain, inputs)
        of_products = gradients(products, inputs)
    for value, a, b in zip(exact, of_plain, of_products, strict=True):
        assert b.dtype == a.dtype
        if value.dim() == 4:  # the rest has hardly a gradient, because BatchNorm follows
            assert torch.dist(b.double(), value) < 2 * torch.dist(a.double(), value)


@pytest.mark.parametrize("kind", INPUTS)
def test_a_product_in_bf16_stays_in_bf16(kind: type[nn.Module]):
    products = [layer for layer in plain_and_products(kind)[1] if is_product(layer)]
    assert len(products) == 2
    for layer in products:
        inputs = torch.randn(20, layer.in_channels, 7, 7)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(inputs).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", INPUTS)
def test_products_keep_the_names_and_values_of_the_weights(kind: type[nn.Module]):
    plain, products = plain_and_products(kind)
    assert list(products.state_dict()) == list(plain.state_dict())
    assert same(list(products.state_dict().values()), list(plain.state_dict().values()))


def is_product(layer: nn.Module) -> bool:
    """Whether a layer is a convolution of another class than torch's own."""
    convolution = isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))
    return convolution and type(layer) not in (nn.Conv2d, nn.ConvTranspose2d)


@pytest.mark.parametrize(("device", "count"), [("cpu", 4), ("cuda", 0), ("mps", 0)])
def test_a_cpu_trains_with_products_and_others_do_not(device: str, count: int):
    gan = new_gan()
    before = [id(m) for network in (gan.generator, gan.discriminator) for m in network.modules()]
    gan.device = torch.device(device)
    fastest_step(gan)
    layers = [*gan.generator.modules(), *gan.discriminator.modules()]
    assert [id(layer) for layer in layers] == before
    assert sum(isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)) for layer in layers) == 8
    assert sum(map(is_product, layers)) == count


class Doubled(nn.Conv2d):
    """A convolution of somebody else, which computes something else."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(images)


PRODUCTS = {
    "a convolution": lambda: nn.Conv2d(6, 4, 3, stride=2),
    "without bias": lambda: nn.Conv2d(6, 4, 3, bias=False),
    "that is not square": lambda: nn.Conv2d(6, 4, (2, 5), stride=(3, 1)),
    "that reaches not all pixels": lambda: nn.Conv2d(6, 4, 3, stride=4),
    "with a kernel under its stride": lambda: nn.Conv2d(6, 4, 2, stride=3),
    "of single pixels": lambda: nn.Conv2d(6, 4, 1),
    "of all pixels": lambda: nn.Conv2d(6, 4, (9, 8)),
    "a transposed one": lambda: nn.ConvTranspose2d(6, 4, 3, stride=2),
    "a transposed one without bias": lambda: nn.ConvTranspose2d(6, 4, 3, bias=False),
    "a transposed one that is not square": lambda: nn.ConvTranspose2d(6, 4, (2, 5), stride=(3, 1)),
    "a transposed one that leaves gaps": lambda: nn.ConvTranspose2d(6, 4, 2, stride=3),
    "with weight_norm": lambda: nn.utils.weight_norm(nn.Conv2d(6, 4, 3)),
}
LEFT_ALONE = {
    "padding": lambda: nn.Conv2d(6, 4, 3, padding=1),
    "padding on one side": lambda: nn.Conv2d(6, 4, 3, padding=(0, 1)),
    "padding by name": lambda: nn.Conv2d(6, 4, 3, padding="same"),
    "padding of another kind": lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"),
    "dilation": lambda: nn.Conv2d(6, 4, 3, dilation=2),
    "groups": lambda: nn.Conv2d(6, 4, 3, groups=2),
    "transposed padding": lambda: nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1),
    "transposed output padding": lambda: nn.ConvTranspose2d(6, 4, 3, stride=2, output_padding=1),
    "transposed dilation": lambda: nn.ConvTranspose2d(6, 4, 3, dilation=2),
    "transposed groups": lambda: nn.ConvTranspose2d(6, 4, 3, groups=2),
    "a subclass": lambda: Doubled(6, 4, 3),
    "a parametrization": lambda: spectral_norm(nn.Conv2d(6, 4, 3)),
    "a transposed parametrization": lambda: spectral_norm(nn.ConvTranspose2d(6, 4, 3), dim=1),
    "another kind": lambda: nn.Conv3d(6, 4, 1),
}


def twice(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """Make a layer twice, in double precision, with the same weights."""
    layers = []
    for _ in range(2):
        with dcgan_mnist.seeded(0, torch.device("cpu")):
            layers.append(make().double())
    return layers[0], layers[1]


@pytest.mark.parametrize("kind", [*PRODUCTS, *LEFT_ALONE])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_every_convolution_computes_what_it_did(kind: str):
    plain, layer = twice((PRODUCTS | LEFT_ALONE)[kind])
    before = type(layer)
    names = list(layer.state_dict())
    dcgan_mnist.use_products(nn.Sequential(layer))
    assert (type(layer) is before) == (kind in LEFT_ALONE)
    assert isinstance(layer, before)
    assert list(layer.state_dict()) == names
    shape = (6, 1, 9, 8) if isinstance(layer, nn.Conv3d) else (6, 9, 8)
    inputs = torch.randn(5, *shape, generator=random_stream(seed=0, use=0)).double()
    for expected, found in zip(gradients(plain, inputs), gradients(layer, inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["a convolution", "a transposed one"])
def test_gradients_have_gradients_as_a_gradient_penalty_needs_them(kind: str):
    found = []
    layers = twice(PRODUCTS[kind])
    dcgan_mnist.use_products(layers[1])
    for layer in layers:
        inputs = torch.randn(5, 6, 9, 8, generator=random_stream(seed=0, use=0)).double()
        inputs.requires_grad_()
        (slope,) = torch.autograd.grad(layer(inputs).tanh().sum(), inputs, create_graph=True)
        slope.square().sum().backward()
        found.append([slope, inputs.grad, layer.weight.grad])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_sums_over_many_patches_lose_no_digits_in_bf16(kind: type[nn.Module]):
    stream = random_stream(seed=0, use=0)
    layer = kind(1, 1, 8, bias=False)
    nn.init.uniform_(layer.weight, generator=stream)  # nothing cancels out
    inputs = torch.rand(2, 1, 20, 20, generator=stream).bfloat16()
    exact = gradients(copy.deepcopy(layer).double(), inputs.double())
    dcgan_mnist.use_products(layer)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(layer, inputs)
    for expected, value in zip(exact, found, strict=True):  # bf16 has 8 bits
        torch.testing.assert_close(value.double(), expected, rtol=3 / 2**8, atol=0)


def test_a_transposed_convolution_can_still_be_told_the_size_of_its_output():
    plain, layer = twice(PRODUCTS["a transposed one"])
    dcgan_mnist.use_products(layer)
    inputs = torch.randn(5, 6, 9, 8, generator=random_stream(seed=0, use=0)).double()
    for size in ([19, 17], [20, 18]):
        expected = plain(inputs, output_size=size)
        assert list(expected.shape[2:]) == size
        torch.testing.assert_close(layer(inputs, output_size=size), expected)


@pytest.mark.parametrize("kind", [*PRODUCTS, *LEFT_ALONE])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_hooks_on_a_convolution_go_on_being_called(kind: str):
    layer = (PRODUCTS | LEFT_ALONE)[kind]()
    called = []
    layer.register_forward_pre_hook(lambda *_: called.append("before"))
    layer.register_forward_hook(lambda *_: called.append("after"))
    layer.register_full_backward_hook(lambda *_: called.append("backward"))
    dcgan_mnist.use_products(nn.Sequential(layer))
    shape = (6, 1, 9, 8) if isinstance(layer, nn.Conv3d) else (6, 9, 8)
    layer(torch.randn(2, *shape, requires_grad=True)).sum().backward()
    assert called == ["before", "after", "backward"]


# --------------------------------------- the memory layout ----------------------------------------
def is_channels_last(network: nn.Module) -> bool:
    """Whether the channels of weights with some channels and pixels lie side by side in memory."""
    weights = [p for p in network.parameters() if p.dim() == 4 and min(p.shape) > 1]
    found = {p.stride(1) == 1 for p in weights}
    assert len(found) == 1
    return found.pop()


@pytest.mark.parametrize(("device", "expected"), [("cpu", True), ("mps", False)])
def test_on_mps_networks_keep_the_layout_whose_gradients_are_right(
    run, monkeypatch: pytest.MonkeyPatch, device: str, expected: bool
):
    run(*THREE_STEPS, "--epochs", 1)
    original = nn.Module.to

    def to(self: nn.Module, *, device: torch.device, **options: object) -> nn.Module:
        assert str(device) in ("cpu", "mps")
        return original(self, device=torch.device("cpu"), **options)

    monkeypatch.setattr(nn.Module, "to", to)
    there = torch.device(device)
    gan = DCGAN(Settings(width=4, latent_dim=8), there)
    networks = [
        dcgan_mnist.place(dcgan_mnist.Generator(8, 4), there),
        dcgan_mnist.load_generator("result", device=device),
        gan.generator,
        gan.discriminator,
        gan.average,
    ]
    assert [is_channels_last(network) for network in networks] == [expected] * 5


# ------------------------------------------ CUDA graphs -------------------------------------------
class FakeGPU:
    """Lets the CPU record CUDA graphs; ``events`` tells what became of batches of which size."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, int]] = []
        self.recording: FakeGraph | None = None
        self.refusal: Exception | None = None  # half way through a recording
        fork_rng = torch.random.fork_rng
        monkeypatch.setattr(dcgan_mnist, "training_step", self.step)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: FakeGraph(self.events))
        monkeypatch.setattr(torch.cuda, "graph", self.record)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
        # the random numbers of this GPU are those of the CPU
        monkeypatch.setattr(torch.random, "fork_rng", lambda *_, **__: fork_rng([]))

    def step(self, gan: DCGAN, real: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Take a training step; while a graph is recorded, compute nothing."""
        if self.recording is None:
            self.events.append(("step", len(real)))
            return training_step(gan, real, z)
        self.events.append(("record", len(real)))
        if self.refusal is not None:
            gan.optimizer_g.zero_grad()
            raise self.refusal
        stats = torch.full((5,), torch.nan)
        self.recording.recorded = (gan, real, z, stats)
        return stats

    @contextlib.contextmanager
    def record(self, graph: "FakeGraph", stream: object) -> Iterator[None]:
        self.recording = graph
        try:
            yield
        finally:
            self.recording = None


class FakeGraph:
    """Stands in for a CUDA graph: a replay takes the recorded step, on the same tensors."""

    def __init__(self, events: list[tuple[str, int]]) -> None:
        self.events = events

    def replay(self) -> None:
        gan, real, z, stats = self.recorded
        self.events.append(("replay", len(real)))
        stats.copy_(training_step(gan, real, z))


def step_of_a_gpu(gan: DCGAN, graph: bool = True) -> Step:
    """Return the way in which a GPU takes training steps."""
    device = gan.device
    gan.device = torch.device("cuda")
    step = fastest_step(gan, graph)
    gan.device = device
    return step


SIZES = [20, 20, 7, 20, 20, 20, 7, 20]  # of batches, of which those of 20 are full
WARM_UP = [("step", 20)] * 3  # before a recording; they do not count
RECORDING = [*WARM_UP, ("record", 20)]


def events_of(sizes: list[int], has_begun: bool = False) -> list[tuple[str, int]]:
    """Return what becomes of batches: the first one of a run and small ones are plain steps."""
    events: list[tuple[str, int]] = []
    for size in sizes:
        if size < 20 or not has_begun:
            events.append(("step", size))
        else:
            events += [] if RECORDING[-1] in events else RECORDING
            events.append(("replay", size))
        has_begun = True
    return events


def state(gan: DCGAN) -> list[torch.Tensor]:
    """Return copies of all weights and buffers, and of all that the optimisers keep."""
    kept = []
    for part in gan.parts().values():
        content = part.state_dict()
        parts = [content, *content["state"].values()] if "state" in content else [content]
        kept += [
            value.clone() for part in parts for value in part.values() if torch.is_tensor(value)
        ]
    return kept


def take_steps(gan: DCGAN, step: Step, sizes: list[int]) -> list[torch.Tensor]:
    """Take a step with each of some batches; return all figures, and all that has changed."""
    figures = []
    with dcgan_mnist.seeded(0, gan.device):
        for i, size in enumerate(sizes, start=1):
            real, z = batch(size)
            noise = torch.cat([z] * gan.settings.generator_steps)
            figures.append(step(real.to(gan.device) / i, noise.to(gan.device) / i).clone())
        return [*figures, *state(gan), torch.rand(3, device=gan.device)]


CHANGES = ["nothing", "another network", "dropout", "spectral_norm", "a run that goes on"]


def add_network(gan: DCGAN) -> None:
    """Let a network more be trained in each step, with an optimiser of its own."""
    parts = gan.parts()
    network = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(network.parameters())

    def train(*_: object) -> None:
        optimizer.zero_grad()
        network(torch.ones(1, 2)).square().sum().backward()
        optimizer.step()

    gan.optimizer_d.register_step_post_hook(train)
    gan.parts = lambda: parts | {"network": network, "optimizer": optimizer}


def change_gan(gan: DCGAN, change: str) -> None:
    """Make one of the CHANGES, of which a graph must not lose anything."""
    with dcgan_mnist.seeded(0, gan.device):
        if change == "dropout":
            gan.generator.layers.insert(3, nn.Dropout(0.2))
            gan.discriminator.layers.insert(2, nn.Dropout(0.2))
        elif change == "spectral_norm":
            spectral_norm(gan.discriminator.layers[2])
        elif change == "another network":
            add_network(gan)
        elif change == "a run that goes on":
            take_steps(gan, partial(training_step, gan), [20, 7])


@pytest.mark.few(4)
@pytest.mark.parametrize("generator_steps", [1, 2])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("sizes", [SIZES, SIZES[2:], SIZES[:2]])
def test_graphed_steps_give_what_plain_steps_give(
    monkeypatch: pytest.MonkeyPatch, sizes: list[int], change: str, generator_steps: int
):
    results = []
    for graphed in (False, True):
        gan = new_gan(batch_size=20, generator_steps=generator_steps)
        change_gan(gan, change)
        if graphed:
            gpu = FakeGPU(monkeypatch)
        step = step_of_a_gpu(gan) if graphed else partial(training_step, gan)
        results.append(take_steps(gan, step, sizes))
    assert same(*results)
    assert gpu.events == events_of(sizes, has_begun=change == "a run that goes on")


@pytest.mark.parametrize("kind", [torch.optim.NAdam, torch.optim.Rprop, torch.optim.SGD])
def test_a_graph_changes_nothing_for_optimisers_that_do_not_start_from_zero(
    monkeypatch: pytest.MonkeyPatch, kind: type[torch.optim.Optimizer]
):
    results = []
    for graphed in (False, True):
        gan = new_gan(batch_size=20)
        gan.optimizer_g = kind(gan.generator.parameters(), lr=0.002)
        gan.optimizer_d = kind(gan.discriminator.parameters(), lr=0.002)
        if graphed:
            gpu = FakeGPU(monkeypatch)
        step = step_of_a_gpu(gan) if graphed else partial(training_step, gan)
        results.append(take_steps(gan, step, SIZES))
    assert same(*results)
    assert gpu.events[-1] == ("replay", 20)


def test_a_graph_is_of_full_batches_and_the_last_one_of_an_epoch_is_a_plain_step(
    monkeypatch: pytest.MonkeyPatch,
):
    stream = torch.Generator().manual_seed(0)
    digits = torch.randint(0, 256, (4 * 20 + 7, 28, 28), generator=stream).byte()
    twin = new_gan(batch_size=20, ema=0.5)
    plain = list(train_epochs(twin, partial(training_step, twin), digits, 3, 100))

    gpu = FakeGPU(monkeypatch)
    gan = new_gan(batch_size=20, ema=0.5)
    graphed = list(train_epochs(gan, step_of_a_gpu(gan), digits, 3, 100))
    assert same(graphed, plain)
    assert same(state(gan), state(twin))
    assert gpu.events == events_of([20, 20, 20, 20, 7] * 3)


def test_an_optimiser_is_capturable_only_while_a_graph_is_recorded(
    monkeypatch: pytest.MonkeyPatch,
):
    gpu = FakeGPU(monkeypatch)
    gan = new_gan(batch_size=20)
    seen = set()

    def step(gan: DCGAN, real: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        groups = [group for optimizer in gan.optimizers() for group in optimizer.param_groups]
        seen.add((gpu.recording is not None, *(group["capturable"] for group in groups)))
        return gpu.step(gan, real, z)

    monkeypatch.setattr(dcgan_mnist, "training_step", step)
    take_steps(gan, step_of_a_gpu(gan), SIZES)
    assert seen == {(False, False, False), (True, True, True)}


def test_graph_off_takes_plain_steps(monkeypatch: pytest.MonkeyPatch):
    gpu = FakeGPU(monkeypatch)
    gan = new_gan(batch_size=20)
    take_steps(gan, step_of_a_gpu(gan, graph=False), SIZES)
    assert gpu.events == [("step", size) for size in SIZES]


REFUSAL = "operation not permitted\nwhen stream is capturing"


@pytest.mark.parametrize("half_way", [False, True])
def test_a_graph_that_cannot_be_recorded_leaves_plain_steps_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], half_way: bool
):
    twin = new_gan(batch_size=20)
    plain = take_steps(twin, partial(training_step, twin), SIZES)
    gpu = FakeGPU(monkeypatch)

    def refuse() -> None:
        raise RuntimeError(REFUSAL)

    if half_way:
        gpu.refusal = RuntimeError(REFUSAL)
    else:
        monkeypatch.setattr(torch.cuda, "CUDAGraph", refuse)
    gan = new_gan(batch_size=20)
    assert same(take_steps(gan, step_of_a_gpu(gan), SIZES), plain)
    assert [event for event in gpu.events if event[0] != "record"] == [
        ("step", SIZES[0]),
        *WARM_UP,
        *[("step", size) for size in SIZES[1:]],
    ]
    printed = capsys.readouterr().out
    reason = "operation not permitted"
    assert printed == f"warning: no CUDA graph, so steps take longer: {reason}\n"


def test_a_graph_that_does_not_fit_in_memory_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    gpu = FakeGPU(monkeypatch)
    gpu.refusal = torch.OutOfMemoryError("CUDA out of memory")
    gan = new_gan(batch_size=20)
    with pytest.raises(torch.OutOfMemoryError):
        take_steps(gan, step_of_a_gpu(gan), SIZES)
    assert gpu.events == [("step", 20), *RECORDING]
    assert capsys.readouterr().out == ""


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_cuda_graph_gives_what_plain_steps_give_to_the_bit(
    capsys: pytest.CaptureFixture[str], change: str, precision: str
):
    device = torch.device("cuda", 0)
    sizes = {"width": 32, "latent_dim": 8, "batch_size": 20, "generator_steps": 2}
    results = []
    with dcgan_mnist.computing_on(device):
        for graph in (False, True):
            gan = DCGAN(Settings(precision=precision, **sizes), device)
            change_gan(gan, change)
            results.append(take_steps(gan, fastest_step(gan, graph), SIZES))
    assert same(*results)
    assert capsys.readouterr().out == ""  # no warning: it was a graph indeed


@needs_gpu
def test_on_a_gpu_a_run_that_is_interrupted_ends_like_one_that_is_not_to_the_bit(run):
    new = ("--batch-size", 25, "--recipe", "tuned", "--device", "cuda")
    more = ("--resume", "--epochs", 3, "--device", "cuda")
    assert run(*new, "--epochs", 3, "--output-dir", "whole").code == 0
    assert run(*new, "--epochs", 3, "--graph", "off", "--output-dir", "plain").code == 0
    assert run(*new, "--epochs", 1).code == 0
    assert run(*more).code == 0
    assert run(*new, "--epochs", 2, "--graph", "off", "--output-dir", "mixed").code == 0
    assert run(*more, "--output-dir", "mixed").code == 0
    for path in Path().glob("*/*.pt"):  # so that they can be compared
        torch.save(torch.load(path, map_location="cpu", weights_only=True), path)
    for folder in ("plain", "result", "mixed"):
        assert_same_run(folder, "whole")


# ------------------------- this process in the place of one of several ----------------------------
class FakeConnection:
    """Stands in for the connection of two processes; nothing goes over it."""

    def __init__(self) -> None:
        self.state = "none"

    def connect(self, backend: str, **_: object) -> None:
        assert self.state == "none"
        self.state = "open"

    def disconnect(self) -> None:
        assert self.state == "open"
        self.state = "closed"


@pytest.fixture
def connection(monkeypatch: pytest.MonkeyPatch) -> FakeConnection:
    """Let this process take itself for the first of two; the second one is not there."""
    connection = FakeConnection()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a run")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29500")
    store = SimpleNamespace(set_timeout=lambda _: None)
    monkeypatch.setattr(distributed, "rendezvous", lambda *_, **__: iter([(store, 0, 2)]))
    monkeypatch.setattr(distributed, "init_process_group", connection.connect)
    monkeypatch.setattr(distributed, "destroy_process_group", connection.disconnect)
    monkeypatch.setattr(distributed, "broadcast_object_list", lambda _: None)
    monkeypatch.setattr(distributed, "all_reduce", lambda _: None)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "get_rank", lambda: int(os.environ["RANK"]))
    return connection


@pytest.fixture
def second_of_two(connection: FakeConnection, monkeypatch: pytest.MonkeyPatch) -> FakeConnection:
    """Let this process take itself for the second of two, and be told what to train on."""

    def receive(values: list) -> None:
        settings = Settings(batch_size=20, width=4, latent_dim=8)
        digits = torch.zeros(60, 28, 28, dtype=torch.uint8)
        values[0] = (settings, 1, digits, "a file", None, None)

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(distributed, "broadcast_object_list", receive)
    return connection


@pytest.mark.parametrize(
    ("argv", "code", "state"),
    [
        (["--epochs", 1], 0, "closed"),
        (["--dry-run"], 0, "closed"),
        (["--generate", 3], 0, "none"),
        (["--epochs", "none"], 2, "none"),
    ],
)
def test_only_the_first_process_prints_and_writes(
    run, second_of_two: FakeConnection, argv: list[object], code: int, state: str
):
    Path("result").mkdir()
    Path("result/timeline.png").write_bytes(b"of the first process")
    outcome = run(*argv)
    assert (outcome.code, outcome.out, outcome.err) == (code, "", "")
    assert contents(".") == {"result/timeline.png": b"of the first process"}
    assert second_of_two.state == state


def test_a_signal_ends_another_process_at_once_for_the_first_one_speaks_for_it(
    second_of_two: FakeConnection,
):
    with dcgan_mnist.own_process():
        for signum in (signal.SIGINT, signal.SIGTERM):
            assert signal.getsignal(signum) == signal.SIG_DFL


def test_another_process_says_what_stops_it_alone(
    run, second_of_two: FakeConnection, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    outcome = run(*THREE_STEPS, "--device", "cuda")
    assert outcome.is_one_line(1, "process 1: error: there is no GPU number 1")
    assert second_of_two.state == "none"


def test_a_shared_run_that_ends_well_disconnects(run, connection: FakeConnection):
    assert run(*THREE_STEPS, "--epochs", 1).code == 0
    assert saved()["epoch"] == 1
    assert connection.state == "closed"


@pytest.mark.parametrize(("count", "size"), [(60, 15), (61, 20)])
def test_a_batch_that_cannot_be_shared_is_refused(
    run, connection: FakeConnection, data_dir: Path, count: int, size: int
):
    write_split(data_dir, count)
    outcome = run("--batch-size", size, "--epochs", 1)
    assert outcome.is_one_line(2, "--batch-size", "2 processes")
    assert not Path("result").exists()
    assert connection.state == "closed"


@pytest.mark.parametrize("fault", [RuntimeError, ValueError])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_fault_of_the_program_keeps_its_traceback_and_disconnects(
    run,
    second_of_two: FakeConnection,
    monkeypatch: pytest.MonkeyPatch,
    fault: type[Exception],
    rank: int,
):
    def fail(step: int, stats: torch.Tensor) -> torch.Tensor:
        raise fault("a fault of the program")

    monkeypatch.setenv("RANK", str(rank))
    change_steps(monkeypatch, fail)
    with pytest.raises(fault, match="a fault of the program"):
        run(*THREE_STEPS, "--epochs", 1)
    assert second_of_two.state == "closed"


def test_ctrl_c_disconnects(run, connection: FakeConnection, monkeypatch: pytest.MonkeyPatch):
    def interrupt(step: int, stats: torch.Tensor) -> torch.Tensor:
        if step == 5:
            signal.raise_signal(signal.SIGINT)
        return stats

    change_steps(monkeypatch, interrupt)
    outcome = run(*THREE_STEPS)
    assert outcome.is_one_line(130, "stopped: epoch 1 is saved", "--resume")
    assert connection.state == "closed"


LOST = "a process of this run has ended"
GO_ON = "use --resume to continue"


@pytest.mark.parametrize(("device", "state"), [("cpu", "closed"), ("cuda", "open")])
def test_after_a_failure_nccl_is_left_for_it_would_wait_for_the_others(
    connection: FakeConnection, device: str, state: str
):
    with pytest.raises(KeyboardInterrupt), dcgan_mnist.connected(torch.device(device)):
        raise KeyboardInterrupt
    assert connection.state == state


def test_after_success_both_backends_are_closed(connection: FakeConnection):
    for device in ("cpu", "cuda"):
        connection.state = "none"
        with dcgan_mnist.connected(torch.device(device)):
            pass
        assert connection.state == "closed"


@pytest.mark.parametrize("name", ["broadcast_object_list", "all_reduce"])
def test_a_lost_process_is_said_in_one_line(
    run, connection: FakeConnection, monkeypatch: pytest.MonkeyPatch, name: str
):
    def fail(_: object) -> None:  # as gloo does
        raise RuntimeError("Connection closed by peer\n[127.0.0.1]:29500")

    monkeypatch.setattr(distributed, name, fail)
    outcome = run(*THREE_STEPS, "--epochs", 1)
    reason = "(Connection closed by peer [127.0.0.1]:29500)"
    assert outcome.is_one_line(1, f"error: {LOST} {reason}; {GO_ON}")
    assert connection.state == "closed"


def test_a_process_that_is_found_lost_outside_the_communication_is_said_too(
    run, connection: FakeConnection, monkeypatch: pytest.MonkeyPatch
):
    def fail(step: int, stats: torch.Tensor) -> torch.Tensor:  # as NCCL can at any moment
        raise distributed.DistBackendError("NCCL watchdog: remote process exited")

    change_steps(monkeypatch, fail)
    assert run(*THREE_STEPS, "--epochs", 1).is_one_line(1, f"error: {LOST}", "NCCL", GO_ON)
    assert connection.state == "closed"


@pytest.mark.parametrize("fault", [distributed.DistNetworkError, RuntimeError, ValueError])
@pytest.mark.parametrize("rank", [0, 1])
def test_each_process_that_cannot_connect_ends_with_one_line(
    run,
    connection: FakeConnection,
    monkeypatch: pytest.MonkeyPatch,
    fault: type[Exception],
    rank: int,
):
    monkeypatch.setenv("RANK", str(rank))
    error = fault("the server is not there\n[127.0.0.1]:29500")
    monkeypatch.setattr(distributed, "init_process_group", raising(error))
    outcome = run(*THREE_STEPS, "--epochs", 1)
    reason = "(the server is not there [127.0.0.1]:29500)"
    assert outcome.is_one_line(1, "error: ", f"cannot connect {reason}")
    assert ("process 1: " in outcome.err) == (rank == 1)
    assert connection.state == "none"
    assert not Path("result").exists()


def gradients_of(network: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return a list that gets the gradients with which an optimiser changes a network."""
    gradients: list[torch.Tensor] = []

    def look(*_: object) -> None:
        gradients.extend(parameter.grad.clone() for parameter in network.parameters())

    optimizer.register_step_pre_hook(look)
    return gradients


def test_gradients_and_figures_are_means_over_the_processes(
    connection: FakeConnection, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(distributed, "all_reduce", lambda tensor: tensor.add_(3))
    real, z = batch(6)
    gan = new_gan()
    shared = gradients_of(gan.discriminator, gan.optimizer_d)
    stats = SharedStep(gan)(real, z)

    twin = new_gan()
    single = gradients_of(twin.discriminator, twin.optimizer_d)
    figures = training_step(twin, real[:3], z[:3])
    for mean, own in zip(shared, single, strict=True):
        torch.testing.assert_close(mean, (own + 3) / 2)
    torch.testing.assert_close(stats[0], (figures[0] + 3) / 2)


def test_a_process_takes_its_share_of_the_noise_of_every_generator_step(
    connection: FakeConnection, monkeypatch: pytest.MonkeyPatch
):
    shares = []

    def step(gan: DCGAN, real: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        shares.append((real, z))
        return torch.ones(5)

    monkeypatch.setattr(dcgan_mnist, "training_step", step)
    real, z = batch(14)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        SharedStep(new_gan(generator_steps=2))(real[:7], z)
    (real_0, z_0), (real_1, z_1) = shares
    assert torch.equal(torch.cat([real_0, real_1]), real[:7])
    assert torch.equal(torch.cat([z_0[:4], z_1[:3], z_0[4:], z_1[3:]]), z)


def test_random_layers_draw_other_numbers_in_each_process_and_in_each_step(
    connection: FakeConnection, monkeypatch: pytest.MonkeyPatch
):
    drawn = []

    def step(*_: object) -> torch.Tensor:
        drawn.append(torch.rand(3).tolist())
        return torch.zeros(5)

    monkeypatch.setattr(dcgan_mnist, "training_step", step)
    for rank in ("0", "1", "1"):
        monkeypatch.setenv("RANK", rank)
        with dcgan_mnist.seeded(0, torch.device("cpu")):
            shared = SharedStep(new_gan())
            shared(*batch(4))
            shared(*batch(4))
    assert len({tuple(numbers) for numbers in drawn}) == 4
    assert drawn[2:4] == drawn[4:6]


def test_on_gpus_batchnorm_sees_the_whole_batch_and_checkpoints_stay_the_same(
    connection: FakeConnection,
):
    gan = new_gan()
    before = gan.generator.state_dict()
    gan.device = torch.device("cuda")
    fastest_step(gan)
    for network in (gan.generator, gan.discriminator):
        norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert norms
        assert all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    # only the first process draws with it
    assert not any(isinstance(layer, nn.SyncBatchNorm) for layer in gan.average.modules())
    gan.average.load_state_dict(gan.generator.state_dict())
    assert same(list(gan.average.state_dict().values()), list(before.values()))
    optimised = gan.optimizer_g.param_groups[0]["params"]
    assert {id(p) for p in gan.generator.parameters()} == {id(p) for p in optimised}


# -------------------------------------------- torchrun --------------------------------------------
needs_posix = pytest.mark.skipif(os.name != "posix", reason="needs signals that Windows lacks")


def kill_all(process: subprocess.Popen, folder: Path) -> None:
    """Kill torchrun, if it has not ended, and the processes that it has started."""
    if process.poll() is not None:
        return
    for path in folder.glob("pid_*"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(path.read_text()), signal.SIGKILL)
    process.kill()


@contextlib.contextmanager
def torchrun(folder: Path, *options: object) -> Iterator[subprocess.Popen]:
    """Start the program in two processes on the digits of the data_dir fixture."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [ROOT / "tests" / "shared_program.py", "--device", "cpu"]
    command += ["--data-dir", folder.parent / "data", *options]
    if "--resume" not in options:
        command += [*SMALL, *THREE_STEPS]
    with subprocess.Popen(
        [str(part) for part in command],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        timer = threading.Timer(120, kill_all, (process, folder))  # a test must not hang
        timer.start()
        try:
            yield process
        finally:
            timer.cancel()
            kill_all(process, folder)


@pytest.mark.slow
@needs_posix
def test_two_processes_go_on_with_the_run_of_one_share_every_batch_and_stay_the_same(
    run, monkeypatch: pytest.MonkeyPatch
):
    run(*THREE_STEPS, "--epochs", 1)
    shutil.copytree("result", "alone")
    with torchrun(Path.cwd(), "--epochs", 3, "--resume") as process:
        out, err = process.communicate()
    assert process.returncode == 0, err
    assert re.findall(r"^Epoch .*", out, re.MULTILINE) == ["Epoch 2/3", "Epoch 3/3"]
    assert out.count("saved to result") == 2
    assert set(contents("result")) == RUN_FILES | {"generated_epoch_003.png"}

    first = torch.load("seen_0.pt", weights_only=True)
    second = torch.load("seen_1.pt", weights_only=True)
    assert same(first["weights"], second["weights"])

    alone = []

    def spy(gan: DCGAN, real: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        alone.append((real, z))
        return training_step(gan, real, z)

    monkeypatch.setattr(dcgan_mnist, "training_step", spy)
    run("--resume", "--epochs", 3, "--output-dir", "alone")
    assert len(alone) == len(first["z"]) == len(second["z"]) == 6
    for i, (real, z) in enumerate(alone):
        assert torch.equal(torch.cat([first["real"][i], second["real"][i]]), real)
        assert torch.equal(torch.cat([first["z"][i], second["z"][i]]), z)
        assert len(first["z"][i]) == len(second["z"][i]) == 10

    outcome = run("--resume", "--epochs", 4)
    assert (outcome.code, outcome.err) == (0, "")
    assert saved()["epoch"] == 4


@pytest.mark.slow
@needs_posix
def test_a_killed_process_ends_the_job_and_resume_goes_on(run):
    with torchrun(Path.cwd(), "--epochs", 100_000) as process:
        for line in process.stdout:
            if "Epoch 3/" in line:
                break
        process.send_signal(signal.SIGSTOP)  # or torchrun may stop the other one before it notices
        os.kill(int(Path("pid_1").read_text()), signal.SIGKILL)
        err = ""
        while "dcgan_mnist.py: " not in err:
            line = process.stderr.readline()
            assert line, err
            err += line
        process.send_signal(signal.SIGCONT)
        err += process.communicate(timeout=30)[1]
    assert process.returncode != 0
    assert err.count("dcgan_mnist.py: ") == 1
    assert f"dcgan_mnist.py: error: {LOST}" in err
    epoch = saved()["epoch"]
    assert epoch >= 2
    assert not list(Path("result").glob(".*"))
    outcome = run("--resume", "--epochs", epoch + 1)
    assert (outcome.code, outcome.err) == (0, "")
    assert saved()["epoch"] == epoch + 1


@needs_posix
@pytest.mark.slow
def test_ctrl_c_ends_all_processes_with_one_line_that_says_how_to_go_on(run):
    with torchrun(Path.cwd(), "--epochs", 100_000) as process:
        for line in process.stdout:
            if "Epoch 3/" in line:
                break
        for path in Path.cwd().glob("pid_*"):  # a terminal sends it to all
            os.kill(int(path.read_text()), signal.SIGINT)
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=60)[1]
    assert process.returncode != 0
    said = re.findall(r"^dcgan_mnist.py: .*", err, re.MULTILINE)
    assert len(said) == 1, err
    assert re.match(r"dcgan_mnist.py: stopped: epoch \d+ is saved; .* --resume", said[0])
    epoch = saved()["epoch"]
    assert epoch >= 2
    assert f"epoch {epoch} is saved" in said[0]

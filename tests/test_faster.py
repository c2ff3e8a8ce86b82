"""The same step with convolutions as products, as a CUDA graph, and shared by several processes."""

import contextlib
import copy
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import (
    ROOT,
    RUN_FILES,
    THREE_STEPS,
    batch,
    change_steps,
    contents,
    new_gan,
    parameters,
    same,
    saved,
    write_split,
)
from torch import distributed, nn

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


# ------------------------------------ convolutions as products ------------------------------------
INPUTS = {dcgan_mnist.Generator: (100, 1, 1), dcgan_mnist.Discriminator: (1, 28, 28)}


def gradients(network: nn.Module, inputs: torch.Tensor) -> list[torch.Tensor]:
    """Return what a network makes of its inputs, and the gradients of both of them and weights."""
    inputs = inputs.clone().requires_grad_()
    outputs = network.layers(inputs)
    outputs.square().sum().backward()
    return [outputs, inputs.grad, *(parameter.grad for parameter in network.parameters())]


def plain_and_products(kind: type[nn.Module]) -> tuple[nn.Module, nn.Module]:
    """Return two networks with the same weights, the second one with products."""
    with dcgan_mnist.seeded(0):
        plain = kind(width=4).apply(dcgan_mnist.weights_init)
    plain.to(memory_format=torch.channels_last)
    products = copy.deepcopy(plain)
    dcgan_mnist.use_products(products)
    return plain, products


@pytest.mark.parametrize("kind", INPUTS)
def test_products_give_what_convolutions_give(kind: type[nn.Module]):
    plain, products = plain_and_products(kind)
    inputs = torch.randn(3, *INPUTS[kind], generator=random_stream(seed=0, stream=0)).double()
    for expected, found in zip(
        gradients(plain.double(), inputs), gradients(products.double(), inputs), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", INPUTS)
def test_products_in_bf16_are_as_exact_as_convolutions_in_bf16(kind: type[nn.Module]):
    plain, products = plain_and_products(kind)
    inputs = torch.randn(20, *INPUTS[kind], generator=random_stream(seed=0, stream=0))
    exact = gradients(copy.deepcopy(plain).double(), inputs.double())
    with torch.autocast("cpu", torch.bfloat16):
        of_plain = gradients(plain, inputs)
        of_products = gradients(products, inputs)
    for value, a, b in zip(exact, of_plain, of_products, strict=True):
        assert b.dtype == a.dtype
        if value.dim() == 4:  # the rest has hardly a gradient, because BatchNorm follows
            assert torch.dist(b.double(), value) < 2 * torch.dist(a.double(), value)


def test_a_product_in_bf16_stays_in_bf16():
    _, products = plain_and_products(dcgan_mnist.Generator)
    with torch.autocast("cpu", torch.bfloat16):
        assert products.layers[0](torch.randn(20, 100, 1, 1)).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", INPUTS)
def test_products_keep_the_names_and_values_of_the_weights(kind: type[nn.Module]):
    plain, products = plain_and_products(kind)
    assert list(products.state_dict()) == list(plain.state_dict())
    assert same(list(products.state_dict().values()), list(plain.state_dict().values()))


def test_a_cpu_trains_with_products_and_a_gpu_does_not():
    gan = new_gan()
    step_of_a_gpu(gan)
    layers = [*gan.generator.layers, *gan.discriminator.layers]
    assert sum(isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)) for layer in layers) == 8
    fastest_step(gan)
    layers = [*gan.generator.layers, *gan.discriminator.layers]
    assert sum(isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)) for layer in layers) == 4


# ------------------------------------------ CUDA graphs -------------------------------------------
class FakeGPU:
    """Lets the CPU record CUDA graphs; ``events`` tells what became of batches of which size."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, int]] = []
        self.recording: FakeGraph | None = None
        self.refuses = False  # half way through a recording
        monkeypatch.setattr(dcgan_mnist, "training_step", self.step)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: FakeGraph(self.events))
        monkeypatch.setattr(torch.cuda, "graph", self.record)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)

    def step(self, gan: DCGAN, real: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Take a training step; while a graph is recorded, compute nothing."""
        if self.recording is None:
            self.events.append(("step", len(real)))
            return training_step(gan, real, z)
        self.events.append(("record", len(real)))
        if self.refuses:
            gan.discriminator.requires_grad_(False)
            gan.optimizer_g.zero_grad()
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
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


def step_of_a_gpu(gan: DCGAN) -> Step:
    """Return the way in which a GPU takes training steps."""
    device = gan.device
    gan.device = torch.device("cuda")
    step = fastest_step(gan)
    gan.device = device
    return step


def take_steps(gan: DCGAN, step: Step) -> list[torch.Tensor]:
    """Take a step with each of some batches; return all figures, then all weights."""
    figures = []
    for i, size in enumerate([20, 20, 7, 20, 20, 20, 7, 20], start=1):
        real, z = (part.to(gan.device) for part in batch(size))
        figures.append(step(real / i, z / i).clone())
    return figures + parameters(gan.generator) + parameters(gan.discriminator)


def plain_steps() -> list[torch.Tensor]:
    """Return what ``take_steps`` comes to without a graph."""
    gan = new_gan(batch_size=20)
    return take_steps(gan, partial(training_step, gan))


def test_graphed_steps_give_what_plain_steps_give(monkeypatch: pytest.MonkeyPatch):
    plain = plain_steps()
    gpu = FakeGPU(monkeypatch)
    gan = new_gan(batch_size=20)
    assert same(take_steps(gan, step_of_a_gpu(gan)), plain)
    assert gpu.events[-2:] == [("step", 7), ("replay", 20)]


def test_a_graph_is_of_a_full_batch_also_if_the_fourth_ends_an_epoch(
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
    assert same(parameters(gan.average), parameters(twin.average))
    assert [size for event, size in gpu.events if event == "record"] == [20]
    end_of_an_epoch = [("replay", 20), ("step", 7)]
    a_whole_epoch = [("replay", 20)] * 3 + end_of_an_epoch
    after = gpu.events.index(("record", 20)) + 1
    assert gpu.events[after:] == end_of_an_epoch + a_whole_epoch + a_whole_epoch


@pytest.mark.parametrize("half_way", [False, True])
def test_a_graph_that_cannot_be_recorded_leaves_plain_steps_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], half_way: bool
):
    plain = plain_steps()
    gpu = FakeGPU(monkeypatch)

    def refuse() -> None:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    if half_way:
        gpu.refuses = True
    else:
        monkeypatch.setattr(torch.cuda, "CUDAGraph", refuse)
    gan = new_gan(batch_size=20)
    assert same(take_steps(gan, step_of_a_gpu(gan)), plain)
    printed = capsys.readouterr().out
    reason = "operation not permitted"
    assert printed == f"warning: no CUDA graph, so steps take longer: {reason}\n"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_cuda_graph_gives_what_plain_steps_give():
    settings = Settings(batch_size=20)
    results = []
    with torch.cuda.stream(torch.cuda.Stream()):
        for graphed in (False, True):
            gan = DCGAN(settings, torch.device("cuda"))
            step = fastest_step(gan) if graphed else partial(training_step, gan)
            results.append(take_steps(gan, step))
    for plain, graphed in zip(*results, strict=True):
        torch.testing.assert_close(graphed, plain, rtol=1e-3, atol=1e-4)


# ------------------------- this process in the place of one of several ----------------------------
class FakeConnection:
    """Stands in for the connection of two processes; nothing goes over it."""

    def __init__(self) -> None:
        self.state = "none"

    def connect(self, backend: str) -> None:
        assert self.state == "none"
        self.state = "open"

    def disconnect(self) -> None:
        assert self.state == "open"
        self.state = "closed"


@pytest.fixture
def connection(monkeypatch: pytest.MonkeyPatch) -> FakeConnection:
    """Let this process take itself for the first of two; the second one is not there."""
    connection = FakeConnection()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setattr(distributed, "init_process_group", connection.connect)
    monkeypatch.setattr(distributed, "destroy_process_group", connection.disconnect)
    monkeypatch.setattr(distributed, "broadcast_object_list", lambda _: None)
    monkeypatch.setattr(distributed, "all_reduce", lambda _: None)
    return connection


@pytest.fixture
def second_of_two(connection: FakeConnection, monkeypatch: pytest.MonkeyPatch) -> FakeConnection:
    """Let this process take itself for the second of two, and be told what to train on."""

    def receive(values: list) -> None:
        values[0] = (Settings(batch_size=20), torch.zeros(60, 28, 28, dtype=torch.uint8), 1, None)

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


LOST = "a process of this run has ended; use --resume to continue"


@pytest.mark.parametrize("name", ["broadcast_object_list", "all_reduce"])
def test_a_lost_process_is_said_in_one_line(
    run, connection: FakeConnection, monkeypatch: pytest.MonkeyPatch, name: str
):
    def fail(_: object) -> None:  # as gloo does
        raise RuntimeError("Connection closed by peer\n[127.0.0.1]:29500")

    monkeypatch.setattr(distributed, name, fail)
    outcome = run(*THREE_STEPS, "--epochs", 1)
    assert outcome.is_one_line(1, f"error: {LOST} (Connection closed by peer [127.0.0.1]:29500)")
    assert connection.state == "closed"


def test_a_process_that_is_found_lost_outside_the_communication_is_said_too(
    run, connection: FakeConnection, monkeypatch: pytest.MonkeyPatch
):
    def fail(step: int, stats: torch.Tensor) -> torch.Tensor:  # as NCCL can at any moment
        raise distributed.DistBackendError("NCCL watchdog: remote process exited")

    change_steps(monkeypatch, fail)
    assert run(*THREE_STEPS, "--epochs", 1).is_one_line(1, f"error: {LOST}", "NCCL")
    assert connection.state == "closed"


@pytest.mark.parametrize("fault", [distributed.DistNetworkError, ValueError])
def test_processes_that_cannot_connect_end_with_one_line(
    run, connection: FakeConnection, monkeypatch: pytest.MonkeyPatch, fault: type[Exception]
):
    def fail(_: object) -> None:
        raise fault("the server is not there")

    monkeypatch.setattr(distributed, "init_process_group", fail)
    outcome = run(*THREE_STEPS, "--epochs", 1)
    assert outcome.is_one_line(1, "error: ", "cannot connect", "the server is not there")
    assert connection.state == "none"
    assert not Path("result").exists()


def gradients_of(network: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return a list that gets the gradients with which an optimiser changes a network."""
    gradients: list[torch.Tensor] = []

    def look(*_: object) -> None:
        gradients.extend(parameter.grad.clone() for parameter in network.parameters())

    optimizer.register_step_pre_hook(look)
    return gradients


def test_gradients_and_figures_are_means_over_the_processes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(distributed, "all_reduce", lambda tensor: tensor.add_(3))
    real, z = batch(6)
    gan = new_gan()
    shared = gradients_of(gan.discriminator, gan.optimizer_d)
    stats = SharedStep(gan, Processes(rank=0, count=2))(real, z)

    twin = new_gan()
    single = gradients_of(twin.discriminator, twin.optimizer_d)
    figures = training_step(twin, real[:3], z[:3])
    for mean, own in zip(shared, single, strict=True):
        torch.testing.assert_close(mean, (own + 3) / 2)
    torch.testing.assert_close(stats[0], (figures[0] + 3) / 2)


def test_a_process_takes_its_share_of_the_noise_of_every_generator_step(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(distributed, "all_reduce", lambda _: None)
    shares = []

    def step(gan: DCGAN, real: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        shares.append((real, z))
        return torch.ones(5)

    monkeypatch.setattr(dcgan_mnist, "training_step", step)
    real, z = batch(14)
    for rank in (0, 1):
        SharedStep(new_gan(generator_steps=2), Processes(rank, count=2))(real[:7], z)
    (real_0, z_0), (real_1, z_1) = shares
    assert torch.equal(torch.cat([real_0, real_1]), real[:7])
    assert torch.equal(torch.cat([z_0[:4], z_1[:3], z_0[4:], z_1[3:]]), z)


def test_on_gpus_batchnorm_sees_the_whole_batch_and_checkpoints_stay_the_same():
    gan = new_gan()
    before = gan.generator.state_dict()
    gan.device = torch.device("cuda")
    fastest_step(gan, Processes(rank=0, count=2))
    for network in (gan.generator, gan.discriminator):
        norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert norms
        assert all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
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
    """Start the small program in two processes on the digits of the data_dir fixture."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [ROOT / "tests" / "shared_program.py", *THREE_STEPS, "--device", "cpu"]
    command += ["--data-dir", folder.parent / "data", *options]
    with subprocess.Popen(
        [str(part) for part in command],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        timer = threading.Timer(60, kill_all, (process, folder))  # a test must not hang
        timer.start()
        try:
            yield process
        finally:
            timer.cancel()
            kill_all(process, folder)


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

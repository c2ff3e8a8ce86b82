"""The program in a notebook: README's lines in a real kernel, and interrupting a cell."""

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT, SMALL, write_split

WHY = "it is a part of notebooks"
pytest.importorskip("ipykernel", reason=WHY)
jupyter_client = pytest.importorskip("jupyter_client", reason=WHY)
nbclient = pytest.importorskip("nbclient", reason=WHY)
nbformat = pytest.importorskip("nbformat", reason=WHY)

pytestmark = pytest.mark.slow
Kernel = tuple[jupyter_client.KernelManager, jupyter_client.BlockingKernelClient]

README = (ROOT / "README.md").read_text(encoding="utf-8")
CELLS = re.search(r"^    import dcgan_mnist\n(?:    .+\n)+", README, re.MULTILINE)[0]
TRAINING, PICTURE = re.split(r"^(?=    from PIL)", CELLS, flags=re.MULTILINE)


@pytest.fixture
def flags(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What differs from a user's notebook: small networks, few digits, and no scores of these.

    The kernel finds the program from any folder.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return [*SMALL, "--data-dir", str(data_dir), "--device", "cpu"]


def test_a_notebook_shows_bar_log_and_timeline(flags: list[str], data_dir: Path, tmp_path: Path):
    write_split(data_dir, 100)
    cells = [textwrap.dedent(cell) for cell in (TRAINING, PICTURE)]
    cells[0] = cells[0].replace('"2"]', f'"2", *{flags}]')
    assert str(flags) in cells[0]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(
        notebook, timeout=120, resources={"metadata": {"path": tmp_path}}
    ).execute()
    training, picture = (cell.outputs for cell in notebook.cells)

    *streams, result = training
    assert {stream.name for stream in streams} == {"stdout"}
    text = "".join(stream.text for stream in streams)
    for epoch in ("Epoch 1/2", "Epoch 2/2"):
        assert re.search(rf"\r{epoch}: +\d+%\|.*\| \d/2 \[.*step.*\]", text)
    assert text.count("(1/2) ds_loss: ") == 2
    assert result.data["text/plain"] == "0"
    (shown,) = picture
    assert shown.data["image/png"]


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Kernel]:
    """A kernel that runs in an empty folder, and what talks to it."""
    manager, client = jupyter_client.manager.start_new_kernel(cwd=tmp_path)
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def run_and_interrupt(
    kernel: Kernel,
    cell: str,
    when: str,
) -> tuple[dict[str, str], list[str]]:
    """Run a cell and interrupt it when it prints something.

    Return what it prints to each stream, and the names of the errors with which it ends.
    """
    manager, client = kernel
    client.execute(cell)
    printed = {"stdout": "", "stderr": ""}
    errors = []
    interrupted = False
    while True:
        message = client.get_iopub_msg(timeout=60)
        content = message["content"]
        if message["msg_type"] == "stream":
            printed[content["name"]] += content["text"]
        elif message["msg_type"] == "error":
            errors.append(content["ename"])
        elif content.get("execution_state") == "idle" and (interrupted or errors):
            return printed, errors
        if when in printed["stdout"] and not interrupted:
            interrupted = True
            manager.interrupt_kernel()


def test_interrupting_a_cell_gives_one_line_and_the_kernels_own_interrupt_works_after_it(
    flags: list[str],
    kernel: Kernel,
):
    options = ["--epochs", "100000", "--batch-size", "10", *flags]
    training = f"import dcgan_mnist\nprint(dcgan_mnist.main({options}))"
    printed, errors = run_and_interrupt(kernel, training, when="Epoch 3/")
    assert errors == []
    assert printed["stdout"].endswith("130\n")
    assert re.fullmatch(
        r"dcgan_mnist.py: stopped: epoch \d+ is saved; to continue, .* --resume\n",
        printed["stderr"],
    )
    _, errors = run_and_interrupt(kernel, "print('waiting')\nwhile True: pass", "waiting")
    assert errors == ["KeyboardInterrupt"]

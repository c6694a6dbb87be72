"""The engine that both analyses share: its accuracy in float32, and its work shared out over ranks."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_convergence import PLANTED_STEPS, TABLES, edit_script, place, plant
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import GPTNeoXModel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import token_convergence_analysis as script  # noqa: E402

WORDS = ["a", "the", "there", "therefore", "lighthouse", "unscrupulous", "naïve", "x" * 40, "don't"]


def launch(folder: Path, family: Path, ranks: int, **variables: str) -> subprocess.Popen:
    """Starts the script on its own or under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *torchrun, str(folder / "token_convergence_analysis.py"), str(family)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, env=environment, text=True, **pipes)


def run(folder: Path, family: Path, ranks: int, **variables: str) -> list[bytes]:
    """Runs the script. Returns the tables that it writes."""
    process = launch(folder, family, ranks, **variables)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return [(folder / "convergance_plots" / family.name / name).read_bytes() for name in TABLES]


@pytest.fixture(scope="module")
def planted(miniature: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """A small family, and its words."""
    family = tmp_path_factory.mktemp("ranks") / "planted"
    return family, plant(family, miniature)


@pytest.fixture(scope="module")
def alone(planted: tuple[Path, dict[str, int]], tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """The tables of a run in one process, though something else has set RANK: without torchrun's other variables."""
    family, words = planted
    folder = place(tmp_path_factory.mktemp("alone"), words, BATCH_TOKENS=16)
    tables = run(folder, family, 1, RANK="1")
    assert (folder / "convergance_plots" / "planted" / "half_way.png").is_file()
    return tables


def test_ranks_write_the_same_bytes(planted: tuple[Path, dict[str, int]], alone: list[bytes], tmp_path: Path) -> None:
    family, words = planted
    assert run(place(tmp_path, words, BATCH_TOKENS=16), family, 3) == alone


def test_what_killed_ranks_measured_is_kept(
    planted: tuple[Path, dict[str, int]], alone: list[bytes], tmp_path: Path
) -> None:
    """Two ranks are killed, and two others continue: again the same bytes.

    The first two are started one by one, since torchrun's processes cannot be killed all at once.
    """
    family, words = planted
    folder = place(tmp_path, words, BATCH_TOKENS=16)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1]), "WORLD_SIZE": "2"}
    processes = [launch(folder, family, 1, RANK=rank, **meeting) for rank in ("0", "1")]
    kept = folder / "convergance_plots" / family.name / "kept"
    while not list(kept.glob("step*.npz")):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    for process in processes:
        process.kill()
        process.communicate()
    written = {file: file.stat().st_mtime_ns for file in kept.glob("step*.npz")}
    assert len(written) < len(PLANTED_STEPS)
    assert not list(kept.parent.glob("*.csv"))
    assert run(folder, family, 2) == alone
    assert {file: file.stat().st_mtime_ns for file in written} == written


def test_ranks_that_differ_measure_nothing(planted: tuple[Path, dict[str, int]], tmp_path: Path) -> None:
    """A setting that is another in each rank stands for another version of a file on each machine."""
    family, words = planted
    folder = place(tmp_path, words)
    edit_script(folder, r"(?m)^SEED = 0", 'SEED = int(os.environ["RANK"])')
    process = launch(folder, family, 2)
    out, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    errors = {line for line in out.splitlines() if line.startswith("error: ")}
    assert len(errors) == 1 and "ranks differ" in errors.pop()
    assert "to measure" not in out and not list(folder.rglob("step*.npz"))


@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
def test_float32_is_float32(miniature: Path, tmp_path: Path, activation: str) -> None:
    """The states of the packed trees, through oneDNN where there is one, against float64, one word at a time.

    The activation is Pythia's, which oneDNN applies as it multiplies, or another. The weights are scaled up, so that
    hidden states are of a trained model's size rather than a miniature's.
    """
    folder = tmp_path / "step1"
    folder.mkdir()
    entries = json.loads((miniature / "step32" / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(entries | {"hidden_act": activation}), encoding="utf-8")
    weights = {}
    for name, tensor in script.read_weights(miniature / "step32").items():
        weights[f"gpt_neox.{name}"] = tensor.float() * 1.5
    save_file(weights, folder / "model.safetensors")
    tokenizer = Tokenizer.from_file(str(miniature / "step32" / "tokenizer.json"))
    sequences = script.encode(tokenizer, [" " + word for word in WORDS])
    exact = GPTNeoXModel.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.inference_mode():
        config = script.read_config(folder)
        model = script.build_model(config, torch.device("cpu"))
        trees = script.prefix_trees(sequences, torch.device("cpu"))
        states = torch.empty(config.num_hidden_layers + 1, len(WORDS), config.hidden_size)
        script.read_unit_states(model, [folder], trees, WORDS, states, tqdm(disable=True))
        for text, sequence in enumerate(sequences):
            layers = exact(torch.tensor([sequence]), output_hidden_states=True).hidden_states
            expected = torch.stack([layer[0, -1] for layer in layers])
            expected /= expected.norm(dim=-1, keepdim=True)
            assert (states[:, text] - expected).norm(dim=-1).max() <= 1e-5

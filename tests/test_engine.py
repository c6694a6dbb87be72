"""The engine that both analyses share: its accuracy in float32, and its work shared out over ranks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_convergence import place
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import GPTNeoXModel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import multitoken_context_perturbation as sibling  # noqa: E402
import token_convergence_analysis as script  # noqa: E402

WORDS = ["a", "the", "there", "therefore", "lighthouse", "unscrupulous", "naïve", "x" * 40, "don't"]


def launch(folder: Path, family: Path, ranks: int) -> subprocess.Popen:
    """Starts the script in a process group of its own, on its own or under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *torchrun, str(folder / "token_convergence_analysis.py"), str(family)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, env=environment, start_new_session=True, text=True, **pipes)


def run(folder: Path, family: Path, ranks: int) -> bytes:
    process = launch(folder, family, ranks)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return (folder / "convergance_plots" / family.name / "convergence.csv").read_bytes()


@pytest.fixture(scope="module")
def alone(miniature: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The CSV of a run in one process."""
    return run(place(tmp_path_factory.mktemp("alone"), BATCH_TOKENS=16), miniature, 1)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_write_the_same_bytes(miniature: Path, alone: bytes, tmp_path: Path, ranks: int) -> None:
    assert run(place(tmp_path, BATCH_TOKENS=16), miniature, ranks) == alone


def test_what_killed_ranks_measured_is_kept(miniature: Path, alone: bytes, tmp_path: Path) -> None:
    process = launch(place(tmp_path, BATCH_TOKENS=16), miniature, 2)
    kept = tmp_path / "convergance_plots" / miniature.name / "kept"
    while not (files := list(kept.glob("step*.npz"))):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    written = {file: file.stat().st_mtime_ns for file in files}
    assert len(written) < 7
    assert run(tmp_path, miniature, 1) == alone
    assert {file: file.stat().st_mtime_ns for file in files} == written


@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
def test_float32_is_float32(miniature: Path, tmp_path: Path, activation: str) -> None:
    """The states of the packed trees, through oneDNN where there is one, against float64, one word at a time.

    The activation is Pythia's, which oneDNN applies as it multiplies, or another. The weights are scaled up, so that
    hidden states are of a trained model's size rather than a miniature's.
    """
    folder = tmp_path / "step1"
    folder.mkdir()
    config = json.loads((miniature / "step32" / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": activation}), encoding="utf-8")
    weights = script.read_weights(miniature / "step32")
    save_file(
        {f"gpt_neox.{name}": tensor.float() * 1.5 for name, tensor in weights.items()}, folder / "model.safetensors"
    )
    tokenizer = Tokenizer.from_file(str(miniature / "step32" / "tokenizer.json"))
    sequences = sorted(script.encode(tokenizer, [" " + word for word in WORDS]))
    exact = GPTNeoXModel.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.inference_mode():
        model = script.build_model(folder, torch.device("cpu"))
        trees = script.prefix_trees(sequences, torch.device("cpu"))
        blocks = script.unit_states(model, [folder], trees, WORDS, tqdm(disable=True))
        states = torch.cat([states for _, states in blocks])
        for sequence, own in zip(sequences, states, strict=True):
            layers = exact(torch.tensor([sequence]), output_hidden_states=True).hidden_states
            expected = torch.stack([layer[0, -1] for layer in layers])
            expected /= expected.norm(dim=-1, keepdim=True)
            assert (own - expected).norm(dim=-1).max() <= 1e-5


def test_difference_of_means_is_over_the_words_that_have_both() -> None:
    """The second word has no P2, the third no P1: P1 - P2, which the overview shows, is the first word's alone."""
    P1, P2 = np.array([0.5, 0.9, np.nan]), np.array([0.3, np.nan, 0.7])
    contributions = {"P1": P1, "P2": P2, "unrelated": np.zeros(3)}
    curves = sibling.mean_curves({name: values.reshape(1, 1, 3) for name, values in contributions.items()}, np.ones(3))
    for group in (1, "all"):
        found = [curves[group][name].item() for name in ("P1", "P2", "P1 - P2")]
        assert found == pytest.approx([0.7, 0.5, 0.2])
        assert [curves[group][f"{name}_words"] for name in ("P1", "P2")] == [2, 2]

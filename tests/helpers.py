"""What the tests of both analysis scripts share: runs of a script, families, plain computations."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import csv
import json
import math
import multiprocessing
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from miniature import TOKENIZER_FILE
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PretrainedConfig

ROOT = Path(__file__).resolve().parents[1]
CONVERGENCE = ROOT / "token_convergence_analysis.py"
PERTURBATION = ROOT / "multitoken_context_perturbation.py"
RESULTS = {CONVERGENCE.name: "convergance_plots", PERTURBATION.name: "multitoken_words_plots"}
WORDS, CONTEXTS = "words_list.json", "multitoken_words_contexts.json"
ALL_WORDS = json.loads((ROOT / WORDS).read_text(encoding="utf-8"))
RESAMPLES = 1000

# a new Python imports the libraries for five seconds; processes forked from one that has are ready
os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # where that one finds this file
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["helpers", "transformers.models.gpt_neox.modeling_gpt_neox"])


# ---- a script and its run ------------------------------------------------------------------------


def place(folder: Path, script: Path = CONVERGENCE, inputs=None, **settings: object) -> Path:
    """Copies a script, some constants set anew, and its inputs into a folder; returns the copy.

    inputs: {name: text, or what is written as JSON}, in the place of the project's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    copy, text = folder / script.name, script.read_text(encoding="utf-8")
    for name, value in settings.items():
        before, after = re.split(rf"(?m)^{name} = .*$", text)  # it stands there once
        text = f"{before}{name} = {value!r}{after}"
    copy.write_text(text, encoding="utf-8")
    for name in (WORDS, CONTEXTS):
        content = (inputs or {}).get(name, (ROOT / name).read_text(encoding="utf-8"))
        content = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(content, encoding="utf-8")
    return copy


def edit(script: Path, old: str, new: str) -> None:
    """Changes the one place in a copy of a script where a text stands."""
    text = script.read_text(encoding="utf-8")
    assert text.count(old) == 1, old
    script.write_text(text.replace(old, new), encoding="utf-8")


def show_lines(script: Path) -> None:
    """Has a copy of a script print what Run.drawn returns."""
    values = "[[*map(float, line.get_ydata())] for axes in figure.axes for line in axes.lines]"
    spy = f'print("drawn", json.dumps([file.name, {values}]))'
    edit(script, "figure.savefig(file)", f"figure.savefig(file)\n    {spy}")


class Run(NamedTuple):
    code: int
    out: str
    err: str
    results: Path  # folder of the first family's

    def errors(self) -> list[str]:
        """Lines of standard error that are no progress bars."""
        bar, lines = r"(\w+: )?\s*\d+%\|", filter(None, re.split(r"[\r\n]", self.err))
        return [line for line in lines if "error: " in line or not re.match(bar, line)]

    def drawn(self) -> dict[str, list[list[float]]]:
        """The values of all lines in each figure, by the name of its file."""
        return dict(map(json.loads, re.findall(r"(?m)^drawn (.*)", self.out)))


def do_not_draw() -> None:
    """Figures take seconds."""
    Figure.savefig = lambda figure, file: Path(file).write_bytes(b"a figure")


def be_script(script: Path, families: list[str], before: Callable | None) -> None:
    """Runs a script in this process, as python does; its output and errors go beside it."""
    if before:
        before()
    os.chdir("/")
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(script.with_name(name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = [str(script), *families]
    runpy.run_path(str(script), run_name="__main__")


def start(script: Path, *families: Path, before: Callable | None = None) -> BaseProcess:
    """Starts a script in a process of its own, in another folder than its own, with one thread."""
    process = FORKS.Process(target=be_script, args=(script, [*map(str, families)], before))
    process.start()
    return process


def finish(process: BaseProcess, script: Path) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    process.join(300)  # seconds, after which it hangs
    process.kill()
    return process.exitcode, *(script.with_name(name).read_text() for name in ("out", "err"))


def run(script: Path, *families: Path, launcher=(), before: Callable | None = None) -> Run:
    """Runs a script as a user does.

    launcher: what stands between a new python and the script. before: is called at its start.
    """
    if launcher:
        command = [sys.executable, *launcher, script, *families]
        ended = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=300)
        found = ended.returncode, ended.stdout, ended.stderr
    else:
        found = finish(start(script, *families, before=before), script)
    return Run(*found, script.parent / RESULTS[script.name] / families[0].name)


def good_run(script: Path, *arguments: object, **options) -> Run:
    found = run(script, *arguments, **options)
    assert found.code == 0 and "error" not in found.err.lower(), found.err
    return found


def pattern_of(says: str) -> str:
    """A regex of parts of a line, parted by dots, in their order."""
    return ".*".join(map(re.escape, says.split(" … ")))


def read_csv(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def number(cell: str) -> float:
    return float(cell or "nan")


# ---- families ------------------------------------------------------------------------------------


@cache
def gpt_neox_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(TOKENIZER_FILE))


@cache  # lists that nobody changes
def token_ids(word: str, leading_space: bool = True) -> list[int]:
    return gpt_neox_tokenizer().encode(" " + word if leading_space else word).ids


def save_checkpoint(model: torch.nn.Module, folder: Path) -> None:
    model.save_pretrained(folder)
    shutil.copyfile(TOKENIZER_FILE, folder / "tokenizer.json")


def random_family(family: Path, config: PretrainedConfig, shares: dict[int, float]) -> Path:
    """Between two random models: shares is how far the weights of each step have come."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    last = AutoModelForCausalLM.from_config(config).state_dict()
    for step, share in shares.items():
        model.load_state_dict({name: first[name].lerp(last[name], share) for name in first})
        save_checkpoint(model, family / f"step{step}")
    return family


def link(family: Path, folder: Path, steps: Iterable[int]) -> Path:
    """A family of links to the files of some of another's checkpoints."""
    for step in steps:
        (folder / f"step{step}").mkdir(parents=True)
        for file in (family / f"step{step}").iterdir():
            (folder / f"step{step}" / file.name).symlink_to(file)
    return folder


# ---- plain computations --------------------------------------------------------------------------


def naive_read(folder: Path, sequences: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Reads one plain sequence at a time: its states at the last token, and log p of that token.

    float64 (layers + 1, sequences, width) and, NaN for a sequence of one token, (sequences,).
    """
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    states, log_prob = [], []
    for sequence in sequences:
        with torch.inference_mode():
            output = model(torch.tensor([sequence]), output_hidden_states=True, logits_to_keep=2)
        states.append(torch.stack(output.hidden_states)[:, 0, -1].double())
        log_probs = output.logits[0, 0].double().log_softmax(-1)
        log_prob.append(log_probs[sequence[-1]].item() if len(sequence) > 1 else math.nan)
    return torch.stack(states, dim=1).numpy(), np.array(log_prob)


def naive_resamples(last_tokens: list[int], seed: int) -> Iterator[list[int]]:
    """Members of each resample: last tokens are drawn with replacement, with all their texts."""
    texts_of = {}
    for index, token in enumerate(last_tokens):
        texts_of.setdefault(token, []).append(index)
    clusters, rng = list(texts_of.values()), np.random.default_rng(seed)
    for _ in range(RESAMPLES):
        members = []
        for drawn in rng.integers(len(clusters), size=len(clusters)):
            members += clusters[drawn]
        yield members


def bounds_of(values: np.ndarray) -> np.ndarray:
    """The 95 % interval of resampled values; infinite ones stand for never, NaN is left out."""
    bounds = np.quantile(np.minimum(values[~np.isnan(values)], 1e30), [0.025, 0.975])
    return np.where(bounds < 1e20, bounds, np.nan)


def assert_intervals(pairs: list[tuple[list[float], np.ndarray]], share: float) -> None:
    """Of intervals ([low, high], resampled values) at least a share are those of the values."""
    good, widths = [], []
    for found, values in pairs:
        bounds = bounds_of(values)
        width = np.ptp(np.quantile(values[np.isfinite(values)], [0.025, 0.975]))
        good.append(np.allclose(found, bounds, rtol=0, atol=0.15 * width + 1e-5, equal_nan=True))
        if np.isfinite([*bounds, *found]).all() and np.ptp(bounds) > 1e-3:
            widths.append((found[1] - found[0]) / np.ptp(bounds))
    assert len(widths) > 10
    assert np.mean(good) >= share, np.mean(good)
    assert np.mean(widths) == pytest.approx(1, abs=0.06)

"""Bad input to the two analysis scripts: a line that says what, where and what to do; nothing lost.

FAULTS is the table: what is bad, and parts of the line that the user reads. Each is met as a user
would: a process in a copy of a small project that holds the results of an earlier run. After it
come what is odd and no fault, and what goes wrong during a run. The processes are forked from one
that has imported the libraries, which takes a new Python five seconds.
"""

import csv
import json
import multiprocessing
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import pytest
import torch
import transformers
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = Path(__file__).resolve().parents[1]
CONVERGENCE, PERTURBATION = "token_convergence_analysis.py", "multitoken_context_perturbation.py"
BOTH = (CONVERGENCE, PERTURBATION)
RESULTS = {CONVERGENCE: "convergance_plots", PERTURBATION: "multitoken_words_plots"}
TABLE = {CONVERGENCE: "convergence.csv", PERTURBATION: "perturbation.csv"}
WORDS, CONTEXTS = "words_list.json", "multitoken_words_contexts.json"
SETTINGS = {"GROUPS": (1, 2), "WORDS_TO_PLOT": 1, "BOOTSTRAP_RESAMPLES": 50}
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["test_bad_inputs", "transformers.models.gpt_neox"])
BOTH_SCRIPTS = pytest.mark.parametrize("script", BOTH)


# ---- a small project, and runs in it -------------------------------------------------------------


def train_tokenizer() -> Tokenizer:
    """A byte-level BPE as GPT-NeoX's, of 600 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    special = {"special_tokens": ["<|endoftext|>"], "initial_alphabet": letters}
    trainer = trainers.BpeTrainer(vocab_size=600, show_progress=False, **special)
    words = list(json.loads((ROOT / WORDS).read_text(encoding="utf-8")))[:1500]
    tokenizer.train_from_iterator([*(f" {word}" for word in words), *9 * [" jalapeño"]], trainer)
    return tokenizer


def save_family(family: Path, config: transformers.PretrainedConfig, tokenizer: Tokenizer) -> None:
    """Steps 0, 1 and 4 of a random model on its way to another."""
    torch.manual_seed(0)
    first, last = (transformers.AutoModelForCausalLM.from_config(config) for _ in range(2))
    of_first, of_last = first.state_dict(), last.state_dict()
    for step, part in ((0, 0), (1, 0.4), (4, 1)):
        mixed = {name: torch.lerp(of_first[name], of_last[name], part) for name in of_last}
        last.save_pretrained(family / f"step{step}", state_dict=mixed)
        tokenizer.save(str(family / f"step{step}" / "tokenizer.json"))


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scripts, words, contexts, a family of width 16, and what both scripts found of it."""
    folder, tokenizer = tmp_path_factory.mktemp("bad_inputs") / "project", train_tokenizer()
    folder.mkdir()
    groups = {tokens: {} for tokens in (1, 2, 3)}  # {word: its last token}
    for word in json.loads((ROOT / WORDS).read_text(encoding="utf-8")):
        ids = tokenizer.encode(" " + word).ids
        if len(ids) in groups and len(groups[len(ids)]) < 15:
            groups[len(ids)][word] = ids[-1]
    frequencies, contexts = {}, {}
    for group in groups.values():
        frequencies |= {word: 10 ** (2 + place % 5) for place, word in enumerate(group)}
    for word, last in {**groups[2], **groups[3]}.items():
        sentences = [f"{opening} {word}" for opening in ("it was a", "here is the", "two of one")]
        same = [other for other in groups[2] if groups[2][other] == last and other != word]
        replaced = [f"it was a {other}" for other in same if word in groups[2]]
        contexts[word] = {"sentences": sentences, "replaced_sentences": replaced}
    (folder / WORDS).write_text(json.dumps(frequencies), encoding="utf-8")
    (folder / CONTEXTS).write_text(json.dumps(contexts), encoding="utf-8")
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"vocab_size": 640, "intermediate_size": 32, "max_position_embeddings": 64}
    save_family(folder / "family", transformers.GPTNeoXConfig(**shape), tokenizer)
    for script in BOTH:
        shutil.copy(ROOT / script, folder)
        set_constants(folder, **SETTINGS)
        code, _, err = run(folder, script)
        assert code == 0, err
    return folder


@pytest.fixture
def folder(project: Path, tmp_path: Path) -> Path:
    """A copy of the project, for one test."""
    shutil.copytree(project, tmp_path / "project")
    for owner in tmp_path.glob("project/*/family/kept/family.txt"):
        owner.write_text(str(tmp_path / "project" / "family"), encoding="utf-8")
    return tmp_path / "project"


def set_constants(folder: Path, **settings) -> None:
    for file in (folder / script for script in BOTH if (folder / script).exists()):
        text = file.read_text(encoding="utf-8")
        for name, value in settings.items():
            text = re.sub(rf"(?m)^{name} = .*$", lambda _, line=f"{name} = {value!r}": line, text)
        file.write_text(text, encoding="utf-8")


def be_script(folder: Path, script: str, arguments: tuple, before: Callable | None) -> None:
    """Makes this process that of a script, its output in files. before: called at its start."""
    os.chdir(folder)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if before is not draw:
        Figure.savefig = lambda figure, file, **_: Path(file).write_bytes(b"a figure")
    if before:
        before()
    sys.argv = [script, *arguments]
    runpy.run_path(str(folder / script), run_name="__main__")


def start(folder: Path, script: str, *arguments: str, before: Callable | None = None):
    process = FORKSERVER.Process(
        target=be_script, args=(folder, script, arguments or ("family",), before)
    )
    process.start()
    return process


def finish(process, folder: Path) -> tuple[int, str, str]:
    process.join(60)  # seconds, after which it hangs
    process.kill()
    out, err = (Path(f"{folder}.{name}").read_text(encoding="utf-8") for name in ("out", "err"))
    return process.exitcode, out, err


def run(folder: Path, script: str, *arguments: str, before: Callable | None = None):
    """Exit code, standard output, standard error."""
    return finish(start(folder, script, *arguments, before=before), folder)


def error_line(ended: tuple[int, str, str]) -> str:
    """The one line that says why a run ended."""
    code, out, err = ended
    lines = [line for line in re.split(r"[\r\n]+", err) if line and not re.search(r"%\||it/s", line)]
    assert (code, len(lines)) == (2, 1) and lines[0].startswith("error: "), err
    assert "results  " not in out
    return lines[0]


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def kept(folder: Path, script: str) -> dict[str, bytes]:
    files = (folder / RESULTS[script] / "family" / "kept").glob("step*.npz")
    return {file.name: file.read_bytes() for file in files}


def read_table(folder: Path, script: str, name: str = "") -> list[dict[str, str]]:
    file = folder / RESULTS[script] / "family" / (name or TABLE[script])
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


# ---- faults: each takes the project's folder and spoils it ---------------------------------------


class Fault(NamedTuple):
    spoil: Callable[[Path], object]
    says: list[str]  # parts of the line
    scripts: tuple[str, ...] = BOTH
    arguments: tuple[str, ...] = ("family",)
    mended: bool = True  # False: not yet


def constants(**settings) -> Callable:
    return lambda folder: set_constants(folder, **settings)


def content(name: str, text: str | None) -> Callable:
    """A file holds something else, or is missing."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        if text is not None:
            (folder / name).write_text(text, encoding="utf-8")

    return spoil


def renamed(name: str) -> Callable:
    return lambda folder: (folder / "family" / "step1").rename(folder / "family" / name)


def edit_json(*names: str, **entries) -> Callable:
    def spoil(folder: Path) -> None:
        for name in names:
            values = json.loads((folder / name).read_text(encoding="utf-8"))
            (folder / name).write_text(json.dumps(values | entries), encoding="utf-8")

    return spoil


CONFIGS = [f"family/step{step}/config.json" for step in (0, 1, 4)]


def edit_weights(checkpoint: Path, change: Callable[[dict], object]) -> None:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def to_bin(checkpoint: Path, **more) -> Path:
    """Its weights as torch saves them."""
    file = checkpoint / "pytorch_model.bin"
    torch.save(load_file(checkpoint / "model.safetensors") | more, file)
    (checkpoint / "model.safetensors").unlink()
    return file


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def lose_shard(checkpoint: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    model.save_pretrained(checkpoint, max_shard_size="60KB")
    sorted(checkpoint.glob("model-*.safetensors"))[-1].unlink()


LATE = "gpt_neox.layers.1.attention.dense.bias"


def lose_tensor(tensors: dict) -> None:
    del tensors[LATE]


def misshape(tensors: dict) -> None:
    tensors[LATE] = torch.zeros(7)


def several_faults(folder: Path) -> None:
    family = folder / "family"
    for step in range(10, 17):
        shutil.copytree(family / "step1", family / f"step{step}")
    (family / "step4").rename(family / "step99")
    (family / "step10" / "model.safetensors").unlink()
    cut(family / "step11" / "model.safetensors")
    cut(to_bin(family / "step12"))
    lose_shard(family / "step13")
    edit_weights(family / "step14", lose_tensor)
    edit_weights(family / "step15", misshape)
    edit_json("family/step16/config.json", rope_theta=5.0)(folder)


def spoil_final(change: Callable[[Path], object]) -> Callable:
    return lambda folder: change(folder / "family" / "step4")


def lfs_pointer(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n")


def other_tokenizer(folder: Path) -> None:
    """Step 1 has a tokenizer without the last merges."""
    file = folder / "family" / "step1" / "tokenizer.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    values["model"]["merges"] = values["model"]["merges"][:100]
    file.write_text(json.dumps(values), encoding="utf-8")


def not_a_number(folder: Path) -> None:
    def change(tensors: dict) -> None:
        tensors[LATE][3] = torch.nan

    edit_weights(folder / "family" / "step1", change)


def words_of(count: int, start: str = "") -> Callable:
    """The first words of each number of tokens that begin so."""

    def spoil(folder: Path) -> None:
        tokenizer, chosen = Tokenizer.from_file(str(folder / "family/step4/tokenizer.json")), {}
        for word, frequency in json.loads((ROOT / WORDS).read_text(encoding="utf-8")).items():
            tokens = len(tokenizer.encode(" " + word).ids)
            if word.startswith(start) and list(chosen.values()).count(tokens) < count:
                chosen[word] = tokens
        frequencies = {word: 10 ** (2 + place % 5) for place, word in enumerate(chosen)}
        (folder / WORDS).write_text(json.dumps(frequencies), encoding="utf-8")

    return spoil


def two_of_one_name(folder: Path) -> None:
    shutil.copytree(folder / "family", folder / "other" / "family")


def results_are_a_file(folder: Path) -> None:
    set_constants(folder, RESULTS_DIR="results")
    (folder / "results").write_text("mine")


def of_type(name: str, **shape) -> Callable:
    """A family of another architecture."""

    def spoil(folder: Path) -> None:
        tokenizer = Tokenizer.from_file(str(folder / "family/step4/tokenizer.json"))
        shutil.rmtree(folder / "family")
        config = transformers.AutoConfig.for_model(name, vocab_size=640, **shape)
        save_family(folder / "family", config, tokenizer)

    return spoil

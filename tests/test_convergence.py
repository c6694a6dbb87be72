"""token_convergence_analysis.py, run as a user runs it on a trained miniature, against a naive computation."""

import csv
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
import unicodedata
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from miniature import TOKENIZER_FILE
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import GPTNeoXForCausalLM

SCRIPT = Path(__file__).resolve().parents[1] / "token_convergence_analysis.py"
WORDS_FILE = SCRIPT.with_name("words_list.json")
STEPS = [0, 1, 2, 4, 8, 16, 32]
GROUPS = [1, 2, 3, 4]
LAYERS = 7  # with the token embedding
WORDS = 24  # in a group
COLUMNS = ["similarity", "ci_low", "ci_high", "unrelated", "stability"]
HEADER = ["tokens", "words", "step", "layer", *COLUMNS]
ONE_TOKEN = ["time", "people", "way", "day", "man", "woman", "life", "child", "world", "school", "state", "family"]


class Run(NamedTuple):
    code: int
    out: str
    err: str
    results: Path

    def to_measure(self) -> int:
        return int(re.search(r"\((\d+) of \d+ to measure\)", self.out)[1])

    def rows(self) -> dict[tuple[int, int, int], dict[str, float]]:
        """{(tokens, step, layer): {column: value}} of the CSV; an empty value is NaN."""
        with (self.results / "convergence.csv").open(newline="", encoding="utf-8") as stream:
            lines = list(csv.DictReader(stream))
        return {
            tuple(int(line[name]) for name in ("tokens", "step", "layer")): {
                name: float(line[name] or "nan") for name in COLUMNS
            }
            for line in lines
        }

    def arrays(self) -> dict[str, np.ndarray]:
        with np.load(self.results / "similarities.npz") as arrays:
            return dict(arrays)

    def kept(self) -> dict[int, int]:
        """{step: time at which its contribution was written}."""
        return {int(file.stem[4:]): file.stat().st_mtime_ns for file in (self.results / "kept").glob("step*.npz")}


def place(folder: Path, words: object = None, **settings: object) -> Path:
    """Puts a copy of the script, with some constants set, and a words file into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    text = SCRIPT.read_text(encoding="utf-8")
    for name, value in ({"WORDS_PER_GROUP": WORDS} | settings).items():
        text, count = re.subn(rf"(?m)^{name} = .*$", lambda _, line=f"{name} = {value!r}": line, text)
        assert count == 1, name
    (folder / SCRIPT.name).write_text(text, encoding="utf-8")
    if words is None:
        shutil.copyfile(WORDS_FILE, folder / WORDS_FILE.name)
    else:
        text = words if isinstance(words, str) else json.dumps(words)
        (folder / WORDS_FILE.name).write_text(text, encoding="utf-8")
    return folder


def start(folder: Path, *arguments: object, cwd: str | Path = "/") -> subprocess.Popen:
    """Starts the script from another directory than its own, with one thread, since two may run at a time."""
    command = [sys.executable, str(folder / SCRIPT.name), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(folder: Path, *arguments: object, cwd: str | Path = "/") -> Run:
    process = start(folder, *arguments, cwd=cwd)
    out, err = process.communicate(timeout=300)
    assert "Traceback" not in out + err, err
    family = Path(str(arguments[0])).name if arguments else ""
    return Run(process.returncode, out, err, folder / "convergance_plots" / family)


def link(family: Path, folder: Path, steps: Iterable[int] | dict[int, int]) -> Path:
    """A family of links to the files of another one's checkpoints: some of its steps, or {step: its step}."""
    for step, source in (steps if isinstance(steps, dict) else {step: step for step in steps}).items():
        (folder / f"step{step}").mkdir(parents=True)
        for file in (family / f"step{source}").iterdir():
            (folder / f"step{step}" / file.name).symlink_to(file)
    return folder


def write(file: Path, content: bytes | dict[str, torch.Tensor]) -> None:
    """Writes bytes or tensors to a file in the place of what was there, be it a link."""
    file.unlink(missing_ok=True)
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif file.suffix == ".safetensors":
        save_file(content, file, metadata={"format": "pt"})
    else:
        torch.save(content, file)


def edit_config(folder: Path, **entries: object) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write(folder / "config.json", json.dumps(config | entries).encode())


@cache
def gpt_neox_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(TOKENIZER_FILE))


def token_ids(word: str, prepend_bos: bool = True, leading_space: bool = True) -> list[int]:
    tokenizer = gpt_neox_tokenizer()
    start = [tokenizer.token_to_id("<|endoftext|>")] if prepend_bos else []
    return start + tokenizer.encode(" " + word if leading_space else word).ids


def naive_states(folder: Path, sequences: list[list[int]]) -> np.ndarray:
    """The hidden states at the last token, one sequence at a time: float64 (layers + 1, sequences, width)."""
    torch.set_num_threads(1)
    model = GPTNeoXForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        outputs = [model(torch.tensor([sequence]), output_hidden_states=True).hidden_states for sequence in sequences]
    return np.array([[layer[0, -1].double().numpy() for layer in output] for output in outputs]).swapaxes(0, 1)


def cosine(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(left, axis=-1) * np.linalg.norm(right, axis=-1)
    return (left * right).sum(-1) / lengths


def assert_like_naive(run: Run, family: Path, steps: list[int], **reading: bool) -> None:
    """Every similarity, mean, floor and stability of a run is what the naive computation gives, to 1e-4."""
    arrays, rows = run.arrays(), run.rows()
    sequences = [token_ids(word, **reading) for word in arrays["words"]]
    states = np.array([naive_states(family / f"step{step}", sequences) for step in steps])
    similarity = cosine(states, states[-1])
    np.testing.assert_allclose(arrays["similarity"], similarity, atol=1e-4, rtol=0)
    for tokens in np.unique(arrays["tokens"]):
        members = np.flatnonzero(arrays["tokens"] == tokens)
        pairs = list(itertools.permutations(members, 2))
        floor = sum(cosine(states[:, :, word], states[-1, :, other]) for word, other in pairs) / len(pairs)
        for (index, step), layer in itertools.product(enumerate(steps), range(states.shape[1])):
            row = rows[tokens, step, layer]
            assert row["similarity"] == pytest.approx(similarity[index, layer, members].mean(), abs=1e-4)
            assert row["unrelated"] == pytest.approx(floor[index, layer], abs=1e-4)
            if index == 0:
                assert np.isnan(row["stability"])
            else:
                stability = cosine(states[index, layer, members], states[index - 1, layer, members]).mean()
                assert row["stability"] == pytest.approx(stability, abs=1e-4)


def assert_figures(results: Path, groups: Iterable[int], coloured: float = 0.002) -> None:
    """The figures of these groups and no others are there, and on each at least this part is coloured."""
    names = {f"group_{group}_tokens.png" for group in groups} | {f"layer_{layer:02d}.png" for layer in range(LAYERS)}
    assert {file.name for file in results.glob("*.png")} == names | {"overview.png"}
    for file in results.glob("*.png"):
        pixels = np.asarray(Image.open(file).convert("RGB")).astype(int)
        assert min(pixels.shape[:2]) >= 400, file
        assert (np.ptp(pixels, axis=-1) > 40).mean() > coloured, file


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file beneath a folder."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): (file.stat().st_size, file.stat().st_mtime_ns) for file in files}


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    """Makes runs one after the other, beside the other tests."""
    pool = ThreadPoolExecutor(1)
    yield pool
    pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def main_run(miniature: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """All steps, all groups: what most tests look at or start from."""
    return run(place(tmp_path_factory.mktemp("main")), miniature)


def continued(main_run: Run, folder: Path, words: object = None, family: str = "miniature", **settings: object) -> Path:
    """Places the script beside the results of the main run, times of files included."""
    shutil.copytree(main_run.results, folder / "convergance_plots" / family)
    return place(folder, words, **settings)


def rewritten(before: Run, after: Run) -> set[int]:
    old = before.kept()
    return {step for step, when in after.kept().items() if old.get(step) != when}


# ------------------------------------------------------------------------------ what a run leaves


def test_run_says_what_it_does(main_run: Run, miniature: Path) -> None:
    assert main_run.code == 0, main_run.err
    lines = dict(line.split(maxsplit=1) for line in main_run.out.splitlines())
    assert lines == {
        "family": str(miniature),
        "steps": "0, 1, 2, 4, 8, 16, 32 (7 of 7 to measure)",
        "words": "24 of 1 token, 24 of 2 tokens, 24 of 3 tokens, 24 of 4 tokens",
        "device": lines["device"],
        "results": str(main_run.results),
    }
    assert re.fullmatch(r"(cpu|cuda:0|mps:0), float32", lines["device"])
    assert "warning" not in main_run.err.lower() and "error" not in main_run.err.lower()
    assert re.search(r"step ?\d+: .*batch/s", main_run.err) and "figures: 100%" in main_run.err


def test_files(main_run: Run) -> None:
    assert_figures(main_run.results, GROUPS)
    others = {file.name for file in main_run.results.iterdir() if file.suffix != ".png"}
    assert others == {"convergence.csv", "similarities.npz", "kept"}
    assert {file.name for file in (main_run.results / "kept").iterdir()} == {f"step{step}.npz" for step in STEPS}


def test_csv_has_a_row_for_each_group_step_and_layer(main_run: Run) -> None:
    lines = (main_run.results / "convergence.csv").read_bytes().decode().split("\n")
    assert lines[0] == ",".join(HEADER) and lines[-1] == ""
    keys = [tuple(map(int, line.split(",")[:4])) for line in lines[1:-1]]
    assert keys == [(group, WORDS, step, layer) for group in GROUPS for step in STEPS for layer in range(LAYERS)]
    values = [line.split(",")[4:] for line in lines[1:-1]]
    assert all(re.fullmatch(r"-?[01]\.\d{6}", value) for row in values for value in row[:4])
    for key, row in zip(keys, values, strict=True):
        assert row[4] == "" if key[2] == 0 else re.fullmatch(r"-?[01]\.\d{6}", row[4])


def test_npz_and_drawn_words(main_run: Run) -> None:
    arrays = main_run.arrays()
    assert set(arrays) == {"words", "tokens", "steps", "similarity"}
    assert arrays["steps"].tolist() == STEPS
    assert arrays["similarity"].shape == (len(STEPS), LAYERS, WORDS * len(GROUPS))
    words = arrays["words"].tolist()
    assert len(set(words)) == len(words) and set(words) <= set(json.loads(WORDS_FILE.read_text(encoding="utf-8")))
    assert arrays["tokens"].tolist() == [len(token_ids(word)) - 1 for word in words]
    assert np.bincount(arrays["tokens"]).tolist() == [0] + [WORDS] * len(GROUPS)


def test_values_are_those_of_the_naive_computation(main_run: Run, miniature: Path) -> None:
    assert_like_naive(main_run, miniature, STEPS)


def test_interval_is_a_bootstrap_over_words(main_run: Run) -> None:
    arrays, ratios = main_run.arrays(), []
    random = np.random.default_rng(12345)
    for (tokens, step, layer), row in main_run.rows().items():
        values = arrays["similarity"][STEPS.index(step), layer, arrays["tokens"] == tokens]
        assert row["ci_low"] <= row["similarity"] <= row["ci_high"]
        means = random.choice(values, (2000, WORDS)).mean(1)
        low, high = np.quantile(means, [0.025, 0.975])
        tolerance = 0.15 * (high - low) + 2e-6
        assert row["ci_low"] == pytest.approx(low, abs=tolerance)
        assert row["ci_high"] == pytest.approx(high, abs=tolerance)
        if step != STEPS[-1]:
            ratios.append((row["ci_high"] - row["ci_low"]) / (high - low))
    assert np.mean(ratios) == pytest.approx(1, abs=0.04)


def test_final_checkpoint_is_similar_to_itself(main_run: Run) -> None:
    assert np.abs(main_run.arrays()["similarity"][-1] - 1).max() < 1e-6
    finals = [row for (_, step, _), row in main_run.rows().items() if step == STEPS[-1]]
    assert all(abs(row[name] - 1) < 1e-6 for row in finals for name in ("similarity", "ci_low", "ci_high"))
    assert all(row["unrelated"] < 1 - 1e-4 for row in finals)


def test_curves_look_like_learning(main_run: Run) -> None:
    rows = main_run.rows()
    for group, layer in itertools.product(GROUPS, range(LAYERS)):
        curve = [rows[group, step, layer] for step in STEPS]
        assert curve[0]["similarity"] < curve[-2]["similarity"] - 0.01
        assert all(row["similarity"] > row["unrelated"] for row in curve[2:])


# ------------------------------------------------------------------------------ how a word is read


def test_bare_words(miniature: Path, tmp_path: Path) -> None:
    family = link(miniature, tmp_path / "short", [1, 32])
    settings = {"PREPEND_BOS": False, "LEADING_SPACE": False, "GROUPS": (1, 3)}
    result = run(place(tmp_path / "here", WORDS_PER_GROUP=16, **settings), family)
    assert result.code == 0, result.err
    assert_like_naive(result, family, [1, 32], prepend_bos=False, leading_space=False)


# ------------------------------------------------------------------------------ families


def test_weights_in_any_format(main_run: Run, miniature: Path, tmp_path: Path) -> None:
    """The same weights as .bin, in shards, in float32, under the names of the base model: the same similarities."""
    family = link(miniature, tmp_path / "formats", STEPS)
    weights = {step: load_file(miniature / f"step{step}" / "model.safetensors") for step in STEPS}
    for step in (0, 1, 2, 8, 32):
        (family / f"step{step}" / "model.safetensors").unlink()
    write(family / "step0" / "pytorch_model.bin", weights[0])
    names = sorted(weights[2])
    halves = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for file, members in halves.items():
        write(family / "step2" / file, {name: weights[2][name] for name in members})
    index = {"weight_map": {name: file for file, members in halves.items() for name in members}}
    write(family / "step2" / "pytorch_model.bin.index.json", json.dumps(index).encode())
    write(family / "step4" / "model.safetensors", {name: tensor.float() for name, tensor in weights[4].items()})
    base = {name.removeprefix("gpt_neox."): weights[8][name] for name in names if name.startswith("gpt_neox.")}
    write(family / "step8" / "model.safetensors", base)
    for step, dtype in ((1, torch.float16), (32, torch.float32)):
        model = GPTNeoXForCausalLM.from_pretrained(miniature / f"step{step}", dtype=dtype)
        for file in ("config.json", "generation_config.json"):
            (family / f"step{step}" / file).unlink()
        model.save_pretrained(family / f"step{step}", max_shard_size="4MB")
        assert len(list((family / f"step{step}").glob("model-*.safetensors"))) > 1

    result = run(place(tmp_path / "here"), family)
    assert result.code == 0, result.err
    arrays, expected = result.arrays(), main_run.arrays()
    assert (arrays["words"] == expected["words"]).all()
    np.testing.assert_allclose(arrays["similarity"], expected["similarity"], atol=1e-6, rtol=0)


def test_single_checkpoint_and_single_group(miniature: Path, tmp_path: Path) -> None:
    """The family stands beside the script, under a name that is none of a shell's or of a formula's.

    One of the same name where the script is started is not meant, unless it is named on the command line.
    """
    name = "Kinder, $\\ein$ Prüfstand"
    here = place(tmp_path / "a place ü", dict.fromkeys(ONE_TOKEN, 1), GROUPS=[1], CHECKPOINTS_DIR=name)
    family = link(miniature, here / name, [8])
    link(miniature, tmp_path / name, [0, 8])
    before = snapshot(family)
    result = run(here, cwd=tmp_path)._replace(results=here / "convergance_plots" / name)
    assert result.code == 0, result.err
    assert f"words    {len(ONE_TOKEN)} of 1 token\n" in result.out
    assert "warning" not in result.err.lower(), result.err
    assert_figures(result.results, [1], coloured=0.0001)
    rows = result.rows()
    assert list(rows) == [(1, 8, layer) for layer in range(LAYERS)]
    assert all(row["similarity"] == pytest.approx(1, abs=1e-6) and np.isnan(row["stability"]) for row in rows.values())
    assert result.arrays()["words"].tolist() == sorted(ONE_TOKEN, key=token_ids)
    assert snapshot(family) == before
    assert {file.name for file in here.iterdir()} == {SCRIPT.name, WORDS_FILE.name, "convergance_plots", name}
    assert [folder.name for folder in (here / "convergance_plots").iterdir()] == [name]
    assert "steps    0, 8 (2 of 2 to measure)\n" in run(here, name, cwd=tmp_path).out


# ------------------------------------------------------------------------------ interrupted work is kept


def test_killed_run_goes_on(main_run: Run, miniature: Path, tmp_path: Path) -> None:
    here = place(tmp_path)
    process = start(here, miniature)
    kept = here / "convergance_plots" / miniature.name / "kept"
    while process.poll() is None and len(list(kept.glob("step*.npz"))) < 2:
        time.sleep(0.002)
    process.kill()
    process.communicate()
    killed = Run(process.returncode, "", "", kept.parent)
    done = killed.kept()
    assert killed.code == -9 and 2 <= len(done) < len(STEPS)
    assert not (kept.parent / "convergence.csv").exists()

    result = run(here, miniature)
    assert result.code == 0, result.err
    assert result.to_measure() == len(STEPS) - len(done)
    assert done.items() <= result.kept().items()
    assert {file.name for file in kept.iterdir()} == {f"step{step}.npz" for step in STEPS}
    for name in ("convergence.csv", "similarities.npz"):
        assert (result.results / name).read_bytes() == (main_run.results / name).read_bytes()


def test_nothing_is_measured_twice(main_run: Run, miniature: Path, tmp_path: Path) -> None:
    here = continued(main_run, tmp_path)
    (here / "convergance_plots" / "miniature" / "overview.png").unlink()
    result = run(here, miniature)
    assert result.code == 0 and result.to_measure() == 0
    assert "batch/s" not in result.err
    assert result.kept() == main_run.kept()
    assert (result.results / "convergence.csv").read_bytes() == (main_run.results / "convergence.csv").read_bytes()
    assert_figures(result.results, GROUPS)


def test_added_checkpoint_with_identical_weights(main_run: Run, miniature: Path, tmp_path: Path) -> None:
    """step12 carries the weights of step8, as some published revisions carry those of others."""
    family = link(miniature, tmp_path / "added", {**{step: step for step in STEPS}, 12: 8})
    write(family / "step12" / "model.safetensors", (miniature / "step8" / "model.safetensors").read_bytes())
    result = run(continued(main_run, tmp_path / "here", family="added"), family)
    assert result.code == 0, result.err
    assert [line for line in result.err.splitlines() if line.startswith("warning: ")] == [
        "warning: steps 8, 12 have identical weights: the curves stand still between them"
    ]
    assert result.to_measure() == 2 and rewritten(main_run, result) == {12, 16}
    rows, before = result.rows(), main_run.rows()
    assert {key: row for key, row in rows.items() if key[1] not in (0, 12, 16)} == {
        key: row for key, row in before.items() if key[1] not in (0, 16)
    }
    for group, layer in itertools.product(GROUPS, range(LAYERS)):
        copy, original = rows[group, 12, layer], rows[group, 8, layer]
        assert copy["stability"] == pytest.approx(1, abs=2e-6)
        assert all(copy[name] == pytest.approx(original[name], abs=2e-6) for name in COLUMNS[:4])
        assert rows[group, 16, layer] == pytest.approx(before[group, 16, layer], abs=2e-6)


def test_weights_that_differ_in_one_value_are_not_identical(miniature: Path, tmp_path: Path) -> None:
    family = link(miniature, tmp_path / "nearly", {1: 8, 2: 8, 4: 8})
    file = family / "step2" / "model.safetensors"
    weights = load_file(file)
    weights["gpt_neox.layers.5.mlp.dense_4h_to_h.weight"][-1, -1] += 0.5
    write(file, weights)
    result = run(place(tmp_path / "here", EASY, GROUPS=(1,), BOOTSTRAP_RESAMPLES=10), family)
    assert result.code == 0
    assert "warning: steps 1, 4 have identical weights" in result.err


def test_changed_weights_and_broken_kept_files_are_measured_again(
    main_run: Run, miniature: Path, tmp_path: Path
) -> None:
    family = link(miniature, tmp_path / "changed", STEPS)
    file = family / "step1" / "model.safetensors"
    noise = torch.Generator().manual_seed(1)
    weights = {name: tensor.float() for name, tensor in load_file(file).items()}
    write(file, {name: tensor + 0.01 * torch.randn(tensor.shape, generator=noise) for name, tensor in weights.items()})
    here = continued(main_run, tmp_path / "here", family="changed")
    kept = here / "convergance_plots" / "changed" / "kept"
    write(kept / "step8.npz", (kept / "step8.npz").read_bytes()[:3000])
    write(kept / "step16.npz", b"")
    write(kept / "step32.npz", b"what is this")

    result = run(here, family)
    assert result.code == 0, result.err
    assert result.to_measure() == 5 and rewritten(main_run, result) == {1, 2, 8, 16, 32}
    rows, before = result.rows(), main_run.rows()
    assert all(rows[key] == pytest.approx(before[key], abs=2e-6, nan_ok=True) for key in rows if key[1] not in (1, 2))
    similarity = result.arrays()["similarity"]
    assert np.abs(similarity[1] - main_run.arrays()["similarity"][1]).max() > 0.01
    assert_like_naive(result, family, STEPS)


def test_changed_words_are_measured_again(main_run: Run, miniature: Path, tmp_path: Path) -> None:
    """Too few words are left for all groups but one: the others are named, and their figures vanish."""
    words = main_run.arrays()["words"].tolist()
    left = {word: 1 for word in words if len(token_ids(word)) == 2 or word in words[-3:]}
    here = continued(main_run, tmp_path, left)
    assert_figures(here / "convergance_plots" / "miniature", GROUPS)
    result = run(here, miniature)
    assert result.code == 0, result.err
    warnings = [line for line in result.err.splitlines() if line.startswith("warning: ")]
    counts = np.bincount([len(token_ids(word)) - 1 for word in left], minlength=5)
    assert counts[1] == WORDS and len(warnings) == 3
    for warning, size in zip(warnings, (2, 3, 4), strict=True):
        assert f"{counts[size]} words of {size} tokens" in warning and "left out" in warning
    assert result.to_measure() == len(STEPS) and rewritten(main_run, result) == set(STEPS)
    assert result.arrays()["tokens"].tolist() == [1] * WORDS
    assert {key: row for key, row in main_run.rows().items() if key[0] == 1} == {
        key: pytest.approx(row, abs=2e-6, nan_ok=True) for key, row in result.rows().items()
    }
    assert_figures(result.results, [1])


def test_changed_type_is_measured_again(main_run: Run, miniature: Path, tmp_path: Path) -> None:
    result = run(continued(main_run, tmp_path, DTYPE="bfloat16"), miniature)
    assert result.code == 0, result.err
    assert ", bfloat16\n" in result.out
    assert result.to_measure() == len(STEPS) and rewritten(main_run, result) == set(STEPS)
    difference = np.abs(result.arrays()["similarity"] - main_run.arrays()["similarity"])
    assert 1e-6 < difference.max() < 0.02


# ------------------------------------------------------------------------------ the packing


AWKWARD = dict.fromkeys(
    [
        *("a", "an", "ant", "anti", "antic", "../../", "./", "naïve", "naive", "é", "日本", "<|endoftext|>", "q"),
        *(unicodedata.normalize("NFD", word) for word in ("naïve", "é")),
        *("q-", "../../evil", "..\\evil", "q-q-", "antidisestablishment", "q-q-q", "q-q-r", "q-r-q", "q-q-q-q-q"),
        *("q-" * 127 + "q", "q-" * 126 + "q-r"),  # as long as the model has positions
    ],
    1,
)
AWKWARD_GROUPS = (255, 1, 2, 4, 5)


@pytest.fixture(scope="module", autouse=True)
def awkward(
    pool: ThreadPoolExecutor, miniature: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Future[Run]]]:
    """A family, and runs on AWKWARD with small to large batches; the last reads the words in another order."""
    folder = tmp_path_factory.mktemp("awkward")
    family = link(miniature, folder / "short", [1, 32])
    settings = {"GROUPS": AWKWARD_GROUPS, "WORDS_PER_GROUP": None, "MIN_GROUP_SIZE": 2, "LEADING_SPACE": False}
    batches = {1: AWKWARD, 7: AWKWARD, 1_000_000: dict(reversed(AWKWARD.items()))}
    places = [place(folder / str(batch), words, BATCH_TOKENS=batch, **settings) for batch, words in batches.items()]
    return family, [pool.submit(run, here, family) for here in places]


def test_packing_is_exact_on_awkward_words(awkward: tuple[Path, list[Future[Run]]]) -> None:
    family, futures = awkward
    first, *others = [future.result() for future in futures]
    assert first.code == 0, first.err
    assert_like_naive(first, family, [1, 32], leading_space=False)
    expected = first.arrays()
    for other in others:
        assert other.code == 0, other.err
        arrays = other.arrays()
        assert all(np.array_equal(arrays[name], expected[name]) for name in ("words", "tokens", "steps"))
        np.testing.assert_allclose(arrays["similarity"], expected["similarity"], atol=1e-5, rtol=0)


def test_awkward_words_are_awkward(awkward: tuple[Path, list[Future[Run]]]) -> None:
    arrays = awkward[1][0].result().arrays()
    words = arrays["words"].tolist()
    sequences = [token_ids(word, leading_space=False) for word in words]
    sizes = {word: len(token_ids(word, leading_space=False)) - 1 for word in AWKWARD}
    assert set(words) == {word for word, size in sizes.items() if size in AWKWARD_GROUPS} < set(AWKWARD)
    assert sum(long[: len(short)] == short for long in sequences for short in sequences if short != long) > 10
    for word in ("naïve", "é"):  # the tokenizer composes: both spellings are there, and are the same tokens
        composed, decomposed = words.index(word), words.index(unicodedata.normalize("NFD", word))
        assert sequences[composed] == sequences[decomposed]
        assert (arrays["similarity"][..., composed] == arrays["similarity"][..., decomposed]).all()
    counts = np.bincount(arrays["tokens"])
    assert counts[4] == counts[255] == 2 and set(np.flatnonzero(counts)) == set(AWKWARD_GROUPS)


def test_words_never_become_paths(awkward: tuple[Path, list[Future[Run]]]) -> None:
    family, futures = awkward
    assert {folder.name for folder in family.parent.iterdir()} == {"short", "1", "7", "1000000"}
    results = [future.result().results for future in futures]
    assert not [file for file in family.parent.rglob("*") if "evil" in file.name]
    for folder in results:
        here = {file.name for file in folder.parents[1].iterdir()}
        assert here == {SCRIPT.name, WORDS_FILE.name, "convergance_plots"}


# ------------------------------------------------------------------------------ what goes wrong


def break_checkpoints(miniature: Path, folder: Path) -> list[tuple[str, list[str]]]:
    """A family in which only the final checkpoint is whole. Returns what is said of each of the others."""
    family = link(miniature, folder, {**dict.fromkeys(range(14), 16), 32: 32})
    step = [family / f"step{index}" for index in range(14)]
    weights = load_file(step[0] / "model.safetensors")
    content = (step[0] / "model.safetensors").read_bytes()
    tokenizer = json.loads((step[0] / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["Ġman"], vocabulary["Ġwoman"] = vocabulary["Ġwoman"], vocabulary["Ġman"]
    matrix = "gpt_neox.layers.3.mlp.dense_4h_to_h.weight"

    (step[0] / "config.json").unlink()
    (step[1] / "model.safetensors").unlink()
    (step[2] / "tokenizer.json").unlink()
    write(step[3] / "model.safetensors", content[: len(content) // 2])
    (step[4] / "model.safetensors").unlink()
    write(step[4] / "pytorch_model.bin", weights)
    write(step[4] / "pytorch_model.bin", (step[4] / "pytorch_model.bin").read_bytes()[:100_000])
    write(step[5] / "model.safetensors", {name: tensor for name, tensor in weights.items() if name != matrix})
    write(step[6] / "model.safetensors", weights | {matrix: weights[matrix].T.contiguous()})
    edit_config(step[7], hidden_size=32)
    edit_config(step[8], model_type="gpt2")
    write(step[9] / "tokenizer.json", json.dumps(tokenizer).encode())
    (step[10] / "model.safetensors").unlink()
    index = {"weight_map": {name: "model-00001-of-00001.safetensors" for name in weights}}
    write(step[10] / "model.safetensors.index.json", json.dumps(index).encode())
    write(step[11] / "config.json", b'{"model_type": ')
    write(step[12] / "model.safetensors", b"")
    write(step[13] / "model.safetensors", {name: tensor.int() for name, tensor in weights.items()})
    return [
        ("no config", ["config.json"]),
        ("no weights", ["no weights", "model.safetensors", "pytorch_model.bin"]),
        ("no tokenizer", ["tokenizer.json"]),
        ("truncated safetensors", ["incomplete"]),
        ("truncated bin", ["zip archive"]),
        ("no tensor", ["lack", "layers.3.mlp.dense_4h_to_h.weight"]),
        ("transposed tensor", ["layers.3.mlp.dense_4h_to_h.weight", "(256, 64)", "expected", "(64, 256)"]),
        ("another width", ["hidden_size is 32", "step32", "64"]),
        ("another architecture", ["gpt2", "gpt_neox"]),
        ("another tokenizer", ["tokenizer", "man'", str(token_ids("man")[-1]), str(token_ids("woman")[-1])]),
        ("no shard", ["model-00001-of-00001.safetensors"]),
        ("broken config", [""]),
        ("empty safetensors", ["header"]),
        ("integers", ["int32", "expected floating point"]),
    ]


EASY = dict.fromkeys(ONE_TOKEN, 1)


def error_line(result: Run) -> str:
    """The one line that a failed run ends with; nothing is left behind."""
    assert result.code == 2
    assert not result.out or "results" not in result.out
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert errors == [result.err.splitlines()[-1]], result.err
    return errors[0]


def test_every_unusable_checkpoint_is_named(main_run: Run, miniature: Path, tmp_path: Path) -> None:
    faults = break_checkpoints(miniature, tmp_path / "broken")
    here = continued(main_run, tmp_path / "here", EASY, family="broken")
    before = snapshot(here)
    line = error_line(run(here, tmp_path / "broken"))
    assert line.startswith("error: fetch or train again, or remove, what cannot be used: ")
    found = re.split(rf"{tmp_path}/broken/step(\d+): ", line)[1:]
    assert [int(step) for step in found[::2]] == list(range(len(faults)))
    for (name, parts), text in zip(faults, found[1::2], strict=True):
        assert text.strip("; "), name
        for part in parts:
            assert part in text, name
    assert snapshot(here) == before


def test_hidden_states_that_are_not_finite(miniature: Path, tmp_path: Path) -> None:
    """A NaN in one row of one embedding: the one word is named, and the steps before it are kept."""
    family = link(miniature, tmp_path / "nan", STEPS)
    file = family / "step4" / "model.safetensors"
    weights = load_file(file)
    weights["gpt_neox.embed_in.weight"][token_ids("school")[-1], 5] = torch.nan
    write(file, weights)
    here = place(tmp_path / "here", EASY, GROUPS=(1,), BATCH_TOKENS=4)
    result = run(here, family)
    line = error_line(result)
    assert re.search("step ?4, layer 0:", line) and "school'" in line and str(family / "step4") in line
    assert set(result.kept()) == {0, 1, 2}
    assert not (result.results / "convergence.csv").exists()


def test_help(tmp_path: Path) -> None:
    result = run(place(tmp_path), "--help")
    assert result.code == 0 and result.err == ""
    for part in ("[family]", "CHECKPOINTS_DIR", "torchrun", "similarity", "unrelated", "stability", "convergence.csv"):
        assert part in result.out

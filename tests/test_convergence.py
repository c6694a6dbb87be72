"""token_convergence_analysis.py, run as a user runs it on small families, against a naive computation."""

import csv
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable
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
ALL_WORDS = json.loads(WORDS_FILE.read_text(encoding="utf-8"))
STEPS = [0, 1, 2, 4, 8, 16, 32]
GROUPS = [1, 2, 3, 4]
KINDS = ["word", "recombined", "carried"]
CURVES = [(tokens, kind) for tokens in GROUPS for kind in KINDS if (tokens, kind) != (1, "recombined")]
LAYERS = 7  # with the token embedding
WORDS = 24  # in a group
INTERVALS = ["similarity", "similarity_low", "similarity_high", "centred", "centred_low", "centred_high"]
COLUMNS = [*INTERVALS[:3], "unrelated", *INTERVALS[3:], "cka", "stability"]
HEADER = ["tokens", "kind", "words", "step", "layer", *COLUMNS]
HALF_WAY_HEADER = "tokens,kind,words,layer,half_way_step,low,high,step_before,step_after"
TABLES = ("convergence.csv", "half_way.csv", "contrasts.csv", "texts.csv")
ONE_TOKEN = ["time", "people", "way", "day", "man", "woman", "life", "child", "world", "school", "state", "family"]
EASY = dict.fromkeys(ONE_TOKEN, 1)


def number(cell: str) -> float:
    return float(cell or "nan")


def read_csv(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


class Text(NamedTuple):
    word: str
    frequency: float
    token_ids: list[int]  # after <|endoftext|>


class Run(NamedTuple):
    code: int
    out: str
    err: str
    results: Path

    def to_measure(self) -> int:
        return int(re.search(r"\((\d+) of \d+ to measure\)", self.out)[1])

    def warnings(self) -> list[str]:
        return [line.removeprefix("warning: ") for line in self.err.splitlines() if "warning" in line.lower()]

    def rows(self) -> dict[tuple[int, str, int, int], dict[str, float]]:
        """{(tokens, kind, step, layer): {column: value}} of convergence.csv; an empty value is NaN."""
        rows = {}
        for line in read_csv(self.results / "convergence.csv"):
            key = (int(line["tokens"]), line["kind"], int(line["step"]), int(line["layer"]))
            rows[key] = {name: number(line[name]) for name in COLUMNS}
        return rows

    def half_way(self) -> dict[tuple[int, str, int], dict[str, float]]:
        """{(tokens, kind, layer): {column: value}} of half_way.csv."""
        rows = {}
        for line in read_csv(self.results / "half_way.csv"):
            key = (int(line["tokens"]), line["kind"], int(line["layer"]))
            rows[key] = {name: number(line[name]) for name in HALF_WAY_HEADER.split(",")[4:]}
        return rows

    def contrasts(self) -> dict[tuple[int, str, str, int], dict[str, float]]:
        """{(tokens, kind, against, layer): {column: value}} of contrasts.csv."""
        rows = {}
        for line in read_csv(self.results / "contrasts.csv"):
            key = (int(line["tokens"]), line["kind"], line["against"], int(line["layer"]))
            rows[key] = {name: number(line[name]) for name in ("ratio", "low", "high")}
        return rows

    def texts(self) -> dict[tuple[int, str], list[Text]]:
        """The texts of each curve, {(tokens, kind): texts}, of texts.csv."""
        curves = {}
        for line in read_csv(self.results / "texts.csv"):
            ids = [int(token) for token in line["token_ids"].split()]
            text = Text(line["word"], number(line["frequency"]), ids)
            curves.setdefault((int(line["tokens"]), line["kind"]), []).append(text)
        return curves

    def arrays(self) -> dict[str, np.ndarray]:
        with np.load(self.results / "similarities.npz") as arrays:
            return dict(arrays)

    def kept(self) -> dict[str, int]:
        """{name: time at which it was written} of the contributions."""
        return {file.name: file.stat().st_mtime_ns for file in (self.results / "kept").glob("step*.npz")}

    def tables(self) -> list[bytes]:
        return [(self.results / name).read_bytes() for name in TABLES]


def place(folder: Path, words: object = None, **settings: object) -> Path:
    """Puts a copy of the script, with some constants set, and a words file into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(SCRIPT, folder / SCRIPT.name)
    for name, value in ({"WORDS_PER_GROUP": WORDS} | settings).items():
        edit_script(folder, rf"(?m)^{name} = .*$", f"{name} = {value!r}")
    if words is None:
        shutil.copyfile(WORDS_FILE, folder / WORDS_FILE.name)
    else:
        text = words if isinstance(words, str) else json.dumps(words)
        (folder / WORDS_FILE.name).write_text(text, encoding="utf-8")
    return folder


def edit_script(folder: Path, pattern: str, replacement: str) -> None:
    """Changes the one place in a copy of the script that a regular expression finds."""
    file = folder / SCRIPT.name
    text, count = re.subn(pattern, lambda _: replacement, file.read_text(encoding="utf-8"))
    assert count == 1, pattern
    file.write_text(text, encoding="utf-8")


def run(folder: Path, *arguments: object, cwd: str | Path = "/") -> Run:
    """Runs the script from another directory than its own, with one thread."""
    command = [sys.executable, str(folder / SCRIPT.name), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert "Traceback" not in process.stdout + process.stderr, process.stderr
    family = Path(str(arguments[0])).name if arguments else ""
    return Run(process.returncode, process.stdout, process.stderr, folder / "convergance_plots" / family)


def error_line(result: Run) -> str:
    """The one line that a failed run ends with."""
    assert result.code == 2
    assert "results  " not in result.out
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert errors == [result.err.splitlines()[-1]], result.err
    return errors[0]


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


def token_ids(word: str, leading_space: bool = True) -> list[int]:
    return gpt_neox_tokenizer().encode(" " + word if leading_space else word).ids


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file beneath a folder."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): (file.stat().st_size, file.stat().st_mtime_ns) for file in files}


def assert_figures(results: Path, groups: Iterable[int], layers: int = LAYERS, coloured: float = 0.002) -> None:
    """The figures of these groups and no others are there, and on each at least this part is coloured."""
    names = {f"group_{group}_tokens.png" for group in groups} | {f"layer_{layer:02d}.png" for layer in range(layers)}
    assert {file.name for file in results.glob("*.png")} == names | {"overview.png", "half_way.png"}
    for file in results.glob("*.png"):
        pixels = np.asarray(Image.open(file).convert("RGB")).astype(int)
        assert min(pixels.shape[:2]) >= 400, file
        assert (np.ptp(pixels, axis=-1) > 40).mean() > coloured, file


# ------------------------------------------------------------------------------ the naive computation


class Naive(NamedTuple):
    """What a curve's texts contribute, float64 (steps, layers + 1, texts), and their hidden states at length 1."""

    last_tokens: list[int]
    states: np.ndarray  # (steps, layers + 1, texts, width)
    similarity: np.ndarray
    covariance: np.ndarray  # with the final checkpoint, each after its mean over the texts is taken away
    variance: np.ndarray


def cosine(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(left, axis=-1) * np.linalg.norm(right, axis=-1)
    return (left * right).sum(-1) / lengths


def naive_states(folder: Path, sequences: list[list[int]]) -> np.ndarray:
    """The hidden states at the last token, one sequence at a time: float64 (layers + 1, sequences, width)."""
    torch.set_num_threads(1)
    model = GPTNeoXForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        outputs = [model(torch.tensor([sequence]), output_hidden_states=True).hidden_states for sequence in sequences]
    return np.array([[layer[0, -1].double().numpy() for layer in output] for output in outputs]).swapaxes(0, 1)


def naive_curve(texts: list[Text], family: Path, steps: list[int], prepend_bos: bool = True) -> Naive:
    start = [gpt_neox_tokenizer().token_to_id("<|endoftext|>")] if prepend_bos else []
    sequences = [start + text.token_ids for text in texts]
    states = np.array([naive_states(family / f"step{step}", sequences) for step in steps])
    unit = states / np.linalg.norm(states, axis=-1, keepdims=True)
    own = unit - unit.mean(2, keepdims=True)
    return Naive(
        last_tokens=[text.token_ids[-1] for text in texts],
        states=unit,
        similarity=cosine(states, states[-1]),
        covariance=(own * own[-1]).sum(-1),
        variance=(own * own).sum(-1),
    )


def naive_centred(naive: Naive, members: list[int] | slice = slice(None)) -> np.ndarray:
    """Centred over some texts, each as often as it stands among them: float64 (steps, layers + 1)."""
    variance = naive.variance[..., members].sum(-1)
    return naive.covariance[..., members].sum(-1) / np.sqrt(variance * variance[-1])


def naive_half_way(centred: np.ndarray, steps: list[int]) -> tuple[float, float, float]:
    """The half-way step of one layer, centred float64 (steps,), and the checkpoints around it; NaN if there is none."""
    progress = (centred - centred[0]) / (1 - centred[0])
    for index in reversed(range(1, len(steps))):
        before, after = progress[index - 1], progress[index]
        if before < 0.5 <= after:
            place = [math.log2(1 + step) for step in steps[index - 1 : index + 1]]
            middle = place[0] + (0.5 - before) / (after - before) * (place[1] - place[0])
            return 2**middle - 1, steps[index - 1], steps[index]
    return math.nan, math.nan, math.nan


@cache
def quadruples(count: int) -> np.ndarray:
    """All quadruples of different indices below count: int (4, quadruples)."""
    return np.array(list(itertools.permutations(range(count), 4))).T


def naive_cka(left: np.ndarray, right: np.ndarray) -> float:
    """Linear CKA of float64 (texts, width) with the unbiased HSIC by its definition as a U-statistic.

    Song et al. 2012, equation 4: the mean of K_ij (L_ij + L_qr - 2 L_iq) over all i, j, q, r that differ.
    """
    i, j, q, r = quadruples(len(left))

    def hsic(first: np.ndarray, second: np.ndarray) -> float:
        K, L = first @ first.T, second @ second.T
        return (K[i, j] * (L[i, j] + L[q, r] - 2 * L[i, q])).mean()

    return hsic(left, right) / math.sqrt(hsic(left, left) * hsic(right, right))


def naive_unrelated(states: np.ndarray, final: np.ndarray) -> np.ndarray:
    """The mean cosine over all pairs of different texts: float64 (layers + 1,) of (layers + 1, texts, width)."""
    pairs = list(itertools.permutations(range(states.shape[1]), 2))
    return sum(cosine(states[:, text], final[:, other]) for text, other in pairs) / len(pairs)


def naive_run(result: Run, family: Path, steps: list[int], prepend_bos: bool = True) -> dict[tuple[int, str], Naive]:
    return {key: naive_curve(texts, family, steps, prepend_bos) for key, texts in result.texts().items()}


def assert_like_naive(result: Run, curves: dict[tuple[int, str], Naive], steps: list[int]) -> None:
    """Every similarity, floor, centred and stability of a run, and the half-way steps, are those of the naive one."""
    arrays, rows, half_way_rows = result.arrays(), result.rows(), result.half_way()
    expected = np.concatenate([naive.similarity for naive in curves.values()], axis=-1)
    np.testing.assert_allclose(arrays["similarity"], expected, atol=1e-4, rtol=0)
    layers = expected.shape[1]
    assert len(rows) == len(curves) * len(steps) * layers and len(half_way_rows) == len(curves) * layers
    for key, naive in curves.items():
        centred = naive_centred(naive)
        for index, step in enumerate(steps):
            floor = naive_unrelated(naive.states[index], naive.states[-1])
            if index > 0:
                stability = cosine(naive.states[index], naive.states[index - 1]).mean(-1)
            for layer in range(layers):
                row = rows[(*key, step, layer)]
                assert row["similarity"] == pytest.approx(naive.similarity[index, layer].mean(), abs=1e-5)
                assert row["unrelated"] == pytest.approx(floor[layer], abs=1e-5)
                assert row["centred"] == pytest.approx(centred[index, layer], abs=1e-4)
                if index == 0:
                    assert np.isnan(row["stability"])
                else:
                    assert row["stability"] == pytest.approx(stability[layer], abs=1e-5)
        for layer in range(layers):
            row = half_way_rows[(*key, layer)]
            found = [row[name] for name in ("half_way_step", "step_before", "step_after")]
            assert found == pytest.approx(naive_half_way(centred[:, layer], steps), rel=1e-3, nan_ok=True)


def drawn_last_tokens(naive: Naive, rng: np.random.Generator) -> list[int]:
    """The texts of one resample: last tokens are drawn with replacement, each brings all its texts."""
    texts_of = {}
    for index, token in enumerate(naive.last_tokens):
        texts_of.setdefault(token, []).append(index)
    clusters = list(texts_of.values())
    return [index for drawn in rng.integers(len(clusters), size=len(clusters)) for index in clusters[drawn]]


# ------------------------------------------------------------------------------ the families and runs that tests share


@pytest.fixture(scope="module")
def main_run(miniature: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """All steps, groups and kinds of the trained miniature: what most tests look at."""
    return run(place(tmp_path_factory.mktemp("main")), miniature)


@pytest.fixture(scope="module")
def main_naive(main_run: Run, miniature: Path) -> dict[tuple[int, str], Naive]:
    assert main_run.code == 0, main_run.err
    return naive_run(main_run, miniature, STEPS)


PLANTED_STEPS = [0, 1, 3, 7, 15, 31]  # 0, 1, 2, 3, 4, 5 in log2(1 + step)
EARLY = [0, 0.25, 0.75, 1, 1, 1]
LATE = [0, 0, 0, 0.25, 0.75, 1]
PLANTED = {1: EARLY, 2: LATE, 3: EARLY}  # mean share of its way that a group's last tokens have gone at each step
PLANTED_LAYERS = 3
HALF_WAY = {1: 2**1.5 - 1, 2: 2**3.5 - 1, 3: 2**1.5 - 1}  # what that makes of the half-way steps in layer 0


def planted_words() -> dict[str, int]:
    """24 words of one, two and three tokens, equally frequent: those of two share last tokens in pairs.

    No token at the end of a word stands within another or in the carrier, so that each belongs to one group.
    """
    carrier = re.search(r'(?m)^CARRIER = "(.*?)"', SCRIPT.read_text(encoding="utf-8"))[1]
    within, at_end, chosen = set(token_ids(carrier, leading_space=False)), set(), {}
    for tokens in PLANTED:
        by_last_token = {}
        for word in ALL_WORDS:
            ids = token_ids(word)
            if len(ids) == tokens:
                by_last_token.setdefault(ids[-1], []).append(word)
        alike = 2 if tokens == 2 else 1  # words that share a last token
        wanted = len(chosen) + WORDS
        for last, words in by_last_token.items():
            if len(words) < alike or last in within | at_end or len(chosen) == wanted:
                continue
            beginnings = {token for word in words[:alike] for token in token_ids(word)[:-1]}
            if beginnings & (at_end | {last}):
                continue
            within |= beginnings
            at_end.add(last)
            chosen |= dict.fromkeys(words[:alike], 1000)
    return chosen


def plant(family: Path, miniature: Path) -> dict[str, int]:
    """A family of two blocks in which only embeddings change, as PLANTED says. Returns the words to read with it.

    A last token's embedding turns from one direction to another, sqrt(1 - s²) a + s b, s being its share of the way.
    All directions of a group are at right angles, so that similarity is the mean of s in layer 0, and so is centred.
    """
    words = planted_words()
    folder = miniature / "step32"
    weights = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        block = re.search(r"layers\.(\d+)", name)
        if not name.startswith("embed_out") and (block is None or int(block[1]) < PLANTED_LAYERS - 1):
            weights[name] = tensor.float()
    embeddings = next(name for name in weights if name.endswith("embed_in.weight"))
    for index, step in enumerate(PLANTED_STEPS):
        rows = weights[embeddings].clone()
        for tokens, shares in PLANTED.items():
            last_tokens = sorted({token_ids(word)[-1] for word in words if len(token_ids(word)) == tokens})
            scatter = np.linspace(-0.2, 0.2, len(last_tokens))
            for place, token in enumerate(last_tokens):
                share = shares[index] + scatter[place] * (0 < shares[index] < 1)
                rows[token] = 0
                rows[token, 2 * place] = math.sqrt(1 - share**2)
                rows[token, 2 * place + 1] = share
        checkpoint = family / f"step{step}"
        checkpoint.mkdir(parents=True)
        save_file(weights | {embeddings: rows}, checkpoint / "model.safetensors", metadata={"format": "pt"})
        for name in ("config.json", "tokenizer.json"):
            shutil.copyfile(folder / name, checkpoint / name)
        edit_config(checkpoint, num_hidden_layers=PLANTED_LAYERS - 1)
    return words


@pytest.fixture(scope="module")
def planted(miniature: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """The planted family, and its words."""
    family = tmp_path_factory.mktemp("trees") / "planted"
    return family, plant(family, miniature)


@pytest.fixture(scope="module")
def planted_run(planted: tuple[Path, dict[str, int]], tmp_path_factory: pytest.TempPathFactory) -> Run:
    family, words = planted
    result = run(place(tmp_path_factory.mktemp("planted"), words), family)
    assert result.code == 0, result.err
    return result


def continued(before: Run, folder: Path, words: object, family: str = "planted", **settings: object) -> Path:
    """Places the script beside the results of an earlier run, times of files included, as those of another family."""
    results = folder / "convergance_plots" / family
    shutil.copytree(before.results, results)
    if family != before.results.name:  # which the record of the run would refuse
        (results / "kept" / "run.json").unlink()
    return place(folder, words, **settings)


def measured_again(before: Run, after: Run) -> set[int]:
    """The steps of the contributions that an earlier run did not leave."""
    old = before.kept()
    return {int(re.match(r"step(\d+)-", name)[1]) for name, when in after.kept().items() if old.get(name) != when}


# ------------------------------------------------------------------------------ what a run leaves


def test_run_says_what_it_does(main_run: Run, miniature: Path) -> None:
    assert main_run.code == 0, main_run.err
    lines = main_run.out.splitlines()
    assert lines[0] == f"family   {miniature}" and lines[-1] == f"results  {main_run.results}"
    frequencies = [text.frequency for texts in main_run.texts().values() for text in texts]
    assert lines[1:4] == [
        "steps    0, 1, 2, 4, 8, 16, 32 (7 of 7 to measure)",
        "words    24 of 1 token, 24 of 2 tokens, 24 of 3 tokens, 24 of 4 tokens",
        f"texts    {WORDS * len(CURVES)}, kinds word, recombined, carried, "
        f"frequencies {np.nanmin(frequencies):g} to {np.nanmax(frequencies):g}",
    ]
    assert re.fullmatch(r"device   (cpu|cuda:0|mps:0), float32", lines[4])
    assert main_run.warnings() == [] and "error" not in main_run.err.lower()
    assert re.search(r"step ?\d+: .*batch/s", main_run.err) and "figures: 100%" in main_run.err


def test_last_lines_say_the_answer(main_run: Run) -> None:
    """The half-way steps in the first, the middle and the last layer, and the ratios in the middle, of the tables."""
    half_way, contrasts = main_run.half_way(), main_run.contrasts()
    answer = main_run.out.split("half-way step", 1)[1]
    assert re.findall(r"layer (\d+)", answer.splitlines()[0]) == ["0", "3", "6"]
    found = re.findall(r"(?m)^ +(\d) tokens? +(word|recombined|carried) +(\d.*)$", answer)
    assert [(int(tokens), kind) for tokens, kind, _ in found] == CURVES
    for tokens, kind, cells in found:
        expected = []
        for layer in (0, 3, 6):
            row = half_way[int(tokens), kind, layer]
            expected.append(f"{row['half_way_step']:.0f} [{row['low']:.0f}, {row['high']:.0f}]")
        assert re.findall(r"\d+ \[\d+, \d+\]", cells) == expected
    found = re.findall(r"(?m)^ +(\d) tokens? (\w+) over (\d) tokens? (\w+) +(\d.*): (.*)$", answer)
    assert len(found) == 6
    for tokens, kind, other_tokens, other_kind, cell, verdict in found:
        row = contrasts[int(tokens), kind, f"{other_tokens} {other_kind}", 3]
        assert cell == f"{row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
        assert verdict == ("later" if row["low"] > 1 else "earlier" if row["high"] < 1 else "no difference shown")


def test_files(main_run: Run, miniature: Path) -> None:
    assert_figures(main_run.results, GROUPS)
    others = {file.name for file in main_run.results.iterdir() if file.suffix != ".png"}
    assert others == {*TABLES, "similarities.npz", "kept"}
    names = sorted(file.name for file in (main_run.results / "kept").iterdir())
    assert names.pop(0) == "run.json"
    assert all(re.fullmatch(r"step\d+-[0-9a-f]{16}\.npz", name) for name in names)
    assert sorted(int(name[4:].split("-")[0]) for name in names) == STEPS
    record = json.loads((main_run.results / "kept" / "run.json").read_text(encoding="utf-8"))
    assert record["family"] == str(miniature)
    assert set(record["figures"]) == {file.name for file in main_run.results.glob("*.png")}


def test_convergence_csv_has_a_row_for_each_curve_step_and_layer(main_run: Run) -> None:
    lines = (main_run.results / "convergence.csv").read_bytes().decode().split("\n")
    assert lines[0] == ",".join(HEADER) and lines[-1] == ""
    rows = [line.split(",") for line in lines[1:-1]]
    expected = itertools.product(CURVES, STEPS, range(LAYERS))
    assert [row[:5] for row in rows] == [
        [str(tokens), kind, str(WORDS), str(step), str(layer)] for (tokens, kind), step, layer in expected
    ]
    for row in rows:
        values = dict(zip(COLUMNS, row[5:], strict=True))
        if row[3] == "0":
            assert values.pop("stability") == ""
        assert all(re.fullmatch(r"-?\d\.\d{6}", value) for value in values.values())


def test_other_tables_have_a_row_for_each_curve_and_layer(main_run: Run) -> None:
    lines = (main_run.results / "half_way.csv").read_bytes().decode().split("\n")
    assert lines[0] == HALF_WAY_HEADER and lines[-1] == ""
    assert [line.split(",")[:4] for line in lines[1:-1]] == [
        [str(tokens), kind, str(WORDS), str(layer)] for tokens, kind in CURVES for layer in range(LAYERS)
    ]
    lines = (main_run.results / "contrasts.csv").read_bytes().decode().split("\n")
    assert lines[0] == "tokens,kind,against,layer,ratio,low,high" and lines[-1] == ""
    expected = set()
    for tokens, layer in itertools.product((2, 3, 4), range(LAYERS)):
        expected |= {(tokens, "word", f"{tokens} recombined", layer), (tokens, "carried", "1 carried", layer)}
    assert set(main_run.contrasts()) == expected and len(lines) == len(expected) + 2


def test_npz_holds_the_texts_in_the_order_of_the_table(main_run: Run) -> None:
    arrays, texts = main_run.arrays(), main_run.texts()
    assert set(arrays) == {"words", "tokens", "kind", "frequency", "steps", "similarity"}
    assert list(texts) == CURVES
    assert arrays["steps"].tolist() == STEPS
    assert arrays["similarity"].shape == (len(STEPS), LAYERS, WORDS * len(CURVES))
    labels = list(zip(arrays["tokens"].tolist(), arrays["kind"].tolist(), strict=True))
    assert labels == [key for key, members in texts.items() for _ in members]
    assert arrays["words"].tolist() == [text.word for members in texts.values() for text in members]
    frequencies = [text.frequency for members in texts.values() for text in members]
    np.testing.assert_array_equal(arrays["frequency"], frequencies)


def test_final_checkpoint_is_similar_to_itself(main_run: Run) -> None:
    assert np.abs(main_run.arrays()["similarity"][-1] - 1).max() < 1e-6
    finals = [row for (_, _, step, _), row in main_run.rows().items() if step == STEPS[-1]]
    assert all(abs(row[name] - 1) <= 1e-6 for row in finals for name in (*INTERVALS, "cka"))
    assert all(row["unrelated"] < 1 - 1e-4 for row in finals)


def test_curves_look_like_learning(main_run: Run) -> None:
    rows = main_run.rows()
    for key, layer in itertools.product(CURVES, range(LAYERS)):
        curve = [rows[(*key, step, layer)] for step in STEPS]
        assert curve[0]["similarity"] < curve[-2]["similarity"] - 0.05 * (
            layer > 0
        )  # rare tokens hardly move in layer 0
        assert curve[0]["centred"] < curve[-2]["centred"]
        assert all(row["similarity"] > row["unrelated"] for row in curve[2:])


# ------------------------------------------------------------------------------ the numbers


def test_values_are_those_of_the_naive_computation(main_run: Run, main_naive: dict[tuple[int, str], Naive]) -> None:
    assert_like_naive(main_run, main_naive, STEPS)


def test_cka_is_that_of_its_definition(main_run: Run, main_naive: dict[tuple[int, str], Naive]) -> None:
    rows = main_run.rows()
    for key, naive in main_naive.items():
        for index, layer in itertools.product((0, 4), range(0, LAYERS, 2)):
            expected = naive_cka(naive.states[index, layer], naive.states[-1, layer])
            assert rows[(*key, STEPS[index], layer)]["cka"] == pytest.approx(expected, abs=1e-4)


@pytest.fixture(scope="module")
def bootstrap(main_naive: dict[tuple[int, str], Naive]) -> dict[tuple[int, str], dict[str, np.ndarray]]:
    """A plain bootstrap over last tokens of each curve: 1,000 resamples, the same for the kinds of a group.

    similarity and centred, float64 (resamples, steps, layers + 1), and half_way, float64 (resamples, layers + 1).
    """
    resampled = {}
    for (tokens, kind), naive in main_naive.items():
        rng = np.random.default_rng(12345 + tokens)
        similarity, centred, half_way = [], [], []
        for _ in range(1000):
            members = drawn_last_tokens(naive, rng)
            similarity.append(naive.similarity[..., members].mean(-1))
            centred.append(naive_centred(naive, members))
            half_way.append([naive_half_way(centred[-1][:, layer], STEPS)[0] for layer in range(LAYERS)])
        found = {"similarity": similarity, "centred": centred, "half_way": half_way}
        resampled[tokens, kind] = {name: np.array(values) for name, values in found.items()}
    return resampled


def test_intervals_are_those_of_a_plain_bootstrap_over_last_tokens(
    main_run: Run, bootstrap: dict[tuple[int, str], dict[str, np.ndarray]]
) -> None:
    ratios = []
    for (tokens, kind, step, layer), row in main_run.rows().items():
        for name in ("similarity", "centred"):
            values = bootstrap[tokens, kind][name][:, STEPS.index(step), layer]
            low, high = np.quantile(values, [0.025, 0.975])
            assert row[f"{name}_low"] <= row[name] + 1e-6 and row[name] <= row[f"{name}_high"] + 1e-6
            assert row[f"{name}_low"] == pytest.approx(low, abs=0.2 * (high - low) + 1e-5)
            assert row[f"{name}_high"] == pytest.approx(high, abs=0.2 * (high - low) + 1e-5)
            if high - low > 1e-3:
                ratios.append((row[f"{name}_high"] - row[f"{name}_low"]) / (high - low))
    assert len(ratios) > 800 and np.mean(ratios) == pytest.approx(1, abs=0.03)


def test_intervals_of_half_way_steps_and_contrasts(
    main_run: Run, bootstrap: dict[tuple[int, str], dict[str, np.ndarray]]
) -> None:
    """Their distributions have gaps at checkpoints, near which a bound may jump: nearly all are alike."""
    half_way, contrasts = main_run.half_way(), main_run.contrasts()
    pairs = []  # a row, the name of its value, and what the plain bootstrap gives
    for (tokens, kind, layer), row in half_way.items():
        pairs.append((row, "half_way_step", bootstrap[tokens, kind]["half_way"][:, layer]))
    for (tokens, kind, against, layer), row in contrasts.items():
        other = (int(against.split()[0]), against.split()[1])
        estimate = half_way[tokens, kind, layer]["half_way_step"] / half_way[(*other, layer)]["half_way_step"]
        assert row["ratio"] == pytest.approx(estimate, abs=2e-6)
        ratio = bootstrap[tokens, kind]["half_way"][:, layer] / bootstrap[other]["half_way"][:, layer]
        pairs.append((row, "ratio", ratio))
    alike = []
    for row, name, values in pairs:
        bounds = np.quantile(values, [0.025, 0.975])
        assert row["low"] <= row[name] <= row["high"]
        tolerance = 0.25 * np.ptp(np.log2(bounds)) + 1e-5
        alike.append(np.abs(np.log2([row["low"], row["high"]] / bounds)).max() < tolerance)
    assert np.mean(alike) > 0.9


# ------------------------------------------------------------------------------ what is read


def test_words_are_those_of_the_file(main_run: Run) -> None:
    for (tokens, kind), texts in main_run.texts().items():
        assert len({text.word for text in texts}) == len(texts) == WORDS
        if kind == "recombined":
            assert all(math.isnan(text.frequency) for text in texts)
        else:
            assert all(text.frequency == ALL_WORDS[text.word] for text in texts)
        if kind == "word":
            assert all(text.token_ids == token_ids(text.word) for text in texts)
            assert all(len(text.token_ids) == tokens for text in texts)


def test_frequencies_are_matched(main_run: Run) -> None:
    """A group has as many words in each bin as every other: as many as the poorest, scaled down to 24 in all."""
    available = {tokens: Counter() for tokens in GROUPS}
    for word, frequency in ALL_WORDS.items():
        if (tokens := len(token_ids(word))) in available:
            available[tokens][math.floor(4 * math.log10(frequency))] += 1
    room = {index: min(counts[index] for counts in available.values()) for index in available[4]}
    drawn = []
    for tokens in GROUPS:
        bins = Counter(math.floor(4 * math.log10(text.frequency)) for text in main_run.texts()[tokens, "word"])
        drawn.append(bins)
    assert all(bins == drawn[0] for bins in drawn)
    assert drawn[0].total() == WORDS < sum(room.values())
    for index, count in room.items():
        assert abs(drawn[0][index] - count * WORDS / sum(room.values())) < 1


def test_recombined_strings_are_no_words(main_run: Run) -> None:
    texts = main_run.texts()
    tokens_of_words = {tuple(token_ids(word)) for word in ALL_WORDS}
    for tokens in (2, 3, 4):
        words, strings = texts[tokens, "word"], texts[tokens, "recombined"]
        assert [text.token_ids[-1] for text in strings] == [text.token_ids[-1] for text in words]
        beginnings = [sorted(text.token_ids[:-1] for text in of_kind) for of_kind in (words, strings)]
        assert beginnings[0] == beginnings[1]
        for text in strings:
            assert tuple(text.token_ids) not in tokens_of_words and text.word.strip() not in ALL_WORDS
            assert text.word == gpt_neox_tokenizer().decode(text.token_ids)
    assert (1, "recombined") not in texts


def test_recombined_strings_are_the_words_in_layer_0(main_run: Run) -> None:
    rows, half_way, contrasts = main_run.rows(), main_run.half_way(), main_run.contrasts()
    for tokens in (2, 3, 4):
        for step in STEPS:
            expected = rows[tokens, "word", step, 0]
            assert rows[tokens, "recombined", step, 0] == pytest.approx(expected, abs=2e-6, nan_ok=True)
        assert half_way[tokens, "recombined", 0] == pytest.approx(half_way[tokens, "word", 0], rel=1e-4)
        assert contrasts[tokens, "word", f"{tokens} recombined", 0] == pytest.approx(
            {"ratio": 1, "low": 1, "high": 1}, abs=1e-4
        )
        assert rows[tokens, "recombined", 4, 3]["centred"] != pytest.approx(rows[tokens, "word", 4, 3]["centred"])


def test_carried_words_end_at_one_position(main_run: Run) -> None:
    texts = main_run.texts()
    carrier = texts[1, "carried"][0].token_ids[:-1]
    assert f'CARRIER = "{gpt_neox_tokenizer().decode(carrier)}"' in SCRIPT.read_text(encoding="utf-8")
    for tokens in GROUPS:
        for word, carried in zip(texts[tokens, "word"], texts[tokens, "carried"], strict=True):
            assert (carried.word, carried.frequency) == (word.word, word.frequency)
            assert carried.token_ids == carrier[tokens - 1 :] + word.token_ids
            assert len(carried.token_ids) == len(carrier) + 1


def test_setting_of_the_study(miniature: Path, tmp_path: Path) -> None:
    """Bare words without <|endoftext|>, drawn at random: the frequencies are those of the groups, and differ."""
    family = link(miniature, tmp_path / "short", [1, 32])
    settings = {"PREPEND_BOS": False, "LEADING_SPACE": False, "MATCH_FREQUENCY": False, "KINDS": ("word",)}
    result = run(place(tmp_path / "here", GROUPS=(1, 3), WORDS_PER_GROUP=40, **settings), family)
    assert result.code == 0, result.err
    assert_like_naive(result, naive_run(result, family, [1, 32], prepend_bos=False), [1, 32])
    texts = result.texts()
    assert list(texts) == [(1, "word"), (3, "word")]
    for tokens in (1, 3):
        group = [word for word in ALL_WORDS if len(token_ids(word, leading_space=False)) == tokens]
        drawn = [group.index(text.word) for text in texts[tokens, "word"]]
        assert all(text.token_ids == token_ids(text.word, leading_space=False) for text in texts[tokens, "word"])
        assert len(set(drawn)) == 40 and drawn != sorted(drawn)
        assert 0.25 < np.mean(drawn) / len(group) < 0.75  # 0.5 is expected, with a standard error of 0.05
    assert result.contrasts() == {}
    assert_figures(result.results, [1, 3])


# ------------------------------------------------------------------------------ a planted truth


def test_planted_half_way_steps_are_found(planted_run: Run) -> None:
    assert planted_run.warnings() == ["words_list.json has 0 words of 4 tokens, fewer than MIN_GROUP_SIZE: left out"]
    rows, half_way = planted_run.rows(), planted_run.half_way()
    for (tokens, _, step, layer), row in rows.items():
        if layer == 0:
            share = PLANTED[tokens][PLANTED_STEPS.index(step)]
            assert row["similarity"] == pytest.approx(share, abs=2e-6)
            assert row["centred"] == pytest.approx(share, abs=2e-6)
            assert row["unrelated"] >= -1e-6
            assert (row["unrelated"] < 1e-6) == (tokens != 2 or share == 0)  # a shared last token, a shared state
    for (tokens, kind, layer), row in half_way.items():
        early = PLANTED[tokens] is EARLY
        if layer == 0:
            assert row["half_way_step"] == pytest.approx(HALF_WAY[tokens], rel=1e-4), kind
        assert (row["step_before"], row["step_after"]) == ((1, 3) if early else (7, 15))
        assert row["step_before"] < row["low"] <= row["half_way_step"] <= row["high"] < row["step_after"]


def test_contrast_finds_the_group_that_settles_later_and_no_other(planted_run: Run) -> None:
    contrasts = planted_run.contrasts()
    for layer in range(PLANTED_LAYERS):
        late, alike = contrasts[2, "carried", "1 carried", layer], contrasts[3, "carried", "1 carried", layer]
        assert late["low"] > 3
        assert alike["low"] < 1 < alike["high"] or alike["ratio"] == pytest.approx(1, abs=0.1)
    assert contrasts[2, "carried", "1 carried", 0]["ratio"] == pytest.approx(HALF_WAY[2] / HALF_WAY[1], rel=1e-4)
    assert contrasts[3, "carried", "1 carried", 0]["ratio"] == pytest.approx(1, abs=1e-4)
    assert re.search(r"2 tokens carried over 1 token carried .*: later", planted_run.out)


def test_intervals_allow_for_shared_last_tokens(planted_run: Run) -> None:
    """In the group of two tokens every last token is that of two words: over words, intervals would be √2 narrower."""
    rows, arrays = planted_run.rows(), planted_run.arrays()
    rng = np.random.default_rng(99)
    for tokens, step, expected in ((1, 1, 1), (2, 7, math.sqrt(2)), (3, 3, 1)):
        members = (arrays["tokens"] == tokens) & (arrays["kind"] == "word")
        values = arrays["similarity"][PLANTED_STEPS.index(step), 0, members]
        means = [rng.choice(values, WORDS).mean() for _ in range(4000)]
        row = rows[tokens, "word", step, 0]
        width = row["similarity_high"] - row["similarity_low"]
        assert width / np.ptp(np.quantile(means, [0.025, 0.975])) == pytest.approx(expected, rel=0.12)


# ------------------------------------------------------------------------------ families


def test_weights_in_any_format(miniature: Path, tmp_path: Path) -> None:
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

    result = run(place(tmp_path / "here", EASY, GROUPS=(1,), KINDS=("word",)), family)
    assert result.code == 0, result.err
    assert_like_naive(result, naive_run(result, miniature, STEPS), STEPS)


def test_single_checkpoint_and_single_group(miniature: Path, tmp_path: Path) -> None:
    """The family stands beside the script, under a name that is none of a shell's or of a formula's.

    One of the same name where the script is started is not meant, unless it is named on the command line: then it is
    refused, since the results under that name are another family's.
    """
    name = "Kinder, $\\ein$ Prüfstand"
    here = place(tmp_path / "a place ü", EASY, GROUPS=[1], CHECKPOINTS_DIR=name)
    family = link(miniature, here / name, [8])
    other = link(miniature, tmp_path / name, [0, 8])
    before = snapshot(family)
    result = run(here, cwd=tmp_path)._replace(results=here / "convergance_plots" / name)
    assert result.code == 0, result.err
    assert f"words    {len(ONE_TOKEN)} of 1 token\n" in result.out
    assert result.warnings() == ["a family of one checkpoint has no half-way steps"]
    assert "half-way" not in result.out
    layers = {f"layer_{layer:02d}.png" for layer in range(LAYERS)}
    assert {file.name for file in result.results.glob("*.png")} == layers | {"overview.png", "group_1_tokens.png"}
    rows = result.rows()
    assert list(rows) == [(1, kind, 8, layer) for kind in ("word", "carried") for layer in range(LAYERS)]
    for row in rows.values():
        assert row["similarity"] == pytest.approx(1, abs=1e-6) and row["centred"] == pytest.approx(1, abs=1e-6)
        assert np.isnan(row["stability"])
    assert result.half_way() == result.contrasts() == {}
    assert {text.word for text in result.texts()[1, "word"]} == set(ONE_TOKEN)
    assert snapshot(family) == before
    assert {file.name for file in here.iterdir()} == {SCRIPT.name, WORDS_FILE.name, "convergance_plots", name}
    assert [folder.name for folder in (here / "convergance_plots").iterdir()] == [name]

    before = snapshot(result.results)
    line = error_line(run(here, name, cwd=tmp_path))
    assert str(family) in line and str(other) in line and str(result.results) in line
    assert snapshot(result.results) == before


def test_checkpoints_that_share_weights_are_named(miniature: Path, tmp_path: Path) -> None:
    """Faults of published families, and one that is none: whole copies, first shards, embeddings only.

    step1 differs from step16 in one weight of the last block.
    """
    family = link(miniature, tmp_path / "faulty", {0: 0, 1: 16, 2: 2, 4: 4, 8: 8, 12: 8, 16: 16, 32: 32})
    weights = {step: load_file(family / f"step{step}" / "model.safetensors") for step in (0, 1, 2, 4, 32)}
    nearly = weights[1]
    nearly["gpt_neox.layers.5.mlp.dense_4h_to_h.weight"][-1, -1] += 0.5
    embedding = {name: tensor for name, tensor in weights[0].items() if "embed_in" in name}
    shard = {name: tensor for name, tensor in weights[32].items() if re.search(r"embed_in|layers\.[012]\.", name)}
    for step, content in ((1, nearly), (2, weights[2] | embedding), (4, weights[4] | shard)):
        write(family / f"step{step}" / "model.safetensors", content)
    write(family / "step12" / "model.safetensors", (miniature / "step8" / "model.safetensors").read_bytes())
    result = run(place(tmp_path / "here", EASY, GROUPS=(1,), KINDS=("word",)), family)
    assert result.code == 0, result.err
    found = {}
    for warning in result.warnings():
        earlier, later, extent = re.match(
            r"steps (\d+) and (\d+) have the same hidden states (.*?): so far", warning
        ).groups()
        found[int(earlier), int(later)] = extent
    assert found == {
        (0, 2): "up to layer 0 of 6",
        (1, 16): "up to layer 5 of 6",
        (4, 32): "up to layer 3 of 6",
        (8, 12): "in all layers",
    }
    rows = result.rows()
    for layer in range(LAYERS):
        copy, original = rows[1, "word", 12, layer], rows[1, "word", 8, layer]
        assert copy["stability"] == pytest.approx(1, abs=2e-6)
        assert all(copy[name] == original[name] for name in COLUMNS if name != "stability")


# ------------------------------------------------------------------------------ what is kept and continued


def test_nothing_is_measured_twice_when_a_figure_changes(
    planted: tuple[Path, dict[str, int]], planted_run: Run, tmp_path: Path
) -> None:
    here = continued(planted_run, tmp_path, planted[1])
    edit_script(here, 'axes.set_xlabel\\("training step"\\)\n        axes.set_ylabel', "axes.set_ylabel")
    figure = here / "convergance_plots" / "planted" / "group_1_tokens.png"
    before = figure.read_bytes()
    (figure.parent / "overview.png").unlink()
    result = run(here, planted[0])
    assert result.code == 0 and result.to_measure() == 0, result.err
    assert "batch/s" not in result.err
    assert result.kept() == planted_run.kept()
    assert result.tables() == planted_run.tables()
    assert figure.read_bytes() != before
    assert_figures(result.results, PLANTED, PLANTED_LAYERS)


def test_a_changed_formula_is_measured_again(
    planted: tuple[Path, dict[str, int]], planted_run: Run, tmp_path: Path
) -> None:
    """In a measuring function, and in one that it calls: the second run changes that one alone."""
    here = continued(planted_run, tmp_path, planted[1])
    edit_script(here, r'"unrelated": ', '"unrelated": shift() + ')
    edit_script(here, r"def compare\(", "def shift() -> float:\n    return 0.5\n\n\ndef compare(")
    kept, earlier = planted_run.kept(), planted_run.rows()
    for shift in (0.5, 0.25):
        edit_script(here, r"return 0\.5", f"return {shift}")
        result = run(here, planted[0])
        assert result.code == 0, result.err
        assert result.to_measure() == len(PLANTED_STEPS) and not kept.keys() & result.kept().keys()
        for key, row in result.rows().items():
            assert row["unrelated"] == pytest.approx(earlier[key]["unrelated"] + shift, abs=2e-6)
            assert row["centred"] == earlier[key]["centred"]
        kept = result.kept()


def test_only_what_changed_is_measured_again(
    planted: tuple[Path, dict[str, int]], planted_run: Run, tmp_path: Path
) -> None:
    """Changed weights, an added copy, and kept files that are cut, empty, or of wrong shapes: those and their next."""
    family = link(planted[0], tmp_path / "changed", {**{step: step for step in PLANTED_STEPS}, 20: 15})
    file = family / "step1" / "model.safetensors"
    noise = torch.Generator().manual_seed(1)
    weights = load_file(file)
    write(file, {name: tensor + 0.01 * torch.randn(tensor.shape, generator=noise) for name, tensor in weights.items()})
    here = continued(planted_run, tmp_path / "here", planted[1], family="changed")
    kept = here / "convergance_plots" / "changed" / "kept"
    files = {int(re.match(r"step(\d+)-", file.name)[1]): file for file in kept.glob("step*.npz")}
    write(files[7], files[7].read_bytes()[:3000])
    write(files[15], b"")
    with np.load(files[0]) as arrays:
        np.savez(files[0], **{name: array[:, :-1] for name, array in arrays.items()})

    result = run(here, family)
    assert result.code == 0, result.err
    again = {0, 1, 3, 7, 15, 20}  # the checkpoint before step31 is another, of the same weights
    assert measured_again(planted_run, result) == again and result.to_measure() == len(again)
    assert len(result.kept()) == 7  # what no longer applies is gone
    rows, before = result.rows(), planted_run.rows()
    for (tokens, kind, step, layer), row in before.items():
        found = rows[tokens, kind, step, layer]
        if step == 1:
            assert found["similarity"] != row["similarity"]
        elif step != 3:
            assert found == pytest.approx(row, abs=2e-6, nan_ok=True)
        if step == 15:
            assert rows[tokens, kind, 20, layer]["centred"] == found["centred"]
            assert rows[tokens, kind, 20, layer]["stability"] == pytest.approx(1, abs=2e-6)
    copies = [warning for warning in result.warnings() if warning.startswith("steps ")]
    assert len(copies) == 1 and copies[0].startswith("steps 15 and 20 have the same hidden states in all layers")
    steps = [0, 1, 3, 7, 15, 20, 31]
    assert_like_naive(result, naive_run(result, family, steps), steps)


def test_fewer_groups_and_files_of_the_user(
    planted: tuple[Path, dict[str, int]], planted_run: Run, tmp_path: Path
) -> None:
    """The group of three tokens cannot be matched: it is named, its figure vanishes, and nothing of the user's."""
    words = {}
    for word, frequency in planted[1].items():
        if len(token_ids(word)) < 3:
            words[word] = frequency
        elif len(words) < 2 * WORDS + 12:
            words[word] = 1000 * frequency
    here = continued(planted_run, tmp_path, words)
    results = here / "convergance_plots" / "planted"
    own = [results / "layer_by_layer_notes.png", results / "group_x.png", results / "kept" / "notes.txt"]
    for file in own:
        file.write_text("mine", encoding="utf-8")
    assert (results / "group_3_tokens.png").is_file()
    result = run(here, planted[0])
    assert result.code == 0, result.err
    unmatched = [warning for warning in result.warnings() if "3 tokens" in warning]
    assert len(unmatched) == 1 == len(result.warnings()) - 1
    assert "left out" in unmatched[0] and "MATCH_FREQUENCY" in unmatched[0]
    assert all(file.read_text(encoding="utf-8") == "mine" for file in own)
    for file in own:
        file.unlink()
    assert_figures(result.results, [1, 2], PLANTED_LAYERS)
    assert measured_again(planted_run, result) == set(PLANTED_STEPS)
    assert len(result.kept()) == len(PLANTED_STEPS)
    before = planted_run.rows()
    for key, row in result.rows().items():
        names = [name for name in COLUMNS if key[1] != "recombined" or key[3] == 0]
        assert [row[name] for name in names] == pytest.approx(
            [before[key][name] for name in names], nan_ok=True, abs=1e-5
        )


def test_changed_type_is_measured_again(planted: tuple[Path, dict[str, int]], planted_run: Run, tmp_path: Path) -> None:
    result = run(continued(planted_run, tmp_path, planted[1], DTYPE="bfloat16"), planted[0])
    assert result.code == 0, result.err
    assert ", bfloat16\n" in result.out
    assert measured_again(planted_run, result) == set(PLANTED_STEPS)
    difference = np.abs(result.arrays()["similarity"] - planted_run.arrays()["similarity"])
    assert 1e-6 < difference.max() < 0.02


# ------------------------------------------------------------------------------ the packing


AWKWARD = dict.fromkeys(
    [
        *("a", "an", "ant", "anti", "antic", "../../", "./", "naïve", "naive", "é", "日本", "<|endoftext|>", "q"),
        *(unicodedata.normalize("NFD", word) for word in ("naïve", "é")),
        *("q-", "../../evil", "..\\evil", "q-q-", "antidisestablishment", "q-q-q", "q-q-r", "q-r-q", "q-q-q-q-q"),
        *("b", "an-", "./q", "q/r", "r-q", "anti-q", "q-q-a", "a-b-a", "a-b-", "r-q-"),
        *(f"{'q-' * 126}q-{letter}" for letter in "qrab"),  # as long as the model has positions
    ],
    1,
)
AWKWARD_GROUPS = (255, 1, 2, 4, 5)


@pytest.fixture(scope="module")
def awkward(miniature: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """A family, and a run on AWKWARD with batches so small that they cut the trees, and that one text fills many."""
    folder = tmp_path_factory.mktemp("awkward")
    family = link(miniature, folder / "short", [1, 32])
    settings = {"GROUPS": AWKWARD_GROUPS, "WORDS_PER_GROUP": None, "MIN_GROUP_SIZE": 4, "BATCH_TOKENS": 7}
    settings |= {"KINDS": ("word",), "LEADING_SPACE": False, "MATCH_FREQUENCY": False}
    return family, run(place(folder / "here", AWKWARD, **settings), family)


def test_packing_is_exact_on_awkward_words(awkward: tuple[Path, Run]) -> None:
    family, result = awkward
    assert result.code == 0, result.err
    assert_like_naive(result, naive_run(result, family, [1, 32]), [1, 32])


def test_awkward_words_are_awkward(awkward: tuple[Path, Run]) -> None:
    arrays = awkward[1].arrays()
    words = arrays["words"].tolist()
    sequences = [token_ids(word, leading_space=False) for word in words]
    sizes = {word: len(token_ids(word, leading_space=False)) for word in AWKWARD}
    assert set(words) == {word for word, size in sizes.items() if size in AWKWARD_GROUPS} < set(AWKWARD)
    assert sum(long[: len(short)] == short for long in sequences for short in sequences if short != long) > 10
    for word in ("naïve", "é"):  # the tokenizer composes: both spellings are there, and are the same tokens
        composed, decomposed = words.index(word), words.index(unicodedata.normalize("NFD", word))
        assert sequences[composed] == sequences[decomposed]
        assert (arrays["similarity"][..., composed] == arrays["similarity"][..., decomposed]).all()
    assert set(arrays["tokens"].tolist()) == set(AWKWARD_GROUPS)


def test_words_never_become_paths(awkward: tuple[Path, Run]) -> None:
    family, result = awkward
    assert {folder.name for folder in family.parent.iterdir()} == {"short", "here"}
    assert not [file for file in family.parent.rglob("*") if "evil" in file.name]
    here = {file.name for file in result.results.parents[1].iterdir()}
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
        ("transposed tensor", ["layers.3.mlp.dense_4h_to_h.weight", "[256, 64]", "[64, 256]"]),
        ("another width", ["hidden_size is 32", "step32", "64"]),
        ("another architecture", ["gpt2", "gpt_neox"]),
        ("another tokenizer", ["its tokenizer is not that of step32"]),
        ("no shard", ["model-00001-of-00001.safetensors"]),
        ("broken config", [""]),
        ("empty safetensors", ["header"]),
        ("integers", ["embed_in.weight", "While copying the parameter"]),
    ]


def test_every_unusable_checkpoint_is_named(miniature: Path, tmp_path: Path) -> None:
    faults = break_checkpoints(miniature, tmp_path / "broken")
    here = place(tmp_path / "here", EASY)
    before = snapshot(here)
    line = error_line(run(here, tmp_path / "broken"))
    assert line.startswith("error: fetch or train again, or remove, what cannot be used: ")
    found = re.split(rf"{tmp_path}/broken/step(\d+): ", line)[1:]
    assert [int(step) for step in found[::2]] == list(range(len(faults)))
    for (name, parts), text in zip(faults, found[1::2], strict=True):
        assert text.strip("; "), name
        for part in parts:
            assert part in text, (name, text)
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
    assert sorted(name.split("-")[0] for name in result.kept()) == ["step0", "step1", "step2"]
    assert not (result.results / "convergence.csv").exists()


@pytest.mark.parametrize(
    ("words", "settings", "parts"),
    [
        (EASY, {"KINDS": ("word", "spoken")}, ["KINDS = ('word', 'spoken')", '"recombined"', '"carried"']),
        (None, {"CARRIER": "So it is"}, ["CARRIER", "3 tokens", "words 4"]),
        ("closed", {"GROUPS": (2,), "MIN_GROUP_SIZE": 4}, ["recombine", "2 tokens", "KINDS"]),
    ],
    ids=["unknown_kind", "short_carrier", "no_recombination"],
)
def test_settings_that_the_words_do_not_allow(
    planted: tuple[Path, dict[str, int]], tmp_path: Path, words: object, settings: dict, parts: list[str]
) -> None:
    if words == "closed":  # every beginning with every ending is a word
        words = {beginning + ending: 5 for beginning in ("./", "../../") for ending in ("q", "r")}
        settings = settings | {"LEADING_SPACE": False}
    line = error_line(run(place(tmp_path, words, **settings), planted[0]))
    for part in parts:
        assert part in line
    assert not list(tmp_path.rglob("*.npz"))


def test_help(tmp_path: Path) -> None:
    result = run(place(tmp_path), "--help")
    assert result.code == 0 and result.err == ""
    for part in ("[family]", "CHECKPOINTS_DIR", "torchrun", "similarity", "centred", "recombined", "convergence.csv"):
        assert part in result.out

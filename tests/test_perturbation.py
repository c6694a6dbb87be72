"""multitoken_context_perturbation.py, run as a user runs it on a trained miniature, against a naive computation."""

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
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from miniature import TOKENIZER_FILE
from PIL import Image
from safetensors.torch import load_file
from test_convergence import cosine, gpt_neox_tokenizer, link, write
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, GPTNeoXModel

SCRIPT = Path(__file__).resolve().parents[1] / "multitoken_context_perturbation.py"
SCRIPT_TEXT = SCRIPT.read_text(encoding="utf-8")
CONTEXTS_FILE = SCRIPT.with_name("multitoken_words_contexts.json")
ENTRIES = json.loads(CONTEXTS_FILE.read_text(encoding="utf-8"))
STEPS = [0, 1, 2, 4, 8, 16, 32]
SHORT = [1, 32]  # the steps of the smaller runs
LAYERS = 7  # with the token embedding
COSINES = ("P1", "P2", "P12", "unrelated")
MEANS = ("P1", "P2", "P12", "P1-P2", "word_share", "context_share")
SHARES = ("word_share", "context_share")
PEAK = ("layer", "layer_low", "layer_high", "gain", "gain_low", "gain_high")
TABLES = ("perturbation.csv", "perturbation_mean.csv", "peaks.csv")
FIGURES = {"shares.png", "peaks.png", "overview.png", "mean_all.png"}
KEPT_NAME = r"step(\d+)-[0-9a-f]{16}\.npz"


def token_ids(text: str) -> list[int]:
    return gpt_neox_tokenizer().encode(text, add_special_tokens=False).ids


def size(word: str) -> int:
    return len(token_ids(" " + word))


def last_token(word: str) -> int:
    return token_ids(" " + word)[-1]


def choose_entries() -> dict[str, dict[str, list[str]]]:
    """Four words each of 2, 3 and 4 tokens: two that share a last token, where there are any, then the first others.

    Perturbed versions of another length, which the script would leave out, are left out here already.
    """
    chosen = {}
    for tokens in (2, 3, 4):
        candidates = {}
        for word, entry in ENTRIES.items():
            perturbed = [text for text in entry["replaced_sentences"] if size(text.split()[-1]) == tokens]
            if size(word) == tokens and perturbed:
                candidates[word] = {"sentences": entry["sentences"], "replaced_sentences": perturbed}
        commonest, _ = Counter(map(last_token, candidates)).most_common(1)[0]
        twins = [word for word in candidates if last_token(word) == commonest][:2]
        others = [word for word in candidates if word not in twins]
        chosen |= {word: candidates[word] for word in [*twins, *others][:4]}
    return chosen


DOZEN = choose_entries()


class Run(NamedTuple):
    code: int
    out: str
    err: str
    results: Path

    def to_measure(self) -> int:
        return int(re.search(r"\((\d+) of \d+ to measure\)", self.out)[1])

    def warnings(self) -> list[str]:
        return [line.removeprefix("warning: ") for line in self.err.splitlines() if "warning" in line.lower()]

    def rows(self) -> dict[tuple[str, int, int, int], dict[str, float]]:
        """{(word, tokens, step, layer): {name: value}} of perturbation.csv; an empty value is NaN."""
        rows = {}
        for line in read_csv(self.results / "perturbation.csv"):
            key = line["word"], int(line["tokens"]), int(line["step"]), int(line["layer"])
            rows[key] = {name: float(line[name] or "nan") for name in COSINES}
        return rows

    def profiles(self) -> dict[str, np.ndarray]:
        """The same as float64 (steps, layers + 1, words) for each name."""
        rows = self.rows()
        shape = [len(dict.fromkeys(key[part] for key in rows)) for part in (0, 2, 3)]
        profiles = {}
        for name in COSINES:
            profiles[name] = np.moveaxis(np.reshape([row[name] for row in rows.values()], shape), 0, -1)
        return profiles

    def means(self) -> dict[tuple[str, int, int, int], dict[str, float]]:
        """{(tokens, words, step, layer): {column: value}} of perturbation_mean.csv; an empty value is NaN."""
        means = {}
        for line in read_csv(self.results / "perturbation_mean.csv"):
            key = line.pop("tokens"), int(line.pop("words")), int(line.pop("step")), int(line.pop("layer"))
            means[key] = {name: float(value or "nan") for name, value in line.items()}
        return means

    def peaks(self) -> dict[tuple[str, int, int], dict[str, float]]:
        """{(tokens, words, step): {column: value}} of peaks.csv; an empty value is NaN."""
        peaks = {}
        for line in read_csv(self.results / "peaks.csv"):
            key = line["tokens"], int(line["words"]), int(line["step"])
            peaks[key] = {name: float(line[name] or "nan") for name in PEAK}
        return peaks

    def tables(self) -> list[bytes]:
        return [(self.results / name).read_bytes() for name in TABLES]

    def kept_file(self, step: int) -> Path:
        [file] = (self.results / "kept").glob(f"step{step}-*.npz")
        return file

    def arrays(self, step: int) -> dict[str, np.ndarray]:
        """What a checkpoint contributed: float (layers + 1, words) each."""
        with np.load(self.kept_file(step)) as arrays:
            return dict(arrays)

    def kept(self) -> dict[int, tuple[str, int]]:
        """{step: (name of its kept file, time at which it was written)}."""
        files = {}
        for file in (self.results / "kept").iterdir():
            if match := re.fullmatch(KEPT_NAME, file.name):
                files[int(match[1])] = file.name, file.stat().st_mtime_ns
        return files

    def figures(self) -> set[str]:
        return {str(file.relative_to(self.results)) for file in self.results.rglob("*.png")}


def read_csv(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def place(folder: Path, contexts: object = DOZEN, **settings: object) -> Path:
    """Puts a copy of the script, with some constants set, and a file of contexts into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    text = SCRIPT_TEXT
    for name, value in ({"WORDS_TO_PLOT": 0, "BOOTSTRAP_RESAMPLES": 200} | settings).items():
        text, count = re.subn(rf"(?m)^{name} = .*$", lambda _, line=f"{name} = {value!r}": line, text)
        assert count == 1, name
    (folder / SCRIPT.name).write_text(text, encoding="utf-8")
    text = contexts if isinstance(contexts, str) else json.dumps(contexts)
    (folder / CONTEXTS_FILE.name).write_text(text, encoding="utf-8")
    return folder


def edit_function(folder: Path, name: str, old: str, new: str) -> None:
    """Changes the first `old` in the source of the placed script's function."""
    text = (folder / SCRIPT.name).read_text(encoding="utf-8")
    source = re.search(rf"(?ms)^def {name}\(.*?(?=^\S*def )", text)[0]
    assert old in source
    text = text.replace(source, source.replace(old, new, 1))
    (folder / SCRIPT.name).write_text(text, encoding="utf-8")


def start(folder: Path, *arguments: object, launcher: Iterable[str] = ()) -> subprocess.Popen:
    """Starts the script from another directory than its own, with the threads that torchrun gives a rank."""
    threads = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(folder / SCRIPT.name), *map(str, arguments)]
    return subprocess.Popen(command, cwd="/", env=threads, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(folder: Path, *arguments: object, launcher: Iterable[str] = ()) -> Run:
    process = start(folder, *arguments, launcher=launcher)
    out, err = process.communicate(timeout=300)
    assert "Traceback" not in out + err, err
    family = Path(str(arguments[0])).name if arguments else ""
    return Run(process.returncode, out, err, folder / "multitoken_words_plots" / family)


# ------------------------------------------------------------------------------ by the book


def naive_states(folder: Path, texts: set[str], prepend_bos: bool) -> dict[str, np.ndarray]:
    """The hidden states at the last token of each text, one text at a time: float64 (layers + 1, width)."""
    model = GPTNeoXForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    start = [gpt_neox_tokenizer().token_to_id("<|endoftext|>")] if prepend_bos else []
    states = {}
    torch.set_num_threads(1)  # as many as the scripts have
    with torch.inference_mode():
        for text in texts:
            sequence = torch.tensor([start + token_ids(text)])
            layers = model(sequence, logits_to_keep=1, output_hidden_states=True).hidden_states
            states[text] = np.array([layer[0, -1].numpy() for layer in layers])
    return states


def mean_cosine(states: dict[str, np.ndarray], pairs: Iterable[tuple[str, str]]) -> np.ndarray:
    """By layer; NaN without pairs."""
    cosines = [cosine(states[left], states[right]) for left, right in pairs]
    return sum(cosines) / len(cosines) if cosines else np.full(LAYERS, np.nan)


def naive_profiles(
    family: Path, steps: list[int], entries: dict[str, dict[str, list[str]]], prepend_bos: bool = True
) -> dict[str, np.ndarray]:
    """P1, P2, P12 and unrelated of each word: float64 (steps, layers + 1, words) each."""
    texts = {text for entry in entries.values() for kind in entry.values() for text in kind}
    profiles = {name: [] for name in COSINES}
    for step in steps:
        states = naive_states(family / f"step{step}", texts, prepend_bos)
        of_step = {name: [] for name in COSINES}
        for word, entry in entries.items():
            base, *contexts = entry["sentences"]
            perturbed = entry["replaced_sentences"]
            other_bases = [other["sentences"][0] for name, other in entries.items() if name != word]
            of_step["P1"].append(mean_cosine(states, [(base, text) for text in contexts]))
            of_step["P2"].append(mean_cosine(states, [(base, text) for text in perturbed]))
            of_step["P12"].append(mean_cosine(states, itertools.product(contexts, perturbed)))
            of_step["unrelated"].append(mean_cosine(states, [(base, other) for other in other_bases]))
        for name, by_word in of_step.items():
            profiles[name].append(np.transpose(by_word))
    return {name: np.array(by_step) for name, by_step in profiles.items()}


def mean_over_words(values: np.ndarray, words: np.ndarray) -> np.ndarray:
    return values[..., words].mean(-1) if len(words) else np.full(values.shape[:-1], np.nan)


def naive_means(
    profiles: dict[str, np.ndarray], words: Iterable[int], least_varying: float = 1e-4
) -> dict[str, np.ndarray]:
    """The columns of perturbation_mean.csv over some words, without intervals: float64 (steps, layers + 1) each.

    A word may be there repeatedly. Where less than least_varying varies there are no shares.
    """
    words = np.array(words, dtype=int)
    without = {name: np.isnan(profiles[name][0, 0, words]) for name in ("P1", "P2")}
    both = words[~without["P1"] & ~without["P2"]]
    P1, P2, P12 = (mean_over_words(profiles[name], both) for name in ("P1", "P2", "P12"))
    varying = 1 - P12
    varying[varying < least_varying] = np.nan
    return {
        "P1": mean_over_words(profiles["P1"], words[~without["P1"]]),
        "P2": mean_over_words(profiles["P2"], words[~without["P2"]]),
        "P12": P12,
        "P1-P2": P1 - P2,
        "word_share": (P1 - P12) / varying,
        "context_share": (P2 - P12) / varying,
        "unrelated": mean_over_words(profiles["unrelated"], words),
    }


def group_words(words: list[str]) -> dict[str, list[int]]:
    """The places of the words with each number of tokens, and of all."""
    groups = {}
    for tokens in sorted(set(map(size, words))):
        groups[str(tokens)] = [place for place, word in enumerate(words) if size(word) == tokens]
    return groups | {"all": list(range(len(words)))}


def assert_like_naive(run: Run, steps: list[int], words: list[str], naive: dict[str, np.ndarray]) -> None:
    """Every value of the three tables is what the naive computation gives, to 1e-5, and in the same order.

    A share is that exact times 1 - P12, its denominator.
    """
    keys = itertools.product(words, steps, range(LAYERS))
    assert list(run.rows()) == [(word, size(word), step, layer) for word, step, layer in keys]
    for name, values in run.profiles().items():
        np.testing.assert_allclose(values, naive[name], atol=1e-5, rtol=0, err_msg=name)

    groups, means, peaks = group_words(words), run.means(), run.peaks()
    keys = itertools.product(groups, steps, range(LAYERS))
    assert list(means) == [(group, len(groups[group]), step, layer) for group, step, layer in keys]
    keys = itertools.product(list(groups)[:-1], steps[1:])
    assert list(peaks) == [(group, len(groups[group]), step) for group, step in keys]
    for group, members in groups.items():
        expected = naive_means(naive, members)
        for index, step in enumerate(steps):
            tolerance = 1e-5 / np.fmax(1 - expected["P12"][index], 1e-4)  # of the shares
            own = [means[group, len(members), step, layer] for layer in range(LAYERS)]
            for name, values in expected.items():
                found = [row[name] for row in own]
                allowed = tolerance if name in SHARES else 1e-5
                close = np.abs(found - values[index]) <= allowed
                both_empty = np.isnan(found) & np.isnan(values[index])
                at_threshold = np.abs(1 - expected["P12"][index] - 1e-4) < 2e-6
                assert np.all(close | both_empty | (at_threshold & (name in SHARES))), (group, step, name)
            if step == steps[0] or group == "all":
                continue
            gain = expected["word_share"][index] - expected["word_share"][0]
            peak = peaks[group, len(members), step]
            if np.isnan(gain).all():
                assert all(np.isnan(value) for value in peak.values())
            else:  # layers that are as high as the highest, but for rounding, may stand for it
                assert peak["gain"] == pytest.approx(np.nanmax(gain), abs=2 * np.nanmax(tolerance[1:]))
                assert gain[int(peak["layer"])] == pytest.approx(peak["gain"], abs=2 * np.nanmax(tolerance[1:]))


def assert_figures(run: Run, sizes: Iterable[int], words: int, faint: Iterable[str] = ()) -> None:
    """The figures of these numbers of tokens and of so many words are there.

    Something is drawn on each, but for the faint ones.
    """
    figures = run.figures()
    drawn = {name for name in figures if re.fullmatch(r"words/\d+_tokens_.+\.png", name)}
    assert figures - drawn == FIGURES | {f"mean_{tokens}_tokens.png" for tokens in sizes}
    assert len(drawn) == words and len(list((run.results / "words").iterdir())) == words
    for name in figures:
        pixels = np.asarray(Image.open(run.results / name).convert("RGB")).astype(int)
        assert min(pixels.shape[:2]) >= 300, name
        coloured = np.ptp(pixels, axis=-1) > 40
        assert coloured.mean() > 0.002 or name in faint, name


@pytest.fixture(scope="module")
def main_run(miniature: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A dozen words at all steps: what most tests look at or start from."""
    return run(place(tmp_path_factory.mktemp("main"), WORDS_TO_PLOT=3), miniature)


@pytest.fixture(scope="module")
def short(miniature: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return link(miniature, tmp_path_factory.mktemp("families") / "short", SHORT)


def continued(main_run: Run, folder: Path, family: Path, contexts: object = DOZEN, **settings: object) -> Path:
    """Places the script beside the results of the main run, times of files included, as if they were the family's."""
    results = folder / "multitoken_words_plots" / family.name
    shutil.copytree(main_run.results, results)
    record = json.loads((results / "kept" / "run.json").read_text(encoding="utf-8"))
    (results / "kept" / "run.json").write_text(json.dumps(record | {"family": str(family)}), encoding="utf-8")
    return place(folder, contexts, **settings)


# ------------------------------------------------------------------------------ what a run leaves


def test_choice_of_words() -> None:
    """The dozen is worth testing with: three sizes, and some last tokens that are shared."""
    assert list(map(size, DOZEN)) == [2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4]
    assert 4 <= len(set(map(last_token, DOZEN))) < len(DOZEN)
    assert all(len(entry["sentences"]) >= 3 for entry in DOZEN.values())


def test_run_says_what_it_does(main_run: Run, miniature: Path) -> None:
    assert main_run.code == 0, main_run.err
    sentences = {text for entry in DOZEN.values() for kind in entry.values() for text in kind}
    said, answer = main_run.out.split("peak of the word share")
    *lines, device = said.splitlines()
    assert lines == [
        f"family   {miniature}",
        "steps    0, 1, 2, 4, 8, 16, 32 (7 of 7 to measure)",
        "words    4 of 2 tokens, 4 of 3 tokens, 4 of 4 tokens",
        f"texts    {len(sentences)} sentences",
    ]
    assert re.fullmatch(r"device   (cpu|cuda:0|mps:0), float32", device)
    assert answer.splitlines()[-1] == f"results  {main_run.results}"
    assert "warning" not in main_run.err.lower() and "error" not in main_run.err.lower()
    assert re.search(r"step ?\d+: .*batch/s", main_run.err) and "figures: 100%" in main_run.err


def test_answer_is_that_of_the_peaks(main_run: Run) -> None:
    """The last lines say, for each number of tokens, where and when the peak is highest, and where it ends."""
    head, *lines, _ = main_run.out[main_run.out.index("peak of") :].splitlines()
    assert head == "peak of the word share above step 0, with 95 % intervals"
    expected = []
    for tokens in ("2", "3", "4"):
        peaks = {step: peak for (group, _, step), peak in main_run.peaks().items() if group == tokens}
        for when, step in (("highest", max(peaks, key=lambda step: peaks[step]["gain"])), ("at the end", 32)):
            peak = peaks[step]
            height = f"{peak['gain']:.2f} [{peak['gain_low']:.2f}, {peak['gain_high']:.2f}]"
            where = f"layer {peak['layer']:.0f} [{peak['layer_low']:.0f}, {peak['layer_high']:.0f}]"
            expected.append(f"{tokens} tokens {when} step {step} {height} in {where}")
    assert [" ".join(line.split()) for line in lines] == expected


def test_files(main_run: Run) -> None:
    assert_figures(main_run, [2, 3, 4], words=3)
    names = {f"words/{size(word)}_tokens_{word}.png" for word in DOZEN}
    assert {name for name in main_run.figures() if "words/" in name} <= names
    figures = {name for name in main_run.figures() if "words/" not in name}
    assert {file.name for file in main_run.results.iterdir()} == {*TABLES, *figures, "words", "kept"}
    kept = {file.name for file in (main_run.results / "kept").iterdir()}
    assert kept == {"run.json", *(name for name, _ in main_run.kept().values())}
    assert set(main_run.kept()) == set(STEPS)
    here = main_run.results.parents[1]
    assert {file.name for file in here.iterdir()} == {SCRIPT.name, CONTEXTS_FILE.name, "multitoken_words_plots"}
    assert [folder.name for folder in (here / "multitoken_words_plots").iterdir()] == ["miniature"]


def test_tables_have_a_row_for_each_word_or_group_step_and_layer(main_run: Run) -> None:
    words, means, peaks = (table.decode().split("\n") for table in main_run.tables())
    assert words[0] == "word,tokens,step,layer,P1,P2,P12,unrelated" and words[-1] == ""
    columns = [f"{name}{end}" for name in MEANS for end in ("", "_low", "_high")]
    assert means[0] == f"tokens,words,step,layer,{','.join(columns)},unrelated" and means[-1] == ""
    assert peaks[0] == f"tokens,words,step,{','.join(PEAK)}" and peaks[-1] == ""
    number = r"(,-?\d\.\d{6})"
    assert all(re.fullmatch(rf"[^,]+,[2-4],\d+,[0-6]{number}{{4}}", line) for line in words[1:-1])
    shares = f"(,,,,,,|{number}{{6}})"
    assert all(
        re.fullmatch(rf"([2-4]|all),(4|12),\d+,[0-6]{number}{{12}}{shares}{number}", line) for line in means[1:-1]
    )
    assert all(re.fullmatch(rf"[2-4],4,\d+{number}{{6}}", line) for line in peaks[1:-1])
    assert len(words) - 2 == len(DOZEN) * len(STEPS) * LAYERS
    assert len(means) - 2 == 4 * len(STEPS) * LAYERS
    assert len(peaks) - 2 == 3 * (len(STEPS) - 1)


def test_values_are_those_of_the_naive_computation(main_run: Run, miniature: Path) -> None:
    assert_like_naive(main_run, STEPS, list(DOZEN), naive_profiles(miniature, STEPS, DOZEN))


def test_token_embeddings_are_the_same(main_run: Run) -> None:
    """In layer 0 all sentences of a word are one vector: nothing varies, so there are no shares."""
    for step in STEPS:
        for name in ("P1", "P2", "P12"):
            values = main_run.arrays(step)[name]
            assert np.abs(values[0] - 1).max() < 1e-6
            assert step > 2 or values[1:].max() < 1 - 1e-5  # later, the young model's states are all but one
    for (*_, layer), row in main_run.rows().items():
        assert layer > 0 or row["unrelated"] < 0.9
    for (*_, step, layer), row in main_run.means().items():
        varying = 1 - row["P12"]
        assert step > 2 or (varying > 1e-4) == (layer > 0)
        if abs(varying - 1e-4) > 2e-6:
            for name in SHARES:
                assert all(np.isnan(row[name + end]) == (varying < 1e-4) for end in ("", "_low", "_high"))


def test_a_shared_last_token_brings_sentences_together(main_run: Run) -> None:
    for (tokens, *_), row in main_run.means().items():
        if tokens == "all":
            assert min(row["P1"], row["P2"], row["P12"]) > row["unrelated"]


@pytest.fixture(scope="module")
def packed(short: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Runs without <|endoftext|>, in small and in large batches."""
    folder = tmp_path_factory.mktemp("packed")
    return [run(place(folder / str(size), PREPEND_BOS=False, BATCH_TOKENS=size), short) for size in (7, 4096)]


def test_sentence_is_read_as_prepend_bos_says(packed: list[Run], main_run: Run, short: Path) -> None:
    naive = naive_profiles(short, SHORT, DOZEN, prepend_bos=False)
    assert packed[0].code == 0, packed[0].err
    assert_like_naive(packed[0], SHORT, list(DOZEN), naive)
    assert all(np.abs(main_run.arrays(1)[name] - packed[0].arrays(1)[name]).max() > 1e-3 for name in COSINES)


def test_batches_do_not_change_the_values(packed: list[Run]) -> None:
    small, large = packed
    assert large.code == 0, large.err
    for step, name in itertools.product(SHORT, COSINES):
        np.testing.assert_allclose(large.arrays(step)[name], small.arrays(step)[name], atol=1e-5, rtol=0)


def test_two_ranks_give_the_same_tables(main_run: Run, miniature: Path, tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = run(place(tmp_path), miniature, launcher=launcher)
    assert result.code == 0, result.err
    assert ", 2 ranks" in result.out and result.out.count("results") == 1
    assert result.tables() == main_run.tables()
    assert set(result.kept()) == set(STEPS)


# ------------------------------------------------------------------------------ intervals

KIN = [  # words of two tokens; those in a line share the second
    ["lighthouse", "farmhouse", "penthouse", "clubhouse"],
    ["turtles", "pickles", "castles", "beetles"],
    ["batsman", "gunman", "craftsman", "madman"],
    ["pianist", "baptist", "cyclist", "chemist"],
    ["cheers", "losers", "packers", "walkers"],
    ["elevators", "translators", "curators", "radiators"],
]
KIN_STEPS = [0, 1, 2]
DRAWS = 4000


def kin_entries() -> dict[str, dict[str, list[str]]]:
    """An entry for each word of KIN: the same contexts for all, and two words of its line to replace it."""
    entries = {}
    for line in KIN:
        for place, word in enumerate(line):
            others = (line + line)[place + 1 : place + 3]
            contexts = [f"They stood and stared at the {word}", f"What I saw that morning was a {word}"]
            entries[word] = {
                "sentences": [f"Nobody had expected another {word}", *contexts],
                "replaced_sentences": [f"Nobody had expected another {other}" for other in others],
            }
    return entries


@pytest.fixture(scope="module")
def kin(miniature: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Many words that share few last tokens."""
    assert all(len({last_token(word) for word in line}) == 1 for line in KIN)
    assert len({last_token(line[0]) for line in KIN}) == len(KIN)
    folder = tmp_path_factory.mktemp("kin")
    family = link(miniature, folder / "kin", KIN_STEPS)
    result = run(place(folder / "here", kin_entries(), BOOTSTRAP_RESAMPLES=4000), family)
    assert result.code == 0 and result.warnings() == [], result.err
    return result


def bootstrap(run: Run, clusters: list[list[int]]) -> dict[str, np.ndarray]:
    """Means of drawn clusters of words, as many as there are, with replacement: float64 (draws, steps, layers + 1)."""
    profiles = {}
    for name in COSINES:
        profiles[name] = np.stack([run.arrays(step)[name].astype(float) for step in KIN_STEPS])
    rng = np.random.default_rng(12345)
    means = {name: [] for name in MEANS}
    for _ in range(DRAWS):
        words = []
        for drawn in rng.integers(len(clusters), size=len(clusters)):
            words += clusters[drawn]
        of_draw = naive_means(profiles, words, least_varying=1e-6)
        for name in MEANS:
            means[name].append(of_draw[name])
    return {name: np.array(values) for name, values in means.items()}


@pytest.fixture(scope="module")
def drawn(kin: Run) -> dict[str, np.ndarray]:
    """Last tokens drawn, with all words that end in them."""
    return bootstrap(kin, [list(range(4 * line, 4 * line + 4)) for line in range(len(KIN))])


def assert_bound(value: float, draws: np.ndarray, share: float) -> None:
    """A share of the draws lies below a value: within what chance leaves of so many resamples, and rounding."""
    least, most = np.quantile(draws, [share - 0.015, share + 0.015])
    assert least - 2e-6 <= value <= most + 2e-6


def test_interval_is_a_bootstrap_over_last_tokens(kin: Run, drawn: dict[str, np.ndarray]) -> None:
    for (_, _, step, layer), row in kin.means().items():
        for name in MEANS:
            if layer > 0 or name not in SHARES:
                draws = drawn[name][:, KIN_STEPS.index(step), layer]
                assert_bound(row[f"{name}_low"], draws, 0.025)
                assert_bound(row[f"{name}_high"], draws, 0.975)


def test_interval_of_a_peak_is_of_the_same_bootstrap(kin: Run, drawn: dict[str, np.ndarray]) -> None:
    gain = drawn["word_share"][:, :, 1:] - drawn["word_share"][:, :1, 1:]
    for (_, _, step), peak in kin.peaks().items():
        of_step = gain[:, KIN_STEPS.index(step)]
        for name, draws in (("gain", of_step.max(-1)), ("layer", 1 + of_step.argmax(-1))):
            assert_bound(peak[f"{name}_low"], draws, 0.025)
            assert_bound(peak[f"{name}_high"], draws, 0.975)
            assert peak[f"{name}_low"] <= peak[name] <= peak[f"{name}_high"]


def test_words_that_share_a_last_token_are_not_independent(kin: Run) -> None:
    """They have similar cosines, so an interval over words, as if those were independent, would be too narrow."""
    over_words = bootstrap(kin, [[word] for word in range(len(kin_entries()))])
    for name in ("P1", "P2", "P12"):
        ratios = []
        for (_, _, step, layer), row in kin.means().items():
            if layer > 0:
                low, high = np.quantile(over_words[name][:, KIN_STEPS.index(step), layer], [0.025, 0.975])
                ratios.append((row[f"{name}_high"] - row[f"{name}_low"]) / (high - low))
        assert np.mean(ratios) > 1.2, name


# ------------------------------------------------------------------------------ a planted truth

WIDTH = 128
PLANTED_CONTEXTS = ["Some men saw", "Her friends like", "They never forgot", "We all want"]  # three tokens each
PLANTED_WORDS = {  # word: words to replace it, which share its last token and no other
    "lighthouse": ["farmhouse", "penthouse"],
    "turtles": ["pickles", "castles"],
    "porcupine": ["limousine", "wolverine"],
    "chocolates": ["emirates", "surrogates"],
}
PLANTED = {  # step: (word part, context part) of each token in layers 1, 2 and 3
    0: ([0, 0, 0], [1, 1, 1]),
    1: ([0, 0, 0], [2, 1, 3]),
    2: ([1, 3, 1], [1, 1, 1]),
    3: ([3, 1, 0], [1, 1, 3]),
}


def planted_entries() -> dict[str, dict[str, list[str]]]:
    entries = {}
    for word, others in PLANTED_WORDS.items():
        entries[word] = {
            "sentences": [f"{context} {word}" for context in PLANTED_CONTEXTS],
            "replaced_sentences": [f"{PLANTED_CONTEXTS[0]} {other}" for other in others],
        }
    return entries


def plant(folder: Path, word_parts: list[int], context_parts: list[int]) -> None:
    """A GPT-NeoX checkpoint whose hidden state at the last token is a sum of three parts of known size.

    Every token has two directions of its own, orthogonal to all others: one that it is embedded in, and one that
    attention writes. Queries and keys are zero, so that attention averages over all tokens so far. Its values read the
    first direction of a token and write its second, as much as raises the part to the next layer's size: that of
    tokens that begin a word by the word part, of tokens of a context by the context part, of last tokens and
    <|endoftext|> nothing. There is no MLP; and the epsilon of the LayerNorms is so large, with weights that make up for
    it, that they change nothing. So in layer l, at the last token of a sentence of n tokens,

        state = last token + word part[l] / n * (sum over the word's other tokens) + context part[l] / n * (... context)

    of orthogonal unit vectors.
    """
    words, contexts = set(), set()
    for word in [*PLANTED_WORDS, *itertools.chain(*PLANTED_WORDS.values())]:
        words |= set(token_ids(" " + word)[:-1])
    for context in PLANTED_CONTEXTS:
        contexts |= set(token_ids(context))
    last = set(map(last_token, PLANTED_WORDS))
    assert not words & contexts and not last & (words | contexts)

    config = GPTNeoXConfig(
        vocab_size=50_304,
        hidden_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=1,
        intermediate_size=1,
        layer_norm_eps=1e6,
        max_position_embeddings=64,
    )
    model = GPTNeoXModel(config)
    torch.manual_seed(0)
    zero_mean = torch.cat([torch.ones(WIDTH, 1), torch.randn(WIDTH, WIDTH - 1)], dim=1)
    directions = iter(torch.linalg.qr(zero_mean)[0].T[1:])  # orthogonal to the first, since a LayerNorm takes the mean
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(config.layer_norm_eps**0.5 if "norm.weight" in name else 0)
        embedded, writers = model.embed_in.weight, {"words": 0, "contexts": 0}
        for token in sorted(last):
            embedded[token] = next(directions)
        for kind, tokens in (("words", words), ("contexts", contexts)):
            for token in sorted(tokens):
                embedded[token] = next(directions)
                writers[kind] = writers[kind] + torch.outer(next(directions), embedded[token])
        for layer, word_part, context_part in zip(
            model.layers, np.diff([0, *word_parts]), np.diff([0, *context_parts]), strict=True
        ):
            value = word_part * writers["words"] + context_part * writers["contexts"]
            layer.attention.query_key_value.weight[-WIDTH:] = value
            layer.attention.dense.weight.copy_(torch.eye(WIDTH))
    config.save_pretrained(folder)
    write(folder / "model.safetensors", {f"gpt_neox.{name}": value for name, value in model.state_dict().items()})
    shutil.copyfile(TOKENIZER_FILE, folder / "tokenizer.json")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("planted")
    for step, parts in PLANTED.items():
        plant(folder / "planted" / f"step{step}", *parts)
    result = run(place(folder / "here", planted_entries()), folder / "planted")
    assert result.code == 0, result.err
    [copies] = result.warnings()  # all steps embed tokens alike
    assert copies.startswith("steps 0 and 1, 2, 3 have the same hidden states up to layer 0 of 3")
    return result


def planted_sizes(word: str, step: int, layer: int) -> tuple[float, float]:
    """Squared lengths of word part and context part, beside a last token's of 1."""
    word_part, context_part = (parts[layer - 1] for parts in PLANTED[step])
    begins, context, sentence = size(word) - 1, 3, 1 + 3 + size(word)  # tokens, with <|endoftext|>
    return begins * (word_part / sentence) ** 2, context * (context_part / sentence) ** 2


def test_planted_cosines_come_out(planted: Run) -> None:
    """The parts are orthogonal: what two sentences have in common is the sum of the parts that they share."""
    for (word, _, step, layer), row in planted.rows().items():
        if layer > 0:
            own, context = planted_sizes(word, step, layer)
            whole = 1 + own + context
            found = [row["P1"], row["P2"], row["P12"]]
            assert found == pytest.approx([(1 + own) / whole, (1 + context) / whole, 1 / whole], abs=2e-6)


def test_planted_shares_come_out(planted: Run) -> None:
    """Of what varies, word part and context part are all: the shares are their parts of it, to 1e-4, and add up to 1.

    They are the same for all words of a size, so that no resample can change them. Where no word part is planted the
    word share is 0.
    """
    for (tokens, _, step, layer), row in planted.means().items():
        if layer > 0 and tokens != "all":
            word = {"2": "lighthouse", "3": "porcupine"}[tokens]
            own, context = planted_sizes(word, step, layer)
            for name, part in (("word_share", own), ("context_share", context)):
                found = [row[name], row[f"{name}_low"], row[f"{name}_high"]]
                assert found == pytest.approx([part / (own + context)] * 3, abs=1e-4)
            assert row["word_share"] + row["context_share"] == pytest.approx(1, abs=1e-4)
            assert step > 1 or abs(row["word_share"]) < 1e-4


def test_planted_peaks_come_out(planted: Run) -> None:
    """At step 1 there is no peak; at step 2 it is in layer 2, where nine parts of the word's two or three tokens stand
    beside three of the context, and at step 3 in layer 1."""
    shares = {"2": 9 / (9 + 3), "3": 18 / (18 + 3)}
    for (tokens, words, step), peak in planted.peaks().items():
        assert words == 2
        gains = [peak["gain"], peak["gain_low"], peak["gain_high"]]
        if step == 1:
            assert gains == pytest.approx([0, 0, 0], abs=1e-4)
        else:
            layers = [peak["layer"], peak["layer_low"], peak["layer_high"]]
            assert layers == [{2: 2, 3: 1}[step]] * 3
            assert gains == pytest.approx([shares[tokens]] * 3, abs=1e-4)


# ------------------------------------------------------------------------------ words and variants

CONTEXT = "contexts that do not end in their word"
REPEATED = "contexts that repeat a sentence"
ENDING = "perturbed versions that do not end in their word's last token"
KEPT_WORD = "perturbed versions that keep their word"
REPEATED_VERSION = "perturbed versions that repeat a sentence"
LENGTH = "perturbed versions whose last word has another number of tokens"
BASE = "words whose base does not end in them"
NOTHING = "words of which no variant remains"


def lower(word: str, sentences: list[str], replaced: list[str] | None = None) -> dict[str, list[str]]:
    """An entry as the study's own file has it: sentences in lower case, beside the tokens of the word."""
    entry = {"token_split": gpt_neox_tokenizer().encode(" " + word).tokens, "sentences": sentences}
    return entry if replaced is None else entry | {"replaced_sentences": replaced}


def awkward(word: str) -> dict[str, list[str]]:
    return {"sentences": [f"What I saw there was {word}", f"Nobody had expected {word}", f"It is {word}"]}


PLAIN = ["Word", "word", "nul", "aux"]
AWKWARD = ["a/b", "../../evil", "..", "CON", "naïve", unicodedata.normalize("NFD", "naïve"), "🦉", "日本", "$x$"]
AWKWARD += ["a/c", "C:\\evil", "<i>", 'say "so"', "who?", "*", "|", "tab\tbed", "two\nlines", "lighthouse" * 30]
AWKWARD += ["lighthouse" * 29]
STUDY = {  # what the script should compare
    "lighthouse": lower(
        "lighthouse",
        ["the ship steered past the lighthouse", "she looked up at the lighthouse", "he was born in a lighthouse"],
        ["the ship steered past the farmhouse", "the ship steered past the penthouse"],
    ),
    "turtles": lower("turtles", ["they had never seen such turtles", "on the beach lay three turtles"]),
    "beetles": lower("beetles", ["under the stone sat two beetles", "he has a cabinet full of beetles"], []),
    "porcupine": lower("porcupine", ["he was afraid of the porcupine"], ["he was afraid of the limousine"]),
    **{word: awkward(word) for word in (*PLAIN, *AWKWARD)},
    "a/b": {**awkward("a/b"), "replaced_sentences": ["What I saw there was c/b"]},
}
OUT = [  # and what it should leave out: (word, kind of text, text, what is wrong with it)
    ("lighthouse", "sentences", "they lived in the lighthouse.", CONTEXT),
    ("lighthouse", "sentences", "they lived in a house of light", CONTEXT),
    ("lighthouse", "sentences", "the ship steered past the lighthouse", REPEATED),
    ("lighthouse", "sentences", "she looked up at the lighthouse", REPEATED),
    ("lighthouse", "replaced_sentences", "the ship steered past the house", ENDING),
    ("lighthouse", "replaced_sentences", "the ship steered past the farmhouse.", ENDING),
    ("lighthouse", "replaced_sentences", "the ship steered past the lighthouse", KEPT_WORD),
    ("lighthouse", "replaced_sentences", "we steered past the lighthouse", KEPT_WORD),
    ("lighthouse", "replaced_sentences", "the ship steered past the farmhouse", REPEATED_VERSION),
    ("lighthouse", "replaced_sentences", "the ship steered past the porterhouse", LENGTH),
    ("beetles", "replaced_sentences", "under the stone sat two waffles", LENGTH),
    ("beetles", "replaced_sentences", "under the stone sat two pebbles", LENGTH),
    ("porcupine", "sentences", "in the woods live porcupines", CONTEXT),
    ("porcupine", "sentences", "in the woods lives a porcupinepine", CONTEXT),
    ("spade", "sentences", "it was a rusty spade.", BASE),
    ("spade", "sentences", "it was a spade", None),
    ("spade", "replaced_sentences", "it was a rusty blockade", None),
    ("mustache", "sentences", "he was proud of his mustache", NOTHING),
    ("mustache", "sentences", "he had a mustache.", CONTEXT),
    ("mustache", "replaced_sentences", "he was proud of his moustaches", ENDING),
]


def study_entries(same_length: bool) -> dict[str, dict[str, list[str]]]:
    """What remains of the study's entries."""
    entries = {}
    for word, entry in STUDY.items():
        entries[word] = {kind: list(entry.get(kind, [])) for kind in ("sentences", "replaced_sentences")}
    for word, kind, text, fault in OUT:
        if fault == LENGTH and not same_length:
            entries[word][kind].append(text)
    return entries


@pytest.fixture(scope="module")
def study_contexts() -> dict[str, dict[str, list[str]]]:
    """A file in the study's own format, with words and variants of every awkward kind."""
    entries = json.loads(json.dumps(STUDY))
    for word, kind, text, _ in OUT:
        entries.setdefault(word, {}).setdefault(kind, []).append(text)
    assert "replaced_sentences" not in entries["turtles"]
    for left, right in (("lighthouse", "porterhouse"), ("beetles", "waffles"), ("beetles", "pebbles")):
        assert last_token(left) == last_token(right) and size(left) + 1 == size(right)
    assert size("c/b") == size("a/b") == 3
    return entries


@pytest.fixture(scope="module")
def study(study_contexts: dict, short: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The study's format with SAME_LENGTH = True; a figure for each word."""
    return run(place(tmp_path_factory.mktemp("study") / "here", study_contexts, WORDS_TO_PLOT=1000), short)


@pytest.fixture(scope="module")
def any_length(study_contexts: dict, short: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same with SAME_LENGTH = False."""
    return run(place(tmp_path_factory.mktemp("any_length"), study_contexts, SAME_LENGTH=False), short)


@pytest.mark.parametrize("same_length", [True, False])
def test_study_format_is_measured_like_the_naive_computation(
    request: pytest.FixtureRequest, short: Path, same_length: bool
) -> None:
    result = request.getfixturevalue("study" if same_length else "any_length")
    assert result.code == 0, result.err
    assert_like_naive(result, SHORT, list(STUDY), naive_profiles(short, SHORT, study_entries(same_length)))


@pytest.mark.parametrize("same_length", [True, False])
def test_what_is_left_out_is_counted_and_named(request: pytest.FixtureRequest, same_length: bool) -> None:
    warnings = request.getfixturevalue("study" if same_length else "any_length").warnings()
    expected = {}
    for word, _, _, fault in OUT:
        if fault is not None and (same_length or fault != LENGTH):
            expected.setdefault(fault, Counter())[word] += 1
    found = {}
    for warning in warnings[:-2]:
        count, fault, words = re.fullmatch(r"(\d+) (.*) are left out: (.*)", warning).groups()
        found[fault] = Counter()
        for times, word in re.findall(r"(\d+) of (\w+)", words):
            found[fault][word] = int(times)
        assert int(count) == found[fault].total()
    assert found == expected

    for warning, name, kind in zip(warnings[-2:], ("P1", "P2"), ("sentences", "replaced_sentences"), strict=True):
        remain = study_entries(same_length)
        lacking = [word for word, entry in remain.items() if len(entry[kind]) < (2 if name == "P1" else 1)]
        assert warning.startswith(f"{name} is empty for {len(lacking)} of {len(remain)} words")
        named = ", ".join(lacking).replace("\t", "\\t").replace("\n", "\\n")
        assert warning.endswith(f": {named}") and ("beetles" in lacking) == (same_length and name == "P2")


def test_what_is_missing_is_empty(study: Run) -> None:
    for (word, *_), row in study.rows().items():
        without_P1, without_P2 = word == "porcupine", word not in ("lighthouse", "porcupine", "a/b")
        assert np.isnan(row["P1"]) == without_P1 and np.isnan(row["P2"]) == without_P2, word
        assert np.isnan(row["P12"]) == (without_P1 or without_P2), word
        assert not np.isnan(row["unrelated"]), word
    perturbed = {"2", "3", "all"}  # numbers of tokens of lighthouse, porcupine and a/b
    for (tokens, *_), row in study.means().items():
        assert not np.isnan(row["P1"])
        assert np.isnan(row["P2"]) == np.isnan(row["P12"]) == np.isnan(row["P1-P2"]) == (tokens not in perturbed)


def test_a_value_has_an_interval_if_last_tokens_can_be_drawn(study: Run, any_length: Run) -> None:
    """Of those of the words that have the value: where that is one alone, nothing is known of how it varies."""
    for result, same_length in ((study, True), (any_length, False)):
        last_tokens = {name: {} for name in ("P1", "P2", "both")}  # by number of tokens
        for word, entry in study_entries(same_length).items():
            has = {"P1": len(entry["sentences"]) > 1, "P2": bool(entry["replaced_sentences"])}
            for name, present in (*has.items(), ("both", all(has.values()))):
                for group in (str(size(word)), "all"):
                    last_tokens[name].setdefault(group, set()).update([last_token(word)] * present)
        for (group, *_), row in result.means().items():
            for name in MEANS:
                drawn_from = last_tokens[name if name in ("P1", "P2") else "both"][group]
                bounds = np.isnan(row[f"{name}_low"]), np.isnan(row[f"{name}_high"])
                assert bounds == (np.isnan(row[name]) or len(drawn_from) < 2,) * 2, (group, name)
        for (group, *_), peak in result.peaks().items():
            assert np.isnan(peak["layer"]) == np.isnan(peak["gain"]) == (not last_tokens["both"][group]), group
            for name in ("layer", "gain"):
                bounds = np.isnan(peak[f"{name}_low"]), np.isnan(peak[f"{name}_high"])
                assert bounds == (len(last_tokens["both"][group]) < 2,) * 2, group
            assert not any(peak[name] == 0 for name in ("layer", "layer_low", "layer_high")), group
    assert len(last_tokens["both"]["2"]) == 2  # lighthouse and beetles


def test_each_word_has_a_safe_distinct_file_name(study: Run) -> None:
    assert_figures(study, set(map(size, STUDY)), words=len(STUDY), faint=["peaks.png"])  # which has one step
    names = [file.name for file in (study.results / "words").iterdir()]
    for name in names:
        assert len(name.encode()) <= 120, name
        assert not re.search(r'[<>:"/\\|?*\x00-\x1f\x7f ]', name), name
    assert len({unicodedata.normalize("NFKC", name).casefold() for name in names}) == len(names)


def test_file_names_can_be_read(study: Run) -> None:
    names = [file.name for file in (study.results / "words").iterdir()]
    for word in ("lighthouse", "turtles", "word", "nul", "aux"):
        assert f"{size(word)}_tokens_{word}.png" in names
    for part in ("1_tokens_CON", "naïve", "日本", "a_b", "lighthouselighthouse", "1_tokens_Word"):
        assert any(part in name for name in names), part


def test_words_never_become_paths_or_markup(study: Run) -> None:
    here = study.results.parents[1]
    assert [file.name for file in here.parent.iterdir()] == ["here"]
    assert {file.name for file in here.iterdir()} == {SCRIPT.name, CONTEXTS_FILE.name, "multitoken_words_plots"}
    figures = {name for name in study.figures() if "words/" not in name}
    assert {file.name for file in study.results.iterdir()} == {*TABLES, *figures, "words", "kept"}
    assert all(file.is_file() for file in (study.results / "words").iterdir())
    assert "glyph" not in study.err.lower()


def test_single_word(miniature: Path, tmp_path: Path) -> None:
    """Nothing is unrelated to it, and nothing perturbed; of the words to plot one is not there."""
    family = link(miniature, tmp_path / "we$\\ird$ [ü]", [0, 8])
    words = ["lighthouse", "turtles", "turtles"]
    result = run(place(tmp_path / "here", {"turtles": STUDY["turtles"]}, WORDS_TO_PLOT=words), family)
    assert result.code == 0, result.err
    empty, unknown = result.warnings()
    assert empty.startswith("P2 is empty for 1 of 1 words") and empty.endswith(": turtles")
    assert "WORDS_TO_PLOT" in unknown and unknown.endswith(": lighthouse")
    assert_figures(result, [2], words=1, faint=["shares.png", "peaks.png"])
    assert "words/2_tokens_turtles.png" in result.figures()
    naive = naive_profiles(family, [0, 8], {"turtles": STUDY["turtles"] | {"replaced_sentences": []}})
    naive.pop("unrelated")
    for name, values in naive.items():
        np.testing.assert_allclose(result.profiles()[name], values, atol=1e-5, rtol=0)
    assert all(re.fullmatch(r"turtles,2,\d,\d,\d.\d{6},,,", line) for line in result.tables()[0].decode().split()[1:])


def test_words_of_one_last_token_are_no_copies(short: Path, tmp_path: Path) -> None:
    """In layer 0 all that they contribute is 1, in every checkpoint."""
    entries = {word: entry for word, entry in kin_entries().items() if word in KIN[0][:2]}
    result = run(place(tmp_path, entries), short)
    assert result.code == 0 and result.warnings() == [], result.err


# ------------------------------------------------------------------------------ interrupted work is kept


def test_killed_run_goes_on(main_run: Run, miniature: Path, tmp_path: Path) -> None:
    """Another family of its name is refused in between: it would take the folder, and delete what is kept."""
    here = place(tmp_path / "here")
    process = start(here, miniature)
    kept = here / "multitoken_words_plots" / miniature.name / "kept"
    while process.poll() is None and len(list(kept.glob("step*.npz"))) < 2:
        time.sleep(0.002)
    process.kill()
    process.communicate()
    killed = Run(process.returncode, "", "", kept.parent)
    done = killed.kept()
    assert killed.code == -9 and 2 <= len(done) < len(STEPS)
    assert not (kept.parent / "perturbation.csv").exists()

    other = link(miniature, tmp_path / "other" / miniature.name, SHORT)
    refused = run(here, other)
    line = error_line(refused)
    assert str(kept.parent) in line and str(miniature) in line and str(other) in line
    assert killed.kept() == done

    result = run(here, miniature)
    assert result.code == 0, result.err
    assert result.to_measure() == len(STEPS) - len(done)
    assert done.items() <= result.kept().items()
    assert {file.name for file in kept.iterdir()} == {"run.json", *(name for name, _ in result.kept().values())}
    assert result.tables() == main_run.tables()


def test_kept_files_that_are_damaged_are_measured_again(main_run: Run, miniature: Path, tmp_path: Path) -> None:
    """Among them figures of an earlier run vanish that this one does not draw, but no file of the user's."""
    here = continued(main_run, tmp_path, miniature)
    result = Run(0, "", "", here / "multitoken_words_plots" / miniature.name)
    cut, empty, wrong_shape, gone = (result.kept_file(step) for step in (0, 2, 8, 16))
    cut.write_bytes(cut.read_bytes()[:300])
    empty.write_bytes(b"")
    np.savez(wrong_shape, **{name: values[:, :3] for name, values in result.arrays(8).items()})
    gone.unlink()
    own = ["mean_of_my_own.png", "words/notes.png", "words/2_tokens_draft.png", "notes.txt", "kept/step4.npz"]
    for name in own:
        (result.results / name).write_text("mine", encoding="utf-8")
    assert len([name for name in result.figures() if "words/" in name]) == 3 + 2

    result = run(here, miniature)
    assert result.code == 0 and result.warnings() == [], result.err
    assert result.to_measure() == 4
    assert result.tables() == main_run.tables()
    before, after = main_run.kept(), result.kept()
    assert [step for step in STEPS if after[step] == before[step]] == [1, 4, 32]
    assert all((result.results / name).read_text(encoding="utf-8") == "mine" for name in own)
    assert result.figures() == FIGURES | {f"mean_{tokens}_tokens.png" for tokens in (2, 3, 4)} | set(own[:3])


def test_changed_sentence_is_measured_again(main_run: Run, short: Path, tmp_path: Path) -> None:
    changed, other, *_ = DOZEN
    entries = json.loads(json.dumps(DOZEN))
    entries[changed]["sentences"][2] = f"I cannot think of a breakfast more dreadful than a warm {changed}"
    here = continued(main_run, tmp_path, short, entries, WORDS_TO_PLOT=[changed, other])
    result = run(here, short)
    assert result.code == 0 and result.warnings() == [], result.err
    assert result.to_measure() == len(SHORT)
    rows, before = result.rows(), main_run.rows()
    for key, row in rows.items():
        assert row["P2"] == pytest.approx(before[key]["P2"], abs=2e-6)
    assert {key[0] for key, row in rows.items() if row != pytest.approx(before[key], abs=2e-6)} == {changed}
    drawn = {name for name in result.figures() if "words/" in name}
    assert drawn == {f"words/2_tokens_{word}.png" for word in (changed, other)}
    assert set(result.kept()) == set(SHORT)  # what nothing needs any more is removed


def test_changed_formula_is_measured_again(main_run: Run, miniature: Path, tmp_path: Path) -> None:
    """A changed figure is not; nor is a family that was moved, once the record of its former place is deleted."""
    here = continued(main_run, tmp_path, miniature)
    (here / "multitoken_words_plots" / miniature.name / "kept" / "run.json").unlink()
    for name in ("draw_cosines", "draw_shares", "draw_overview"):
        edit_function(here, name, '"""', '"""Draws ')
    redrawn = run(here, miniature)
    assert redrawn.code == 0, redrawn.err
    assert redrawn.to_measure() == 0 and redrawn.kept() == main_run.kept()
    assert redrawn.tables() == main_run.tables()

    edit_function(here, "contribution_of", ".mean()", ".amax()")
    result = run(here, miniature)
    assert result.code == 0, result.err
    assert result.to_measure() == len(STEPS)
    assert not set(result.kept().values()) & set(main_run.kept().values())
    profiles, before = result.profiles(), main_run.profiles()
    larger = profiles["P1"][:, 1:] - before["P1"][:, 1:]
    assert larger.min() > -2e-6 and larger.max() > 0.01
    assert all(np.array_equal(profiles[name], before[name]) for name in ("P2", "P12", "unrelated"))


def test_added_checkpoints_alone_are_measured_and_copies_are_named(
    main_run: Run, miniature: Path, tmp_path: Path
) -> None:
    """A whole copy of step 8, one of step 32 as far as its third block, and one of step 2's token embeddings."""
    family = link(miniature, tmp_path / "added", {step: step for step in STEPS} | {12: 8, 20: 16, 24: 4})
    shared = {20: (32, ("gpt_neox.embed_in.", *(f"gpt_neox.layers.{block}." for block in range(3))))}
    shared[24] = 2, ("gpt_neox.embed_in.",)
    for step, (source, beginnings) in shared.items():
        weights = load_file(family / f"step{step}" / "model.safetensors")
        for name, tensor in load_file(family / f"step{source}" / "model.safetensors").items():
            if name.startswith(beginnings):
                weights[name] = tensor
        write(family / f"step{step}" / "model.safetensors", weights)
    result = run(continued(main_run, tmp_path / "here", family), family)
    assert result.code == 0, result.err
    copies = {(8, 12): "in all layers", (2, 24): "up to layer 0 of 6", (20, 32): "up to layer 3 of 6"}
    assert len(result.warnings()) == len(copies)
    for warning, ((earlier, later), extent) in zip(result.warnings(), copies.items(), strict=True):
        assert warning.startswith(f"steps {earlier} and {later} have the same hidden states {extent}")
    assert result.to_measure() == 3
    kept = result.kept()
    assert kept.pop(12) and kept.pop(20) and kept.pop(24) and kept == main_run.kept()
    rows, before = result.rows(), main_run.rows()
    assert {key: row for key, row in rows.items() if key[2] in STEPS} == before
    for (word, tokens, step, layer), row in rows.items():
        if step == 12:
            assert row == before[word, tokens, 8, layer]


# ------------------------------------------------------------------------------ what goes wrong

TWO = ["It was a ledge", "This is a ledge"]
LONGEST = "a " * 253 + "ledge"  # with <|endoftext|> as long as the model has positions
BAD = {  # word: (entry, what is said of it)
    "missing": ({"replaced_sentences": []}, "list of 2 or more sentences"),
    "lonely": ({"sentences": TWO[:1]}, "list of 2 or more sentences"),
    "null": ({"sentences": None}, "list of 2 or more sentences"),
    "string": ({"sentences": "It was a string"}, "list of 2 or more sentences"),
    "list": (TWO, "not a word with an object"),
    "number": ({"sentences": [*TWO, 7]}, "sentences that are no text"),
    "blank": ({"sentences": ["It was a blank", " \n"]}, "sentences that are no text"),
    "surrogate": ({"sentences": ["It was \udcff", *TWO]}, "sentences that are no text"),
    "perturbed": ({"sentences": TWO, "replaced_sentences": "bridge"}, "list of 0 or more replaced_sentences"),
    "untold": ({"sentences": TWO, "replaced_sentences": [None]}, "replaced_sentences that are no text"),
    "": ({"sentences": TWO}, "not a word"),
    "\udcff": ({"sentences": TWO}, "not a word"),
    "nul\0": ({"sentences": TWO}, "not a word"),
    "x" * 300: ({"sentences": []}, "list of 2 or more sentences"),
}
ERRORS = {  # name: (contexts, what the line says)
    "bad entries": (
        {"ledge": {"sentences": [*TWO, LONGEST]}} | {word: entry for word, (entry, _) in BAD.items()},
        [CONTEXTS_FILE.name, f"correct or remove {len(BAD)} entries: "],
    ),
    "two entries with one key": (
        f'{{"ledge": {{"sentences": {json.dumps(TWO)}}}, "ledge": {{"sentences": {json.dumps(TWO)}}}}}',
        [CONTEXTS_FILE.name, "'ledge' occurs 2 times"],
    ),
    "too long a sentence": (
        {"ledge": {"sentences": [*TWO, LONGEST, "a " + LONGEST]}},
        [CONTEXTS_FILE.name, "'a a a a", "257 tokens, the model 256 positions"],
    ),
    "no word is left": (
        {"spade": {"sentences": ["it was a spade.", "a spade"]}, "ledge": {"sentences": [TWO[0], "two ledges"]}},
        [CONTEXTS_FILE.name, "no word is left", "end in their word"],
    ),
}


@pytest.fixture(scope="module", autouse=True)
def failures(short: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Run]]]:
    """The runs of ERRORS, made one after the other beside the other tests."""
    places = tmp_path_factory.mktemp("places")
    pool = ThreadPoolExecutor(1)
    runs = {name: pool.submit(run, place(places / name, contexts), short) for name, (contexts, _) in ERRORS.items()}
    yield runs
    pool.shutdown(cancel_futures=True)


def error_line(result: Run) -> str:
    """The one line that a failed run ends with."""
    assert result.code == 2
    assert "results  " not in result.out
    errors = [line for line in result.err.splitlines() if "error: " in line]
    assert errors == [result.err.splitlines()[-1]] and errors[0].startswith("error: "), result.err
    return errors[0]


@pytest.mark.parametrize("name", ERRORS)
def test_error_is_one_line_that_helps(failures: dict[str, Future[Run]], name: str) -> None:
    result = failures[name].result()
    line = error_line(result)
    for part in ERRORS[name][-1]:
        assert part in line
    assert not (result.results.parents[1] / "multitoken_words_plots").exists()


def test_every_bad_entry_is_named(failures: dict[str, Future[Run]]) -> None:
    line = error_line(failures["bad entries"].result())
    named = re.split(r"correct or remove \d+ entries: ", line)[1].split("; ")
    assert len(named) == len(BAD)
    for word, (_, fault) in BAD.items():
        assert any(text.startswith(f"{word!r:.60} ") and fault in text for text in named), (word, named)
    assert not any("'ledge'" in text for text in named)
    assert len(line) < 200 + 150 * len(named)


def test_a_sentence_may_fill_all_positions() -> None:
    assert len(token_ids(LONGEST)) == 255


def test_words_that_fell_out_are_named_before_the_error(failures: dict[str, Future[Run]]) -> None:
    assert failures["no word is left"].result().warnings() == [
        f"1 {BASE} are left out: 1 of spade",
        f"1 {CONTEXT} are left out: 1 of ledge",
        f"1 {NOTHING} are left out: 1 of ledge",
    ]


def test_hidden_states_that_are_not_finite(miniature: Path, tmp_path: Path) -> None:
    """A NaN in one row of one embedding: a sentence that ends in it is named, and the steps before it are kept."""
    family = link(miniature, tmp_path / "nan", [0, 1, 2, 4])
    file = family / "step2" / "model.safetensors"
    weights = load_file(file)
    broken = last_token(list(DOZEN)[-1])
    weights["gpt_neox.embed_in.weight"][broken, 5] = torch.nan
    write(file, weights)
    result = run(place(tmp_path / "here"), family)
    line = error_line(result)
    assert re.search("step ?2, layer 0: ", line) and str(family / "step2") in line
    texts = {text for entry in DOZEN.values() for kind in entry.values() for text in kind}
    assert any(f"{text!r:.60}" in line for text in texts if token_ids(text)[-1] == broken)
    assert set(result.kept()) == {0, 1}
    assert not (result.results / "perturbation.csv").exists()

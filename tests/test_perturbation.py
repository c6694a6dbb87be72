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
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_convergence import cosine, gpt_neox_tokenizer, link
from transformers import GPTNeoXForCausalLM

SCRIPT = Path(__file__).resolve().parents[1] / "multitoken_context_perturbation.py"
CONTEXTS_FILE = SCRIPT.with_name("multitoken_words_contexts.json")
ENTRIES = json.loads(CONTEXTS_FILE.read_text(encoding="utf-8"))
STEPS = [0, 1, 2, 4, 8, 16, 32]
SHORT = [1, 32]  # the steps of the smaller runs
LAYERS = 7  # with the token embedding
WORDS = {"noodle": 2, "ledge": 2, "mustache": 2, "platter": 2, "cactus": 3, "bathtub": 3, "waffle": 3, "pajamas": 3}
WORDS |= {"hairdresser": 4, "lollipop": 4, "milkshake": 4, "skyscrapers": 5}  # and their tokens
DOZEN = {word: ENTRIES[word] for word in WORDS}
NAMES = ("P1", "P2", "unrelated")
MEANS = ["P1", "P1_ci_low", "P1_ci_high", "P2", "P2_ci_low", "P2_ci_high", "unrelated"]
RESULTS = {"perturbation.csv", "perturbation_mean.csv", "overview.png", "mean_all.png", "words", "kept"}


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
        lines = read_csv(self.results / "perturbation.csv")
        return {
            (line["word"], int(line["tokens"]), int(line["step"]), int(line["layer"])): {
                name: float(line[name] or "nan") for name in NAMES
            }
            for line in lines
        }

    def means(self) -> dict[tuple[str, int, int, int], dict[str, float]]:
        """{(tokens, words, step, layer): {name: value}} of perturbation_mean.csv; an empty value is NaN."""
        lines = read_csv(self.results / "perturbation_mean.csv")
        return {
            (line["tokens"], int(line["words"]), int(line["step"]), int(line["layer"])): {
                name: float(line[name] or "nan") for name in MEANS
            }
            for line in lines
        }

    def tables(self) -> tuple[bytes, bytes]:
        return tuple((self.results / name).read_bytes() for name in ("perturbation.csv", "perturbation_mean.csv"))

    def arrays(self, step: int) -> dict[str, np.ndarray]:
        """What a checkpoint contributed: float (layers + 1, words) each."""
        with np.load(self.results / "kept" / f"step{step}.npz") as arrays:
            return {name: arrays[name] for name in NAMES}

    def kept(self) -> dict[int, int]:
        """{step: time at which its contribution was written}."""
        return {int(file.stem[4:]): file.stat().st_mtime_ns for file in (self.results / "kept").glob("step*.npz")}


def read_csv(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def place(folder: Path, contexts: object = DOZEN, **settings: object) -> Path:
    """Puts a copy of the script, with some constants set, and a file of contexts into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    text = SCRIPT.read_text(encoding="utf-8")
    for name, value in ({"WORDS_TO_PLOT": 0} | settings).items():
        text, count = re.subn(rf"(?m)^{name} = .*$", lambda _, line=f"{name} = {value!r}": line, text)
        assert count == 1, name
    (folder / SCRIPT.name).write_text(text, encoding="utf-8")
    text = contexts if isinstance(contexts, str) else json.dumps(contexts)
    (folder / CONTEXTS_FILE.name).write_text(text, encoding="utf-8")
    return folder


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


def token_ids(text: str) -> list[int]:
    return gpt_neox_tokenizer().encode(text, add_special_tokens=False).ids


def naive_states(folder: Path, texts: set[str], prepend_bos: bool) -> dict[str, np.ndarray]:
    """The hidden states at the last token of each text, one text at a time: float64 (layers + 1, width)."""
    model = GPTNeoXForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    start = [gpt_neox_tokenizer().token_to_id("<|endoftext|>")] if prepend_bos else []
    states = {}
    torch.set_num_threads(1)  # as many as the scripts have
    with torch.inference_mode():
        for text in texts:
            layers = model(torch.tensor([start + token_ids(text)]), output_hidden_states=True).hidden_states
            states[text] = np.array([layer[0, -1].double().numpy() for layer in layers])
    return states


def mean_cosine(states: dict[str, np.ndarray], base: str, others: list[str]) -> np.ndarray:
    """By layer; NaN without others."""
    cosines = [cosine(states[base], states[other]) for other in others]
    return sum(cosines) / len(cosines) if cosines else np.full(LAYERS, np.nan)


def naive_profiles(
    family: Path, steps: list[int], entries: dict[str, dict[str, list[str]]], prepend_bos: bool = True
) -> dict[str, np.ndarray]:
    """P1, P2 and unrelated by the book: float64 (steps, layers + 1, words) each."""
    texts = {text for entry in entries.values() for kind in entry.values() for text in kind}
    profiles = {name: [] for name in NAMES}
    for step in steps:
        states = naive_states(family / f"step{step}", texts, prepend_bos)
        bases = {word: entry["sentences"][0] for word, entry in entries.items()}
        of_step = {name: [] for name in NAMES}
        for word, entry in entries.items():
            of_step["P1"].append(mean_cosine(states, bases[word], entry["sentences"][1:]))
            of_step["P2"].append(mean_cosine(states, bases[word], entry["replaced_sentences"]))
            others = [base for other, base in bases.items() if other != word]
            of_step["unrelated"].append(mean_cosine(states, bases[word], others))
        for name, by_word in of_step.items():
            profiles[name].append(np.transpose(by_word))
    return {name: np.array(by_step) for name, by_step in profiles.items()}


def assert_like_naive(run: Run, steps: list[int], words: list[str], naive: dict[str, np.ndarray]) -> None:
    """Every value of both tables is what the naive computation gives, to 1e-5, and in the same order."""
    sizes = [len(token_ids(" " + word)) for word in words]
    rows = run.rows()
    keys = itertools.product(zip(words, sizes, strict=True), steps, range(LAYERS))
    assert list(rows) == [(*word, step, layer) for word, step, layer in keys]
    for name in NAMES:
        values = np.reshape([row[name] for row in rows.values()], (len(words), len(steps), LAYERS))
        np.testing.assert_allclose(values, np.moveaxis(naive[name], -1, 0), atol=1e-5, rtol=0, err_msg=name)

    means = run.means()
    groups = {str(size): np.array(sizes) == size for size in sorted(set(sizes))} | {"all": np.full(len(words), True)}
    keys = itertools.product(groups, steps, range(LAYERS))
    assert list(means) == [(group, groups[group].sum(), step, layer) for group, step, layer in keys]
    for (group, _, step, layer), row in means.items():
        for name in NAMES:
            values = naive[name][steps.index(step), layer, groups[group]]
            known = values[~np.isnan(values)]
            expected = known.mean() if len(known) else np.nan
            assert row[name] == pytest.approx(expected, abs=1e-5, nan_ok=True), (group, step, layer, name)


def assert_figures(results: Path, sizes: Iterable[int], words: int) -> None:
    """The figures of these numbers of tokens and of so many words are there, and something is drawn on each."""
    names = {"overview.png", "mean_all.png"} | {f"mean_{size}_tokens.png" for size in sizes}
    assert {file.name for file in results.glob("*.png")} == names
    drawn = list((results / "words").iterdir())
    assert len(drawn) == words and all(re.match(r"\d+_tokens_.+\.png$", file.name) for file in drawn)
    for file in (*results.glob("*.png"), *drawn):
        pixels = np.asarray(Image.open(file).convert("RGB")).astype(int)
        assert min(pixels.shape[:2]) >= 300, file
        coloured = np.ptp(pixels, axis=-1) > 40
        assert coloured.mean() > 0.002, file


@pytest.fixture(scope="module")
def main_run(miniature: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A dozen words at all steps: what most tests look at or start from."""
    return run(place(tmp_path_factory.mktemp("main"), WORDS_TO_PLOT=3), miniature)


@pytest.fixture(scope="module")
def short(miniature: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return link(miniature, tmp_path_factory.mktemp("families") / "short", SHORT)


def continued(main_run: Run, folder: Path, contexts: object = DOZEN, family: str = "miniature", **settings) -> Path:
    """Places the script beside the results of the main run, times of files included."""
    shutil.copytree(main_run.results, folder / "multitoken_words_plots" / family)
    return place(folder, contexts, **settings)


# ------------------------------------------------------------------------------ what a run leaves


def test_run_says_what_it_does(main_run: Run, miniature: Path) -> None:
    assert main_run.code == 0, main_run.err
    lines = dict(line.split(maxsplit=1) for line in main_run.out.splitlines())
    sentences = len({text for entry in DOZEN.values() for kind in entry.values() for text in kind})
    assert lines == {
        "family": str(miniature),
        "steps": "0, 1, 2, 4, 8, 16, 32 (7 of 7 to measure)",
        "words": f"4 of 2 tokens, 4 of 3 tokens, 3 of 4 tokens, 1 of 5 tokens; {sentences} sentences",
        "device": lines["device"],
        "results": str(main_run.results),
    }
    assert re.fullmatch(r"(cpu|cuda:0|mps:0), float32", lines["device"])
    assert "warning" not in main_run.err.lower() and "error" not in main_run.err.lower()
    assert re.search(r"step ?\d+: .*batch/s", main_run.err) and "figures: 100%" in main_run.err


def test_files(main_run: Run) -> None:
    assert_figures(main_run.results, [2, 3, 4, 5], words=3)
    names = {file.name for file in (main_run.results / "words").iterdir()}
    assert names <= {f"{size}_tokens_{word}.png" for word, size in WORDS.items()}
    assert {file.name for file in main_run.results.iterdir() if "_tokens.png" not in file.name} == RESULTS
    assert {file.name for file in (main_run.results / "kept").iterdir()} == {f"step{step}.npz" for step in STEPS}
    here = main_run.results.parents[1]
    assert {file.name for file in here.iterdir()} == {SCRIPT.name, CONTEXTS_FILE.name, "multitoken_words_plots"}
    assert [folder.name for folder in (here / "multitoken_words_plots").iterdir()] == ["miniature"]


def test_csv_has_a_row_for_each_word_or_group_step_and_layer(main_run: Run) -> None:
    words, means = (table.decode().split("\n") for table in main_run.tables())
    assert words[0] == "word,tokens,step,layer,P1,P2,unrelated" and words[-1] == ""
    assert means[0] == "tokens,words,step,layer," + ",".join(MEANS) and means[-1] == ""
    number = r"(-?[01]\.\d{6})"
    assert all(re.fullmatch(rf"[a-z]+,[2-5],\d+,[0-6],{number},{number},{number}", line) for line in words[1:-1])
    assert all(re.fullmatch(rf"([2-5]|all),\d+,\d+,[0-6](,{number}){{7}}", line) for line in means[1:-1])
    assert len(words) - 2 == len(WORDS) * len(STEPS) * LAYERS
    assert len(means) - 2 == 5 * len(STEPS) * LAYERS


def test_values_are_those_of_the_naive_computation(main_run: Run, miniature: Path) -> None:
    assert_like_naive(main_run, STEPS, list(WORDS), naive_profiles(miniature, STEPS, DOZEN))


def test_token_embeddings_are_the_same(main_run: Run) -> None:
    for step in STEPS:
        arrays = main_run.arrays(step)
        assert np.abs(np.stack([arrays["P1"][0], arrays["P2"][0]]) - 1).max() < 1e-6
    assert all((main_run.arrays(0)[name][1:] < 1 - 1e-4).all() for name in ("P1", "P2"))
    at_zero = [row for (*_, layer), row in main_run.rows().items() if layer == 0]
    assert all(abs(row[name] - 1) <= 1e-6 for row in at_zero for name in ("P1", "P2"))
    assert all(row["unrelated"] < 0.9 for row in at_zero)


def test_interval_is_a_bootstrap_over_words(main_run: Run) -> None:
    rows, ratios = main_run.rows(), []
    random = np.random.default_rng(12345)
    for (tokens, count, step, layer), mean in main_run.means().items():
        members = [(word, size, step, layer) for word, size in WORDS.items() if tokens in (str(size), "all")]
        assert len(members) == count
        for name in ("P1", "P2"):
            means = random.choice([rows[member][name] for member in members], (2000, count)).mean(1)
            low, high = np.quantile(means, [0.025, 0.975])
            own_low, own_high = mean[f"{name}_ci_low"], mean[f"{name}_ci_high"]
            assert own_low <= mean[name] <= own_high
            tolerance = (0.15 if tokens == "all" else 0.3) * (high - low) + 2e-6  # few words give few distinct means
            assert own_low == pytest.approx(low, abs=tolerance)
            assert own_high == pytest.approx(high, abs=tolerance)
            if tokens == "all" and layer > 0:
                ratios.append((own_high - own_low) / (high - low))
    assert np.mean(ratios) == pytest.approx(1, abs=0.04)


def test_curves_look_like_composition(main_run: Run) -> None:
    """A variant that shares more than the last token is nearer to the base than the bases of other words."""
    for (tokens, _, _, layer), row in main_run.means().items():
        assert row["P1"] > row["unrelated"] and row["P2"] > row["unrelated"]
        if tokens == "all" and layer > 0:
            assert row["P2"] > row["P1"]  # in a young model the shared words count more than the word measured


@pytest.fixture(scope="module")
def packed(short: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Runs without <|endoftext|>, in small to large batches."""
    folder = tmp_path_factory.mktemp("packed")
    places = [place(folder / str(batch), PREPEND_BOS=False, BATCH_TOKENS=batch) for batch in (1, 7, 4096)]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, places, itertools.repeat(short)))


def test_sentence_is_read_as_prepend_bos_says(packed: list[Run], main_run: Run, short: Path) -> None:
    naive = naive_profiles(short, SHORT, DOZEN, prepend_bos=False)
    assert packed[0].code == 0, packed[0].err
    assert_like_naive(packed[0], SHORT, list(WORDS), naive)
    assert all(np.abs(main_run.arrays(1)[name] - packed[0].arrays(1)[name]).max() > 1e-3 for name in NAMES)


def test_batches_do_not_change_the_values(packed: list[Run]) -> None:
    for other in packed:
        assert other.code == 0, other.err
        for step, name in itertools.product(SHORT, NAMES):
            expected = packed[0].arrays(step)[name]
            np.testing.assert_allclose(other.arrays(step)[name], expected, atol=1e-5, rtol=0)


def test_two_ranks_give_the_same_tables(main_run: Run, miniature: Path, tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = run(place(tmp_path), miniature, launcher=launcher)
    assert result.code == 0, result.err
    assert ", 2 ranks" in result.out and result.out.count("results") == 1
    assert result.tables() == main_run.tables()
    assert set(result.kept()) == set(STEPS)


# ------------------------------------------------------------------------------ words and variants


def lower(word: str, *kinds: str) -> dict[str, list[str]]:
    """An entry as the study's own file has it: sentences in lower case, beside the tokens of the word."""
    lists = {kind: [text.lower() for text in ENTRIES[word][kind]] for kind in kinds or ("sentences",)}
    return {"token_split": gpt_neox_tokenizer().encode(" " + word).tokens, **lists}


def awkward(word: str) -> dict[str, list[str]]:
    return {"sentences": [f"What I saw there was {word}", f"Nobody had expected {word}", f"It is {word}"]}


NARROW = "two pigeons had built their nest on the narrow"
PLAIN = ["Word", "word", "nul", "aux"]
AWKWARD = ["a/b", "../../evil", "..", "CON", "naïve", unicodedata.normalize("NFD", "naïve"), "🦉", "日本", "$x$"]
AWKWARD += ["a/c", "C:\\evil", "<i>", 'say "so"', "who?", "*", "|", "tab\tbed", "lighthouse" * 30, "lighthouse" * 29]
STUDY = {  # what the script should compare
    "noodle": lower("noodle"),
    "ledge": lower("ledge", "sentences", "replaced_sentences"),
    "mittens": lower("mittens", "sentences", "replaced_sentences"),
    **{word: awkward(word) for word in (*PLAIN, *AWKWARD)},
    "a/b": {**awkward("a/b"), "replaced_sentences": ["What I saw there was c/b"]},
}
STUDY["mittens"]["sentences"] = STUDY["mittens"]["sentences"][:1]
OUT = {  # and what it should leave out
    "ledge": {
        "sentences": [
            "they rested on this ledge.",
            f"{NARROW} ledge",
            "they rested on ledges",
            "they rested on rledge",
        ],
        "replaced_sentences": [f"{NARROW} bridge.", f"{NARROW} ledge"],
    },
    "mittens": {"sentences": ["knit the kittens", "knit the thumbs"], "replaced_sentences": []},
    "mustache": {"sentences": ["he was proud of his mustache.", "he was proud of his mustache"]},
    "spade": {
        "sentences": ["it was a rusty spade", "it was a spade."],
        "replaced_sentences": ["it was a rusty shovel"],
    },
}


@pytest.fixture(scope="module")
def study(short: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A file in the study's own format, with words and variants of every awkward kind; a figure for each word."""
    entries = {}
    for word in STUDY | OUT:
        entries[word] = dict(STUDY.get(word, {}))
        for kind, texts in OUT.get(word, {}).items():
            entries[word][kind] = entries[word].get(kind, []) + texts
    assert "token_split" in entries["noodle"] and "replaced_sentences" not in entries["noodle"]
    here = place(tmp_path_factory.mktemp("study") / "here", entries, WORDS_TO_PLOT=1000)
    return run(here, short)


def test_study_format_is_measured_like_the_naive_computation(study: Run, short: Path) -> None:
    assert study.code == 0, study.err
    entries = {
        word: {kind: entry.get(kind, []) for kind in ("sentences", "replaced_sentences")}
        for word, entry in STUDY.items()
    }
    assert_like_naive(study, SHORT, list(STUDY), naive_profiles(short, SHORT, entries))


def test_what_is_missing_is_empty(study: Run) -> None:
    for (word, *_), row in study.rows().items():
        assert np.isnan(row["P1"]) == (word == "mittens"), word
        assert np.isnan(row["P2"]) == (word not in ("ledge", "mittens", "a/b")), word
        assert not np.isnan(row["unrelated"]), word
    perturbed = {"2", "3", "all"}  # numbers of tokens of ledge, mittens and a/b
    for (tokens, *_), row in study.means().items():
        without = tokens not in perturbed
        assert all(np.isnan(row[name]) == without for name in MEANS if name.startswith("P2")), tokens
        assert not any(np.isnan(row[name]) for name in MEANS if not name.startswith("P2")), tokens


def test_what_is_left_out_is_counted_and_named_once(study: Run) -> None:
    sentences, replaced, words, without_contexts, empty = study.warnings()
    assert sentences.startswith("8 sentences ")
    assert sentences.endswith(": 4 of ledge, 2 of mittens, 1 of mustache, 1 of spade")
    assert replaced.startswith("3 replaced_sentences ") and replaced.endswith(": 2 of ledge, 1 of spade")
    assert words.startswith(f"2 of {len(STUDY) + 2} words ") and words.endswith(": mustache, spade")
    without = [word for word, entry in STUDY.items() if "replaced_sentences" not in entry]
    assert without_contexts.startswith(f"P1 is empty for 1 of {len(STUDY)} words")
    assert without_contexts.endswith(": mittens")
    assert empty.startswith(f"P2 is empty for {len(without)} of {len(STUDY)} words")
    assert empty.endswith(f": {', '.join(without)}")


def test_each_word_has_a_safe_distinct_file_name(study: Run) -> None:
    sizes = {len(token_ids(" " + word)) for word in STUDY}
    assert_figures(study.results, sizes, words=len(STUDY))
    names = [file.name for file in (study.results / "words").iterdir()]
    assert len(names) == len(STUDY)
    for name in names:
        assert len(name.encode()) <= 120, name
        assert not re.search(r'[<>:"/\\|?*\x00-\x1f\x7f ]', name), name
    assert len({unicodedata.normalize("NFKC", name).casefold() for name in names}) == len(names)


def test_file_names_can_be_read(study: Run) -> None:
    names = [file.name for file in (study.results / "words").iterdir()]
    for word in ("noodle", "ledge", "word", "nul", "aux"):
        assert f"{len(token_ids(' ' + word))}_tokens_{word}.png" in names
    for part in ("1_tokens_CON", "naïve", "日本", "a_b", "lighthouselighthouse", "1_tokens_Word"):
        assert any(part in name for name in names), part


def test_words_never_become_paths_or_markup(study: Run) -> None:
    here = study.results.parents[1]
    assert [file.name for file in here.parent.iterdir()] == ["here"]
    assert {file.name for file in here.iterdir()} == {SCRIPT.name, CONTEXTS_FILE.name, "multitoken_words_plots"}
    assert {file.name for file in study.results.iterdir() if "_tokens.png" not in file.name} == RESULTS
    assert all(file.is_file() for file in (study.results / "words").iterdir())
    assert "glyph" not in study.err.lower()


def test_single_word(miniature: Path, tmp_path: Path) -> None:
    """Nothing is unrelated to it, and nothing perturbed; of the words to plot one is not there."""
    family = link(miniature, tmp_path / "we$\\ird$ [ü]", [0, 8])
    here = place(tmp_path / "here", {"ledge": lower("ledge")}, WORDS_TO_PLOT=["lighthouse", "ledge", "ledge"])
    result = run(here, family)
    assert result.code == 0, result.err
    empty, unknown = result.warnings()
    assert empty.startswith("P2 is empty for 1 of 1 words") and empty.endswith(": ledge")
    assert "WORDS_TO_PLOT" in unknown and unknown.endswith(": lighthouse")
    assert_figures(result.results, [2], words=1)
    assert (result.results / "words" / "2_tokens_ledge.png").exists()
    naive = naive_profiles(family, [0, 8], {"ledge": {**lower("ledge"), "replaced_sentences": []}})
    assert_like_naive(result, [0, 8], ["ledge"], naive)
    assert all(line.endswith(",,") for line in result.tables()[0].decode().splitlines()[1:])


# ------------------------------------------------------------------------------ interrupted work is kept


def test_killed_run_goes_on(main_run: Run, miniature: Path, tmp_path: Path) -> None:
    here = place(tmp_path)
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

    result = run(here, miniature)
    assert result.code == 0, result.err
    assert result.to_measure() == len(STEPS) - len(done)
    assert done.items() <= result.kept().items()
    assert {file.name for file in kept.iterdir()} == {f"step{step}.npz" for step in STEPS}
    assert result.tables() == main_run.tables()


def test_added_checkpoint_alone_is_measured(main_run: Run, miniature: Path, tmp_path: Path) -> None:
    """The figures of an earlier run's words vanish with WORDS_TO_PLOT = 0."""
    family = link(miniature, tmp_path / "added", {**{step: step for step in STEPS}, 12: 8})
    here = continued(main_run, tmp_path / "here", family="added")
    assert_figures(here / "multitoken_words_plots" / "added", [2, 3, 4, 5], words=3)
    result = run(here, family)
    assert result.code == 0, result.err
    assert result.warnings() == ["steps 8, 12 have identical weights: the curves stand still between them"]
    assert result.to_measure() == 1
    kept = result.kept()
    assert kept.pop(12) and kept == main_run.kept()
    rows, before = result.rows(), main_run.rows()
    assert {key: row for key, row in rows.items() if key[2] != 12} == before
    copies = {key: row for key, row in rows.items() if key[2] == 12}
    assert len(copies) == len(WORDS) * LAYERS
    assert all(row == pytest.approx(before[word, size, 8, layer]) for (word, size, _, layer), row in copies.items())
    assert_figures(result.results, [2, 3, 4, 5], words=0)


def test_changed_sentence_is_measured_again(main_run: Run, short: Path, tmp_path: Path) -> None:
    entries = json.loads(json.dumps(DOZEN))
    entries["waffle"]["sentences"][2] = "I cannot think of a breakfast more dreadful than a warm waffle"
    here = continued(main_run, tmp_path, entries, "short", WORDS_TO_PLOT=["waffle", "ledge"])
    result = run(here, short)
    assert result.code == 0 and result.warnings() == [], result.err
    assert result.to_measure() == len(SHORT)
    rows, before = result.rows(), main_run.rows()
    changed = {key[0] for key, row in rows.items() if row != pytest.approx(before[key], abs=2e-6)}
    assert changed == {"waffle"}
    assert all(rows[key]["P2"] == pytest.approx(before[key]["P2"], abs=2e-6) for key in rows)
    names = {file.name for file in (result.results / "words").iterdir()}
    assert names == {"2_tokens_ledge.png", "3_tokens_waffle.png"}


# ------------------------------------------------------------------------------ what goes wrong

TWO = ["It was a ledge", "This is a ledge"]
LONGEST = "a " * 253 + "ledge"  # with <|endoftext|> as long as the model has positions
BAD = {  # word: (entry, what is said of it)
    "missing": ({"replaced_sentences": []}, "list of 2 or more sentences"),
    "lonely": ({"sentences": TWO[:1]}, "list of 2 or more sentences"),
    "null": ({"sentences": None}, "list of 2 or more sentences"),
    "string": ({"sentences": "It was a string"}, "list of 2 or more sentences"),
    "list": (TWO, "no word with an object"),
    "number": ({"sentences": [*TWO, 7]}, "sentences that are no text"),
    "blank": ({"sentences": ["It was a blank", " \n"]}, "sentences that are no text"),
    "surrogate": ({"sentences": ["It was \udcff", *TWO]}, "sentences that are no text"),
    "long": ({"sentences": ["It was long", "a " + LONGEST]}, "sentences that are longer than the model's 256"),
    "perturbed": ({"sentences": TWO, "replaced_sentences": "bridge"}, "list of 0 or more replaced_sentences"),
    "untold": ({"sentences": TWO, "replaced_sentences": [None]}, "replaced_sentences that are no text"),
    "longer": (
        {"sentences": TWO, "replaced_sentences": ["word " * 300 + "ledge"]},
        "replaced_sentences that are longer than the model's 256 positions",
    ),
    "": ({"sentences": TWO}, "no word"),
    "\udcff": ({"sentences": TWO}, "no word"),
    "nul\0": ({"sentences": TWO}, "no word"),
    "x" * 300: ({"sentences": []}, "list of 2 or more sentences"),
}
ERRORS = {  # name: (contexts, settings, what the line says)
    "bad entries": (
        {"ledge": {"sentences": [*TWO, LONGEST]}} | {word: entry for word, (entry, _) in BAD.items()},
        {},
        [CONTEXTS_FILE.name, "mend or remove"],
    ),
    "no word is left": (
        {word: OUT[word] for word in ("mustache", "spade")},
        {},
        [CONTEXTS_FILE.name, "no word is left", "end in their word"],
    ),
}


@pytest.fixture(scope="module", autouse=True)
def failures(short: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Run]]]:
    """The runs of ERRORS, made one after the other beside the other tests."""
    places = tmp_path_factory.mktemp("places")
    pool = ThreadPoolExecutor(1)
    runs = {
        name: pool.submit(run, place(places / name, contexts, **settings), short)
        for name, (contexts, settings, _) in ERRORS.items()
    }
    yield runs
    pool.shutdown(cancel_futures=True)


def error_line(result: Run) -> str:
    """The one line that a failed run ends with."""
    assert result.code == 2
    assert "results" not in result.out
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
    named = re.split(r"mend or remove \d+ [a-z ]+: ", line)[1].split("; ")
    assert len(named) == len(BAD) and f"mend or remove {len(named)} " in line
    for word, (_, fault) in BAD.items():
        assert any(text.startswith(f"{word!r:.60} ") and fault in text for text in named), (word, named)
    assert len(token_ids(LONGEST)) == 255 and not any("'ledge'" in text for text in named)
    assert len(line) < 200 + 150 * len(named)


def test_words_that_fell_out_are_named_before_the_error(failures: dict[str, Future[Run]]) -> None:
    warnings = failures["no word is left"].result().warnings()
    assert warnings[-1].startswith("2 of 2 words ") and warnings[-1].endswith(": mustache, spade")
    assert [warning.split(": ")[-1] for warning in warnings[:2]] == ["1 of mustache, 1 of spade", "1 of spade"]


def test_hidden_states_that_are_not_finite(miniature: Path, tmp_path: Path) -> None:
    """A NaN in one row of one embedding: a sentence that ends in it is named, and the steps before it are kept."""
    family = link(miniature, tmp_path / "nan", [0, 1, 2, 4])
    file = family / "step2" / "model.safetensors"
    weights = load_file(file)
    weights["gpt_neox.embed_in.weight"][token_ids(" pajamas")[-1], 5] = torch.nan
    file.unlink()
    save_file(weights, file, metadata={"format": "pt"})
    result = run(place(tmp_path / "here"), family)
    line = error_line(result)
    assert re.search("step ?2, layer 0:", line) and str(family / "step2") in line
    entry = DOZEN["pajamas"]
    assert any(text[-60:] in line for text in entry["sentences"] + entry["replaced_sentences"])
    assert set(result.kept()) == {0, 1}
    assert not (result.results / "perturbation.csv").exists()

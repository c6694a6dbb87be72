"""Bad inputs to the three scripts: each ends a run with exit code 2 and one line that says what is wrong and where.

A row of a table is a case: what is bad, and parts of the line that the user reads.
"""

import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_convergence import ONE_TOKEN, edit_config, link, write

ROOT = Path(__file__).resolve().parents[1]
CONVERGENCE, PERTURBATION = "token_convergence_analysis.py", "multitoken_context_perturbation.py"
DOWNLOAD = "download_checkpoints.py"
BOS = "<|endoftext|>"
WORDS, CONTEXTS = "words_list.json", "multitoken_words_contexts.json"
EASY = json.dumps(dict.fromkeys(ONE_TOKEN, 1)).encode()
INPUTS = {WORDS: EASY, CONTEXTS: b'{"ledge": {"sentences": ["It was a ledge", "This is a ledge"]}}'}


@dataclass
class Case:
    script: str
    parts: list[str]  # of the line
    settings: dict[str, object] = field(default_factory=dict)
    inputs: dict[str, bytes | None] = field(default_factory=dict)  # in the place of INPUTS; None = no such file
    spoil: Callable[[Path], object] = lambda family: None  # the family of steps 0 and 32
    arguments: tuple[str, ...] = ("family",)
    kilobytes: int | None = None  # that a file may have, which stands for a full disk


def settings(script: str, *rows: tuple[str, object, str]) -> dict[str, Case]:
    """Cases of (setting, value, what is expected instead)."""
    arguments = () if script == DOWNLOAD else ("family",)
    return {
        f"{script[:5]} {name} = {value!r}": Case(
            script, [f"{name} = {value!r}", expected], {name: value}, arguments=arguments
        )
        for name, value, expected in rows
    }


def inputs(script: str, file: str, **cases: tuple[bytes | None, list[str]]) -> dict[str, Case]:
    return {name: Case(script, [file, *parts], inputs={file: content}) for name, (content, parts) in cases.items()}


def families(**cases: tuple[Callable[[Path], object], list[str]]) -> dict[str, Case]:
    return {name: Case(CONVERGENCE, parts, spoil=spoil) for name, (spoil, parts) in cases.items()}


def config(**entries: object) -> Callable[[Path], None]:
    def spoil(family: Path) -> None:
        for step in ("step0", "step32"):
            edit_config(family / step, **entries)

    return spoil


def final(name: str, content: bytes | None) -> Callable[[Path], None]:
    """A file of the final checkpoint is another, or missing."""

    def spoil(family: Path) -> None:
        if content is None:
            (family / "step32" / name).unlink()
        else:
            write(family / "step32" / name, content)

    return spoil


def weights(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """The tensors of step 0 are changed."""

    def spoil(family: Path) -> None:
        file = family / "step0" / "model.safetensors"
        write(file, {name: change(tensor).contiguous() for name, tensor in load_file(file).items()})

    return spoil


class Harm:
    """What a pickled file must not do."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch harmed",)


def pickled(content: object) -> Callable[[Path], None]:
    """The weights of step 0 are a pickle."""

    def spoil(family: Path) -> None:
        (family / "step0" / "model.safetensors").unlink()
        torch.save(content, family / "step0" / "pytorch_model.bin", pickle_module=pickle)

    return spoil


def without_steps(family: Path) -> None:
    for folder in list(family.iterdir()):
        folder.rename(family / f"{folder.name}.partial")


def cut_weights(family: Path) -> None:
    file = family / "step0" / "model.safetensors"
    write(file, file.read_bytes()[:1_000_000])


def folder_of_weights(family: Path) -> None:
    file = family / "step0" / "model.safetensors"
    file.unlink()
    file.mkdir()


def forget_everything(tokenizer: dict) -> None:
    tokenizer["model"] |= {"vocab": {}, "merges": []}


def index(content: bytes) -> Callable[[Path], None]:
    def spoil(family: Path) -> None:
        (family / "step0" / "model.safetensors").unlink()
        write(family / "step0" / "model.safetensors.index.json", content)

    return spoil


def tokenizer(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def spoil(family: Path) -> None:
        content = json.loads((family / "step32" / "tokenizer.json").read_text(encoding="utf-8"))
        change(content)
        for step in ("step0", "step32"):
            write(family / step / "tokenizer.json", json.dumps(content).encode())

    return spoil


CASES = {
    **settings(
        DOWNLOAD,
        ("MODEL_ID", "", "a model's name"),
        ("MODEL_ID", "a b/ü", "a model's name"),
        ("MODEL_ID", None, "a model's name"),
        ("MODEL_ID", 123, "a model's name"),
        ("STEPS", [], "a list of different training steps"),
        ("STEPS", [-1], "a list of different training steps"),
        ("STEPS", ["a"], "a list of different training steps"),
        ("STEPS", [4, 4], "a list of different training steps"),
        ("STEPS", 4, "a list of different training steps"),
        ("CHECKPOINTS_DIR", "", "a folder's name"),
        ("CHECKPOINTS_DIR", 7, "a folder's name"),
        ("DOWNLOADS_AT_ONCE", 0, "above 0"),
        ("DOWNLOADS_AT_ONCE", "x", "above 0"),
        ("TRIES", 0, "above 0"),
        ("PAUSE", -1, "a number of seconds"),
        ("TIMEOUT", None, "above 0"),
        ("TIMEOUT", float("nan"), "above 0"),
    ),
    **settings(
        CONVERGENCE,
        ("CHECKPOINTS_DIR", None, "the name of a folder"),
        ("RESULTS_DIR", "", "the name of a folder"),
        ("WORDS_FILE", ["a"], "the name of a file"),
        ("GROUPS", (), "numbers of tokens"),
        ("GROUPS", (0, 1), "numbers of tokens"),
        ("GROUPS", 4, "numbers of tokens"),
        ("GROUPS", ("1",), "numbers of tokens"),
        ("WORDS_PER_GROUP", 1, "None or a number of at least 2"),
        ("WORDS_PER_GROUP", 2.5, "None or a number of at least 2"),
        ("MIN_GROUP_SIZE", 0, "at least 2"),
        ("LEADING_SPACE", "no", "True or False"),
        ("PREPEND_BOS", 1, "True or False"),
        ("DTYPE", "float8", '"bfloat16"'),
        ("DTYPE", None, '"bfloat16"'),
        ("DEVICE", "abacus", '"cpu"'),
        ("DEVICE", "meta", '"cpu"'),
        ("DEVICE", "cuda:99", '"cpu"'),
        ("DEVICE", 0, '"cpu"'),
        ("BATCH_TOKENS", -1, "at least 1"),
        ("BATCH_TOKENS", 1e3, "at least 1"),
        ("SEED", -1, "at least 0"),
        ("BOOTSTRAP_RESAMPLES", 0, "from 1 to 100000"),
        ("BOOTSTRAP_RESAMPLES", 10**12, "from 1 to 100000"),
    ),
    **settings(
        PERTURBATION,
        ("CONTEXTS_FILE", "", "the name of a file"),
        ("WORDS_TO_PLOT", -1, "at least 0"),
        ("WORDS_TO_PLOT", ["ledge", 7], "list of words"),
        ("WORDS_TO_PLOT", "ledge", "list of words"),
        ("DTYPE", "int8", '"bfloat16"'),
        ("BATCH_TOKENS", 0, "at least 1"),
        ("SEED", True, "at least 0"),
    ),
    **inputs(
        *(CONVERGENCE, WORDS),
        no_words_file=(None, ["cannot be read", '{"word":']),
        words_are_no_json=(b'{"one": 1,\n "two": 2,\n three}', ["line 3", "not JSON", '{"word":']),
        words_are_a_list=(b'["one", "two"]', ["line 1", "list", "expected an object"]),
        words_are_empty=(b"{}", ["line 1", "empty", "expected an object"]),
        words_are_an_empty_file=(b"", ["line 1", "not JSON"]),
        words_in_utf_16=('{"naïve": 1}'.encode("utf-16"), ["not JSON", "codec"]),
        words_in_latin_1=('{"naïve": 1}'.encode("latin-1"), ["not JSON", "codec"]),
        words_nested_without_end=(b"[" * 100_000, ["not JSON"]),
        a_frequency_of_5000_digits=(b'{"a": %s}' % (b"9" * 5000), ["not JSON", "digits"]),
        unusable_words=(
            json.dumps({"a": 1, "two words": 1, "": 1, "text": "often", "\ud800": 1, "yes": True}).encode(),
            ["'two words': 1", "'': 1", "'text': 'often'", "ud800", "'yes': True"],
        ),
        too_few_words=(b'{"a": 1, "the": 1}', ["MIN_GROUP_SIZE = 10"]),
    ),
    **inputs(
        *(PERTURBATION, CONTEXTS),
        no_contexts_file=(None, ["cannot be read", '"sentences": [...]']),
        contexts_are_no_json=(b'{"noodle": {\n"sentences": [,]}}', ["line 2", "not JSON"]),
        contexts_are_a_number=(b"7", ["found a int", "expected an object"]),
        an_entry_is_a_list=(b'{"ledge": ["a ledge", "the ledge"]}', ["mend or remove", "'ledge'"]),
        one_sentence_only=(b'{"ledge": {"sentences": ["a ledge"]}}', ["'ledge' needs a list of 2 or more sentences"]),
        a_sentence_is_a_number=(
            b'{"ledge": {"sentences": ["a ledge", 7]}}',
            ["'ledge' has sentences that are no text"],
        ),
        sentences_end_with_a_stop=(
            b'{"ledge": {"sentences": ["It was a ledge.", "This is a ledge."]}}',
            ["no word is left", "end in their word, without a stop"],
        ),
    ),
    "words_longer_than_the_model": Case(
        *(CONVERGENCE, ["300 tokens", "256 positions", "change GROUPS"], {"GROUPS": (300,), "MIN_GROUP_SIZE": 2}),
        {WORDS: json.dumps({"q-" * 150: 1, "q-" * 149 + "r-": 1}).encode()},
    ),
    "no_family": Case(CONVERGENCE, ["absent", "`python download_checkpoints.py`"], arguments=("absent",)),
    "no_family_of_contexts": Case(PERTURBATION, ["absent", "`python tests/miniature.py`"], arguments=("absent",)),
    "unknown_option": Case(CONVERGENCE, ["unrecognized arguments: --nonsense"], arguments=("family", "--nonsense")),
    "two_families": Case(PERTURBATION, ["unrecognized arguments"], arguments=("family", "family")),
    "steps_as_arguments": Case(DOWNLOAD, ["unrecognized arguments: 0"], arguments=("0",)),
    **families(
        empty_family=(without_steps, ["no checkpoint", "step0"]),
        no_config=(final("config.json", None), ["step32", "config.json", "fetch"]),
        config_is_no_json=(final("config.json", b'{"model_type": '), ["step32", "config.json"]),
        config_is_a_list=(final("config.json", b"[]"), ["step32", "config.json", "expected gpt_neox"]),
        another_architecture=(config(model_type="gpt2"), ["step32", "gpt2", "expected gpt_neox"]),
        width_is_a_word=(config(hidden_size="wide"), ["step32", "hidden_size"]),
        width_is_huge=(config(hidden_size=10**12), ["step0", "overflow", "1000000000000"]),
        no_heads=(config(num_attention_heads=0), ["step32", "config.json"]),
        heads_do_not_divide_the_width=(
            config(num_attention_heads=7),
            ["step32", "config.json", "number of attention heads"],
        ),
        a_million_layers=(config(num_hidden_layers=10**6), ["step0", "1000000 layers"]),
        no_layers=(config(num_hidden_layers=0), ["step0", "0 layers"]),
        minus_one_layer=(config(num_hidden_layers=-1), ["step0", "-1 layers"]),
        small_vocabulary=(config(vocab_size=10), ["step32", "10 tokens only"]),
        no_positions=(config(max_position_embeddings=0), ["0 positions"]),
        unknown_activation=(config(hidden_act="gelatine"), ["step0", "found no 'gelatine'"]),
        no_tokenizer=(final("tokenizer.json", None), ["step32", "tokenizer.json", "fetch"]),
        tokenizer_is_no_json=(final("tokenizer.json", b"not JSON"), ["step32", "tokenizer.json"]),
        tokenizer_without_bos=(
            tokenizer(lambda content: (content["added_tokens"].pop(0), content["model"]["vocab"].pop(BOS))),
            [BOS, "PREPEND_BOS = False"],
        ),
        tokenizer_that_reads_nothing=(tokenizer(forget_everything), ["MIN_GROUP_SIZE = 10"]),
        weights_are_not_numbers=(weights(lambda tensor: tensor * torch.nan), ["step0", "not finite", "fetch"]),
        weights_are_infinite=(weights(lambda tensor: tensor + torch.inf), ["step0", "not finite", "fetch"]),
        weights_are_zero=(weights(torch.zeros_like), ["step0", "or zero", "fetch"]),
        weights_are_whole_numbers=(weights(torch.Tensor.int), ["step0", "int32", "floating point"]),
        weights_are_flat=(weights(torch.Tensor.flatten), ["step0", "expected floating point"]),
        weights_are_cut=(cut_weights, ["step0", "model.safetensors"]),
        weights_are_noise=(final("model.safetensors", bytes(range(256)) * 99), ["step32", "model.safetensors"]),
        weights_are_a_folder=(folder_of_weights, ["step0", "no weights"]),
        pickle_is_a_list=(pickled([1, 2]), ["step0", "pytorch_model.bin"]),
        pickle_holds_words=(
            pickled({"embed_in.weight": "none"} | dict.fromkeys("abcdef", 0)),
            ["step0", "lack the tensor embed_in.weight"],
        ),
        pickle_would_run_a_command=(pickled(Harm()), ["step0", "pytorch_model.bin"]),
        index_without_files=(index(b"{}"), ["step0", "model.safetensors.index.json: found no 'weight_map'"]),
        index_is_no_json=(index(b"{"), ["step0", "model.safetensors.index.json"]),
        index_names_a_file_that_is_not_there=(index(b'{"weight_map": {"a": "b.safetensors"}}'), ["step0", "b.saf"]),
    ),
    "results_are_a_file": Case(CONVERGENCE, ["Not a directory", "RESULTS_DIR"], {"RESULTS_DIR": WORDS}),
    "results_are_a_file_of_contexts": Case(PERTURBATION, ["Not a directory", "RESULTS_DIR"], {"RESULTS_DIR": CONTEXTS}),
    "disk_is_full": Case(CONVERGENCE, ["File too large", "make room"], kilobytes=1),
    "disk_is_full_of_contexts": Case(PERTURBATION, ["File too large", "make room"], kilobytes=1),
    "results_on_a_read_only_system": Case(
        CONVERGENCE, ["/sys/results", "another RESULTS_DIR"], {"RESULTS_DIR": "/sys/results"}
    ),
}


def place(folder: Path, miniature: Path, case: Case) -> Path:
    """Puts a copy of the script with its constants set, its inputs and a family into a folder."""
    folder.mkdir()
    text = (ROOT / case.script).read_text(encoding="utf-8")
    for name, value in case.settings.items():
        text, count = re.subn(rf"(?m)^{name} = .*$", lambda _, line=f"{name} = {value!r}": line, text)
        assert count == 1, name
    (folder / case.script).write_text(text.replace("= nan", '= float("nan")'), encoding="utf-8")
    for name, content in (INPUTS | case.inputs).items():
        if content is not None:
            (folder / name).write_bytes(content)
    case.spoil(link(miniature, folder / "family", [0, 32]))
    return folder


def run(folder: Path, case: Case) -> subprocess.CompletedProcess:
    command = [sys.executable, case.script, *case.arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    if case.kilobytes is not None:
        command = ["bash", "-c", f'ulimit -f {case.kilobytes}; exec "$@"', "bash", *command]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def runs(miniature: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Path, Future]]]:
    """A folder and a run for each case, two at a time."""
    folder = tmp_path_factory.mktemp("cases")
    with ThreadPoolExecutor(2) as pool:
        places = {name: place(folder / str(number), miniature, CASES[name]) for number, name in enumerate(CASES)}
        yield {name: (place, pool.submit(run, place, CASES[name])) for name, place in places.items()}


@pytest.mark.parametrize("name", CASES)
def test_one_line_says_what_is_wrong(runs: dict[str, tuple[Path, Future]], name: str) -> None:
    folder, future = runs[name]
    process = future.result()
    assert "Traceback" not in process.stderr, process.stderr
    assert process.returncode == 2, process.stderr
    errors = [line for line in process.stderr.splitlines() if "error: " in line]
    assert errors == [process.stderr.splitlines()[-1]] and errors[0].startswith("error: "), process.stderr
    for part in CASES[name].parts:
        assert part in errors[0], errors[0]
    assert "results  " not in process.stdout
    assert not [file for file in folder.rglob("*") if file.suffix in (".csv", ".png") or file.name == "harmed"]

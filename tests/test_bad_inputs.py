"""Bad inputs to the three scripts: each ends a run with exit code 2 and one line that says what is wrong and where.

A row of the table CASES is a case: what is bad, and parts of the line that the user reads. After it comes what goes
wrong during a run, and what is odd and no error. Every run is a process of its own. Most are forked from one that has
imported the libraries, which takes a new Python four seconds; where the start itself matters, it is a new one.
"""

import csv
import json
import multiprocessing
import os
import pickle
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_convergence import ONE_TOKEN, edit_config, link, write

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import multitoken_context_perturbation as sibling  # noqa: E402
import token_convergence_analysis as script  # noqa: E402

CONVERGENCE, PERTURBATION = "token_convergence_analysis.py", "multitoken_context_perturbation.py"
DOWNLOAD = "download_checkpoints.py"
RESULTS = {CONVERGENCE: "convergance_plots", PERTURBATION: "multitoken_words_plots"}
TABLE = {CONVERGENCE: "convergence.csv", PERTURBATION: "perturbation.csv"}
BOS = "<|endoftext|>"
WORDS, CONTEXTS = "words_list.json", "multitoken_words_contexts.json"
TWO_TOKENS = ["lighthouse", "unicorn", "unarmed", "panda"]
LEDGE = {
    "sentences": ["It was a ledge", "This is a ledge"],
    "replaced_sentences": ["It was a barge"],
}
INPUTS = {WORDS: json.dumps(dict.fromkeys(ONE_TOKEN, 1)).encode(), CONTEXTS: json.dumps({"ledge": LEDGE}).encode()}

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    ["matplotlib.figure", "safetensors.torch", "torch.distributed", "transformers.models.gpt_neox.modeling_gpt_neox"]
)


@dataclass
class Case:
    script: str
    parts: list[str]  # of the line
    settings: dict[str, object] = field(default_factory=dict)
    inputs: dict[str, bytes | None] = field(default_factory=dict)  # in the place of INPUTS; None = no such file
    spoil: Callable[[Path], object] = lambda family: None  # the family of steps 0 and 32
    arguments: tuple[str, ...] = ("family",)
    kilobytes: int | None = None  # that a file may have, which stands for a full disk
    megabytes: int | None = None  # of memory that the script may add to what the libraries take


class Run(NamedTuple):
    code: int | None
    out: str
    err: str


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


def pipe(name: str) -> Callable[[Path], None]:
    """A file of the final checkpoint, or an input beside the script, is a named pipe, to which nobody writes."""

    def spoil(family: Path) -> None:
        file = family / name
        file.unlink()
        os.mkfifo(file)

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


def pickled_weights(change: Callable[[torch.Tensor], torch.Tensor], **how: bool) -> Callable[[Path], None]:
    """The weights of step 0 are a pickle, in which the token embedding is changed."""

    def spoil(family: Path) -> None:
        file = family / "step0" / "model.safetensors"
        content = load_file(file)
        content["gpt_neox.embed_in.weight"] = change(content["gpt_neox.embed_in.weight"])
        file.unlink()
        torch.save(content, family / "step0" / "pytorch_model.bin", **how)

    return spoil


def without_steps(family: Path) -> None:
    for folder in list(family.iterdir()):
        folder.rename(family / f"of_{folder.name}")


def cut_weights(family: Path) -> None:
    file = family / "step0" / "model.safetensors"
    write(file, file.read_bytes()[:1_000_000])


def folder_of_weights(family: Path) -> None:
    file = family / "step0" / "model.safetensors"
    file.unlink()
    file.mkdir()


def several_faults(family: Path) -> None:
    cut_weights(family)
    for step in (1, 2):
        (family / f"step{step}").mkdir()
    edit_config(family / "step0", model_type="gpt_neox")
    write(family / "step2" / "config.json", (family / "step0" / "config.json").read_bytes())


def forget_everything(tokenizer: dict) -> None:
    tokenizer["model"] |= {"vocab": {}, "merges": []}


def know_one_word(tokenizer: dict) -> None:
    tokenizer["model"] = {"type": "WordLevel", "vocab": {BOS: 0, "time": 1}, "unk_token": "nothing"}


def index(content: bytes) -> Callable[[Path], None]:
    def spoil(family: Path) -> None:
        (family / "step0" / "model.safetensors").rename(family / "elsewhere.safetensors")
        write(family / "step0" / "model.safetensors.index.json", content)

    return spoil


def index_of(file: str) -> Callable[[Path], None]:
    return index(json.dumps({"weight_map": {"gpt_neox.embed_in.weight": file}}).encode())


def tokenizer(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def spoil(family: Path) -> None:
        content = json.loads((family / "step32" / "tokenizer.json").read_text(encoding="utf-8"))
        change(content)
        for step in ("step0", "step32"):
            write(family / step / "tokenizer.json", json.dumps(content).encode())

    return spoil


def damaged_record(family: Path) -> None:
    file = family.parent / RESULTS[CONVERGENCE] / family.name / "kept" / "run.json"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"[]")


def words(*names: str) -> dict[str, bytes]:
    return {WORDS: json.dumps(dict.fromkeys(names, 1)).encode()}


def contexts(**entries: object) -> bytes:
    return json.dumps(entries).encode()


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
        ("KINDS", (), 'some of ("word", "recombined", "carried")'),
        ("KINDS", "word", 'some of ("word", "recombined", "carried")'),
        ("KINDS", ("word", "words"), 'some of ("word", "recombined", "carried")'),
        ("KINDS", ("word", ["carried"]), 'some of ("word", "recombined", "carried")'),
        ("KINDS", ("word", "word"), 'some of ("word", "recombined", "carried")'),
        ("CARRIER", " ", "the opening of a sentence"),
        ("CARRIER", 3, "the opening of a sentence"),
        ("MATCH_FREQUENCY", None, "True or False"),
        ("WORDS_PER_GROUP", 3, "None or a number of at least 4"),
        ("WORDS_PER_GROUP", 4.5, "None or a number of at least 4"),
        ("MIN_GROUP_SIZE", 3, "at least 4"),
        ("LEADING_SPACE", "no", "True or False"),
        ("PREPEND_BOS", 1, "True or False"),
        ("DTYPE", "float8", '"bfloat16"'),
        ("DTYPE", ["float32"], '"bfloat16"'),
        ("DEVICE", "abacus", '"cpu"'),
        ("DEVICE", "meta", '"cpu"'),
        ("DEVICE", "cuda:99", '"cpu"'),
        ("DEVICE", 0, '"cpu"'),
        ("BATCH_TOKENS", 0, "None or a number of at least 1"),
        ("BATCH_TOKENS", 1e3, "None or a number of at least 1"),
        ("SEED", -1, "at least 0"),
        ("BOOTSTRAP_RESAMPLES", 0, "from 1 to 10000"),
        ("BOOTSTRAP_RESAMPLES", 10_001, "from 1 to 10000"),
    ),
    **settings(
        PERTURBATION,
        ("CONTEXTS_FILE", "", "the name of a file"),
        ("SAME_LENGTH", 1, "True or False"),
        ("WORDS_TO_PLOT", -1, "at least 0"),
        ("WORDS_TO_PLOT", True, "at least 0"),
        ("WORDS_TO_PLOT", ["ledge", 7], "list of words"),
        ("WORDS_TO_PLOT", "ledge", "list of words"),
        ("DTYPE", "int8", '"bfloat16"'),
        ("BATCH_TOKENS", -1, "None or a number of at least 1"),
        ("SEED", True, "at least 0"),
        ("BOOTSTRAP_RESAMPLES", 10**12, "from 1 to 10000"),
    ),
    **inputs(
        *(CONVERGENCE, WORDS),
        no_words_file=(None, ["is missing", '{"word":']),
        words_are_no_json=(b'{"one": 1,\n "two": 2,\n three}', ["JSONDecodeError", "line 3", '{"word":']),
        words_are_a_list=(b'["one", "two"]', ["it holds ['one', 'two']", "expected an object"]),
        words_are_empty=(b"{}", ["it holds {}", "expected an object"]),
        words_are_an_empty_file=(b"", ["JSONDecodeError", "line 1"]),
        words_in_utf_16=('{"naïve": 1}'.encode("utf-16"), ["UnicodeDecodeError", "codec"]),
        words_in_latin_1=('{"naïve": 1}'.encode("latin-1"), ["UnicodeDecodeError", "codec"]),
        words_nested_without_end=(b"[" * 100_000, ["RecursionError"]),
        words_that_stand_there_twice=(b'{"a": 1, "the": 2, "a": 3}', ["'a' occurs 2 times"]),
        a_frequency_of_5000_digits=(b'{"a": %s}' % (b"9" * 5000), ["ValueError", "digits"]),
        a_frequency_of_400_digits=(b'{"a": 1%s}' % (b"0" * 400), ["frequency", "'a': 1000"]),
        frequencies_that_are_none=(
            b'{"a": 0, "b": -1, "c": NaN, "d": Infinity, "e": 1e400, "f": true}',
            ["6 entries", "'a': 0", "'b': -1", "'c': nan", "'d': inf", "'e': inf"],
        ),
        unusable_words=(
            json.dumps({"time": 1, "two words": 1, "": 1, "text": "often", "\ud800": 1, "\x1b[31m": None}).encode(),
            ["'two words': 1", "'': 1", "'text': 'often'", "ud800", r"'\x1b[31m': None"],
        ),
        too_few_words=(b'{"a": 1, "the": 1}', ["MIN_GROUP_SIZE = 10", "add words"]),
    ),
    **inputs(
        *(PERTURBATION, CONTEXTS),
        no_contexts_file=(None, ["is missing", '"sentences": [...]']),
        contexts_are_no_json=(b'{"noodle": {\n"sentences": [,]}}', ["line 2", "JSONDecodeError"]),
        contexts_are_a_number=(b"7", ["it holds 7", "expected an object"]),
        contexts_that_stand_there_twice=(
            b'{"ledge": {"sentences": ["a ledge", "the ledge"], "sentences": []}}',
            ["'sentences' occurs 2 times"],
        ),
        unusable_entries=(
            contexts(
                ledge=["a ledge", "the ledge"],
                one={"sentences": ["only one"]},
                none={},
                number={"sentences": ["a number", 7]},
                text={"sentences": "a text"},
                blank={"sentences": ["a blank", "the blank"], "replaced_sentences": [" "]},
                nothing={"sentences": ["a nothing", "the nothing"], "replaced_sentences": None},
                **{" ": LEDGE, "\x1b[31m\r": None},
            ),
            [
                "correct or remove 9 entries",
                "'ledge' is not a word with an object",
                "'one' needs a list of 2 or more sentences",
                "'none' needs a list of 2 or more sentences",
                "'number' has sentences that are no text",
                "'text' needs a list of 2 or more sentences",
                "'blank' has replaced_sentences that are no text",
                "'nothing' needs a list of 0 or more replaced_sentences",
                "' ' is not a word",
                r"'\x1b[31m\r' is not a word",
            ],
        ),
        sentences_end_with_a_stop=(
            contexts(ledge={"sentences": ["It was a ledge.", "This is a ledge."]}),
            ["no word is left", "end in their word"],
        ),
        a_sentence_longer_than_the_model=(
            contexts(ledge={"sentences": ["It was a ledge", "and " * 300 + "a ledge"]}),
            ["'and and and", "256 positions"],
        ),
    ),
    "words_longer_than_the_model": Case(
        *(CONVERGENCE, ["q-q-q-", "has 301 tokens", "256 positions", "change GROUPS"]),
        {"GROUPS": (300,), "MIN_GROUP_SIZE": 4, "KINDS": ("word",)},
        words(*("q-" * 149 + f"{letter}-" for letter in "qrst")),
    ),
    "carrier_is_too_short": Case(
        *(CONVERGENCE, ["CARRIER has 1 token,", "words 2: make it longer"]),
        {"GROUPS": (2,), "MIN_GROUP_SIZE": 4, "CARRIER": "The"},
        words(*TWO_TOKENS),
    ),
    "every_recombination_is_a_word": Case(
        *(CONVERGENCE, [WORDS, "no way to recombine the words of 2 tokens", 'take "recombined" out of KINDS']),
        {"GROUPS": (2,), "MIN_GROUP_SIZE": 4},
        words("unicorn", "unarmed", "unnoticed", "unborn"),
    ),
    "nothing_to_recombine": Case(CONVERGENCE, ["KINDS", "recombine"], {"KINDS": ("recombined",)}),
    "no_family": Case(CONVERGENCE, ["absent", "`python download_checkpoints.py`"], arguments=("absent",)),
    "no_family_of_contexts": Case(PERTURBATION, ["absent", "`python tests/miniature.py`"], arguments=("absent",)),
    "a_family_that_a_terminal_would_obey": Case(
        CONVERGENCE, [r"no\x1b[31m\rfamily"], arguments=("no\x1b[31m\rfamily",)
    ),
    "a_family_whose_name_is_too_long": Case(CONVERGENCE, ["xxx"], arguments=("x" * 300,)),
    "the_root_is_no_family": Case(CONVERGENCE, ["/", "step0"], arguments=("/",)),
    "unknown_option": Case(CONVERGENCE, ["unrecognized arguments: --nonsense"], arguments=("family", "--nonsense")),
    "two_families": Case(PERTURBATION, ["unrecognized arguments"], arguments=("family", "family")),
    "steps_as_arguments": Case(DOWNLOAD, ["unrecognized arguments: 0"], arguments=("0",)),
    **families(
        empty_family=(without_steps, ["holds no checkpoint", "step0"]),
        a_step_is_a_file=(lambda family: write(family / "step7", b""), ["step7 is not a folder", "remove"]),
        the_last_step_leads_nowhere=(
            lambda family: (family / "step64").symlink_to("gone"),
            ["step64 is not a folder", "fetch"],
        ),
        several_checkpoints=(
            several_faults,
            ["step0: model.safetensors", "step1/config.json: expected", "is missing", "step2: it has no weights"],
        ),
        no_config=(final("config.json", None), ["step32", "config.json", "fetch"]),
        config_is_no_json=(final("config.json", b'{"model_type": '), ["step32", "config.json"]),
        config_is_a_list=(final("config.json", b"[]"), ["step32", "config.json", "it holds []"]),
        config_is_a_pipe=(pipe("step32/config.json"), ["step32", "config.json", "not a file"]),
        another_architecture=(config(model_type="gpt2"), ["step32", "gpt2", "expected gpt_neox"]),
        width_is_a_word=(config(hidden_size="wide"), ["step32", "hidden_size"]),
        width_is_huge=(config(hidden_size=10**12), ["step32", "1000000000000"]),
        no_heads=(config(num_attention_heads=0), ["step32"]),
        heads_do_not_divide_the_width=(config(num_attention_heads=7), ["step32", "number of attention heads"]),
        a_million_layers=(config(num_hidden_layers=10**6), ["step32", "1000000 layers"]),
        three_layers_of_six=(config(num_hidden_layers=3), ["step32", "no place for", "such as layers.3."]),
        no_layers=(config(num_hidden_layers=0), ["step32", "0 layers"]),
        minus_one_layer=(config(num_hidden_layers=-1), ["step32", "-1 layers"]),
        no_biases=(config(attention_bias=False), ["step32", "no place for", "bias"]),
        small_vocabulary=(config(vocab_size=10), ["step32", "knows 10 only"]),
        no_positions=(config(max_position_embeddings=0), ["0 positions"]),
        unknown_activation=(config(hidden_act="gelatine"), ["step32", "gelatine"]),
        rotation_of_more_than_there_is=(
            config(rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 2.0}),
            ["step32", "broadcast"],
        ),
        no_tokenizer=(final("tokenizer.json", None), ["step32", "tokenizer.json", "fetch"]),
        tokenizer_is_no_json=(final("tokenizer.json", b"not JSON"), ["step32"]),
        tokenizer_is_a_pipe=(pipe("step32/tokenizer.json"), ["step32", "tokenizer.json"]),
        tokenizer_without_bos=(
            tokenizer(lambda content: (content["added_tokens"].pop(0), content["model"]["vocab"].pop(BOS))),
            [BOS, "PREPEND_BOS = False"],
        ),
        tokenizer_that_reads_nothing=(tokenizer(forget_everything), ["MIN_GROUP_SIZE = 10"]),
        tokenizer_that_knows_one_word=(tokenizer(know_one_word), ["tokenizer cannot read", "fetch"]),
        weights_are_not_numbers=(weights(lambda tensor: tensor * torch.nan), ["step0", "not finite", "fetch"]),
        weights_are_infinite=(weights(lambda tensor: tensor + torch.inf), ["step0", "not finite", "fetch"]),
        weights_are_zero=(weights(torch.zeros_like), ["step0", "or zero", "fetch"]),
        weights_are_whole_numbers=(weights(torch.Tensor.int), ["step0", "floating point"]),
        weights_are_flat=(weights(torch.Tensor.flatten), ["step0", "size mismatch"]),
        weights_are_cut=(cut_weights, ["step0", "model.safetensors"]),
        weights_are_noise=(final("model.safetensors", bytes(range(256)) * 99), ["step32", "model.safetensors"]),
        weights_are_empty=(final("model.safetensors", b""), ["step32", "model.safetensors"]),
        weights_are_a_folder=(folder_of_weights, ["step0", "no weights"]),
        weights_are_a_pipe=(pipe("step32/model.safetensors"), ["step32", "no weights"]),
        pickle_is_a_list=(pickled([1, 2]), ["step0", "pytorch_model.bin"]),
        pickle_holds_words=(
            pickled({"embed_in.weight": "none"} | dict.fromkeys("abcdef", 0)),
            ["step0", "expected torch.Tensor"],
        ),
        pickle_would_run_a_command=(pickled(Harm()), ["step0", "pytorch_model.bin"]),
        pickle_is_sparse=(pickled_weights(torch.Tensor.to_sparse), ["step0"]),
        pickle_is_of_no_device=(pickled_weights(lambda tensor: tensor.to("meta")), ["step0"]),
        index_without_files=(index(b"{}"), ["step0", "model.safetensors.index.json"]),
        index_is_no_json=(index(b"{"), ["step0", "model.safetensors.index.json"]),
        index_of_a_list=(index(b'{"weight_map": ["a"]}'), ["step0"]),
        index_of_a_number=(index(b'{"weight_map": {"a": 7}}'), ["step0"]),
        index_names_a_file_that_is_not_there=(index_of("b.safetensors"), ["step0", "b.safetensors"]),
        index_leads_out_of_the_folder=(index_of("../elsewhere.safetensors"), ["step0", "../elsewhere.safetensors"]),
        index_names_a_path=(index_of("/etc/hostname"), ["step0", "/etc/hostname"]),
    ),
    "words_are_a_pipe": Case(CONVERGENCE, [WORDS, "not a file"], spoil=pipe(f"../{WORDS}")),
    "contexts_are_a_pipe": Case(PERTURBATION, [CONTEXTS, "not a file"], spoil=pipe(f"../{CONTEXTS}")),
    "contexts_that_the_tokenizer_cannot_read": Case(
        PERTURBATION, ["tokenizer cannot read", "fetch"], spoil=tokenizer(know_one_word)
    ),
    "contexts_that_the_tokenizer_reads_as_nothing": Case(
        PERTURBATION, ["no word is left"], spoil=tokenizer(forget_everything)
    ),
    "results_are_a_file": Case(CONVERGENCE, ["Not a directory", "RESULTS_DIR"], {"RESULTS_DIR": WORDS}),
    "results_are_a_file_of_contexts": Case(PERTURBATION, ["Not a directory", "RESULTS_DIR"], {"RESULTS_DIR": CONTEXTS}),
    "record_of_results_is_damaged": Case(CONVERGENCE, ["run.json", "it holds []", "delete it"], spoil=damaged_record),
    "disk_is_full": Case(CONVERGENCE, ["File too large", "make room"], kilobytes=3),
    "disk_is_full_of_contexts": Case(PERTURBATION, ["File too large", "make room"], kilobytes=3),
    "results_on_a_read_only_system": Case(
        CONVERGENCE, ["/sys/results", "another RESULTS_DIR"], {"RESULTS_DIR": "/sys/results"}
    ),
    "no_memory_for_a_batch": Case(
        *(CONVERGENCE, ["memory", "lower BATCH_TOKENS"]),
        {"BATCH_TOKENS": 10**6, "WORDS_PER_GROUP": None, "KINDS": ("word",), "MATCH_FREQUENCY": False},
        {WORDS: (ROOT / WORDS).read_bytes()},
        megabytes=500,
    ),
    "no_memory_for_the_intervals": Case(
        *(CONVERGENCE, ["emory", "lower", "BOOTSTRAP_RESAMPLES"]),
        {"BOOTSTRAP_RESAMPLES": 10_000, "WORDS_PER_GROUP": 4000, "KINDS": ("word",), "GROUPS": (1, 2)},
        {WORDS: (ROOT / WORDS).read_bytes()},
        megabytes=500,
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


def run_script(folder: Path, case: Case) -> None:
    """Makes this process that of a case's script. Its output goes to files beside the folder: see finish.

    If the folder holds another step 0 in `later`, it takes the place of the family's when the results folder is made.
    """
    os.chdir(folder)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}.{os.getpid()}.{name}", os.O_WRONLY | os.O_CREAT), number)
    torch.set_num_threads(1)
    if case.kilobytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (case.kilobytes * 1024, case.kilobytes * 1024))
    if case.megabytes is not None:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + case.megabytes * 1024**2, taken + case.megabytes * 1024**2))

    def change_places(event: str, details: tuple) -> None:
        if event == "os.mkdir" and Path(details[0]).name == "kept" and Path("later").is_dir():
            Path("family/step0").rename("earlier")
            Path("later").rename("family/step0")

    sys.addaudithook(change_places)
    sys.argv = [case.script, *case.arguments]
    runpy.run_path(str(folder / case.script), run_name="__main__")


def start(folder: Path, case: Case) -> BaseProcess:
    process = FORKSERVER.Process(target=run_script, args=(folder, replace(case, spoil=None)))
    process.start()
    return process


def finish(process: BaseProcess, folder: Path) -> Run:
    process.join(120)  # seconds, after which it hangs
    process.kill()
    out, err = (Path(f"{folder}.{process.pid}.{name}").read_bytes().decode() for name in ("out", "err"))
    assert "Traceback" not in err, err
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", out + err), err
    return Run(process.exitcode, out, err)


def run(folder: Path, case: Case) -> Run:
    return finish(start(folder, case), folder)


def error_line(run: Run) -> str:
    """The one line that says why a run ended."""
    assert run.code == 2, run
    lines = run.err.splitlines()
    assert [line for line in lines if "error: " in line] == lines[-1:], run.err
    assert lines[-1].startswith("error: ") and lines[-1].isprintable(), run.err
    assert "results  " not in run.out
    return lines[-1]


def snapshot(folder: Path) -> dict[Path, tuple]:
    """All that is beneath a folder, with kind, size and time."""
    found = {}
    for file in folder.rglob("*"):
        stat = file.lstat()
        found[file] = (stat.st_mode, 0, 0) if file.is_dir() else (stat.st_mode, stat.st_size, stat.st_mtime_ns)
    return found


@pytest.mark.parametrize("name", CASES)
def test_one_line_says_what_is_wrong(miniature: Path, tmp_path: Path, name: str) -> None:
    folder = place(tmp_path / "case", miniature, CASES[name])
    before = snapshot(folder)
    line = error_line(run(folder, CASES[name]))
    for part in CASES[name].parts:
        assert part in line, line
    after = snapshot(folder)
    assert {file: after.get(file) for file in before} == before
    left = [file for file in after if file.suffix in (".csv", ".png", ".partial") or file.name == "harmed"]
    assert not left


def results(folder: Path, case: Case) -> Path:
    return folder / RESULTS[case.script] / "family"


def table(folder: Path, case: Case) -> bytes:
    return (results(folder, case) / TABLE[case.script]).read_bytes()


def simple(script: str, **fields: object) -> Case:
    """A case that is none: a run that ends well, with few figures."""
    settings = {CONVERGENCE: {"KINDS": ("word",)}, PERTURBATION: {"WORDS_TO_PLOT": 0}}[script]
    return Case(script, [], settings, **fields)


BOTH = pytest.mark.parametrize("script", [CONVERGENCE, PERTURBATION])


def later(spoil: Callable[[Path], object]) -> Callable[[Path], None]:
    """Step 0 becomes a spoilt one once all checkpoints are checked and before it is loaded: see run_script."""

    def spoil_later(family: Path) -> None:
        spoilt = shutil.copytree(family, family.with_name("spoilt"), symlinks=True)
        spoil(spoilt)
        (spoilt / "step0").rename(family.with_name("later"))

    return spoil_later


def without_files(family: Path) -> None:
    for file in list((family / "step0").iterdir()):
        file.unlink()


@pytest.mark.parametrize(
    ("script", "spoil"),
    [
        (CONVERGENCE, cut_weights),
        (CONVERGENCE, weights(torch.Tensor.flatten)),
        (CONVERGENCE, without_files),
        (PERTURBATION, cut_weights),
    ],
    ids=["cut", "of_other_shapes", "removed", "cut_beside_the_sibling"],
)
def test_checkpoint_that_changes_during_the_run(
    miniature: Path, tmp_path: Path, script: str, spoil: Callable[[Path], object]
) -> None:
    case = simple(script, spoil=later(spoil))
    folder = place(tmp_path / "case", miniature, case)
    line = error_line(run(folder, case))
    assert str(folder / "family" / "step0") in line and "run again" in line, line


def odd_checkpoints(family: Path) -> None:
    """The same weights in other words: what is in published files, or may be, and is no part of the base model."""
    surplus = {
        "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 256, 256, dtype=torch.bool),
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(8),
    }
    for step in ("step0", "step32"):
        file = family / step / "model.safetensors"
        content = load_file(file) | surplus
        if step == "step32":
            write(file, content)
        else:  # as torch wrote them until 2020
            file.unlink()
            torch.save(content, file.with_name("pytorch_model.bin"), _use_new_zipfile_serialization=False)
    config(
        return_dict=False,
        use_cache=True,
        output_attentions=True,
        output_hidden_states=False,
        attn_implementation="flash_attention_2",
        quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True},
        torch_dtype="float16",
        hidden_dropout=0.9,
        attention_dropout=0.9,
        architectures=["Nonsense"],
        auto_map={"AutoModel": "nonsense.Nonsense"},
        id2label=7,
    )(family)


@BOTH
def test_what_does_not_define_the_model_changes_no_number(miniature: Path, tmp_path: Path, script: str) -> None:
    plain, odd = simple(script), simple(script, spoil=odd_checkpoints)
    place(tmp_path / "plain", miniature, plain)
    place(tmp_path / "odd", miniature, odd)
    for folder, case in ((tmp_path / "plain", plain), (tmp_path / "odd", odd)):
        assert run(folder, case).code == 0
    assert table(tmp_path / "plain", plain) == table(tmp_path / "odd", odd)


def replace_weights(family: Path, source: Path) -> None:
    """Step 0 gets other weights, in a file of the same size and time."""
    file = family / "step0" / "model.safetensors"
    stat = file.stat()
    write(file, source.read_bytes())
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)


@BOTH
def test_a_folder_of_results_is_one_familys(miniature: Path, tmp_path: Path, script: str) -> None:
    """Its numbers are those of the files that are there; what else is in it is left alone; no other family gets in."""
    case = simple(script)
    folder = place(tmp_path / "case", miniature, case)
    assert "2 of 2 to measure" in run(folder, case).out
    first = table(folder, case)
    own = ("layer_by_layer_notes.png", "mean_of_my_own.png", "group_9_tokens.png", "notes.csv", "words/2_tokens_x.png")
    for name in own:
        (results(folder, case) / name).parent.mkdir(exist_ok=True)
        (results(folder, case) / name).write_bytes(b"mine")
    for file in (results(folder, case) / "kept").glob("step0-*.npz"):  # the right name and the wrong shape
        with np.load(file) as arrays:
            wrong = {name: array[:1] for name, array in arrays.items()}
        np.savez(file, **wrong)
    assert "1 of 2 to measure" in run(folder, case).out
    assert table(folder, case) == first

    replace_weights(folder / "family", miniature / "step16" / "model.safetensors")
    assert re.search("[12] of 2 to measure", run(folder, case).out)
    assert table(folder, case) != first
    link(miniature, folder / "other" / "family", [0, 32])
    before = snapshot(folder)
    line = error_line(run(folder, replace(case, arguments=("other/family",))))
    assert f"{results(folder, case)} holds the results of {folder / 'family'}" in line and "RESULTS_DIR" in line
    assert snapshot(folder) == before
    for name in own:
        assert (results(folder, case) / name).read_bytes() == b"mine"


@BOTH
def test_two_runs_at_once(miniature: Path, tmp_path: Path, script: str) -> None:
    case = simple(script)
    folder = place(tmp_path / "case", miniature, case)
    processes = [start(folder, case) for _ in range(2)]
    for process in processes:
        assert finish(process, folder).code == 0
    assert len(table(folder, case).splitlines()) > 2 * 7
    assert not list(folder.rglob("*.partial"))


@pytest.mark.parametrize("module", [script, sibling])
def test_a_link_under_a_temporary_name_is_not_written_through(tmp_path: Path, module: ModuleType) -> None:
    file, outside = tmp_path / "table.csv", tmp_path / "outside"
    outside.write_text("mine")
    with module.written_whole(file, "x", encoding="utf-8"):
        (temporary,) = set(tmp_path.iterdir()) - {outside}
    temporary.symlink_to(outside)
    with module.written_whole(file, "x", encoding="utf-8") as stream:
        stream.write("new")
    assert outside.read_text() == "mine"
    assert file.read_text() == "new" and not file.is_symlink()


def test_the_studys_kind_of_words_file(miniature: Path, tmp_path: Path) -> None:
    """Counts, and entries that are no dictionary words."""
    odd = [
        "n't",
        "'s",
        "dr.",
        "long-term",
        "full-time",
        "mr.",
        "short-term",
        "u.s.",
        "kangaroo",
        "nirvana",
        "blasphemy",
    ]
    counts = {word: 10**9 // (number + 1) for number, word in enumerate([*ONE_TOKEN, *TWO_TOKENS, *odd])}
    settings = {"MATCH_FREQUENCY": False, "MIN_GROUP_SIZE": 4, "KINDS": ("recombined", "carried")}
    case = Case(CONVERGENCE, [], settings, {WORDS: json.dumps(counts).encode()})
    folder = place(tmp_path / "case", miniature, case)
    ended = run(folder, case)
    assert ended.code == 0, ended
    with (results(folder, case) / "texts.csv").open(newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row["kind"] == "carried"]
    assert {row["word"]: int(row["frequency"].split(".")[0]) for row in rows} == counts


def test_the_root_of_the_file_system_has_no_folder_of_results() -> None:
    with pytest.raises(script.Problem, match="has no name"):
        script.open_results(Path("/"))


def start_anew(folder: Path, case: Case, shell: str, **environment: str | None) -> subprocess.Popen:
    """Starts a new Python within a line of bash, in which "$@" stands for the command."""
    command = ["bash", "-c", f"set -o pipefail; {shell}", "bash", sys.executable, case.script, *case.arguments]
    changed = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    changed = {name: value for name, value in changed.items() if value is not None}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env=changed, text=True, **pipes)


@BOTH
def test_a_terminal_that_shows_ascii_only(miniature: Path, tmp_path: Path, script: str) -> None:
    """And obeys control characters; without a home; and with half of what torchrun sets: a run by itself, and whole."""
    family = "fämily 日\x1b[31m\r"
    case = simple(script, spoil=lambda folder: folder.rename(folder.with_name(family)), arguments=(family,))
    case.settings |= {"MIN_GROUP_SIZE": 4} if script == CONVERGENCE else {"WORDS_TO_PLOT": ["naïve", "\x1b[31m"]}
    case.inputs[WORDS] = words(*ONE_TOKEN, *TWO_TOKENS, "naïve", "日本", "\x1b[31mred")[WORDS]
    naïve = {"sentences": ["日本 \x1b[31m naïve", "Größe ist naïve"], "replaced_sentences": ["日本 \x1b[31m no"]}
    case.inputs[CONTEXTS] = contexts(naïve=naïve, **{"\x1b[32mgreen": LEDGE})
    folder = place(tmp_path / "case", miniature, case)
    environment = {"PYTHONIOENCODING": "ascii", "HOME": None, "RANK": "1", "LOCAL_RANK": "1"}
    if script == PERTURBATION:
        environment["WORLD_SIZE"] = "2"
    process = start_anew(folder, case, '"$@"', **environment)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "Traceback" not in err, err
    assert (out + err).isascii() and "\x1b" not in out + err
    assert r"f\xe4mily \u65e5\x1b[31m\r" in out
    assert (folder / RESULTS[script] / family / TABLE[script]).exists()


@pytest.mark.parametrize(("script", "shell"), [(PERTURBATION, '"$@" | head -1'), (CONVERGENCE, '"$@" >&- 2>&-')])
def test_nobody_reads_the_output(miniature: Path, tmp_path: Path, script: str, shell: str) -> None:
    case = simple(script)
    folder = place(tmp_path / "case", miniature, case)
    process = start_anew(folder, case, shell)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "Traceback" not in err and "rror" not in err, err
    assert table(folder, case)


@BOTH
def test_help_is_the_docstring(tmp_path: Path, miniature: Path, script: str) -> None:
    case = Case(script, [], arguments=("-h",))
    ended = run(place(tmp_path / "case", miniature, case), case)
    assert ended.code == 0 and "RESULTS_DIR/<name of FAMILY>/" in ended.out and not ended.err


@pytest.mark.parametrize("seconds", [0, 0.7, 2])
@BOTH
def test_ctrl_c_in_the_first_seconds(miniature: Path, tmp_path: Path, script: str, seconds: float) -> None:
    case = simple(script)
    folder = place(tmp_path / "case", miniature, case)
    process = start_anew(folder, case, 'exec "$@"')
    while "multiarray" not in Path(f"/proc/{process.pid}/maps").read_text():  # the first of the libraries
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, err

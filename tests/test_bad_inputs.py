"""Bad input to the analysis scripts: one line says what, where and what to do; nothing is lost.

FAULTS are tables: parts of the line that a user reads, and how a small project is spoilt. After
them come what is odd and no fault, what is kept, and what goes wrong during a run.
"""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import time
import unicodedata
from collections.abc import Callable
from itertools import product
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
import transformers
from helpers import CONTEXTS, RESULTS, WORDS, Run, do_not_draw, place, read_csv, start
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer, Tokenizer

BOTH = FIRST, SECOND = tuple(RESULTS)  # names of the scripts
LATE = "gpt_neox.layers.1.attention.dense.bias"  # a tensor of the last of two layers
BOTH_SCRIPTS = pytest.mark.parametrize("script", BOTH)


# ---- a small project, and runs in it -------------------------------------------------------------


def save_family(family: Path, tokenizer: Tokenizer, model_type: str, **shape) -> None:
    shape |= {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.AutoConfig.for_model(model_type, vocab_size=640, **shape)
    for folder in helpers.random_family(family, config, {0: 0, 1: 0.4, 4: 1}).iterdir():
        tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both scripts, their inputs, a family of two layers and width 16, and all results of it."""
    folder, tokenizer = tmp_path_factory.mktemp("bad_inputs") / "project", ByteLevelBPETokenizer()
    common = [f" {word}" for word in [*list(helpers.ALL_WORDS)[:1500], *9 * ["jalapeño"]]]
    tokenizer.train_from_iterator(common, 600, 2, False, ["<|endoftext|>"])
    groups, frequencies, contexts = {1: [], 2: []}, {}, {}
    for word in helpers.ALL_WORDS:
        group = groups.get(len(tokenizer.encode(f" {word}").ids), [""] * 15)
        if len(group) < 15:
            frequencies[word] = 10 ** (2 + len(group) % 5)
            group.append(word)
    for word in groups[2]:
        sentences = [f"it was a {word}", f"here is the {word}"]
        contexts[word] = {"sentences": sentences, "replaced_sentences": []}
    inputs = {WORDS: frequencies, CONTEXTS: contexts}
    place(folder, helpers.CONVERGENCE, inputs, GROUPS=(1, 2), BOOTSTRAP_RESAMPLES=50)
    place(folder, helpers.PERTURBATION, inputs, WORDS_TO_PLOT=1, BOOTSTRAP_RESAMPLES=50)
    shape = {"intermediate_size": 32, "max_position_embeddings": 64}
    save_family(folder / "family", tokenizer, "gpt_neox", **shape)
    for script in BOTH:
        helpers.good_run(folder / script, folder / "family")
    return folder


@pytest.fixture
def folder(project: Path, tmp_path: Path) -> Path:
    """A copy of the project, for one test."""
    shutil.copytree(project, tmp_path / "project")
    for owner in tmp_path.glob("project/*/family/kept/family.txt"):
        owner.write_text(owner.read_text().replace(str(project), str(tmp_path / "project")))
    return tmp_path / "project"


def run(folder: Path, script: str, before: Callable | None = do_not_draw) -> Run:
    """Runs a script on the project's family and, if there is one, on another of the same name."""
    families = [folder / "family", *folder.glob("other/family")]
    return helpers.run(folder / script, *families, before=before)


def assert_says(found: Run, says: str) -> None:
    """A run ended with one line that holds parts, parted by dots, in their order."""
    lines = found.errors()
    assert found.code == 2 and len(lines) == 1, lines
    assert re.match(f"error: .*{helpers.pattern_of(says)}", lines[0]), lines
    assert "results  " not in found.out


def snapshot(folder: Path, pattern: str = "*.*") -> dict[Path, bytes]:
    files = [file for file in folder.rglob(pattern) if ".partial" not in file.name]
    return {file.relative_to(folder): file.read_bytes() for file in files}


# ---- what spoils a project -----------------------------------------------------------------------


def constants(folder: Path, **settings) -> None:
    for script, (name, value) in product(BOTH, settings.items()):
        text = (folder / script).read_text(encoding="utf-8")
        text = re.sub(rf"(?m)^{name} = .*$", f"{name} = {value!r}", text)
        (folder / script).write_text(text, encoding="utf-8")


def content(folder: Path, pattern: str, text: object) -> None:
    """Files hold something else, text or JSON, or are missing: None."""
    for file in folder.glob(pattern):
        file.unlink()
        if text is not None:
            file.write_text(text if isinstance(text, str) else json.dumps(text))


def at(folder: Path, step: int | str, change: Callable, *arguments, **named) -> None:
    """A checkpoint is changed, or all of them: "*"."""
    for checkpoint in folder.glob(f"family/step{step}"):
        change(checkpoint, *arguments, **named)


def edit_json(checkpoint: Path, name: str, entries: dict) -> None:
    values = json.loads((checkpoint / name).read_text())
    (values["model"] if name == "tokenizer.json" else values).update(entries)
    (checkpoint / name).write_text(json.dumps(values))


def set_weights(checkpoint: Path, suffix: str = "safetensors", share: float = 1, **tensors) -> None:
    """Some tensors are others, or missing: None; of the file a share remains."""
    file = checkpoint / "model.safetensors"
    found = load_file(file) | tensors
    found = {name: tensor for name, tensor in found.items() if tensor is not None}
    file.unlink()
    if suffix == "bin":
        file = checkpoint / "pytorch_model.bin"
    save_file(found, file, {"format": "pt"}) if suffix != "bin" else torch.save(found, file)
    os.truncate(file, int(share * file.stat().st_size))


def lose_shard(checkpoint: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    model.save_pretrained(checkpoint, max_shard_size="42KB")
    (checkpoint / "model-00002-of-00003.safetensors").unlink()


def several(folder: Path) -> None:
    (folder / "family" / "step4").rename(folder / "family" / "step99")
    for step in range(10, 17):
        shutil.copytree(folder / "family" / "step1", folder / "family" / f"step{step}")
    content(folder, "family/step10/model.safetensors", None)
    at(folder, 11, set_weights, share=0.5)
    at(folder, 12, set_weights, "bin", share=0.5)
    at(folder, 13, lose_shard)
    at(folder, 14, set_weights, **{LATE: None})
    at(folder, 15, set_weights, **{LATE: torch.zeros(7)})
    at(folder, 16, edit_json, "config.json", {"use_parallel_residual": False})


def rename(checkpoint: Path, name: str) -> None:
    checkpoint.rename(checkpoint.with_name(name))


def of_type(folder: Path, model_type: str, **shape) -> None:
    """The family is one of another architecture."""
    tokenizer = Tokenizer.from_file(str(folder / "family" / "step4" / "tokenizer.json"))
    shutil.rmtree(folder / "family")
    save_family(folder / "family", tokenizer, model_type, **shape)


OWNER = "*/family/kept/family.txt"
NAN = {LATE: torch.full((16,), torch.nan)}
NO_MERGES = ("tokenizer.json", {"merges": []})
FEW = ("config.json", {"max_position_embeddings": 4})
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n"
FOUR = {"MIN_GROUP_SIZE": 4, "WORDS_PER_GROUP": 4, "REFERENCES": 9}  # of nine permutations
GPTJ = {"rotary_dim": 4, "initializer_range": 0.5}  # does not heed positions
MISTRAL = {"num_key_value_heads": 2, "sliding_window": 4, "initializer_range": 0.5}  # sees few
STOP = {"ledge": {"sentences": ["It is a ledge."], "replaced_sentences": []}}
ALL = "fetch or train again … family: step10 (it has no weights … step11 ( … step12 ( … step13 ( … "
ALL += f"step14 ({LATE} … step15 ({LATE} is (7,), in step99 (16,) … step16 (use_parallel_residual"


def _(says: str, spoil: Callable, *arguments, **named) -> tuple:
    return says, lambda folder: spoil(folder, *arguments, **named)


FAULTS = {  # of both scripts
    "no folder": _("no folder … family: fetch", lambda p: shutil.rmtree(p / "family")),
    "empty folder": _("family holds no checkpoint … step0", at, "*", shutil.rmtree),
    "step-2000": _("family/step-2000 … rename it", at, 1, rename, "step-2000"),
    "Step2000": _("family/Step2000 … rename it", at, 1, rename, "Step2000"),
    "checkpoint-2000": _("family/checkpoint-2000 … rename", at, 1, rename, "checkpoint-2000"),
    "several": _(ALL, several),
    "final": _("fetch … step4: it has no w", content, "family/step4/model.safetensors", None),
    "final cut": _("again … step4: … model.safetensors", at, 4, set_weights, share=0.5),
    "final .bin cut": _("again … step4: … pytorch_model.bin", at, 4, set_weights, "bin", 0.5),
    "final shard": _("again … step4: … model-00002-of-00003.safetensors", at, 4, lose_shard),
    "final tensor": _(f"again … {LATE} … in step4 None", at, 4, set_weights, **{LATE: None}),
    "config": _("again … step1 … config.json", content, "family/step1/config.json", "{"),
    "LFS": _("step1 (model.safet … git lfs pull", content, "family/step1/model.safetensors", LFS),
    "numpy": _("step1 (pytorch_model.bin … safete", at, 1, set_weights, "bin", loss=np.float64(3)),
    "no tokenizer": _("fetch … step1/tokenizer", content, "family/step1/tokenizer.json", None),
    "broken tokenizer": _("fetch … step4/tokenizer", content, "family/step4/tokenizer.json", "{"),
    "tokenizer": _("step1: its tokenizer … ' is [ … step4 [", at, 1, edit_json, *NO_MERGES),
    "BOS": _("step4 has no token <s>: change BOS", constants, BOS="<s>"),
    "positions": _("family reads 4 tokens, a text has … shorten", at, "*", edit_json, *FEW),
    "not finite": _("step1: … state of ' … ' in layer 2 is not", at, 1, set_weights, **NAN),
    "no words file": _("words_list.json: … No such file", content, WORDS, None),
    "broken words": _("words_list.json: … line 2 column 6", content, WORDS, '{"a": 1,\n"b": }'),
    "DTYPE": _("DTYPE = 'float8' … bfloat16", constants, DTYPE="float8"),
    "DEVICE": _("DEVICE = 'abacus': … cuda", constants, DEVICE="abacus"),
    "no resamples": _("BOOTSTRAP_RESAMPLES", constants, BOOTSTRAP_RESAMPLES=0),
    "others' results": _("family holds the results of /usr: rename", content, OWNER, "/usr"),
    "results are a file": _("RESULTS_DIR … words_list.json", constants, RESULTS_DIR=WORDS),
    "one name": _("two families of", lambda p: shutil.copytree(p / "family", p / "other/family")),
    "mamba": _("step … mamba", of_type, "mamba", state_size=4),
    "bloom": _("step … bloom", of_type, "bloom"),
    "gptj": _("of type gptj: it cannot read prefix trees", of_type, "gptj", **GPTJ),
    "mistral": _("of type mistral: it cannot read prefix trees", of_type, "mistral", **MISTRAL),
}
FAULTS_OF_FIRST = {
    "words are a list": _('words_list.json: expected {"word": frequency', content, WORDS, ["a"]),
    "no words": _('words_list.json: expected {"word": frequency', content, WORDS, {}),
    "frequency 0": _("words_list.json: … 'a' is 0", content, WORDS, {"the": 5, "a": 0}),
    "frequency '9'": _("words_list.json: … 'a'", content, WORDS, {"the": 5, "a": "9"}),
    "few words": _("words_list.json … MIN_GROUP_SIZE = 10 … add", content, WORDS, {"the": 1}),
    "few recombinations": _("2-token … add words … lower REFERENCES", constants, **FOUR),
    "KINDS": _("KINDS = ('word', 'words') … recombined", constants, KINDS=("word", "words")),
    "GROUPS": _("GROUPS = 4: expected as (1, 2, 3)", constants, GROUPS=4),
    "no texts": _('"word" to KINDS … GROUPS', constants, GROUPS=(1,), KINDS=("alone",)),
    "CARRIER": _("make CARRIER longer", constants, CARRIER="A", GROUPS=(1, 2, 3)),
    "LEADING_SPACE": _('LEADING_SPACE = False needs CARRIER = ""', constants, LEADING_SPACE=False),
    "MIN_GROUP_SIZE": _("MIN_GROUP_SIZE … 4 or more", constants, MIN_GROUP_SIZE=2),
}
FAULTS_OF_SECOND = {
    "no contexts": _("contexts.json: … No such file", content, CONTEXTS, None),
    "broken contexts": _("contexts.json: … line 2 column 3", content, CONTEXTS, '{"a":\n1,}'),
    "a list": _('contexts.json: expected {"word": {"sentences', content, CONTEXTS, [1]),
    "no entries": _('contexts.json: expected {"word": {"sentences', content, CONTEXTS, {}),
    "an entry": _("contexts.json: 'a b', which needs lists", content, CONTEXTS, {"a b": ["a b"]}),
    "stops": _("contexts.json: it has no word of two tokens or more", content, CONTEXTS, STOP),
    "words are pairs": _("words_list.json: ", content, WORDS, [["the", 5]]),
}


CASES = [*product(FAULTS, BOTH), *product(FAULTS_OF_FIRST, [FIRST])]
CASES += product(FAULTS_OF_SECOND, [SECOND])


@pytest.mark.parametrize(("name", "script"), CASES)
def test_one_line_says_what_is_wrong(folder: Path, name: str, script: str) -> None:
    says, spoil = (FAULTS | FAULTS_OF_FIRST | FAULTS_OF_SECOND)[name]
    spoil(folder)
    before = snapshot(folder / RESULTS[script])
    assert_says(run(folder, script), says)
    assert snapshot(folder / RESULTS[script]) == before


# ---- what is odd and no fault --------------------------------------------------------------------


def resave_tokenizer(checkpoint: Path) -> None:
    """As transformers 5 does: another post-processor, decoder and null fields."""
    before = (checkpoint / "tokenizer.json").read_bytes()
    transformers.AutoTokenizer.from_pretrained(checkpoint).save_pretrained(checkpoint)
    assert (checkpoint / "tokenizer.json").read_bytes() != before


def save_from_gpu(checkpoint: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        set_weights(checkpoint, "bin")


def lose_head(checkpoint: Path) -> None:
    """As a base model is saved."""
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["embed_out.weight"]
    tensors = {name.removeprefix("gpt_neox."): tensor for name, tensor in tensors.items()}
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})


ODD = {
    "re-saved tokenizer": lambda p: at(p, 1, resave_tokenizer),
    "saved on a GPU": lambda p: at(p, 1, save_from_gpu),
    "no output layer": lambda p: at(p, 1, lose_head),
    "moved": lambda p: p.rename(p.with_name("moved")),
}


@pytest.mark.parametrize(("name", "script"), [*product(ODD, BOTH)])
def test_what_is_odd_changes_no_result(folder: Path, name: str, script: str) -> None:
    before = snapshot(folder / RESULTS[script] / "family")
    folder = ODD[name](folder) or folder
    for file in (folder / RESULTS[script]).rglob("*.csv"):
        file.unlink()
    found = run(folder, script)
    assert (found.code, found.errors()) == (0, [])
    after = snapshot(folder / RESULTS[script] / "family", "*.csv")
    if name == "no output layer":
        after.pop(Path("half_way.csv"), None)
        after.pop(Path("known.csv"))
        rows = read_csv(folder / RESULTS[script] / "family" / "known.csv")
        assert {row["step"] for row in rows if row["known"] == ""} == {"1"}
    assert len(after) >= 2 and {file: before[file] for file in after} == after


def test_two_spellings_and_zipf_values_are_warned_of(folder: Path) -> None:
    """Of jalapeño, the accent a sign of its own in one. The first counts."""
    values = {"jalapeño": 4.1, unicodedata.normalize("NFD", "jalapeño"): 5}
    values |= dict.fromkeys([*json.loads((folder / WORDS).read_text())][1:], 4.1)
    content(folder, WORDS, values)
    out = run(folder, FIRST).out
    assert re.search("warning: words_list.json: .*twice", out), out
    assert re.search("warning: words_list.json: .* powers of ten: .* not Zipf values", out), out
    rows = read_csv(folder / RESULTS[FIRST] / "family" / "texts.csv")
    assert [float(row["frequency"]) for row in rows if row["word"] == "jalapeño"] == [4.1]


# ---- what is kept, and how checkpoints are shared out and compared -------------------------------


def replace_weights(checkpoint: Path) -> None:
    """By others, in a file of the same size and time."""
    file = checkpoint / "model.safetensors"
    before = file.stat()
    set_weights(checkpoint, **{LATE: load_file(file)[LATE] + 1})
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size


def lose_a_text(folder: Path) -> None:
    for name in (WORDS, CONTEXTS):
        entries = json.loads((folder / name).read_text())
        content(folder, name, dict([*entries.items()][1:]))


def edit_both(folder: Path, old: str, new: str) -> None:
    for script in BOTH:
        helpers.edit(folder / script, old, new)


CHANGES = {  # what changes, and how many checkpoints of three each script has to measure then
    "nothing": (lambda p: None, 0, 0),
    "a figure": (lambda p: edit_both(p, "\ndef finish(", "\n# another\ndef finish("), 0, 0),
    "a formula": (lambda p: edit_both(p, "states.div_(norms)", "states.div_(2 * norms)"), 3, 3),
    "a text": (lose_a_text, 3, 3),
    "weights": (lambda p: at(p, 0, replace_weights), 2, 1),  # the next checkpoint has stability
    "the end": (lambda p: at(p, 1, rename, "step9"), 3, 1),
}


@pytest.mark.parametrize(("name", "script"), [*product(CHANGES, BOTH)])
def test_what_changed_is_measured_again(folder: Path, name: str, script: str) -> None:
    """And results are as if nothing was kept. A user's files stay, a group's old figure goes."""
    change, *measured = CHANGES[name]
    results, before = folder / RESULTS[script] / "family", snapshot(folder, "*.csv")
    names = ["notes.txt", "group_x.png", "2_tokens_my.png", "my_mean.png", "kept/notes.npz"]
    names.append("group_7_tokens.png" if script == FIRST else "mean_7_tokens.png")
    *mine, stale = (results / name for name in names)
    for file in (*mine, stale):
        file.write_text("mine")
    change(folder)
    assert f"({measured[BOTH.index(script)]} of 3 to measure)" in run(folder, script).out
    assert {file.read_text() for file in mine} == {"mine"} and not stale.exists()
    after = snapshot(folder, "*.csv")
    assert (after == before) == (name in ("nothing", "a figure"))
    for file in results.glob("kept/step*.npz"):
        file.unlink()
    run(folder, script)
    assert snapshot(folder, "*.csv") == after


@pytest.mark.parametrize(("dtype", "script"), [*product(["bfloat16", "float16"], BOTH)])
def test_half_precision_is_near(folder: Path, dtype: str, script: str) -> None:
    table, column = ("convergence", "similarity") if script == FIRST else ("perturbation", "P1")
    file = folder / RESULTS[script] / "family" / f"{table}.csv"
    rows = read_csv(file)
    constants(folder, DTYPE=dtype)
    assert "(3 of 3 to measure)" in run(folder, script).out
    pairs = zip(rows, read_csv(file), strict=True)
    changes = [abs(float(row[column]) - float(near[column])) for row, near in pairs]
    assert 1e-5 < max(changes) < 0.05


@BOTH_SCRIPTS
def test_two_ranks_write_the_same_bytes(folder: Path, script: str, monkeypatch) -> None:
    """Of figures as well, whatever a user's matplotlibrc says."""
    settings = "savefig.format: pdf\ntext.usetex: True\nsavefig.dpi: 600\nfigure.dpi: 300\n"
    (folder / "matplotlibrc").write_text(settings)
    monkeypatch.setenv("MATPLOTLIBRC", str(folder / "matplotlibrc"))
    before = snapshot(folder / RESULTS[script])
    shutil.rmtree(folder / RESULTS[script])
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    found = helpers.good_run(folder / script, folder / "family", launcher=launcher)
    assert ", 2 ranks" in found.out
    assert found.out.count("family   ") == found.out.count("results  ") == 1
    assert snapshot(folder / RESULTS[script]) == before


@BOTH_SCRIPTS
def test_copies_among_checkpoints_are_named(folder: Path, script: str) -> None:
    """Whole, and up to a layer: of a lost shard, say."""
    for step, source in ((2, 1), (3, 1), (5, 4), (8, 4)):
        shutil.copytree(folder / "family" / f"step{source}", folder / "family" / f"step{step}")
    for step in (3, 5):
        at(folder, step, set_weights, **{LATE: torch.ones(16)})
    out = run(folder, script).out
    named = re.findall(r"warning: steps (\d and \d) .* in (\d) of 3 layers", out)
    assert named == [("1 and 2", "3"), ("1 and 3", "2"), ("4 and 5", "2"), ("4 and 8", "3")]


# ---- what goes wrong during a run ----------------------------------------------------------------


@BOTH_SCRIPTS
def test_head_does_not_end_a_run(folder: Path, script: str) -> None:
    (folder / "out").unlink()  # of the project's own run
    os.mkfifo(folder / "out")
    head = subprocess.Popen(["head", "-1", folder / "out"], stdout=subprocess.PIPE, text=True)
    shutil.rmtree(folder / RESULTS[script])
    process = start(folder / script, folder / "family", before=do_not_draw)
    assert head.communicate(timeout=60)[0].startswith("family   ")
    process.join(60)
    assert process.exitcode == 0, (folder / "err").read_text()
    assert (folder / RESULTS[script] / "family" / "known.csv").exists()


@pytest.mark.parametrize(("how", "script"), [*product(["SIGINT", "SIGKILL"], BOTH)])
def test_a_run_that_was_ended_goes_on(folder: Path, how: str, script: str) -> None:
    """By Ctrl-C or a kill: what was measured is kept, the rest is measured as if nothing was."""
    for step in range(10, 30):
        shutil.copytree(folder / "family" / "step1", folder / "family" / f"step{step}")
    results = folder / RESULTS[script] / "family"
    shutil.rmtree(results)
    process = start(folder / script, folder / "family", before=do_not_draw)
    while process.is_alive() and len(snapshot(results, "step*.npz")) < 2:
        time.sleep(0.001)
    os.kill(process.pid, signal.Signals[how])
    code, _, err = helpers.finish(process, folder / script)
    if how == "SIGINT":
        assert code == 130 and err.endswith("\ninterrupted: what was measured is kept\n"), err
    before = snapshot(results, "step*.npz")
    assert 2 <= len(before) < 23 and snapshot(results, "*.csv") == {}
    assert f"({23 - len(before)} of 23 to measure)" in run(folder, script).out
    assert before.items() <= snapshot(results, "step*.npz").items()
    after = snapshot(results, "*.csv")
    assert not [*results.rglob("*partial*")]
    shutil.rmtree(results)
    run(folder, script)
    assert after == snapshot(results, "*.csv")


EDITS = {
    "type": ("None + 1", "TypeError"),
    "shapes": ("torch.zeros(2) @ torch.zeros(3)", "RuntimeError"),
    "memory location": ("torch.zeros(1).expand(3).add_(1)", "RuntimeError"),
    "bare assert": ("assert 1 == 2", "AssertionError"),
}


@pytest.mark.parametrize(("name", "script"), [*product(EDITS, BOTH)])
def test_a_fault_of_ones_own_edit_keeps_its_traceback(folder: Path, name: str, script: str):
    line, error = EDITS[name]
    main = "\n\nif __name__"
    helpers.edit(folder / script, main, f"\n\ndef compare(*given):\n    {line}\n{main}")
    shutil.rmtree(folder / RESULTS[script])
    found = run(folder, script)
    lines = found.errors()
    assert found.code == 1 and lines[-1].startswith(error) and f"    {line}" in lines, lines


def limit_memory() -> None:
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2**28, taken + 2**28))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux only")
def test_out_of_memory(folder: Path) -> None:
    more = {"WORDS_PER_GROUP": None, "MATCH_FREQUENCY": False, "GROUPS": (2, 3), "REFERENCES": 0}
    constants(folder, BATCH_TOKENS=10**6, KINDS=("word",), **more)
    content(folder, WORDS, helpers.ALL_WORDS)
    assert_says(run(folder, FIRST, limit_memory), "out of memory: lower BATCH_TOKENS")


@pytest.mark.skipif(os.getuid() != 0, reason="only root may mount a small disk")
@pytest.mark.parametrize(("when", "script"), [*product(["when measuring", "when drawing"], BOTH)])
def test_full_disk(folder: Path, when: str, script: str) -> None:
    results, copy = folder / RESULTS[script], folder / "copy"
    results.rename(copy)
    results.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", results], check=True)
    try:
        shutil.copytree(copy, results, dirs_exist_ok=True)
        for file in results.rglob("*.png"):
            file.unlink()
        if when == "when measuring":
            at(folder, 1, set_weights)
        left = 40_000 if when == "when drawing" else 0
        (results / "big").write_bytes(bytes(shutil.disk_usage(results).free - left))
        before = snapshot(results, "step*.npz")
        found = run(folder, script, before=None)  # draws
        after = snapshot(results, "step*.npz")
    finally:
        subprocess.run(["umount", results], check=True)
    assert_says(found, RESULTS[script])
    assert {file: after.get(file) for file in before} == before

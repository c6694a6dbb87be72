"""download_checkpoints.py, run as users run it, against a real server that answers as the hub."""

import fcntl
import io
import json
import os
import pty
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path

import helpers
import pytest
import torch
import transformers
from hub_server import SIGNATURE, Fault, Hub, serve
from safetensors.torch import load, save
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

SCRIPT = helpers.ROOT / "download_checkpoints.py"
MODEL, NOBODY = "lab/miniature", "http://127.0.0.1:9"
STEPS = (0, 1, 4)
FILES = {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"
UNWANTED = ["README.md", "optimizer.bin", "modeling_x.py", "training_args.bin"]
UNWANTED += ["../model.safetensors", "../../model-00001-of-00001.safetensors"]


@pytest.fixture(scope="session")
def contents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """{revision: {file: bytes}} of three checkpoints of a tiny model."""
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.GPTNeoXConfig(vocab_size=999, intermediate_size=32, **small)
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "word": 1}, unk_token="[UNK]"))
    found = {}
    for step in STEPS:
        folder = tmp_path_factory.mktemp("trained")
        torch.manual_seed(step)
        transformers.GPTNeoXForCausalLM(config).save_pretrained(folder)
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
        found[f"step{step}"] = {name: (folder / name).read_bytes() for name in sorted(FILES)}
    return found


@pytest.fixture
def hub(contents: dict[str, dict[str, bytes]]) -> Iterator[Hub]:
    revisions = {name: files | dict.fromkeys(UNWANTED, b"1") for name, files in contents.items()}
    with serve(Hub(MODEL, revisions)) as hub:
        yield hub


@pytest.fixture
def place(tmp_path: Path) -> Callable[..., Path]:
    """Sets constants in a copy of the script, as users do: place(STEPS=[0]) returns its folder."""

    def place(**settings: object) -> Path:
        defaults = {"MODEL_ID": MODEL, "STEPS": list(STEPS), "PAUSE": 0.1}
        return helpers.place(tmp_path, SCRIPT, **defaults | settings).parent

    return place


def start(folder: Path, hub: Hub | None, *arguments: str, **more: object) -> subprocess.Popen:
    """Starts the script from another directory than its own; capital letters are variables."""
    ours = re.compile(r"HF_|.*_PROXY$", re.IGNORECASE)
    kept = {name: value for name, value in os.environ.items() if not ours.match(name)}
    kept |= {"HF_HOME": f"{folder}/hf_home", "HF_ENDPOINT": hub.url if hub else NOBODY}
    kept |= {name: more.pop(name) for name in list(more) if name.isupper()}
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | more
    command = [sys.executable, str(folder / SCRIPT.name), *arguments]
    return subprocess.Popen(command, cwd="/", env=kept, **settings)


def end(process: subprocess.Popen) -> tuple[int, str, str]:
    """Exit code, standard output, standard error; what must hold of every run is asserted here."""
    out, err = process.communicate(timeout=60)
    assert SIGNATURE not in out + err and "s3cret" not in out + err
    starts = [line.partition(" ")[0] for line in err.splitlines()]
    assert starts.count("error:") == (process.returncode > 0)
    assert {*starts} <= {"warning:", "error:"}, err  # there is no traceback
    return process.returncode, out, err


def run(folder: Path, hub: Hub | None, *arguments: str, **more: object) -> tuple[int, str, str]:
    return end(start(folder, hub, *arguments, **more))


def family(folder: Path) -> Path:
    return folder / "pythia_1b_checkpoints"


def steps_in(folder: Path) -> set[str]:
    """What an analysis takes for checkpoints."""
    return {path.name for path in family(folder).glob("*") if re.fullmatch(r"step\d+", path.name)}


def state(out: str, step: int) -> str:
    """The state of a step in the table at the end."""
    return re.search(rf"(?m)^ +{step}  (.+)$", out)[1]


def assert_whole(folder: Path, hub: Hub, *steps: int, weights: Collection[str] = ()) -> None:
    """The checkpoints, and none but them, are there, with the hub's bytes and nothing else."""
    assert steps_in(folder) == {f"step{step}" for step in steps}
    for name in steps_in(folder):
        found = {path.name: path.read_bytes() for path in (family(folder) / name).iterdir()}
        record = json.loads(found.pop(".published.json"))
        assert set(found) == FILES - {"model.safetensors"} | set(weights or {"model.safetensors"})
        assert found == {file: hub.revisions[record["revision"]][file] for file in found}
        assert record["commit"] == hub.commit(record["revision"])
    assert [*family(folder).rglob("*.incomplete")] == []


def wait_for(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def assert_mended(folder: Path, hub: Hub) -> None:
    """Another run, without faults, makes all whole, and fetches no whole file again."""
    hub.faults.clear()
    assert run(folder, hub)[::2] == (0, "")
    assert_whole(folder, hub, *STEPS)
    assert len(hub.seen("GET .*/config.json")) == len(STEPS)


def put(hub: Hub, step: int, there: Path, **changes: bytes | None) -> Path:
    """Writes a checkpoint as another program would, with files changed or, if None, left out."""
    there.mkdir(parents=True)
    for name in sorted(FILES):
        content = changes.get(name.split(".")[0], hub.revisions[f"step{step}"][name])
        if content is not None:
            (there / name).write_bytes(content)
    return there


def as_bin(safetensors: bytes) -> dict[str, bytes]:
    """The weights as pytorch_model.bin."""
    file = io.BytesIO()
    torch.save(load(safetensors), file)
    return {"pytorch_model.bin": file.getvalue()}


def as_shards(safetensors: bytes) -> dict[str, bytes]:
    """The weights in two files of safetensors, with their index."""
    tensors, shards, index = load(safetensors), {}, {}
    for i, name in enumerate(SHARDS):
        part = sorted(tensors)[i::2]
        shards[name] = save({key: tensors[key] for key in part}, {"format": "pt"})
        index |= dict.fromkeys(part, name)
    return shards | {INDEX: json.dumps({"metadata": {}, "weight_map": index}).encode()}


def test_clean_fetch(place, hub):
    folder = place()
    code, out, err = run(folder, hub)
    assert (code, err) == (0, "")
    assert_whole(folder, hub, *STEPS)
    assert {request.rsplit("/", 1)[1] for request in hub.seen("resolve|cdn")} == FILES
    assert len(hub.seen("GET /cdn/")) == len(STEPS)
    size = sum(len(hub.revisions["step0"][name]) for name in FILES)
    assert re.search(rf"(?m)^{3 * size / 1e9:.2f} GB to fetch, \d+\.\d\d GB free$", out)
    assert [state(out, step) for step in STEPS] == ["whole, fetched now"] * 3


def test_second_run_needs_no_network(place, hub):
    folder = place()
    assert run(folder, hub)[0] == 0
    asked = len(hub.requests)
    for gone, more in ((hub, {}), (None, {}), (None, {"HF_HUB_OFFLINE": "1"})):
        code, out, err = run(folder, gone, **more)
        assert (code, err) == (0, "") and state(out, 4) == "whole, was here"
    assert len(hub.requests) == asked
    shutil.rmtree(family(folder) / "step4")
    code, _, err = run(place(TRIES=2), None)
    advice = "no connection: check the network, HF_ENDPOINT and HTTPS_PROXY (.*)"
    assert re.fullmatch(f"warning: .*: {advice}; next try in 0.1 s\nerror: {advice}\n", err)
    assert_whole(folder, hub, 0, 1)
    assert run(place(), hub)[0] == 0
    assert len(hub.seen("GET /cdn/step4")) == len(hub.seen("/revision/step4")) == 2
    assert len(hub.seen("GET /cdn/step0")) == len(hub.seen("/revision/step0")) == 1


def test_connection_lost_in_the_middle(place, hub):
    """A drop is resumed by the library, a reset is tried again."""
    hub.faults.append(Fault("GET /cdn/step1/", "drop", times=1))
    hub.faults.append(Fault("GET /cdn/step4/", "reset", times=1))
    for step in (1, 4):  # more than the library writes at once
        hub.revisions[f"step{step}"]["model.safetensors"] = b"%d" % step * 12_000_000
    folder = place()
    code, _, err = run(folder, hub)
    assert code == 0 and err.count("\n") == 1
    assert re.match(r"warning: step4: no connection: .*reset.*; next try in 0.1 s\n", err)
    assert len(hub.resumed) == 1 and hub.resumed[0] > 0  # only the rest was sent again
    assert_whole(folder, hub, *STEPS)


def test_busy_hub(place, hub):
    """503 on files, 429 on a file, on the branches and on a look-up, 502, no answer at all."""
    hub.faults += [
        Fault("/refs", "status", times=1, code=429, headers={"RateLimit": '"api";r=0;t=1'}),
        Fault("/revision/step0", "status", times=1, code=429, headers={"Retry-After": "1"}),
        Fault("/revision/step1", "status", times=1, code=502),
        Fault("/revision/step4", "late", times=1, seconds=3),
        Fault("/tree/", "late", times=1, seconds=3),
        Fault("GET /cdn/step0/", "status", times=1, headers={"Retry-After": "1"}),
        Fault("GET /cdn/step1/", "status", times=2),
        Fault("GET /cdn/step4/", "status", times=1, code=429, headers={"Retry-After": "0"}),
    ]
    folder = place(TIMEOUT=1)
    code, _, err = run(folder, hub)
    assert code == 0
    told = ["miniature: 429 .* in 1 s", "step0: 429 .* in 1 s", "step1: .*'502 .* in 0.1 s"]
    told += ["step4: .*timed out.* in 0.1 s", "step0: .*'503 .* in 1 s"]
    told += ["step1: .*'503 .* in 0.1 s", "step1: .*'503 .* in 0.2 s"]
    for pattern in told:
        assert re.search(rf"(?m)^warning: .*{pattern}$", err), pattern
    assert_whole(folder, hub, *STEPS)


def test_one_failed_revision_does_not_stop_the_others(place, hub):
    hub.faults.append(Fault("GET /cdn/step0/", "status"))
    hub.faults.append(Fault("/revision/step1", "status", code=500))
    folder = place(TRIES=2)
    code, out, err = run(folder, hub)
    assert code == 2
    assert state(out, 0).startswith("Server error '503 Service Unavailable'")
    assert state(out, 1).startswith("Server error '500 Internal Server Error'")
    assert state(out, 4) == "whole, fetched now"
    assert err.endswith("error: 2 of 3 are not whole: see the table, run again\n")
    assert_whole(folder, hub, 4)
    assert_mended(folder, hub)


def test_corrupted_bodies(place, hub):
    """Fetched once more; a second time wrong is an error, of which the next run recovers."""
    config = f"GET .*{hub.commit('step4')}/config.json"
    hub.faults += [Fault("GET /cdn/step0/", "corrupt", times=1), Fault(config, "corrupt", times=1)]
    hub.faults.append(Fault("GET /cdn/step1/", "corrupt"))
    folder = place()
    code, out, _ = run(folder, hub)
    assert code == 2 and state(out, 1).startswith("not as published: model.safetensors; move ")
    assert hub.requests.count(hub.seen(config)[0]) == 2
    assert len(hub.seen("GET /cdn/step0/")) == len(hub.seen("GET /cdn/step1/")) == 2
    assert_whole(folder, hub, 0, 4)
    hub.requests.remove(hub.seen(config)[0])
    assert_mended(folder, hub)


def test_files_left_over(place, hub):
    """In partial folders: a damaged file that the library's notes call whole, one without notes."""
    hub.faults.append(Fault(".* /.*resolve/.*model.safetensors", "status", code=403))
    folder = place(STEPS=[0])
    assert "403 Forbidden" in state(run(folder, hub)[1], 0)
    assert len(hub.seen("resolve/.*model.safetensors")) == 1  # another try would not help
    hub.faults.clear()
    config = family(folder) / ".partial" / "step0" / "config.json"
    times = config.stat()
    config.write_bytes(b"{" * times.st_size)
    os.utime(config, ns=(times.st_atime_ns, times.st_mtime_ns))
    put(hub, 1, family(folder) / ".partial" / "step1", model=b"cut off", config=None)
    assert run(place(STEPS=[0, 1]), hub)[0] == 0
    assert_whole(folder, hub, 0, 1)


def test_checkpoints_of_another_program(place, hub):
    """One that matches the hub counts; one that does not is left alone and named."""
    for step in (8, 16, 32, 64):
        hub.revisions[f"step{step}"] = hub.revisions["step4"]
    bin_only = {name: hub.revisions["step4"][name] for name in FILES - {"model.safetensors"}}
    hub.revisions["step64"] = bin_only | as_bin(hub.revisions["step4"]["model.safetensors"])
    folder = place(STEPS=[0, 1, 4, 8, 16, 32, 64])
    put(hub, 0, family(folder) / "step0")
    (family(folder) / "step1").symlink_to(put(hub, 1, folder / "elsewhere"))
    other = hub.revisions["step1"]["model.safetensors"]  # of the same size
    put(hub, 4, family(folder) / "step4", model=other)
    put(hub, 8, family(folder) / "step8", tokenizer_config=None)
    (family(folder) / "step16").write_text("a file")
    (family(folder) / "step32").symlink_to(folder / "nowhere")
    mixed = put(hub, 4, family(folder) / "step64")  # a reader would take model.safetensors
    (mixed / "pytorch_model.bin").write_bytes(hub.revisions["step64"]["pytorch_model.bin"])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    code, out, err = run(folder, hub)
    assert code == 2 and err.endswith("error: 5 of 7 are not whole: see the table, run again\n")
    assert state(out, 0) == state(out, 1) == "whole, was here"
    for step, name in ((4, "model.safetensors"), (8, "tokenizer_config.json"), (64, "model.safe")):
        assert state(out, step).startswith(f"not as published: {name}")
        assert f"move {family(folder) / f'step{step}'} away" in state(out, step)
    assert "step16" in state(out, 16) and "nowhere" in state(out, 32)
    assert "0.00 GB to fetch" in out and hub.seen("resolve|cdn") == []
    assert {path: path.read_bytes() for path in before} == before
    assert run(place(STEPS=[0, 1]), None)[::2] == (0, "")


def test_whole_checkpoints_that_changed_since(place, hub):
    """A file cut off, another MODEL_ID, another REVISION: none of them is taken for what it was."""
    folder = place()
    assert run(folder, hub)[0] == 0
    os.truncate(family(folder) / "step0" / "model.safetensors", 1000)
    hub.revisions["last1"] = hub.revisions["step4"]
    wrong = "not as published: model.safetensors; move "
    assert state(run(folder, hub)[1], 0).startswith(wrong)
    assert state(run(place(REVISION="last{step}", STEPS=[1]), hub)[1], 1).startswith(wrong)
    hub.model, hub.revisions["step1"] = "lab/other", hub.revisions["step4"]
    assert state(run(place(MODEL_ID="lab/other", STEPS=[1]), hub)[1], 1).startswith(wrong)


def test_missing_revisions_are_named_at_once_before_the_first_byte(place, hub):
    del hub.revisions["step1"]["model.safetensors"]
    folder = place(STEPS=[0, 1, 7])
    _, out, err = run(folder, hub)
    assert "warning: step1 is not available: carries no weights or no config.json\n" in err
    assert "warning: step7 is not available: not published\n" in err
    assert state(out, 7) == "not published"
    first_byte = hub.requests.index(hub.seen("/resolve/")[0])
    assert hub.requests.index(hub.seen("/revision/step1")[0]) < first_byte
    assert_whole(folder, hub, 0)


@pytest.mark.parametrize("without", [[], [INDEX], SHARDS[1:], SHARDS])
def test_weights(place, hub, without):
    """Shards of safetensors come before a .bin, but only if all of them are there."""
    weights = hub.revisions["step0"].pop("model.safetensors")
    shards = as_shards(weights)
    for name in without:
        del shards[name]
    hub.revisions["step0"] |= as_bin(weights) | shards
    folder = place(STEPS=[0])
    assert run(folder, hub)[0] == 0
    assert_whole(folder, hub, 0, weights=["pytorch_model.bin"] if without else shards)
    model = transformers.AutoModel.from_pretrained(family(folder) / "step0", dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, load(weights)[f"gpt_neox.{name}"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(family(folder) / "step0")
    assert tokenizer("word").input_ids == [1]


def test_identical_revisions(place, hub):
    hub.revisions["step1"] = dict(hub.revisions["step0"])
    folder = place()
    same = "warning: the same bytes, trust one: step0/model.safetensors, step1/model.safetensors\n"
    for _ in ("by the hub's checksums", "by the records on the disk"):
        assert run(folder, hub)[::2] == (0, same)


def test_killed_in_the_middle(place, hub):
    hub.faults.append(Fault("GET /cdn/step4/", "slow", seconds=30))
    folder = place()
    process = start(folder, hub)
    wait_for(lambda: steps_in(folder) == {"step0", "step1"} and hub.seen("GET /cdn/step4/"))
    process.kill()
    assert end(process)[0] == -signal.SIGKILL
    assert len([*family(folder).rglob("*.incomplete")]) == 1
    hub.faults[0].kind, hub.faults[0].code = "status", 404
    assert run(folder, hub)[0] == 2 and [*family(folder).rglob("*.incomplete")] == []
    assert_mended(folder, hub)
    assert len(hub.seen("GET /cdn/step0/")) == len(hub.seen("GET /cdn/step1/")) == 1


def test_interrupted_with_several_downloads_running(place, hub):
    hub.faults.append(Fault("GET /cdn/", "slow", seconds=30))
    folder = place(WORKERS=3)
    process = start(folder, hub)
    wait_for(lambda: len(hub.seen("GET /cdn/")) == 3 and len(hub.seen("GET .*/config.json")) == 3)
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    code, _, err = end(process)
    assert code == 130 and "whole files are kept, run again to continue" in err
    assert time.monotonic() - begun < 5 and steps_in(folder) == set()
    assert_mended(folder, hub)


def test_two_runs_at_once(place, hub):
    hub.faults.append(Fault("GET /cdn/", "slow", seconds=2))
    folder = place()
    first = start(folder, hub)
    wait_for(lambda: hub.seen("GET /cdn/"))
    second = start(folder, hub)
    (code, out, err), (code2, out2, err2) = end(first), end(second)
    assert (code, err, code2, err2) == (0, "", 0, "") and "after any other run" in out2
    assert (state(out, 4), state(out2, 4)) == ("whole, fetched now", "whole, was here")
    assert len(hub.seen("GET /cdn/")) == len(STEPS)
    assert_whole(folder, hub, *STEPS)


@pytest.mark.parametrize("steps", [[0, 1], "all"])
def test_too_little_disk_is_told_before_the_first_byte(place, hub, steps):
    hub.claimed["model.safetensors"] = 10**18
    folder = place(STEPS=steps)
    code, _, err = run(folder, hub)
    figures = r"[23]0+\.\d\d GB to fetch, \d+\.\d\d GB free: make room in CHECKPOINTS_DIR or choose"
    assert code == 2 and re.fullmatch(f"error: {figures} fewer STEPS\n", err)
    assert hub.seen("/resolve/|/cdn/") == [] and steps_in(folder) == set()


def test_disk_full_in_the_middle(place, hub):
    """A limit on a file's size stands for the full disk; a checkpoint below it is fetched."""
    limit = len(hub.revisions["step0"]["model.safetensors"]) // 2
    hub.revisions["step1"]["model.safetensors"] = b"small"
    folder = place()
    limits = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))}
    code, out, err = run(folder, hub, **limits)
    assert code == 2 and err.count("\n") == 1
    full = "cannot write CHECKPOINTS_DIR = pythia_1b_checkpoints: [Errno 27] File too large"
    assert state(out, 0) == full and state(out, 1) == "whole, fetched now"
    assert len(hub.seen("GET /cdn/step0/")) == 1  # another try would not help
    assert_whole(folder, hub, 1)
    assert_mended(folder, hub)


PASSWORD = "http://me:s3cret@127.0.0.1:9"
REFUSED = {  # constants of the script, variables of the shell, parts of the line that a user reads
    "model": ({"MODEL_ID": "lab/nothing"}, {}, "Repository Not Found … lab/nothing"),
    "login page": ({"MODEL_ID": "lab/login"}, {}, "this is not the hub: look for a login page"),
    "branch": ({"REVISION": "v{step}"}, {}, "on a branch like REVISION = 'v{step}'"),
    "any branch": ({"REVISION": "main"}, {}, "REVISION needs {step} where the number stands"),
    "offline": ({}, {"HF_HUB_OFFLINE": "1"}, "unset the `HF_HUB_OFFLINE`"),
    "curly quotes": ({}, {"HF_TOKEN": "“hf_s3cret”"}, "HF_TOKEN (or hf auth login) has"),
    "no scheme": ({}, {"HF_ENDPOINT": "huggingface.co"}, "HF_ENDPOINT must begin with http:// or"),
    "SOCKS": ({}, {"ALL_PROXY": "socks5://127.0.0.1:9"}, "HTTPS_PROXY or HTTP_PROXY needs"),
    "password": ({"TRIES": 1}, {"HF_ENDPOINT": PASSWORD}, "no connection … HTTPS_PROXY"),
    "proxy": ({"TRIES": 1}, {"HTTP_PROXY": PASSWORD}, "no connection … HTTPS_PROXY"),
}
for name in (SCRIPT.name, f"{SCRIPT.name}/below", "/proc/none/here"):
    REFUSED[name] = ({"CHECKPOINTS_DIR": name}, {}, f"cannot write CHECKPOINTS_DIR = {name}: ")


@pytest.mark.parametrize("name", REFUSED)
def test_one_line_says_what_is_wrong(place, hub, name):
    """At once, without a second try, and without a word of a proxy that has no part in it."""
    settings, variables, says = REFUSED[name]
    hub.faults.append(Fault("lab/login", "status", code=200, answer=b"<html>Log in</html>"))
    code, _, err = run(place(PAUSE=100, **settings), hub, **variables)
    assert code == 2 and re.fullmatch(f"error: .*{helpers.pattern_of(says)}.*\n", err), err
    assert ("proxy" in err.lower()) == ("PROXY" in says) and len(hub.seen("/refs|resolve")) < 2


def test_gated_model(place, hub):
    hub.token = "hf_notasecretbutatest"
    folder = place()
    assert "Cannot access gated repo" in state(run(folder, hub)[1], 0)
    assert len(hub.seen("HEAD .*/resolve")) == 3  # another try would not help
    assert run(folder, hub, HF_TOKEN=hub.token, HF_HUB_VERBOSITY="info")[::2] == (0, "")


NAMES = {
    "step-{step}": "step-{}",
    "checkpoint-{step}": "checkpoint-{}",
    "ckpt_{step}": "ckpt_{:03}",
    "stage1-step{step}-tokens*B": "stage1-step{}-tokens21B",
}


@pytest.mark.parametrize("pattern", NAMES)
def test_other_names_of_revisions(place, hub, pattern):
    for step in STEPS:
        files = hub.revisions.pop(f"step{step}")
        hub.revisions[NAMES[pattern].format(10 * step)] = files
    hub.revisions["stage2-step10-tokens5B"] = {}
    folder = place(REVISION=pattern, STEPS=[0, 10, 40])
    assert run(folder, hub)[::2] == (0, "")
    assert_whole(folder, hub, 0, 10, 40)
    assert run(folder, None)[::2] == (0, "")


def test_all_steps(place, hub):
    """Every step that is published; another run needs no network; what is lost is fetched again."""
    folder = place(STEPS="all")
    assert run(folder, hub)[0] == 0
    assert_whole(folder, hub, *STEPS)
    assert run(folder, None)[::2] == (0, "")
    shutil.rmtree(family(folder) / "step0")
    hub.revisions["step8"] = dict(hub.revisions["step4"])
    assert run(folder, hub)[0] == 0
    assert_whole(folder, hub, *STEPS, 8)


def test_several_matches(place, hub):
    for branch in ("stage1-step4", "stage2-step4-b", "stage1-step1"):
        hub.revisions[branch] = hub.revisions["step4"]
    code, _, err = run(place(REVISION="stage*-step{step}*", STEPS=[1, 4]), hub)
    assert code == 2 and err.startswith("error: step 4 is stage1-step4 and stage2-step4-b: make RE")
    assert hub.seen("/revision/|resolve") == []
    assert run(place(REVISION="stage*-step{step}*", STEPS=[1]), hub)[0] == 0


def test_progress_on_a_terminal(place, hub):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    process = start(place(), hub, stderr=theirs)
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # which is the end, on Linux
        while True:
            shown += os.read(ours, 4096)
    assert process.wait(timeout=20) == 0
    assert b"step4 model.safetensors:" in shown and SIGNATURE.encode() not in shown


def test_arguments(place, hub):
    folder = place()
    for argument, code, said in (("--help", 0, "python download"), ("--steps", 2, "unrecognized")):
        command = [sys.executable, str(folder / SCRIPT.name), argument]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == code and said in done.stdout + done.stderr
    steps = "0, 64, 256, 1000, 2000, 3000, 5000, 7000, 10000, 18000, 48000, 78000, 143000"
    assert f"\nSTEPS = [{steps}]\n" in SCRIPT.read_text(encoding="utf-8")

"""download_checkpoints.py, run as a user runs it, against a real HTTP server that speaks the hub's API and fails."""

import csv
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
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hub_server import SIGNATURE, Fault, Hub, serve
from safetensors.torch import load, save

ANALYSIS = Path(__file__).resolve().parents[1] / "token_convergence_analysis.py"
SCRIPT = Path(__file__).resolve().parents[1] / "download_checkpoints.py"
MODEL = "lab/miniature"
STEPS = (0, 2, 4)
FILES = {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
UNWANTED = {
    "README.md": b"# hello",
    "optimizer.bin": b"0" * 99,
    "modeling_x.py": b"raise SystemExit",
    "training_args.bin": b"1",
    "../model.safetensors": b"1",
    "../../model-00001-of-00001.safetensors": b"1",
}


@pytest.fixture(scope="session")
def contents(miniature: Path) -> dict[str, dict[str, bytes]]:
    """{revision: {file: bytes}} of three checkpoints of the miniature, with the tokenizer's config that Pythia has."""
    config = {"tokenizer_config.json": b'{"tokenizer_class": "GPTNeoXTokenizer"}'}
    folders = [miniature / f"step{step}" for step in STEPS]
    return {
        folder.name: config | {path.name: path.read_bytes() for path in folder.iterdir() if path.name in FILES}
        for folder in folders
    }


@pytest.fixture
def hub(contents: dict[str, dict[str, bytes]]) -> Iterator[Hub]:
    with serve(Hub(MODEL, {revision: files | UNWANTED for revision, files in contents.items()})) as hub:
        yield hub


@pytest.fixture
def place(tmp_path: Path) -> Callable[..., Path]:
    """Sets constants in a copy of the script, as users do: place(STEPS=[0]) returns the folder where it stands."""

    def place(**settings: object) -> Path:
        text = SCRIPT.read_text(encoding="utf-8")
        for name, value in ({"MODEL_ID": MODEL, "STEPS": list(STEPS), "PAUSE": 0.1} | settings).items():
            text, count = re.subn(rf"(?m)^{name} = .*$", lambda _, line=f"{name} = {value!r}": line, text)
            assert count == 1, name
        (tmp_path / SCRIPT.name).write_text(text, encoding="utf-8")
        return tmp_path

    return place


def environment(folder: Path, hub: Hub | None, **more: str) -> dict[str, str]:
    theirs = {name: value for name, value in os.environ.items() if not re.match(r"HF_|.*_PROXY$", name, re.IGNORECASE)}
    return theirs | {"HF_HOME": str(folder / "hf_home"), "HF_ENDPOINT": hub.url if hub else "http://127.0.0.1:9"} | more


def start(folder: Path, hub: Hub | None, *arguments: str, **more: str) -> subprocess.Popen:
    """Starts the script from another directory than its own."""
    command = [sys.executable, str(folder / SCRIPT.name), *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd="/", env=environment(folder, hub, **more), stdout=pipe, stderr=pipe, text=True)


def end(process: subprocess.Popen) -> tuple[int, str, str]:
    """Exit code, standard output, standard error; what must hold of every run is asserted here."""
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in out + err
    assert SIGNATURE not in out + err
    return process.returncode, out, err


def run(folder: Path, hub: Hub | None, *arguments: str, **more: str) -> tuple[int, str, str]:
    return end(start(folder, hub, *arguments, **more))


def family(folder: Path) -> Path:
    return folder / "pythia_1b_checkpoints"


def steps_in(folder: Path) -> set[str]:
    """What an analysis takes for checkpoints."""
    return {path.name for path in family(folder).glob("*") if re.fullmatch(r"step\d+", path.name)}


def state(out: str, step: int) -> str:
    """The state of a step in the table at the end."""
    return re.search(rf"(?m)^ +{step} +(?:\S+ GB|-)  (.+)$", out)[1]


def assert_whole(
    folder: Path, hub: Hub, *steps: int, weights: frozenset[str] = frozenset({"model.safetensors"})
) -> None:
    """The checkpoints, and none but them, are there, each with the hub's bytes and nothing else."""
    assert steps_in(folder) == {f"step{step}" for step in steps}
    for name in steps_in(folder):
        found = {path.name: path.read_bytes() for path in (family(folder) / name).iterdir()}
        record = json.loads(found.pop(".published.json"))
        assert set(found) == FILES - {"model.safetensors"} | weights
        assert found == {file: hub.revisions[name][file] for file in found}
        assert (record["model"], record["revision"], record["commit"]) == (MODEL, name, hub.commit(name))
    assert [path for path in (family(folder) / ".partial").rglob("*.incomplete")] == []


def wait_for(condition: Callable[[], object], seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def fragments(folder: Path) -> list[Path]:
    """Weights that are being received, of which the library's first 10 MiB are on the disk."""
    found = []
    for path in family(folder).rglob("*.incomplete"):
        with suppress(FileNotFoundError):  # received since
            found += [path] * (path.stat().st_size > 10_000_000)
    return found


def test_clean_fetch(place, hub):
    folder = place()
    code, out, err = run(folder, hub)
    assert code == 0 and err == ""
    assert_whole(folder, hub, *STEPS)
    assert [path.name for path in (family(folder) / ".partial").iterdir()] in ([], ["lock"])
    assert {request.rsplit("/", 1)[1] for request in hub.seen("resolve|cdn")} == FILES
    assert len(hub.seen("GET /cdn/")) == len(STEPS)
    size = sum(len(hub.revisions["step0"][name]) for name in FILES)
    assert f"3 to complete: {3 * size / 1e9:.2f} GB to fetch, " in out
    assert re.search(rf"(?m)^ +0 +{size / 1e9:.2f} GB  whole, fetched now$", out)


def test_second_run_needs_no_network(place, hub):
    folder = place()
    assert run(folder, hub)[0] == 0
    asked = len(hub.requests)
    for gone, more in ((hub, {}), (None, {}), (None, {"HF_HUB_OFFLINE": "1"})):
        code, out, err = run(folder, gone, **more)
        assert (code, err) == (0, "") and state(out, 4) == "whole, was here"
    assert len(hub.requests) == asked
    shutil.rmtree(family(folder) / "step4")
    code, _, err = run(folder, None, HF_HUB_OFFLINE="1")
    assert (code, err) == (2, "error: offline mode is on: unset HF_HUB_OFFLINE; not whole yet: step4\n")
    code, _, err = run(place(TRIES=2), None)
    assert code == 2 and err.splitlines()[-1].startswith("error: the connection to http://127.0.0.1:9 failed")
    assert err.endswith("not whole yet: step4\n") and len(err.splitlines()) == 2
    assert_whole(folder, hub, 0, 2)
    assert run(place(), hub)[0] == 0
    assert len(hub.seen("GET /cdn/step4")) == 2 and len(hub.seen("GET /cdn/step0")) == 1


def test_more_steps_later(place, hub):
    assert run(place(STEPS=[4]), hub)[0] == 0
    folder = place(STEPS=[4, 0])
    code, out, _ = run(folder, hub)
    assert (code, state(out, 0), state(out, 4)) == (0, "whole, fetched now", "whole, was here")
    assert_whole(folder, hub, 0, 4)
    assert len(hub.seen("/revision/step4")) == len(hub.seen("GET /cdn/step4")) == 1


def test_connection_dropped_in_the_middle(place, hub):
    hub.faults.append(Fault("GET /cdn/step2/", "drop", times=1))
    folder = place()
    code, out, err = run(folder, hub)
    assert (code, state(out, 2)) == (0, "whole, fetched now")
    assert "Trying to resume download" in err and len(err.splitlines()) == 1
    assert len(hub.resumed) == 1 and hub.resumed[0] > 0  # only the rest was sent again
    assert_whole(folder, hub, *STEPS)


def test_connection_reset_in_the_middle(place, hub):
    hub.faults.append(Fault("GET /cdn/step2/", "reset", times=1))
    folder = place()
    code, _, err = run(folder, hub)
    assert code == 0
    assert re.fullmatch(r"warning: step2: the connection to .* failed \(ReadError.*; try 2 of 5 in 0.1 s\n", err)
    assert_whole(folder, hub, *STEPS)


def test_busy_hub(place, hub):
    """503 on a file, with and without Retry-After; 429 on a file; 429 and 503 on look-ups; no answer to a look-up."""
    hub.faults += [
        Fault("GET /cdn/step0/", "status", times=1, headers={"Retry-After": "1"}),
        Fault("GET /cdn/step2/", "status", times=2),
        Fault("GET /cdn/step4/", "status", times=1, code=429, headers={"Retry-After": "0"}),
        Fault("/revision/step0", "status", times=1, code=429, headers={"RateLimit": '"api";r=0;t=1'}),
        Fault("/revision/step2", "status", times=1, code=502),
        Fault("/revision/step4", "late", times=1, seconds=3),
    ]
    folder = place(TIMEOUT=1)
    code, _, err = run(folder, hub)
    assert code == 0
    for message in (
        f"step0: {hub.url} answers 503 Service Unavailable; try 2 of 5 in 1 s",
        f"step2: {hub.url} answers 503 Service Unavailable; try 2 of 5 in 0.1 s",
        f"step2: {hub.url} answers 503 Service Unavailable; try 3 of 5 in 0.2 s",
        f"step0: {hub.url} answers 429 Too Many Requests; try 2 of 5 in 1 s",
        f"step2: {hub.url} answers 502 Bad Gateway; try 2 of 5 in 0.1 s",
    ):
        assert f"warning: {message}\n" in err
    assert "Rate limited. Waiting 1.0s before retry" in err
    assert re.search(r"warning: step4: the connection to .* failed \(TimeoutError\)", err)
    assert_whole(folder, hub, *STEPS)


def test_one_failed_revision_does_not_stop_the_others(place, hub):
    hub.faults += [Fault("GET /cdn/step0/", "status"), Fault("/revision/step2", "status", code=500)]
    folder = place(TRIES=2)
    code, out, err = run(folder, hub)
    assert code == 2
    assert state(out, 0) == f"not whole: {hub.url} answers 503 Service Unavailable"
    assert state(out, 2) == f"{hub.url} answers 500 Internal Server Error"
    assert state(out, 4) == "whole, fetched now"
    assert err.endswith(f"error: 2 of 3 checkpoints are not whole in {family(folder)}: see the table, run again\n")
    assert_whole(folder, hub, 4)
    hub.faults.clear()
    assert run(folder, hub)[0] == 0
    assert_whole(folder, hub, *STEPS)
    assert len(hub.seen("GET .*/tokenizer.json")) == 3  # the file that was whole was kept


def test_corrupted_body(place, hub):
    hub.faults.append(Fault("GET /cdn/step2/", "corrupt", times=1))
    hub.faults.append(Fault(f"GET .*{hub.commit('step4')}/config.json", "corrupt", times=1))
    folder = place()
    code, _, err = run(folder, hub)
    assert code == 0
    assert "warning: step2: model.safetensors does not match the published checksum and is fetched again\n" in err
    assert "warning: step4: config.json does not match the published checksum and is fetched again\n" in err
    assert_whole(folder, hub, *STEPS)


def test_body_corrupted_every_time(place, hub):
    hub.faults.append(Fault("GET /cdn/step2/", "corrupt"))
    folder = place()
    code, out, _ = run(folder, hub)
    assert code == 2
    assert state(out, 2).startswith("not whole: checksum wrong twice") and state(out, 2).endswith(": model.safetensors")
    assert len(hub.seen("GET /cdn/step2/")) == 2
    assert_whole(folder, hub, 0, 4)
    hub.faults.clear()
    assert run(folder, hub)[0] == 0
    assert_whole(folder, hub, *STEPS)


def test_truncated_files_left_over(place, hub):
    """Cut after a whole fetch; gone after one, beside a file of the user's; left in the unfinished folder."""
    folder = place()
    assert run(folder, hub)[0] == 0
    os.truncate(family(folder) / "step0" / "model.safetensors", 1000)
    (family(folder) / "step2" / "model.safetensors").unlink()
    (family(folder) / "step2" / "notes.txt").write_text("mine")
    (family(folder) / "step4").rename(family(folder) / ".partial" / "step4")
    os.truncate(family(folder) / ".partial" / "step4" / "model.safetensors", 1000)
    hub.requests.clear()
    code, out, _ = run(folder, hub)
    assert code == 0
    assert f"3 to complete: {3 * len(hub.revisions['step0']['model.safetensors']) / 1e9:.2f} GB to fetch, " in out
    assert len(hub.seen("GET /cdn/")) == 3
    assert (family(folder) / "step2" / "notes.txt").read_text() == "mine"
    (family(folder) / "step2" / "notes.txt").unlink()
    assert_whole(folder, hub, *STEPS)


def test_truncated_file_that_the_library_believes(place, hub):
    """The library returns a file that its notes call whole without looking at it; the checksum does."""
    hub.faults.append(Fault("GET /cdn/step0/", "corrupt"))
    folder = place(STEPS=[0])
    assert run(folder, hub)[0] == 2
    weights = family(folder) / ".partial" / "step0" / "model.safetensors"
    times = weights.stat()
    os.truncate(weights, 1000)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    hub.faults.clear()
    code, _, err = run(folder, hub)
    assert code == 0
    assert err == "warning: step0: model.safetensors does not match the published checksum and is fetched again\n"
    assert_whole(folder, hub, 0)


def put(hub: Hub, step: int, there: Path, **changes: bytes | None) -> Path:
    """Writes a checkpoint as another program would, with some files changed (model=b"x") or left out (config=None)."""
    there.mkdir(parents=True)
    for name in sorted(FILES):
        content = changes.get(name.split(".")[0], hub.revisions[f"step{step}"][name])
        if content is not None:
            (there / name).write_bytes(content)
    return there


def snapshot(folder: Path) -> dict[str, bytes | str | None]:
    """What is in a folder, links not followed, but for what is being fetched."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if ".partial" not in path.parts:
            content = path.read_bytes() if path.is_file() else None
            found[str(path.relative_to(folder))] = str(path.readlink()) if path.is_symlink() else content
    return found


def test_whole_checkpoint_of_another_program_is_taken_over(place, hub):
    """Without a record, or with one that is damaged; through a link nothing is written, not even the record."""
    hub.revisions["step8"] = hub.revisions["step4"]
    folder = place(STEPS=[0, 2, 4, 8])
    elsewhere = put(hub, 8, folder / "elsewhere")
    for step, record in {
        0: None,
        2: "[]",
        4: '{"model": "lab/miniature", "revision": "step4", "files": {"a": 3}}',
    }.items():
        put(hub, step, family(folder) / f"step{step}")
        if record:
            (family(folder) / f"step{step}" / ".published.json").write_text(record)
    (family(folder) / "step8").symlink_to(elsewhere)
    before = snapshot(elsewhere)
    code, out, _ = run(folder, hub)
    assert code == 0 and state(out, 2) == state(out, 8) == "whole, was here"
    assert "0.00 GB to fetch" in out and hub.seen("GET .*resolve|/cdn/") == []
    assert snapshot(elsewhere) == before
    (family(folder) / "step8").unlink()
    assert_whole(folder, hub, 0, 2, 4)


def test_what_this_script_did_not_write_is_left_alone(place, hub):
    """Other weights with the hub's config, in the folder or behind a link; a file that the hub does not give out."""
    hub.revisions |= {"step8": hub.revisions["step4"], "step16": hub.revisions["step4"]}
    hub.faults.append(Fault("resolve/.*/tokenizer_config.json", "status", code=403))
    folder = place(STEPS=[0, 2, 4, 8, 16])
    other = hub.revisions["step2"]["model.safetensors"]  # of the same size
    put(hub, 0, family(folder) / "step0", model=other)
    (family(folder) / "step2").symlink_to(put(hub, 2, folder / "elsewhere", model=b"mine"))
    (family(folder) / "step4").symlink_to(folder / "nowhere")
    put(hub, 8, family(folder) / "step8", tokenizer_config=None)
    (family(folder) / "step16").write_text("a file")
    before = snapshot(folder)
    code, out, err = run(folder, hub)
    assert code == 2 and err.splitlines()[-1].startswith("error: 5 of 5 checkpoints are not whole")
    advice = "; put that right or move it away, and run again"
    assert state(out, 0) == state(out, 2) == "left alone: model.safetensors is not what is published" + advice
    assert state(out, 4).startswith("left alone: config.json is missing")
    assert state(out, 8) == "left alone: tokenizer_config.json is missing" + advice
    assert state(out, 16).startswith("left alone: config.json is missing")
    assert snapshot(folder) == before
    assert hub.seen("GET .*resolve|/cdn/") == []


def test_foreign_weights_beside_the_published_ones(place, hub):
    """The analyses would read them: in a folder that was fetched, and in one that another program wrote."""
    for files in hub.revisions.values():
        files |= as_bin(files.pop("model.safetensors"))
    folder = place(STEPS=[0])
    assert run(folder, hub)[0] == 0
    shutil.copytree(family(folder) / "step0", family(folder) / "step2")
    for name in hub.revisions["step2"].keys() - UNWANTED.keys():
        (family(folder) / "step2" / name).write_bytes(hub.revisions["step2"][name])
    for step in (0, 2):
        (family(folder) / f"step{step}" / "model.safetensors").write_bytes(b"mine")
    before = snapshot(folder)
    code, out, _ = run(place(STEPS=[0, 2]), hub)
    assert code == 2
    assert state(out, 0) == state(out, 2)
    assert state(out, 0).startswith("left alone: model.safetensors does not belong there")
    del before[SCRIPT.name]
    assert before.items() <= snapshot(folder).items()
    for step in (0, 2):
        (family(folder) / f"step{step}" / "model.safetensors").unlink()
    assert run(folder, hub)[0] == 0
    assert_whole(folder, hub, 0, 2, weights=frozenset({"pytorch_model.bin"}))


def test_another_models_checkpoint_is_left_alone(place, hub):
    folder = place(STEPS=[0, 2])
    (family(folder) / "step0").mkdir(parents=True)
    (family(folder) / "step0" / "config.json").write_text("{}")
    code, out, _ = run(folder, hub)
    assert code == 2 and "config.json" in state(out, 0) and state(out, 2) == "whole, fetched now"
    assert [path.name for path in (family(folder) / "step0").iterdir()] == ["config.json"]
    code, _, err = run(place(MODEL_ID="lab/other", STEPS=[2]), hub)
    there = family(folder) / "step2"
    assert (code, err) == (
        2,
        f"error: {there} is a checkpoint of {MODEL}, not of lab/other: set another CHECKPOINTS_DIR\n",
    )


def test_missing_revisions_are_listed_at_once_before_the_first_byte(place, hub):
    del hub.revisions["step2"]["model.safetensors"]
    del hub.revisions["step4"]["tokenizer.json"]
    folder = place(STEPS=[0, 2, 4, 7])
    code, out, err = run(folder, hub)
    assert code == 2
    assert err.splitlines()[0] == (
        f"warning: not available from {MODEL}: step2 (carries no weights), "
        "step4 (carries no tokenizer.json), step7 (not published)"
    )
    assert state(out, 7) == "not published"
    first = next(i for i, request in enumerate(hub.requests) if "/resolve/" in request)
    assert len([request for request in hub.requests[:first] if "/revision/" in request]) == 4
    assert_whole(folder, hub, 0)


def as_bin(safetensors: bytes) -> dict[str, bytes]:
    """The weights as pytorch_model.bin."""
    file = io.BytesIO()
    torch.save(load(safetensors), file)
    return {"pytorch_model.bin": file.getvalue()}


def as_shards(safetensors: bytes) -> dict[str, bytes]:
    """The weights in two files of safetensors, with their index."""
    tensors = load(safetensors)
    shards, index = {}, {}
    for i in range(2):
        name = f"model-{i + 1:05}-of-00002.safetensors"
        part = sorted(tensors)[i::2]
        shards[name] = save({key: tensors[key] for key in part}, {"format": "pt"})
        index |= dict.fromkeys(part, name)
    return shards | {"model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": index}).encode()}


def test_without_safetensors(place, hub):
    for files in hub.revisions.values():
        files |= as_bin(files.pop("model.safetensors"))
    folder = place()
    assert run(folder, hub)[0] == 0
    assert_whole(folder, hub, *STEPS, weights=frozenset({"pytorch_model.bin"}))


@pytest.mark.parametrize("published", ["a set", "no index", "a shard less", "parts of two sets", "two sets"])
def test_shards(place, hub, published):
    """Shards of safetensors are taken before a .bin, but only sets of them that are there in full."""
    for files in hub.revisions.values():
        weights = files.pop("model.safetensors")
        files |= as_bin(weights)
        shards = as_shards(weights)
        if published == "no index":
            del shards["model.safetensors.index.json"]
        if published in ("a shard less", "parts of two sets"):
            last = shards.pop("model-00002-of-00002.safetensors")
        if published == "parts of two sets":
            shards["model-00002-of-00003.safetensors"] = last
        if published == "two sets":
            shards["model-00001-of-00001.safetensors"] = weights
        files |= shards
    folder = place(STEPS=[0])
    assert run(folder, hub)[0] == 0
    taken = shards if published in ("a set", "two sets") else {"pytorch_model.bin"}
    assert_whole(folder, hub, 0, weights=frozenset(taken))


def analysed_steps(folder: Path) -> set[int]:
    """Runs the analysis on what is there, with few words, and returns the steps in its results."""
    text = ANALYSIS.read_text(encoding="utf-8")
    for setting in ("WORDS_PER_GROUP = 20", "BOOTSTRAP_RESAMPLES = 20"):
        text, count = re.subn(rf"(?m)^{setting.split()[0]} = .*$", setting, text)
        assert count == 1, setting
    (folder / ANALYSIS.name).write_text(text, encoding="utf-8")
    shutil.copy(ANALYSIS.with_name("words_list.json"), folder)
    command = [sys.executable, str(folder / ANALYSIS.name), str(family(folder))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with (folder / "convergance_plots" / family(folder).name / "convergence.csv").open(encoding="utf-8") as file:
        return {int(row["step"]) for row in csv.DictReader(file)}


def test_the_analysis_runs_on_what_was_fetched(place, hub):
    """While a checkpoint is still on its way, and then on all, with weights of each kind that is published."""
    hub.revisions["step0"] |= as_bin(hub.revisions["step0"].pop("model.safetensors"))
    hub.revisions["step2"] |= as_shards(hub.revisions["step2"].pop("model.safetensors"))
    hub.faults.append(Fault("GET /cdn/step4/", "slow", seconds=60))
    folder = place()
    process = start(folder, hub)
    wait_for(lambda: steps_in(folder) == {"step0", "step2"} and fragments(folder))
    assert analysed_steps(folder) == {0, 2}
    process.kill()
    end(process)
    hub.faults.clear()
    assert run(folder, hub)[0] == 0
    assert analysed_steps(folder) == {0, 2, 4}


def test_identical_revisions(place, hub):
    hub.revisions["step2"] = dict(hub.revisions["step0"])
    folder = place()
    for _ in ("by the hub's hashes", "by the records on the disk"):
        code, _, err = run(folder, hub)
        assert code == 0
        assert err.startswith("warning: step0, step2 share model.safetensors, byte for byte: ")
        assert len(err.splitlines()) == 1
    assert_whole(folder, hub, *STEPS)


def test_shared_shards(place, hub):
    """A first shard that is another step's; steps that share all shards; many steps. One line each, and a short one."""
    small = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors.index.json": b"{}"}
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    for step in range(20):
        own, pair = b"own %d" % step, b"pair %d" % (step // 2)
        shards = {first: b"late", second: own} if step < 16 else {first: pair, second: pair}
        hub.revisions[f"step{step}"] = small | shards
    hub.faults.append(Fault("/resolve/", "status", code=403))
    _, _, err = run(place(STEPS=list(range(20))), hub)
    shared = [line for line in err.splitlines() if "byte for byte" in line]
    twelve = ", ".join(f"step{step}" for step in range(12))
    assert len(shared) == 3 and all(len(line) < 400 for line in shared)
    assert shared[0].startswith(f"warning: {twelve}, 4 more share {first}, byte for byte: ")
    assert "under 16 names" in shared[0] and "under 2 names" in shared[1]
    assert shared[1].startswith(f"warning: step16, step17 share {first}, {second}, byte for byte: ")
    assert shared[2].startswith(f"warning: step18, step19 share {first}, {second}, byte for byte: ")


def test_killed_in_the_middle(place, hub):
    hub.faults.append(Fault("GET /cdn/step4/", "slow", seconds=30))
    folder = place()
    process = start(folder, hub)
    wait_for(lambda: steps_in(folder) == {"step0", "step2"} and fragments(folder))
    process.kill()
    assert end(process)[0] == -signal.SIGKILL
    assert_nothing_half(folder)
    assert len(fragments(folder)) == 1
    hub.faults.clear()
    code, out, err = run(folder, hub)
    assert (code, err) == (0, "")
    assert (state(out, 0), state(out, 4)) == ("whole, was here", "whole, fetched now")
    assert_whole(folder, hub, *STEPS)
    assert len(hub.seen("GET /cdn/step0/")) == len(hub.seen("GET /cdn/step2/")) == 1
    assert len(hub.seen("GET .*/tokenizer.json")) == 3


def assert_nothing_half(folder: Path) -> None:
    for name in steps_in(folder):
        assert {path.name for path in (family(folder) / name).iterdir()} == FILES | {".published.json"}


def test_two_runs_at_once(place, hub):
    hub.faults.append(Fault("GET /cdn/", "slow", seconds=2))
    folder = place()
    first = start(folder, hub)
    wait_for(lambda: fragments(folder))
    second = start(folder, hub)
    (code1, out1, err1), (code2, out2, err2) = end(first), end(second)
    assert (code1, err1, code2, err2) == (0, "", 0, "")
    assert state(out1, 4) == "whole, fetched now" and state(out2, 4) == "whole, was here"
    assert f"another run is fetching into {family(folder)}: waiting for it to end\n" in out2
    assert len(hub.seen("GET /cdn/")) == len(STEPS)
    assert_whole(folder, hub, *STEPS)


def test_interrupted_with_several_downloads_running(place, hub):
    hub.faults.append(Fault("GET /cdn/", "slow", seconds=30))
    folder = place(DOWNLOADS_AT_ONCE=3)
    process = start(folder, hub)
    wait_for(lambda: len(fragments(folder)) == 3)
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    code, _, err = end(process)
    assert (code, err.strip()) == (130, "interrupted: whole files are kept, run again to continue")
    assert time.monotonic() - begun < 5
    assert steps_in(folder) == set() and list(family(folder).rglob("*.incomplete")) == []
    hub.faults.clear()
    assert run(folder, hub)[0] == 0
    assert_whole(folder, hub, *STEPS)
    assert len(hub.seen("GET .*/tokenizer.json")) == 3


def test_interrupted_while_libraries_are_imported(place, hub):
    folder = place()
    command = [sys.executable, "-X", "importtime", str(folder / SCRIPT.name)]
    process = subprocess.Popen(
        command, env=environment(folder, hub), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while "urllib.request" not in process.stderr.readline():  # early in the library's own imports
        pass
    process.send_signal(signal.SIGINT)
    code, _, err = end(process)
    assert code == 130
    assert [line for line in err.splitlines() if not line.startswith("import time:")] == ["interrupted"]


def test_too_little_disk_is_told_before_the_first_byte(place, hub):
    hub.claimed["model.safetensors"] = 10**18
    folder = place()
    code, _, err = run(folder, hub)
    assert code == 2
    assert re.fullmatch(
        r"error: 30+\.\d\d GB to fetch, \d+\.\d\d GB free in .*: make room or choose fewer STEPS\n", err
    )
    assert hub.seen("/resolve/|/cdn/") == [] and steps_in(folder) == set()


def test_disk_full_in_the_middle(place, hub):
    """A limit on the size of a file stands for the full disk; a checkpoint below it is fetched all the same."""
    hub.revisions["step2"]["model.safetensors"] = b"small"
    folder = place()
    limit = 8_000_000
    assert len(hub.revisions["step0"]["model.safetensors"]) > limit > len(hub.revisions["step0"]["tokenizer.json"])
    command = [sys.executable, str(folder / SCRIPT.name)]
    process = subprocess.Popen(
        command,
        env=environment(folder, hub),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    code, out, err = end(process)
    assert code == 2 and len(err.splitlines()) == 1
    assert state(out, 0) == "not whole: the disk is full (File too large): make room and run again"
    assert state(out, 2) == "whole, fetched now"
    assert len(hub.seen("GET /cdn/step0/")) == 1  # another try would not help
    assert_whole(folder, hub, 2)
    assert run(folder, hub)[0] == 0
    assert_whole(folder, hub, *STEPS)


def test_unknown_model(place, hub):
    folder = place(MODEL_ID="lab/nothing")
    code, _, err = run(folder, hub)
    assert code == 2 and len(err.splitlines()) == 1
    assert err.startswith(f"error: {hub.url} has no model lab/nothing: check MODEL_ID")
    assert not family(folder).exists()


def test_gated_model(place, hub):
    hub.token = "hf_notasecretbutatest"
    folder = place()
    code, _, err = run(folder, hub)
    assert code == 2 and len(err.splitlines()) == 1
    assert err.startswith(f"error: {MODEL} is gated: accept its terms on {hub.url}/{MODEL}, then run `hf auth login`")
    assert not family(folder).exists() and len(hub.seen("/resolve/")) == 1
    code, out, err = run(folder, hub, HF_TOKEN=hub.token, HF_HUB_VERBOSITY="info")
    assert code == 0 and hub.token not in out + err
    assert_whole(folder, hub, *STEPS)


def test_proxy(place, hub):
    folder = place()
    assert run(folder, hub, HF_ENDPOINT="http://hub.invalid", HTTP_PROXY=hub.url)[0] == 0
    assert hub.proxied == len(hub.requests) > 0
    code, _, err = run(place(STEPS=[7], TRIES=1), hub, HF_ENDPOINT="http://me:ge@heim@127.0.0.1:9")
    assert code == 2 and "ge@" not in err and "heim" not in err
    assert_whole(folder, hub, *STEPS)


def test_progress_bars_name_the_step(place, hub):
    folder = place()
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    command = [sys.executable, str(folder / SCRIPT.name)]
    process = subprocess.Popen(command, env=environment(folder, hub), stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    shown = b""
    while chunk := read_terminal(ours):
        shown += chunk
    assert process.wait(timeout=20) == 0
    assert b"step4 model.safetensors: 100%" in shown and SIGNATURE.encode() not in shown


def read_terminal(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # on Linux, the end
        return b""


@pytest.mark.parametrize("name", [SCRIPT.name, f"{SCRIPT.name}/below"])
def test_folder_that_is_a_file(place, hub, name):
    code, _, err = run(place(CHECKPOINTS_DIR=name), hub)
    assert code == 2 and len(err.splitlines()) == 1 and "CHECKPOINTS_DIR" in err and err.startswith("error: ")
    assert hub.seen("/cdn/") == []


def test_arguments(place, hub):
    folder = place()
    code, out, err = run(folder, hub, "--help")
    assert (code, err) == (0, "") and "python download_checkpoints.py" in out
    for argument in ("--steps", "--he", "0"):
        code, out, err = run(folder, hub, argument)
        assert (code, out) == (2, "") and err == f"error: unrecognized arguments: {argument}\n"
    assert hub.requests == []


def test_mirror_that_lists_no_sizes(place, hub):
    """The hub's list has names only, then a size that is no number: both are asked for file by file."""
    hub.names_only = True
    folder = place(STEPS=[0])
    assert run(folder, hub)[0] == 0
    assert_whole(folder, hub, 0)
    hub.names_only, hub.claimed = False, {"model.safetensors": "many", "config.json": -1}
    assert run(place(STEPS=[0, 2]), hub)[0] == 0
    assert_whole(folder, hub, 0, 2)


def test_body_that_does_not_end(place, hub):
    hub.faults.append(Fault("GET /cdn/step2/", "endless"))
    folder = place()
    code, out, _ = run(folder, hub)
    assert code == 2
    assert state(out, 2) == "not whole: model.safetensors is longer than published: suspect the mirror or the proxy"
    assert len(hub.seen("GET /cdn/step2/")) == 1 and hub.surplus < 100_000_000
    assert_whole(folder, hub, 0, 4)


def test_hub_that_asks_for_a_year(place, hub):
    hub.faults.append(Fault("/revision/step0", "status", code=429, headers={"Retry-After": "31536000"}))
    process = start(place(), hub)
    assert process.stderr.readline().endswith("answers 429 Too Many Requests; try 2 of 5 in 600 s\n")
    process.send_signal(signal.SIGINT)
    assert end(process)[0] == 130


def test_look_up_that_drips(place, hub):
    hub.faults.append(Fault("/revision/", "drip", seconds=15))
    begun = time.monotonic()
    code, _, err = run(place(TIMEOUT=1, TRIES=1), hub)
    assert code == 2 and err.startswith(f"error: the connection to {hub.url} failed (TimeoutError): check the network")
    assert time.monotonic() - begun < 10


ANSWERS = {
    "login page": (b"<html><body>Please log in.</body></html>", "JSONDecodeError"),
    "login page in Latin-1": (b"\xfcberall", "UnicodeDecodeError"),
    "another list": (b"[]", "TypeError"),
    "control characters": (rb'{"id": "a", "inferenceProviderMapping": "\u001b[2J"}', "Got \ufffd[2J"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_answer_that_is_not_the_hubs(place, hub, name):
    answer, named = ANSWERS[name]
    hub.faults.append(Fault("/revision/", "status", code=200, answer=answer))
    code, _, err = run(place(), hub)
    assert code == 2 and len(err.splitlines()) == 1 and named in err
    assert err.rstrip("\n").isprintable()
    if name != "control characters":
        assert err.startswith(f"error: something between here and {hub.url} answers in its place (")


def test_output_that_cannot_show_a_character(place, hub):
    hub.faults.append(Fault("GET /cdn/step0/", "status"))
    address = hub.url.replace("//", "//me:secret@")
    code, out, err = run(place(TRIES=1), hub, HF_ENDPOINT=address, PYTHONIOENCODING="ascii")
    assert code == 2 and "secret" not in out + err
    hidden = hub.url.replace("//", "//\\u2026")
    assert state(out, 0) == f"not whole: {hidden} answers 503 Service Unavailable"
    assert state(out, 2) == "whole, fetched now"


def test_standard_output_that_is_closed(place, hub):
    """Closed from the start, it is not needed; where its reader has gone, that is said."""
    folder = place(STEPS=[0])
    command = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, str(folder / SCRIPT.name)]
    done = subprocess.run(command, env=environment(folder, hub), stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert_whole(folder, hub, 0)
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, str(folder / SCRIPT.name)]
    done = subprocess.run(command, env=environment(folder, hub), stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 2 and done.stderr.startswith("error: the program that this output goes to has ended")
    assert len(done.stderr.splitlines()) == 1


def test_default_steps():
    published = {0, *(2**i for i in range(10)), *range(1000, 144000, 1000)}
    steps = re.search(r"(?m)^STEPS = \[(.+?)\]", SCRIPT.read_text(encoding="utf-8"))[1]
    assert steps == "0, 64, 256, 1000, 2000, 3000, 5000, 7000, 10000, 18000, 48000, 78000, 143000"
    assert {int(step) for step in steps.split(",")} <= published

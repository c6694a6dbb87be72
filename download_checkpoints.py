"""Fetches checkpoints of Pythia-1B, each a revision of one model on the Hugging Face hub, for the analysis scripts.

    python download_checkpoints.py

Writes pythia_1b_checkpoints/step<N>/ beside this file, for every step of STEPS: config.json, the tokenizer, one set of
weights, and .published.json, which says what was fetched (model, commit, size and hash of every file). A folder gets
its name only when every file matches the hub's checksum; until then it is pythia_1b_checkpoints/.partial/step<N>/.
A step<N> that this script did not write is compared with the hub: it counts if it matches, else it is left alone.
Run it again at any time: what is whole is not fetched again and needs no network.
The exit code is 0 if every checkpoint is whole, 2 if not, 130 after Ctrl-C.

The downloads are huggingface_hub's: HF_TOKEN or `hf auth login`, HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and HTTPS_PROXY
mean here what they mean there.
"""

import os
import signal
import sys

if __name__ == "__main__":  # Ctrl-C during the imports below, which take seconds, is not to end in a traceback
    usual_handler = signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"interrupted\n"), os._exit(130)))

import json
import logging
import math
import re
import shutil
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from errno import EDQUOT, EFBIG, ENOSPC
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, errors, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.utils import WeakFileLock, parse_ratelimit_headers, tqdm
from huggingface_hub.utils.sha import git_hash, sha_fileobj

# ----------------------------------------------------------------------------------------------------------------------
# what
MODEL_ID = "EleutherAI/pythia-1b"  # a Pythia model on the hub; another one needs another CHECKPOINTS_DIR
STEPS = [0, 64, 256, 1000, 2000, 3000, 5000, 7000, 10000, 18000, 48000, 78000, 143000]  # training steps; 2.0 GB each
# On Pythia-1B all groups of words cross half of their way between 3000 and 18000: that is where steps are needed.
# All 154 that are published: STEPS = [0, *(2**i for i in range(10)), *range(1000, 144000, 1000)]
CHECKPOINTS_DIR = "pythia_1b_checkpoints"  # the folder, beside this file unless absolute
# how
DOWNLOADS_AT_ONCE = 2  # checkpoints, 1 or more
TRIES = 5  # of each look-up and each checkpoint, 1 or more
PAUSE = 2.0  # seconds before the second try, twice as long before each further one, longer if the hub asks; up to 600
TIMEOUT = 30.0  # seconds for the hub to answer a look-up
# ----------------------------------------------------------------------------------------------------------------------

SMALL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
WEIGHT_FILE = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?", re.ASCII)
RECORD = ".published.json"  # in a whole checkpoint: {"model", "revision", "commit", "files": {name: [bytes, hash]}}


class Problem(Exception):
    """What is wrong, where, and what to do, in one line."""


def check_settings() -> None:
    """Raises Problem at the first setting that makes no sense."""
    steps = list(STEPS) if isinstance(STEPS, (list, tuple, range)) else []
    model_right = isinstance(MODEL_ID, str) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", MODEL_ID, re.ASCII)
    whole_steps = all(type(step) is int and step >= 0 for step in steps)
    for name, right, rule in (
        ("MODEL_ID", model_right, "a model's name on the hub"),
        ("STEPS", steps and whole_steps and len(set(steps)) == len(steps), "a list of different training steps"),
        ("CHECKPOINTS_DIR", isinstance(CHECKPOINTS_DIR, str) and CHECKPOINTS_DIR.strip(), "a folder's name"),
        ("DOWNLOADS_AT_ONCE", type(DOWNLOADS_AT_ONCE) is int and DOWNLOADS_AT_ONCE > 0, "a whole number above 0"),
        ("TRIES", type(TRIES) is int and TRIES > 0, "a whole number above 0"),
        ("PAUSE", type(PAUSE) in (int, float) and PAUSE >= 0, "a number of seconds"),
        ("TIMEOUT", type(TIMEOUT) in (int, float) and TIMEOUT > 0, "a number of seconds above 0"),
    ):
        if not right:
            raise Problem(f"{name} = {globals()[name]!r} must be {rule}")


def one_line(text: str) -> str:
    """The text in one line, without control characters and secrets: a password, a link's signature, a token."""
    text = re.sub(r"(?<=//)[^\s'\"]*@|\?[^\s'\"]+|Bearer [^'\"]*", "…", text)
    return "".join(character if character.isprintable() else "\ufffd" for character in " ".join(text.split()))


def one_line_log(record: logging.LogRecord) -> bool:
    """A filter for the library's own log, which quotes signed links and breaks lines."""
    record.msg, record.args = one_line(record.getMessage()), None
    return True


def warn(message: str) -> None:
    """Writes one line on standard error, above the progress bars."""
    tqdm.write(f"warning: {one_line(message)}", file=sys.stderr)


def listed(names: list[str]) -> str:
    """'step0, step16, step64', cut after twelve."""
    if len(names) > 12:
        names = [*names[:12], f"{len(names) - 12} more"]
    return ", ".join(names)


def is_transient(error: Exception) -> bool:
    """Whether another try may help: not if the request, the answer or this machine (an errno) is wrong."""
    if isinstance(error, errors.HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    lasting = (Problem, errors.OfflineModeIsEnabled, ImportError, LookupError, TypeError, ValueError)
    return not isinstance(error, lasting) and getattr(error, "errno", None) is None


def explain(error: Exception) -> str:
    """What is wrong and what to do, in one line."""
    hub, text = constants.ENDPOINT, f"{type(error).__name__}: {error}".removesuffix(": ")
    if isinstance(error, Problem):
        text = str(error)
    elif isinstance(error, errors.GatedRepoError):
        text = f"{MODEL_ID} is gated: accept its terms on {hub}/{MODEL_ID}, then run `hf auth login` or set HF_TOKEN"
    elif isinstance(error, errors.RepositoryNotFoundError):
        text = f"{hub} has no model {MODEL_ID}: check MODEL_ID; for a private one run `hf auth login` or set HF_TOKEN"
    elif isinstance(error, errors.RevisionNotFoundError):
        text = "not published"
    elif isinstance(error, errors.HfHubHTTPError):
        token = ", your token is refused: `hf auth login` again, or unset HF_TOKEN"
        status = error.response.status_code
        text = f"{hub} answers {status} {error.response.reason_phrase}{token if status == 401 else ''}"
    elif isinstance(error, errors.OfflineModeIsEnabled):
        text = "offline mode is on: unset HF_HUB_OFFLINE"
    elif isinstance(error, BrokenPipeError):
        text = "the program that this output goes to has ended: run again without it"
    elif getattr(error, "errno", None) in (EDQUOT, EFBIG, ENOSPC):
        text = f"the disk is full ({os.strerror(error.errno)}): make room and run again"
    elif is_transient(error):
        text = f"the connection to {hub} failed ({text}): check the network, HF_ENDPOINT and the proxy"
    elif isinstance(error, (LookupError, TypeError, UnicodeError, json.JSONDecodeError)):
        text = f"something between here and {hub} answers in its place ({text}): look for a login page or a proxy"
    return one_line(text)


def with_retries(work: Callable[..., Any], step: int, *more: Any) -> Any:
    """work(step, *more), tried TRIES times unless the error will not pass; the library gives up at a 503 or a reset."""
    for tried in range(1, TRIES + 1):
        try:
            return work(step, *more)
        except Exception as raised:
            error = raised  # or what it wraps, as 'not found on this disk' wraps 'the hub answers 503'
            if isinstance(raised.__cause__, Exception) and not isinstance(raised, errors.HfHubHTTPError):
                error = raised.__cause__
            if tried == TRIES or not is_transient(error):
                raise error from None
            headers = error.response.headers if isinstance(error, errors.HfHubHTTPError) else {}
            limit = parse_ratelimit_headers(headers)
            pause = PAUSE * 2 ** (tried - 1)
            if headers.get("Retry-After", "").isdecimal():
                pause = max(pause, int(headers["Retry-After"]))
            if limit and limit.remaining == 0:
                pause = max(pause, limit.reset_in_seconds)
            pause = min(pause, 600)
            warn(f"step{step}: {explain(error)}; try {tried + 1} of {TRIES} in {pause:g} s")
            time.sleep(pause)


def weight_files(names: Collection[str]) -> list[str]:
    """One set of weights: safetensors before .bin, one file before shards with their index; [] if none is complete."""
    for stem, kind in (("model", "safetensors"), ("pytorch_model", "bin")):
        if f"{stem}.{kind}" in names:
            return [f"{stem}.{kind}"]
        index, shards = f"{stem}.{kind}.index.json", []  # of two complete sets both: the index says which it means
        for name in sorted(names):
            first = re.fullmatch(rf"{stem}-00001-of-([0-9]{{5}})\.{kind}", name)
            if first:
                numbered = [f"{stem}-{number:05}-of-{first[1]}.{kind}" for number in range(1, int(first[1]) + 1)]
                if all(shard in names for shard in numbered):
                    shards += numbered
        if index in names and shards:
            return [index, *shards]
    return []


def is_checkable(size: object, published: object) -> bool:
    """Whether a file can be compared with what is published of it: not everyone lists a size and a hash."""
    return type(size) is int and size >= 0 and bool(re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", str(published)))


def look_up(step: int) -> tuple[str, dict[str, list]]:
    """The commit of a revision and the files {name: [bytes, hash]} to fetch of it."""
    # In a thread: the library's own limit would begin again with every byte that arrives.
    job = ThreadPoolExecutor(1).submit(HfApi().model_info, MODEL_ID, revision=f"step{step}", files_metadata=True)
    info = job.result(timeout=TIMEOUT)
    published = {file.rfilename: file for file in info.siblings or []}
    weights = weight_files(published)
    lacking = [name for name in SMALL_FILES[:2] if name not in published]
    if not weights:
        lacking.append("weights")
    if lacking:
        raise Problem(f"carries no {' and no '.join(lacking)}")
    files = {}
    for name in (*SMALL_FILES, *weights):
        if name in published:
            file = published[name]
            files[name] = [file.lfs.size, file.lfs.sha256] if file.lfs else [file.size, file.blob_id]
            # Asked for a file, a gated model refuses now and not later; and a mirror may list nothing but names.
            if info.gated or not is_checkable(*files[name]):
                file = get_hf_file_metadata(hf_hub_url(MODEL_ID, name, revision=info.sha))
                files[name] = [file.size, file.etag]
            if not is_checkable(*files[name]):
                raise Problem(f"{constants.ENDPOINT} gives no size or no checksum of {name}")
    return info.sha, files


def report_shared(published: dict[int, dict[str, list]]) -> None:
    """Warns of weight files that steps {step: files} share, byte for byte: a known fault of what is published."""
    steps_with: dict[tuple[str, str], list[str]] = {}
    for step in sorted(published):
        for name, (_, digest) in published[step].items():
            if WEIGHT_FILE.fullmatch(name) and not name.endswith(".json"):
                steps_with.setdefault((name, digest), []).append(f"step{step}")
    names_by_steps: dict[tuple[str, ...], list[str]] = {}
    for (name, _), steps in steps_with.items():
        if len(steps) > 1:
            names_by_steps.setdefault(tuple(steps), []).append(name)
    for steps, names in names_by_steps.items():
        warn(
            f"{listed(steps)} share {listed(names)}, byte for byte: one checkpoint's weights under {len(steps)} names, "
            "so that nothing which depends on them alone changes between these steps; believe at most one of them"
        )


def hash_of(path: Path, digits: int) -> str:
    """The sha256 of a file, which has 64 digits, or the sha1 that git takes, which has 40."""
    with path.open("rb") as file:
        return sha_fileobj(file).hex() if digits == 64 else git_hash(file.read())


def differences(files: dict[str, list], checkpoint: Path, hashes: bool) -> dict[str, str]:
    """What keeps a folder from being the published checkpoint, by size or also by hash: {file: what is wrong}."""
    wrong = {}
    for name, (size, published) in files.items():
        path = checkpoint / name
        if not path.is_file():
            wrong[name] = "is missing"
        elif path.stat().st_size != size or (hashes and hash_of(path, len(published)) != published):
            wrong[name] = "is not what is published"
    for path in sorted(checkpoint.glob("*")):
        if WEIGHT_FILE.fullmatch(path.name) and path.name not in files:
            wrong[path.name] = "does not belong there"
    return wrong


def recorded(checkpoint: Path) -> dict[str, list]:
    """The files {name: [bytes, hash]} that this script put into a folder, by the record there; else {}."""
    try:
        record = json.loads((checkpoint / RECORD).read_text(encoding="utf-8"))
        model, files = record["model"], record["files"]
        right = record["revision"] == checkpoint.name and all(is_checkable(*file) for file in files.values())
    except Exception:  # whatever is wrong with it, it is no record
        return {}
    if model != MODEL_ID:
        raise Problem(f"{checkpoint} is a checkpoint of {model}, not of {MODEL_ID}: set another CHECKPOINTS_DIR")
    return files if right and weight_files(files) else {}


def is_whole(checkpoint: Path) -> bool:
    """Whether a folder holds what its record says, by name and size. Needs no network."""
    files = recorded(checkpoint)
    return bool(files) and not differences(files, checkpoint, hashes=False)


def write_record(checkpoint: Path, commit: str, files: dict[str, list]) -> None:
    record = {"model": MODEL_ID, "revision": checkpoint.name, "commit": commit, "files": files}
    (checkpoint / RECORD).unlink(missing_ok=True)  # it may be a link
    (checkpoint / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def take_over(commit: str, files: dict[str, list], final: Path, unfinished: Path) -> str:
    """The state of what bears a checkpoint's name and is not whole by its record; '' if it is to be fetched.

    A folder of this script's that was damaged since goes back to where it is fetched. Nothing else is changed.
    """
    print(f"comparing {final.name}, which is there, with the hub's checksums", flush=True)
    wrong = differences(files, final, hashes=True)
    if not wrong:
        if not final.is_symlink():
            write_record(final, commit, files)
        return "whole, was here"
    if recorded(final) and not final.is_symlink() and wrong.keys() <= files.keys():
        shutil.rmtree(unfinished, ignore_errors=True)
        final.rename(unfinished)
        return ""
    faults = listed([f"{name} {fault}" for name, fault in wrong.items()])
    return f"left alone: {faults}; put that right or move it away, and run again"


def remove_fragments(folder: Path) -> None:
    """Removes what was being received when a run was ended: the library would not go on with it."""
    for path in folder.glob(".partial/step*/.cache/huggingface/download/*.incomplete"):
        with suppress(OSError):
            path.unlink()


class Bar(tqdm):
    """The library's progress bar, but named, since several downloads run at once; ends a body that is too long."""

    def __init__(self, step: int, name: str, size: int, **settings: Any) -> None:
        task = settings["desc"].partition(": ")[2]  # Xet's two bars have one; before it can be the end of a signed link
        self.name, self.left = name, math.inf if task else size  # Xet checks what it receives, and counts otherwise
        super().__init__(**settings | {"desc": f"step{step} {name} {task}".strip(), "disable": None, "position": None})

    def update(self, received: float = 1) -> bool | None:
        self.left -= received
        if self.left < 0:
            raise Problem(f"{self.name} is longer than published: suspect the mirror or the proxy")
        return super().update(received)


def fetch(step: int, commit: str, files: dict[str, list], folder: Path) -> str:
    """Fetches what a checkpoint lacks, compares it with the published hashes, and gives the folder its name.

    Returns its state, which begins with 'whole' if it is; the library's errors pass through.
    """
    final, unfinished = folder / f"step{step}", folder / ".partial" / f"step{step}"
    state = take_over(commit, files, final, unfinished) if os.path.lexists(final) else ""
    if state:
        return state

    def get(name: str, **how: bool) -> None:
        bar = partial(Bar, step, name, files[name][0])
        hf_hub_download(MODEL_ID, name, revision=commit, local_dir=unfinished, tqdm_class=bar, **how)

    for name in files:
        get(name)
    # The library's verify_repo_checksums would ask the hub for the hashes once more, and wait for them without end.
    for name in differences(files, unfinished, hashes=True):
        if name in files:
            warn(f"step{step}: {name} does not match the published checksum and is fetched again")
            get(name, force_download=True)
        else:
            (unfinished / name).unlink()  # of weights that are no longer published
    wrong = differences(files, unfinished, hashes=True)
    if wrong:
        return f"not whole: checksum wrong twice, suspect the mirror, the proxy or the disk: {listed(list(wrong))}"
    shutil.rmtree(unfinished / ".cache")  # the library's notes on a download under way
    write_record(unfinished, commit, files)
    unfinished.rename(final)
    return "whole, fetched now"


def fetch_all(plan: dict[int, tuple[str, dict[str, list]]], folder: Path) -> dict[int, str]:
    """Fetches checkpoints {step: (commit, files)}, DOWNLOADS_AT_ONCE at a time; returns {step: state}."""
    unfinished = folder / ".partial"
    with ExitStack() as held:
        try:
            unfinished.mkdir(parents=True, exist_ok=True)
            held.enter_context(WeakFileLock(unfinished / "lock", timeout=0.5))
        except TimeoutError:
            print(f"another run fetches into {folder}: waiting for its end", flush=True)
            held.enter_context(WeakFileLock(unfinished / "lock"))
        except OSError as error:
            raise Problem(f"cannot write into {folder} ({error.strerror}): set another CHECKPOINTS_DIR") from error
        remove_fragments(folder)
        todo = [step for step in plan if not is_whole(folder / f"step{step}")]  # another run may have fetched some
        left = 0.0  # GB
        for step in todo:
            files = plan[step][1]
            place = folder if os.path.lexists(folder / f"step{step}") else unfinished
            lacking = differences(files, place / f"step{step}", hashes=False)
            left += sum(files[name][0] for name in lacking if name in files) / 1e9
        free = shutil.disk_usage(folder).free / 1e9
        print(f"{len(todo)} to complete: {left:.2f} GB to fetch, {free:.2f} GB free", flush=True)
        if left > free:
            raise Problem(f"{left:.2f} GB to fetch, {free:.2f} GB free in {folder}: make room or choose fewer STEPS")

        def state_of(step: int) -> str:
            try:
                return with_retries(fetch, step, *plan[step], folder)
            except Exception as error:  # of whatever kind: the other checkpoints go on
                return f"not whole: {explain(error)}"

        pool = ThreadPoolExecutor(DOWNLOADS_AT_ONCE)
        jobs = {step: pool.submit(state_of, step) for step in todo}
        try:
            while wait(jobs.values(), timeout=1).not_done:  # a wait without end is deaf to Ctrl-C on Windows
                pass
        except KeyboardInterrupt:
            remove_fragments(folder)
            raise
        return {step: jobs[step].result() if step in jobs else "whole, was here" for step in plan}


def run() -> None:
    """Looks every revision up, fetches what is not whole, and prints a table: step, size, state."""
    folder = Path(__file__).resolve().parent / CHECKPOINTS_DIR
    steps = sorted(STEPS)
    here = [step for step in steps if is_whole(folder / f"step{step}")]
    published = {step: recorded(folder / f"step{step}") for step in here}
    states = dict.fromkeys(here, "whole, was here")
    missing = [step for step in steps if step not in here]
    if missing:
        print(f"looking up {len(missing)} of {len(steps)} checkpoints of {MODEL_ID}", flush=True)
    plan, lacking = {}, []
    for step in missing:
        try:
            plan[step] = with_retries(look_up, step)
            published[step] = plan[step][1]
        except Exception as error:
            states[step] = explain(error)
            lacking.append(f"step{step} ({states[step]})")
            busy = isinstance(error, errors.HfHubHTTPError) and error.response.status_code >= 500
            if not busy and not isinstance(error, (Problem, errors.RevisionNotFoundError)):
                names = listed([f"step{step}" for step in missing])  # whose look-ups would end the same
                raise Problem(f"{states[step]}; not whole yet: {names}") from error
    if lacking:
        warn(f"not available from {MODEL_ID}: {', '.join(lacking)}")
    report_shared(published)
    if plan:
        states |= fetch_all(plan, folder)

    print(f"{'step':>8}  {'size':>9}  state", flush=True)
    for step in steps:
        size = sum(size for size, _ in published.get(step, {}).values())
        print(f"{step:>8}  {f'{size / 1e9:.2f} GB' if size else '-':>9}  {states[step]}", flush=True)
    failed = [step for step in steps if not states[step].startswith("whole")]
    if failed:
        raise Problem(f"{len(failed)} of {len(steps)} checkpoints are not whole in {folder}: see the table, run again")


def main() -> None:
    if sys.stdout:  # not if it is closed
        sys.stdout.reconfigure(errors="backslashreplace")  # for names that the output's encoding lacks
    for handler in logging.getLogger("huggingface_hub").handlers:
        handler.addFilter(one_line_log)
    code = 2
    try:
        if sys.argv[1:] in (["-h"], ["--help"]):
            print(__doc__, flush=True)
        elif sys.argv[1:]:
            raise Problem(f"unrecognized arguments: {' '.join(sys.argv[1:])}")
        else:
            check_settings()
            run()
        code = 0
    except KeyboardInterrupt:
        print("\ninterrupted: whole files are kept, run again to continue", file=sys.stderr)
        code = 130
    except (Problem, OSError) as error:
        print(f"error: {explain(error)}", file=sys.stderr)
    os._exit(code)  # now: an ordinary exit waits for the downloads and look-ups under way


if __name__ == "__main__":
    signal.signal(signal.SIGINT, usual_handler)
    main()

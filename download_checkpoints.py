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
import re
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from errno import EDQUOT, EFBIG, ENOSPC
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, errors, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.utils import WeakFileLock, parse_ratelimit_headers, tqdm
from huggingface_hub.utils.sha import git_hash, sha_fileobj

# ------------------------------------------------------------------------------
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
# ------------------------------------------------------------------------------

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


def listed(names: Sequence[str]) -> str:
    """'step0, step16, step64', cut after twelve."""
    if len(names) > 12:
        names = [*names[:12], f"{len(names) - 12} more"]
    return ", ".join(names)


def is_transient(error: Exception) -> bool:
    """Whether another try may help: not if request, answer or this machine (an errno) is wrong."""
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
        text = f"{hub} answers {error.response.status_code} {error.response.reason_phrase}"
        if error.response.status_code == 401:
            text += ", your token is refused: `hf auth login` again, or unset HF_TOKEN"
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


def with_retries(work: Callable[..., Any], revision: str, *more: Any) -> Any:
    """work(revision, *more), tried TRIES times unless the error will last: the library gives up at a 503."""
    for tried in range(1, TRIES + 1):
        try:
            return work(revision, *more)
        except Exception as raised:
            error = raised  # or what it wraps, as 'not on this disk' wraps 'the hub answers 503'
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
            warn(f"{revision}: {explain(error)}; try {tried + 1} of {TRIES} in {pause:g} s")
            time.sleep(pause)


def weight_files(names: Collection[str]) -> list[str]:
    """One set of weights: safetensors before .bin, one file before shards with their index; [] if none is complete."""
    for stem, kind in (("model", "safetensors"), ("pytorch_model", "bin")):
        if f"{stem}.{kind}" in names:
            return [f"{stem}.{kind}"]
        index = f"{stem}.{kind}.index.json"
        numbered = re.compile(rf"{stem}-\d{{5}}-of-(\d{{5}})\.{kind}", re.ASCII)
        shards = sorted(filter(numbered.fullmatch, names))
        totals = [int(numbered.fullmatch(shard)[1]) for shard in shards]
        if index in names and any(totals.count(total) == total for total in totals):
            return [index, *shards]  # of two sets, both: the index says which counts
    return []


def is_checkable(size: object, published: object) -> bool:
    """Whether a file can be compared with this: not every mirror lists a size and a hash."""
    return type(size) is int and size >= 0 and bool(re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", str(published)))


def look_up(revision: str) -> tuple[str, dict[str, list]]:
    """The commit of a revision and the files {name: [bytes, hash]} to fetch of it."""
    # In a thread: the library's own limit would begin again with every byte that arrives.
    job = ThreadPoolExecutor(1).submit(HfApi().model_info, MODEL_ID, revision=revision, files_metadata=True)
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


def report_shared(published: dict[str, dict[str, list]]) -> None:
    """Warns of weights that revisions share, byte for byte: a known fault of what is published."""
    revisions_with = {}
    for revision, files in published.items():
        for name, (_, digest) in files.items():
            if not name.endswith(".json"):
                revisions_with.setdefault((name, digest), []).append(revision)
    names_in = {}
    for (name, _), revisions in revisions_with.items():
        if len(revisions) > 1:
            names_in.setdefault(tuple(revisions), []).append(name)
    for revisions, names in names_in.items():
        shared = f"{listed(revisions)} share {listed(names)}, byte for byte"
        warn(f"{shared}: one checkpoint's weights under {len(revisions)} names; trust at most one")


def hash_of(path: Path, digits: int) -> str:
    """The sha256 of a file, which has 64 digits, or the sha1 that git takes, which has 40."""
    with path.open("rb") as file:
        return sha_fileobj(file).hex() if digits == 64 else git_hash(file.read())


def differences(files: dict[str, list], checkpoint: Path, hashes: bool) -> dict[str, str]:
    """Why a folder is not the published checkpoint, by size or also by hash: {file: what is wrong}."""
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
    """The files {name: [bytes, hash]} that this script put there, by its record in the folder; else {}."""
    try:
        record = json.loads((checkpoint / RECORD).read_text(encoding="utf-8"))
        model, files = record["model"], record["files"]
        right = record["revision"] == checkpoint.name and all(is_checkable(*file) for file in files.values())
    except Exception:  # whatever is wrong with it, it is no record
        return {}
    if model != MODEL_ID:
        raise Problem(f"{checkpoint} is a checkpoint of {model}, not of {MODEL_ID}: set another CHECKPOINTS_DIR")
    return files if right and weight_files(files) else {}


def whole_files(checkpoint: Path) -> dict[str, list]:
    """The recorded files if the folder holds them, by name and size; else {}. Needs no network."""
    files = recorded(checkpoint)
    return {} if files and differences(files, checkpoint, hashes=False) else files


def write_record(checkpoint: Path, commit: str, files: dict[str, list]) -> None:
    record = {"model": MODEL_ID, "revision": checkpoint.name, "commit": commit, "files": files}
    (checkpoint / RECORD).unlink(missing_ok=True)  # it may be a link
    (checkpoint / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def remove_fragments(folder: Path) -> None:
    """Removes what was being received when a run was ended: the library would not go on with it."""
    for path in folder.glob(".partial/step*/.cache/huggingface/download/*.incomplete"):
        with suppress(OSError):
            path.unlink()


class Bar(tqdm):
    """The library's progress bar, named, as several downloads run at once; ends a body that is too long."""

    def __init__(self, revision: str, name: str, size: int, **settings: Any) -> None:
        task = settings["desc"].partition(": ")[2]  # names Xet's two bars; before it can be a signed link's end
        self.name = name
        self.left = float("inf") if task else size  # Xet checks by itself and counts otherwise
        desc = f"{revision} {name} {task}".strip()
        super().__init__(**settings | {"desc": desc, "disable": None, "position": None})

    def update(self, received: float = 1) -> bool | None:
        self.left -= received
        if self.left < 0:
            raise Problem(f"{self.name} is longer than published: suspect the mirror or the proxy")
        return super().update(received)


def fetch(revision: str, commit: str, files: dict[str, list], folder: Path) -> str:
    """Makes a checkpoint whole and returns its state, which begins with 'whole' if that succeeded."""
    final, unfinished = folder / revision, folder / ".partial" / revision
    if os.path.lexists(final):
        print(f"comparing {revision}, which is there, with the hub's checksums", flush=True)
        wrong = differences(files, final, hashes=True)
        if not wrong:
            if not final.is_symlink():
                write_record(final, commit, files)
            return "whole, was here"
        if final.is_symlink() or not recorded(final) or wrong.keys() - files.keys():
            faults = listed([f"{name} {fault}" for name, fault in wrong.items()])
            return f"left alone: {faults}; put that right or move it away, and run again"
        shutil.rmtree(unfinished, ignore_errors=True)
        final.rename(unfinished)  # fetched by this script and damaged since

    # Not by the library's verify_repo_checksums, which asks the hub once more and waits forever.
    wrong = differences(files, unfinished, hashes=True)
    for _ in range(2):  # what arrives with a wrong checksum is fetched once more
        for name in wrong:
            path = unfinished / name
            if name not in files:
                path.unlink()  # of weights that are no longer published
                continue
            again = path.exists()  # the library would believe its own notes on such a file
            if again:
                warn(f"{revision}: {name} does not match the published checksum and is fetched again")
            bar = partial(Bar, revision, name, files[name][0])
            hf_hub_download(MODEL_ID, name, revision=commit, local_dir=unfinished, tqdm_class=bar, force_download=again)
        if wrong:
            wrong = differences(files, unfinished, hashes=True)
    if wrong:
        return f"not whole: checksum wrong twice, suspect the mirror, the proxy or the disk: {listed(list(wrong))}"
    shutil.rmtree(unfinished / ".cache", ignore_errors=True)  # the library's notes
    write_record(unfinished, commit, files)
    unfinished.rename(final)
    return "whole, fetched now"


def fetch_all(commits: dict[str, str], published: dict[str, dict[str, list]], folder: Path) -> dict[str, str]:
    """Fetches the files {revision: files} of the commits {revision: commit}; returns {revision: state}."""
    unfinished = folder / ".partial"
    with ExitStack() as held:
        try:
            unfinished.mkdir(parents=True, exist_ok=True)
            held.enter_context(WeakFileLock(unfinished / "lock", timeout=0.5))
        except TimeoutError:
            print(f"another run is fetching into {folder}: waiting for it to end", flush=True)
            held.enter_context(WeakFileLock(unfinished / "lock"))
        except OSError as error:
            raise Problem(f"cannot write into {folder} ({error.strerror}): set another CHECKPOINTS_DIR") from error
        remove_fragments(folder)  # of a run that was killed
        held.callback(remove_fragments, folder)  # of this one after Ctrl-C
        # Another run may have fetched some since they were looked up.
        todo = {revision: published[revision] for revision in commits if not whole_files(folder / revision)}
        left = 0.0  # GB
        for revision, files in todo.items():
            place = folder if os.path.lexists(folder / revision) else unfinished
            lacking = differences(files, place / revision, hashes=False)
            left += sum(files[name][0] for name in lacking if name in files) / 1e9
        free = shutil.disk_usage(folder).free / 1e9
        print(f"{len(todo)} to complete: {left:.2f} GB to fetch, {free:.2f} GB free", flush=True)
        if left > free:
            raise Problem(f"{left:.2f} GB to fetch, {free:.2f} GB free in {folder}: make room or choose fewer STEPS")

        jobs, pool = {}, ThreadPoolExecutor(DOWNLOADS_AT_ONCE)
        for revision, files in todo.items():
            jobs[revision] = pool.submit(with_retries, fetch, revision, commits[revision], files, folder)
        while wait(jobs.values(), timeout=1).not_done:  # a wait without end is deaf to Ctrl-C on Windows
            pass
    states = {}
    for revision, job in jobs.items():
        error = job.exception()  # of whatever kind: the other checkpoints went on
        states[revision] = f"not whole: {explain(error)}" if error else job.result()
    return states


def run() -> None:
    """Looks up what is not whole, fetches it, and prints a table: step, size, state."""
    folder = Path(__file__).resolve().parent / CHECKPOINTS_DIR
    revisions = [f"step{step}" for step in sorted(STEPS)]
    published = {revision: whole_files(folder / revision) for revision in revisions}
    missing = [revision for revision in revisions if not published[revision]]
    states = dict.fromkeys(revisions, "whole, was here")  # unless it is missing
    if missing:
        print(f"looking up {len(missing)} of {len(revisions)} checkpoints of {MODEL_ID}", flush=True)
    commits, lacking = {}, []
    for revision in missing:
        try:
            commits[revision], published[revision] = with_retries(look_up, revision)
        except Exception as error:
            states[revision] = explain(error)
            lacking.append(f"{revision} ({states[revision]})")
            busy = isinstance(error, errors.HfHubHTTPError) and error.response.status_code >= 500
            if not busy and not isinstance(error, (Problem, errors.RevisionNotFoundError)):  # all would end the same
                raise Problem(f"{states[revision]}; not whole yet: {listed(missing)}") from error
    if lacking:
        warn(f"not available from {MODEL_ID}: {', '.join(lacking)}")
    report_shared(published)
    if commits:
        states |= fetch_all(commits, published, folder)

    print(f"{'step':>8}  {'size':>9}  state", flush=True)
    for revision, state in states.items():
        size = sum(size for size, _ in published[revision].values())
        shown = f"{size / 1e9:.2f} GB" if size else "-"
        print(f"{revision.removeprefix('step'):>8}  {shown:>9}  {state}", flush=True)
    failed = [state for state in states.values() if not state.startswith("whole")]
    if failed:
        raise Problem(f"{len(failed)} of {len(states)} checkpoints are not whole in {folder}: see the table, run again")


def main() -> int:
    """Runs what the command line asks for, and returns the exit code."""
    if sys.stdout:  # not if it is closed
        sys.stdout.reconfigure(errors="backslashreplace")  # for names that the output's encoding lacks
    for handler in logging.getLogger("huggingface_hub").handlers:
        handler.addFilter(one_line_log)
    try:
        if sys.argv[1:] in (["-h"], ["--help"]):
            print(__doc__, flush=True)
        elif sys.argv[1:]:
            raise Problem(f"unrecognized arguments: {' '.join(sys.argv[1:])}")
        else:
            check_settings()
            run()
        return 0
    except KeyboardInterrupt:
        print("\ninterrupted: whole files are kept, run again to continue", file=sys.stderr)
        return 130
    except (Problem, OSError) as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    signal.signal(signal.SIGINT, usual_handler)
    os._exit(main())  # now: an ordinary exit waits for the downloads and look-ups under way

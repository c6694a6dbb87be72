"""Fetches checkpoints of Pythia-1B, each a revision of one model on the Hugging Face hub, for the analysis scripts.

    python download_checkpoints.py

Writes pythia_1b_checkpoints/step<N>/ beside this file, for every step of STEPS: config.json, the tokenizer, one set of
weights, and .published.json, which says what was fetched (model, commit, size and hash of every file). A folder gets
its name only when every file matches the hub's checksum; until then it is pythia_1b_checkpoints/.partial/step<N>/.
Run it again at any time: what is whole is not fetched again and needs no network.
The exit code is 0 if every checkpoint is whole, 2 if not, 130 after Ctrl-C.

The downloads are huggingface_hub's: HF_TOKEN or `hf auth login`, HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and HTTPS_PROXY
mean here what they mean there.
"""

import argparse
import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from errno import EDQUOT, EFBIG, ENOSPC
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub import HfApi, constants, errors, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.utils import WeakFileLock, parse_ratelimit_headers, tqdm
from huggingface_hub.utils.sha import git_hash, sha_fileobj

# ----------------------------------------------------------------------------------------------------------------------
# what
MODEL_ID = "EleutherAI/pythia-1b"  # a Pythia model on the hub; another one needs another CHECKPOINTS_DIR
STEPS = [0, 16, 64, 256, 1000, 3000, 10000, 18000, 48000, 78000, 108000, 143000]  # training steps; 2.0 GB each for 1B
# all 154 that are published: STEPS = [0, *(2**i for i in range(10)), *range(1000, 144000, 1000)]
CHECKPOINTS_DIR = "pythia_1b_checkpoints"  # the folder, beside this file unless absolute
# how
DOWNLOADS_AT_ONCE = 2  # checkpoints, 1 or more
TRIES = 5  # of each look-up and each checkpoint, 1 or more
PAUSE = 2.0  # seconds before the second try, twice as long before each further one, longer if the hub asks for it
TIMEOUT = 30.0  # seconds for the hub to answer a look-up
# ----------------------------------------------------------------------------------------------------------------------

SMALL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
RECORD = ".published.json"  # in a whole checkpoint: {"model", "revision", "commit", "files": {name: [bytes, hash]}}


def fail(message: str) -> NoReturn:
    """Ends the run with one line on standard error that says what is wrong, where, and what to do."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def warn(message: str) -> None:
    """Writes one line on standard error, above the progress bars."""
    tqdm.write(f"warning: {message}", file=sys.stderr)


def check_settings() -> None:
    """Ends the run at the first setting that makes no sense."""
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
            fail(f"{name} = {globals()[name]!r} must be {rule}")


def one_line(text: str) -> str:
    """The text in one line, without what can be secret in it: a password in an address, a link's signature, a token."""
    return " ".join(re.sub(r"(?<=//)[^/\s@]+@|\?[^\s'\"]+|Bearer [^'\"]*", "…", text).split())


def one_line_log(record: logging.LogRecord) -> bool:
    """A filter for the library's own log, which quotes signed links and breaks lines."""
    record.msg, record.args = one_line(record.getMessage()), None
    return True


def step_names(steps: list[int]) -> str:
    """'step0, step16, step64', cut after twelve."""
    return ", ".join([f"step{step}" for step in steps[:12]] + [f"{len(steps) - 12} more"] * (len(steps) > 12))


def is_transient(error: Exception) -> bool:
    """Whether another try may help: not if the request, the answer or this machine (an errno) is wrong."""
    if isinstance(error, errors.HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    lasting = (errors.OfflineModeIsEnabled, ImportError, LookupError, TypeError, ValueError)
    return not isinstance(error, lasting) and getattr(error, "errno", None) is None


def explain(error: Exception) -> str:
    """What is wrong and what to do, in one line."""
    hub, text = constants.ENDPOINT, f"{type(error).__name__}: {error}"
    if isinstance(error, errors.GatedRepoError):
        text = f"{MODEL_ID} is gated: accept its terms on {hub}/{MODEL_ID}, then run `hf auth login` or set HF_TOKEN"
    elif isinstance(error, errors.RepositoryNotFoundError):
        text = f"{hub} has no model {MODEL_ID}: check MODEL_ID; for a private one run `hf auth login` or set HF_TOKEN"
    elif isinstance(error, errors.HfHubHTTPError):
        token = ", your token is refused: `hf auth login` again, or unset HF_TOKEN"
        status = error.response.status_code
        text = f"{hub} answers {status} {error.response.reason_phrase}{token if status == 401 else ''}"
    elif isinstance(error, errors.OfflineModeIsEnabled):
        text = "offline mode is on: unset HF_HUB_OFFLINE"
    elif getattr(error, "errno", None) in (EDQUOT, EFBIG, ENOSPC):
        text = f"the disk is full ({os.strerror(error.errno)}): make room and run again"
    elif is_transient(error):
        text = f"the connection to {hub} failed ({text}): check the network, HF_ENDPOINT and the proxy"
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
            asked = [int(headers["Retry-After"])] if headers.get("Retry-After", "").isdecimal() else []
            asked += [limit.reset_in_seconds] if limit and limit.remaining == 0 else []
            pause = max(PAUSE * 2 ** (tried - 1), *asked, 0)
            warn(f"step{step}: {explain(error)}; try {tried + 1} of {TRIES} in {pause:g} s")
            time.sleep(pause)


def recorded(step: int, folder: Path) -> dict[str, list]:
    """The files {name: [bytes, hash]} of a checkpoint that is whole on this disk, else {}. Needs no network."""
    checkpoint = folder / f"step{step}"
    try:
        record = json.loads((checkpoint / RECORD).read_text(encoding="utf-8"))
        model, revision, files = record["model"], record["revision"], record["files"]
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    if model != MODEL_ID:
        fail(f"{checkpoint} is a checkpoint of {model}, not of {MODEL_ID}: set another CHECKPOINTS_DIR")
    return files if revision == checkpoint.name and not bytes_left(files, checkpoint) else {}


def bytes_left(files: dict[str, list], folder: Path) -> int:
    """The bytes of those files that are not in the folder with their published size."""
    sizes = {folder / name: size for name, (size, _) in files.items()}
    return sum(size for path, size in sizes.items() if not path.is_file() or path.stat().st_size != size)


def weight_files(published: Collection[str]) -> list[str]:
    """One set of weights: safetensors before .bin, one file before shards with their index; [] if none is complete."""
    for stem, kind in (("model", "safetensors"), ("pytorch_model", "bin")):
        if f"{stem}.{kind}" in published:
            return [f"{stem}.{kind}"]
        index = f"{stem}.{kind}.index.json"
        shards = sorted(name for name in published if re.fullmatch(rf"{stem}-\d{{5}}-of-\d{{5}}\.{kind}", name))
        if index in published and shards and len(shards) == int(shards[0].split("-of-")[1][:5]):
            return [index, *shards]
    return []


def look_up(step: int) -> tuple[str, dict[str, list]]:
    """The commit of a revision and the files {name: [bytes, hash]} to fetch of it; LookupError if it lacks one."""
    info = HfApi().model_info(MODEL_ID, revision=f"step{step}", timeout=TIMEOUT, files_metadata=True)
    if info.gated:  # its list of files is public, the files are not: ask for one, to be refused now and not later
        get_hf_file_metadata(hf_hub_url(MODEL_ID, "config.json", revision=info.sha), timeout=TIMEOUT)
    published = {f.rfilename: [f.lfs.size, f.lfs.sha256] if f.lfs else [f.size, f.blob_id] for f in info.siblings or []}
    weights = weight_files(published)
    lacking = [name for name in SMALL_FILES[:2] if name not in published] + ["weights"] * (not weights)
    if lacking:
        raise LookupError(f"carries no {' and no '.join(lacking)}")
    return info.sha, {name: published[name] for name in (*SMALL_FILES, *weights) if name in published}


def report_identical(published: dict[int, dict[str, list]]) -> None:
    """Warns of steps {step: files} that carry the same weights, byte for byte: a known fault of what is published."""
    same: dict[tuple, list[int]] = {}
    for step, files in published.items():
        hashes = tuple(files[name][1] for name in weight_files(files) if not name.endswith(".json"))
        same.setdefault(hashes, []).append(step)
    for steps in (sorted(steps) for steps in same.values() if len(steps) > 1):
        warn(
            f"{step_names(steps)} carry byte-identical weights: they are one checkpoint under {len(steps)} names, so "
            "no curve changes between them, whatever training did; believe at most one of them"
        )


def mismatches(files: dict[str, list], folder: Path) -> list[str]:
    """The files in the folder whose hash is not the published one: sha256, for small files the sha1 that git takes."""

    def actual(path: Path, published: str) -> str:
        with path.open("rb") as file:
            return sha_fileobj(file).hex() if len(published) == 64 else git_hash(file.read())

    return [name for name, (_, published) in files.items() if actual(folder / name, published) != published]


def remove_fragments(folder: Path) -> None:
    """Removes what was being received when a run was ended: the library would not go on with it."""
    for path in folder.glob(".partial/step*/.cache/huggingface/download/*.incomplete"):
        with suppress(OSError):
            path.unlink()


def fetch(step: int, commit: str, files: dict[str, list], folder: Path) -> str:
    """Fetches what a checkpoint lacks, compares it with the published hashes, and gives the folder its name.

    Returns its state, which begins with 'whole' or with 'not'; the library's errors pass through.
    """
    final, unfinished = folder / f"step{step}", folder / ".partial" / f"step{step}"
    if final.exists():  # not by this script, or damaged since
        if (final / "config.json").exists() and mismatches({"config.json": files["config.json"]}, final):
            return "not fetched: the folder there holds another config.json than the hub; move it away"
        shutil.rmtree(unfinished, ignore_errors=True)
        final.rename(unfinished)
    if bytes_left(files, unfinished) > shutil.disk_usage(folder).free:
        return "not fetched: the disk is full"

    def bar(name: str, **settings: Any) -> tqdm:
        # The library's bar, but named: several downloads run at once, and it may show the end of a signed link.
        task = settings["desc"].partition(": ")[2]
        ours = {"desc": f"step{step} {name} {task}".strip(), "disable": None, "position": None}
        return tqdm(**{**settings, **ours})

    def get(name: str, **how: bool) -> None:
        bars = partial(bar, name)
        hf_hub_download(MODEL_ID, name, revision=commit, local_dir=unfinished, tqdm_class=bars, **how)

    for name in files:
        get(name)
    # The library's verify_repo_checksums would ask the hub for the hashes once more, and wait for them without end.
    wrong = mismatches(files, unfinished)
    for name in wrong:
        warn(f"step{step}: {name} does not match the published checksum and is fetched again")
        get(name, force_download=True)
    if wrong := mismatches({name: files[name] for name in wrong}, unfinished):
        return f"not whole: checksum wrong twice, suspect the mirror, the proxy or the disk: {', '.join(wrong)}"
    shutil.rmtree(unfinished / ".cache")  # the library's notes on a download under way
    record = {"model": MODEL_ID, "revision": final.name, "commit": commit, "files": files}
    (unfinished / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
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
            fail(f"cannot write into {folder} ({error.strerror}): set another CHECKPOINTS_DIR")
        remove_fragments(folder)
        todo = {step: plan[step] for step in plan if not recorded(step, folder)}  # another run may have fetched some
        total = sum(size for _, files in todo.values() for size, _ in files.values()) / 1e9
        left = sum(
            min(bytes_left(files, place / f"step{step}") for place in (folder, unfinished)) / 1e9
            for step, (_, files) in todo.items()
        )
        free = shutil.disk_usage(folder).free / 1e9
        print(f"{len(todo)} to fetch: {total:.2f} GB, {total - left:.2f} GB of it here; {free:.2f} GB free", flush=True)
        if left > free:
            fail(f"{left:.2f} GB to fetch, {free:.2f} GB free in {folder}: make room or choose fewer STEPS")

        def state_of(step: int) -> str:
            try:
                return with_retries(fetch, step, *todo[step], folder)
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
    published = {step: files for step in steps if (files := recorded(step, folder))}
    states = {step: "whole, was here" for step in published}
    missing = [step for step in steps if step not in published]
    if missing:
        print(f"looking up {len(missing)} of {len(steps)} checkpoints of {MODEL_ID}", flush=True)
    plan = {}
    for step in missing:
        try:
            plan[step] = with_retries(look_up, step)
            published[step] = plan[step][1]
        except errors.RevisionNotFoundError:
            states[step] = "not published"
        except LookupError as error:
            states[step] = f"not usable: {error}"
        except Exception as error:
            if not isinstance(error, errors.HfHubHTTPError) or error.response.status_code < 500:
                fail(f"{explain(error)}; not whole yet: {step_names(missing)}")  # the other look-ups would end the same
            states[step] = f"not looked up: {explain(error)}"
    if lacking := [step for step in missing if step not in plan]:
        warn(f"not to be had from {MODEL_ID}: " + ", ".join(f"step{step} ({states[step]})" for step in lacking))
    report_identical(published)
    if plan:
        states |= fetch_all(plan, folder)

    print(f"{'step':>8}  {'size':>9}  state")
    for step in steps:
        size = sum(size for size, _ in published.get(step, {}).values())
        print(f"{step:>8}  {f'{size / 1e9:.2f} GB' if size else '-':>9}  {states[step]}")
    if lacking := [step for step in steps if not states[step].startswith("whole")]:
        fail(f"{len(lacking)} of {len(steps)} checkpoints are not whole in {folder}: see the table, then run again")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.error = fail
    parser.parse_args()
    check_settings()
    for handler in logging.getLogger("huggingface_hub").handlers:
        handler.addFilter(one_line_log)
    try:
        run()
    except KeyboardInterrupt:
        print("\ninterrupted: whole files are kept, run again to go on", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(130)  # now: an ordinary exit waits for the downloads under way


if __name__ == "__main__":
    main()

"""Fetches checkpoints of a training run, each a revision of one model on the Hugging Face hub.

    python download_checkpoints.py

Writes CHECKPOINTS_DIR/step<N>/ beside this file: config, tokenizer, one set of weights, a record of
them. A folder gets its name when all files match the hub's checksums; before, it is in .partial/.
One of another origin counts if it matches the hub, else it is left alone. Run it again at any time:
what is whole needs no network. The exit code is 0 if all is whole, else 2, or 130 after Ctrl-C.
"""

import argparse
import json
import os
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, errors, get_session, hf_hub_download
from huggingface_hub.utils import WeakFileLock, logging, tqdm

# --------------------------------------------------------------------------------------------------
MODEL_ID = "EleutherAI/pythia-1b"  # a model on the hub; another one needs another CHECKPOINTS_DIR
REVISION = "step{step}"  # its branches, * for anything; for OLMo 2 "stage1-step{step}-tokens*B"
# training steps, 2.0 GB each, or "all" that are published; most happens between 3000 and 18000
STEPS = [0, 64, 256, 1000, 2000, 3000, 5000, 7000, 10000, 18000, 48000, 78000, 143000]
CHECKPOINTS_DIR = "pythia_1b_checkpoints"  # the folder, beside this file unless absolute
WORKERS = 2  # checkpoints at once
TRIES = 5  # of each look-up and each checkpoint
PAUSE = 2.0  # seconds before the second try, twice as long before each further one
TIMEOUT = 30.0  # seconds to wait for the hub
# --------------------------------------------------------------------------------------------------
FOLDER = Path(__file__).resolve().parent / CHECKPOINTS_DIR
BRANCH = re.escape(REVISION).replace(r"\{step\}", "([0-9]+)").replace(r"\*", ".*?")  # as a regex
RECORD = ".published.json"  # in a checkpoint: {"model", "revision", "commit", "files"}
STEP_LIST = FOLDER / ".steps.json"  # what "all" was when the hub was asked; delete it to ask again
SMALL_FILE = re.compile(r"(config|tokenizer\w*|\w+_tokens\w*|vocab)\.json|merges\.txt|\w+\.model")
SECRETS = re.compile(r"(?<=//)[^\s/]*@|\?[^\s'\"]+|\(…\)\S+|Bearer .*")  # in links and headers
ADVICE = {
    KeyboardInterrupt: "interrupted: whole files are kept, run again to continue",
    UnicodeEncodeError: "HF_TOKEN (or hf auth login) has a character that no header can carry",
    httpx2.UnsupportedProtocol: "HF_ENDPOINT must begin with http:// or https://",
    IndexError: "REVISION needs {step} where the number stands",
    ImportError: "ALL_PROXY, HTTPS_PROXY or HTTP_PROXY needs a library that is missing",
    httpx2.TransportError: "no connection: check the network, HF_ENDPOINT and HTTPS_PROXY",
    json.JSONDecodeError: "this is not the hub: look for a login page, check HF_ENDPOINT",
}


def explain(error: BaseException) -> str:
    """What is wrong, where, and what to do, in one line without secrets."""
    text = " ".join(SECRETS.sub("...", str(error) or type(error).__name__).split())
    if getattr(error, "errno", None):  # a full disk, no permission, a file in the folder's place
        return f"cannot write CHECKPOINTS_DIR = {CHECKPOINTS_DIR}: {text}"
    for kind, advice in ADVICE.items():
        if isinstance(error, kind):
            return f"{advice} ({text})"
    return text


def attempt(work, name: str, *more):
    """The result of work(name, *more), or why there is none; tries again after what may pass."""
    lasting = (ValueError, ImportError, ConnectionError, httpx2.UnsupportedProtocol)
    for tried in range(1, TRIES + 1):
        try:
            return work(name, *more)
        except errors.LocalEntryNotFoundError as raised:
            error = raised.__cause__  # what the hub said, not what the disk lacks
        except Exception as raised:
            error = raised
        text, response = explain(error), getattr(error, "response", None)
        local = isinstance(error, lasting) or getattr(error, "errno", None)
        status, header = getattr(response, "status_code", 500), getattr(response, "headers", {}).get
        if tried == TRIES or local or (status < 500 and status not in (408, 429)):
            return text
        asked = re.search(r"(?:^|r=0; ?t=)(\d+)", header("Retry-After") or header("RateLimit", ""))
        pause = max(PAUSE * 2 ** (tried - 1), int(asked[1]) if asked else 0)
        tqdm.write(f"warning: {name}: {text}; next try in {pause:g} s", file=sys.stderr)
        time.sleep(pause)


def whole_record(step: int) -> dict:
    """The record of a checkpoint if this script made it and its files have their sizes, else {}."""
    folder = FOLDER / f"step{step}"
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        sizes = [(folder / name).stat().st_size for name in record["files"]]
    except (OSError, ValueError):
        return {}
    whole = sizes == [size for size, _ in record["files"].values()]
    ours = record["model"] == MODEL_ID and re.fullmatch(BRANCH, record["revision"])
    return record if whole and ours else {}


def choose_weights(names: list[str]) -> list[str]:
    """One whole set of weights: safetensors before .bin, one file before shards and their index."""
    for stem, kind in (("model", "safetensors"), ("pytorch_model", "bin")):
        if f"{stem}.{kind}" in names:
            return [f"{stem}.{kind}"]
        form = rf"{stem}(-\d+-of-\d+)?\.{kind}(\.index\.json)?"
        found = [name for name in names if re.fullmatch(form, name)]
        if f"{stem}-{len(found) - 1:05}-of-{len(found) - 1:05}.{kind}" in found:
            return found  # all shards, and the index
    return []


def look_up(revision: str) -> dict:
    """The record of what is to be fetched of a revision."""
    info = HfApi().model_info(MODEL_ID, revision=revision, files_metadata=True)
    weights, files = choose_weights([file.rfilename for file in info.siblings]), {}
    for file in info.siblings:
        if file.rfilename in weights or SMALL_FILE.fullmatch(file.rfilename):
            files[file.rfilename] = [file.size, file.lfs.sha256 if file.lfs else file.blob_id]
    if not weights or "config.json" not in files:
        raise ValueError("carries no weights or no config.json")
    return {"model": MODEL_ID, "revision": revision, "commit": info.sha, "files": files}


def bar(label: str):
    own = {"desc": label, "position": None, "leave": False, "disable": None}  # on a terminal only
    return lambda **settings: tqdm(**settings | own)


def fetch(checkpoint: str, record: dict) -> str:
    """Makes a checkpoint whole and returns its state, which begins with "whole" if it is."""
    final, wanted = FOLDER / checkpoint, list(record["files"])
    foreign = os.path.lexists(final)
    folder = final if foreign else FOLDER / ".partial" / checkpoint
    where = {"revision": record["commit"], "local_dir": folder}
    for _ in range(2):  # what does not match is fetched once more
        for name in [] if foreign else wanted:
            hf_hub_download(MODEL_ID, name, tqdm_class=bar(f"{checkpoint} {name}"), **where)
        found = HfApi().verify_repo_checksums(MODEL_ID, **where)
        wrong = [mismatch["path"] for mismatch in found.mismatches] + found.missing_paths
        wrong = [name for name in wrong if name in wanted] + choose_weights(found.extra_paths)
        if foreign or not wrong:
            break
        for name in wrong:
            (folder / name).unlink(missing_ok=True)
    if wrong:
        return f"not as published: {', '.join(wrong)}; move {folder} away or suspect the mirror"
    (folder / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
    if not foreign:
        shutil.rmtree(folder / ".cache")  # the library's notes
        folder.rename(final)
    return "whole, was here" if foreign else "whole, fetched now"


def fetch_missing() -> tuple[dict[int, dict], dict[int, str]]:
    """Looks up and fetches what is not whole; returns {step: record} and {step: state}."""
    for fragment in FOLDER.glob(".partial/*/.cache/huggingface/download/*.incomplete"):
        fragment.unlink()  # of a run that was killed: the library would not go on with it
    hooks = get_session().event_hooks["request"]  # the library would wait for ever
    hooks.append(lambda request: request.extensions["timeout"].update(read=TIMEOUT))
    refs, branches = attempt(HfApi().list_repo_refs, MODEL_ID), {}
    if isinstance(refs, str):
        raise ValueError(refs)
    for branch in refs.branches:
        match = re.fullmatch(BRANCH, branch.name)
        if match and (STEPS == "all" or int(match[1]) in STEPS):
            branches.setdefault(int(match[1]), []).append(branch.name)
    for step, names in branches.items():
        if len(names) > 1:
            raise ValueError(f"step {step} is {' and '.join(names)}: make REVISION more precise")
    if not branches:
        raise ValueError(f"{MODEL_ID} has none of STEPS on a branch like REVISION = {REVISION!r}")
    if STEPS == "all":
        STEP_LIST.write_text(json.dumps(list(branches)), encoding="utf-8")
    records = {step: whole_record(step) for step in sorted(branches if STEPS == "all" else STEPS)}
    new, lacking, left = {}, {}, 0
    for step in [step for step in records if not records[step]]:
        found = attempt(look_up, branches[step][0]) if step in branches else "not published"
        if isinstance(found, str):
            print(f"warning: step{step} is not available: {found}", file=sys.stderr)
            lacking[step] = found
            continue
        new[step] = found
        here = {path.name for path in FOLDER.rglob(f"step{step}/*")}
        left += sum(size for name, (size, _) in found["files"].items() if name not in here)
    free = shutil.disk_usage(FOLDER).free
    sizes = f"{left / 1e9:.2f} GB to fetch, {free / 1e9:.2f} GB free"
    print(sizes, flush=True)
    if left > free:
        raise ValueError(f"{sizes}: make room in CHECKPOINTS_DIR or choose fewer STEPS")
    states = ThreadPoolExecutor(WORKERS).map(lambda n: attempt(fetch, f"step{n}", new[n]), new)
    return records | new, lacking | dict(zip(new, states, strict=True))


def main() -> None:
    argparse.ArgumentParser(usage=__doc__).parse_args()
    logging.set_verbosity_error()  # the library's warnings quote signed links
    known = json.loads(STEP_LIST.read_text(encoding="utf-8")) if STEP_LIST.is_file() else []
    records = {step: whole_record(step) for step in sorted(known if STEPS == "all" else STEPS)}
    states, places = {}, {}
    if not records or not all(records.values()):
        print(f"fetching into {FOLDER}, after any other run that does", flush=True)
        with WeakFileLock(FOLDER / ".partial" / "lock"):
            records, states = fetch_missing()
    for step, record in records.items():
        print(f"{step:>8}  {states.get(step, 'whole, was here')}", flush=True)
        for name, (_, checksum) in record.get("files", {}).items():
            if name.endswith((".safetensors", ".bin")):
                places.setdefault(checksum, []).append(f"step{step}/{name}")
    for names in places.values():
        if len(names) > 1:
            print(f"warning: the same bytes, trust one: {', '.join(names)}", file=sys.stderr)
    failed = [state for state in states.values() if not state.startswith("whole")]
    if failed:
        raise ValueError(f"{len(failed)} of {len(records)} are not whole: see the table, run again")


if __name__ == "__main__":
    try:
        main()
    except (Exception, KeyboardInterrupt) as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        os._exit(130 if isinstance(error, KeyboardInterrupt) else 2)  # sys.exit would wait

"""Measures both experiments against what the machine allows, and against other ways to the same hidden states.

Run as `python tests/benchmark.py [--shape 70m|1b] [--words N] [--checkpoints N] [--peers PYTHON]`, on a machine that
does nothing else: two checkpoints, or N, of random float16 weights in a temporary folder (2.0 GB each for 1b), computed
in float32 on the CPU.
PYTHON is an interpreter with tests/benchmark_requirements.txt installed, which runs TransformerLens and minicons.
With --growth it measures instead how seconds and memory of the first experiment grow with the number of words.

The limit for a checkpoint is the longer of reading its weights and multiplying its matrices:
    max(bytes / bandwidth, 2 x weights of the linear layers x distinct prefixes / matrix rate).
Counted with all parameters, as in the usual 2N, it is higher by the embeddings, which are looked up and not multiplied.
The matrix rate is that of the model's own linear layers, one after the other, at BATCH_TOKENS tokens, the best of six
rounds. The engine's passes are the best of two; all else is timed once. The naive loop and the peers work on batches
in random order for SAMPLE_SECONDS; what they take for everything is extrapolated from that in proportion.
"""

import argparse
import importlib
import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import torch
from tqdm import tqdm
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

# ------------------------------------------------------------------------------
SHAPES = {
    "70m": {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 2048},
    "1b": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 8, "intermediate_size": 8192},
}
SAMPLE_SECONDS = 25  # for the naive loop and each peer, which end earlier if they have done all words
PEER_BATCH = 64  # words in a batch of a peer
GROWTH = (125, 594, 2690, None)  # words a group that make about 500, 2,000, 8,000 and 32,000 words; None = all
# ------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("token_convergence_analysis", "multitoken_context_perturbation")
BOS = "<|endoftext|>"
Text = tuple[str, tuple[int, ...]]  # a text as the model reads it, and its token ids after <|endoftext|>


def make_family(family: Path, shape: dict[str, int], checkpoints: int) -> list[Path]:
    """Writes checkpoints of random float16 weights as Pythia's are published."""
    from miniature import save_checkpoint  # not at the top, since the peers' interpreter lacks what it imports

    config = GPTNeoXConfig(vocab_size=50_304, rotary_pct=0.25, bos_token_id=0, eos_token_id=0, **shape)
    with torch.device("meta"):
        model = GPTNeoXForCausalLM(config)
    model = model.half().to_empty(device="cpu")
    folders = [family / f"step{1000 * index}" for index in range(checkpoints)]
    for folder in folders:
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.02)
            else:
                parameter.fill_(float(name.endswith("norm.weight")))
        save_checkpoint(model, folder)
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPTNeoXTokenizer"}')
    return folders


def forget(folders: list[Path]) -> None:
    """Drops the files of checkpoints from the system's cache, where a user can have that done, as on Linux."""
    if hasattr(os, "posix_fadvise"):
        for file in (file for folder in folders for file in folder.iterdir()):
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds_for(action: Callable, *arguments: object) -> float:
    start = time.perf_counter()
    action(*arguments)
    return time.perf_counter() - start


def linear_seconds(layers: list[torch.nn.Linear], tokens: int) -> list[float]:
    """Seconds for the layers, each once: as torch multiplies by default, and as the script does."""
    inputs = {width: torch.randn(1, tokens, width) for width in {layer.in_features for layer in layers}}

    def multiply_all(multiply: Callable) -> None:
        for layer in layers:
            multiply(layer, inputs[layer.in_features])

    ways = (torch.nn.Linear.forward, torch.nn.Linear.__call__)
    return [min(seconds_for(multiply_all, way) for _ in range(3)) for way in ways]


def naive_loop(folder: str) -> Callable[[list[Text]], object]:
    """Loads the causal LM. Returns a function that runs it on a batch, here of one word."""
    model = GPTNeoXForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def run(batch: list[Text]) -> torch.Tensor:
        tokens = torch.tensor([sequence for _, sequence in batch])
        return torch.stack([layer[:, -1] for layer in model(input_ids=tokens, output_hidden_states=True).hidden_states])

    return run


def transformer_lens(folder: str) -> Callable[[list[Text]], object]:
    """The same through TransformerLens, which keeps the residual stream only."""
    from transformer_lens.model_bridge import TransformerBridge

    model = TransformerBridge.boot_transformers(folder, device="cpu", dtype=torch.float32)

    def run(batch: list[Text]) -> torch.Tensor:
        tokens = torch.tensor([sequence for _, sequence in batch])
        wanted = ("hook_resid_pre", "ln_final.hook_out")
        _, cache = model.run_with_cache(tokens, return_type=None, names_filter=lambda name: name.endswith(wanted))
        return torch.stack([cache[name][:, -1] for name in cache])

    return run


def minicons(folder: str) -> Callable[[list[Text]], object]:
    """The same through minicons, which averages over the tokens of a word."""
    from minicons.cwe import CWE

    model = CWE(folder, dtype=torch.float32)

    def run(batch: list[Text]) -> list[torch.Tensor]:
        spans = [(BOS + text, (len(BOS) + 1, len(BOS + text))) for text, _ in batch]  # of the word, without its space
        return model.extract_representation(spans, layer="all")

    return run


WAYS = {"naive": (naive_loop, 1), "TransformerLens": (transformer_lens, PEER_BATCH), "minicons": (minicons, PEER_BATCH)}


def time_way(name: str, folder: str, texts_file: str) -> tuple[float, float]:
    """Seconds that one of WAYS takes to load a checkpoint, and for all texts, in batches of equal length."""
    texts = json.loads(Path(texts_file).read_text(encoding="utf-8"))
    load, size = WAYS[name]
    start = time.perf_counter()
    run = load(folder)
    loading = time.perf_counter() - start
    batches = []
    for length in {len(sequence) for _, sequence in texts}:
        alike = [text for text in texts if len(text[1]) == length]
        batches += [alike[start : start + size] for start in range(0, len(alike), size)]
    random.Random(0).shuffle(batches)
    run(batches[0])
    done, start = 0, time.perf_counter()
    for batch in batches:
        run(batch)
        done += len(batch)
        if time.perf_counter() - start > SAMPLE_SECONDS:
            break
    return loading, (time.perf_counter() - start) / done * len(texts)


def time_way_apart(python: str, name: str, folder: Path, texts_file: Path) -> tuple[float, float] | str:
    """The same, in a process of its own by another interpreter; or why it did not run."""
    command = [python, __file__, "--peer", name, folder, texts_file]
    process = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    if process.returncode:
        return "not run: " + [f"exit code {process.returncode}", *process.stderr.strip().splitlines()][-1]
    return tuple(json.loads(process.stdout.splitlines()[-1]))


def run_script(name: str, folder: Path, family: Path, words: int | None) -> tuple[float, float]:
    """Seconds and peak anonymous memory (GB; NaN where there is no /proc) of a script as a process, in a copy."""
    source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    for setting, value in {"WORDS_PER_GROUP": words, "DEVICE": '"cpu"'}.items():
        source = re.sub(f"^{setting} = .*$", f"{setting} = {value}", source, flags=re.MULTILINE)
    (folder / f"{name}.py").write_text(source, encoding="utf-8")
    for file in ROOT.glob("*.json"):
        shutil.copy(file, folder)
    start, sizes = time.perf_counter(), []
    process = subprocess.Popen([sys.executable, folder / f"{name}.py", family], stdout=subprocess.DEVNULL)
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        sizes += re.findall(r"RssAnon:\s*(\d+) kB", status.read_text() if status.exists() else "")
        time.sleep(0.05)
    if process.returncode:
        sys.exit(f"{name}.py ended with exit code {process.returncode}")
    return time.perf_counter() - start, max(map(int, sizes), default=float("nan")) * 1024 / 1e9


def print_table(*rows: tuple) -> None:
    """Prints a Markdown table; the first row is its head."""
    for row in (rows[0], ["---", *["---:"] * (len(rows[0]) - 1)], *rows[1:]):
        print("|", " | ".join(f"{cell:,.1f}" if isinstance(cell, float) else str(cell) for cell in row), "|")
    print(flush=True)


def count_prefixes(texts: list[Text]) -> int:
    return len({sequence[: end + 1] for _, sequence in texts for end in range(len(sequence))})


def measure_engine(script: ModuleType, folder: Path, words: list[Text]) -> tuple[float, float, float]:
    """Measures machine and engine on one checkpoint.

    Returns the limits, seconds to read and to multiply a prefix; and by how much more all parameters are than those of
    the linear layers.
    """
    gigabytes = sum(file.stat().st_size for file in script.weight_files(folder)) / 1e9
    forget([folder])
    disk, cache = (gigabytes / seconds_for(script.read_ahead, [folder]) for _ in range(2))
    start = time.perf_counter()
    model = script.build_model(folder, torch.device("cpu"))
    script.load_weights(model, folder)
    first_loading = time.perf_counter() - start
    loading = seconds_for(script.load_weights, model, folder)
    texts, sequences = zip(*words, strict=True)
    trees = script.prefix_trees(sequences, torch.device("cpu"))
    layers = [layer for layer in model.layers.modules() if isinstance(layer, torch.nn.Linear)]
    before = linear_seconds(layers, script.BATCH_TOKENS)
    with patch.object(script, "load_weights"), tqdm(disable=True) as progress:  # they are loaded
        walks = (script.unit_states(model, [folder], trees, texts, progress) for _ in range(2))
        passes = min(seconds_for(deque, walk, 0) for walk in walks)
    best = map(min, before, linear_seconds(layers, script.BATCH_TOKENS))
    per_prefix = 2e-9 * sum(layer.weight.numel() for layer in layers)  # GFLOP
    default_rate, rate = (per_prefix * script.BATCH_TOKENS / seconds for seconds in best)
    count = count_prefixes(words)
    reading, multiplying, by_default = gigabytes / disk, per_prefix * count / rate, per_prefix * count / default_rate
    source = "from disk" if disk < cache / 1.5 else "from the cache"
    print_table(
        (f"a checkpoint, {len(words)} words", ""),
        ("matrix rate: oneDNN, as in the scripts; torch's default", f"{rate:.0f}; {default_rate:.0f} GFLOP/s"),
        (f"weights, read {source} (again, from the cache)", f"{gigabytes:.2f} GB, {disk:.2f} ({cache:.2f}) GB/s"),
        ("distinct prefixes; nodes computed", f"{count}; {sum(inputs['input_ids'].numel() for inputs, _ in trees)}"),
        ("limit to read; to multiply", f"{reading:.2f} s; {multiplying:.2f} s"),
        ("loading the first; any other (from the cache)", f"{first_loading:.2f} s; {loading:.2f} s"),
        (f"passes, in {len(trees)} batches", f"{passes:.2f} s, {1000 * passes / len(words):.1f} ms a word"),
        ("share of these rates that the passes reach", f"{multiplying / passes:.0%}; {by_default / passes:.0%}"),
        ("loading and passes over the limit", f"{(loading + passes) / max(reading, multiplying):.2f}"),
    )
    elements = sum(tensor.numel() for tensor in script.read_weights(folder).values())
    return reading, multiplying / count, 2e-9 * elements / per_prefix


def measure(folders: list[Path], words_per_group: int, peers: str, scratch: Path) -> None:
    """Measures the machine, the engine, both scripts and the other ways."""
    script, sibling = map(importlib.import_module, SCRIPTS)
    script.WORDS_PER_GROUP = words_per_group
    final = folders[-1]
    config, tokenizer = script.read_final(final)
    _, texts, sequences, _ = script.draw_words(script.read_words(), tokenizer, config)
    words = list(zip(texts, sequences, strict=True))
    variants, _ = sibling.choose_variants(sibling.read_contexts(tokenizer, config), tokenizer)
    texts = sorted({text for lists in variants.values() for texts in lists for text in texts})
    sentences = list(zip(texts, sibling.encode(tokenizer, texts), strict=True))
    reading, multiplying, more = measure_engine(script, final, words)

    limits = ("over the limit", "with all parameters")
    rows = [("end to end", "texts", "prefixes", "seconds", *limits, "naive loop, s*", "ratio", "peak GB")]
    for name, texts in zip(SCRIPTS, (words, sentences), strict=True):
        (scratch / name).write_text(json.dumps(texts), encoding="utf-8")
        naive = time_way_apart(sys.executable, "naive", final, scratch / name)
        forget(folders)
        seconds, peak = run_script(name, scratch, final.parent, words_per_group)
        count = count_prefixes(texts)
        limits = (len(folders) * max(reading, multiplying * factor * count) for factor in (1, more))
        whole = len(folders) * sum(naive)
        row = (f"{name}.py", len(texts), count, seconds, *(f"{seconds / limit:.2f}" for limit in limits), whole)
        rows.append((*row, whole / seconds, f"{peak:.2f}"))
        if texts is words:
            script_seconds = seconds
            ways = {"one at a time, GPTNeoXForCausalLM": naive}
    print_table(*rows)
    ways |= {name: time_way_apart(peers, name, final, scratch / SCRIPTS[0]) for name in ("TransformerLens", "minicons")}
    rows = [("the same words", "loading, s", "passes, s*", "ms a word", "all checkpoints, s*", "over the script")]
    for name, seconds in ways.items():
        if isinstance(seconds, str):
            rows.append((name, seconds, "", "", "", ""))
        else:
            whole = len(folders) * sum(seconds)
            rows.append((name, *seconds, 1000 * seconds[1] / len(words), whole, whole / script_seconds))
    print_table(*rows)
    print(f"* extrapolated from {SAMPLE_SECONDS} s, where everything takes longer")


def measure_growth(folders: list[Path], scratch: Path) -> None:
    """Measures the first experiment with more and more words of the list."""
    script = importlib.import_module(SCRIPTS[0])
    rows = [("words a group", "words", "distinct prefixes", "seconds", "peak GB")]
    final = folders[-1]
    config, tokenizer = script.read_final(final)
    for script.WORDS_PER_GROUP in GROWTH:
        _, texts, sequences, _ = script.draw_words(script.read_words(), tokenizer, config)
        seconds, peak = run_script(SCRIPTS[0], scratch, final.parent, script.WORDS_PER_GROUP)
        count = count_prefixes(list(zip(texts, sequences, strict=True)))
        rows.append((script.WORDS_PER_GROUP or "all", len(texts), count, seconds, f"{peak:.2f}"))
    print_table(*rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="70m", help="shape of the model [%(default)s]")
    parser.add_argument("--words", type=int, default=500, help="words a group [%(default)s]")
    parser.add_argument("--checkpoints", type=int, default=2, help="checkpoints of the family [%(default)s]")
    parser.add_argument("--peers", default=sys.executable, help="interpreter that has the peers [this one]")
    parser.add_argument("--growth", action="store_true", help="measure how cost grows with the number of words")
    parser.add_argument("--peer", nargs=3, metavar=("NAME", "FOLDER", "TEXTS"), help="time one way, here")
    arguments = parser.parse_args()
    if arguments.peer:
        print(json.dumps(time_way(*arguments.peer)))
        return
    sys.path.insert(0, str(ROOT))
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    print(f"Pythia-{arguments.shape} shape, random float16 weights, float32; {[*models, platform.processor()][0]},")
    print(f"{os.cpu_count()} cores, torch {torch.__version__} with {torch.get_num_threads()} threads\n", flush=True)
    with tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
        scratch = Path(folder)
        folders = make_family(scratch / f"random_{arguments.shape}", SHAPES[arguments.shape], arguments.checkpoints)
        if arguments.growth:
            measure_growth(folders, scratch)
        else:
            measure(folders, arguments.words, arguments.peers, scratch)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()

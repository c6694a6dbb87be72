"""Measures both experiments against what the machine allows, and against other ways to the same hidden states.

Run as `python tests/benchmark.py [--shape 70m|1b] [--words N] [--peers PYTHON]`, on a machine that does nothing
else. It computes on the CPU in float32, on two checkpoints of random float16 weights in a temporary folder (4.1 GB
for 1b), and prints Markdown tables. PYTHON is the interpreter of an environment made from
tests/benchmark_requirements.txt, in which TransformerLens and minicons run.

The limit for a checkpoint is the longer of reading its weights and multiplying its matrices:
    max(bytes / bandwidth, 2 x parameters of the blocks x distinct prefixes / matrix rate).
The matrix rate is measured on the model's own linear layers one after the other, at BATCH_TOKENS tokens. Rates and
the engine's passes are the best of several, all else is timed once; the naive loop and the peers run for SAMPLE_SECONDS
on words in random order, and their time for all words follows in proportion.
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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import torch
import transformers
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

# ------------------------------------------------------------------------------
SHAPES = {
    "70m": {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 2048},
    "1b": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 8, "intermediate_size": 8192},
}
STEPS = (0, 1000)  # of the two checkpoints
SAMPLE_SECONDS = 30  # for the naive loop and each peer, which finish earlier if they have done all words
PEER_BATCH = 64  # words in a batch of a peer
ROUNDS = 3  # of the matrix rate, before the engine's passes and once more after them
# ------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("token_convergence_analysis", "multitoken_context_perturbation")
Text = tuple[str, tuple[int, ...]]  # a text as the model reads it, without and with its token ids


def make_family(family: Path, shape: dict) -> list[Path]:
    """Writes checkpoints of random float16 weights as Pythia's are published."""
    from miniature import save_checkpoint  # here, since the peers' interpreter lacks what it imports

    config = GPTNeoXConfig(
        vocab_size=50_304, rotary_pct=0.25, max_position_embeddings=2048, bos_token_id=0, eos_token_id=0, **shape
    )
    with torch.device("meta"):
        model = GPTNeoXForCausalLM(config).half()
    model.to_empty(device="cpu")
    token = "<|endoftext|>"
    tokenizer = {"tokenizer_class": "GPTNeoXTokenizer", "bos_token": token, "eos_token": token, "unk_token": token}
    folders = [family / f"step{step}" for step in STEPS]
    for folder in folders:
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.02)
            else:
                parameter.fill_(float(name.endswith("norm.weight")))
        save_checkpoint(model, folder)
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folders


def forget(folders: list[Path]) -> None:
    """Drops the files of checkpoints from the system's cache, where it lets a user do so, as Linux does."""
    if hasattr(os, "posix_fadvise"):
        for file in (file for folder in folders for file in folder.iterdir()):
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_bandwidths(script: ModuleType, folder: Path) -> tuple[float, float]:
    """Bytes a second at which the script reads weights from disk, and from the system's cache."""
    size = sum(file.stat().st_size for file in script.weight_files(folder))
    forget([folder])
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        script.read_ahead([folder])
        seconds.append(time.perf_counter() - start)
    return size / seconds[0], size / seconds[1]


def linear_layers(model: transformers.GPTNeoXModel) -> list[torch.nn.Linear]:
    return [layer for layer in model.layers.modules() if isinstance(layer, torch.nn.Linear)]


def linear_seconds(model: transformers.GPTNeoXModel, tokens: int) -> tuple[float, float]:
    """Seconds for all linear layers of the model, each once: as torch multiplies by default, and as the script does."""
    layers = linear_layers(model)
    inputs = {width: torch.randn(1, tokens, width) for width in {layer.in_features for layer in layers}}
    best = [float("inf")] * 2
    for _ in range(ROUNDS):
        for way, multiply in enumerate((torch.nn.Linear.forward, torch.nn.Linear.__call__)):
            start = time.perf_counter()
            for layer in layers:
                multiply(layer, inputs[layer.in_features])
            best[way] = min(best[way], time.perf_counter() - start)
    return best[0], best[1]


def passes_seconds(script: ModuleType, model: torch.nn.Module, folder: Path, trees: list, texts: list[str]) -> float:
    """Seconds for the forward passes of one checkpoint, its weights being loaded."""
    start = time.perf_counter()
    with patch.object(script, "load_weights"), tqdm(disable=True) as progress:
        for _ in script.unit_states(model, [folder], trees, texts, progress):
            pass
    return time.perf_counter() - start


def sampled(batches: Iterable[tuple[int, object]], run: Callable[[object], None], words: int) -> float:
    """Seconds that `run` would take for all words, from as many of the (words, batch) pairs as the time allows."""
    done, start = 0, time.perf_counter()
    for size, batch in batches:
        run(batch)
        done += size
        if time.perf_counter() - start > SAMPLE_SECONDS:
            break
    return (time.perf_counter() - start) / done * words


def naive_loop(folder: Path, texts: list[Text]) -> tuple[float, float]:
    """Seconds to load a checkpoint, and for its passes: one text at a time through the causal LM."""
    start = time.perf_counter()
    model = GPTNeoXForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    loading = time.perf_counter() - start

    def run(sequence: tuple[int, ...]) -> None:
        states = model(input_ids=torch.tensor([sequence]), output_hidden_states=True).hidden_states
        torch.stack([layer[0, -1] for layer in states])

    run(texts[0][1])
    return loading, sampled(((1, sequence) for _, sequence in texts), run, len(texts))


def transformer_lens(folder: Path, texts: list[Text]) -> tuple[float, float]:
    """The same through TransformerLens: words of equal length in a batch, the residual stream alone cached."""
    from transformer_lens.model_bridge import TransformerBridge

    start = time.perf_counter()
    model = TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=torch.float32)
    loading = time.perf_counter() - start

    def run(batch: list[Text]) -> None:
        tokens = torch.tensor([sequence for _, sequence in batch])
        wanted = ("hook_resid_pre", "ln_final.hook_out")
        _, cache = model.run_with_cache(tokens, return_type=None, names_filter=lambda name: name.endswith(wanted))
        torch.stack([cache[name][:, -1] for name in cache])

    batches = []
    for length in {len(sequence) for _, sequence in texts}:
        batches += in_batches([text for text in texts if len(text[1]) == length])
    random.Random(0).shuffle(batches)
    run(batches[0][1])
    return loading, sampled(batches, run, len(texts))


def minicons(folder: Path, texts: list[Text]) -> tuple[float, float]:
    """The same through minicons: padded batches."""
    from minicons.cwe import CWE

    start = time.perf_counter()
    model = CWE(str(folder), dtype=torch.float32)
    loading = time.perf_counter() - start

    def run(batch: list[Text]) -> None:
        spans = [("<|endoftext|>" + text, (len("<|endoftext|> "), len("<|endoftext|>" + text))) for text, _ in batch]
        model.extract_representation(spans, layer="all")

    batches = list(in_batches(texts))
    run(batches[0][1])
    return loading, sampled(batches, run, len(texts))


def in_batches(texts: list[Text]) -> Iterator[tuple[int, list[Text]]]:
    for start in range(0, len(texts), PEER_BATCH):
        batch = texts[start : start + PEER_BATCH]
        yield len(batch), batch


PEERS = {"TransformerLens": transformer_lens, "minicons": minicons}


def run_peer(python: str, name: str, folder: Path, words_file: Path) -> tuple[float, float] | str:
    """Seconds that a peer takes to load and for its passes, measured by another interpreter; or why it did not run."""
    command = [python, __file__, "--peer", name, str(folder), str(words_file)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    if process.returncode:
        return (process.stderr.strip() or f"exit code {process.returncode}").splitlines()[-1]
    loading, passes = json.loads(process.stdout.splitlines()[-1])
    return loading, passes


def copy_script(name: str, folder: Path, **settings: object) -> Path:
    """Copies a script with other settings and its input files."""
    source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    for setting, value in settings.items():
        source = re.sub(f"^{setting} = .*$", f"{setting} = {value!r}", source, flags=re.MULTILINE)
    for file in ROOT.glob("*.json"):
        shutil.copy(file, folder)
    (folder / f"{name}.py").write_text(source, encoding="utf-8")
    return folder / f"{name}.py"


def run_script(script: Path, family: Path) -> tuple[float, float]:
    """Seconds and peak anonymous memory (bytes; not a number where there is no /proc) of a script as a process."""
    start, peak = time.perf_counter(), float("nan")
    process = subprocess.Popen([sys.executable, script, family], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        match = re.search(r"RssAnon:\s*(\d+) kB", status.read_text() if status.exists() else "")
        if match:
            peak = max(int(match[1]) * 1024, 0 if peak != peak else peak)
        time.sleep(0.05)
    seconds = time.perf_counter() - start
    if process.returncode:
        sys.exit(f"{script.name} ended with exit code {process.returncode}")
    return seconds, peak


def distinct_prefixes(sequences: list[tuple[int, ...]]) -> int:
    return len({sequence[:length] for sequence in sequences for length in range(1, len(sequence) + 1)})


def processor() -> str:
    """The processor's name, where the system tells it."""
    if sys.platform == "darwin":
        return subprocess.check_output(["sysctl", "-n", "machdep.cpu.brand_string"], text=True).strip()
    file = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*: (.*)", file.read_text() if file.exists() else "")
    return match[1] if match else platform.processor()


def sentences_of(sibling: ModuleType, tokenizer: Tokenizer, config: GPTNeoXConfig) -> list[Text]:
    """The distinct sentences that the second script reads."""
    variants, _ = sibling.choose_variants(sibling.read_contexts(tokenizer, config), tokenizer)
    texts = sorted({text for lists in variants.values() for texts in lists for text in texts})
    return list(zip(texts, sibling.encode(tokenizer, texts), strict=True))


def print_table(*rows: tuple) -> None:
    """Prints a Markdown table; the first row is its head."""
    for row in (rows[0], ["---", *["---:"] * (len(rows[0]) - 1)], *rows[1:]):
        print("|", " | ".join(f"{cell:,.1f}" if isinstance(cell, float) else str(cell) for cell in row), "|")
    print(flush=True)


def measure(shape: str, words: int, peers: str, scratch: Path) -> None:
    """Measures everything, and prints each table as soon as it is known."""
    sys.path.insert(0, str(ROOT))
    script, sibling = (importlib.import_module(name) for name in SCRIPTS)
    script.WORDS_PER_GROUP = words
    family = scratch / f"random_{shape}"
    folders = make_family(family, SHAPES[shape])
    *_, final = folders
    disk, cache = read_bandwidths(script, final)
    config, tokenizer = script.read_final(final)
    _, texts, sequences, _ = script.draw_words(script.read_words(), tokenizer, config)
    samples = [list(zip(texts, sequences, strict=True)), sentences_of(sibling, tokenizer, config)]
    prefixes = [distinct_prefixes([sequence for _, sequence in sample]) for sample in samples]
    for sample in samples:
        random.Random(0).shuffle(sample)
    print(f"Pythia-{shape} shape, random weights, float32; {processor()}, {os.cpu_count()} cores,", end=" ")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")

    device = torch.device("cpu")
    trees = script.prefix_trees(sequences, device)
    start = time.perf_counter()
    model = script.build_model(final, device)
    script.load_weights(model, final)
    first_loading = time.perf_counter() - start
    start = time.perf_counter()
    script.load_weights(model, final)
    loading = time.perf_counter() - start
    before = linear_seconds(model, script.BATCH_TOKENS)
    passes = min(passes_seconds(script, model, final, trees, texts) for _ in range(2))
    multiplying = map(min, before, linear_seconds(model, script.BATCH_TOKENS))
    operations = 2 * sum(layer.weight.numel() for layer in linear_layers(model))
    default_rate, rate = (operations * script.BATCH_TOKENS / seconds for seconds in multiplying)
    size = sum(file.stat().st_size for file in script.weight_files(final))
    limits = [max(size / disk, operations * count / rate) for count in prefixes]
    nodes = sum(tree["input_ids"].numel() for tree in trees)
    share, default_share = (operations * prefixes[0] / by / passes for by in (rate, default_rate))
    from_disk = "from disk" if disk < cache / 1.5 else "from the cache"
    print_table(
        ("the machine and the engine", ""),
        ("float32 matrix rate as torch multiplies by default", f"{default_rate / 1e9:.0f} GFLOP/s"),
        ("float32 matrix rate through oneDNN, as the scripts multiply", f"{rate / 1e9:.0f} GFLOP/s"),
        (f"reading weights {from_disk} (again, from the cache)", f"{disk / 1e9:.2f} ({cache / 1e9:.2f}) GB/s"),
        ("words; their distinct prefixes; nodes computed", f"{len(texts):,}; {prefixes[0]:,}; {nodes:,}"),
        ("limit for a checkpoint: reading", f"{size / 1e9:.2f} GB, {size / disk:.1f} s"),
        (
            "limit for a checkpoint: multiplying",
            f"{operations * prefixes[0] / 1e12:.2f} TFLOP, {operations * prefixes[0] / rate:.1f} s",
        ),
        ("loading the first checkpoint (another)", f"{first_loading:.1f} ({loading:.1f}) s"),
        (f"passes of a checkpoint, in {len(trees)} batches", f"{passes:.1f} s"),
        ("passes, share of the oneDNN rate (of torch's default rate)", f"{share:.0%} ({default_share:.0%})"),
    )
    del model

    loops = [naive_loop(final, sample) for sample in samples]
    words_file = scratch / "words.json"
    words_file.write_text(json.dumps(samples[0]), encoding="utf-8")
    ways = {"one word at a time, GPTNeoXForCausalLM": loops[0]}
    ways |= {name: run_peer(peers, name, final, words_file) for name in PEERS}
    runs = []
    for name in SCRIPTS:
        copy = copy_script(name, scratch, WORDS_PER_GROUP=words, DEVICE="cpu")
        forget(folders)
        runs.append(run_script(copy, family))
    rows = []
    for name, seconds in ways.items():
        if isinstance(seconds, str):
            rows.append((name, f"not run: {seconds}", "", "", "", ""))
            continue
        both = len(folders) * sum(seconds)
        rows.append((name, *seconds, 1000 * seconds[1] / len(texts), both, both / runs[0][0]))
    rows.append(("this engine", loading, passes, 1000 * passes / len(texts), "", ""))
    rows.append((f"{SCRIPTS[0]}.py, end to end", "", "", "", runs[0][0], 1.0))
    head = ("the same words", "loading, s", "passes, s", "ms a word", f"{len(folders)} checkpoints, s", "ratio")
    print_table(head, *rows)

    head = ("end to end, as a process", "texts", "distinct prefixes", "seconds", "over the limit", "naive loop, s")
    rows = [(*head, "naive loop / script", "peak anonymous memory, GB")]
    for name, sample, count, limit, loop, (seconds, peak) in zip(
        SCRIPTS, samples, prefixes, limits, loops, runs, strict=True
    ):
        naive = len(folders) * sum(loop)
        over = f"{seconds / len(folders) / limit:.2f}"
        rows.append((name, len(sample), count, seconds, over, naive, naive / seconds, f"{peak / 1e9:.2f}"))
    print_table(*rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="70m", help="shape of the model [%(default)s]")
    parser.add_argument("--words", type=int, default=500, help="words a group [%(default)s]")
    parser.add_argument("--peers", default=sys.executable, help="interpreter that has the peers [this one]")
    parser.add_argument("--peer", nargs=3, metavar=("NAME", "FOLDER", "WORDS_FILE"), help="measure one peer, here")
    arguments = parser.parse_args()
    if arguments.peer:
        name, folder, words_file = arguments.peer
        print(json.dumps(PEERS[name](Path(folder), json.loads(Path(words_file).read_text()))))
        return
    with tempfile.TemporaryDirectory(prefix="benchmark_") as scratch:
        measure(arguments.shape, arguments.words, arguments.peers, Path(scratch))


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    main()

"""Measures both experiments against what the machine allows, and against other ways to the same hidden states.

Run on a machine that does nothing else:
    python tests/benchmark.py [--shape 70m|1b|6.9b|12b] [--layers N] [--words N] [--checkpoints N] [--peers PYTHON]
    python tests/benchmark.py --kinds     measures what each kind of text adds to the first experiment
    python tests/benchmark.py --growth    measures how its seconds and memory grow with the number of words
All is computed in float32 on the CPU, from checkpoints of random float16 weights, stored as Pythia's are published, in
the temporary folder: 0.14 GB each for 70m, 2.0 GB for 1b (set TMPDIR if that folder is not on a disk). --words are
words a group, at most (not with --growth); --layers cuts a shape that does not fit into memory. What is printed:

The machine. The limit for a checkpoint is the longer of reading its weights and multiplying its matrices:
    max(bytes / bandwidth, 2 x weights of the linear layers x distinct prefixes / matrix rate).
The bandwidth is that of reading a checkpoint whose files were dropped from the system's cache (which works on Linux).
The matrix rate is that of the model's own linear layers, one after the other, at 256 tokens, the best of six rounds.
Both are measured before all else and after it (with --growth only before), and the better counts. Embeddings are looked
up and not multiplied, so they are not counted, as they are in the usual 2 x parameters x tokens.

A busy machine. The scripts set OMP_WAIT_POLICY=PASSIVE unless you set it, so that threads do not spin while they wait.
With one of two cores busy elsewhere, the first experiment on the miniature took 19 s, without it 35; on an idle machine
19 and 15; at 70m's shape, two checkpoints, 22 and 29 when busy, 16.2 and 15.5 when idle; at 1B's shape, 200 words a
group, one kind, 72 and 86 when busy, and the same when idle.

Like with like: the hidden states alone, in every layer, of the words of kind `word`, for one checkpoint, each way in a
process of its own. `engine` is the scripts': all words packed into prefix trees and passed, again and again. `naive` is
one word at a time through GPTNeoXForCausalLM. TransformerLens (the residual stream only) and minicons (the mean over
the tokens of a word) take batches of 64 words of equal length, in PYTHON, an interpreter that has
tests/benchmark_requirements.txt installed. After a batch to warm up each works for SAMPLE_SECONDS, on batches in random
order; what it takes for all words follows from that in proportion.

The scripts, from end to end: each as a process, weights read from disk, with its own settings but for the words, so
with all kinds of text, imports, checks, statistics and figures. Its functions are timed where they are called: first
for one checkpoint, then in seconds of the whole run and shares of its passes. The next checkpoint is read while one is
passed, which takes time from the passes, so their best is given beside their mean. Memory is the peak of what belongs
to no file (RssAnon, on Linux, looked at every 50 ms): mapped weights do not count, nor do the stores of hidden states.

--kinds passes each choice of kinds through the engine, as above. --growth runs the first script with more and more
words a group, of all kinds, not matched in frequency since too few words can be, and prints beside its seconds
    START + checkpoints x (LOADING x GB + EFFORT x billions of linear weights x prefixes / matrix rate).
Measured on two cores of an AMD EPYC at 213 to 215 GFLOP/s, and what the formula says, which was fitted to 1b's runs:

    shape            checkpoints   texts   prefixes   seconds   formula   peak GB
    1b                         2     660      1,372        43        44      4.15
    1b                         2   2,750      5,306       112       115      4.21
    1b                         2   9,842     16,605       336       320      4.31
    1b                         2  17,842     27,642       550       520      4.29
    1b                         3   5,500      9,996       297       290      4.26
    1b, second script          3   2,835     22,743       591       634      4.23
    12b, 10 layers             2     660      1,372       124       125     14.25
    12b, 10 layers             2   2,750      5,306       384       403     14.35
"""

import argparse
import gc
import importlib
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from threading import Thread
from typing import NamedTuple
from unittest.mock import patch

import torch
from tqdm import tqdm
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

# ------------------------------------------------------------------------------
SHAPES = {
    "70m": {"num_hidden_layers": 6, "hidden_size": 512, "num_attention_heads": 8, "vocab_size": 50_304},
    "1b": {"num_hidden_layers": 16, "hidden_size": 2048, "num_attention_heads": 8, "vocab_size": 50_304},
    "6.9b": {"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "vocab_size": 50_432},
    "12b": {"num_hidden_layers": 36, "hidden_size": 5120, "num_attention_heads": 40, "vocab_size": 50_688},
}
SAMPLE_SECONDS = 25  # for each way, which ends earlier if it has done all words
PEER_BATCH = 64  # words in a batch of a peer
KINDS = (("word",), ("word", "recombined"), ("word", "carried"), ("word", "recombined", "carried"))
GROWTH = (60, 250, 1000, 2000)  # words a group, at most
START, LOADING, EFFORT = 15, 1, 2.4  # of the formula: seconds; seconds a GB; operations for a weight and a prefix
# ------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("token_convergence_analysis", "multitoken_context_perturbation")
BOS = "<|endoftext|>"
TIMED = (  # functions of either script
    *("read_unit_states", "load_weights", "contribution_of", "read_family", "choose_curves", "choose_entries"),
    *("prefix_trees", "build_model", "make_store", "tabulate", "find_contrasts", "write_tables", "draw_figures"),
)
Text = tuple[str, tuple[int, ...]]  # a text as the model reads it, and its token ids with <|endoftext|>


class Machine(NamedTuple):
    checkpoint_gb: float
    disk_gb_s: float
    cache_gb_s: float  # when it is read again
    linear_weights_billion: float
    default_gflop_s: float  # of their products, by torch's default
    onednn_gflop_s: float  # as in the scripts


def make_family(family: Path, shape: dict[str, int], checkpoints: int) -> list[Path]:
    """Writes checkpoints of random float16 weights as Pythia's are published."""
    from miniature import save_checkpoint  # not at the top, since the peers' interpreter lacks what it imports

    more = {"intermediate_size": 4 * shape["hidden_size"], "rotary_pct": 0.25, "bos_token_id": 0, "eos_token_id": 0}
    config = GPTNeoXConfig(**shape, **more)
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


def measure_machine(folder: Path) -> Machine:
    """Measures how fast the machine reads a checkpoint and multiplies its matrices."""
    script = importlib.import_module(SCRIPTS[0])
    gigabytes = sum(file.stat().st_size for file in script.weight_files(folder)) / 1e9
    forget([folder])
    speeds = [gigabytes / seconds_for(script.read_ahead, folder) for _ in range(2)]
    model = script.build_model(script.read_config(folder), torch.device("cpu"))
    script.load_weights(model, script.read_weights(folder))
    layers = [layer for layer in model.layers.modules() if isinstance(layer, torch.nn.Linear)]
    weights = sum(layer.weight.numel() for layer in layers) / 1e9
    inputs = {layer.in_features: torch.randn(1, 256, layer.in_features) for layer in layers}

    def multiply_all(multiply: Callable) -> None:
        for layer in layers:
            multiply(layer, inputs[layer.in_features])

    ways = (torch.nn.Linear.forward, torch.nn.Linear.__call__)  # the scripts replace the layers' own forward
    rates = [2 * weights * 256 / min(seconds_for(multiply_all, way) for _ in range(6)) for way in ways]
    return Machine(gigabytes, *speeds, weights, *rates)


def engine(folder: str) -> Callable[[list[Text]], object]:
    """Loads the scripts' model. Returns a function that runs it on all texts."""
    script = importlib.import_module(SCRIPTS[0])
    config, device = script.read_config(Path(folder)), torch.device("cpu")
    model = script.build_model(config, device)
    script.load_weights(model, script.read_weights(Path(folder)))

    def run(batch: list[Text]) -> None:
        names, sequences = [text for text, _ in batch], [tuple(ids) for _, ids in batch]  # from JSON they are lists
        store = torch.empty(config.num_hidden_layers + 1, len(batch), config.hidden_size)
        trees = script.prefix_trees(sequences, device)
        with patch.object(script, "load_weights"), tqdm(disable=True) as progress:  # they are loaded
            script.read_unit_states(model, [Path(folder)], trees, names, store, progress)

    return run


def naive_loop(folder: str) -> Callable[[list[Text]], object]:
    """Loads the causal LM. Returns a function that runs it on a batch, here of one word."""
    model = GPTNeoXForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return lambda batch: model(input_ids=torch.tensor([ids for _, ids in batch]), output_hidden_states=True)


def transformer_lens(folder: str) -> Callable[[list[Text]], object]:
    from transformer_lens.model_bridge import TransformerBridge

    model = TransformerBridge.boot_transformers(folder, device="cpu", dtype=torch.float32)
    kept = {"names_filter": lambda name: name.endswith(("hook_resid_pre", "ln_final.hook_out"))}
    return lambda batch: model.run_with_cache(torch.tensor([ids for _, ids in batch]), return_type=None, **kept)


def minicons(folder: str) -> Callable[[list[Text]], object]:
    from minicons.cwe import CWE

    model = CWE(folder, dtype=torch.float32)

    def run(batch: list[Text]) -> object:
        spans = [(BOS + text, (len(BOS) + 1, len(BOS + text))) for text, _ in batch]  # of the word, without its space
        return model.extract_representation(spans, layer="all")

    return run


WAYS = {"engine": engine, "naive": naive_loop, "TransformerLens": transformer_lens, "minicons": minicons}


def time_way(name: str, folder: str, texts: list[Text]) -> list:
    """Seconds that one of WAYS takes to load a checkpoint, and for all texts; or why it did not."""
    start = time.perf_counter()
    try:
        run = WAYS[name](folder)
    except Exception as error:  # it is not installed, or cannot read the checkpoint
        return [f"not run: {error}", ""]
    loading = time.perf_counter() - start
    size = 1 if name == "naive" else PEER_BATCH
    batches = []
    for length in {len(ids) for _, ids in texts}:
        alike = [text for text in texts if len(text[1]) == length]
        batches += [alike[first : first + size] for first in range(0, len(alike), size)]
    random.Random(0).shuffle(batches)
    if name == "engine":  # it makes its own batches
        batches = [texts] * 100
    run(batches[0])
    done, start = 0, time.perf_counter()
    for batch in batches:
        run(batch)
        done += len(batch)
        if time.perf_counter() - start > SAMPLE_SECONDS:
            break
    return [loading, (time.perf_counter() - start) / done * len(texts)]


def run_script(name: str, family: str, settings: dict) -> tuple[dict, dict, float]:
    """Runs a script with other settings.

    Returns the seconds of each call of its functions, what it computed, and its peak memory in GB (0 without /proc).
    """
    script = importlib.import_module(name)
    times, counts, sizes = defaultdict(list), {}, ["0"]

    def watch() -> None:
        while (status := Path("/proc/self/status")).exists():
            sizes.extend(re.findall(r"RssAnon:\s*(\d+) kB", status.read_text()))
            time.sleep(0.05)

    def timed(function: Callable) -> Callable:
        @wraps(function)
        def wrapper(*arguments: object, **options: object) -> object:
            start = time.perf_counter()
            result = function(*arguments, **options)
            if not options:  # load_weights with assign only checks, and is a part of read_family
                times[function.__name__].append(time.perf_counter() - start)
            if function.__name__ == "prefix_trees":
                nodes = sum(tree.inputs["input_ids"].numel() for tree in result)
                counts.update(texts=len(arguments[0]), prefixes=count_prefixes(arguments[0]), nodes=nodes)
            return result

        return wrapper

    for function in TIMED:
        if hasattr(script, function):
            setattr(script, function, timed(getattr(script, function)))
    for setting, value in settings.items():
        setattr(script, setting, value)
    sys.argv[1:] = [family]
    Thread(target=watch, daemon=True).start()
    with torch.inference_mode():
        script.main()
    return times, counts, max(map(int, sizes)) * 1024 / 1e9


def call_apart(function: Callable, name: str, *arguments: object, python: str = sys.executable) -> list:
    """Calls a function in a process of its own. Returns the seconds of that, and what the function returned."""
    gc.collect()  # the model that measure_machine built refers to itself, and would stay in memory
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    if name in ("engine", *SCRIPTS):
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the scripts set it before they import torch
    how = {"env": environment, "input": json.dumps([function.__name__, name, *arguments]), "text": True, "check": True}
    start = time.perf_counter()
    process = subprocess.run([python, __file__, "--call"], stdout=subprocess.PIPE, **how)
    return [time.perf_counter() - start, *json.loads(process.stdout.splitlines()[-1])]


def run_apart(name: str, folders: list[Path], **settings: object) -> list:
    """The same with run_script, weights read from disk."""
    family = folders[0].parent
    settings |= {"DEVICE": "cpu", "RESULTS_DIR": tempfile.mkdtemp(dir=family.parent)}
    forget(folders)
    return call_apart(run_script, name, str(family), settings)


def choose_texts(folder: Path, **settings: object) -> list[Text]:
    """The texts of the first script with these settings."""
    script = importlib.import_module(SCRIPTS[0])
    _, tokenizer, _ = script.read_family({0: folder})
    with patch.multiple(script, **settings):
        curves = script.choose_curves(script.read_words(), tokenizer)
    bos = tokenizer.token_to_id(BOS)
    return [(" " + text.word, (bos, *text.token_ids)) for curve in curves for text in curve.texts]


def count_prefixes(sequences: list[tuple[int, ...]]) -> int:
    return len({sequence[: end + 1] for sequence in sequences for end in range(len(sequence))})


def print_table(*rows: tuple) -> None:
    """Prints a Markdown table; the first row is its head."""
    for row in (rows[0], ["---", *["---:"] * (len(rows[0]) - 1)], *rows[1:]):
        print("|", " | ".join(f"{cell:,.2f}" if isinstance(cell, float) else str(cell) for cell in row), "|")
    print(flush=True)


def describe(machine: Machine, seconds: float, times: dict, counts: dict, peak: float) -> dict[str, str]:
    """What a run of a script took: a checkpoint, and from end to end."""
    loadings = times["load_weights"]
    passes = [both - loading for both, loading in zip(times["read_unit_states"], loadings, strict=True)]
    best, mean, loading = min(passes), sum(passes) / len(passes), sum(loadings[1:]) / len(loadings[1:])
    reading = machine.checkpoint_gb / machine.disk_gb_s
    multiplying = 2 * machine.linear_weights_billion * counts["prefixes"] / machine.onednn_gflop_s
    limit = max(reading, multiplying)
    lines = {
        "texts; distinct prefixes; nodes computed": "; ".join(map(str, counts.values())),
        "a checkpoint: limit to read; to multiply": f"{reading:.2f} s; {multiplying:.2f} s",
        "loading the first; others": f"{loadings[0]:.2f} s; {loading:.2f} s",
        "passes, mean; best; best per text": f"{mean:.2f} s; {best:.2f} s; {1000 * best / counts['texts']:.2f} ms",
        "share of the matrix rate, mean; best": f"{multiplying / mean:.0%}; {multiplying / best:.0%}",
        "loading and passes over the limit": f"{(loading + mean) / limit:.2f}",
        "end to end: seconds; over the limit": f"{seconds:.1f} s; {seconds / limit / len(passes):.2f}",
        "peak memory": f"{peak:.2f} GB",
    }
    calls = {name: sum(times.get(name, [])) for name in TIMED} | {"read_unit_states": sum(passes)}
    calls["imports and the rest"] = seconds - sum(calls.values())
    return lines | {name: f"{taken:.2f} s; {taken / sum(passes):.1%}" for name, taken in calls.items()}


def measure(folders: list[Path], words: int, peers: str) -> None:
    """Measures the machine, the ways to the hidden states alone, and both scripts."""
    machine = measure_machine(folders[-1])
    texts = choose_texts(folders[-1], WORDS_PER_GROUP=words, KINDS=("word",))
    ways = {}
    for name in WAYS:
        python = peers if name in ("TransformerLens", "minicons") else sys.executable
        _, *ways[name] = call_apart(time_way, name, str(folders[-1]), texts, python=python)
    runs = [run_apart(SCRIPTS[0], folders, WORDS_PER_GROUP=words), run_apart(SCRIPTS[1], folders)]
    machine = Machine(*map(max, machine, measure_machine(folders[-1])))
    print_table(("machine", ""), *((name, f"{value:.3g}") for name, value in machine._asdict().items()))
    rows = [(f"like with like: {len(texts)} words", "loading, s", "passes, s", "passes over the engine's")]
    for name, (loading, passes) in ways.items():
        rows.append((name, loading, passes, passes / ways["engine"][1] if passes else ""))
    print_table(*rows)
    first, second = (describe(machine, *run) for run in runs)
    print_table(("the scripts", *SCRIPTS), *((line, first[line], second[line]) for line in first))


def measure_kinds(folder: Path, words: int) -> None:
    """Measures what each kind of text adds to a checkpoint's passes."""
    rows = [("kinds", "texts", "tokens", "distinct prefixes", "passes, s")]
    for kinds in KINDS:
        texts = choose_texts(folder, WORDS_PER_GROUP=words, KINDS=kinds)
        sequences = [ids for _, ids in texts]
        *_, passes = call_apart(time_way, "engine", str(folder), texts)
        rows.append((", ".join(kinds), len(texts), sum(map(len, sequences)), count_prefixes(sequences), passes))
    print_table(*rows)


def measure_growth(folders: list[Path]) -> None:
    """Measures the first script with more and more words."""
    machine = measure_machine(folders[-1])
    rows = [("words a group", "texts", "distinct prefixes", "seconds", "predicted", "peak GB")]
    for words in GROWTH:
        seconds, _, counts, peak = run_apart(SCRIPTS[0], folders, WORDS_PER_GROUP=words, MATCH_FREQUENCY=False)
        passes = EFFORT * machine.linear_weights_billion * counts["prefixes"] / machine.onednn_gflop_s
        predicted = START + len(folders) * (LOADING * machine.checkpoint_gb + passes)
        rows.append((words, counts["texts"], counts["prefixes"], seconds, predicted, peak))
    print(f"{len(folders)} checkpoints, {machine.onednn_gflop_s:.0f} GFLOP/s")
    print_table(*rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="70m", help="shape of the model [%(default)s]")
    parser.add_argument("--layers", type=int, help="layers of the model [all of the shape]")
    parser.add_argument("--words", type=int, default=500, help="words a group, at most [%(default)s]")
    parser.add_argument("--checkpoints", type=int, default=2, help="of the family, 2 or more [%(default)s]")
    parser.add_argument("--peers", default=sys.executable, help="interpreter that has the peers [this one]")
    parser.add_argument("--kinds", action="store_true", help="measure what each kind of text adds")
    parser.add_argument("--growth", action="store_true", help="measure how cost grows with the number of words")
    parser.add_argument("--call", action="store_true", help=argparse.SUPPRESS)  # what call_apart asks on stdin
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if arguments.call:
        function, *of_function = json.load(sys.stdin)
        print(json.dumps(globals()[function](*of_function)))
        return
    shape = SHAPES[arguments.shape]
    if arguments.layers:
        shape["num_hidden_layers"] = arguments.layers
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    print(f"Pythia-{arguments.shape}'s shape, {shape['num_hidden_layers']} layers, float32;")
    print(f"{[*models, platform.processor()][0]}, {os.cpu_count()} cores;")
    print(f"torch {torch.__version__} with {torch.get_num_threads()} threads\n", flush=True)
    with tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
        folders = make_family(Path(folder) / f"random_{arguments.shape}", shape, arguments.checkpoints)
        if arguments.kinds:
            measure_kinds(folders[-1], arguments.words)
        elif arguments.growth:
            measure_growth(folders)
        else:
            measure(folders, arguments.words, arguments.peers)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()

"""Measures what both experiments cost, on a machine that does nothing else.

    python tests/benchmark.py [--shape 70m|1b] [--words N]  # both scripts from end to end
    python tests/benchmark.py --kinds                       # what each kind of text adds
    python tests/benchmark.py --growth                      # seconds and memory by number of words
    python tests/benchmark.py --peers PYTHON                # the same states by other ways

All is computed in float32 on the CPU, from two checkpoints of random float16 weights as Pythia's
are published, in the temporary folder (2.0 GB each for 1b; set TMPDIR). Each run is a process of
its own. The limit of a checkpoint is that of multiplying its matrices,
    2 x weights of the linear layers x distinct prefixes / matrix rate,
where the rate is that of the model's own linear layers, one after the other, at 256 tokens, the
best of six rounds. Memory is the peak of what belongs to no file (RssAnon, on Linux).

--peers reads the words of kind `word`, all layers, at the last token: one word at a time by
transformers; TransformerLens (the residual stream) and minicons (the mean over a word's tokens) in
batches of 64 words of one length, in PYTHON, an interpreter that has benchmark_requirements.txt.
What each does in SAMPLE_SECONDS is taken in proportion.
"""

import argparse
import importlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from threading import Thread

import torch

# --------------------------------------------------------------------------------------------------
SHAPES = {  # layers, width, heads
    "70m": (6, 512, 8),
    "1b": (16, 2048, 8),
}
KINDS = [("word",), ("word", "alone"), ("word", "recombined"), ("word", "recombined", "alone")]
GROWTH = (60, 250, 1000, 2000)  # words a group, at most
SAMPLE_SECONDS = 25
# --------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("token_convergence_analysis", "multitoken_context_perturbation")
TIMED = ("prepare", "load_model", "read_states", "compare_all", "compare", "draw_figures")


def make_family(family: Path, shape: str) -> Path:
    """Writes two checkpoints of random float16 weights as Pythia's are published."""
    from miniature import save_checkpoint  # not at the top: the peers' interpreter lacks its needs
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    layers, width, heads = SHAPES[shape]
    config = GPTNeoXConfig(
        vocab_size=50_304,
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        rotary_pct=0.25,
    )
    model = GPTNeoXForCausalLM(config)
    for step in (0, 1000):
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.02)
        save_checkpoint(model, family / f"step{step}")
        text = '{"tokenizer_class": "GPTNeoXTokenizer"}'  # for the peers
        (family / f"step{step}" / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return family


def matrix_rate(family: str) -> list[float]:
    """Billions of weights in linear layers, the output layer aside; GFLOP/s of their products."""
    script = importlib.import_module(SCRIPTS[0])
    model, _ = script.load_model(Path(family) / "step0", torch.device("cpu"))
    layers = [layer for layer in model.base_model.modules() if isinstance(layer, torch.nn.Linear)]
    weights = sum(layer.weight.numel() for layer in layers) / 1e9
    inputs = {layer.in_features: torch.randn(1, 256, layer.in_features) for layer in layers}
    linear = torch.ops.mkldnn._linear_pointwise
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        for layer in layers:
            linear(inputs[layer.in_features], layer.weight, layer.bias, "none", [], "")
        seconds.append(time.perf_counter() - start)
    return [weights, 2 * weights * 256 / min(seconds)]


def run_script(name: str, family: str, settings: dict) -> dict:
    """Runs a script with other settings. Returns seconds by function, prefixes and peak memory."""
    script = importlib.import_module(name)
    seconds, counts, sizes = defaultdict(list), {}, [0]

    def watch() -> None:
        while True:
            status = Path("/proc/self/status").read_text(encoding="utf-8")
            sizes.append(int(re.search(r"RssAnon:\s*(\d+) kB", status)[1]))
            time.sleep(0.05)

    def timed(function):
        def wrapper(*arguments):
            start = time.perf_counter()
            result = function(*arguments)
            seconds[function.__name__].append(time.perf_counter() - start)
            return result

        return wrapper

    def count(sequences, batch_tokens):
        trees = prefix_trees(sequences, batch_tokens)
        prefixes = {sequence[:end] for sequence in sequences for end in range(1, len(sequence) + 1)}
        counts.update(texts=len(sequences), prefixes=len(prefixes))
        return trees

    for function in TIMED:
        if hasattr(script, function):
            setattr(script, function, timed(getattr(script, function)))
    prefix_trees, script.prefix_trees = script.prefix_trees, count
    for setting, value in settings.items():
        setattr(script, setting, value)
    sys.argv[1:] = [family]
    if Path("/proc/self/status").exists():
        Thread(target=watch, daemon=True).start()
    with torch.inference_mode():
        script.main()
    return {"seconds": seconds, "peak_gb": max(sizes) * 1024 / 1e9, **counts}


def word_ids(family: str, words: int) -> list:
    """The words of kind `word` with their token ids after <|endoftext|>."""
    script = importlib.import_module(SCRIPTS[0])
    script.KINDS, script.CARRIER, script.WORDS_PER_GROUP = ("word",), "", words
    _, texts, _, start = script.prepare(Path(family))
    return [[text.word, [*start, *text.token_ids]] for text in texts if text.kind == "word"]


def time_peer(name: str, folder: str, texts: list) -> float:
    """Seconds that a way to the hidden states takes for all texts, once its model is loaded."""
    size = 1 if name == "transformers" else 64
    if name == "transformers":
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

        def run(batch):
            model(torch.tensor([ids for _, ids in batch]), output_hidden_states=True)

    elif name == "TransformerLens":
        from transformer_lens.model_bridge import TransformerBridge

        model = TransformerBridge.boot_transformers(folder, device="cpu", dtype=torch.float32)

        def run(batch):
            names = {"names_filter": lambda name: name.endswith(("resid_pre", "ln_final.hook_out"))}
            model.run_with_cache(torch.tensor([ids for _, ids in batch]), return_type=None, **names)

    else:
        from minicons.cwe import CWE

        model, bos = CWE(folder, dtype=torch.float32), "<|endoftext|> "

        def run(batch):
            spans = [(bos + word, (len(bos), len(bos + word))) for word, _ in batch]
            model.extract_representation(spans, layer="all")

    batches = []
    for length in {len(ids) for _, ids in texts}:
        alike = [text for text in texts if len(text[1]) == length]
        batches += [alike[first : first + size] for first in range(0, len(alike), size)]
    random.Random(0).shuffle(batches)
    run(batches[0])
    done, start = 0, time.perf_counter()
    for batch in batches:
        run(batch)
        done += len(batch)
        if time.perf_counter() - start > SAMPLE_SECONDS:
            break
    return (time.perf_counter() - start) / done * len(texts)


def apart(function: str, *arguments, python: str = sys.executable):
    """Calls a function of this file in a process of its own. Returns its seconds and its result."""
    environment = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"} | os.environ
    command = [python, __file__, "--call", json.dumps([function, *arguments])]
    start = time.perf_counter()
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout
    return time.perf_counter() - start, json.loads(output.splitlines()[-1])


def run_apart(name: str, family: Path, **settings) -> dict:
    """Figures of a run: passes and comparison for a checkpoint, from end to end, memory."""
    settings |= {"DEVICE": "cpu", "RESULTS_DIR": tempfile.mkdtemp(dir=family.parent)}
    total, run = apart("run_script", name, str(family), settings)
    sums = {function: sum(calls) for function, calls in run["seconds"].items()}
    compared = sums.get("compare_all", sums["compare"])
    return {
        "texts": run["texts"],
        "prefixes": run["prefixes"],
        "loading, s": sums["load_model"] / 2,
        "passes, s": (sums["read_states"] - sums["load_model"]) / 2,
        "comparison, s": compared / 2,
        "checks and words, s": sums["prepare"],
        "figures, s": sums["draw_figures"],
        "end to end, s": total,
        "peak, GB": run["peak_gb"],
    }


def print_table(rows: list[dict]) -> None:
    """Prints a Markdown table, a column a key."""
    print("|", " | ".join(rows[0]), "|")
    print("|", " | ".join(["---:"] * len(rows[0])), "|")
    for row in rows:
        cells = [f"{cell:,.2f}" if isinstance(cell, float) else str(cell) for cell in row.values()]
        print("|", " | ".join(cells), "|")
    print(flush=True)


def main() -> None:
    description = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(**description)
    parser.add_argument("--shape", choices=SHAPES, default="70m")
    parser.add_argument("--words", type=int, default=500, help="words a group, at most")
    parser.add_argument("--kinds", action="store_true")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--peers", metavar="PYTHON")
    parser.add_argument("--call", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if asked.call:
        function, *arguments = json.loads(asked.call)
        print(json.dumps(globals()[function](*arguments)))
        return
    with tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
        family = make_family(Path(folder) / f"random_{asked.shape}", asked.shape)
        _, (weights, rate) = apart("matrix_rate", str(family))
        print(
            f"{asked.shape}: {rate:.0f} GFLOP/s on {torch.get_num_threads()} threads\n", flush=True
        )
        rows = []
        if asked.kinds:
            for kinds in KINDS:
                run = run_apart(SCRIPTS[0], family, KINDS=kinds, WORDS_PER_GROUP=asked.words)
                rows.append({"kinds": ", ".join(kinds)} | run)
        elif asked.growth:
            for words in GROWTH:
                more = {"WORDS_PER_GROUP": words, "MATCH_FREQUENCY": False}
                run = run_apart(SCRIPTS[0], family, **more)
                rows.append({"words a group": words} | run)
        elif asked.peers:
            _, texts = apart("word_ids", str(family), asked.words)
            only = {"KINDS": ("word",), "CARRIER": "", "REFERENCES": 0}
            run = run_apart(SCRIPTS[0], family, WORDS_PER_GROUP=asked.words, **only)
            rows.append({"way": "this script", "passes, s": run["passes, s"]})
            for name in ("transformers", "TransformerLens", "minicons"):
                python = sys.executable if name == "transformers" else asked.peers
                _, seconds = apart("time_peer", name, str(family / "step0"), texts, python=python)
                rows.append({"way": name, "passes, s": seconds})
        else:
            for name in SCRIPTS:
                settings = {"WORDS_PER_GROUP": asked.words} if name == SCRIPTS[0] else {}
                run = run_apart(name, family, **settings)
                run["of the matrix rate"] = 2 * weights * run["prefixes"] / rate / run["passes, s"]
                rows.append({"script": name} | run)
        print_table(rows)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()

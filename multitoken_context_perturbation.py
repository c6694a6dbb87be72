"""Compares a word of several tokens with itself in other contexts, and with words that end in the same token.

Run as `python multitoken_context_perturbation.py [FAMILY]`. FAMILY is a folder with a sub-folder for each training step
(step0, step512 ... step143000) that holds a GPT-NeoX checkpoint; without it CHECKPOINTS_DIR is analysed. On several
GPUs, `torchrun --nproc-per-node=4 multitoken_context_perturbation.py [FAMILY]` shares the checkpoints out; on a CPU set
OMP_NUM_THREADS, which torchrun otherwise sets to 1 for each process.

Each word has a base sentence that ends in it, contexts, which are other sentences that end in it, and perturbed
versions of the base, whose last word is another word with the same last token. A sentence is read after one
<|endoftext|>, and its hidden state, scaled to length 1, is taken at its last token. For each checkpoint, layer, word:
    P1         the mean cosine between the base and the contexts: the context changes;
    P2         the mean cosine between the base and the perturbed versions: the word changes;
    P12        the mean cosine between contexts and perturbed versions, all pairs: both change, and what the shared last
               token alone accounts for is left;
    unrelated  the mean cosine between the base and the bases of the other words: the floor that anisotropy gives
               (Ethayarajh 2019, arXiv:1909.00512).
From their means over words, with 95 % bootstrap intervals over last tokens:
    word_share     (P1 - P12) / (1 - P12): of what varies between sentences that end in one token, how much goes with
                   the word. The answer is the layer and the step at which it peaks above its value at the first step;
    context_share  (P2 - P12) / (1 - P12): how much goes with the context.
Layer 0 is the token embedding, where all cosines but `unrelated` are 1, since all sentences of a word end in one token.
The last layer is taken after the final LayerNorm, as transformers returns it.

RESULTS_DIR/<name of FAMILY>/ then holds shares.png, peaks.png and peaks.csv (the answer), perturbation.csv,
perturbation_mean.csv, overview.png, mean_all.png, mean_<n>_tokens.png, words/<n>_tokens_<word>.png, and kept/: what
each checkpoint contributed, so that an interrupted run can continue.
"""

import os
import signal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait crawl on a busy machine
if __name__ == "__main__":  # Ctrl-C during the imports below, which take seconds, is not to end in a traceback
    usual_handler = signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"interrupted\n"), os._exit(130)))

import csv
import hashlib
import inspect
import json
import math
import re
import sys
import tempfile
import zipfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from itertools import cycle
from pathlib import Path
from threading import Thread
from typing import IO, NamedTuple

import numpy as np
import torch
import transformers
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import GPTNeoXConfig, GPTNeoXModel

# ------------------------------------------------------------------------------
# files and folders, beside this script
CHECKPOINTS_DIR = "pythia_1b_checkpoints"  # the family that is analysed if none is named
RESULTS_DIR = "multitoken_words_plots"  # gets a folder for each family
CONTEXTS_FILE = "multitoken_words_contexts.json"  # {word: {"sentences": [...], "replaced_sentences": [...]}}
# words
SAME_LENGTH = True  # leave out perturbed versions whose last word has another number of tokens than the word
WORDS_TO_PLOT = 20  # words with a figure of their own: how many, drawn at random, or a list such as ["lighthouse"]
PREPEND_BOS = True  # read a sentence after <|endoftext|>, away from the attention sink at position 0
# model
DTYPE = "float32"  # of linear layers and attention: "float32", "bfloat16", "float16"; the residual stream is float32
DEVICE = "auto"  # "auto" (cuda, else mps, else cpu), "cpu", "cuda", "cuda:1" or "mps"
BATCH_TOKENS = None  # tokens in a forward pass, at most; None = 256 on a CPU, 2048 elsewhere
# statistics
SEED = 0  # of the words to plot and of the bootstrap
BOOTSTRAP_RESAMPLES = 1000  # resamples of the last tokens behind an interval
# ------------------------------------------------------------------------------

HERE = Path(__file__).resolve().parent
RANK, RANKS = 0, 1
if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():  # started by torchrun
    RANK, RANKS = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
BOS = "<|endoftext|>"
COSINES = ("P1", "P2", "P12", "unrelated")  # what a checkpoint contributes of each word
MEANS = ("P1", "P2", "P12", "P1-P2", "word_share", "context_share")  # over words, each with an interval
STYLES = {  # of the lines in a panel
    "P1": {"color": "#0072b2", "marker": "o", "markersize": 3, "label": "P1: other contexts"},
    "P2": {"color": "#d55e00", "marker": "s", "markersize": 3, "label": "P2: other word"},
    "P12": {"color": "#009e73", "marker": "^", "markersize": 3, "label": "P12: both"},
    "unrelated": {"color": "grey", "linestyle": "--", "label": "unrelated words (floor)"},
}
ARCHITECTURE = (  # what defines the base model, as attributes of GPTNeoXConfig: the same in all of a family
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
    "layer_norm_eps", "max_position_embeddings", "rope_parameters", "use_parallel_residual", "attention_bias",
)  # fmt: skip
ROPE_OF_2022 = ("rotary_pct", "rotary_emb_base", "rope_scaling", "rope_theta", "partial_rotary_factor")  # older names
# endings of tensors that are no part of it: buffers that files of 2022 hold, and the head
SURPLUS = ("attention.bias", "attention.masked_bias", "rotary_emb.inv_freq", "embed_out.weight", "lm_head.weight")


class Problem(Exception):
    """What is wrong, where, and what to do, in one line: it ends the run with exit code 2."""


class Entry(NamedTuple):
    word: str
    tokens: int
    last_token: int
    base: int  # the row of its base among the texts
    contexts: list[int]  # the rows of its other contexts
    perturbed: list[int]  # the rows of its perturbed versions


class Curve(NamedTuple):
    tokens: int | str  # of each word, or "all"
    rows: list[int]  # its entries among all
    table: dict[str, np.ndarray]  # what is found: see tabulate


class Tree(NamedTuple):
    inputs: dict[str, torch.Tensor]  # of the model: input_ids, position_ids, int (1, nodes), and attention_mask
    last: list[int]  # the node at which each text of the tree ends
    rows: list[int]  # its texts among all


def plain(text: object) -> str:
    """A text in one line, with escapes for the characters that a terminal would obey."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in str(text))


def say(message: str) -> None:
    if RANK == 0:
        try:
            print(plain(message), flush=True)
        except BrokenPipeError:  # the reader of the output has gone: the results are what count
            sys.stdout = None


def warn(message: str) -> None:
    if RANK == 0:
        print(f"warning: {plain(message)}", file=sys.stderr)


def reason(error: Exception) -> str:
    """What an error says: for a library's, its name and first 500 characters, in one line."""
    if isinstance(error, Problem):
        return str(error)
    text = " ".join(str(error).split())[:500]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def is_text(value: object) -> bool:
    """Whether a value is a string that is not blank, has no NUL, and can be written as UTF-8."""
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        return False
    return value == value.encode("utf-8", "ignore").decode("utf-8")


def is_whole(value: object, least: int, most: float = math.inf) -> bool:
    return type(value) is int and least <= value <= most


def check_settings() -> None:
    """Stops at the first setting that makes no sense."""
    plot_right = is_whole(WORDS_TO_PLOT, 0) or (isinstance(WORDS_TO_PLOT, list) and all(map(is_text, WORDS_TO_PLOT)))
    device_right = isinstance(DEVICE, str) and re.fullmatch("auto|cpu|mps|cuda(:[0-9]+)?", DEVICE)
    for name, right, expected in (
        ("CHECKPOINTS_DIR", is_text(CHECKPOINTS_DIR), "the name of a folder"),
        ("RESULTS_DIR", is_text(RESULTS_DIR), "the name of a folder"),
        ("CONTEXTS_FILE", is_text(CONTEXTS_FILE), "the name of a file"),
        ("SAME_LENGTH", type(SAME_LENGTH) is bool, "True or False"),
        ("WORDS_TO_PLOT", plot_right, "a number of at least 0 or a list of words"),
        ("PREPEND_BOS", type(PREPEND_BOS) is bool, "True or False"),
        ("DTYPE", DTYPE in ("float32", "bfloat16", "float16"), '"float32", "bfloat16" or "float16"'),
        ("DEVICE", device_right, '"auto", "cpu", "cuda", "cuda:1" or "mps"'),
        ("BATCH_TOKENS", BATCH_TOKENS is None or is_whole(BATCH_TOKENS, 1), "None or a number of at least 1"),
        ("SEED", is_whole(SEED, 0), "a number of at least 0"),
        ("BOOTSTRAP_RESAMPLES", is_whole(BOOTSTRAP_RESAMPLES, 1, 10_000), "a number from 1 to 10000"),
    ):
        if not right:
            raise Problem(f"{name} = {globals()[name]!r} at the top of {Path(__file__).name}: expected {expected}")


def choose_device() -> torch.device:
    name = DEVICE
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and RANKS > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise Problem(f'DEVICE = {DEVICE!r}: {name} cannot be used here ({reason(error)}): set it to "cpu"') from None


def find_family(name: str) -> Path:
    """The folder of a family, looked for where the script was started, then beside it."""
    for folder in (Path(name), HERE / name):
        if folder.is_dir():
            return folder.resolve()
    raise Problem(
        f"there is no folder {HERE / name}: fetch Pythia-1B with `python download_checkpoints.py`, or train "
        "a miniature with `python tests/miniature.py` and name its folder, miniature_checkpoints"
    )


def find_checkpoints(family: Path) -> dict[int, Path]:
    """The checkpoints of a family by training step, in ascending order."""
    folders = {}
    for folder in family.iterdir():
        if match := re.fullmatch("step(0|[1-9][0-9]{0,11})", folder.name):
            folders[int(match[1])] = folder
            if not folder.is_dir():  # a link that leads nowhere, say: without it another step would be the final one
                raise Problem(f"{folder} is not a folder: fetch that checkpoint again, or remove the entry")
    if not folders:
        raise Problem(f"{family} holds no checkpoint: expected a folder for each training step, such as step0")
    return dict(sorted(folders.items()))


def without_repeats(pairs: list[tuple[str, object]]) -> dict:
    for key, count in Counter(key for key, _ in pairs).items():
        if count > 1:
            raise ValueError(f"{key!r} occurs {count} times")
    return dict(pairs)


def read_json(file: Path, expected: str) -> dict:
    """The object that a JSON file holds. An empty one, and a key that stands in it twice, are errors too."""
    try:
        if not file.is_file():  # a named pipe, say, which would be waited for forever
            raise Problem("it is missing, or not a file")
        content = json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=without_repeats)
        if not isinstance(content, dict) or not content:
            raise Problem(f"it holds {content!r:.40}")
    except (Problem, OSError, ValueError, RecursionError) as error:
        raise Problem(f"{file}: expected {expected}, but {reason(error)}") from None
    return content


def read_contexts() -> dict[str, dict[str, list[str]]]:
    """The entries of CONTEXTS_FILE by word; everything wrong with them is reported at once."""
    file = HERE / CONTEXTS_FILE
    contexts = read_json(file, 'an object {"word": {"sentences": [...], "replaced_sentences": [...]}, ...}')
    wrong = []
    for word, entry in contexts.items():
        if not is_text(word) or not isinstance(entry, dict):
            wrong.append(f"{word!r:.60} is not a word with an object of sentences")
            continue
        for name, least in (("sentences", 2), ("replaced_sentences", 0)):
            texts = entry.setdefault(name, [])
            if not isinstance(texts, list) or len(texts) < least:
                wrong.append(f"{word!r:.60} needs a list of {least} or more {name}")
            elif not all(is_text(text) for text in texts):
                wrong.append(f"{word!r:.60} has {name} that are no text")
    if wrong:
        raise Problem(f"{file}: correct or remove {len(wrong)} entries: {'; '.join(wrong)}")
    return contexts


def read_config(folder: Path) -> GPTNeoXConfig:
    """The configuration of a checkpoint's base model: what defines it, and nothing else of config.json."""
    entries = read_json(folder / "config.json", "the configuration of a GPT-NeoX model")
    if entries.get("model_type") != "gpt_neox":
        raise Problem(f"the architecture is {entries.get('model_type')}, expected gpt_neox")
    entries = {name: entries[name] for name in (*ARCHITECTURE, *ROPE_OF_2022) if name in entries}
    config = GPTNeoXConfig.from_dict(entries)
    return GPTNeoXConfig(**{name: getattr(config, name) for name in ARCHITECTURE})


def read_tokenizer(content: bytes) -> Tokenizer:
    """The tokenizer that a tokenizer.json holds, made to neither pad nor cut."""
    tokenizer = Tokenizer.from_buffer(content)
    if PREPEND_BOS and tokenizer.token_to_id(BOS) is None:
        raise Problem(f"its tokenizer has no token {BOS}; set PREPEND_BOS = False")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a checkpoint, one or shards: safetensors where there are, else pickled."""
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    found = [name for name in names if (folder / name).is_file()]
    if not found:
        raise Problem(f"it has no weights, expected {names[0]} or {names[2]}")
    shards = [found[0]]
    if found[0].endswith(".index.json"):
        index = read_json(folder / found[0], 'an object {"weight_map": {tensor: file, ...}}')
        shards = sorted(set(index["weight_map"].values()))
    for shard in shards:
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise Problem(f"its weights lack the file {shard}")
    return [folder / shard for shard in shards]


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint in the type that they are stored in, under their names in the base model.

    They are mapped into memory: nothing is read from disk before it is used.
    """
    weights = {}
    for file in weight_files(folder):
        try:
            if file.suffix == ".safetensors":
                weights |= load_file(file)
            else:  # the pickles of old versions of torch cannot be mapped
                weights |= torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
        except Exception as error:  # whatever the readers raise, the file cannot be used
            raise Problem(f"{file.name}: {reason(error)}") from None
    return {name.removeprefix("gpt_neox."): tensor for name, tensor in weights.items()}


def load_weights(model: GPTNeoXModel, weights: dict[str, torch.Tensor], assign: bool = False) -> None:
    """Copies weights into a model, in place: fresh memory would cost time. With assign, they take the place of its own.

    That reads nothing from disk, so it checks a checkpoint on a model of the meta device. Raises RuntimeError for a
    tensor of a wrong shape or type, Problem for one that is missing or has no place.
    """
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=assign)
    unexpected = [name for name in unexpected if not name.endswith(SURPLUS)]
    if missing:
        raise Problem(f"its weights lack {len(missing)} tensors of its config's model, such as {missing[0]}")
    if unexpected:
        raise Problem(f"its config's model has no place for {len(unexpected)} tensors, such as {unexpected[0]}")


def fingerprint(folder: Path, weights: dict[str, torch.Tensor]) -> list:
    """What changes with a checkpoint's weights: sizes and times of the files, names and four values of the tensors."""
    stats = [file.stat() for file in weight_files(folder)]
    samples = [tensor.flatten()[:: tensor.numel() // 4 + 1].tolist() for tensor in weights.values()]
    return [[(stat.st_size, stat.st_mtime_ns) for stat in stats], list(weights), samples]


def read_family(checkpoints: dict[int, Path]) -> tuple[GPTNeoXConfig, Tokenizer, dict[int, list]]:
    """Checks every checkpoint. Returns what all share, config and tokenizer, and the fingerprint of each.

    Stops, and names all that cannot be used, if some are not whole or not of the final checkpoint's kind.
    """
    final = checkpoints[max(checkpoints)]
    fingerprints, unusable = {}, []
    descending = sorted(checkpoints.items(), reverse=True)
    for step, folder in tqdm(descending, desc="checking", unit="checkpoint", leave=False, disable=RANK > 0):
        try:
            own_config, weights = read_config(folder), read_weights(folder)
            if not (folder / "tokenizer.json").is_file():
                raise Problem("it has no tokenizer.json")
            tokenizer_bytes = (folder / "tokenizer.json").read_bytes()
            layers = own_config.num_hidden_layers
            if not 0 < layers <= len(weights):  # to build a model of a million layers would take ages
                raise Problem(f"its config has {layers} layers, its weights {len(weights)} tensors")
            if folder == final:
                config, tokenizer, final_bytes = own_config, read_tokenizer(tokenizer_bytes), tokenizer_bytes
                if max(tokenizer.get_vocab().values()) >= config.vocab_size:
                    raise Problem(f"its tokenizer has more tokens than its model, which knows {config.vocab_size} only")
                with torch.device("meta"):
                    model = GPTNeoXModel(config)
                    model(torch.zeros(1, 1, dtype=torch.long))  # a config that contradicts itself fails here
            for name in ARCHITECTURE:
                own, expected = getattr(own_config, name), getattr(config, name)
                if own != expected:
                    raise Problem(f"its {name} is {own}, that of {final.name} {expected}")
            if tokenizer_bytes != final_bytes and read_tokenizer(tokenizer_bytes).to_str() != tokenizer.to_str():
                raise Problem(f"its tokenizer is not that of {final.name}")
            load_weights(model, weights, assign=True)
            fingerprints[step] = fingerprint(folder, weights)
        except Exception as error:  # whatever the readers raise, the checkpoint cannot be used
            unusable.append(f"{folder}: {reason(error)}")
            if folder == final:  # there is nothing to compare the others with
                break
    if unusable:
        raise Problem(f"fetch or train again, or remove, what cannot be used: {'; '.join(reversed(unusable))}")
    return config, tokenizer, fingerprints


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[tuple[int, ...]]:
    """The token ids of each text, without <|endoftext|>."""
    try:
        return [tuple(encoding.ids) for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    except Exception as error:  # tokenizers has no narrower one
        raise Problem(f"the family's tokenizer cannot read the texts ({reason(error)}): fetch it again") from None


def name_tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"


def choose_entries(contexts: dict[str, dict[str, list[str]]], tokenizer: Tokenizer) -> tuple[list[Entry], dict]:
    """The entries that can be compared, and their texts: {sentence: token ids without <|endoftext|>}.

    A variant that measures something else than P1 or P2 is left out, counted and named.
    """
    strings = {}
    for word, entry in contexts.items():
        strings[f" {word}"] = None
        strings |= dict.fromkeys(entry["sentences"] + entry["replaced_sentences"])
        strings |= dict.fromkeys(f" {text.split()[-1]}" for text in entry["replaced_sentences"])
    token_ids = dict(zip(strings, encode(tokenizer, list(strings)), strict=True))

    entries, row_of = [], {}
    left_out = defaultdict(Counter)  # fault: {word: how often}
    for word, entry in contexts.items():
        ending = token_ids[f" {word}"]
        base, *others = entry["sentences"]
        if not ending or token_ids[base][-len(ending) :] != ending:
            left_out["words whose base does not end in them"][word] += 1
            continue
        seen, context_rows, perturbed_rows = {token_ids[base]}, [], []
        for text in others:
            if token_ids[text][-len(ending) :] != ending:
                left_out["contexts that do not end in their word"][word] += 1
            elif token_ids[text] in seen:
                left_out["contexts that repeat a sentence"][word] += 1
            else:
                seen.add(token_ids[text])
                context_rows.append(row_of.setdefault(text, len(row_of)))
        for text in entry["replaced_sentences"]:
            last_word = token_ids[f" {text.split()[-1]}"]
            if token_ids[text][-1:] != ending[-1:]:
                left_out["perturbed versions that do not end in their word's last token"][word] += 1
            elif token_ids[text][-len(ending) :] == ending:
                left_out["perturbed versions that keep their word"][word] += 1
            elif token_ids[text] in seen:
                left_out["perturbed versions that repeat a sentence"][word] += 1
            elif SAME_LENGTH and len(last_word) != len(ending):
                left_out["perturbed versions whose last word has another number of tokens"][word] += 1
            else:
                seen.add(token_ids[text])
                perturbed_rows.append(row_of.setdefault(text, len(row_of)))
        if not context_rows and not perturbed_rows:
            left_out["words of which no variant remains"][word] += 1
            continue
        base_row = row_of.setdefault(base, len(row_of))
        entries.append(Entry(word, len(ending), ending[-1], base_row, context_rows, perturbed_rows))

    for fault, counts in left_out.items():
        warn(f"{counts.total()} {fault} are left out: {', '.join(f'{n} of {word}' for word, n in counts.items())}")
    if not entries:
        raise Problem(f"{HERE / CONTEXTS_FILE}: no word is left: expected sentences that end in their word")
    for name, field in (("P1", "contexts"), ("P2", "perturbed")):
        lacking = [entry.word for entry in entries if not getattr(entry, field)]
        if lacking:
            warn(f"{name} is empty for {len(lacking)} of {len(entries)} words, without {field}: {', '.join(lacking)}")
    return entries, {sentence: token_ids[sentence] for sentence in row_of}


def prefix_trees(sequences: list[tuple[int, ...]], device: torch.device) -> list[Tree]:
    """Packs token sequences into prefix trees, in which every distinct prefix stands once.

    A causal model's hidden state depends on the prefix alone. So the nodes of a tree are put in one input sequence,
    where each attends to its ancestors and itself, and its position is its depth. A tree ends before it grows beyond
    the batch's tokens, unless one sequence is longer; the next repeats only the ancestors that both need.
    """
    batch_tokens = BATCH_TOKENS or (256 if device.type == "cpu" else 2048)
    nodes, rows = {}, []  # of a tree: {prefix: its node}, and its texts among all
    packs = [(nodes, rows)]
    for row in sorted(range(len(sequences)), key=sequences.__getitem__):
        sequence = sequences[row]
        prefixes = [sequence[:end] for end in range(1, len(sequence) + 1)]
        new = [prefix for prefix in prefixes if prefix not in nodes]
        if rows and len(nodes) + len(new) > batch_tokens:
            nodes, rows, new = {}, [], prefixes
            packs.append((nodes, rows))
        for prefix in new:
            nodes[prefix] = len(nodes)
        rows.append(row)

    trees = []
    for nodes, rows in packs:
        mask = torch.zeros(1, 1, len(nodes), len(nodes), dtype=torch.bool)
        for prefix, node in nodes.items():
            mask[0, 0, node, [nodes[prefix[:end]] for end in range(1, len(prefix) + 1)]] = True
        token_ids = torch.tensor([[prefix[-1] for prefix in nodes]])
        positions = torch.tensor([[len(prefix) - 1 for prefix in nodes]])
        inputs = {"input_ids": token_ids, "position_ids": positions, "attention_mask": mask}
        trees.append(Tree(inputs, [nodes[sequences[row]] for row in rows], rows))
    return trees


def onednn_linear(layer: torch.nn.Linear, states: torch.Tensor, activation: str = "none") -> torch.Tensor:
    """A linear layer in float32 by oneDNN, on AMD CPUs about twice as fast as by MKL, which torch takes otherwise."""
    return torch.ops.mkldnn._linear_pointwise(states, layer.weight, layer.bias, activation, [], "none")


def onednn_mlp(mlp: torch.nn.Module, states: torch.Tensor) -> torch.Tensor:
    """The two linear layers of a block's MLP, with the GELU between them, which oneDNN applies as it multiplies."""
    return mlp.dense_4h_to_h(onednn_linear(mlp.dense_h_to_4h, states, "gelu"))


def build_model(config: GPTNeoXConfig, device: torch.device) -> GPTNeoXModel:
    """The base model, with no weights yet. Its blocks compute in DTYPE; the residual stream stays in float32."""
    config._attn_implementation = "sdpa"
    with torch.device("meta"):  # so that no time goes into random weights, and no memory into another type
        model = GPTNeoXModel(config)
    linear_layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    for layer in linear_layers:
        layer.to(getattr(torch, DTYPE))
    model.to_empty(device=device).eval()
    model.rotary_emb = type(model.rotary_emb)(config).to(device)  # its frequencies are in no file
    if DTYPE == "float32" and device.type == "cpu" and torch.backends.mkldnn.is_available():
        for layer in linear_layers:
            layer.forward = partial(onednn_linear, layer)
        if config.hidden_act == "gelu":
            for block in model.layers:
                block.mlp.forward = partial(onednn_mlp, block.mlp)
    return model


def read_ahead(folder: Path) -> None:
    """Reads the weights of a checkpoint once, so that the operating system has them in memory when they are loaded."""
    with suppress(Exception):  # what is wrong with a file is said when it is loaded
        for file in weight_files(folder):
            with file.open("rb") as stream:
                while stream.read(2**24):
                    pass


def make_store(shape: tuple[int, int, int], device: torch.device) -> torch.Tensor:
    """Room for the unit states of a checkpoint: in the GPU's memory if it has plenty, else in a temporary file."""
    if device.type == "cuda" and 4 * math.prod(shape) < torch.cuda.mem_get_info(device)[0] / 2:
        return torch.empty(shape, device=device)
    file = tempfile.TemporaryFile(dir=HERE / RESULTS_DIR, buffering=0)  # noqa: SIM115 (the memory map outlives this)
    for _ in range(shape[0]):
        file.write(bytes(4 * shape[1] * shape[2]))  # a full disk is an error here; later, it would kill the process
    return torch.from_numpy(np.memmap(file, np.float32, "r+", shape=shape))


def read_unit_states(
    model: GPTNeoXModel, upcoming: list[Path], trees: list[Tree], names: list[str], store: torch.Tensor, progress: tqdm
) -> None:
    """Fills store, float32 (layers + 1, texts, width), with the hidden state at each text's last token, at length 1.

    They are those of the first of the upcoming checkpoints, which is taken from the list. Meanwhile the weights of the
    next one are read from disk.
    """
    folder = upcoming.pop(0)
    progress.set_description(folder.name)
    try:
        load_weights(model, read_weights(folder))
    except Exception as error:  # it was whole at the start
        raise Problem(f"{folder} changed during the run ({reason(error)}): fetch it again, and run again") from None
    for following in upcoming[:1]:
        Thread(target=read_ahead, args=[following], daemon=True).start()
    for tree in trees:
        with torch.autocast(model.device.type, getattr(torch, DTYPE), enabled=DTYPE != "float32"):
            inputs = {name: tensor.to(model.device) for name, tensor in tree.inputs.items()}
            hidden_states = model(**inputs, use_cache=False, output_hidden_states=True).hidden_states
        states = torch.stack([layer[0, tree.last] for layer in hidden_states]).float()
        norms = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
        wrong = ~(norms.isfinite() & (norms > 0))
        if wrong.any():
            layer, index, _ = wrong.nonzero()[0].tolist()  # in the lowest layer: higher up it spreads to all texts
            fault = f"the hidden state of {names[tree.rows[index]]!r:.60} is not finite, or zero"
            raise Problem(f'{folder}, layer {layer}: {fault}; fetch it again, or set DTYPE = "float32"')
        store[:, tree.rows] = (states / norms).to(store.device)
        progress.update()


def contribution_of(states: torch.Tensor, entries: list[Entry]) -> dict[str, np.ndarray]:
    """All that a checkpoint contributes: COSINES, float32 (layers + 1, words) each, NaN where a word has none.

    states: float32 (layers + 1, texts, width), unit states.
    """
    contribution = {name: np.full((len(states), len(entries)), np.nan, np.float32) for name in COSINES}
    for layer in range(len(states)):
        unit = states[layer].cpu()
        sum_of_bases = unit[[entry.base for entry in entries]].sum(0)
        for number, entry in enumerate(entries):
            base, contexts, perturbed = unit[entry.base], unit[entry.contexts], unit[entry.perturbed]
            contribution["P1"][layer, number] = (contexts @ base).mean()
            contribution["P2"][layer, number] = (perturbed @ base).mean()
            contribution["P12"][layer, number] = (contexts @ perturbed.T).mean()
            if len(entries) > 1:
                others = (sum_of_bases - base) @ base
                contribution["unrelated"][layer, number] = others / (len(entries) - 1)
    return contribution


def measure(
    checkpoints: dict[int, Path],
    missing: dict[int, Path],
    sequences: list[tuple[int, ...]],
    names: list[str],
    entries: list[Entry],
    config: GPTNeoXConfig,
    device: torch.device,
) -> None:
    """Measures the missing checkpoints, {step: file}, and keeps what each contributes as soon as it is known."""
    upcoming = [checkpoints[step] for step in missing]
    trees = prefix_trees(sequences, device)
    model = build_model(config, device)
    shape = (config.num_hidden_layers + 1, len(sequences), config.hidden_size)
    states = make_store(shape, device)
    with tqdm(total=len(upcoming) * len(trees), unit="batch", disable=RANK > 0) as progress:
        for step in missing:
            read_unit_states(model, upcoming, trees, names, states, progress)
            write_arrays(missing[step], contribution_of(states, entries))


def source_of(function: Callable, found: dict[str, str]) -> dict[str, str]:
    """The source of a function and of every function of this script that it names, {name: source}, added to found."""
    source = found[function.__name__] = inspect.getsource(function)
    for name in re.findall(r"\w+", source):
        named = globals().get(name)
        if inspect.isfunction(named) and named.__module__ == __name__ and name not in found:
            source_of(named, found)
    return found


def contribution_keys(checkpoints: dict[int, Path], fingerprints: dict[int, list], inputs: list) -> dict[int, str]:
    """For each step, a digest of all that its contribution depends on, the code that measures it included."""
    code = source_of(measure, {})
    shared = [code, torch.__version__, transformers.__version__, inputs]
    keys = {}
    for step in checkpoints:
        parts = json.dumps([*shared, fingerprints[step]])
        keys[step] = hashlib.sha256(parts.encode()).hexdigest()[:16]
    return keys


@contextmanager
def written_whole(file: Path, mode: str, **how: str) -> Iterator[IO]:
    """A new file to write to, which takes the given name only when it is whole."""
    partial_file = file.with_name(f".{file.name}.{os.getpid()}.partial")
    partial_file.unlink(missing_ok=True)
    try:
        with partial_file.open(mode, **how) as stream:
            yield stream
        partial_file.replace(file)
    finally:
        partial_file.unlink(missing_ok=True)


def write_arrays(file: Path, arrays: dict[str, object]) -> None:
    with written_whole(file, "xb") as stream:
        np.savez(stream, **arrays)


def read_kept(file: Path, shapes: dict[str, tuple[int, int]]) -> dict[str, np.ndarray] | None:
    """What a checkpoint contributed, or None if that is not known: arrays of these names and shapes."""
    with suppress(Exception), np.load(file) as arrays:  # what cannot be read, for whatever reason, is not known
        contribution = dict(arrays)
        if {name: array.shape for name, array in contribution.items()} == shapes:
            return contribution
    return None


def open_results(family: Path) -> tuple[Path, list[str]]:
    """The folder of a family's results, and the names of the figures that an earlier run drew there."""
    if not family.name:
        raise Problem(f"{family} has no name for a folder of results: name a folder within it")
    results = HERE / RESULTS_DIR / family.name
    (results / "kept").mkdir(parents=True, exist_ok=True)
    record = results / "kept" / "run.json"
    if not record.exists():
        record_run(results, family, [])
    earlier = read_json(record, "the record of an earlier run; delete it")
    owner = earlier.get("family")
    if owner != str(family):
        ways = f"rename one, set another RESULTS_DIR or, if it only moved, delete {record}"
        raise Problem(f"{results} holds the results of {owner}, not of {family}: {ways}")
    return results, earlier.get("figures") or []


def record_run(results: Path, family: Path, figures: list[str]) -> None:
    """Writes down whose results are in a folder, and which figures in it are ours."""
    with written_whole(results / "kept" / "run.json", "x", encoding="utf-8") as stream:
        json.dump({"family": str(family), "figures": figures}, stream)


def warn_of_copies(steps: list[int], values: np.ndarray) -> None:
    """Warns of checkpoints that agree with an earlier one bit for bit from layer 0 upwards: they share weights.

    values: float32 (steps, layers + 1, numbers).
    """
    bits = values.view(np.int32)
    copies = defaultdict(list)  # (an earlier step, how many layers agree with it): the later steps
    for later in range(1, len(steps)):
        agree = (bits[:later] == bits[later]).all(-1)  # (earlier steps, layers + 1)
        depths = np.cumprod(agree, axis=1).sum(1)  # how many layers agree, from 0 upwards
        if depths.max() > 0:
            copies[steps[depths.argmax()], depths.max()].append(steps[later])
    layers = values.shape[1] - 1
    for (earlier, depth), others in copies.items():
        extent = f"up to layer {depth - 1} of {layers}" if depth <= layers else "in all layers"
        names = ", ".join(map(str, others))
        warn(f"steps {earlier} and {names} have the same hidden states {extent}: so far their weights are the same")


def resample(last_tokens: list[int], seed: int) -> np.ndarray:
    """How often each text or word counts, float64 (1 + BOOTSTRAP_RESAMPLES, as many).

    Once each in row 0, which gives the estimate. In the others as often as its last token was drawn, from all last
    tokens with replacement: words that end in the same token are not independent. From one last token alone nothing can
    be drawn: NaN.
    """
    _, clusters = np.unique(last_tokens, return_inverse=True)
    count = clusters.max() + 1
    rng = np.random.default_rng([SEED, seed])
    counts = np.ones((1 + BOOTSTRAP_RESAMPLES, count))
    for row in counts[1:]:
        row[:] = np.bincount(rng.integers(count, size=count), minlength=count)
    if count == 1:
        counts[1:] = np.nan
    return counts[:, clusters]


def interval(values: np.ndarray) -> np.ndarray:
    """The estimate, which values start with, and the 95 % percentile interval of its resamples, the rest of them.

    Returns float64 (3, ...): estimate, low, high (Efron 1979, doi:10.1214/aos/1176344552). Infinite values stand for
    none, such as no crossing; a bound among them is NaN.
    """
    with np.errstate(invalid="ignore"):
        bounds = np.percentile(values[1:], (2.5, 97.5), axis=0)
    return np.stack([values[0], *np.where(np.isfinite(bounds), bounds, np.nan)])


def tabulate(contributions: dict[str, np.ndarray], curve: Curve, entries: list[Entry]) -> None:
    """Fills a curve's table: MEANS with their intervals, float64 (3, steps, layers + 1) each; unrelated, (steps,
    layers + 1); and layer and height of the word share's peak above the first step, with their intervals, (3, steps).

    The peak is NaN at the first step, which has none above itself, and where there are no shares.

    contributions: COSINES, (steps, layers + 1, words) each. P1 and P2 are means over the words that have them; P12, the
    difference and the shares over those that have both.
    """
    with_contexts = [row for row in curve.rows if entries[row].contexts]
    with_perturbed = [row for row in curve.rows if entries[row].perturbed]
    with_both = [row for row in with_contexts if entries[row].perturbed]

    def mean(name: str, rows: list[int]) -> np.ndarray:  # (1 + resamples, steps, layers + 1)
        if not rows:
            return np.full((1 + BOOTSTRAP_RESAMPLES, *contributions[name].shape[:2]), np.nan)
        seed = 0 if curve.tokens == "all" else curve.tokens
        weights = resample([entries[row].last_token for row in rows], seed)
        sums = np.tensordot(weights, contributions[name][..., rows], (1, 2))
        return sums / weights.sum(1)[:, None, None]

    P1, P2, P12 = (mean(name, with_both) for name in ("P1", "P2", "P12"))
    varying = np.where(1 - P12[0] < 1e-4, np.nan, 1 - P12)  # nothing varies in layer 0
    word_share, context_share = (P1 - P12) / varying, (P2 - P12) / varying
    means = (mean("P1", with_contexts), mean("P2", with_perturbed), P12, P1 - P2, word_share, context_share)
    for name, values in zip(MEANS, means, strict=True):
        curve.table[name] = interval(values)
    curve.table["unrelated"] = contributions["unrelated"][..., curve.rows].mean(-1, dtype=np.float64)
    gain = word_share - word_share[:, :1]
    gain = np.where(np.isnan(gain), -np.inf, gain)
    height = gain.max(-1)  # (1 + resamples, steps)
    layer = np.where(np.isfinite(height), gain.argmax(-1), np.nan)
    known = np.isfinite(height[0]) & (np.arange(height.shape[1]) > 0)
    for name, values in (("peak_layer", layer), ("gain", height)):
        curve.table[name] = np.where(known, interval(values), np.nan)


def write_csv(file: Path, header: str, rows: list[list]) -> None:
    """Writes a table. A number that is not defined is left empty."""
    with written_whole(file, "x", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header.split(","))
        for row in rows:
            cells = []
            for value in row:
                if isinstance(value, float):
                    value = f"{value:.6f}" if math.isfinite(value) else ""
                cells.append(value)
            writer.writerow(cells)


def write_tables(
    results: Path, steps: list[int], entries: list[Entry], curves: list[Curve], contributions: dict[str, np.ndarray]
) -> None:
    rows, mean_rows, peak_rows = [], [], []
    for number, entry in enumerate(entries):
        for index, layer in np.ndindex(contributions["P1"].shape[:2]):
            values = [float(contributions[name][index, layer, number]) for name in COSINES]
            rows.append([entry.word, entry.tokens, steps[index], layer, *values])
    for curve in curves:
        for index, layer in np.ndindex(curve.table["unrelated"].shape):
            row = [curve.tokens, len(curve.rows), steps[index], layer]
            for name in MEANS:
                row += curve.table[name][:, index, layer].tolist()
            mean_rows.append([*row, curve.table["unrelated"][index, layer]])
        if curve.tokens != "all":
            for index, step in enumerate(steps[1:], 1):
                peak = [*curve.table["peak_layer"][:, index], *curve.table["gain"][:, index]]
                peak_rows.append([curve.tokens, len(curve.rows), step, *peak])
    columns = ",".join(f"{name},{name}_low,{name}_high" for name in MEANS)
    write_csv(results / "perturbation.csv", f"word,tokens,step,layer,{','.join(COSINES)}", rows)
    write_csv(results / "perturbation_mean.csv", f"tokens,words,step,layer,{columns},unrelated", mean_rows)
    write_csv(results / "peaks.csv", "tokens,words,step,layer,layer_low,layer_high,gain,gain_low,gain_high", peak_rows)


def printable(text: str) -> str:
    """The text with an escape, such as \\u65e5, for each character that the figures' font has no glyph for."""
    font = get_font(findfont(FontProperties()))
    shown = (character if font.get_char_index(ord(character)) else ascii(character)[1:-1] for character in text)
    return "".join(shown)


def name_step(step: int) -> str:
    return f"{step // 1000}k" if step and step % 1000 == 0 else str(step)


def name_layer(layers: int) -> str:
    return f"layer (0 = token embedding, {layers} = after the final LayerNorm)"


def scale_steps(axes: Axes, direction: str, steps: list[int]) -> None:
    """Makes the "x" or "y" axis linear in log2(1 + step), with a label wherever there is room."""
    axis, set_scale = (axes.xaxis, axes.set_xscale) if direction == "x" else (axes.yaxis, axes.set_yscale)
    there, back = (lambda step: np.log2(1 + np.maximum(step, -0.5))), (lambda position: 2**position - 1)
    set_scale("function", functions=(there, back))
    positions = np.log2(1 + np.array(steps))
    labelled = [len(steps) - 1]
    for index in reversed(range(len(steps) - 1)):
        if positions[labelled[-1]] - positions[index] >= np.ptp(positions) / 16:
            labelled.append(index)
    axis.set_ticks([steps[index] for index in labelled], [name_step(steps[index]) for index in labelled])
    axis.set_ticks(steps, minor=True)


def group_styles(curves: list[Curve]) -> dict[int, dict]:
    """Colour, marker and label of each group, by its number of tokens."""
    groups = sorted({curve.tokens for curve in curves})
    colours = colormaps["viridis"](np.linspace(0, 0.85, len(groups)))
    styles = {}
    for tokens, colour, marker in zip(groups, colours, cycle("osD^vP*X"), strict=False):
        styles[tokens] = {"color": colour, "marker": marker, "markersize": 4, "label": name_tokens(tokens)}
    return styles


def draw_line(axes: Axes, positions: list[int] | range, values: np.ndarray, style: dict) -> None:
    """Draws an estimate and its interval: float64 (3, positions)."""
    estimate, low, high = values
    axes.plot(positions, estimate, **style)
    axes.fill_between(positions, low, high, color=style["color"], alpha=0.25, linewidth=0)


def file_name(word: str) -> str:
    """A readable file name for a word, safe on every system, and no other word's.

    What is not plain lower case is marked by a digest, since systems differ in what they forbid, in whether A and a are
    one letter, and in how they write an accent.
    """
    name = "".join(character if character.isalnum() or character == "-" else "_" for character in word[:40])
    is_plain = re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", word) and name == word
    return name if is_plain else f"{name}-{hashlib.sha256(word.encode()).hexdigest()[:8]}"


def make_panels(title: str, label: str, steps: list[int], layers: int) -> tuple[Figure, list[Axes]]:
    """A figure against layer, with a panel for each step."""
    columns = min(len(steps), max(4, round(np.sqrt(1.5 * len(steps)))))
    rows = -(-len(steps) // columns)
    width, height = 1.5 + 2.2 * columns, 1.9 + 1.9 * rows
    margins = {"left": 0.8 / width, "right": 1 - 0.2 / width, "bottom": 1.2 / height, "top": 1 - 0.65 / height}
    figure = Figure(figsize=(width, height), dpi=100)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True, gridspec_kw=margins)
    panels = list(grid.flat[: len(steps)])
    for axes, step in zip(panels, steps, strict=True):
        axes.set_title(f"step {step}", fontsize="medium", pad=3, y=1)  # looking for a free y takes time
        axes.grid(alpha=0.3)
    for axes in grid.flat[len(steps) :]:
        axes.set_axis_off()
    for axes in panels[-columns:]:  # the lowest of each column
        axes.tick_params(labelbottom=True)
    panels[0].set_xticks(range(0, layers + 1, layers // 5 + 1))
    figure.supxlabel(name_layer(layers), y=0.7 / height, fontsize="medium")
    figure.supylabel(label, x=0.1 / width, fontsize="medium")
    figure.suptitle(title, y=1 - 0.1 / height, parse_math=False)
    return figure, panels


def draw_cosines(title: str, steps: list[int], table: dict[str, np.ndarray]) -> Figure:
    """P1, P2, P12 and the floor against layer, with intervals where there are any; a panel a step."""
    layers = table["unrelated"].shape[1] - 1
    figure, panels = make_panels(title, "cosine similarity at the last token", steps, layers)
    for index, axes in enumerate(panels):
        for name, style in STYLES.items():
            if table[name].ndim == 3:
                draw_line(axes, range(layers + 1), table[name][:, index], style)
            else:
                axes.plot(table[name][index], **style)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="lower center", ncols=len(STYLES))
    return figure


def draw_shares(family: str, steps: list[int], curves: list[Curve]) -> Figure:
    """Word share against layer, a line a number of tokens; and the context share of all words; a panel a step."""
    *groups, all_words = curves
    layers = all_words.table["unrelated"].shape[1] - 1
    title = f"{family}: how much of what varies goes with the word, with 95 % intervals"
    figure, panels = make_panels(title, "share of what varies at the last token", steps, layers)
    styles = group_styles(groups)
    for index, axes in enumerate(panels):
        for curve in groups:
            style = styles[curve.tokens] | {"label": f"word share, {name_tokens(curve.tokens)}"}
            draw_line(axes, range(layers + 1), curve.table["word_share"][:, index], style)
        label = "context share, all words"
        axes.plot(all_words.table["context_share"][0, index], color="grey", linewidth=1, label=label)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="lower center", ncols=3)
    return figure


def draw_peaks(family: str, steps: list[int], curves: list[Curve]) -> Figure:
    """Height and layer of the peak of the word share against step, a line a number of tokens."""
    *groups, all_words = curves
    figure = Figure(figsize=(12, 5), dpi=110, layout="constrained")
    panels = figure.subplots(1, 2, sharex=True)
    styles = group_styles(groups)
    for curve in groups:
        style = styles[curve.tokens] | {"label": f"{name_tokens(curve.tokens)} ({len(curve.rows)} words)"}
        draw_line(panels[0], steps, curve.table["gain"], style)
        draw_line(panels[1], steps, curve.table["peak_layer"], style)
    for axes in panels:
        axes.set_xlabel("training step")
        axes.grid(alpha=0.3)
    scale_steps(panels[0], "x", steps)
    layers = all_words.table["unrelated"].shape[1] - 1
    panels[0].set_ylabel(f"height: word share above its value at step {steps[0]}")
    panels[1].set_ylabel(f"layer of the peak, of {layers}")
    panels[1].set_ylim(-0.5, layers + 0.5)
    figure.suptitle(f"{family}: the peak of the word share, with 95 % intervals over last tokens", parse_math=False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(curves))
    return figure


def draw_overview(family: str, steps: list[int], curve: Curve) -> Figure:
    """Word share, context share and P1 - P2, over all words, as heat maps of layers by steps."""
    layers = curve.table["unrelated"].shape[1] - 1
    means = {name: curve.table[name][0] for name in ("word_share", "context_share", "P1-P2")}
    figure = Figure(figsize=(14, 5), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(means), sharex=True, sharey=True)
    shares = np.append([means["word_share"], means["context_share"]], [0, 0.01])  # some number, if there are no shares
    widest = np.nanmax(np.abs(np.append(means["P1-P2"], 0.01)))
    for axes, (name, mean) in zip(panels, means.items(), strict=True):
        scale = {"vmin": np.nanmin(shares), "vmax": np.nanmax(shares)}
        if name == "P1-P2":
            scale = {"vmin": -widest, "vmax": widest, "cmap": "RdBu_r"}
        image = axes.imshow(mean.T, origin="lower", aspect="auto", **scale)
        axes.set_title(name.replace("_", " "))
        figure.colorbar(image, ax=axes)
    labelled = range(len(steps) - 1, -1, -(len(steps) // 9 + 1))
    panels[0].set_xticks(labelled, [name_step(steps[index]) for index in labelled])
    panels[0].set_yticks(range(0, layers + 1, layers // 10 + 1))
    figure.supxlabel("training step", fontsize="medium")
    figure.supylabel(name_layer(layers), fontsize="medium")
    figure.suptitle(f"{family}: means over all {len(curve.rows)} words", parse_math=False)
    return figure


def choose_words(entries: list[Entry]) -> list[int]:
    """The rows of the entries with a figure of their own."""
    words = [entry.word for entry in entries]
    if isinstance(WORDS_TO_PLOT, int):
        return np.random.default_rng(SEED).permutation(len(words))[:WORDS_TO_PLOT].tolist()
    unknown = [word for word in WORDS_TO_PLOT if word not in words]
    if unknown:
        warn(f"words of WORDS_TO_PLOT that are not measured have no figure: {', '.join(unknown)}")
    return [words.index(word) for word in dict.fromkeys(WORDS_TO_PLOT) if word in words]


def draw_figures(
    results: Path, steps: list[int], entries: list[Entry], curves: list[Curve], contributions: dict[str, np.ndarray]
) -> list[str]:
    """Draws all figures. Returns the names of their files."""
    family = printable(results.name)
    figures = {"overview.png": partial(draw_overview, family, steps, curves[-1])}
    figures["shares.png"] = partial(draw_shares, family, steps, curves)
    figures["peaks.png"] = partial(draw_peaks, family, steps, curves)
    for curve in curves:
        words = "words" if curve.tokens == "all" else f"words of {name_tokens(curve.tokens)}"
        title = f"{family}: mean over {len(curve.rows)} {words}, with 95 % intervals"
        name = "mean_all.png" if curve.tokens == "all" else f"mean_{curve.tokens}_tokens.png"
        figures[name] = partial(draw_cosines, title, steps, curve.table)
    for row in choose_words(entries):
        word, tokens, *_ = entries[row]
        title = f"{family}: {printable(word[:60])} ({name_tokens(tokens)})"
        table = {name: contributions[name][..., row] for name in COSINES}
        figures[f"words/{tokens}_tokens_{file_name(word)}.png"] = partial(draw_cosines, title, steps, table)
    (results / "words").mkdir(exist_ok=True)
    for name, draw in tqdm(figures.items(), desc="figures", unit="figure"):
        with written_whole(results / name, "xb") as stream:
            draw().savefig(stream)
    return list(figures)


def say_answer(steps: list[int], curves: list[Curve]) -> None:
    """Says where and when the word share peaks, by number of tokens."""
    say(f"peak of the word share above step {steps[0]}, with 95 % intervals")
    for curve in curves[:-1]:
        peak_layer, gain = curve.table["peak_layer"], curve.table["gain"]
        if np.isnan(gain[0]).all():
            say(f"  {name_tokens(curve.tokens):9} none: there are no shares")
            continue
        for when, index in (("highest", np.nanargmax(gain[0])), ("at the end", len(steps) - 1)):
            height, low, high = gain[:, index]
            layer, lowest, highest = peak_layer[:, index]
            found = f"{height:.2f} [{low:.2f}, {high:.2f}] in layer {layer:.0f} [{lowest:.0f}, {highest:.0f}]"
            say(f"  {name_tokens(curve.tokens):9} {when:10} step {steps[index]:<7} {found}")


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="?", help="folder of checkpoints [CHECKPOINTS_DIR, beside this script]")
    arguments, unknown = parser.parse_known_args()
    if unknown:
        raise Problem(f"unrecognized arguments: {' '.join(unknown)}")
    check_settings()
    device = choose_device()
    family = find_family(arguments.family or str(HERE / CHECKPOINTS_DIR))
    checkpoints = find_checkpoints(family)
    config, tokenizer, fingerprints = read_family(checkpoints)
    entries, texts = choose_entries(read_contexts(), tokenizer)
    start = (tokenizer.token_to_id(BOS),) if PREPEND_BOS else ()
    sequences = [start + token_ids for token_ids in texts.values()]
    longest, positions = max(sequences, key=len), config.max_position_embeddings
    if len(longest) > positions:
        fault = f"{tokenizer.decode(longest)!r:.60} has {len(longest)} tokens, the model {positions} positions"
        raise Problem(f"{fault}: shorten it in {CONTEXTS_FILE}")
    results, earlier_figures = open_results(family)

    steps = list(checkpoints)
    shapes = dict.fromkeys(COSINES, (config.num_hidden_layers + 1, len(entries)))
    inputs = [entries, sequences, DTYPE, device.type, BATCH_TOKENS, config.to_json_string()]
    keys = contribution_keys(checkpoints, fingerprints, inputs)
    files = {step: results / "kept" / f"step{step}-{key}.npz" for step, key in keys.items()}
    missing = {step: file for step, file in files.items() if read_kept(file, shapes) is None}
    for file in (results / "kept").iterdir():
        if RANK == 0 and re.fullmatch(r"step\d+-[0-9a-f]{16}\.npz", file.name) and file not in files.values():
            file.unlink(missing_ok=True)
    if RANKS > 1:
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=365))  # ranks may end hours apart
        seen = [None] * RANKS
        torch.distributed.all_gather_object(seen, (missing, keys))
        if any(other_keys != keys for _, other_keys in seen):
            raise Problem("the ranks differ in script, inputs, checkpoints or libraries: make them the same")
        missing, _ = seen[0]  # what the first of them misses
    say(f"family   {family}")
    say(f"steps    {', '.join(map(name_step, steps))} ({len(missing)} of {len(steps)} to measure)")
    groups = sorted(Counter(entry.tokens for entry in entries).items())
    say(f"words    {', '.join(f'{count} of {name_tokens(tokens)}' for tokens, count in groups)}")
    say(f"texts    {len(texts)} sentences")
    say(f"device   {device}, {DTYPE}" + (f", {RANKS} ranks" if RANKS > 1 else ""))
    share = dict(np.array_split(list(missing.items()), RANKS)[RANK])
    if share:
        measure(checkpoints, share, sequences, list(texts), entries, config, device)
    if RANKS > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if RANK > 0:
        return

    kept = [read_kept(file, shapes) for file in files.values()]
    if None in kept:
        raise Problem(f"{results / 'kept'} changed during the run: run again")
    contributions = {name: np.stack([contribution[name] for contribution in kept]) for name in shapes}
    if len({entry.last_token for entry in entries}) > 1:  # else all cosines are 1 in layer 0
        warn_of_copies(steps, np.concatenate(list(contributions.values()), axis=-1))
    curves = []
    for tokens in [*sorted({entry.tokens for entry in entries}), "all"]:
        rows = [row for row, entry in enumerate(entries) if tokens in (entry.tokens, "all")]
        curves.append(Curve(tokens, rows, {}))
        tabulate(contributions, curves[-1], entries)
    write_tables(results, steps, entries, curves, contributions)
    figures = draw_figures(results, steps, entries, curves, contributions)
    for name in set(earlier_figures) - set(figures):
        (results / name).unlink(missing_ok=True)
    record_run(results, family, figures)
    if len(steps) > 1:
        say_answer(steps, curves)
    else:
        warn("a family of one checkpoint has no peaks above its first step")
    say(f"results  {results}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, usual_handler)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show a name gets an escape
    transformers.logging.set_verbosity_error()
    try:
        with torch.inference_mode():
            main()
    except KeyboardInterrupt:
        print("interrupted: what was measured is kept, and the next run continues from there", file=sys.stderr)
        sys.exit(130)
    except (Problem, OSError, MemoryError, RuntimeError) as error:
        problem = reason(error)
        if isinstance(error, RuntimeError) and "memory" not in problem:  # torch's errors of memory are RuntimeErrors
            raise
        if isinstance(error, OSError):
            problem += "; make room, check permissions, or set another RESULTS_DIR; what was measured is kept"
        elif not isinstance(error, Problem):
            problem += "; lower BATCH_TOKENS or BOOTSTRAP_RESAMPLES; what was measured is kept"
        print(f"error: {plain(problem)}", file=sys.stderr)
        sys.exit(2)

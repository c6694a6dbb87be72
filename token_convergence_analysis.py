"""Follows words of one and of several tokens, layer by layer, towards their hidden states in the final model.

Run as `python token_convergence_analysis.py [FAMILY]`. FAMILY is a folder with a sub-folder for each training step
(step0, step512 ... step143000) that holds a GPT-NeoX checkpoint; without it CHECKPOINTS_DIR is analysed. On several
GPUs, `torchrun --nproc-per-node=4 token_convergence_analysis.py [FAMILY]` shares the checkpoints out; on a CPU set
OMP_NUM_THREADS, which torchrun otherwise sets to 1 for each process.

The words with the same number of tokens form a group. A word is read after one <|endoftext|>, with a leading space,
and its hidden state, scaled to length 1, is taken at its last token. Each group is read in the ways that KINDS names:
    word        as it is;
    recombined  its last token after the first tokens of another word of its group: the same tokens, and no word;
    carried     at the end of CARRIER, so that the last tokens of all words stand at one position.
For each group, kind, checkpoint and layer, u being the states at that step and f those of the final checkpoint:
    similarity  the mean cosine of u and f;
    unrelated   the mean cosine of u of one text and f of another: the floor that anisotropy gives (Ethayarajh 2019,
                arXiv:1909.00512);
    centred     the correlation of u and f, after the mean over texts is taken from each. This is the curve to read;
    cka         linear CKA of u and f: whether the geometry among the texts has settled (Kornblith et al. 2019,
                arXiv:1905.00414);
    stability   the mean cosine of u with the state at the checkpoint before.
The answer is the half-way step: where `centred` has come halfway from its first value to 1.
Layer 0 is the token embedding; the last layer is taken after the final LayerNorm, as transformers returns it.

RESULTS_DIR/<name of FAMILY>/ then holds half_way.png and half_way.csv (the answer), contrasts.csv, convergence.csv,
texts.csv, similarities.npz, overview.png, group_<n>_tokens.png, layer_<ll>.png, and kept/: what each checkpoint
contributed, so that an interrupted run can continue.
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
from functools import partial, reduce
from itertools import cycle
from operator import and_
from pathlib import Path
from threading import Thread
from typing import IO, NamedTuple

import numpy as np
import torch
import transformers
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import GPTNeoXConfig, GPTNeoXModel

# ------------------------------------------------------------------------------
# files and folders, beside this script
CHECKPOINTS_DIR = "pythia_1b_checkpoints"  # the family that is analysed if none is named
RESULTS_DIR = "convergance_plots"  # gets a folder for each family
WORDS_FILE = "words_list.json"  # {word: frequency}
# words
GROUPS = (1, 2, 3, 4)  # numbers of tokens; the words with that many form a group
KINDS = ("word", "recombined", "carried")  # how a group is read: any of these three
CARRIER = "The next word that you will find on this page of the list is"  # what stands before a carried word
MATCH_FREQUENCY = True  # draw words so that all groups have the same frequencies; False: draw from each at random
WORDS_PER_GROUP = 500  # words in a group, at most; None = all
MIN_GROUP_SIZE = 10  # words, 4 or more; a smaller group is left out
LEADING_SPACE = True  # tokenize a word as it stands in running text
PREPEND_BOS = True  # read it after <|endoftext|>, away from the attention sink at position 0
# model
DTYPE = "float32"  # of linear layers and attention: "float32", "bfloat16", "float16"; the residual stream is float32
DEVICE = "auto"  # "auto" (cuda, else mps, else cpu), "cpu", "cuda", "cuda:1" or "mps"
BATCH_TOKENS = None  # tokens in a forward pass, at most; None = 256 on a CPU, 2048 elsewhere
# statistics
SEED = 0  # of the draw of words, of the recombination and of the bootstrap
BOOTSTRAP_RESAMPLES = 1000  # resamples of the last tokens behind an interval
# ------------------------------------------------------------------------------

HERE = Path(__file__).resolve().parent
RANK, RANKS = 0, 1
if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():  # started by torchrun
    RANK, RANKS = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
BOS = "<|endoftext|>"
OF_TEXTS = ("similarity", "stability", "covariance", "variance")  # what a checkpoint contributes of each text,
OF_CURVES = ("unrelated", "cka")  # and of each curve
ARCHITECTURE = (  # what defines the base model, as attributes of GPTNeoXConfig: the same in all of a family
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
    "layer_norm_eps", "max_position_embeddings", "rope_parameters", "use_parallel_residual", "attention_bias",
)  # fmt: skip
ROPE_OF_2022 = ("rotary_pct", "rotary_emb_base", "rope_scaling", "rope_theta", "partial_rotary_factor")  # older names
# endings of tensors that are no part of it: buffers that files of 2022 hold, and the head
SURPLUS = ("attention.bias", "attention.masked_bias", "rotary_emb.inv_freq", "embed_out.weight", "lm_head.weight")


class Problem(Exception):
    """What is wrong, where, and what to do, in one line: it ends the run with exit code 2."""


class Text(NamedTuple):
    word: str  # of WORDS_FILE, or the string of a recombination
    frequency: float  # of the word; NaN for a recombination
    token_ids: tuple[int, ...]  # as the model reads them, after <|endoftext|>


class Curve(NamedTuple):
    tokens: int  # of each word
    kind: str  # of KINDS
    texts: list[Text]
    rows: slice  # of its texts among those of all curves
    table: dict[str, np.ndarray]  # what is found: see tabulate


class Contrast(NamedTuple):
    curve: Curve
    other: Curve
    ratio: np.ndarray  # of their half-way steps, float64 (3, layers + 1): see interval


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
    groups_right = isinstance(GROUPS, tuple | list) and GROUPS and all(is_whole(tokens, 1) for tokens in GROUPS)
    kinds_right = isinstance(KINDS, tuple | list) and KINDS and all(KINDS.count(kind) == 1 for kind in KINDS)
    kinds_right = kinds_right and all(kind in ("word", "recombined", "carried") for kind in KINDS)
    device_right = isinstance(DEVICE, str) and re.fullmatch("auto|cpu|mps|cuda(:[0-9]+)?", DEVICE)
    for name, right, expected in (
        ("CHECKPOINTS_DIR", is_text(CHECKPOINTS_DIR), "the name of a folder"),
        ("RESULTS_DIR", is_text(RESULTS_DIR), "the name of a folder"),
        ("WORDS_FILE", is_text(WORDS_FILE), "the name of a file"),
        ("GROUPS", groups_right, "numbers of tokens, such as (1, 2, 3, 4)"),
        ("KINDS", kinds_right, 'some of ("word", "recombined", "carried")'),
        ("CARRIER", is_text(CARRIER), "the opening of a sentence"),
        ("MATCH_FREQUENCY", type(MATCH_FREQUENCY) is bool, "True or False"),
        ("WORDS_PER_GROUP", WORDS_PER_GROUP is None or is_whole(WORDS_PER_GROUP, 4), "None or a number of at least 4"),
        ("MIN_GROUP_SIZE", is_whole(MIN_GROUP_SIZE, 4), "a number of at least 4"),
        ("LEADING_SPACE", type(LEADING_SPACE) is bool, "True or False"),
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


def read_words() -> dict[str, float]:
    """The words of WORDS_FILE, in its order, and their frequencies."""
    file = HERE / WORDS_FILE
    words = read_json(file, 'an object {"word": frequency, ...}')
    unusable = []
    for word, frequency in words.items():
        frequency_right = type(frequency) in (int, float) and 0 < frequency <= sys.float_info.max
        if not is_text(word) or word.split() != [word] or not frequency_right:
            unusable.append(f"{word!r}: {frequency!r:.40}")
    if unusable:
        some = ", ".join(unusable[:5])
        raise Problem(f"{file}: remove what is not a word or has no frequency above 0, {len(unusable)} entries: {some}")
    return words


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


def frequency_bin(text: Text) -> int:
    """A bin is a quarter of a power of ten wide."""
    return math.floor(4 * math.log10(text.frequency))


def match_frequencies(groups: dict[int, list[Text]]) -> dict[int, list[Text]]:
    """Takes equally many words of each frequency from every group: as many as the poorest has in each bin.

    While fewer than MIN_GROUP_SIZE words can be matched, a group is left out, the one without which most can. Within a
    bin the words are taken in the order of their group.
    """
    counts = {tokens: Counter(map(frequency_bin, texts)) for tokens, texts in groups.items()}

    def room(left_out: int | None = None) -> Counter:  # bin: the least count of the groups
        return reduce(and_, [counts[tokens] for tokens in counts if tokens != left_out])

    while room().total() < MIN_GROUP_SIZE:
        worst = max(counts, key=lambda tokens: room(tokens).total())
        group = f"words of {name_tokens(worst)} that match the others in frequency"
        warn(f"{WORDS_FILE} has too few {group}: left out; add some, or set MATCH_FREQUENCY = False")
        del counts[worst]
    taken = room()
    if WORDS_PER_GROUP is not None and taken.total() > WORDS_PER_GROUP:
        ends = np.cumsum([0, *taken.values()]) * WORDS_PER_GROUP // taken.total()  # so that they add up to it
        taken = dict(zip(taken, np.diff(ends), strict=True))
    matched = {}
    for tokens in counts:
        left, matched[tokens] = Counter(taken), []
        for text in groups[tokens]:
            if left[frequency_bin(text)] > 0:
                left[frequency_bin(text)] -= 1
                matched[tokens].append(text)
    return matched


def draw_words(texts: list[Text]) -> dict[int, list[Text]]:
    """Draws the words of each group, by their number of tokens."""
    groups = {}
    for tokens in sorted(set(GROUPS)):
        group = [text for text in texts if len(text.token_ids) == tokens]
        if len(group) < MIN_GROUP_SIZE:
            warn(f"{WORDS_FILE} has {len(group)} words of {name_tokens(tokens)}, fewer than MIN_GROUP_SIZE: left out")
            continue
        order = np.random.default_rng([SEED, tokens]).permutation(len(group))
        groups[tokens] = [group[index] for index in order]
    if not groups:
        raise Problem(f"{WORDS_FILE} has no group of MIN_GROUP_SIZE = {MIN_GROUP_SIZE} words: lower it or add words")
    if MATCH_FREQUENCY:
        return match_frequencies(groups)
    return {tokens: group[:WORDS_PER_GROUP] for tokens, group in groups.items()}


def recombine(group: list[Text], tokenizer: Tokenizer, words: set[str]) -> list[Text]:
    """Puts each word's last token after the first tokens of another, so that no result is one of the words.

    Every beginning is used once. They are drawn at random; those that make a word change places with others until none
    does.
    """
    tokens = len(group[0].token_ids)
    rng = np.random.default_rng([SEED, tokens])
    beginnings = [text.token_ids[:-1] for text in group]
    rng.shuffle(beginnings)
    for _ in range(1000):
        sequences = [(*beginning, text.token_ids[-1]) for beginning, text in zip(beginnings, group, strict=True)]
        strings = tokenizer.decode_batch(sequences)
        words_made = [index for index, string in enumerate(strings) if string in words]
        if not words_made:
            return [Text(string, math.nan, ids) for string, ids in zip(strings, sequences, strict=True)]
        for index in words_made:
            other = rng.integers(len(group))
            beginnings[index], beginnings[other] = beginnings[other], beginnings[index]
    ways = 'add words, or take "recombined" out of KINDS'
    raise Problem(f"{WORDS_FILE}: no way to recombine the words of {name_tokens(tokens)} without making words: {ways}")


def choose_curves(words: dict[str, float], tokenizer: Tokenizer) -> list[Curve]:
    """The curves with their texts. The n-th text of a group ends in the same token in all kinds."""
    strings = [" " + word if LEADING_SPACE else word for word in words]
    encoded = encode(tokenizer, strings)
    all_texts = [Text(word, words[word], ids) for word, ids in zip(words, encoded, strict=True)]
    decoded = set(tokenizer.decode_batch([text.token_ids for text in all_texts]))
    (carrier,) = encode(tokenizer, [CARRIER])
    curves, end = [], 0
    for tokens, group in draw_words(all_texts).items():
        for kind in KINDS:
            texts = group
            if kind == "recombined":
                if tokens == 1:
                    continue
                texts = recombine(group, tokenizer, decoded)
            if kind == "carried":
                if len(carrier) < tokens:
                    raise Problem(f"CARRIER has {name_tokens(len(carrier))}, some words {tokens}: make it longer")
                texts = [text._replace(token_ids=carrier[tokens - 1 :] + text.token_ids) for text in group]
            start, end = end, end + len(texts)
            curves.append(Curve(tokens, kind, texts, slice(start, end), {}))
    if not curves:
        raise Problem("words of 1 token cannot be recombined: add another kind to KINDS, or longer words to GROUPS")
    return curves


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


def unbiased_hsic(left: torch.Tensor, right: torch.Tensor) -> float:
    """The unbiased estimate of HSIC (Song et al. 2012, JMLR 13, equation 5).

    left, right: float64 (texts, texts), kernels whose diagonals are zero.
    """
    count = len(left)
    of_sums = left.sum() * right.sum() / ((count - 1) * (count - 2))
    of_rows = 2 * (left.sum(0) @ right.sum(0)) / (count - 2)
    return ((left * right).sum() + of_sums - of_rows).item() / (count * (count - 3))


def linear_cka(states: torch.Tensor, others: torch.Tensor) -> float:
    """Linear CKA with the unbiased HSIC (Nguyen et al. 2021, arXiv:2010.15327), of two float32 (texts, width).

    NaN where a HSIC in the denominator is not positive.
    """
    kernels = []
    for matrix in (states, others):
        kernel = (matrix @ matrix.T).cpu().double()
        kernels.append(kernel.fill_diagonal_(0))
    own, other = (unbiased_hsic(kernel, kernel) for kernel in kernels)
    return unbiased_hsic(*kernels) / math.sqrt(own * other) if own > 0 and other > 0 else math.nan


def compare(unit: torch.Tensor, final: torch.Tensor, before: torch.Tensor) -> dict[str, torch.Tensor | float]:
    """Compares the unit states of one curve in one layer with those of the final checkpoint and of the one before.

    Each is float32 (texts, width). Returns OF_TEXTS, each float32 (texts,), and OF_CURVES, each a number.
    """
    similarity = (unit * final).sum(-1)
    pairs = unit.sum(0) @ final.sum(0) - similarity.sum()  # the sum over all pairs of different texts
    own, own_final = unit - unit.mean(0), final - final.mean(0)
    return {
        "similarity": similarity.cpu(),
        "stability": (unit * before).sum(-1).cpu(),
        "covariance": (own * own_final).sum(-1).cpu(),
        "variance": (own * own).sum(-1).cpu(),
        "unrelated": pairs.item() / (len(unit) * (len(unit) - 1)),
        "cka": linear_cka(own[:1000], own_final[:1000]),  # centring changes nothing: the estimate ignores common parts
    }


def contribution_of(stores: list[torch.Tensor], curves: list[Curve], device: torch.device) -> dict[str, np.ndarray]:
    """All that a checkpoint contributes, float32: OF_TEXTS (layers + 1, texts), OF_CURVES (layers + 1, curves).

    stores: its unit states, the final ones and those of the checkpoint before, (layers + 1, texts, width) each.
    """
    layers, texts, _ = stores[0].shape
    contribution = {name: np.empty((layers, texts), np.float32) for name in OF_TEXTS}
    contribution |= {name: np.empty((layers, len(curves)), np.float32) for name in OF_CURVES}
    for layer in range(layers):
        for number, curve in enumerate(curves):
            unit, final, before = (store[layer, curve.rows].to(device) for store in stores)
            for name, value in compare(unit, final, before).items():
                place = curve.rows if name in OF_TEXTS else number
                contribution[name][layer, place] = np.asarray(value)
    return contribution


def measure(
    checkpoints: dict[int, Path],
    missing: dict[int, Path],
    sequences: list[tuple[int, ...]],
    curves: list[Curve],
    config: GPTNeoXConfig,
    device: torch.device,
) -> None:
    """Measures the missing checkpoints, {step: file}, and keeps what each contributes as soon as it is known."""
    final = max(checkpoints)
    before = dict(zip(list(checkpoints)[1:], checkpoints, strict=False))
    needed = sorted(set(missing) | {before[step] for step in missing if step in before})
    upcoming = [checkpoints[step] for step in dict.fromkeys([final, *needed])]
    names = [text.word for curve in curves for text in curve.texts]
    trees = prefix_trees(sequences, device)
    model = build_model(config, device)
    shape = (config.num_hidden_layers + 1, len(sequences), config.hidden_size)
    final_states, states, states_before = (make_store(shape, device) for _ in range(3))
    with tqdm(total=len(upcoming) * len(trees), unit="batch", disable=RANK > 0) as progress:
        read_unit_states(model, upcoming, trees, names, final_states, progress)
        for step in needed:
            if step == final:
                states = final_states
            else:
                read_unit_states(model, upcoming, trees, names, states, progress)
            if step in missing:
                contribution = contribution_of([states, final_states, states_before], curves, device)
                if step not in before:
                    contribution["stability"][:] = np.nan
                write_arrays(missing[step], contribution)
            states, states_before = states_before, states


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
    shared = [code, torch.__version__, transformers.__version__, inputs, fingerprints[max(checkpoints)]]
    keys, before = {}, None
    for step in checkpoints:
        parts = json.dumps([*shared, fingerprints[step], before])
        keys[step] = hashlib.sha256(parts.encode()).hexdigest()[:16]
        before = fingerprints[step]
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


def half_way_steps(centred: np.ndarray, steps: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Where a curve last passes half of its way from its first value to 1, linear in log2(1 + step).

    centred: float (1 + resamples, steps, layers + 1). Returns the steps, float (1 + resamples, layers + 1), infinite
    where there are none; and the index of the checkpoint before each, int.
    """
    first = centred[:, :1]
    with np.errstate(invalid="ignore", divide="ignore"):  # the first checkpoint may be a copy of the final one
        progress = (centred - first) / (1 - first)
    upwards = (progress[:, :-1] < 0.5) & (progress[:, 1:] >= 0.5)
    index = len(steps) - 2 - upwards[:, ::-1].argmax(1)  # of the last crossing
    before = np.take_along_axis(progress, index[:, None], 1)[:, 0]
    after = np.take_along_axis(progress, index[:, None] + 1, 1)[:, 0]
    position = np.log2(1 + np.array(steps))
    part = (0.5 - before) / (after - before)
    half_way = 2 ** (position[index] + part * (position[index + 1] - position[index])) - 1
    return np.where(upwards.any(1), half_way, np.inf), index


def tabulate(contributions: dict[str, np.ndarray], number: int, curve: Curve, steps: list[int]) -> None:
    """Fills a curve's table: the columns of convergence.csv, float64 (steps, layers + 1) each, similarity and centred
    with their intervals, (3, steps, layers + 1); the half-way step with its interval, (3, layers + 1), and with all
    resamples, half_ways, (1 + resamples, layers + 1); and the index of the checkpoint before it, (layers + 1,).

    contributions: OF_TEXTS, (steps, layers + 1, texts), and OF_CURVES, (steps, layers + 1, curves).
    """
    weights = resample([text.token_ids[-1] for text in curve.texts], curve.tokens)
    sums = {}  # each (1 + resamples, steps, layers + 1)
    for name in ("similarity", "covariance", "variance"):
        sums[name] = np.tensordot(weights, contributions[name][..., curve.rows], (1, 2))
    counted = weights.sum(1)[:, None, None]
    variance = np.where(sums["variance"] < 1e-8 * counted, np.nan, sums["variance"])  # equal states: rounding errors
    centred = sums["covariance"] / np.sqrt(variance * variance[:, -1:])
    table = curve.table
    table["similarity"], table["centred"] = interval(sums["similarity"] / counted), interval(centred)
    table["stability"] = contributions["stability"][..., curve.rows].mean(-1, dtype=np.float64)
    for name in OF_CURVES:
        table[name] = contributions[name][..., number].astype(np.float64)
    if len(steps) > 1:
        table["half_ways"], index_before = half_way_steps(centred, steps)
        table["half_way"], table["index_before"] = interval(table["half_ways"]), index_before[0]


def find_contrasts(curves: list[Curve]) -> list[Contrast]:
    """Every group against the smallest, carried; and in every group the words against the recombined strings."""
    contrasts = []
    for curve in curves:
        for other in curves:
            longer = curve.kind == other.kind == "carried" and curve.tokens > other.tokens == curves[0].tokens
            words = curve.tokens == other.tokens and (curve.kind, other.kind) == ("word", "recombined")
            if longer or words:
                with np.errstate(invalid="ignore"):
                    ratios = curve.table["half_ways"] / other.table["half_ways"]
                contrasts.append(Contrast(curve, other, interval(np.where(np.isnan(ratios), np.inf, ratios))))
    return contrasts


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


def write_tables(results: Path, steps: list[int], curves: list[Curve], contrasts: list[Contrast]) -> None:
    rows, half_way_rows, contrast_rows, text_rows = [], [], [], []
    for curve in curves:
        label, table = [curve.tokens, curve.kind], curve.table
        for index, layer in np.ndindex(table["cka"].shape):
            row = [*label, len(curve.texts), steps[index], layer]
            for name in ("similarity", "unrelated", "centred", "cka", "stability"):  # with an interval: three columns
                row += table[name][..., index, layer].flatten().tolist()
            rows.append(row)
        for text in curve.texts:
            frequency = "" if math.isnan(text.frequency) else str(text.frequency)
            text_rows.append([*label, text.word, frequency, " ".join(map(str, text.token_ids))])
        if "half_way" in table:
            for layer, index in enumerate(table["index_before"]):
                values = table["half_way"][:, layer]
                bracket = steps[index : index + 2] if np.isfinite(values[0]) else ["", ""]
                half_way_rows.append([*label, len(curve.texts), layer, *values, *bracket])
    for curve, other, ratio in contrasts:
        for layer, values in enumerate(ratio.T):
            contrast_rows.append([curve.tokens, curve.kind, f"{other.tokens} {other.kind}", layer, *values])
    header = "tokens,kind,words,step,layer,similarity,similarity_low,similarity_high,unrelated"
    write_csv(results / "convergence.csv", f"{header},centred,centred_low,centred_high,cka,stability", rows)
    header = "tokens,kind,words,layer,half_way_step,low,high,step_before,step_after"
    write_csv(results / "half_way.csv", header, half_way_rows)
    write_csv(results / "contrasts.csv", "tokens,kind,against,layer,ratio,low,high", contrast_rows)
    write_csv(results / "texts.csv", "tokens,kind,word,frequency,token_ids", text_rows)


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


def draw_half_way(family: str, steps: list[int], curves: list[Curve], contrasts: list[Contrast]) -> Figure:
    """The half-way step against layer, a panel a kind, a line a group; beneath it the contrasts that there are."""
    kinds = [kind for kind in KINDS if any(curve.kind == kind for curve in curves)]
    questions = {
        "carried": "Do words of more tokens settle later?\nAgainst the shortest words, all at one position",
        "word": "Is it because they are words?\nWords against recombined strings",
    }
    asked = [kind for kind in questions if any(contrast.curve.kind == kind for contrast in contrasts)]
    layers = curves[0].table["centred"].shape[-1] - 1
    figure = Figure(figsize=(1.5 + 3.8 * max(len(kinds), 2), 8.5 if asked else 5.5), dpi=150, layout="constrained")
    rows = figure.subfigures(2 if asked else 1, 1, squeeze=False, height_ratios=(3, 2) if asked else None)[:, 0]
    panels = rows[0].subplots(1, len(kinds), squeeze=False, sharex=True, sharey=True)[0]
    styles = group_styles(curves)
    for curve in curves:
        axes = panels[kinds.index(curve.kind)]
        draw_line(axes, range(layers + 1), curve.table["half_way"], styles[curve.tokens])
    for axes, kind in zip(panels, kinds, strict=True):
        axes.hlines(steps, 0, layers, color="grey", linewidth=0.5, alpha=0.6, zorder=0)
        axes.set_title(f"kind: {kind}")
    bounds = np.stack([curve.table["half_way"] for curve in curves])
    bounds = bounds[np.isfinite(bounds)].tolist()
    first = max((step for step in steps if step <= min(bounds, default=0)), default=steps[0])
    last = min((step for step in steps if step >= max(bounds, default=steps[-1])), default=steps[-1])
    scale_steps(panels[0], "y", [step for step in steps if first <= step <= last])
    panels[0].set_ylim(first, last)
    panels[0].set_ylabel("half-way step (thin lines: checkpoints)")
    panels[0].set_xticks(range(0, layers + 1, layers // 8 + 1))
    if asked:
        answers = rows[1].subplots(1, len(asked), squeeze=False, sharex=True, sharey=True)[0]
        for curve, _, ratio in contrasts:
            draw_line(answers[asked.index(curve.kind)], range(layers + 1), ratio, styles[curve.tokens])
        for axes, kind in zip(answers, asked, strict=True):
            axes.axhline(1, color="black", linewidth=0.8)
            axes.set_title(questions[kind], fontsize="medium")
            axes.grid(alpha=0.3)
        answers[0].set_yscale("log")
        answers[0].yaxis.set_major_locator(MaxNLocator(6))
        answers[0].yaxis.set_major_formatter("{x:g}")
        answers[0].yaxis.set_minor_formatter("")
        answers[0].set_ylabel("ratio of half-way steps")
        answers[0].set_xticks(range(0, layers + 1, layers // 8 + 1))
    rows[-1].supxlabel(name_layer(layers), fontsize="medium")
    title = f"{family}\nthe training step at which words have come halfway to their final representation"
    figure.suptitle(title, parse_math=False)
    handles = [Line2D([], [], **style) for style in styles.values()]
    handles.append(Patch(color="grey", alpha=0.3, linewidth=0, label="95 % interval over last tokens"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def draw_layer(family: str, steps: list[int], curves: list[Curve], layer: int) -> Figure:
    """One layer, every group: centred, similarity with its floor, and stability against step; a column a kind."""
    kinds = [kind for kind in KINDS if any(curve.kind == kind for curve in curves)]
    layers = curves[0].table["centred"].shape[-1] - 1
    width = 2 + 4.2 * len(kinds)
    figure = Figure(figsize=(width, 8.5), dpi=100)
    grid = {"left": 1 / width, "right": 1 - 0.2 / width, "bottom": 0.12, "top": 0.91}
    grid |= {"hspace": 0.1, "wspace": 0.06, "height_ratios": (3, 3, 2)}
    panels = figure.subplots(3, len(kinds), squeeze=False, sharex=True, sharey="row", gridspec_kw=grid)
    styles = group_styles(curves)
    for curve in curves:
        style, column = styles[curve.tokens], panels[:, kinds.index(curve.kind)]
        draw_line(column[0], steps, curve.table["centred"][..., layer], style)
        draw_line(column[1], steps, curve.table["similarity"][..., layer], style)
        column[1].plot(steps, curve.table["unrelated"][:, layer], color=style["color"], linestyle="--", linewidth=1)
        column[2].plot(steps, curve.table["stability"][:, layer], **style)
        column[0].set_title(f"kind: {curve.kind}", y=1)  # looking for a free y takes time
        column[2].set_xlabel("training step")
    panels[0, 0].set_ylabel("centred: correlation\nwith the final checkpoint")
    panels[1, 0].set_ylabel("similarity: cosine\nto the final checkpoint")
    panels[2, 0].set_ylabel("stability: cosine\nto the checkpoint before")
    for axes in panels.flat:
        axes.grid(alpha=0.3)
    scale_steps(panels[2, 0], "x", steps)
    place = {0: " (token embedding)", layers: " (after the final LayerNorm)"}.get(layer, "")
    figure.suptitle(f"{family}: layer {layer} of {layers}{place}, towards step {steps[-1]}", parse_math=False)
    handles = [Line2D([], [], **style) for style in styles.values()]
    handles.append(Line2D([], [], color="grey", linestyle="--", linewidth=1, label="unrelated texts (floor)"))
    handles.append(Patch(color="grey", alpha=0.3, linewidth=0, label="95 % interval over last tokens"))
    figure.legend(handles=handles, loc="lower center", ncols=min(len(handles), 3 * len(kinds)))
    return figure


def draw_group(family: str, steps: list[int], curve: Curve) -> Figure:
    """One group: centred and similarity against step, a line a layer."""
    layers = curve.table["centred"].shape[-1] - 1
    colours = colormaps["viridis"].resampled(layers + 1)
    labels = {"centred": "correlation with the final checkpoint", "similarity": "cosine to the final checkpoint"}
    figure = Figure(figsize=(12, 5), dpi=110, layout="constrained")
    panels = figure.subplots(1, 2, sharex=True)
    for axes, (name, label) in zip(panels, labels.items(), strict=True):
        for layer in range(layers + 1):
            axes.plot(steps, curve.table[name][0, :, layer], marker=".", color=colours(layer))
        axes.grid(alpha=0.3)
        axes.set_xlabel("training step")
        axes.set_ylabel(f"{name}: {label}")
    scale_steps(panels[0], "x", steps)
    title = f"{family}: {len(curve.texts)} words of {name_tokens(curve.tokens)}, towards step {steps[-1]}"
    figure.suptitle(f"{title} (kind: {curve.kind})", parse_math=False)
    scale = ScalarMappable(BoundaryNorm(np.arange(-0.5, layers + 1), layers + 1), colours)
    figure.colorbar(scale, ax=panels, ticks=range(0, layers + 1, layers // 10 + 1), label=name_layer(layers))
    return figure


def draw_overview(family: str, steps: list[int], curves: list[Curve]) -> Figure:
    """Centred of each group as a heat map of layers by steps."""
    layers = curves[0].table["centred"].shape[-1] - 1
    figure = Figure(figsize=(2 + 3.5 * len(curves), 5), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False, sharex=True, sharey=True)[0]
    lowest = min(0, *(np.nanmin(curve.table["centred"][0]) for curve in curves))
    for axes, curve in zip(panels, curves, strict=True):
        image = axes.imshow(curve.table["centred"][0].T, vmin=lowest, vmax=1, origin="lower", aspect="auto")
        axes.set_title(f"{name_tokens(curve.tokens)} ({len(curve.texts)} words)")
    labelled = range(len(steps) - 1, -1, -(len(steps) // 9 + 1))
    panels[0].set_xticks(labelled, [name_step(steps[index]) for index in labelled])
    panels[0].set_yticks(range(0, layers + 1, layers // 10 + 1))
    figure.supxlabel("training step", fontsize="medium")
    figure.supylabel(name_layer(layers), fontsize="medium")
    figure.colorbar(image, ax=panels, label="centred: correlation with the final checkpoint")
    figure.suptitle(f"{family}: centred, towards step {steps[-1]} (kind: {curves[0].kind})", parse_math=False)
    return figure


def draw_figures(results: Path, steps: list[int], curves: list[Curve], contrasts: list[Contrast]) -> list[str]:
    """Draws all figures. Returns the names of their files."""
    family = printable(results.name)
    kinds = {curve.kind for curve in curves}
    shown = [curve for curve in curves if curve.kind == ("word" if "word" in kinds else curves[0].kind)]
    figures = {"overview.png": partial(draw_overview, family, steps, shown)}
    if len(steps) > 1:
        figures["half_way.png"] = partial(draw_half_way, family, steps, curves, contrasts)
    for layer in range(curves[0].table["centred"].shape[-1]):
        figures[f"layer_{layer:02d}.png"] = partial(draw_layer, family, steps, curves, layer)
    for curve in shown:
        figures[f"group_{curve.tokens}_tokens.png"] = partial(draw_group, family, steps, curve)
    for name, draw in tqdm(figures.items(), desc="figures", unit="figure"):
        with written_whole(results / name, "xb") as stream:
            draw().savefig(stream)
    return list(figures)


def say_answer(curves: list[Curve], contrasts: list[Contrast]) -> None:
    """Says the half-way steps in the first, the middle and the last layer, and the contrasts in the middle."""
    layers = curves[0].table["centred"].shape[-1] - 1
    middle = (layers + 1) // 2
    shown = sorted({0, middle, layers})
    say("half-way step [95 % interval]" + "".join(f"{f'layer {layer}':>24}" for layer in shown))
    for curve in curves:
        line = f"  {name_tokens(curve.tokens):9} {curve.kind:17}"
        for layer in shown:
            half_way, low, high = curve.table["half_way"][:, layer]
            cell = f"{half_way:.0f} [{low:.0f}, {high:.0f}]" if np.isfinite(half_way) else "none"
            line += f"{cell:>24}"
        say(line)
    if contrasts:
        say(f"ratio of half-way steps [95 % interval] in layer {middle}")
    for curve, other, ratio in contrasts:
        estimate, low, high = ratio[:, middle]
        verdict = "no difference shown"
        if low > 1:
            verdict = "later"
        elif high < 1:
            verdict = "earlier"
        elif np.isnan([low, high]).any():
            verdict = "no interval"
        names = f"{name_tokens(curve.tokens)} {curve.kind} over {name_tokens(other.tokens)} {other.kind}"
        say(f"  {names:40} {estimate:.2f} [{low:.2f}, {high:.2f}]: {verdict}")


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
    curves = choose_curves(read_words(), tokenizer)
    texts = [text for curve in curves for text in curve.texts]
    start = (tokenizer.token_to_id(BOS),) if PREPEND_BOS else ()
    sequences = [start + text.token_ids for text in texts]
    longest, positions = max(sequences, key=len), config.max_position_embeddings
    if len(longest) > positions:
        fault = f"{tokenizer.decode(longest)!r:.60} has {len(longest)} tokens, the model {positions} positions"
        raise Problem(f"{fault}: change GROUPS or CARRIER")
    results, earlier_figures = open_results(family)

    steps = list(checkpoints)
    shapes = dict.fromkeys(OF_TEXTS, (config.num_hidden_layers + 1, len(texts)))
    shapes |= dict.fromkeys(OF_CURVES, (config.num_hidden_layers + 1, len(curves)))
    labels = [(curve.tokens, curve.kind, len(curve.texts)) for curve in curves]
    inputs = [labels, sequences, DTYPE, device.type, BATCH_TOKENS, config.to_json_string()]
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
    groups = {curve.tokens: len(curve.texts) for curve in curves}
    frequencies = [text.frequency for text in texts if not math.isnan(text.frequency)] or [math.nan]
    say(f"words    {', '.join(f'{count} of {name_tokens(tokens)}' for tokens, count in groups.items())}")
    say(f"texts    {len(texts)}, kinds {', '.join(KINDS)}, frequencies {min(frequencies):g} to {max(frequencies):g}")
    say(f"device   {device}, {DTYPE}" + (f", {RANKS} ranks" if RANKS > 1 else ""))
    # neighbours to a rank, since stability needs the checkpoint before
    share = dict(np.array_split(list(missing.items()), RANKS)[RANK])
    if share:
        measure(checkpoints, share, sequences, curves, config, device)
    if RANKS > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if RANK > 0:
        return

    kept = [read_kept(file, shapes) for file in files.values()]
    if None in kept:
        raise Problem(f"{results / 'kept'} changed during the run: run again")
    contributions = {name: np.stack([contribution[name] for contribution in kept]) for name in shapes}
    warn_of_copies(steps, contributions["similarity"])
    for number, curve in enumerate(curves):
        tabulate(contributions, number, curve, steps)
    contrasts = find_contrasts(curves) if len(steps) > 1 else []
    write_tables(results, steps, curves, contrasts)
    tokens, kinds, counts = zip(*labels, strict=True)
    arrays = {"words": [text.word for text in texts], "tokens": np.repeat(tokens, counts)}
    arrays |= {"kind": np.repeat(kinds, counts), "frequency": [float(text.frequency) for text in texts]}
    arrays |= {"steps": steps, "similarity": contributions["similarity"]}
    write_arrays(results / "similarities.npz", arrays)
    figures = draw_figures(results, steps, curves, contrasts)
    for name in set(earlier_figures) - set(figures):
        (results / name).unlink(missing_ok=True)
    record_run(results, family, figures)
    if len(steps) > 1:
        say_answer(curves, contrasts)
    else:
        warn("a family of one checkpoint has no half-way steps")
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
            problem += "; lower BATCH_TOKENS, WORDS_PER_GROUP or BOOTSTRAP_RESAMPLES; what was measured is kept"
        print(f"error: {plain(problem)}", file=sys.stderr)
        sys.exit(2)

"""Follows words of one and of several tokens, layer by layer, towards their hidden states in the final model.

Run as `python token_convergence_analysis.py [FAMILY]`. FAMILY is a folder with a sub-folder for each training
step (step0, step512 ... step143000) that holds a GPT-NeoX checkpoint; without it CHECKPOINTS_DIR is analysed.
On several GPUs, `torchrun --nproc-per-node=4 token_convergence_analysis.py [FAMILY]` shares the checkpoints
out; on a CPU set OMP_NUM_THREADS, which torchrun otherwise sets to 1 for each process.

A word is read after one <|endoftext|>, with a leading space, and its hidden state is taken at its last token.
For each checkpoint and layer, over the words with the same number of tokens, the script measures
    similarity  the mean cosine between a word's hidden state and its hidden state in the final checkpoint,
                with a 95 % bootstrap interval over words;
    unrelated   the mean cosine between a word's hidden state and those of the other words in the final
                checkpoint: the floor that anisotropy alone gives (Ethayarajh 2019, arXiv:1909.00512);
    stability   the mean cosine between a word's hidden state and its hidden state in the checkpoint before.
Layer 0 is the token embedding; the last layer is taken after the final LayerNorm, as transformers returns it.

RESULTS_DIR/<name of FAMILY>/ then holds convergence.csv, similarities.npz, overview.png, group_<n>_tokens.png,
layer_<ll>.png, and kept/: what each checkpoint contributed, from which a run that was cut short goes on.
"""

import argparse
import csv
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from itertools import cycle
from pathlib import Path
from threading import Thread
from typing import NoReturn

import numpy as np
import torch
import torch.distributed
import transformers
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
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
GROUPS = (1, 2, 3, 4)  # numbers of tokens; a group is the words with one of them
WORDS_PER_GROUP = 500  # words drawn at random from a group; None = all
MIN_GROUP_SIZE = 10  # words; a smaller group is left out
LEADING_SPACE = True  # tokenize a word as it stands in running text
PREPEND_BOS = True  # read it after <|endoftext|>, away from the attention sink at position 0
# model
DTYPE = "float32"  # of linear layers and attention: "float32", "bfloat16", "float16"; the residual stream is float32
# bfloat16 moved means by less than 0.001 and single similarities by less than 0.006 on the miniature
DEVICE = "auto"  # "auto" (cuda, else mps, else cpu), "cpu", "cuda", "cuda:1" or "mps"
BATCH_TOKENS = 256  # tokens in a forward pass, at most; a longer text has one of its own
# statistics
SEED = 0  # of the draw of words and of the bootstrap
BOOTSTRAP_RESAMPLES = 1000  # resamples of the words behind an interval
# ------------------------------------------------------------------------------

HERE = Path(__file__).resolve().parent
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
BOS = "<|endoftext|>"
CURVES = ("similarity", "ci_low", "ci_high", "unrelated", "stability")  # what is known of a group, step and layer
ARCHITECTURE = (  # the attributes of GPTNeoXConfig that all checkpoints of a family share
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
    *("layer_norm_eps", "max_position_embeddings", "rope_parameters", "use_parallel_residual", "attention_bias"),
)


def fail(message: str) -> NoReturn:
    """Ends the run with one line on standard error that says what is wrong, where, and what to do."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def warn(message: str) -> None:
    if RANK == 0:
        print(f"warning: {message}", file=sys.stderr)


def say(message: str) -> None:
    if RANK == 0:
        print(message, flush=True)


def one_line(error: Exception) -> str:
    text = f"found no {error}" if isinstance(error, KeyError) else str(error)
    return " ".join(text.split())[:300] or type(error).__name__


def is_text(value: object) -> bool:
    """Whether a value is a string that is not blank, has no NUL, and can be written as UTF-8."""
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        return False
    return value == value.encode("utf-8", "ignore").decode("utf-8")


def check_settings() -> None:
    """Ends the run at the first setting that makes no sense."""

    def is_whole(value: object, least: int) -> bool:
        return type(value) is int and value >= least

    groups_right = isinstance(GROUPS, tuple | list) and GROUPS and all(is_whole(length, 1) for length in GROUPS)
    resamples_right = is_whole(BOOTSTRAP_RESAMPLES, 1) and BOOTSTRAP_RESAMPLES <= 100_000
    for name, right, expected in (
        ("CHECKPOINTS_DIR", is_text(CHECKPOINTS_DIR), "the name of a folder"),
        ("RESULTS_DIR", is_text(RESULTS_DIR), "the name of a folder"),
        ("WORDS_FILE", is_text(WORDS_FILE), "the name of a file"),
        ("GROUPS", groups_right, "numbers of tokens, such as (1, 2, 3, 4)"),
        ("WORDS_PER_GROUP", WORDS_PER_GROUP is None or is_whole(WORDS_PER_GROUP, 2), "None or a number of at least 2"),
        ("MIN_GROUP_SIZE", is_whole(MIN_GROUP_SIZE, 2), "a number of at least 2"),
        ("LEADING_SPACE", type(LEADING_SPACE) is bool, "True or False"),
        ("PREPEND_BOS", type(PREPEND_BOS) is bool, "True or False"),
        ("DTYPE", DTYPE in ("float32", "bfloat16", "float16"), '"float32", "bfloat16" or "float16"'),
        ("DEVICE", is_text(DEVICE), '"auto", "cpu", "cuda", "cuda:1" or "mps"'),
        ("BATCH_TOKENS", is_whole(BATCH_TOKENS, 1), "a number of at least 1"),
        ("SEED", is_whole(SEED, 0), "a number of at least 0"),
        ("BOOTSTRAP_RESAMPLES", resamples_right, "a number from 1 to 100000"),
    ):
        if not right:
            fail(f"{name} = {globals()[name]!r} at the top of {Path(__file__).name}: expected {expected}")


def choose_device() -> torch.device:
    name = DEVICE
    if DEVICE == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and RANKS > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        fewer = ", or start fewer ranks" * (RANKS > 1)
        fail(f'DEVICE = {DEVICE!r}: {name} cannot be used here ({one_line(error)}): set it to "cpu"{fewer}')
    if device.type not in ("cuda", "mps", "cpu"):
        fail(f'DEVICE = {DEVICE!r}: expected "auto", "cpu", "cuda", "cuda:1" or "mps"')
    return device


def find_family(name: str) -> Path:
    """The folder of a family, named from where the script was started or from beside it."""
    for folder in (Path(name), HERE / name):
        if folder.is_dir():
            return folder.resolve()
    fail(
        f"there is no folder {HERE / name}: fetch Pythia-1B with `python download_checkpoints.py`, or train "
        "a miniature with `python tests/miniature.py` and name its folder, miniature_checkpoints"
    )


def find_checkpoints(family: Path) -> dict[int, Path]:
    """The checkpoints of a family by training step, in ascending order."""
    matches = (re.fullmatch("step(0|[1-9][0-9]{0,11})", folder.name) for folder in family.iterdir() if folder.is_dir())
    steps = sorted(int(match[1]) for match in matches if match)
    if not steps:
        fail(f"{family} holds no checkpoint: expected a folder for each training step, such as step0 and step512")
    return {step: family / f"step{step}" for step in steps}


def read_json(file: Path, expected: str) -> dict:
    """The object that a JSON file holds; an empty one is an error too."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        fail(f"{file} cannot be read ({error.strerror}): expected {expected}")
    except json.JSONDecodeError as error:
        fail(f"{file}, line {error.lineno}: not JSON ({error.msg}); expected {expected}")
    except (ValueError, RecursionError) as error:
        fail(f"{file}: not JSON ({one_line(error)}); expected {expected}")
    if not isinstance(content, dict) or not content:
        found = "an empty object" if content == {} else f"a {type(content).__name__}"
        fail(f"{file}, line 1: found {found}, expected {expected}")
    return content


def read_words() -> list[str]:
    """The words of WORDS_FILE in its order."""
    file = HERE / WORDS_FILE
    words = read_json(file, 'an object {"word": frequency, ...}')

    def is_usable(word: str, frequency: object) -> bool:
        return is_text(word) and word.split() == [word] and type(frequency) in (int, float)

    unusable = [f"{word!r}: {frequency!r:.40}" for word, frequency in words.items() if not is_usable(word, frequency)]
    if unusable:
        more = f" and {len(unusable) - 5} more" if len(unusable) > 5 else ""
        fail(f"{file}: expected words without white space and their frequencies, found {', '.join(unusable[:5])}{more}")
    return list(words)


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Puts the name of a file in front of whatever error its reader raises."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{file.name}: {one_line(error)}") from error


def read_config(folder: Path) -> GPTNeoXConfig:
    """The configuration of a checkpoint. Raises ValueError if it is not one of a GPT-NeoX model."""
    with naming(folder / "config.json"):
        model_type = dict(json.loads((folder / "config.json").read_text(encoding="utf-8"))).get("model_type")
        if model_type != "gpt_neox":
            raise ValueError(f"the architecture is {model_type}, expected gpt_neox")
        return GPTNeoXConfig.from_pretrained(folder)


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint, which neither pads nor cuts. Raises ValueError if it cannot be used."""
    with naming(folder / "tokenizer.json"):
        tokenizer = Tokenizer.from_buffer((folder / "tokenizer.json").read_bytes())
        if PREPEND_BOS and tokenizer.token_to_id(BOS) is None:
            raise ValueError(f"there is no token {BOS}; set PREPEND_BOS = False")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def read_final(folder: Path) -> tuple[GPTNeoXConfig, Tokenizer]:
    """Configuration and tokenizer of the final checkpoint, which the others have to share."""
    try:
        return read_config(folder), read_tokenizer(folder)
    except Exception as error:  # whatever the readers raise, there is nothing to compare with
        fail(f"fetch or train again, or remove, what cannot be used: {folder}: {one_line(error)}")


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a checkpoint, one or shards: safetensors where there are, else pickled."""
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    name = next((name for name in names if (folder / name).is_file()), None)
    if name is None:
        raise FileNotFoundError(f"it has no weights, expected {names[0]} or {names[2]}")
    if name.endswith(".index.json"):
        with naming(folder / name):
            shards = json.loads((folder / name).read_text(encoding="utf-8"))["weight_map"].values()
            return [folder / shard for shard in sorted(set(shards))]
    return [folder / name]


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint in the type that they are stored in, under their names in the base model.

    They are mapped into memory: nothing is read from disk before it is used.
    """
    weights = {}
    for file in weight_files(folder):
        with naming(file):
            if file.suffix == ".safetensors":
                weights |= load_file(file)
            else:
                weights |= torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    return {name.removeprefix("gpt_neox."): tensor for name, tensor in weights.items()}


def read_ahead(folders: list[Path]) -> None:
    """Reads the weights of checkpoints once, so that the operating system has them in memory when they are loaded."""
    with suppress(OSError, ValueError):  # what is wrong with a file is said when it is loaded
        for file in (file for folder in folders for file in weight_files(folder)):
            with file.open("rb") as stream:
                while stream.read(2**24):
                    pass


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[tuple[int, ...]]:
    """The token ids of each text as it is read, after <|endoftext|> where PREPEND_BOS says so."""
    start = (tokenizer.token_to_id(BOS),) if PREPEND_BOS else ()
    return [start + tuple(encoding.ids) for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]


def tokens_name(length: int) -> str:
    return "1 token" if length == 1 else f"{length} tokens"


def draw_words(
    words: list[str], tokenizer: Tokenizer, config: GPTNeoXConfig
) -> tuple[list[str], list[str], list[tuple[int, ...]], np.ndarray]:
    """Draws the words of each group. Returns words, texts as the model reads them, token ids, int (words,) lengths.

    They are sorted by token ids, so that words with a common prefix are neighbours. A length is a word's number of
    tokens, without <|endoftext|>.
    """
    groups = defaultdict(list)
    texts = [" " * LEADING_SPACE + word for word in words]
    for sequence, text, word in zip(encode(tokenizer, texts), texts, words, strict=True):
        groups[len(sequence) - PREPEND_BOS].append((sequence, text, word))
    drawn = []
    for length in sorted(set(GROUPS)):
        group = groups[length]
        if len(group) < MIN_GROUP_SIZE:
            warn(f"{WORDS_FILE} has {len(group)} words of {tokens_name(length)}, fewer than MIN_GROUP_SIZE: left out")
            continue
        if length + PREPEND_BOS > config.max_position_embeddings:
            fail(f"words of {tokens_name(length)} do not fit {config.max_position_embeddings} positions: change GROUPS")
        if WORDS_PER_GROUP is not None and len(group) > WORDS_PER_GROUP:
            chosen = np.random.default_rng([SEED, length]).choice(len(group), WORDS_PER_GROUP, replace=False)
            group = [group[index] for index in chosen]
        drawn += group
    if not drawn:
        fail(f"{HERE / WORDS_FILE}: no group has MIN_GROUP_SIZE = {MIN_GROUP_SIZE} words; lower it or add words")
    sequences, texts, words = map(list, zip(*sorted(drawn), strict=True))
    return words, texts, sequences, np.array([len(sequence) - PREPEND_BOS for sequence in sequences])


def check_checkpoint(
    folder: Path, final: Path, config: GPTNeoXConfig, texts: list[str], sequences: list[tuple[int, ...]]
) -> str:
    """Checks that a checkpoint is whole and of the final one's kind, or raises an exception that says why not.

    Returns a digest of one row of weights: checkpoints with different digests carry different weights.
    """
    own_config = read_config(folder)
    for name in ARCHITECTURE:
        own, expected = getattr(own_config, name), getattr(config, name)
        if own != expected:
            raise ValueError(f"its {name} is {own}, that of {final.name} {expected}")
    if (folder / "tokenizer.json").read_bytes() != (final / "tokenizer.json").read_bytes():
        for text, own, expected in zip(texts, encode(read_tokenizer(folder), texts), sequences, strict=True):
            if own != expected:
                raise ValueError(f"its tokenizer reads {text!r} as {own}, that of {final.name} as {expected}")
    weights = read_weights(folder)
    if not 0 < config.num_hidden_layers <= len(weights):  # said here, since to build such a model might take for ever
        raise ValueError(f"its config has {config.num_hidden_layers} layers, its weights {len(weights)} tensors")
    with torch.device("meta"):
        parameters = dict(GPTNeoXModel(config).named_parameters())
    for name, parameter in parameters.items():
        tensor = weights.get(name)
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"its weights lack the tensor {name}")
        if tensor.shape != parameter.shape or not tensor.is_floating_point():
            found = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"its tensor {name} is {found}, expected floating point {tuple(parameter.shape)}")
    row = weights["layers.0.attention.query_key_value.weight"][0].float()
    return hashlib.sha256(row.numpy().tobytes()).hexdigest()


def same_weights(folder: Path, other: Path) -> bool:
    weights, others = read_weights(folder), read_weights(other)
    return all(torch.equal(weights[name].float(), others[name].float()) for name in weights.keys() & others.keys())


def check_checkpoints(
    checkpoints: dict[int, Path], config: GPTNeoXConfig, texts: list[str], sequences: list[tuple[int, ...]]
) -> None:
    """Stops if a checkpoint cannot be used, and warns of checkpoints that carry the same weights."""
    final = checkpoints[max(checkpoints)]
    for text, sequence in zip(texts, sequences, strict=True):
        if max(sequence) >= config.vocab_size:
            fail(
                f"{final}: its tokenizer reads {text!r} as {sequence}, its model knows {config.vocab_size} tokens only"
            )
    unusable, steps_by_digest = [], defaultdict(list)
    for step, folder in tqdm(checkpoints.items(), desc="checking", unit="checkpoint", leave=False, disable=RANK > 0):
        try:
            steps_by_digest[check_checkpoint(folder, final, config, texts, sequences)].append(step)
        except Exception as error:  # whatever the readers raise, the checkpoint cannot be used
            unusable.append(f"{folder}: {one_line(error)}")
    if unusable:
        fail(f"fetch or train again, or remove, what cannot be used: {'; '.join(unusable)}")
    if RANK > 0:  # one process compares whole files, and warns
        return
    for first, *others in steps_by_digest.values():
        same = [first, *(step for step in others if same_weights(checkpoints[first], checkpoints[step]))]
        if len(same) > 1:
            warn(f"steps {', '.join(map(str, same))} have identical weights: the curves stand still between them")


def prefix_trees(
    sequences: list[tuple[int, ...]], device: torch.device
) -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Packs sorted token sequences into prefix trees, in which every distinct prefix stands once.

    A causal model's hidden state depends on the prefix alone. So the nodes of a tree are put in one input
    sequence, where each attends to its ancestors and itself, and its position is its depth. A tree ends before
    it grows beyond BATCH_TOKENS nodes, unless one sequence is longer; the next repeats only the ancestors that both
    need.

    Returns for each tree the model's inputs, input_ids and position_ids, int (1, nodes), and attention_mask, bool
    (1, 1, nodes, nodes); and int (sequences of the tree,) last: the node at which each sequence ends.
    """
    trees, previous, path = [], (), []
    for sequence in sequences:
        shared = 0
        while shared < min(len(previous), len(sequence)) and previous[shared] == sequence[shared]:
            shared += 1
        if not trees or len(trees[-1][0]) + len(sequence) - shared > BATCH_TOKENS:
            tokens, paths, last = [], [], []
            trees.append((tokens, paths, last))
            shared = 0
        path = path[:shared]
        for token in sequence[shared:]:
            path = [*path, len(tokens)]
            tokens.append(token)
            paths.append(path)
        last.append(path[-1])
        previous = sequence

    def tensors(
        tokens: list[int], paths: list[list[int]], last: list[int]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        mask = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
        for node, path in enumerate(paths):
            mask[node, path] = True
        inputs = {
            "input_ids": torch.tensor([tokens]),
            "position_ids": torch.tensor([[len(path) - 1 for path in paths]]),
            "attention_mask": mask[None, None],
        }
        return {name: tensor.to(device) for name, tensor in inputs.items()}, torch.tensor(last, device=device)

    return [tensors(*tree) for tree in trees]


def onednn_linear(layer: torch.nn.Linear, states: torch.Tensor, activation: str = "none") -> torch.Tensor:
    """A linear layer in float32 by oneDNN, on AMD CPUs about twice as fast as by MKL, which torch takes otherwise."""
    return torch.ops.mkldnn._linear_pointwise(states, layer.weight, layer.bias, activation, [], "none")


def onednn_mlp(mlp: torch.nn.Module, states: torch.Tensor) -> torch.Tensor:
    """The two linear layers of a block's MLP, with the GELU between them, which oneDNN applies as it multiplies."""
    return mlp.dense_4h_to_h(onednn_linear(mlp.dense_h_to_4h, states, "gelu"))


def build_model(folder: Path, device: torch.device) -> GPTNeoXModel:
    """The base model, without its head. Its blocks compute in DTYPE; the residual stream stays in float32."""
    model = GPTNeoXModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").to(device).eval()
    linear_layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    for layer in linear_layers:
        layer.to(getattr(torch, DTYPE))
    if DTYPE == "float32" and device.type == "cpu" and torch.backends.mkldnn.is_available():
        for layer in linear_layers:
            layer.forward = partial(onednn_linear, layer)
        if model.config.hidden_act == "gelu":
            for block in model.layers:
                block.mlp.forward = partial(onednn_mlp, block.mlp)
    return model


def load_weights(model: GPTNeoXModel, folder: Path) -> None:
    """Overwrites the weights of the model by those of a checkpoint, in place: fresh memory would cost more time."""
    weights = read_weights(folder)
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name].to(parameter.device))


def unit_states(
    model: GPTNeoXModel,
    folders: list[Path],
    trees: list[tuple[dict[str, torch.Tensor], torch.Tensor]],
    texts: list[str],
    progress: tqdm,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yields the hidden states of the checkpoint in folders[0] at the last token of each text, scaled to unit length.

    Tree by tree: the rows of its texts, and their states, float32 (texts of the tree, layers + 1, width).
    Meanwhile the weights in the other folders, those that are needed next, are read from disk.
    """
    load_weights(model, folders[0])
    Thread(target=read_ahead, args=[folders[1:]], daemon=True).start()
    stop = 0
    for inputs, last in trees:
        start, stop = stop, stop + len(last)
        with torch.autocast(model.device.type, getattr(torch, DTYPE), enabled=DTYPE != "float32"):
            hidden_states = model(**inputs, use_cache=False, output_hidden_states=True).hidden_states
        states = torch.stack([layer[0, last] for layer in hidden_states]).float()
        norms = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
        wrong = ~(norms.isfinite() & (norms > 0))
        if wrong.any():
            layer, row, _ = wrong.nonzero()[0].tolist()  # in the lowest layer: higher up it spreads to all texts
            progress.close()
            where, text = f"{folders[0].name}, layer {layer}", texts[start + row][-60:]
            remedy = f'fetch {folders[0]} again, or set DTYPE = "float32"'
            fail(f"{where}: the hidden state of {text!r} is not finite, or zero; {remedy}")
        yield slice(start, stop), (states / norms).transpose(0, 1)
        progress.update()


def state_store(shape: tuple[int, int, int], folder: Path, device: torch.device) -> torch.Tensor:
    """Room for the hidden states of a checkpoint; on a CPU in a temporary file, so that memory does not grow."""
    if device.type != "cpu":
        return torch.empty(shape, device=device)
    needed, free = 4 * int(np.prod(shape)), shutil.disk_usage(folder).free
    if needed > free:
        fail(f"{folder}: the hidden states take {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB of disk are free: make room")
    file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (the memory map outlives this function)
    row = bytes(4 * shape[1] * shape[2])
    for _ in range(shape[0]):
        file.write(row)  # a full disk is an error here; met later, through the memory map, it would kill the process
    return torch.from_numpy(np.memmap(file, np.float32, "r+", shape=shape))


def measure(
    checkpoints: dict[int, Path],
    missing: dict[int, str],
    kept: Path,
    texts: list[str],
    sequences: list[tuple[int, ...]],
    lengths: np.ndarray,
    device: torch.device,
) -> None:
    """Measures the missing checkpoints (step: key), and keeps what each contributes as soon as it is known."""
    final = max(checkpoints)
    before = dict(zip(list(checkpoints)[1:], checkpoints, strict=False))
    passes = [final]  # the final checkpoint first, then in ascending order; each needs the states of the one before
    for step in missing:
        if step in before and before[step] not in missing:
            passes.append(before[step])
        if step != final:
            passes.append(step)
    trees = prefix_trees(sequences, device)
    model = build_model(checkpoints[passes[0]], device)
    shape = (len(texts), model.config.num_hidden_layers + 1, model.config.hidden_size)
    final_states, previous_states = (state_store(shape, kept, device) for _ in range(2))
    members = torch.from_numpy(lengths == np.unique(lengths)[:, None]).float().to(device)  # (groups, words)
    count = members.sum(1, keepdim=True).cpu().double()

    def group_sums(rows: slice, states: torch.Tensor) -> torch.Tensor:
        return torch.einsum("gw,wld->gld", members[:, rows], states).cpu().double()

    def compare(step: int, blocks: Iterable[tuple[slice, torch.Tensor]]) -> None:
        similarity, stability, sums = torch.empty(shape[:2]), torch.full(shape[:2], torch.nan), 0
        for rows, states in blocks:
            similarity[rows] = (states * final_states[rows]).sum(-1).cpu()
            if step in before:
                stability[rows] = (states * previous_states[rows]).sum(-1).cpu()
            sums += group_sums(rows, states)
            previous_states[rows] = states
        if step in missing:
            # the sum over all pairs of words is the product of the sums, less each word's pair with itself
            self_pairs = members.cpu().double() @ similarity.double()
            unrelated = ((sums * final_sums).sum(-1) - self_pairs) / (count * (count - 1))
            arrays = {"similarity": similarity.T, "stability": stability.T, "unrelated": unrelated}
            write_arrays(kept / f"step{step}.npz", key=missing[step], **arrays)

    final_sums, all_rows = 0, []
    with tqdm(total=len(passes) * len(trees), unit="batch", disable=RANK > 0) as progress:
        for index, step in enumerate(passes):
            progress.set_description(f"checkpoint {index + 1} of {len(passes)}, step {step}")
            folders = [checkpoints[step] for step in passes[index : index + 2]]
            blocks = unit_states(model, folders, trees, texts, progress)
            if step == final:
                for rows, states in blocks:
                    final_states[rows] = states
                    final_sums += group_sums(rows, states)
                    all_rows.append(rows)
            else:
                compare(step, blocks)
    if final in missing:
        compare(final, ((rows, final_states[rows]) for rows in all_rows))


def fingerprint(folder: Path) -> list:
    """What changes when the files of a checkpoint change."""
    files = [folder / "config.json", *weight_files(folder)]
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def contribution_keys(checkpoints: dict[int, Path], inputs: list) -> dict[int, str]:
    """For each step, a digest of all that its contribution depends on."""
    prints = {step: fingerprint(folder) for step, folder in checkpoints.items()}
    final, before = max(checkpoints), dict(zip(list(checkpoints)[1:], checkpoints, strict=False))
    parts = {step: [inputs, prints[step], prints.get(before.get(step)), prints[final]] for step in checkpoints}
    return {step: hashlib.sha256(json.dumps(part).encode()).hexdigest() for step, part in parts.items()}


def write_arrays(file: Path, **arrays: object) -> None:
    """Writes arrays to a file that appears under its name only when it is whole."""
    partial_file = file.with_name(f".{file.name}.partial")
    with partial_file.open("wb") as stream:
        np.savez(stream, **arrays)
    partial_file.replace(file)


def read_kept(file: Path, key: str) -> dict[str, np.ndarray] | None:
    """What a checkpoint contributed, or None if that is not known for this key."""
    try:
        with np.load(file) as arrays:
            return dict(arrays) if arrays["key"] == key else None
    except Exception:  # whatever the reader raises, the file holds nothing that can be used
        return None


def bootstrap_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % percentile interval of the mean over the first axis (Efron 1979, doi:10.1214/aos/1176344552)."""
    random = np.random.default_rng(SEED)
    count = len(values)
    draws = (np.bincount(random.integers(count, size=count), minlength=count) for _ in range(BOOTSTRAP_RESAMPLES))
    means = (np.stack(list(draws)) / count) @ values.reshape(count, -1).astype(np.float64)
    low, high = np.percentile(means, (2.5, 97.5), axis=0)
    return low.reshape(values.shape[1:]), high.reshape(values.shape[1:])


def mean_curves(contributions: dict[str, np.ndarray], lengths: np.ndarray) -> dict[int, dict]:
    """The curves of each group, by its number of tokens: each float64 (steps, layers + 1).

    contributions: similarity and stability, float32 (steps, layers + 1, words), and unrelated, float64 (steps, groups,
    layers + 1).
    """
    curves = {}
    for group, length in enumerate(np.unique(lengths)):
        similarity = contributions["similarity"][..., lengths == length]  # (steps, layers + 1, words of the group)
        low, high = bootstrap_interval(np.moveaxis(similarity, -1, 0))
        curves[int(length)] = {
            "words": similarity.shape[-1],
            "similarity": similarity.mean(-1, dtype=np.float64),
            "ci_low": low,
            "ci_high": high,
            "unrelated": contributions["unrelated"][:, group],
            "stability": contributions["stability"][..., lengths == length].mean(-1, dtype=np.float64),
        }
    return curves


def write_csv(file: Path, leading: tuple[str, str], tables: dict[tuple, dict], names: tuple, steps: list[int]) -> None:
    """Writes a row for each table, step and layer: the table's two leading values, then the named curves' values.

    A curve is float (steps, layers + 1). A value that is not defined is left empty.
    """
    partial_file = file.with_name(f".{file.name}.partial")
    with partial_file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([*leading, "step", "layer", *names])
        for key, table in tables.items():
            for index, layer in np.ndindex(table[names[0]].shape):
                values = [table[name][index, layer] for name in names]
                numbers = ["" if np.isnan(value) else f"{value:.6f}" for value in values]
                writer.writerow([*key, steps[index], layer, *numbers])
    partial_file.replace(file)


def printable(text: str) -> str:
    """The text with an escape, such as \\u65e5, for each character that the figures' font has no glyph for."""
    font = get_font(findfont(FontProperties()))
    shown = (character if font.get_char_index(ord(character)) else ascii(character)[1:-1] for character in text)
    return "".join(shown)


def step_label(step: int) -> str:
    return f"{step // 1000}k" if step and step % 1000 == 0 else str(step)


def step_axis(axes: Axes, steps: list[int]) -> None:
    """An axis that is linear from step 0 to 1 and logarithmic from there, with a label wherever there is room."""
    axes.set_xscale("symlog", base=2, linthresh=1, linscale=0.5)
    positions = axes.xaxis.get_transform().transform(np.array(steps, dtype=float))
    labelled = [len(steps) - 1]
    for index in reversed(range(len(steps) - 1)):
        if positions[labelled[-1]] - positions[index] >= np.ptp(positions) / 16:
            labelled.append(index)
    axes.set_xticks([steps[index] for index in labelled], [step_label(steps[index]) for index in labelled])
    axes.set_xticks(steps, minor=True)
    axes.set_xlabel("training step")


def layer_label(layers: int) -> str:
    return f"layer (0 = token embedding, {layers} = after the final LayerNorm)"


def draw_group(file: Path, family: str, steps: list[int], length: int, curve: dict) -> None:
    """Similarity of one group against training step, a line a layer."""
    layers = curve["similarity"].shape[1] - 1
    colours = colormaps["viridis"].resampled(layers + 1)
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for layer in range(layers + 1):
        axes.plot(steps, curve["similarity"][:, layer], marker=".", color=colours(layer))
    step_axis(axes, steps)
    axes.grid(alpha=0.3)
    axes.set_ylabel("cosine similarity to the final checkpoint")
    title = (
        f"{family}: words of {tokens_name(length)} ({curve['words']} words)\nsimilarity to step {steps[-1]}, by layer"
    )
    axes.set_title(title, parse_math=False)
    scale = ScalarMappable(BoundaryNorm(np.arange(-0.5, layers + 1), layers + 1), colours)
    figure.colorbar(scale, ax=axes, ticks=range(0, layers + 1, layers // 10 + 1), label=layer_label(layers))
    figure.savefig(file)


def draw_layer(file: Path, family: str, steps: list[int], layer: int, curves: dict[int, dict]) -> None:
    """Similarity of every group in one layer with its interval and floor; beneath it the stability."""
    layers = next(iter(curves.values()))["similarity"].shape[1] - 1
    figure = Figure(figsize=(8, 7), dpi=150, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    colours = colormaps["viridis"](np.linspace(0, 0.85, len(curves)))
    for (length, curve), colour, marker in zip(curves.items(), colours, cycle("osD^vP*X"), strict=False):
        style = {"color": colour, "marker": marker, "markersize": 4}
        low, high = curve["ci_low"][:, layer], curve["ci_high"][:, layer]
        label = f"{tokens_name(length)} ({curve['words']} words)"
        upper.plot(steps, curve["similarity"][:, layer], label=label, **style)
        upper.fill_between(steps, low, high, color=colour, alpha=0.25, linewidth=0)
        upper.plot(steps, curve["unrelated"][:, layer], color=colour, linestyle="--", linewidth=1)
        lower.plot(steps, curve["stability"][:, layer], **style)
    upper.set_ylabel("cosine similarity\nto the final checkpoint")
    lower.set_ylabel("stability: cosine similarity\nto the checkpoint before")
    step_axis(lower, steps)
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    place = {0: " (token embedding)", layers: " (after the final LayerNorm)"}.get(layer, "")
    title = f"{family}: layer {layer} of {layers}{place}\nsimilarity to step {steps[-1]}, by number of tokens"
    figure.suptitle(title, parse_math=False)
    handles, _ = upper.get_legend_handles_labels()
    handles.append(Line2D([], [], color="grey", linestyle="--", linewidth=1, label="unrelated words (floor)"))
    handles.append(Patch(color="grey", alpha=0.25, linewidth=0, label="95 % interval over words"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    figure.savefig(file)


def draw_overview(file: Path, family: str, steps: list[int], curves: dict[int, dict]) -> None:
    """Similarity of each group as a heat map of layers by steps."""
    maps = {
        f"{tokens_name(length)} ({curve['words']} words)": curve["similarity"].T for length, curve in curves.items()
    }
    layers = next(iter(curves.values()))["similarity"].shape[1] - 1
    rows, columns = (len(maps) + 1) // 2, min(len(maps), 2)
    figure = Figure(figsize=(1 + 5 * columns, 1 + 3.5 * rows), dpi=150, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    lowest = min(0, *(heat.min() for heat in maps.values()))
    for axes, (title, heat) in zip(panels.flat, maps.items(), strict=False):
        image = axes.imshow(heat, vmin=lowest, vmax=1, cmap="viridis", origin="lower", aspect="auto")
        axes.set_title(title)
    for axes in panels.flat[len(maps) :]:
        axes.set_axis_off()
    for axes in panels.flat[len(maps) - columns : len(maps)]:  # the lowest of each column
        axes.tick_params(labelbottom=True)
    labelled = range(len(steps) - 1, -1, -(len(steps) // 13 + 1))
    panels[0, 0].set_xticks(labelled, [step_label(steps[index]) for index in labelled], fontsize="small")
    panels[0, 0].set_yticks(range(0, layers + 1, layers // 10 + 1))
    figure.supxlabel("training step", fontsize="medium")
    figure.supylabel(layer_label(layers), fontsize="medium")
    figure.colorbar(image, ax=panels, label="cosine similarity to the final checkpoint")
    figure.suptitle(f"{family}: similarity to step {steps[-1]}, by number of tokens", parse_math=False)
    figure.savefig(file)


def draw_figures(results: Path, steps: list[int], curves: dict[int, dict]) -> None:
    """Draws all figures, and removes those of an earlier run with other groups or layers."""
    family = printable(results.name)
    layers = next(iter(curves.values()))["similarity"].shape[1] - 1
    for file in [*results.glob("group_*_tokens.png"), *results.glob("layer_*.png")]:
        file.unlink()
    with tqdm(total=len(curves) + layers + 2, desc="figures", unit="figure") as progress:
        for length, curve in curves.items():
            draw_group(results / f"group_{length}_tokens.png", family, steps, length, curve)
            progress.update()
        for layer in range(layers + 1):
            draw_layer(results / f"layer_{layer:02d}.png", family, steps, layer, curves)
            progress.update()
        draw_overview(results / "overview.png", family, steps, curves)
        progress.update()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("family", nargs="?", help="folder of checkpoints [CHECKPOINTS_DIR, beside this script]")
    parser.error = fail
    arguments = parser.parse_args()
    check_settings()
    device = choose_device()
    family = find_family(arguments.family or str(HERE / CHECKPOINTS_DIR))
    checkpoints = find_checkpoints(family)
    config, tokenizer = read_final(checkpoints[max(checkpoints)])
    words = read_words()
    words, texts, sequences, lengths = draw_words(words, tokenizer, config)
    check_checkpoints(checkpoints, config, texts, sequences)
    results = HERE / RESULTS_DIR / family.name
    kept = results / "kept"
    kept.mkdir(parents=True, exist_ok=True)

    steps = list(checkpoints)
    inputs = [words, sequences, DTYPE, device.type, BATCH_TOKENS, config.to_json_string()]
    keys = contribution_keys(checkpoints, inputs)
    missing = {step: key for step, key in keys.items() if read_kept(kept / f"step{step}.npz", key) is None}
    if RANKS > 1:
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=365))  # ranks may end hours apart
        torch.distributed.broadcast_object_list(seen_by_first := [missing])
        missing = seen_by_first[0]
    groups = [f"{np.sum(lengths == length)} of {tokens_name(length)}" for length in np.unique(lengths)]
    say(f"family   {family}")
    say(f"steps    {', '.join(map(step_label, steps))} ({len(missing)} of {len(steps)} to measure)")
    say(f"words    {', '.join(groups)}")
    say(f"device   {device}, {DTYPE}" + f", {RANKS} ranks" * (RANKS > 1))
    # neighbours to a rank, since stability needs the checkpoint before
    share = list(missing)[RANK * len(missing) // RANKS : (RANK + 1) * len(missing) // RANKS]
    if share:
        measure(checkpoints, {step: missing[step] for step in share}, kept, texts, sequences, lengths, device)
    if RANKS > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if RANK > 0:
        return

    arrays = [read_kept(kept / f"step{step}.npz", keys[step]) for step in steps]
    if None in arrays:
        fail(f"{kept} or the checkpoints changed during the run: run again")
    contributions = {name: np.stack([array[name] for array in arrays]) for name in arrays[0]}
    curves = mean_curves(contributions, lengths)
    means = {(length, curve["words"]): curve for length, curve in curves.items()}
    write_csv(results / "convergence.csv", ("tokens", "words"), means, CURVES, steps)
    similarity = contributions["similarity"]
    write_arrays(results / "similarities.npz", words=words, tokens=lengths, steps=steps, similarity=similarity)
    draw_figures(results, steps, curves)
    say(f"results  {results}")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with torch.inference_mode():
            main()
    except KeyboardInterrupt:
        print("interrupted: what was measured is kept, and the next run goes on from there", file=sys.stderr)
        raise SystemExit(130) from None
    except torch.OutOfMemoryError as error:
        fail(f"{one_line(error)} Lower BATCH_TOKENS or WORDS_PER_GROUP; what was measured is kept")
    except OSError as error:
        fail(f"{error}; mend that, make room or set another RESULTS_DIR, and run again: what was measured is kept")

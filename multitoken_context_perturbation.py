"""Compares a word of several tokens with itself in other contexts and with perturbed versions.

    python multitoken_context_perturbation.py [FAMILY ...]
    torchrun --nproc-per-node=4 multitoken_context_perturbation.py [FAMILY ...]  # shares out steps

FAMILY is a folder with a sub-folder for each training step (step0, step512 ... step143000) that
holds a Hugging Face checkpoint; without it CHECKPOINTS_DIR is analysed. An interrupted run
continues when it is started again. With torchrun on a CPU, set OMP_NUM_THREADS.

Each word has a base sentence that ends in it, other contexts that do, and perturbed versions of the
base with another last word that ends in the same token. A sentence is read after BOS; its hidden
state is taken at the last token, which all share. The word's non-word, the first tokens of another
word before its own last token, takes its place in base and contexts. Of each word, mean cosines:
    P1     of the base and the other contexts; P2: of the base and the perturbed versions
    same_word, same_non_word  of two sentences with the word, and with the non-word
    cross  of a sentence with the word and another one with the non-word
    unrelated  of its base and the bases of other words
From the means over words, word_share = (same_word - cross) / (1 - cross), non_word_share likewise,
and gain = word_share - non_word_share: the answer, since a share alone shows attention to the
tokens before. `known`: by how many nats the last token is expected more in words than in non-words.

RESULTS_DIR/<name of FAMILY>/ gets tables, figures and kept/: what was measured of each checkpoint.
Of several families, RESULTS_DIR gets families.csv and families.png.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin crawl on a busy machine

import csv
import hashlib
import json
import math
import re
import shutil
import sys
import unicodedata
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from itertools import product
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryFile
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
import transformers
from matplotlib.figure import Figure
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

# --------------------------------------------------------------------------------------------------
# files and folders, beside this script
CHECKPOINTS_DIR = "pythia_1b_checkpoints"  # the family that is analysed if none is named
RESULTS_DIR = "multitoken_words_plots"  # gets a folder for each family
CONTEXTS_FILE = "multitoken_words_contexts.json"  # {word: {"sentences", "replaced_sentences"}}
WORDS_FILE = "words_list.json"  # {word: ...}: none of these is a non-word
# words
SAME_LENGTH = True  # the replacing word has as many tokens as the word; False: any number
WORDS_TO_PLOT = 6  # words with a figure of their own: how many, or a list such as ["raccoon"]
PREPEND_BOS = True  # read a sentence after BOS, away from the attention sink at position 0
BOS = "<|endoftext|>"  # of the family's tokenizer
# model
DTYPE = "float32"  # of weights and activations: "float32", "bfloat16", "float16"
DEVICE = "auto"  # "auto" (cuda, else mps, else cpu), "cpu", "cuda", "cuda:1" or "mps"
BATCH_TOKENS = None  # tokens in a forward pass, at most; None = 512 on a CPU, 2048 elsewhere
# statistics
SEED = 0  # of the non-words, of the words to plot and of the bootstrap
BOOTSTRAP_RESAMPLES = 1000  # resamples of the last tokens behind an interval
# --------------------------------------------------------------------------------------------------

HERE = Path(__file__).resolve().parent
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun
MEANS = ("P1", "P2", "P1-P2", "same_word", "same_non_word", "cross")  # over words, with intervals
MEANS += ("word_share", "non_word_share", "gain")
HEAD = r"(lm_head|embed_out)\..*"  # names of the output layer's tensors
MAY_DIFFER = HEAD + r"|.*\.((attention|attn)\.bias|masked_bias|inv_freq)"  # old buffers; configs:
MAY_DIFFER += "|architectures|dtype|transformers_version|use_cache|_name_or_path"
LAYER_LABEL = "layer (0 = token embedding, last = after the final norm)"


class Text(NamedTuple):
    word: str  # to whose entry it belongs
    string: str  # as in CONTEXTS_FILE; "" with a non-word
    token_ids: tuple[int, ...]  # after BOS


class Entry(NamedTuple):
    word: str
    token_ids: tuple[int, ...]  # its own
    non_word: str  # "" if there is none
    sentences: list[int]  # rows among all texts: its base, its other contexts
    non_words: list[int]  # the same with the non-word
    perturbed: list[int]  # the base with another last word


def print0(message: str) -> None:
    """Prints at once, on the first rank alone."""
    if RANK == 0:
        try:
            print(message, flush=True)
        except BrokenPipeError:  # `| head` does not end the run
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def blame(culprit: object):
    """Any error in the block, of whatever library, becomes one that names the culprit."""
    try:
        yield
    except Exception as error:
        raise AssertionError(f"{culprit}: {error or type(error).__name__}") from error


# ---- checkpoints ---------------------------------------------------------------------------------


def find_checkpoints(family: Path) -> dict[int, Path]:
    """The folders of a family's checkpoints by training step, in ascending order."""
    hint = "fetch Pythia-1B with download_checkpoints.py or train a miniature: tests/miniature.py"
    assert family.is_dir(), f"there is no folder {family}: {hint}"
    steps = []
    for folder in family.iterdir():
        if re.fullmatch(r"step(0|[1-9]\d*)", folder.name):
            steps.append(int(folder.name[4:]))
        elif (folder / "config.json").exists():  # else another step could become the final one
            raise AssertionError(f"{folder} is not named step<N>: rename it, or move it away")
    assert steps, f"{family} holds no checkpoint: expected a folder for each step, such as step0"
    return {step: family / f"step{step}" for step in sorted(steps)}


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def describe(folder: Path) -> tuple[dict[str, object], dict[str, tuple]]:
    """A checkpoint's config, and the shapes of its tensors, from the headers of its files."""
    assert (folder / "config.json").exists(), "it has no config.json"
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    shapes, files = {}, weight_files(folder)
    assert files, "it has no weights, model*.safetensors or pytorch_model*.bin"
    for index in folder.glob(f"*{files[0].suffix}.index.json"):
        for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values():
            assert (folder / name).exists(), f"{name} is missing"
    for file in files:
        with blame(file.name), file.open("rb") as stream:
            assert stream.read(7) != b"version", "it is a Git LFS pointer: run git lfs pull"
            if file.suffix == ".bin":
                try:
                    tensors = torch.load(file, "meta", mmap=True, weights_only=True)
                except UnpicklingError as error:
                    advice = "it holds more than tensors: save the model as safetensors"
                    raise AssertionError(advice) from error
                shapes |= {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            else:
                with safe_open(file, "pt") as tensors:  # refuses a file that is cut
                    for name in tensors.keys():  # noqa: SIM118, it is no dict
                        shapes[name] = tuple(tensors.get_slice(name).get_shape())
    return config.to_dict(), shapes


def check_checkpoints(checkpoints: dict[int, Path]) -> None:
    """Stops before any work, and names all checkpoints that are not of the final one's kind."""
    final, faults = checkpoints[max(checkpoints)], []
    with blame(f"fetch or train again {final}"):
        expected = describe(final)
    for folder in checkpoints.values():
        try:
            for found, wanted in zip(describe(folder), expected, strict=True):
                if found.keys().isdisjoint(wanted):
                    continue  # one of the two was saved without an output layer
                for name in sorted(found.keys() | wanted.keys()):
                    same = found.get(name) == wanted.get(name) or re.fullmatch(MAY_DIFFER, name)
                    values = f"{name} is {found.get(name)}, in {final.name} {wanted.get(name)}"
                    assert same, values
        except Exception as error:
            faults.append(f"{folder.name} ({error})")
    advice = f"fetch or train again, or remove, in {final.parent}"
    assert not faults, f"{advice}: {'; '.join(faults)}"


# ---- words ---------------------------------------------------------------------------------------


def clean(text: str) -> str:
    return unicodedata.normalize("NFC", text.strip())


def encode_words(words: list[str], tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """The token ids of each word in running text: those that it adds to a letter before it."""
    skip = len(tokenizer.encode("a", add_special_tokens=False).ids)
    encodings = tokenizer.encode_batch(["a " + word for word in words], add_special_tokens=False)
    return [tuple(encoding.ids[skip:]) for encoding in encodings]


def recombine(sequences: list, count: int, tokenizer: Tokenizer, words: set[str]) -> list[list]:
    """Puts the last token of each sequence after the first tokens of another, count times.

    What makes words, or would be read in another way, exchanges beginnings until nothing does.
    """

    @cache
    def fits(start: int, end: int) -> bool:
        ids = sequences[start][:-1] + sequences[end][-1:]
        string = tokenizer.decode(ids)
        same = tuple(tokenizer.encode(string, add_special_tokens=False).ids) == ids
        return start != end and same and string.strip().casefold() not in words

    rng = np.random.default_rng([SEED, len(sequences[0])])
    order, found = rng.permutation(len(sequences)).tolist(), []  # whose beginning each gets
    for _ in range(100 * count * len(sequences)):
        bad = [end for end, start in enumerate(order) if not fits(start, end)]
        if bad:
            one, other = rng.choice(bad), rng.integers(len(sequences))
            if fits(order[other], one) + fits(order[one], other) >= fits(order[other], other):
                order[one], order[other] = order[other], order[one]
            continue
        made = [sequences[start][:-1] + sequences[end][-1:] for end, start in enumerate(order)]
        if made not in found:
            found.append(made)
        if len(found) == count:
            break
        order = rng.permutation(len(sequences)).tolist()
    return found


def find_fault(text: str, ids: tuple, word: str, own: tuple, base: tuple, perturbed: bool) -> str:
    """Why a text measures something else, or "". own: the word's ids; base: (string, its ids)."""
    before, ids_before = base[0][: -len(word)], base[1][: -len(own)]
    other = text[len(before) :]
    if len(own) < 2:
        return "the word is one token"
    if BOS in text:
        return f"{BOS} is in it"
    if not perturbed:
        return "" if ids[-len(own) :] == own else "it does not end in the word's tokens"
    if ids[-1:] != own[-1:]:
        return "it ends in another token than the base"
    if not text.startswith(before) or ids[: len(ids_before)] != ids_before:
        return "its beginning is not the base's"
    if text == base[0] or len(other.split()) != len(word.split()):
        return "it is not the base with another last word"
    if SAME_LENGTH and len(ids) != len(base[1]):
        return f"{other!r} has {len(ids) - len(ids_before)} tokens, {word!r} has {len(own)}"
    return ""


def read_entries(file: Path, tokenizer: Tokenizer) -> tuple[dict[str, tuple], set[str]]:
    """{word: (its token ids, sentences, perturbed versions)} of what fits, and all words in it."""
    listed = json.loads(file.read_text(encoding="utf-8-sig"))
    assert isinstance(listed, dict) and listed, 'expected {"word": {"sentences": [...]}, ...}'
    chosen, words, left_out = {}, set(), []
    for word, entry in listed.items():
        with blame(f'{word!r}, which needs lists "sentences" and "replaced_sentences"'):
            kinds = [list(map(clean, entry[kind])) for kind in ("sentences", "replaced_sentences")]
        word, kept, base = clean(word), ([], []), None  # (string, token ids) each, in both lists
        own = encode_words([word], tokenizer)[0]
        for perturbed, texts in enumerate(kinds):
            for text in texts:
                ids = tuple(tokenizer.encode(text, add_special_tokens=False).ids)
                base = base or (text, ids)
                fault = find_fault(text, ids, word, own, base, bool(perturbed))
                if word in chosen or (text, ids) in kept[perturbed]:
                    fault = "the word or the text stands there twice"
                if fault:
                    left_out.append(f"{word}: {text!r}: {fault}")
                else:
                    kept[perturbed].append((text, ids))
        words |= {word, *(text.split()[-1] for text in kinds[1] if text)}
        if base in kept[0]:
            chosen[word] = (own, *kept)
        elif word not in chosen:
            left_out.append(f"{word}, since its base is")
    for line in left_out[:10]:
        print0(f"left out: {line}")
    if len(left_out) > 10:
        print0(f"left out: {len(left_out) - 10} more")
    assert chosen, "it has no word of two tokens or more with a base"
    return chosen, words


def choose_texts(chosen: dict, words: set[str], tokenizer: Tokenizer) -> tuple[list, list]:
    """All texts that are read, and the entries. words, case-folded: none of these is a non-word."""
    groups, non_words, texts, entries = {}, {}, [], []
    for word, (ids, _, _) in chosen.items():
        groups.setdefault(len(ids), {})[word] = ids
    for tokens, group in sorted(groups.items()):
        made = recombine(list(group.values()), 1, tokenizer, words)
        if made:
            non_words |= dict(zip(group, made[0], strict=True))
        else:
            print0(f"warning: {tokens}-token words have no non-words: add some to {CONTEXTS_FILE}")
    for word, (ids, sentences, perturbed) in chosen.items():
        other = non_words.get(word, ())
        replaced = [("", read[: -len(ids)] + other) for _, read in sentences if other]
        rows = []
        for kind in (sentences, replaced, perturbed):
            rows.append(list(range(len(texts), len(texts) + len(kind))))
            texts += [Text(word, string, read) for string, read in kind]
        entries.append(Entry(word, ids, tokenizer.decode(other).strip(), *rows))
    return texts, entries


# ---- measuring: after a change in this section, the next run measures again ----------------------

COSINES = ("P1", "P2", "same_word", "same_non_word", "cross", "unrelated")  # see compare


def prefix_trees(sequences: list[tuple[int, ...]], batch_tokens: int) -> list[tuple]:
    """Packs token sequences into prefix trees, in which every distinct prefix stands once.

    A causal model's state depends on the prefix alone, so each attends to its ancestors and itself.
    For each tree: inputs, rows of its sequences, the last node of each, the node before it or -1.
    """
    nodes, rows = {}, []  # of a tree: {prefix: its node}, and its sequences among all
    packs = [(nodes, rows)]
    for row in sorted(range(len(sequences)), key=sequences.__getitem__):
        prefixes = [sequences[row][:end] for end in range(1, len(sequences[row]) + 1)]
        new = [prefix for prefix in prefixes if prefix not in nodes]
        if rows and len(nodes) + len(new) > batch_tokens:
            nodes, rows, new = {}, [], prefixes
            packs.append((nodes, rows))
        for prefix in new:
            nodes[prefix] = len(nodes)
        rows.append(row)
    trees = []
    for nodes, rows in packs:
        mask = torch.eye(len(nodes), dtype=torch.bool)
        for prefix, node in nodes.items():
            if len(prefix) > 1:
                mask[node] |= mask[nodes[prefix[:-1]]]
        inputs = {
            "input_ids": torch.tensor([[prefix[-1] for prefix in nodes]]),
            "position_ids": torch.tensor([[len(prefix) - 1 for prefix in nodes]]),
            "attention_mask": mask[None, None],
        }
        last = [nodes[sequences[row]] for row in rows]
        before = [nodes.get(sequences[row][:-1], -1) for row in rows]
        trees.append((inputs, rows, last, before))
    return trees


def load_model(folder: Path, device: torch.device) -> tuple[torch.nn.Module, bool]:
    """A checkpoint's model in DTYPE, and whether its output layer was there; all else has to be."""
    options = {"local_files_only": True, "trust_remote_code": False, "output_loading_info": True}
    options |= {"ignore_mismatched_sizes": True, "dtype": getattr(torch, DTYPE)}
    model, info = AutoModelForCausalLM.from_pretrained(folder, **options)
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *map(str, info["mismatched_keys"])]
    lost = [name for name in info["missing_keys"] if re.fullmatch(HEAD, name)]
    wrong = sorted(set(wrong) - set(lost))
    assert not wrong, f"{len(wrong)} tensors are missing, surplus or misshapen, as {wrong[0]}"
    return model.to(device), not lost


def check_trees(model: torch.nn.Module, inputs: dict[str, Tensor], states: Tensor) -> None:
    """Stops if a node's state, of states (nodes, width), is not that of its prefix read alone."""
    node = inputs["position_ids"].argmax()
    alone = inputs["input_ids"][:, inputs["attention_mask"][0, 0, node]]
    expected = model(alone, use_cache=False, output_hidden_states=True).hidden_states[-1][0, -1]
    cosine = torch.cosine_similarity(states[node].float(), expected.float(), dim=0)
    enough = 0.99999 if DTYPE == "float32" else 0.99
    bad = cosine <= enough  # what is not finite is said with its word
    assert not bad, "it cannot read prefix trees: use another architecture"


def read_states(folder: Path, trees: list, texts: list[Text], device: torch.device, bar: tqdm):
    """What is read of a checkpoint at each text's last token.

    Returns its hidden states, scaled to length 1, float32 (layers + 1, texts, width), on disk; and
    log p(its token | those before) in nats, float32 (texts,), NaN without a head or such tokens.
    """
    bar.set_description(folder.name)
    with blame(folder):
        model, has_head = load_model(folder, device)
    shape = (model.config.num_hidden_layers + 1, len(texts), model.config.hidden_size)
    free, needed = shutil.disk_usage(HERE / RESULTS_DIR).free / 1e9, 4e-9 * math.prod(shape)
    assert free > needed, f"{HERE / RESULTS_DIR}: {free:.1f} GB are free, {needed:.1f} are needed"
    file = TemporaryFile(dir=HERE / RESULTS_DIR)  # noqa: SIM115, lives as long as the array
    unit = torch.from_numpy(np.memmap(file, np.float32, "w+", shape=shape))
    targets = torch.tensor([text.token_ids[-1] for text in texts])
    log_prob = torch.full((len(texts),), math.nan)
    for inputs, rows, last, before in trees:
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        nodes, places = np.unique(before, return_inverse=True)  # many texts share one
        asked = {"output_hidden_states": True, "logits_to_keep": torch.tensor(nodes).to(device)}
        with blame(f"{folder}: a model of type {model.config.model_type}"):
            output = model(**inputs, use_cache=False, **asked)
            if rows is trees[0][1]:
                check_trees(model, inputs, output.hidden_states[-1][0])
        states = torch.stack([layer[0, last] for layer in output.hidden_states]).float()
        norms = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
        for layer, index, _ in (~norms.isfinite() | (norms == 0)).nonzero().tolist():
            place = f"{texts[rows[index]].word!r} in layer {layer}"
            raise AssertionError(f"{folder}: the hidden state of {place} is not finite, or zero")
        unit[:, rows] = states.div_(norms).cpu()
        if has_head:
            found = output.logits[0].float().log_softmax(-1).cpu()[places, targets[rows]]
            log_prob[rows] = found.masked_fill(torch.tensor(before) < 0, math.nan)
        del output, states  # else they lie beside the next ones
        bar.update()
    return unit, log_prob


def compare(unit: np.ndarray, entries: list[Entry]) -> dict[str, np.ndarray]:
    """COSINES of each entry in one layer, float32 (entries,), NaN if undefined.

    unit: float32 (texts, width), the unit states.
    """
    found = {name: np.full(len(entries), np.nan, np.float32) for name in COSINES}
    bases = unit[[entry.sentences[0] for entry in entries]]
    with_others = bases @ bases.sum(0) - np.square(bases).sum(-1)
    found["unrelated"] = with_others / (len(entries) - 1)
    for index, entry in enumerate(entries):
        words, others = unit[entry.sentences], unit[entry.non_words]
        found["P1"][index] = (words[1:] @ words[0]).mean()
        found["P2"][index] = (unit[entry.perturbed] @ words[0]).mean()
        different = ~np.eye(len(words), dtype=bool)  # pairs of different sentences
        found["same_word"][index] = (words @ words.T)[different].mean()
        if entry.non_words:
            found["same_non_word"][index] = (others @ others.T)[different].mean()
            found["cross"][index] = (words @ others.T)[different].mean()
    return found


def measure(checkpoints, files, texts, start, entries, device) -> None:
    """Measures the steps of files, {step: npz}, and keeps what is found of each at once."""
    sequences = [start + text.token_ids for text in texts]
    trees = prefix_trees(sequences, BATCH_TOKENS or (512 if device.type == "cpu" else 2048))
    if device.type == "cpu" and DTYPE == "float32" and torch.backends.mkldnn.is_available():
        linear = torch.ops.mkldnn._linear_pointwise  # on AMD CPUs twice as fast as torch's default
        torch.nn.Linear.forward = lambda self, x: linear(x, self.weight, self.bias, "none", [], "")
    with tqdm(total=len(trees) * len(files), unit="batch", disable=RANK > 0) as bar:
        for step, file in files.items():
            unit, log_prob = read_states(checkpoints[step], trees, texts, device, bar)
            layers = [compare(of_layer, entries) for of_layer in unit.numpy()]
            found = {name: np.stack([layer[name] for layer in layers]) for name in COSINES}
            partial_file = file.with_suffix(".partial.npz")
            np.savez(partial_file, log_prob=log_prob, **found)
            partial_file.replace(file)  # whole, or not there


# ---- what is kept --------------------------------------------------------------------------------


def kept_files(kept: Path, checkpoints: dict[int, Path], inputs: list) -> dict[int, Path]:
    """The file of each step, named by a digest of all that its content depends on."""
    sections = Path(__file__).read_text(encoding="utf-8").split("\n# ---- ")
    code = [section for section in sections if section.startswith("measuring")]
    shared = [code, torch.__version__, transformers.__version__, inputs]
    files = {}
    for step, folder in checkpoints.items():
        parts = [shared, (folder / "config.json").read_text(encoding="utf-8")]
        for file in weight_files(folder):
            with file.open("rb") as stream:
                stream.seek(max(0, file.stat().st_size - 2**20))
                tail = hashlib.sha256(stream.read()).hexdigest()
            parts += [file.stat().st_size, file.stat().st_mtime_ns, tail]
        digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
        files[step] = kept / f"step{step}-{digest}.npz"
    return files


def warn_of_copies(steps: list[int], values: np.ndarray) -> None:
    """Names checkpoints with the values (steps, layers + 1, texts) of an earlier one."""
    for later in range(1, len(steps)):
        agree = (values[:later] == values[later]).all(-1)  # (earlier steps, layers + 1)
        depths = np.cumprod(agree, axis=1).sum(1)  # how many layers agree, from 0 upwards
        if depths.max() > 0:
            pair = f"steps {steps[depths.argmax()]} and {steps[later]}"
            extent = f"{depths.max()} of {values.shape[1]} layers, from layer 0 on"
            print0(f"warning: {pair} have the same states in {extent}: trust one of them at most")


# ---- statistics ----------------------------------------------------------------------------------


def resample(last_tokens: list[int], seed: int) -> np.ndarray:
    """How often each text counts, float64 (1 + BOOTSTRAP_RESAMPLES, texts): once in row 0.

    Else as often as its last token was drawn: texts that end in one depend. NaN if all do.
    """
    _, clusters = np.unique(last_tokens, return_inverse=True)
    count = clusters.max() + 1
    rng = np.random.default_rng([SEED, seed])
    drawn = rng.multinomial(count, np.full(count, 1 / count), BOOTSTRAP_RESAMPLES)
    counts = np.vstack([np.ones(count), drawn if count > 1 else drawn * math.nan])
    return counts[:, clusters]


def interval(values: np.ndarray) -> np.ndarray:
    """values[0] and the 95 % percentile interval of the others (Efron 1979), float64 (3, ...).

    Infinite values stand for never, and become NaN; NaN is left out.
    """
    low_high = np.nanpercentile(values[1:], (2.5, 97.5), axis=0)
    found = np.stack([values[0], *low_high])
    return np.where(np.isfinite(found), found, np.nan)


def tabulate(rows: list[int], weights: np.ndarray, found: dict) -> dict[str, np.ndarray]:
    """MEANS of the entries in rows with their intervals, (3, steps, layers + 1), and unrelated."""
    own = {name: found[name][..., rows] for name in COSINES}
    own["P1-P2"] = own["P1"] - own["P2"]
    own["same_word"] = np.where(np.isnan(own["cross"]), np.nan, own["same_word"])  # the same words
    means = {}  # each (1 + resamples, steps, layers + 1)
    for name in MEANS[:6]:
        there = np.isfinite(own[name][0, 0])
        sums = np.tensordot(weights[:, there], own[name][..., there], (1, 2))
        means[name] = sums / weights[:, there].sum(1)[:, None, None]
        if (weights[:, there] == weights[:, there][:, :1]).all():  # they end in one token
            means[name][1:] = math.nan
    rest = np.where(means["cross"][0] > 1 - 1e-4, np.nan, 1 - means["cross"])  # as in layer 0
    means["word_share"] = (means["same_word"] - means["cross"]) / rest
    means["non_word_share"] = (means["same_non_word"] - means["cross"]) / rest
    means["gain"] = means["word_share"] - means["non_word_share"]
    table = {name: interval(means[name]) for name in MEANS}
    return table | {"unrelated": own["unrelated"].mean(-1, dtype=np.float64)}


def find_known(log_prob: np.ndarray, entries: list[Entry], weights: np.ndarray) -> np.ndarray:
    """What known.csv says of entries, float64 (5, steps). log_prob: float32 (steps, texts)."""
    sums = np.zeros((2, len(log_prob), len(entries)))  # of words and of non-words
    counts = np.array([len(entry.non_words) for entry in entries])  # sentences read with both
    for index, entry in enumerate(entries):
        if entry.non_words:
            for kind, rows in enumerate((entry.sentences, entry.non_words)):
                sums[kind, :, index] = log_prob[:, rows].sum(1, dtype=np.float64)
    known = weights @ (sums[0] - sums[1]).T / (weights @ counts)[:, None]
    return np.stack([*(sums.sum(-1) / counts.sum()), *interval(known)])


# ---- tables --------------------------------------------------------------------------------------


def write_csv(file: Path, header: str, rows: list[list]) -> None:
    """Writes a table. A number that is not defined is left empty."""
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header.split(","))
        for row in rows:
            for column, value in enumerate(row):
                if isinstance(value, float):
                    row[column] = f"{value:.6f}" if math.isfinite(value) else ""
            writer.writerow(row)


def write_tables(results, steps, entries, found, groups, tables) -> None:
    rows, mean_rows, known_rows = [], [], []
    places = list(product(range(len(steps)), range(found["P1"].shape[1])))
    for number, entry in enumerate(entries):
        for index, layer in places:
            row = [entry.word, len(entry.token_ids), entry.non_word, steps[index], layer]
            rows.append(row + [float(found[name][index, layer, number]) for name in COSINES])
    for tokens, table in tables.items():
        for index, layer in places:
            row = [tokens, len(groups[tokens]), steps[index], layer]
            for name in (*MEANS, "unrelated"):
                row += table[name][..., index, layer].flatten().tolist()  # three with an interval
            mean_rows.append(row)
        for step, values in zip(steps, table["known"].T, strict=True):
            known_rows.append([tokens, step, *values])
    header = "word,tokens,non_word,step,layer," + ",".join(COSINES)
    write_csv(results / "perturbation.csv", header, rows)
    columns = ",".join(f"{name},{name}_low,{name}_high" for name in MEANS)
    header = f"tokens,words,step,layer,{columns},unrelated"
    write_csv(results / "perturbation_mean.csv", header, mean_rows)
    write_csv(results / "known.csv", "tokens,step,word,non_word,known,low,high", known_rows)


# ---- figures -------------------------------------------------------------------------------------


def panels_of(title: str, rows: int, columns: int, **share) -> tuple[Figure, np.ndarray]:
    """A figure with a title and a grid of panels: Axes (rows, columns)."""
    size = (max(8, 2 + 4 * columns), max(5, 1.5 + 3 * rows))
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    figure.suptitle(title, fontsize="medium", linespacing=1.4)
    panels = figure.subplots(rows, columns, squeeze=False, **share)
    for axes in panels.flat:
        axes.grid(alpha=0.3, which="both")
        axes.xaxis.get_major_locator().set_params(integer=True)  # of layers
    return figure, panels


def mark_steps(axis, steps: list[int]) -> None:
    """An axis on which log(1 + step) is drawn gets a line at each step, a label where it fits."""
    places = np.log1p(steps)
    low, high = axis.get_view_interval()
    first, last = np.searchsorted(places, low, "right") - 1, np.searchsorted(places, high)
    steps = steps[max(first, 0) : last + 1]  # those in sight, and the next on either side
    places, labelled = np.log1p(steps), [steps[-1], steps[0]]
    for step in steps:
        if np.abs(np.log1p(labelled) - np.log1p(step)).min() > (high - low) / 9:
            labelled.append(step)
    axis.set_ticks(places, minor=True)
    axis.set_ticks(np.log1p(labelled), labelled)


def draw_line(axes, x, values, label: str, **style) -> None:
    """Draws an estimate and its interval, float64 (3, len(x))."""
    axes.plot(x, values[0], label=label, **style)
    axes.fill_between(x, values[1], values[2], color=style["color"], alpha=0.2, linewidth=0)


def finish(figure: Figure, axes, label: str, file: Path) -> None:
    """Saves a figure with the label of its x-axes, and a legend of what axes shows."""
    figure.supxlabel(label, fontsize="medium")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside center right")
    figure.savefig(file)


def draw_gain(results: Path, steps: list[int], groups: dict, tables: dict) -> None:
    """A column a number of tokens: gain; both shares at the last step; known against step."""
    title = f"{results.name}: how much more a string fixes the state if it is a word (gain)\n"
    title += f"(bands: 95 % intervals over last tokens, at step {steps[-1]} in the upper two rows)"
    figure, panels = panels_of(title, 3, len(tables) - 1, sharey="row")
    for tokens, (gain, shares, known) in zip(tables, panels.T, strict=False):
        table = tables[tokens]
        gain.set_title(f"{len(groups[tokens])} words of {tokens} tokens", fontsize="medium")
        layers = range(table["gain"].shape[-1])
        for index, step in enumerate(steps):
            colour = matplotlib.colormaps["viridis"](index / len(steps))
            gain.plot(table["gain"][0, index], label=f"step {step}", color=colour, marker=".")
        gain.fill_between(layers, *table["gain"][1:, -1], color=colour, alpha=0.2, linewidth=0)
        for name, colour in (("word_share", "#0072b2"), ("non_word_share", "#d55e00")):
            draw_line(shares, layers, table[name][:, -1], f"{name}, last step", color=colour)
        draw_line(known, np.log1p(steps), table["known"][2:], "known", color="black", marker=".")
        mark_steps(known.xaxis, steps)
        shares.set_xlabel("layer (last = after the final norm)")
        known.set_xlabel("training step")
        for axes in (gain, shares, known):
            axes.axhline(0, color="black", linewidth=0.8)
    for axes, label in zip(panels[:, 0], ("gain", "share", "known: nats"), strict=True):
        axes.set_ylabel(label)
    panels[1, 0].legend(fontsize="small")
    finish(figure, panels[0, 0], "", results / "gain.png")


def draw_cosines(file: Path, title: str, steps: list[int], table: dict[str, np.ndarray]) -> None:
    """P1, P2 and the floor against layer, a panel a step, with intervals if table has them."""
    shape = (math.ceil(len(steps) / 5), min(5, len(steps)))
    figure, panels = panels_of(title, *shape, sharex=True, sharey=True)
    for axes in panels.flat[len(steps) :]:
        axes.set_axis_off()
    colours = {"P1: other contexts": "#0072b2", "P2: other word": "#d55e00", "unrelated": "grey"}
    for (index, step), axes in zip(enumerate(steps), panels.flat, strict=False):
        axes.set_title(f"step {step}", fontsize="medium")
        for label, colour in colours.items():
            values = table[label.split(":")[0]][..., index, :]
            values = np.broadcast_to(values, (3, values.shape[-1]))
            draw_line(axes, range(values.shape[1]), values, label, color=colour, marker=".")
    figure.supylabel("mean cosine", fontsize="medium")
    finish(figure, panels[0, 0], LAYER_LABEL, file)


def draw_figures(results, steps, entries, found, groups, tables) -> None:
    (results / "words").mkdir(exist_ok=True)
    for file in [*results.glob("mean_[0-9]*.png"), *(results / "words").glob("[0-9]*.png")]:
        file.unlink()  # of an earlier run
    draw_gain(results, steps, groups, tables)
    shown = []  # (file, title, table)
    for tokens, table in tables.items():
        name = "mean_all.png" if tokens == "all" else f"mean_{tokens}_tokens.png"
        title = f"{results.name}: mean of {len(groups[tokens])} words, tokens: {tokens}"
        shown.append((results / name, f"{title} (bands: 95 % intervals)", table))
    numbers = {entry.word: number for number, entry in enumerate(entries)}
    drawn = np.random.default_rng(SEED).permutation(list(numbers)).tolist()
    for word in drawn[:WORDS_TO_PLOT] if isinstance(WORDS_TO_PLOT, int) else WORDS_TO_PLOT:
        if word not in numbers:
            print0(f"warning: {word!r} of WORDS_TO_PLOT is not measured: it has no figure")
            continue
        number = numbers[word]
        tokens, letters = len(entries[number].token_ids), re.sub(r"[^\w-]", "_", word)
        file = results / "words" / f"{tokens}_tokens_{letters}.png"
        table = {name: found[name][..., number] for name in ("P1", "P2", "unrelated")}
        shown.append((file, f"{results.name}: {word} ({tokens} tokens)", table))
    for file, title, table in tqdm(shown, desc="figures", unit="figure"):
        draw_cosines(file, title, steps, table)


def write_families(found: dict[str, dict]) -> None:
    """families.csv and families.png, from {family: {tokens: gain in each layer}}."""
    figure, [[axes]] = panels_of(f"gain at the end: median, range of {len(found)} families", 1, 1)
    rows, groups = [], next(iter(found.values()))
    for number, (tokens, first) in enumerate(groups.items()):
        for layer in range(len(first)):
            values = []
            for compared in found.values():
                of_layers, nearest = compared.get(tokens, [math.nan]), 0
                if layer > 0 and len(of_layers) > 1:  # nearest in depth, ties to the lower
                    depths = np.arange(1, len(of_layers)) * (len(first) - 1)
                    nearest = 1 + int(np.abs(depths - layer * (len(of_layers) - 1)).argmin())
                values.append(float(of_layers[nearest]))
            summary = [np.nanmedian(values), np.nanmin(values), np.nanmax(values)]
            rows.append([tokens, layer, np.isfinite(values).sum(), *summary, *values])
        gain = np.array([row[3:6] for row in rows if row[0] == tokens]).T
        colour = matplotlib.colormaps["viridis"](number / len(groups))
        draw_line(axes, range(len(first)), gain, f"tokens: {tokens}", color=colour, marker=".")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_ylabel("gain")
    finish(figure, axes, LAYER_LABEL, HERE / RESULTS_DIR / "families.png")
    header = "tokens,layer,families,median,lowest,highest," + ",".join(found)
    write_csv(HERE / RESULTS_DIR / "families.csv", header, rows)


# ---- the run -------------------------------------------------------------------------------------


def prepare(family: Path) -> tuple[dict[int, Path], list[Text], list[Entry], tuple[int, ...]]:
    """A family's checkpoints, its texts, its entries, and the token ids before every text."""
    checkpoints = find_checkpoints(family)
    check_checkpoints(checkpoints)
    final, tokenizers = checkpoints[max(checkpoints)], {}
    for folder in checkpoints.values():
        with blame(f"fetch again {folder / 'tokenizer.json'}"):
            tokenizers[folder] = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizers[folder].no_padding()
        tokenizers[folder].no_truncation()
    start = (tokenizers[final].token_to_id(BOS),) if PREPEND_BOS else ()
    assert None not in start, f"{final} has no token {BOS}: change BOS, or PREPEND_BOS = False"
    with blame(HERE / CONTEXTS_FILE):
        chosen, words = read_entries(HERE / CONTEXTS_FILE, tokenizers[final])
    with blame(HERE / WORDS_FILE):
        listed = json.loads((HERE / WORDS_FILE).read_text(encoding="utf-8-sig"))
        words = {clean(word).casefold() for word in [*words, *listed]}
    texts, entries = choose_texts(chosen, words, tokenizers[final])
    strings = [text.string for text in texts]
    expected = tokenizers[final].encode_batch(strings, add_special_tokens=False)
    for folder, tokenizer in tokenizers.items():  # what they do: libraries write them differently
        others = tokenizer.encode_batch(strings, add_special_tokens=False)
        for string, one, other in zip(strings, expected, others, strict=True):
            reading = f"{string!r} is {other.ids}, in {final.name} {one.ids}"
            assert one.ids == other.ids, f"{folder}: its tokenizer is another: {reading}"
    longest = len(start) + max(len(text.token_ids) for text in texts)
    config = AutoConfig.from_pretrained(final, local_files_only=True)
    most = getattr(config, "max_position_embeddings", math.inf)
    assert longest <= most, f"{family} reads {most} tokens, a text has {longest}: shorten it"
    return checkpoints, texts, entries, start


def print_answer(step: int, groups: dict, tables: dict) -> None:
    """Gain at the last step in the first, second, middle and last layer above 0, and known."""
    last = tables["all"]["gain"].shape[-1] - 1
    shown = sorted({min(1, last), min(2, last), (last + 1) // 2, last})
    header = "".join(f"{f'layer {layer}':>23}" for layer in shown)
    print0(f"gain at step {step} [95 % interval]".ljust(32) + header + f"{'known, nats':>23}")
    for tokens, table in tables.items():
        line = f"  {len(groups[tokens])} words, tokens: {tokens}".ljust(32)
        for value, low, high in [*table["gain"][:, -1, shown].T, table["known"][2:, -1]]:
            line += f"{f'{value:.2f} [{low:.2f}, {high:.2f}]':>23}"
        print0(line)
    low, high = np.stack([table["gain"][1:, -1] for table in tables.values()], axis=1)
    count, of = ((low > 0) | (high < 0)).sum(), np.isfinite(low).sum()
    print0(f"in all layers, {count} of {of} intervals of gain exclude 0 (by chance one in twenty)")


def analyse(family: Path, plan: tuple, device: torch.device) -> dict[tuple, np.ndarray]:
    """Measures a family and writes its results. Returns what families are compared by."""
    checkpoints, texts, entries, start = plan
    steps, results = list(checkpoints), HERE / RESULTS_DIR / family.name
    with blame(f"RESULTS_DIR = {RESULTS_DIR!r}"):
        (results / "kept").mkdir(parents=True, exist_ok=True)
    owner = results / "kept" / "family.txt"
    name = owner.read_text(encoding="utf-8") if owner.exists() else str(family)
    taken = name != str(family) and Path(name).exists()
    assert not taken, f"{results} holds the results of {name}: rename one of the families"
    owner.write_text(str(family), encoding="utf-8")
    inputs = [entries, start, [text.token_ids for text in texts], DTYPE, device.type, BATCH_TOKENS]
    files = kept_files(results / "kept", checkpoints, inputs)
    missing = [step for step in steps if not files[step].exists()]
    sizes = np.array([len(entry.token_ids) for entry in entries])
    groups = {int(tokens): np.flatnonzero(sizes == tokens) for tokens in np.unique(sizes)}
    print0(f"family   {family}")
    print0(f"steps    {', '.join(map(str, steps))} ({len(missing)} of {len(steps)} to measure)")
    read = ", ".join(f"{len(rows)} of {tokens} tokens" for tokens, rows in groups.items())
    print0(f"words    {read}; {len(texts)} texts")
    print0(f"device   {device}, {DTYPE}" + (f", {RANKS} ranks" if RANKS > 1 else ""))
    share = steps[len(steps) * RANK // RANKS : len(steps) * (RANK + 1) // RANKS]  # neighbours
    share = {step: files[step] for step in share if step in missing}
    if share:
        measure(checkpoints, share, texts, start, entries, device)
    if RANKS > 1:
        torch.distributed.barrier()
    if RANK > 0:
        return {}
    kept = [np.load(files[step]) for step in steps]
    found = {name: np.stack([arrays[name] for arrays in kept]) for name in ("log_prob", *COSINES)}
    if len({entry.token_ids[-1] for entry in entries}) > 2:  # else layer 0 is no fingerprint
        warn_of_copies(steps, found["unrelated"])
    tables = {}
    groups["all"] = np.arange(len(entries))
    for tokens, rows in groups.items():
        own = [entries[index] for index in rows]
        weights = resample([entry.token_ids[-1] for entry in own], 0 if tokens == "all" else tokens)
        tables[tokens] = tabulate(rows, weights, found)
        tables[tokens]["known"] = find_known(found["log_prob"], own, weights)
    write_tables(results, steps, entries, found, groups, tables)
    draw_figures(results, steps, entries, found, groups, tables)
    print_answer(steps[-1], groups, tables)
    print0(f"results  {results}")
    return {tokens: table["gain"][0, -1] for tokens, table in tables.items()}


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("families", metavar="FAMILY", nargs="*", default=[CHECKPOINTS_DIR])
    assert DTYPE in ("float32", "bfloat16", "float16"), f"DTYPE = {DTYPE!r}: such as bfloat16"
    assert BOOTSTRAP_RESAMPLES > 0, "BOOTSTRAP_RESAMPLES: expected 1 or more"
    families = []
    for name in parser.parse_args().families:
        families.append((Path(name) if Path(name).is_dir() else HERE / name).resolve())
    names = [family.name for family in families]
    assert len(set(names)) == len(names), f"two families of one name, {names}: rename one"
    with blame(f"DEVICE = {DEVICE!r}"):
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        device = device if DEVICE == "auto" else torch.device(DEVICE)
        if RANKS > 1 and device == torch.device("cuda"):
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.zeros(1, device=device)
    plans = {family: prepare(family) for family in families}
    if RANKS > 1:
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=365))  # to wait
    found = {family.name: analyse(family, plan, device) for family, plan in plans.items()}
    if RANKS > 1:
        torch.distributed.destroy_process_group()
    if RANK == 0 and len(found) > 1:
        write_families(found)
        print0(f"families {HERE / RESULTS_DIR / 'families.csv'}")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    matplotlib.rcdefaults()  # figures do not depend on a user's matplotlibrc
    np.seterr(invalid="ignore", divide="ignore")  # NaN is an answer: not defined
    warnings.filterwarnings("ignore", "All-NaN|Mean of empty")
    try:
        with torch.inference_mode():
            main()
    except KeyboardInterrupt:
        print("interrupted: what was measured is kept", file=sys.stderr)
        sys.exit(130)
    except (AssertionError, OSError, MemoryError, RuntimeError) as error:
        text = " ".join(str(error).split())
        memory = isinstance(error, MemoryError) or re.search("out of memory|allocate", text)
        if not memory and (isinstance(error, RuntimeError) or not text):
            raise  # a fault of your own edit
        advice = "; out of memory: lower BATCH_TOKENS" if memory else ""
        if "No space left" in text:
            advice = f": make room for {HERE / RESULTS_DIR}"
        print(f"error: {text}{advice}", file=sys.stderr)
        sys.exit(2)

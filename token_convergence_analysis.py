"""Follows words of one and of several tokens, layer by layer, towards their final hidden states.

    python token_convergence_analysis.py [FAMILY ...]
    torchrun --nproc-per-node=4 token_convergence_analysis.py [FAMILY ...]  # shares out checkpoints

FAMILY is a folder with a sub-folder for each training step (step0, step512 ... step143000) that
holds a Hugging Face checkpoint; without it CHECKPOINTS_DIR is analysed. An interrupted run
continues when it is started again. With torchrun on a CPU, set OMP_NUM_THREADS.

The words with the same number of tokens form a group. Its kinds are `word`; `recombined`, the last
token of each word after the first tokens of another; and `alone`, the last token without others. A
text is read after BOS and CARRIER, which is cut at its beginning so that all last tokens stand at
one position. There its hidden state is taken and scaled to length 1: u at a step, f at the end.
    similarity  the mean cosine of u and f of the same text; of different texts: unrelated
    centred     the correlation of u and f, after the mean over texts is taken from each
    composed    the same for what the first tokens add: u less the mean u of REFERENCES further
                recombinations that end in the same token; composed_share: of the variance of u
    per_dimension  the mean of the correlations in each dimension (arXiv:2109.04404)
    cka         linear CKA of u and f (arXiv:1905.00414), which does not see rotations
    stability   the mean cosine of u with that of the checkpoint before
The answers are `known`, by how many nats the model expects the words' last tokens more after their
own beginnings than after others', and the half-way steps, by which these curves have come halfway.

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
from collections import Counter
from contextlib import contextmanager
from datetime import timedelta
from functools import cache, reduce
from itertools import product
from operator import and_
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
RESULTS_DIR = "convergance_plots"  # gets a folder for each family
WORDS_FILE = "words_list.json"  # {word: occurrences, on a linear scale}
# words
GROUPS = (1, 2, 3, 4)  # numbers of tokens; the words with that many form a group
KINDS = ("word", "recombined", "alone")  # how a group is read: any of these three
REFERENCES = 3  # further recombinations of a group, for `composed`; 0 = none
CARRIER = "The next word that you will find on this page of the list is"  # before a text; "" = none
MATCH_FREQUENCY = True  # all groups get the same frequencies; False: draw from each at random
WORDS_PER_GROUP = 500  # words in a group, at most; None = all
MIN_GROUP_SIZE = 10  # words, 4 or more; a smaller group is left out
LEADING_SPACE = True  # tokenize a word as it stands in running text
PREPEND_BOS = True  # read it after BOS, away from the attention sink at position 0
BOS = "<|endoftext|>"  # of the family's tokenizer
# model
DTYPE = "float32"  # of weights and activations: "float32", "bfloat16", "float16"
DEVICE = "auto"  # "auto" (cuda, else mps, else cpu), "cpu", "cuda", "cuda:1" or "mps"
BATCH_TOKENS = None  # tokens in a forward pass, at most; None = 512 on a CPU, 2048 elsewhere
# statistics
SEED = 0  # of the draw of words, of the recombinations and of the bootstrap
BOOTSTRAP_RESAMPLES = 1000  # resamples of the last tokens behind an interval
# --------------------------------------------------------------------------------------------------

HERE = Path(__file__).resolve().parent
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun
CONTRASTS = {  # (kind, measure) of the half-way steps whose ratio is taken
    "word / shortest": (("word", "centred"), ("word", "centred")),  # of the smallest group
    "last token / shortest": (("alone", "centred"), ("word", "centred")),  # likewise
    "word / last token": (("word", "centred"), ("alone", "centred")),  # of one group, paired
    "composed / recombined": (("word", "composed"), ("recombined", "composed")),  # likewise
}
HEAD = r"(lm_head|embed_out)\..*"  # names of the output layer's tensors
MAY_DIFFER = HEAD + r"|.*\.((attention|attn)\.bias|masked_bias|inv_freq)"  # old buffers; configs:
MAY_DIFFER += "|architectures|dtype|transformers_version|use_cache|_name_or_path"
LAYER_LABEL = "layer (0 = token embedding, last = after the final norm)"


class Text(NamedTuple):
    tokens: int  # of the word
    kind: str  # of KINDS, or "reference 1" ...
    word: str  # of WORDS_FILE, or the string of another kind
    frequency: float  # of the word; NaN for other kinds
    token_ids: tuple[int, ...]  # after BOS, carrier included


class Curve(NamedTuple):
    tokens: int
    kind: str
    count: int  # of its texts
    rows: slice  # of these among all
    references: list[slice]  # rows of the texts that `composed` is relative to
    table: dict[str, np.ndarray]  # what is found: see tabulate


class HalfWay(NamedTuple):
    resampled: np.ndarray  # float64 (1 + resamples, layers + 1); infinite: never; NaN: not defined
    values: np.ndarray  # float64 (3, layers + 1): estimate, low, high; NaN: none
    around: np.ndarray  # int64 (2, layers + 1): the checkpoints before and after


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


def read_words(file: Path) -> dict[str, float]:
    """{word: frequency}, in Unicode's form NFC; of words that are then equal the first counts."""
    listed = json.loads(file.read_text(encoding="utf-8-sig"))
    assert isinstance(listed, dict) and listed, 'expected {"word": frequency, ...}'
    words = {}
    for word, frequency in listed.items():
        right = isinstance(frequency, int | float) and 0 < frequency < math.inf
        assert right, f"the frequency of {word!r} is {frequency!r}"
        words.setdefault(unicodedata.normalize("NFC", word.strip()), frequency)
    if len(words) < len(listed):
        print0(f"warning: {file.name}: {len(listed) - len(words)} words stand there twice")
    if MATCH_FREQUENCY and max(words.values()) <= 100 * min(words.values()):
        advice = "give occurrences, as counted in a corpus, not Zipf values, ranks or scores"
        print0(f"warning: {file.name}: all frequencies lie within two powers of ten: {advice}")
    return words


def encode_words(words: list[str], tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """The token ids of each word: with a leading space those that it adds to a letter before it."""
    before = "a " if LEADING_SPACE else ""
    skip = len(tokenizer.encode(before[:1], add_special_tokens=False).ids)
    encodings = tokenizer.encode_batch([before + word for word in words], add_special_tokens=False)
    return [tuple(encoding.ids[skip:]) for encoding in encodings]


def match_frequencies(groups: dict[int, list[Text]]) -> dict[int, list[Text]]:
    """Takes equally many words of each frequency from every group: as many as the poorest has.

    While fewer than MIN_GROUP_SIZE can be matched, the group without which most can is left out.
    """
    bins = {}  # a quarter of a power of ten wide
    for tokens, texts in groups.items():
        bins[tokens] = [math.floor(4 * math.log10(text.frequency)) for text in texts]

    def common(left_out: int | None = None) -> Counter:
        """{bin: words that every group has of it}."""
        return reduce(and_, [Counter(bins[tokens]) for tokens in bins if tokens != left_out])

    while common().total() < MIN_GROUP_SIZE:
        worst = max(bins, key=lambda tokens: common(tokens).total())
        advice = f"add some to {WORDS_FILE}, or set MATCH_FREQUENCY = False"
        print0(f"warning: {worst}-token words left out: too few match in frequency; {advice}")
        del bins[worst]
    taken = common()
    if WORDS_PER_GROUP is not None and taken.total() > WORDS_PER_GROUP:
        ends = np.cumsum([0, *taken.values()]) * WORDS_PER_GROUP // taken.total()
        taken = dict(zip(taken, np.diff(ends), strict=True))  # they add up to WORDS_PER_GROUP
    matched = {}
    for tokens in bins:
        left, matched[tokens] = Counter(taken), []
        for text, bin in zip(groups[tokens], bins[tokens], strict=True):
            if left[bin] > 0:
                left[bin] -= 1
                matched[tokens].append(text)
    return matched


def draw_words(words: dict[str, float], tokenizer: Tokenizer) -> dict[int, list[Text]]:
    """The words of each group, by their number of tokens."""
    listed = {tokens: [] for tokens in GROUPS}
    for word, ids in zip(words, encode_words(list(words), tokenizer), strict=True):
        if len(ids) in listed:
            listed[len(ids)].append(Text(len(ids), "word", word, words[word], ids))
    groups = {}
    for tokens, group in listed.items():
        if len(group) < MIN_GROUP_SIZE:
            print0(f"warning: {tokens}-token words left out: {WORDS_FILE} has {len(group)} of them")
            continue
        order = np.random.default_rng([SEED, tokens]).permutation(len(group))
        groups[tokens] = [group[index] for index in order]
    assert groups, f"{WORDS_FILE} has no group of MIN_GROUP_SIZE = {MIN_GROUP_SIZE} words: add some"
    if MATCH_FREQUENCY:
        return match_frequencies(groups)
    return {tokens: group[:WORDS_PER_GROUP] for tokens, group in groups.items()}


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


def choose_texts(words: dict[str, float], tokenizer: Tokenizer) -> tuple[list[Text], list[Curve]]:
    """All that is read, and the curves. The i-th texts of a group's kinds end in one token."""
    folded = {word.casefold() for word in words}
    carrier = tuple(tokenizer.encode(CARRIER, add_special_tokens=False).ids)
    assert not carrier or len(carrier) >= max(GROUPS), 'make CARRIER longer, or ""'
    texts, curves = [], []
    for tokens, group in draw_words(words, tokenizer).items():
        read, references = {"word": [text.token_ids for text in group]}, []
        if tokens > 1:
            wanted = ["recombined"] if "recombined" in KINDS else []
            if {"word", "recombined"} & set(KINDS):
                wanted += [f"reference {number}" for number in range(1, REFERENCES + 1)]
            made = recombine(read["word"], len(wanted), tokenizer, folded)
            advice = f'add words to {WORDS_FILE}, lower REFERENCES or drop "recombined" from KINDS'
            assert len(made) == len(wanted), f"{tokens}-token words make too few strings: {advice}"
            read |= dict(zip(wanted, made, strict=True))
            read["alone"] = [text.token_ids[-1:] for text in group]
        for kind, sequences in read.items():
            rows = slice(len(texts), len(texts) + len(group))
            if kind.startswith("reference"):
                references.append(rows)
            elif kind in KINDS:
                own = [] if kind == "alone" else references
                curves.append(Curve(tokens, kind, len(group), rows, own, {}))
            else:
                continue
            strings = tokenizer.decode_batch(sequences)
            for text, string, ids in zip(group, strings, sequences, strict=True):
                word = (text.word, text.frequency) if kind == "word" else (string, math.nan)
                texts.append(Text(tokens, kind, *word, carrier[len(ids) - 1 :] + ids))
    assert texts, '1-token words are read as they are: add "word" to KINDS, or more to GROUPS'
    return texts, curves


# ---- measuring: after a change in this section, the next run measures again ----------------------

OF_TEXTS = ("similarity", "covariance", "variance", "stability")  # see compare
OF_TEXTS += ("composed_covariance", "composed_variance")
OF_CURVES = ("unrelated", "per_dimension", "cka")  # one number for all texts of a curve


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


def unbiased_hsic(left: Tensor, right: Tensor) -> float:
    """HSIC of kernels (texts, texts) without their diagonals (Song et al. 2012, equation 5)."""
    count = len(left)
    of_sums = left.sum() * right.sum() / ((count - 1) * (count - 2))
    of_rows = 2 * (left.sum(0) @ right.sum(0)) / (count - 2)
    return ((left * right).sum() + of_sums - of_rows).item() / (count * (count - 3))


def linear_cka(states: Tensor, others: Tensor) -> float:
    """Linear CKA of two (texts, width), by unbiased HSIC (arXiv:2010.15327); NaN if one is <= 0."""
    kernel = (states @ states.T).cpu().double().fill_diagonal_(0)
    other_kernel = (others @ others.T).cpu().double().fill_diagonal_(0)
    own, other = unbiased_hsic(kernel, kernel), unbiased_hsic(other_kernel, other_kernel)
    if own <= 0 or other <= 0:
        return math.nan
    return unbiased_hsic(kernel, other_kernel) / math.sqrt(own * other)


def compare(unit: Tensor, final: Tensor, before: Tensor, references: list[Tensor]) -> dict:
    """Compares the states of one curve in one layer with the final ones and those before.

    Each is float32 (texts, width); references: the mean of theirs now and in the end, or nothing.
    Returns OF_TEXTS, float32 (texts,) each, and OF_CURVES.
    """
    similarity = (unit * final).sum(-1)
    pairs = unit.sum(0) @ final.sum(0) - similarity.sum()  # over all pairs of different texts
    own, own_final = unit - unit.mean(0), final - final.mean(0)
    covariance = (own * own_final).sum(0).double()  # in each dimension
    variances = torch.stack([own.square().sum(0), own_final.square().sum(0)]).double()
    varied = variances.amin(0) >= 1e-8 * len(unit) / unit.shape[1]  # less is rounding
    found = {
        "similarity": similarity,
        "covariance": (own * own_final).sum(-1),
        "variance": own.square().sum(-1),
        "stability": (unit * before).sum(-1),
        "unrelated": pairs / (len(unit) * (len(unit) - 1)),
        "per_dimension": (covariance / variances.prod(0).sqrt())[varied].mean(),
        "cka": linear_cka(own[:1000], own_final[:1000]),
    }
    if references:
        own, own_final = unit - references[0], final - references[1]
        own, own_final = own - own.mean(0), own_final - own_final.mean(0)
        found["composed_covariance"] = (own * own_final).sum(-1)
        found["composed_variance"] = own.square().sum(-1)
    return found


def compare_all(states: list[Tensor], curves: list[Curve], device: torch.device) -> dict:
    """OF_TEXTS and OF_CURVES of a checkpoint, float32 (layers + 1, texts) each, NaN if undefined.

    states: its unit states, the final ones and those before, (layers + 1, texts, width) each.
    """
    shape = (len(states[0]), curves[-1].rows.stop)
    found = {name: torch.full(shape, math.nan) for name in OF_TEXTS + OF_CURVES}
    for layer, curve in product(range(shape[0]), curves):
        unit, final, before = (of_all[layer, curve.rows].to(device) for of_all in states)
        references = []
        if curve.references:
            for of_all in states[:2]:
                read = [of_all[layer, rows].to(device) for rows in curve.references]
                references.append(torch.stack(read).mean(0))
        for name, value in compare(unit, final, before, references).items():
            found[name][layer, curve.rows] = value
    return found


def measure(checkpoints, files, texts, start, curves, device) -> None:
    """Measures the steps of files, {step: npz}, and keeps what is found of each at once."""
    steps = list(checkpoints)
    pairs = zip(steps, [*steps[1:], None], strict=True)  # stability takes the one before, too
    needed = [step for step, after in pairs if step in files or after in files]
    sequences = [start + text.token_ids for text in texts]
    trees = prefix_trees(sequences, BATCH_TOKENS or (512 if device.type == "cpu" else 2048))
    if device.type == "cpu" and DTYPE == "float32" and torch.backends.mkldnn.is_available():
        linear = torch.ops.mkldnn._linear_pointwise  # on AMD CPUs twice as fast as torch's default
        torch.nn.Linear.forward = lambda self, x: linear(x, self.weight, self.bias, "none", [], "")
    read = {steps[-1], *needed}
    with tqdm(total=len(trees) * len(read), unit="batch", disable=RANK > 0) as bar:
        final, final_log_prob = read_states(checkpoints[steps[-1]], trees, texts, device, bar)
        unit = final
        for step in needed:
            unit_before, unit, log_prob = unit, final, final_log_prob
            if step != steps[-1]:
                unit, log_prob = read_states(checkpoints[step], trees, texts, device, bar)
            if step in files:
                found = compare_all([unit, final, unit_before], curves, device)
                if step == steps[0]:
                    found["stability"][:] = math.nan
                partial_file = files[step].with_suffix(".partial.npz")
                np.savez(partial_file, log_prob=log_prob, **found)
                partial_file.replace(files[step])  # whole, or not there


# ---- what is kept --------------------------------------------------------------------------------


def kept_files(kept: Path, checkpoints: dict[int, Path], inputs: list) -> dict[int, Path]:
    """The file of each step, named by a digest of all that its content depends on."""
    sections = Path(__file__).read_text(encoding="utf-8").split("\n# ---- ")
    code = [section for section in sections if section.startswith("measuring")]
    shared = [code, torch.__version__, transformers.__version__, inputs]
    weights, files = {}, {}
    for step, folder in checkpoints.items():
        weights[step] = [(folder / "config.json").read_text(encoding="utf-8")]
        for file in weight_files(folder):
            with file.open("rb") as stream:
                stream.seek(max(0, file.stat().st_size - 2**20))
                tail = hashlib.sha256(stream.read()).hexdigest()
            weights[step] += [file.stat().st_size, file.stat().st_mtime_ns, tail]
    for step, before in zip(checkpoints, [None, *checkpoints], strict=False):
        parts = [shared, weights[max(checkpoints)], weights[step], weights.get(before)]
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


def half_way_steps(progress: np.ndarray, steps: list[int]) -> HalfWay:
    """Where progress last passes 0.5 upwards, by log2(1 + step); empty checkpoints are skipped.

    progress: float64 (1 + resamples, steps, layers + 1).
    """
    position = np.log2(1 + np.array(steps))
    half_way = np.where(np.isnan(progress[:, 0]), np.nan, np.inf)
    around = np.zeros((2, *half_way.shape), int)
    last, last_index = progress[:, 0], np.zeros(half_way.shape, int)  # not empty
    for index in range(1, len(steps)):
        now = progress[:, index]
        crosses = (last < 0.5) & (now >= 0.5)
        part = (0.5 - last) / (now - last)
        place = position[last_index] + part * (position[index] - position[last_index])
        half_way[crosses] = 2 ** place[crosses] - 1
        around[0][crosses] = np.array(steps)[last_index][crosses]
        around[1][crosses] = steps[index]
        last_index = np.where(np.isnan(now), last_index, index)
        last = np.where(np.isnan(now), last, now)
    return HalfWay(half_way, interval(half_way), around[:, 0])


def tabulate(curve: Curve, weights: np.ndarray, found: dict, steps: list[int]) -> dict:
    """Fills a curve's table: the columns of convergence.csv, (steps, layers + 1) each, centred and
    composed with their intervals, (3, steps, layers + 1). Returns {measure: HalfWay}.

    weights: see resample. found: OF_TEXTS, OF_CURVES, float32 (steps, layers + 1, texts) each.
    """
    table, half_ways, variances = curve.table, {}, {}
    for name in ("similarity", *OF_CURVES, "stability"):
        table[name] = found[name][..., curve.rows].mean(-1, dtype=np.float64)
    least = 1e-8 * weights.sum(1)[:, None, None]  # of a variance; less is rounding
    for name, prefix in (("centred", ""), ("composed", "composed_")):
        parts = [found[prefix + part][..., curve.rows] for part in ("covariance", "variance")]
        covariance, variance = (np.tensordot(weights, part, (1, 2)) for part in parts)
        variances[name] = np.where(variance < least, np.nan, variance)
        values = covariance / np.sqrt(variances[name] * variances[name][:, -1:])
        table[name] = interval(values)
        if len(steps) > 1 and (name == "centred" or curve.references):
            first = values[:, :1]
            half_ways[name] = half_way_steps((values - first) / (1 - first), steps)
    table["composed_share"] = variances["composed"][0] / variances["centred"][0]
    return half_ways


def find_known(log_prob: Tensor, word: Curve, other: Curve, weights, steps: list[int]) -> tuple:
    """What known.csv says of a group at each step, float64 (5, steps), and its half-way step.

    log_prob: float32 (steps, texts). word, other: curves of its words and recombined strings.
    """
    of_words, of_others = log_prob[:, word.rows], log_prob[:, other.rows]
    known = weights @ (of_words - of_others).T.astype(float) / weights.sum(1, keepdims=True)
    means = [values.mean(1, dtype=np.float64) for values in (of_words, of_others)]
    values = np.stack([*means, *interval(known)])
    low, high = values[3:, -1]
    first, last = known[:, :1], known[:, -1:] if low > 0 or high < 0 else math.nan
    return values, half_way_steps(((known - first) / (last - first))[..., None], steps)


def find_contrasts(half_ways: dict[tuple, HalfWay]) -> dict[tuple, np.ndarray]:
    """{(tokens, contrast): (3, layers + 1)}, of half-way steps by (tokens, kind, measure)."""
    contrasts = {}
    shortest = min((tokens for tokens, _, _ in half_ways), default=0)
    for tokens, (name, (above, below)) in product(GROUPS, CONTRASTS.items()):
        to_shortest = name.endswith("shortest")
        pair = [(tokens, *above), (shortest if to_shortest else tokens, *below)]
        if set(pair) <= half_ways.keys() and not (to_shortest and tokens == shortest):
            steps, others = (half_ways[key].resampled for key in pair)
            ratio = interval(steps / others)  # NaN, and left out, where neither crosses
            missing = np.isinf(steps[0]) | np.isinf(others[0])
            contrasts[tokens, name] = np.where(missing, np.nan, ratio)
    return contrasts


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


def write_tables(results, steps, texts, curves, known, half_ways, contrasts) -> None:
    rows, known_rows, half_way_rows, contrast_rows = [], [], [], []
    columns = "similarity,unrelated,centred,composed,composed_share,per_dimension,cka,stability"
    for curve in curves:
        for index, layer in np.ndindex(curve.table["cka"].shape):
            row = [curve.tokens, curve.kind, curve.count, steps[index], layer]
            for name in columns.split(","):
                values = curve.table[name][..., index, layer]
                row += values.flatten().tolist()  # three with an interval
            rows.append(row)
    for tokens, values in known.items():
        for step, row in zip(steps, values.T, strict=True):
            known_rows.append([tokens, step, *row])
    counts = {(curve.tokens, curve.kind): curve.count for curve in curves}
    for (tokens, kind, measure), half_way in half_ways.items():
        for layer, values in enumerate(half_way.values.T):
            place = "" if measure == "known" else layer
            around = ["", ""] if np.isnan(values[0]) else half_way.around[:, layer]
            row = [tokens, kind, measure, counts[tokens, kind], place, *values, *around]
            half_way_rows.append(row)
    for (tokens, contrast), ratio in contrasts.items():
        for layer, values in enumerate(ratio.T):
            contrast_rows.append([tokens, contrast, layer, *values])
    for name in ("centred", "composed"):
        columns = columns.replace(f"{name},", f"{name},{name}_low,{name}_high,")
    write_csv(results / "convergence.csv", f"tokens,kind,texts,step,layer,{columns}", rows)
    write_csv(results / "known.csv", "tokens,step,word,recombined,known,low,high", known_rows)
    header = "tokens,kind,curve,texts,layer,half_way_step,low,high,step_before,step_after"
    write_csv(results / "half_way.csv", header, half_way_rows)
    write_csv(results / "contrasts.csv", "tokens,contrast,layer,ratio,low,high", contrast_rows)
    rows = [[*text[:4], " ".join(map(str, text.token_ids))] for text in texts]
    write_csv(results / "texts.csv", "tokens,kind,word,frequency,token_ids", rows)


# ---- figures -------------------------------------------------------------------------------------

MEASURES = {  # of figures against training step: what is drawn, and the label of its axis
    "centred": "centred: correlation",
    "composed": "composed: correlation",
    "similarity": "similarity: mean cosine",
    "stability": "stability: cosine with the checkpoint before",
}


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


def style_of(tokens: int) -> dict:
    """Colour and marker of a group."""
    place = GROUPS.index(tokens)
    colour = matplotlib.colormaps["viridis"](0.85 * place / max(1, len(GROUPS) - 1))
    return {"color": colour, "marker": "osD^vP*X"[place % 8], "markersize": 4}


def draw_line(axes, x, values, label: str, **style) -> None:
    """Draws an estimate and its interval, float64 (3, len(x))."""
    axes.plot(x, values[0], label=label, **style)
    axes.fill_between(x, values[1], values[2], color=style["color"], alpha=0.2, linewidth=0)


def draw_ratios(axes, contrast: str, x, ratio, tokens: int) -> None:
    draw_line(axes, x, ratio, f"{tokens}-token words", **style_of(tokens))
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_title(f"half-way steps: {contrast}", fontsize="medium")


def finish(figure: Figure, axes, label: str, file: Path) -> None:
    """Saves a figure with the label of its x-axes, and a legend of what axes shows."""
    figure.supxlabel(label, fontsize="medium")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside center right")
    figure.savefig(file)


def draw_known(results: Path, steps: list[int], known: dict, half_ways: dict) -> None:
    title = f"{results.name}:\nby how much the model expects words more than recombined strings\n"
    figure, panels = panels_of(title + "(bands: 95 % intervals; dashed: half-way steps)", 1, 1)
    axes = panels[0, 0]
    for tokens, values in known.items():
        style = style_of(tokens)
        draw_line(axes, np.log1p(steps), values[2:], f"{tokens}-token words", **style)
        half_way = np.log1p(half_ways[tokens, "word", "known"].values[0, 0])
        axes.axvline(half_way, color=style["color"], linestyle="--", linewidth=1)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_ylim(top=max(1, axes.get_ylim()[1]))  # lest noise fill the picture
    axes.set_ylabel("known: nats, of the last token")
    mark_steps(axes.xaxis, steps)
    finish(figure, axes, "training step", results / "known.png")


def draw_half_way(results: Path, steps: list[int], half_ways: dict, contrasts: dict) -> None:
    """The half-way step against layer, a column a measure; beneath it the contrasts."""
    title = f"{results.name}: when words have come halfway to their final representation\n"
    title += "(bands: 95 % intervals over last tokens; lines across: checkpoints; dashed: known)"
    figure, panels = panels_of(title, 3, 2, sharex=True)
    columns = [("centred", "alone"), ("composed", "recombined")]
    for axes, (measure, other_kind) in zip(panels[0], columns, strict=True):
        axes.set_title(f"{measure} (thin: {other_kind})", fontsize="medium")
        for (tokens, kind, of), half_way in half_ways.items():
            style, places = style_of(tokens), np.log1p(half_way.values)
            if of == "known":
                axes.axhline(places[0, 0], color=style["color"], linestyle="--", linewidth=1)
            elif (kind, of) == ("word", measure):
                draw_line(axes, range(places.shape[1]), places, f"{tokens}-token words", **style)
            elif (kind, of) == (other_kind, measure):
                axes.plot(places[0], color=style["color"], linewidth=0.8)
        mark_steps(axes.yaxis, steps)
    for (tokens, contrast), ratio in contrasts.items():
        axes = panels[1:].flat[list(CONTRASTS).index(contrast)]
        draw_ratios(axes, contrast, range(ratio.shape[1]), ratio, tokens)
    for axes in panels.flat:
        if not axes.lines:
            axes.set_axis_off()
    panels[0, 0].set_ylabel("half-way step")
    finish(figure, panels[0, 0], LAYER_LABEL, results / "half_way.png")


def draw_curves(file: Path, title: str, steps: list[int], names: list[str], lines: list) -> None:
    """Measures against step, a panel each. lines: (label, style, curve, layer) each."""
    title += f", towards step {steps[-1]}\n(bands: 95 % intervals; dotted: unrelated texts)"
    shape = (2, 2) if len(names) == 4 else (1, len(names))
    figure, panels = panels_of(title, *shape, sharex=True)
    for axes, name in zip(panels.flat, names, strict=True):
        axes.set_ylabel(MEASURES[name])
        for label, style, curve, layer in lines:
            values = np.broadcast_to(curve.table[name][..., layer], (3, len(steps)))
            draw_line(axes, np.log1p(steps), values, label, **style)
            if name == "similarity":
                floor = curve.table["unrelated"][:, layer]
                axes.plot(np.log1p(steps), floor, ":", color=style["color"])
    mark_steps(panels[0, 0].xaxis, steps)
    finish(figure, panels[0, 0], "training step", file)


def draw_figures(results, steps, curves, known, half_ways, contrasts) -> None:
    for file in results.iterdir():  # of an earlier run with other groups or layers
        if re.fullmatch(r"(known|half_way|layer_\d\d|group_\d+_tokens)\.png", file.name):
            file.unlink()
    if known:
        draw_known(results, steps, known, half_ways)
    if len(steps) > 1:
        draw_half_way(results, steps, half_ways, contrasts)
    shown = [curve for curve in curves if curve.kind == curves[0].kind]
    layers = range(curves[0].table["cka"].shape[1])
    for curve in shown:
        lines = []
        for layer in layers:
            style = {"color": matplotlib.colormaps["viridis"](layer / layers[-1]), "marker": "."}
            lines.append((f"layer {layer}", style, curve, layer))
        names = ["similarity", "centred", "composed"][: 3 if curve.references else 2]
        title = f"{results.name}: {curve.count} {curve.tokens}-token texts, kind {curve.kind}"
        draw_curves(results / f"group_{curve.tokens}_tokens.png", title, steps, names, lines)
    for layer in tqdm(layers, desc="figures", unit="layer"):
        lines = []
        for curve in shown:
            lines.append((f"{curve.tokens}-token words", style_of(curve.tokens), curve, layer))
        title = f"{results.name}: layer {layer} of {layers[-1]}, kind {shown[0].kind}"
        draw_curves(results / f"layer_{layer:02d}.png", title, steps, list(MEASURES), lines)


def write_families(found: dict[str, dict]) -> None:
    """families.csv and families.png, from {family: {(contrast, tokens): a value a layer}}."""
    rows = []
    for (contrast, tokens), first in next(iter(found.values())).items():
        for layer in range(len(first)):
            values = []
            for compared in found.values():
                of_layers, nearest = compared.get((contrast, tokens), [math.nan]), 0
                if layer > 0 and len(of_layers) > 1:  # nearest in depth, ties to the lower
                    depths = np.arange(1, len(of_layers)) * (len(first) - 1)
                    nearest = 1 + int(np.abs(depths - layer * (len(of_layers) - 1)).argmin())
                values.append(float(of_layers[nearest]))
            summary = [np.nanmedian(values), np.nanmin(values), np.nanmax(values)]
            place = "" if contrast == "known" else layer
            rows.append([contrast, tokens, place, np.isfinite(values).sum(), *summary, *values])
    title = f"median of {len(found)} families (bands: lowest to highest)"
    figure, panels = panels_of(title, 2, 2, sharex=True)
    for (contrast, axes), tokens in product(zip(CONTRASTS, panels.flat, strict=True), GROUPS):
        own = [row for row in rows if row[:2] == [contrast, tokens]]
        if own:
            ratio = np.array([row[4:7] for row in own]).T
            draw_ratios(axes, contrast, range(len(own)), ratio, tokens)
    finish(figure, panels[0, 0], LAYER_LABEL, HERE / RESULTS_DIR / "families.png")
    header = "contrast,tokens,layer,families,median,lowest,highest," + ",".join(found)
    write_csv(HERE / RESULTS_DIR / "families.csv", header, rows)


# ---- the run -------------------------------------------------------------------------------------


def prepare(family: Path) -> tuple[dict[int, Path], list[Text], list[Curve], tuple[int, ...]]:
    """A family's checkpoints, its texts, their curves, and the token ids before every text."""
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
    with blame(HERE / WORDS_FILE):
        words = read_words(HERE / WORDS_FILE)
    texts, curves = choose_texts(words, tokenizers[final])
    drawn = [CARRIER, *sorted({text.word for text in texts if not math.isnan(text.frequency)})]
    expected = encode_words(drawn, tokenizers[final])
    for folder, tokenizer in tokenizers.items():  # what they do: libraries write them differently
        for word, ids, others in zip(drawn, expected, encode_words(drawn, tokenizer), strict=True):
            reading = f"{word!r} is {list(others)}, in {final.name} {list(ids)}"
            assert ids == others, f"{folder}: its tokenizer is another: {reading}"
    longest = len(start) + max(len(text.token_ids) for text in texts)
    config = AutoConfig.from_pretrained(final, local_files_only=True)
    most = getattr(config, "max_position_embeddings", math.inf)
    assert longest <= most, f"{family} reads {most} tokens, a text has {longest}: shorten it"
    return checkpoints, texts, curves, start


def print_answer(layers: int, known: dict, half_ways: dict, contrasts: dict) -> None:
    """`known`; half-way steps in the first, middle and last layer; contrasts in the middle one."""
    shown = sorted({0, layers // 2, layers - 1})
    print0("half-way step [95 % interval]" + "".join(f"{f'layer {layer}':>24}" for layer in shown))
    for (tokens, kind, measure), half_way in half_ways.items():
        line = f"  {f'{tokens}-token words, {measure}':27}"
        for layer in shown if measure != "known" else [0]:
            step, low, high = half_way.values[:, layer]
            cell = "none" if np.isnan(step) else f"{step:.0f} [{low:.0f}, {high:.0f}]"
            line += f"{cell:>24}"
        if measure == "known":
            value, low, high = known[tokens][2:, -1]
            line += f"      of {value:.2f} nats [{low:.2f}, {high:.2f}] at the end"
        if kind == "word":
            print0(line)
    print0(f"ratio of half-way steps in layer {layers // 2} [95 % interval; with 1: none shown]")
    for (tokens, contrast), ratio in contrasts.items():
        value, low, high = ratio[:, layers // 2]
        print0(f"  {f'{tokens}-token {contrast}':40} {value:.2f} [{low:.2f}, {high:.2f}]")


def analyse(family: Path, plan: tuple, device: torch.device) -> dict[tuple, np.ndarray]:
    """Measures a family and writes its results. Returns what families are compared by."""
    checkpoints, texts, curves, start = plan
    steps, results = list(checkpoints), HERE / RESULTS_DIR / family.name
    with blame(f"RESULTS_DIR = {RESULTS_DIR!r}"):
        (results / "kept").mkdir(parents=True, exist_ok=True)
    owner = results / "kept" / "family.txt"
    name = owner.read_text(encoding="utf-8") if owner.exists() else str(family)
    taken = name != str(family) and Path(name).exists()
    assert not taken, f"{results} holds the results of {name}: rename one of the families"
    owner.write_text(str(family), encoding="utf-8")
    labels = [(curve.tokens, curve.kind, curve.count) for curve in curves]
    inputs = [labels, start, [text.token_ids for text in texts], DTYPE, device.type, BATCH_TOKENS]
    files = kept_files(results / "kept", checkpoints, inputs)
    missing = [step for step in steps if not files[step].exists()]
    frequencies = [text.frequency for text in texts if not math.isnan(text.frequency)] or [math.nan]
    print0(f"family   {family}")
    print0(f"steps    {', '.join(map(str, steps))} ({len(missing)} of {len(steps)} to measure)")
    read = ", ".join(f"{count} {tokens}-token {kind}" for tokens, kind, count in labels)
    print0(f"texts    {read}; frequencies {min(frequencies):g} to {max(frequencies):g}")
    print0(f"device   {device}, {DTYPE}" + (f", {RANKS} ranks" if RANKS > 1 else ""))
    share = steps[len(steps) * RANK // RANKS : len(steps) * (RANK + 1) // RANKS]  # neighbours
    share = {step: files[step] for step in share if step in missing}
    if share:
        measure(checkpoints, share, texts, start, curves, device)
    if RANKS > 1:
        torch.distributed.barrier()
    if RANK > 0:
        return {}
    kept = [np.load(files[step]) for step in steps]
    names = ("log_prob", *OF_TEXTS, *OF_CURVES)
    found = {name: np.stack([arrays[name] for arrays in kept]) for name in names}
    of_curves = ~np.isnan(found["similarity"][0, 0])  # references have none
    warn_of_copies(steps, found["similarity"][..., of_curves])
    layers = found["cka"].shape[1]
    half_ways, known, of_kind = {}, {}, {(curve.tokens, curve.kind): curve for curve in curves}
    for curve in curves:
        weights = resample([text.token_ids[-1] for text in texts[curve.rows]], curve.tokens)
        for name, half_way in tabulate(curve, weights, found, steps).items():
            half_ways[curve.tokens, curve.kind, name] = half_way
        other = of_kind.get((curve.tokens, "recombined"))
        if curve.kind == "word" and other:
            values, half_way = find_known(found["log_prob"], curve, other, weights, steps)
            known[curve.tokens], half_ways[curve.tokens, "word", "known"] = values, half_way
    contrasts = find_contrasts(half_ways)
    write_tables(results, steps, texts, curves, known, half_ways, contrasts)
    draw_figures(results, steps, curves, known, half_ways, contrasts)
    if len(steps) > 1:
        print_answer(layers, known, half_ways, contrasts)
    print0(f"results  {results}")
    compared = {(name, tokens): ratio[0] for (tokens, name), ratio in contrasts.items()}
    of_known = {("known", tokens): half_ways[tokens, "word", "known"].values[0] for tokens in known}
    return compared | of_known


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("families", metavar="FAMILY", nargs="*", default=[CHECKPOINTS_DIR])
    kinds = ("word", "recombined", "alone")
    assert KINDS and set(KINDS) <= set(kinds), f"KINDS = {KINDS!r}: expected some of {kinds}"
    assert isinstance(GROUPS, tuple) and GROUPS, f"GROUPS = {GROUPS!r}: expected as (1, 2, 3)"
    assert DTYPE in ("float32", "bfloat16", "float16"), f"DTYPE = {DTYPE!r}: such as bfloat16"
    assert BOOTSTRAP_RESAMPLES > 0, "BOOTSTRAP_RESAMPLES: expected 1 or more"
    least = min(MIN_GROUP_SIZE, WORDS_PER_GROUP or 4)
    assert least >= 4, "MIN_GROUP_SIZE and WORDS_PER_GROUP: expected 4 or more"
    assert LEADING_SPACE or not CARRIER, 'LEADING_SPACE = False needs CARRIER = ""'
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

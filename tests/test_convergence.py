"""token_convergence_analysis.py, run as a user runs it, against plain loops and planted truths."""

import json
import math
import re
from collections import Counter
from fractions import Fraction
from functools import cache
from itertools import pairwise, permutations, product
from pathlib import Path
from typing import NamedTuple

import helpers
import numpy as np
import pytest
import torch
import transformers as tf
from helpers import ALL_WORDS, WORDS, Run, good_run, link, place, token_ids
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, trainers

SIZE = 24  # words of a group
STEPS = [0, 4, 16, 64]
CARRIER = token_ids("The next word that you will find on this page of the list is", False)
BOS = 0  # <|endoftext|>
KEYS = {  # columns that say what a row is about
    "convergence.csv": ("tokens", "kind", "step", "layer"),
    "known.csv": ("tokens", "step"),
    "half_way.csv": ("tokens", "kind", "curve", "layer"),
    "contrasts.csv": ("tokens", "contrast", "layer"),
    "families.csv": ("contrast", "tokens", "layer"),
}
TABLES = ["texts.csv", *KEYS][:5]  # of one family
CONTRASTS = {  # kind and measure of the half-way steps above and below
    "word / shortest": ("word", "centred", "word", "centred"),
    "last token / shortest": ("alone", "centred", "word", "centred"),
    "word / last token": ("word", "centred", "alone", "centred"),
    "composed / recombined": ("word", "composed", "recombined", "composed"),
}


class Text(NamedTuple):
    word: str
    frequency: float
    token_ids: list[int]  # after BOS


def read_texts(results: Path) -> dict[tuple[int, str], list[Text]]:
    texts = {}
    for tokens, kind, *text, ids in map(dict.values, helpers.read_csv(results / "texts.csv")):
        text = Text(text[0], helpers.number(text[1]), list(map(int, ids.split())))
        texts.setdefault((int(tokens), kind), []).append(text)
    return texts


def read_rows(results: Path, table: str) -> dict[tuple, dict[str, float]]:
    """{KEYS, numbers where they can be: {other column: value}}; an empty cell is NaN."""
    rows = {}
    for row in helpers.read_csv(results / table):
        key = [row.pop(name) for name in KEYS[table]]
        key = tuple(int(part) if part.isdecimal() else part for part in key)
        assert key not in rows
        rows[key] = {name: helpers.number(cell) for name, cell in row.items()}
    return rows


# ---- the plain computation, from texts.csv alone -------------------------------------------------


def parts_of(states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What each text adds to covariance and variance, float64 (steps, layers + 1, texts)."""
    own = states - states.mean(2, keepdims=True)
    return (own * own[-1]).sum(-1), (own * own).sum(-1)


def correlation(parts: tuple[np.ndarray, np.ndarray], members: list[int]) -> np.ndarray:
    """float64 (steps, layers + 1), of some texts, each as often as it stands among them."""
    covariance, variance = (part[..., members].sum(-1) for part in parts)
    variance = np.where(variance < 1e-8 * len(members), np.nan, variance)
    return covariance / np.sqrt(variance * variance[-1])


def half_way_of(values, steps: list[int], end: float = 1) -> tuple[float, float, float]:
    """The half-way step, infinite if there is none, NaN if undefined, and the steps around it."""
    points = []
    for step, value in zip(steps, values, strict=True):
        progress = (value - values[0]) / (end - values[0])
        if not math.isnan(progress):
            points.append((step, progress))
    for (step, low), (after, high) in reversed(list(pairwise(points))):
        if low < 0.5 <= high:
            way = (0.5 - low) / (high - low)
            place = (1 - way) * math.log2(1 + step) + way * math.log2(1 + after)
            return 2**place - 1, step, after
    return math.inf if points else math.nan, math.nan, math.nan


def cka_of(left: np.ndarray, right: np.ndarray) -> float:
    """Linear CKA of float64 (texts, width), by the definition of unbiased HSIC as a U-statistic.

    Song et al. 2012, equation 4: the mean of K_ij (L_ij + L_qr - 2 L_iq) over all i, j, q, r that
    differ from each other.
    """
    i, j, q, r = np.array(list(permutations(range(len(left)), 4))).T

    def hsic(first: np.ndarray, second: np.ndarray) -> float:
        K, L = first @ first.T, second @ second.T
        return (K[i, j] * (L[i, j] + L[q, r] - 2 * L[i, q])).mean()

    return hsic(left, right) / math.sqrt(hsic(left, left) * hsic(right, right))


def naive_tables(results: Path, family: Path, steps: list[int], before=(BOS,), cka=()) -> dict:
    """{table: {key: {column: value}}}; a value with an interval is an array, resamples after it.

    cka: the (step, layer) for which it is computed, by more than a hundred thousand quadruples.
    """
    unit, log_prob, texts = {}, {}, read_texts(results)
    for key, group in texts.items():
        sequences = [[*before, *text.token_ids] for text in group]
        read = [helpers.naive_read(family / f"step{step}", sequences) for step in steps]
        states = np.array([states for states, _ in read])  # (steps, layers + 1, texts, width)
        unit[key] = states / np.linalg.norm(states, axis=-1, keepdims=True)
        log_prob[key] = np.array([found for _, found in read])
    tables, half_way, shortest = {name: {} for name in TABLES[1:]}, {}, min(texts)[0]
    for (tokens, kind), group in texts.items():
        if kind.startswith("reference"):
            continue
        own, count = unit[tokens, kind], len(group)
        draws = helpers.naive_resamples([text.token_ids[-1] for text in group], 12345 + tokens)
        draws, ends = [list(range(count)), *draws], dict.fromkeys(("centred", "composed"), 1)
        parts = {"centred": parts_of(own)}
        if tokens > 1 and kind != "alone":
            first, second, third = (unit[tokens, f"reference {i}"] for i in (1, 2, 3))
            parts["composed"] = parts_of(own - (first + second + third) / 3)
        values = {}  # (1 + resamples, steps, layers + 1)
        for measure, of_texts in parts.items():
            values[measure] = np.array([correlation(of_texts, members) for members in draws])
        for (index, step), layer in product(enumerate(steps), range(own.shape[1])):
            now, final = own[index, layer], own[-1, layer]
            row = dict.fromkeys(("composed", "composed_share", "stability"), math.nan)
            row |= {name: values[name][:, index, layer] for name in parts}
            row["similarity"] = np.diagonal(now @ final.T).mean()
            row["unrelated"] = (now @ final.T)[~np.eye(count, dtype=bool)].mean()
            varied = np.minimum(now.var(0), final.var(0)) >= 1e-8 / now.shape[1]
            pairs = zip(now.T[varied], final.T[varied], strict=True)
            row["per_dimension"] = np.mean([np.corrcoef(*pair)[0, 1] for pair in pairs])
            if "composed" in parts and layer > 0:
                part, whole = (parts[name][1][index, layer] for name in ("composed", "centred"))
                row["composed_share"] = part.sum() / whole.sum()
            if index > 0:
                row["stability"] = (now * own[index - 1, layer]).sum(-1).mean()
            if (step, layer) in cka:
                row["cka"] = cka_of(now, final)
            tables["convergence.csv"][tokens, kind, step, layer] = row | {"texts": count}
        if kind == "word" and (tokens, "recombined") in texts:
            gain = log_prob[tokens, "word"] - log_prob[tokens, "recombined"]
            values["known"] = np.array([gain[:, members].mean(-1) for members in draws])[..., None]
            final = read_rows(results, "known.csv")[tokens, steps[-1]]  # its interval may touch 0
            known = final["low"] > 0 or final["high"] < 0
            ends["known"] = values["known"][:, -1, 0] if known else math.nan
            for index, step in enumerate(steps):
                row = {"word": log_prob[tokens, "word"][index].mean()}
                row["recombined"] = log_prob[tokens, "recombined"][index].mean()
                tables["known.csv"][tokens, step] = row | {"known": values["known"][:, index, 0]}
        for measure, of_draws in values.items():
            for layer, of_layer in enumerate(np.moveaxis(of_draws, 2, 0)):
                key = (tokens, kind, measure, "" if measure == "known" else layer)
                found = []
                of_ends = np.broadcast_to(ends[measure], len(draws))
                for draw, end in zip(of_layer, of_ends, strict=True):
                    found.append(half_way_of(draw, steps, end))
                half_way[key], (_, step, after) = np.array(found)[:, 0], found[0]
                row = {"half_way_step": half_way[key], "step_before": step, "step_after": after}
                tables["half_way.csv"][key] = row | {"texts": count}
    for (tokens, kind, measure, layer), above in half_way.items():
        for contrast, (*of_above, below_kind, below_measure) in CONTRASTS.items():
            other = shortest if contrast.endswith("shortest") else tokens
            below = half_way.get((other, below_kind, below_measure, layer))
            to_itself = other == tokens == shortest and of_above == [below_kind, below_measure]
            if of_above == [kind, measure] and below is not None and not to_itself:
                with np.errstate(invalid="ignore"):
                    tables["contrasts.csv"][tokens, contrast, layer] = {"ratio": above / below}
    return tables


def assert_rows(rows: dict, expected: dict, **tolerance: float) -> None:
    assert rows.keys() == expected.keys()
    for key, row in expected.items():
        values = {name: float(np.atleast_1d(value)[0]) for name, value in row.items()}
        for name, value in values.items():
            if math.isinf(value) or (name == "ratio" and value == 0):  # a half-way step is never
                values[name] = math.nan
        shown = {name: rows[key][name] for name in values}
        assert shown == pytest.approx(values, nan_ok=True, **tolerance), key


def assert_naive(results: Path, expected: dict[str, dict]) -> None:
    """All that the tables hold, intervals aside, is as in the plain computation."""
    tolerances = {"convergence.csv": {"abs": 5e-5, "rel": 0}, "known.csv": {"abs": 1e-4, "rel": 0}}
    for table, rows in expected.items():
        assert_rows(read_rows(results, table), rows, **tolerances.get(table, {"rel": 2e-3}))


# ---- families and runs that tests share ----------------------------------------------------------

SHAPE = {"vocab_size": 50_304, "hidden_size": 16, "num_attention_heads": 2}
SHAPE |= {"intermediate_size": 32, "initializer_range": 0.3, "max_position_embeddings": 32}
OTHERS = {  # configs by the name of the family, of several depths
    "qwen2": tf.Qwen2Config(**SHAPE, num_hidden_layers=4, num_key_value_heads=1),
    "llama": tf.LlamaConfig(**SHAPE, num_hidden_layers=2),
    "olmo2": tf.Olmo2Config(**SHAPE, num_hidden_layers=3),
    "gpt2": tf.GPT2Config(**SHAPE, num_hidden_layers=2),
    "small": tf.GPTNeoXConfig(**SHAPE, num_hidden_layers=1),
}
OTHER_STEPS = [0, 3, 15]
SMALL = {"GROUPS": (1, 2), "WORDS_PER_GROUP": SIZE}


def words_in(count: int) -> dict[str, float]:
    """All words of one token, and of the others those that end in the commonest last tokens."""
    counts = Counter(token_ids(word)[-1] for word in ALL_WORDS if len(token_ids(word)) > 1)
    common, words = {token for token, _ in counts.most_common(count)}, {}
    for word, frequency in ALL_WORDS.items():
        if len(token_ids(word)) == 1 or token_ids(word)[-1] in common:
            words[word] = frequency
    return words


@pytest.fixture(scope="module")
def main(miniature: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """All groups and kinds of the miniature, of words whose last tokens are often shared."""
    folder = tmp_path_factory.mktemp("main")
    settings = {"WORDS_PER_GROUP": SIZE, "BOOTSTRAP_RESAMPLES": 5000}
    script = place(folder, inputs={WORDS: words_in(60)}, **settings)
    helpers.show_lines(script)
    return good_run(script, link(miniature, folder / "linked", STEPS))


@pytest.fixture(scope="module")
def expected(main: Run, miniature: Path) -> dict[str, dict]:
    return naive_tables(main.results, miniature, STEPS, cka=[(0, 3), (16, 0), (16, 6)])


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Families of other architectures, and a small one of Pythia's.

    The tokenizer of "llama" puts a space before every text by itself, as Llama's does.
    """
    folder, families = tmp_path_factory.mktemp("others"), {}
    for name, config in OTHERS.items():
        families[name] = helpers.random_family(folder / name, config, {0: 0, 3: 0.4, 15: 1})
    tokenizer = Tokenizer(models.BPE())
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    strings = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(strings)
    special = {"special_tokens": ["<|endoftext|>"], "show_progress": False}
    tokenizer.train_from_iterator(ALL_WORDS, trainers.BpeTrainer(vocab_size=5000, **special))
    for folder in families["llama"].iterdir():
        tokenizer.save(str(folder / "tokenizer.json"))
    return families


@pytest.fixture(scope="module")
def compared(others: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of a run of all of them."""
    script = place(tmp_path_factory.mktemp("families"), **SMALL)
    return good_run(script, *others.values()).results.parent


# ---- the numbers ---------------------------------------------------------------------------------


def test_values_are_naive(main: Run, expected: dict[str, dict]) -> None:
    assert_naive(main.results, expected)
    assert_files(main.results, [1, 2, 3, 4], 7)


def test_intervals_are_those_of_a_plain_bootstrap(main: Run, expected: dict[str, dict]) -> None:
    """Of half-way steps and contrasts, whose distributions have gaps, nearly all are."""
    for table, share in zip(TABLES[1:], (1, 1, 0.9, 0.9), strict=True):
        found, pairs = read_rows(main.results, table), []
        for key, row in expected[table].items():
            for name, values in row.items():
                before = f"{name}_" if table == "convergence.csv" else ""
                if isinstance(values, np.ndarray) and not math.isnan(found[key][name]):
                    bounds = [found[key][f"{before}{end}"] for end in ("low", "high")]
                    pairs.append((bounds, values[1:]))
        helpers.assert_intervals(pairs, share)


# ---- what is read --------------------------------------------------------------------------------


def test_words_are_those_of_the_file_and_matched_in_frequency(main: Run):
    words = json.loads((main.results.parents[1] / WORDS).read_text(encoding="utf-8"))
    texts, drawn, frequencies = read_texts(main.results), {}, []
    available = {tokens: Counter() for tokens in (1, 2, 3, 4)}
    for word, frequency in words.items():
        if len(token_ids(word)) in available:
            available[len(token_ids(word))][math.floor(4 * math.log10(frequency))] += 1
    for tokens in available:
        group, drawn[tokens] = texts[tokens, "word"], Counter()
        assert len({text.word for text in group}) == len(group) == SIZE
        for text in group:
            assert text.frequency == words[text.word] and len(token_ids(text.word)) == tokens
            assert text.token_ids == CARRIER[tokens - 1 :] + token_ids(text.word)
            drawn[tokens][math.floor(4 * math.log10(text.frequency))] += 1
            frequencies.append(text.frequency)
        assert drawn[tokens] == drawn[1]
    room = {index: min(counts[index] for counts in available.values()) for index in available[1]}
    for index, count in room.items():
        assert abs(drawn[1][index] - count * SIZE / sum(room.values())) < 1
    assert f"{min(frequencies):g} to {max(frequencies):g}" in main.out


def test_last_tokens_stand_at_one_position_in_all_kinds(main: Run) -> None:
    texts = read_texts(main.results)
    kinds = ["word", "recombined", "alone", *(f"reference {number}" for number in (1, 2, 3))]
    assert texts.keys() == {(1, "word"), *product((2, 3, 4), kinds)}
    for (tokens, kind), group in texts.items():
        length = 1 if kind == "alone" else tokens
        for text, word in zip(group, texts[tokens, "word"], strict=True):
            own = text.token_ids[-length:]
            assert text.token_ids == CARRIER[length - 1 :] + own
            assert own[-1] == word.token_ids[-1]
            if kind != "word":
                assert text.word == helpers.gpt_neox_tokenizer().decode(own)
                assert math.isnan(text.frequency)


@pytest.mark.parametrize("few", [False, True])
def test_recombined_strings_are_no_words(main: Run, miniature: Path, tmp_path: Path, few) -> None:
    """Also where words have so few last tokens that most orders of their beginnings make one."""
    if few:
        settings = {"GROUPS": (3,), "WORDS_PER_GROUP": SIZE, "BOOTSTRAP_RESAMPLES": 10}
        script = place(tmp_path, inputs={WORDS: words_in(8)}, **settings)
        main = good_run(script, link(miniature, tmp_path / "final", STEPS[-1:]))
    words = json.loads((main.results.parents[1] / WORDS).read_text(encoding="utf-8"))
    texts, folded = read_texts(main.results), {word.casefold() for word in words}
    for tokens in [3] if few else [2, 3, 4]:
        own, orders = [text.token_ids[:-1] for text in texts[tokens, "word"]], set()
        for kind in ("recombined", "reference 1", "reference 2", "reference 3"):
            group = texts[tokens, kind]
            beginnings = [text.token_ids[:-1] for text in group]
            orders.add(str(beginnings))
            assert sorted(beginnings) == sorted(own)
            for text, beginning, own_beginning in zip(group, beginnings, own, strict=True):
                assert beginning != own_beginning
                assert text.word.strip().casefold() not in folded
                ids = helpers.gpt_neox_tokenizer().encode(text.word).ids
                assert ids == text.token_ids[-tokens:]
        assert len(orders) == 4


def test_setting_of_the_study(miniature: Path, tmp_path: Path) -> None:
    """Bare words without BOS, drawn at random from each group."""
    family, steps = link(miniature, tmp_path / "short", [0, 16, 64]), [0, 16, 64]
    off = dict.fromkeys(("PREPEND_BOS", "LEADING_SPACE", "MATCH_FREQUENCY"), False)
    settings = off | {"KINDS": ("word",), "CARRIER": "", "GROUPS": (1, 3), "WORDS_PER_GROUP": 40}
    found = good_run(place(tmp_path / "here", **settings), family)
    assert_naive(found.results, naive_tables(found.results, family, steps, before=()))
    assert_files(found.results, [1, 3], 7, without={"known.png"})
    texts = read_texts(found.results)
    kinds = ("word", "reference 1", "reference 2", "reference 3")
    assert texts.keys() == {(1, "word"), *product([3], kinds)}
    for tokens in (1, 3):
        group = [word for word in ALL_WORDS if len(token_ids(word, False)) == tokens]
        drawn = []
        for text in texts[tokens, "word"]:
            assert text.token_ids == token_ids(text.word, False)
            drawn.append(group.index(text.word))
        assert len(set(drawn)) == 40 and drawn != sorted(drawn)
        assert 0.25 < np.mean(drawn) / len(group) < 0.75  # 0.5, with a standard error of 0.05


# ---- planted truths ------------------------------------------------------------------------------

PLANTED_STEPS = [0, 1, 3, 7, 15, 31]  # 0 to 5 in log2(1 + step)
EARLY = [0.2, 0.68, 0.36, 0.84, 1, 1]  # half of its way at 0.8 and, for good, at 2.5
LATE = [0.2, 0.2, 0.2, 0.4, 0.8, 1]  # at 3.5
OF_LAST = {1: EARLY, 2: EARLY, 3: LATE}  # correlation of the last tokens of a group with their end
OF_FIRST = LATE  # of what first tokens add
HEAD = [0.2, 0.4, 0.8, 1, 1, 1]  # by how much words are expected, at 1.5
EARLY_STEP, LATE_STEP, HEAD_STEP = 2**2.5 - 1, 2**3.5 - 1, 2**1.5 - 1


def code_of(token: int) -> np.ndarray:
    """A token's direction, of mean 0 and length 1: float64 (12,)."""
    signs = np.random.default_rng(token).choice([-1.0, 1.0], 6)
    return np.concatenate([signs, -signs]) / math.sqrt(12)


@cache
def planted_words() -> list[str]:
    """24 words of one, two and three tokens each; no token has two places in them and CARRIER.

    A last token is that of two words, at most.
    """
    roles, words, ends = dict.fromkeys([BOS, *CARRIER], "carrier"), [], Counter()
    for tokens, word in product(OF_LAST, ALL_WORDS):
        ids = token_ids(word)
        own = dict(zip(ids, [*("first", "second")[: tokens - 1], tokens], strict=False))
        if len(ids) == len(own) == tokens and len(words) < SIZE * tokens and word.isalpha():
            fits = [roles.get(token, place) == place for token, place in own.items()]
            if all(fits) and ends[ids[-1]] < 2:
                ends[ids[-1]] += 1
                roles |= own
                words.append(word)
    return words


@torch.no_grad()
def plant(family: Path) -> None:
    """Models of one block, in which all that is read is known beforehand.

    A state has six parts: the last token's own two, between which it turns as OF_LAST says; its
    first token's code; the two between which attention turns that code, as OF_FIRST says, when it
    brings it to the last token; and a constant one, of all other tokens. All lengths are constant,
    so that centred and composed are these cosines. Groups of two tokens: the output layer expects
    each last token after its own beginnings, more as HEADS say. Of three: after all beginnings.
    """
    config = tf.GPTNeoXConfig(**SHAPE | {"hidden_size": 64, "num_attention_heads": 1})
    config.num_hidden_layers = 1
    model = tf.AutoModelForCausalLM.from_config(config)
    own, turned, of_first = slice(0, 12), slice(12, 24), slice(24, 36)
    brought, brought_turned, constant = slice(36, 48), slice(48, 60), slice(60, 64)
    start = np.zeros(64)
    start[constant] = 0.5, -0.5, 0.5, -0.5
    attention = model.gpt_neox.layers[0].attention
    value = attention.query_key_value.weight[128:]  # queries and keys are 0: a mean over all
    length = 0.7 * (len(CARRIER) + 2) / 8  # 0.7: of what is added; 8: of what a norm returns
    for name, parameter in model.named_parameters():
        parameter.fill_("norm.weight" in name)
    attention.dense.weight += torch.eye(64)
    for index, step in enumerate(PLANTED_STEPS):
        rows, head = np.tile(start, (50_304, 1)), np.zeros((50_304, 64))
        for word in planted_words():
            *beginning, last = token_ids(word)
            cosine = OF_LAST[len(beginning) + 1][index]
            rows[last] = 0
            rows[last, own] = math.sqrt(1 - cosine**2) * code_of(last)
            rows[last, turned] = cosine * code_of(last)
            if beginning:
                rows[beginning[0]] = 0
                rows[beginning[0], of_first] = code_of(beginning[0])
            if len(beginning) == 1:
                head[last, of_first] += HEAD[index] * code_of(beginning[0])
            elif len(beginning) == 2:
                head[last] = HEAD[index] * start
                head[last, brought_turned] = code_of(BOS)  # lest all beginnings be the same
        value[brought, of_first] = length * math.sqrt(1 - OF_FIRST[index] ** 2) * torch.eye(12)
        value[brought_turned, of_first] = length * OF_FIRST[index] * torch.eye(12)
        model.get_input_embeddings().weight.copy_(torch.tensor(rows))
        model.get_output_embeddings().weight.copy_(torch.tensor(head))
        helpers.save_checkpoint(model, family / f"step{step}")


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder, words = tmp_path_factory.mktemp("truth"), dict.fromkeys(planted_words(), 1000)
    plant(folder / "planted")
    script = place(folder, inputs={WORDS: words}, GROUPS=(1, 2, 3))
    return good_run(script, folder / "planted")


def test_what_first_tokens_add_is_found_where_it_was_planted(truth: Run) -> None:
    """In groups of two it settles later than the last token, in groups of three with it."""
    for (tokens, kind, step, layer), row in read_rows(truth.results, "convergence.csv").items():
        index, names = PLANTED_STEPS.index(step), ["composed", "composed_low", "composed_high"]
        planted = OF_FIRST[index]
        if layer == 0 or kind == "alone" or tokens == 1:
            names, planted = ["similarity", "centred", "centred_low"], OF_LAST[tokens][index]
        assert [row[name] for name in names] == pytest.approx([planted] * 3, abs=2e-6)
    for (tokens, kind, measure, layer), row in read_rows(truth.results, "half_way.csv").items():
        step, *around = (EARLY_STEP, 3, 7) if tokens < 3 else (LATE_STEP, 7, 15)
        if measure == "composed":
            step, *around = (LATE_STEP, 7, 15) if layer else [math.nan] * 3
        shown = [row[name] for name in ("half_way_step", "low", "high")]
        if (tokens, measure, layer) == (2, "centred", 1) and kind != "alone":  # of both
            assert EARLY_STEP < shown[1] < shown[0] < shown[2] < LATE_STEP
        elif measure != "known":
            assert shown == pytest.approx([step] * 3, rel=1e-4, nan_ok=True)
            assert [*row.values()][-2:] == pytest.approx(around, nan_ok=True)


def test_contrasts_find_what_was_planted_and_no_more(truth: Run) -> None:
    found, later = read_rows(truth.results, "contrasts.csv"), LATE_STEP / EARLY_STEP
    expected = {
        (2, "last token / shortest"): 1,
        (2, "composed / recombined"): 1,
        (3, "word / shortest"): later,  # which is all its last tokens'
        (3, "last token / shortest"): later,
        (3, "word / last token"): 1,
        (3, "composed / recombined"): 1,
    }
    for key, ratio in expected.items():
        assert list(found[(*key, 1)].values()) == pytest.approx([ratio] * 3, rel=1e-4), key
    for contrast in ("word / shortest", "word / last token"):
        row = found[2, contrast, 1]
        assert 1.1 < row["low"] < row["ratio"] < row["high"] < later
    assert np.isnan([*found[2, "composed / recombined", 0].values()]).all()


def test_known_is_found_where_it_was_planted(truth: Run) -> None:
    """And is 0, without a half-way step, where a model expects the last tokens after any other."""
    rows, half_way = (read_rows(truth.results, f"{name}.csv") for name in ("known", "half_way"))
    for (tokens, step), row in rows.items():
        planted = HEAD[PLANTED_STEPS.index(step)] * rows[2, 31]["known"] if tokens == 2 else 0
        assert row["known"] == pytest.approx(planted, abs=1e-5)
        assert (row["low"] <= 1e-6) == (tokens == 3) and row["high"] > -1e-6 and row["word"] < -0.1
    expected = [SIZE, *[HEAD_STEP] * 3, 1, 3]
    assert [*half_way[2, "word", "known", ""].values()] == pytest.approx(expected, rel=4e-3)
    assert np.isnan([*half_way[3, "word", "known", ""].values()][1:]).all()


# ---- other architectures, several families -------------------------------------------------------


@pytest.mark.parametrize("name", OTHERS)
def test_architecture_is_read_naively(compared: Path, others: dict[str, Path], name: str) -> None:
    assert_naive(compared / name, naive_tables(compared / name, others[name], OTHER_STEPS))
    tokenizer = Tokenizer.from_file(str(others[name] / "step0" / "tokenizer.json"))
    for tokens in (1, 2):
        for text in read_texts(compared / name)[tokens, "word"]:
            read = [tokenizer.id_to_token(token) for token in text.token_ids[-tokens:]]
            assert "".join(read) in (f"Ġ{text.word}", f"▁{text.word}")
    assert_files(compared / name, [1, 2], OTHERS[name].num_hidden_layers + 1)


def test_families_are_compared(compared: Path, others: dict[str, Path], tmp_path: Path) -> None:
    """By hand: of another depth, the nearest layer by layer / L; ties to the lower, 0 with 0.

    And each family's own tables are those of a run alone.
    """
    of_family, depths, expected = {}, {}, {}
    for name, config in OTHERS.items():
        of_family[name], depths[name] = {}, config.num_hidden_layers
        for (tokens, contrast, layer), row in read_rows(compared / name, "contrasts.csv").items():
            of_family[name][contrast, tokens, layer] = row["ratio"]
        for (tokens, _, measure, _), row in read_rows(compared / name, "half_way.csv").items():
            if measure == "known":
                of_family[name]["known", tokens, ""] = row["half_way_step"]
    for contrast, tokens, layer in of_family["qwen2"]:
        values = {}
        for name, depth in depths.items():
            layers = range(1, depth + 1) if layer else [layer]
            height = Fraction(layer or 0, depths["qwen2"])
            nearest = min(layers, key=lambda i: abs(Fraction(i or 0, depth) - height))
            values[name] = of_family[name][contrast, tokens, nearest]
        there = [value for value in values.values() if not math.isnan(value)]
        summary = [np.median(there), min(there), max(there)] if there else [math.nan] * 3
        values |= dict(zip(("median", "lowest", "highest"), summary, strict=True))
        expected[contrast, tokens, layer] = values | {"families": len(there)}
    rows = read_rows(compared, "families.csv")
    assert_rows(rows, expected, abs=2e-6, rel=0)
    assert len({row["families"] for row in rows.values()}) > 1
    assert list(rows["known", 2, ""]) == ["families", "median", "lowest", "highest", *OTHERS]
    assert_picture(compared / "families.png")
    names = {file.name for file in compared.iterdir()}
    assert names == {*OTHERS, "families.csv", "families.png"}
    alone = good_run(place(tmp_path, **SMALL), others["small"]).results
    assert [file.name for file in alone.parent.iterdir()] == ["small"]
    for name in TABLES:
        assert (alone / name).read_bytes() == (compared / "small" / name).read_bytes()


# ---- figures and the answer ----------------------------------------------------------------------


def assert_picture(file: Path) -> None:
    """A PNG of a size for a screen, with some colour."""
    assert file.read_bytes().startswith(b"\x89PNG")
    pixels = np.asarray(Image.open(file).convert("RGB")).astype(int)
    assert min(pixels.shape[:2]) >= 400 and max(pixels.shape[:2]) <= 2000, file
    assert (np.ptp(pixels, axis=-1) > 40).mean() > 0.001, file


def assert_files(results: Path, groups: list[int], layers: int, without=frozenset()) -> None:
    """All files of a family's results are there, and no other."""
    names = {"known.png", "half_way.png"} | {f"group_{group}_tokens.png" for group in groups}
    names |= {f"layer_{layer:02d}.png" for layer in range(layers)}
    assert {file.name for file in results.iterdir()} == {*names, *TABLES, "kept"} - without
    for file in results.glob("*.png"):
        assert_picture(file)


def test_figures_show_the_tables(main: Run) -> None:
    """Each curve is among a figure's lines, in its own numbers or in log(1 + step)."""
    drawn, curves = main.drawn(), {}  # {(figure, other parts of the key, column): values}
    for table, column, over in (
        ("known.csv", "known", 1),
        ("half_way.csv", "half_way_step", 3),
        ("contrasts.csv", "ratio", 2),
        ("convergence.csv", "centred", 2),
        ("convergence.csv", "composed", 2),
    ):
        for key, row in read_rows(main.results, table).items():
            figure = "half_way"
            if over < 3 and column != "ratio":
                figure = "known" if column == "known" else f"layer_{key[-1]:02d}"
            if "recombined" not in key and "alone" not in key and "known" not in key:
                place = (figure, key[:over] + key[over + 1 :], column)
                curves.setdefault(place, []).append(row[column])
    for (figure, *place), curve in curves.items():
        lines = [np.array(line) for line in drawn[f"{figure}.png"] if len(line) == len(curve)]
        near = np.isclose([*lines, *map(np.expm1, lines)], curve, atol=1e-5, equal_nan=True)
        assert near.all(1).any(), (figure, place)


def test_last_lines_say_the_answer(main: Run) -> None:
    """known at the end, half-way steps in three layers, contrasts in the middle one."""
    lines, wanted = main.out.splitlines(), []
    assert lines[0].startswith("family   ") and lines[-1] == f"results  {main.results}"
    for table, column, digits in (("known", "known", 2), ("half_way", "half_way_step", 0)):
        for key, row in read_rows(main.results, f"{table}.csv").items():
            shown = key[-1] == STEPS[-1] or (key[1] == "word" and key[-1] in (0, 3, 6))
            if shown and not math.isnan(row[column]):
                wanted.append([f"{row[name]:.{digits}f}" for name in (column, "low", "high")])
    for (_, _, layer), row in read_rows(main.results, "contrasts.csv").items():
        if layer == 3:
            wanted.append([f"{value:.2f}" for value in row.values()])
    for value, low, high in wanted:
        assert re.search(rf" {value}( nats)? \[{low}, {high}\]", "\n".join(lines[4:]))

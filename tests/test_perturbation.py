"""multitoken_context_perturbation.py, run as a user runs it, against plain loops."""

import csv
import json
import math
import re
from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace as Found

import helpers
import numpy as np
import pytest
import torch
import transformers as tf
from helpers import CONTEXTS, PERTURBATION, WORDS, Run, edit, good_run, link, place, token_ids
from numpy.testing import assert_allclose
from tokenizers import Tokenizer, decoders, normalizers

STEPS = [0, 16, 64]
COSINES = ["P1", "P2", "same_word", "same_non_word", "cross", "unrelated"]
SHARES = ["word_share", "non_word_share", "gain"]
MEANS = ["P1", "P2", "P1-P2", "same_word", "same_non_word", "cross", *SHARES]
INTERVALS = ",".join(f"{name},{name}_low,{name}_high" for name in MEANS)
TABLES = {  # file, header, how many columns say what a row is about
    "cosines": ("perturbation.csv", "word,tokens,non_word,step,layer," + ",".join(COSINES), 5),
    "means": ("perturbation_mean.csv", f"tokens,words,step,layer,{INTERVALS},unrelated", 4),
    "known": ("known.csv", "tokens,step,word,non_word,known,low,high", 2),
}


def groups_of(words) -> dict[str, np.ndarray]:
    """{number of tokens: places of its words}, and of all."""
    sizes = [len(token_ids(word)) for word in words]
    groups = {str(size): np.flatnonzero(np.equal(sizes, size)) for size in sorted(sizes)}
    return groups | {"all": np.arange(len(sizes))}


def read_results(run: Run, family: Path, words, steps=STEPS, layers=7) -> Found:
    """Tables of these words, steps and layers, read at once, as a later run writes them anew. By
    column: cosines (words, steps, layers), means (groups, steps, layers), known (groups, steps)."""
    folder, groups, texts, found = run.results.with_name(family.name), groups_of(words), [], {}
    of = {"cosines": [(word, len(token_ids(word))) for word in words], "known": [*zip(groups)]}
    of["means"] = [(tokens, len(members)) for tokens, members in groups.items()]
    for name, (file, header, count) in TABLES.items():
        texts.append((folder / file).read_text(encoding="utf-8"))
        columns, *lines = csv.reader(texts[-1].splitlines())
        axes = (of[name], steps) if name == "known" else (of[name], steps, range(layers))
        keys = [(*line[: len(of[name][0])], *line[count + 1 - len(axes) : count]) for line in lines]
        assert ",".join(columns) == header
        assert keys == [tuple(map(str, (*key, *place))) for key, *place in product(*axes)]
        values = np.array([list(map(helpers.number, line[count:])) for line in lines])
        values = values.T.reshape(-1, *map(len, axes))
        found[name] = dict(zip(columns[count:], values, strict=True))
        if name == "cosines":
            non_words = {line[0]: line[2] for line in lines}
    return Found(run=run, family=family, folder=folder, texts=texts, non_words=non_words, **found)


def naive(family: Path, entries: dict, non_words: dict, steps=STEPS, start=(0,)) -> tuple:
    """COSINES by name, float64 (words, steps, layers + 1), and, (words, steps, 3), log p of last
    tokens: sums over sentences, over those with non-words, and their number; NaN without these."""
    tokenizer = Tokenizer.from_file(str(family / f"step{steps[-1]}" / "tokenizer.json"))
    sequences, places = [], []  # places of each word: sentences, with its non-word, perturbed
    for word, entry in entries.items():
        sentences = [tokenizer.encode(text).ids for text in entry["sentences"]]
        perturbed = [tokenizer.encode(text).ids for text in entry["replaced_sentences"]]
        other = token_ids(non_words[word])
        replaced = [ids[: -len(other)] + other for ids in sentences if non_words[word]]
        places.append([])
        for kind in (sentences, replaced, perturbed):
            places[-1].append(range(len(sequences), len(sequences) + len(kind)))
            sequences += [[*start, *ids] for ids in kind]
    cosines, log_probs = {name: [] for name in COSINES}, []
    reads = [helpers.naive_read(family / f"step{step}", sequences) for step in steps]
    for (sentences, replaced, perturbed), (states, log_prob) in product(places, reads):
        states = states / np.linalg.norm(states, axis=-1, keepdims=True)
        pairs = {
            "P1": product(sentences[:1], sentences[1:]),
            "P2": product(sentences[:1], perturbed),
            "same_word": combinations(sentences, 2),
            "same_non_word": combinations(replaced, 2),
            "cross": [(i, j) for i, j in product(sentences, replaced) if j - i != len(replaced)],
            "unrelated": [(sentences[0], of[0][0]) for of in places if of[0] != sentences],
        }
        for name, compared in pairs.items():
            found = [(states[:, one] * states[:, other]).sum(-1) for one, other in compared]
            cosines[name].append(np.mean(found, 0) if found else np.full(len(states), np.nan))
        sums = [log_prob[sentences].sum(), log_prob[replaced].sum(), len(sentences)]
        log_probs.append(sums if replaced else [math.nan] * 3)
    shape = len(entries), len(steps), -1
    return {n: np.reshape(of, shape) for n, of in cosines.items()}, np.reshape(log_probs, shape)


def naive_means(computed: tuple, words: list[int]) -> dict[str, np.ndarray]:
    """Over words, of which some may be there twice: MEANS and unrelated, (steps, layers + 1); word,
    non_word and known of known.csv, (steps,)."""
    own = {name: values[words] for name, values in computed[0].items()}
    has = {name: np.isfinite(values[:, 0, 0]) for name, values in own.items()}
    own["P1-P2"], has["P1-P2"] = own["P1"] - own["P2"], has["P1"] & has["P2"]
    has["same_word"] = has["cross"]  # not without a non-word
    with np.errstate(invalid="ignore", divide="ignore"):
        means = {name: own[name][of].sum(0) / of.sum() for name, of in has.items()}
        cross = means["cross"]
        means["word_share"] = (means["same_word"] - cross) / (1 - cross)
        means["non_word_share"] = (means["same_non_word"] - cross) / (1 - cross)
        means["gain"] = means["word_share"] - means["non_word_share"]
        sums = np.nansum(computed[1][words], axis=0)
        means["word"], means["non_word"] = sums[:, 0] / sums[:, 2], sums[:, 1] / sums[:, 2]
        means["known"] = means["word"] - means["non_word"]
    return means


def assert_like_naive(found: Found, computed: tuple) -> None:
    """All values of the three tables are those of the plain computation."""
    for name in COSINES:
        assert_allclose(found.cosines[name], computed[0][name], 0, 2e-6, err_msg=name)
    for index, members in enumerate(groups_of(found.non_words).values()):
        expected = naive_means(computed, members)
        varies = np.where(expected["cross"] < 1 - 1e-4, 1 - expected["cross"], np.nan)
        for name in (*MEANS, "unrelated"):
            values, scale = found.means[name][index], 1
            if name in SHARES:  # exact times what they are divided by, empty where that is small
                values, scale = values * np.nan_to_num(varies, nan=1), varies
            assert_allclose(values, expected[name] * scale, 0, 3e-6, err_msg=name)
        for name in ("word", "non_word", "known"):
            assert_allclose(found.known[name][index], expected[name], 0, 1e-5)


def assert_non_words(found: Found, others: list[str]) -> None:
    """In each group permuted beginnings, none its own, before own last tokens; none a word."""
    words = np.array(list(found.non_words))
    banned = {word.casefold() for word in [*helpers.ALL_WORDS, *words, *others]}
    for members in list(groups_of(words).values())[:-1]:
        made, own = [found.non_words[word] for word in words[members]], words[members]
        if len(members) > 1:
            made_ids, own_ids = (list(map(token_ids, strings)) for strings in (made, own))
            assert sorted(ids[:-1] for ids in made_ids) == sorted(ids[:-1] for ids in own_ids)
            for ids, own in zip(made_ids, own_ids, strict=True):
                assert ids[-1] == own[-1] and ids[:-1] != own[:-1]
            assert banned.isdisjoint(map(str.casefold, made))
        else:
            said = f"warning: {len(token_ids(own[0]))}-token words have no non-words"
            assert made == [""] and said in found.run.out


def assert_answer(found: Found, layers: list[int]) -> None:
    """The last lines of the run are those of the tables."""
    header, *lines = re.split(r"gain at step \d+ ", found.run.out)[-1].splitlines()
    assert re.findall(r"layer (\d+)", header) == list(map(str, layers)) and "known" in header
    gain = np.array([found.means[name][:, -1] for name in ("gain", "gain_low", "gain_high")])
    for index, tokens in enumerate(groups_of(found.non_words)):
        known = [found.known[name][index, -1] for name in ("known", "low", "high")]
        values = [
            "{:.2f} [{:.2f}, {:.2f}]".format(*of) for of in [*gain[:, index, layers].T, known]
        ]
        assert re.findall(r"\S+ \[\S+, \S+\]", lines[index]) == values
        assert f"tokens: {tokens} " in lines[index]
    low, high = gain[1:, :, 1:]
    counts = f"{(low * high > 0).sum()} of {np.isfinite(low).sum()}"
    assert f" {counts} intervals of gain exclude 0" in lines[len(low)]


FRAMES = ["Some men saw", "Her friends like", "They never forgot", "We all want", "My sister drew"]


def entries_of(words: str, contexts: int) -> dict[str, dict[str, list[str]]]:
    """Entries of words, each with others that end in its last token. Bases and contexts differ."""
    entries = {}
    for first, line in enumerate(words.split("; ")):
        word, *others = line.split(", ")
        frames = [FRAMES[(first + shift) % len(FRAMES)] for shift in range(contexts + 1)]
        entries[word] = {"sentences": [f"{frame} {word}" for frame in frames]}
        entries[word]["replaced_sentences"] = [f"{frames[0]} {other}" for other in others]
    return entries


DOZEN = "lighthouse, penthouse, clubhouse; farmhouse, penthouse; turtles, castles, beetles; batsman"
DOZEN += "; pickles, castles; pianist, baptist; platypus, cactus, colossus; syllabus, alumnus"
DOZEN += "; pretzels, infidels; kennels, tassels; porcupine; arboretum, gypsum; rhododendron"
DOZEN = entries_of(DOZEN, contexts=3)
del DOZEN["farmhouse"]["sentences"][1:], DOZEN["kennels"]["sentences"][1:]  # no contexts
SETTINGS = {"WORDS_TO_PLOT": 2, "BOOTSTRAP_RESAMPLES": helpers.RESAMPLES}


@pytest.fixture(scope="module")
def main_run(miniature: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    family = link(miniature, tmp_path_factory.mktemp("families") / "short", STEPS)
    script = place(tmp_path_factory.mktemp("main"), PERTURBATION, {CONTEXTS: DOZEN}, **SETTINGS)
    helpers.show_lines(script)
    return read_results(good_run(script, family), family, DOZEN)


def test_tables_and_answer(main_run: Found) -> None:
    assert_like_naive(main_run, naive(main_run.family, DOZEN, main_run.non_words))
    replaced = [text for entry in DOZEN.values() for text in entry["replaced_sentences"]]
    assert_non_words(main_run, [text.split()[-1] for text in replaced])
    assert_answer(main_run, [1, 2, 3, 6])


def test_intervals_are_of_resampled_last_tokens(main_run: Found) -> None:
    computed = naive(main_run.family, DOZEN, main_run.non_words)
    last_tokens, pairs = [token_ids(word)[-1] for word in DOZEN], []
    found = main_run.means | main_run.known | {"known_low": main_run.known["low"]}
    found["known_high"] = main_run.known["high"]
    for index, members in enumerate(groups_of(DOZEN).values()):
        drawn = []
        for resample in helpers.naive_resamples([last_tokens[i] for i in members], seed=5):
            drawn.append(naive_means(computed, [members[i] for i in resample]))
        for name in (*MEANS, "known"):
            for place_ in np.ndindex(found[name][index].shape):
                interval = [found[name + end][index][place_] for end in ("_low", "_high")]
                if len(members) == 1 or math.isnan(found[name][index][place_]):
                    assert np.isnan(interval).all()  # one last token, or no value
                else:
                    pairs.append((interval, np.array([of[name][place_] for of in drawn])))
    helpers.assert_intervals(pairs, 0.95)


def test_figures_show_the_tables(main_run: Found) -> None:
    files = [file for file in main_run.folder.rglob("*.*") if file.parent.name != "kept"]
    files = {str(file.relative_to(main_run.folder)) for file in files}
    words = {f"words/{len(token_ids(word))}_tokens_{word}.png" for word in DOZEN} & files
    means = [f"mean_{tokens}_tokens.png" for tokens in "234"] + ["mean_all.png"]
    tables = {file for file, _, _ in TABLES.values()}
    assert files == {*words, *means, *tables, "gain.png"} and len(words) == 2
    expected, table = [], main_run.means  # (file, values of a line)
    for index, step in product((0, 1), range(3)):  # of two and three tokens
        lines = [table["gain"][index, step], *(table[name][index, -1] for name in SHARES[:2])]
        expected += [("gain.png", line) for line in [*lines, main_run.known["known"][index]]]
        expected += [(means[index], table[name][index, step]) for name in ("P1", "P2", "unrelated")]
    drawn = main_run.run.drawn()
    for file, values in expected:
        lines = [line for line in drawn[file] if len(line) == len(values)]
        assert any(np.allclose(line, values, 0, 1e-6, equal_nan=True) for line in lines), file


def test_another_architecture_and_depth(main_run: Found) -> None:
    """A random Llama, whose tokenizer puts a space before every text, beside the same again."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    sizes |= {"vocab_size": 50_304, "num_attention_heads": 4, "initializer_range": 0.2}
    folder, config = main_run.family.with_name("llama"), tf.LlamaConfig(**sizes)
    file = str(helpers.random_family(folder, config, {7: 0}) / "step7" / "tokenizer.json")
    tokenizer = Tokenizer.from_file(file)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Prepend(" ")])
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    tokenizer.save(file)
    run = good_run(main_run.folder.parents[1] / PERTURBATION.name, main_run.family, folder)
    assert read_results(run, main_run.family, DOZEN).texts == main_run.texts
    llama = read_results(run, folder, DOZEN, [7], layers=4)
    assert_like_naive(llama, naive(llama.family, DOZEN, llama.non_words, [7]))
    assert_answer(llama, [1, 2, 3])
    file = llama.folder.with_name("families.csv")
    header, *rows = csv.reader(file.read_text(encoding="utf-8").splitlines())
    assert ",".join(header) == "tokens,layer,families,median,lowest,highest,short,llama"
    assert file.with_suffix(".png").exists()
    nearest = [0, 1, 1, 1, 2, 2, 3]  # layers of three to those of six
    gains = main_run.means["gain"][:, -1], llama.means["gain"][:, -1, nearest]
    keys = product(groups_of(DOZEN), map(str, range(7)))
    for row, key, values in zip(rows, keys, np.reshape(gains, (2, -1)).T, strict=True):
        there = values[~np.isnan(values)]
        summary = [np.median(there), *np.quantile(there, [0, 1])] if len(there) else [math.nan] * 3
        assert tuple(row[:2]) == key and int(row[2]) == len(there)
        assert_allclose(list(map(helpers.number, row[3:])), [*summary, *values], 0, 2e-6)


STUDY = "lighthouse, farmhouse; turtles; ice cream, sour cream; gunman, madman; baptist; losers"
STUDY = entries_of(STUDY + "; curators; porcupine; cafés", contexts=2)
FORCED = {"turtles": "curles", "gunman": "lightman", "baptist": "cafist"}  # their non-words
LONGER = f"{FRAMES[0]} porterhouse"
LEFT_OUT = [  # word, kind, text, why
    ("lighthouse", "sentences", "They lived in the lighthouse.", "end in the word"),
    ("lighthouse", "sentences", "This is <|endoftext|> a lighthouse", "<|endoftext|> is in it"),
    ("lighthouse", "replaced_sentences", f"{FRAMES[0]} house", "another token"),
    ("lighthouse", "replaced_sentences", f"{FRAMES[1]} clubhouse", "beginning"),
    ("lighthouse", "replaced_sentences", f"{FRAMES[0]} lighthouse", "another last word"),
    ("lighthouse", "replaced_sentences", f"{FRAMES[0]}<|endoftext|> clubhouse", "<|endoftext|>"),
    ("lighthouse", "replaced_sentences", LONGER, "3 tokens"),  # if SAME_LENGTH
    ("spade", "sentences", "It was a rusty spade.", "end in the word"),
    ("house", "sentences", "This is my house", "one token"),
]


@pytest.fixture(scope="module")
def study(main_run: Found, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """By the defaults; then in the same place as the study has it, with FORCED non-words."""
    family, entries = main_run.family, json.loads(json.dumps(STUDY))
    for word, kind, text, _ in LEFT_OUT:
        entries.setdefault(word, {"sentences": [], "replaced_sentences": []})
        entries[word][kind].append(text)
    entries["spade"]["sentences"].append("It was a spade")
    texts = [f" {text}\n".replace("é", "e\u0301") for text in STUDY["cafés"]["sentences"]]
    entries["cafés"]["sentences"] = texts
    entries["cafe\u0301s "] = {"sentences": texts[1:], "replaced_sentences": []}
    folder, settings = tmp_path_factory.mktemp("study"), {"WORDS_TO_PLOT": ["ice cream", "ice"]}
    script = place(folder, PERTURBATION, {CONTEXTS: entries}, **settings)
    defaults = read_results(good_run(script, family), family, STUDY)
    banned = []  # for each word of FORCED, what it could have had
    for word, allowed in FORCED.items():
        ids = [token_ids(other)[:1] + token_ids(word)[1:] for other in STUDY]
        made = [helpers.gpt_neox_tokenizer().decode(of).strip() for of in ids]
        banned.append([string for string in made if string not in (word, allowed)])
    words = dict.fromkeys(map(str.upper, banned[0]), 1)
    (folder / WORDS).write_text(json.dumps(words), encoding="utf-8")
    entries |= {string: {"sentences": ["No"], "replaced_sentences": []} for string in banned[1]}
    entries["house"]["replaced_sentences"] += [f"Look at the {string}" for string in banned[2]]
    (folder / CONTEXTS).write_text(json.dumps(entries), encoding="utf-8")
    for name in ("SAME_LENGTH", "PREPEND_BOS"):
        edit(script, f"\n{name} = True", f"\n{name} = False")
    return defaults, read_results(good_run(script, family), family, STUDY)


def test_study_setting_and_odd_sentences(study: tuple) -> None:
    """With and without BOS and longer perturbed versions; white space and accents in one form."""
    defaults, as_study = study
    assert_like_naive(defaults, naive(defaults.family, STUDY, defaults.non_words))
    assert_non_words(defaults, ["farmhouse", "madman"])
    entries = json.loads(json.dumps(STUDY))
    entries["lighthouse"]["replaced_sentences"].append(LONGER)
    assert_like_naive(as_study, naive(as_study.family, entries, as_study.non_words, start=()))
    assert_non_words(as_study, ["farmhouse", "madman"])
    assert FORCED.items() <= as_study.non_words.items()
    [plotted] = (defaults.folder / "words").iterdir()
    assert plotted.name == "2_tokens_ice_cream.png"
    assert "warning: 'ice' of WORDS_TO_PLOT" in defaults.run.out


def test_what_is_left_out_is_named(study: tuple) -> None:
    """Ten at most, and how many more: that house is out, and the second cafés."""
    for found, expected in zip(study, (LEFT_OUT, LEFT_OUT[:6] + LEFT_OUT[7:]), strict=True):
        *lines, last = re.findall(r"(?m)^left out: (.*)", found.run.out)
        assert len(lines) == 10 and re.fullmatch(r"\d+ more", last)
        lines.remove("spade, since its base is")
        for line, (word, _, text, fault) in zip(lines, expected, strict=False):
            assert line.startswith(f"{word}: {text!r}: ") and fault in line
    assert "left out: 3 more" in study[0].run.out


PLANTED = {0: (0, 0, 0), 1: (0, 3, 0), 2: (4, 0, 2), 3: (4, 0, 5)}  # step: focus, alike, expected
STRENGTHS = {"lighthouse": 1, "turtles": 1.2, "batsman": 1.4, "pianist": 1.6, "losers": 1.8}
CONTEXT = 2  # the strength of the tokens of contexts


def plant(folder: Path, focus: float, alike: float, expected: float) -> None:
    """A GPT-NeoX of two layers, all of whose states and logits can be written down.

    LayerNorms (of a huge epsilon, with weights to match) and MLP change nothing, embeddings are
    orthogonal. Attention writes first tokens of words and tokens of contexts, each by its strength,
    into directions of their own. It is uniform, but that in layer 2 a word's last token sees its
    own first token by a logit of focus more. After a first token the logit of every last token is
    alike, and expected more of the word's own."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1}
    sizes |= {"intermediate_size": 1, "rotary_pct": 0.25, "vocab_size": 50_304}
    model = tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(layer_norm_eps=1e6, **sizes))
    zero_mean = torch.cat([torch.ones(64, 1), torch.randn(64, 63)], dim=1)
    directions = iter(torch.linalg.qr(zero_mean)[0].T[1:])
    lasts = [token_ids(word)[1] for word in STRENGTHS]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1e3 if "norm.weight" in name else 0)
        embedded, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        query, key, value = torch.zeros(3, 64, 64)
        for index, (word, strength) in enumerate(STRENGTHS.items()):
            first, last = token_ids(word)
            embedded[first], embedded[last] = next(directions), next(directions)
            value += strength * torch.outer(next(directions), embedded[first])
            query[16 + index] = embedded[last]  # the first 16 dimensions are rotated
            key[16 + index] = focus * 8 * embedded[first]  # attention divides by sqrt(64)
            head[last] += expected * embedded[first]
            head[lasts] += alike * embedded[first]
        for token in [token for frame in FRAMES for token in token_ids(frame, False)]:
            embedded[token] = next(directions)
            value += CONTEXT * torch.outer(next(directions), embedded[token])
        for layer, looks in zip(model.gpt_neox.layers, (0, 1), strict=True):
            weight = torch.cat([looks * query, looks * key, value])
            layer.attention.query_key_value.weight.copy_(weight)
            layer.attention.dense.weight.copy_(torch.eye(64))
    helpers.save_checkpoint(model, folder)


def test_planted_truths(tmp_path: Path) -> None:
    """Words' states agree more than non-words' in layer 2 of steps 2 and 3, and nowhere else. After
    first tokens nothing is expected, then all last tokens alike, then the own by 2 and 5 nats."""
    torch.manual_seed(0)
    for step, parts in PLANTED.items():
        plant(tmp_path / "planted" / f"step{step}", *parts)
    entries = entries_of("; ".join(STRENGTHS), contexts=3)
    script = place(tmp_path, PERTURBATION, {CONTEXTS: entries}, WORDS_TO_PLOT=0)
    run = good_run(script, tmp_path / "planted")
    planted = read_results(run, tmp_path / "planted", STRENGTHS, list(PLANTED), layers=3)
    assert_answer(planted, [1, 2])
    strengths = np.array(list(STRENGTHS.values()))
    firsts = [token_ids(word)[0] for word in STRENGTHS]
    others = [firsts.index(token_ids(other)[0]) for other in planted.non_words.values()]
    for (step, (focus, _, _)), layer in product(PLANTED.items(), (1, 2)):
        looked = math.exp(focus) + 5  # a sentence has six tokens
        at_first = 1 / 6 + (layer - 1) * math.exp(focus) / looked
        at_another = 1 / 6 + (layer - 1) / looked
        own, other = 1 + (strengths * at_first) ** 2, 1 + (strengths[others] * layer / 6) ** 2
        squares = own + 3 * (CONTEXT * at_another) ** 2, other + 3 * (CONTEXT * layer / 6) ** 2
        same_word, same_non_word = (own / squares[0]).mean(), (other / squares[1]).mean()
        cross = ((squares[0] * squares[1]) ** -0.5).mean()
        names = ("gain", "gain_low", "gain_high")
        gain, low, high = (planted.means[name][0, step, layer] for name in names)
        assert gain == pytest.approx((same_word - same_non_word) / (1 - cross), abs=1e-4)
        if focus and layer == 2:
            assert high > gain > low > 0.3
        else:
            assert abs(gain) < 1e-6 and low < 0 < high

    for step, (_, alike, expected) in PLANTED.items():
        rest = math.log(4 * math.exp(alike) + math.exp(alike + expected) + 50_304 - 5)
        word, non_word, *known = (values[0, step] for values in planted.known.values())
        assert [word, non_word] == pytest.approx([alike + expected - rest, alike - rest], abs=1e-4)
        assert known == pytest.approx([expected] * 3, abs=1e-5)

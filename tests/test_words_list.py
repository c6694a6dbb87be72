"""The words of the first experiment and their frequencies, with the real GPT-NeoX tokenizer."""

import json
import math
import re
from collections import Counter
from pathlib import Path

import pytest
from make_words_list import TOKENIZER_FILE, number_of_tokens, words_list
from tokenizers import Tokenizer
from wordfreq import zipf_frequency

GROUPS = (1, 2, 3, 4)  # numbers of tokens that are to be matched
MATCHED = 450  # words that each group must have after matching


@pytest.fixture(scope="module")
def frequencies() -> dict[str, int]:
    path = Path(__file__).resolve().parents[1] / "words_list.json"
    pairs = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=list)
    assert len(dict(pairs)) == len(pairs), "repeated words"
    return dict(pairs)


def test_list_is_what_its_script_derives(frequencies: dict[str, int]) -> None:
    assert list(frequencies.items()) == list(words_list().items())


def test_most_frequent_first(frequencies: dict[str, int]) -> None:
    values = list(frequencies.values())
    assert all(type(value) is int and value > 0 for value in values)
    assert values == sorted(values, reverse=True)


def test_form_of_words(frequencies: dict[str, int]) -> None:
    """Lower-case letters, with an apostrophe in between, three or more; no possessive; not rare."""
    for word in frequencies:
        assert re.fullmatch(r"[^\W\d_]+(['-][^\W\d_]+)*", word) and word == word.lower(), word
        assert len(word) >= 3 and not word.endswith("'s"), word
        assert zipf_frequency(word, "en") >= 2.25, word


def test_no_names_and_no_junk(frequencies: dict[str, int]) -> None:
    names = "wimbledon kardashian america england barcelona london paris obama microsoft peter mike"
    junk = "lol wtf http www usa und ltd dept etc viii xxx xor yrs rho ids och yow phi hes til ems"
    assert set(f"{names} {junk}".split()).isdisjoint(frequencies)


def test_ordinary_words(frequencies: dict[str, int]) -> None:
    words = "the house green summer treasury senate butter lighthouse libraries unforgettable don't"
    short = "ale ant awl ewe gym owl rye sky yak yew zoo"
    assert set(f"{words} {short} o'clock".split()) <= set(frequencies)


def test_enough_words_can_be_matched_by_frequency(frequencies: dict[str, int]) -> None:
    """From each quarter of a power of ten, as many words as the group that is poorest there has."""
    tokenizer = Tokenizer.from_file(str(TOKENIZER_FILE))
    sizes = Counter()
    for word, frequency in frequencies.items():
        sizes[math.floor(4 * math.log10(frequency)), number_of_tokens(tokenizer, word)] += 1
    bins = {frequency_bin for frequency_bin, _ in sizes}
    matched = sum(min(sizes[frequency_bin, tokens] for tokens in GROUPS) for frequency_bin in bins)
    assert matched >= MATCHED

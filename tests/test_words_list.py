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


def test_words_are_lower_case_letters(frequencies: dict[str, int]) -> None:
    letters = r"[^\W\d_]+"
    assert not [
        word for word in frequencies if not re.fullmatch(f"{letters}(['-]{letters})*", word)
    ]
    assert not [word for word in frequencies if word != word.lower() or len(word) < 3]


def test_no_possessives(frequencies: dict[str, int]) -> None:
    assert not [word for word in frequencies if word.endswith("'s")]


def test_words_are_not_rare(frequencies: dict[str, int]) -> None:
    assert not [word for word in frequencies if zipf_frequency(word, "en") < 2.25]


def test_no_names(frequencies: dict[str, int]) -> None:
    names = "wimbledon kardashian america england barcelona london paris obama microsoft peter mike"
    assert not set(names.split()) & set(frequencies)


def test_no_junk(frequencies: dict[str, int]) -> None:
    junk = "lol wtf http www usa und ltd dept etc viii xxx xor yrs rho ids och yow phi hes til ems"
    assert not set(junk.split()) & set(frequencies)


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

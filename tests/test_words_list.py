"""The words of the first experiment and their frequencies, with the real GPT-NeoX tokenizer."""

import json
import math
import re
from collections import Counter

from helpers import ALL_WORDS, ROOT, WORDS, token_ids
from make_words_list import words_list
from wordfreq import zipf_frequency

GROUPS = (1, 2, 3, 4)  # numbers of tokens that are to be matched
MATCHED = 450  # words that each group must have after matching


def test_file_is_what_its_script_writes() -> None:
    text = json.dumps(words_list(), ensure_ascii=False, indent=0) + "\n"
    assert (ROOT / WORDS).read_text(encoding="utf-8").split("\n") == text.split("\n")


def test_words_and_frequencies() -> None:
    """Lower-case letters, with an apostrophe in between, three or more; no possessive; not rare."""
    assert list(ALL_WORDS.values()) == sorted(ALL_WORDS.values(), reverse=True)
    for word, frequency in ALL_WORDS.items():
        assert type(frequency) is int and frequency > 0, word
        assert re.fullmatch(r"[^\W\d_]+(['-][^\W\d_]+)*", word) and word == word.lower(), word
        assert len(word) >= 3 and not word.endswith("'s"), word
        assert zipf_frequency(word, "en") >= 2.25, word


def test_no_names_and_no_junk() -> None:
    names = "wimbledon kardashian america england barcelona london paris obama microsoft peter mike"
    junk = "lol wtf http www usa und ltd dept etc viii xxx xor yrs rho ids och yow phi hes til ems"
    assert set(f"{names} {junk}".split()).isdisjoint(ALL_WORDS)


def test_ordinary_words() -> None:
    words = "the house green summer treasury senate butter lighthouse libraries unforgettable don't"
    short = "ale ant awl ewe gym owl rye sky yak yew zoo"
    assert set(f"{words} {short} o'clock".split()) <= set(ALL_WORDS)


def test_enough_words_can_be_matched_by_frequency() -> None:
    """From each quarter of a power of ten, as many words as the group that is poorest there has."""
    sizes = Counter()
    for word, frequency in ALL_WORDS.items():
        sizes[math.floor(4 * math.log10(frequency)), len(token_ids(word))] += 1
    bins = {frequency_bin for frequency_bin, _ in sizes}
    matched = sum(min(sizes[frequency_bin, tokens] for tokens in GROUPS) for frequency_bin in bins)
    assert matched >= MATCHED

"""The words and sentences that the second experiment reads, with the real GPT-NeoX tokenizer."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest
from miniature import TOKENIZER_FILE
from tokenizers import Tokenizer
from wordfreq import zipf_frequency

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = Tokenizer.from_file(str(TOKENIZER_FILE))
RAREST = 1.5  # the least Zipf frequency of an ordinary word: one in 30 million


def token_ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def ending(word: str) -> list[int]:
    """The tokens of a word in running text."""
    return token_ids(" " + word)


def without_repeated_keys(pairs: list[tuple[str, object]]) -> dict:
    repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    assert not repeated, f"repeated: {repeated}"
    return dict(pairs)


def read(name: str) -> dict:
    return json.loads((ROOT / name).read_text(encoding="utf-8"), object_pairs_hook=without_repeated_keys)


@pytest.fixture(scope="module")
def entries() -> dict[str, dict[str, list[str]]]:
    return read("multitoken_words_contexts.json")


def each_text(entries: dict, *kinds: str) -> Iterator[tuple[str, str]]:
    """Every text with the word to whose entry it belongs."""
    for word, entry in entries.items():
        for kind in kinds or ("sentences", "replaced_sentences"):
            for text in entry[kind]:
                yield word, text


def each_replacement(entries: dict) -> Iterator[tuple[str, str]]:
    for word, text in each_text(entries, "replaced_sentences"):
        yield word, text.split()[-1]


def stem(word: str) -> str:
    return re.sub(r"(ing|ed|es|s|ly|er|ers|ness|ment|e)$", "", word)


def long_words(sentence: str) -> set[str]:
    """The words of more than six letters before the last word."""
    return {word for word in re.findall(r"[a-z]+", sentence.rsplit(" ", 1)[0].lower()) if len(word) > 6}


# ------------------------------------------------------------------------------ multitoken_words_contexts.json


def test_enough_words_of_each_number_of_tokens(entries: dict) -> None:
    sizes = Counter(len(ending(word)) for word in entries)
    assert len(entries) >= 200 and sizes[1] == 0, sizes
    assert sizes[2] >= 80 and sizes[3] >= 80, sizes
    assert sum(count for size, count in sizes.items() if size >= 4) >= 30, sizes


def test_words_are_ordinary(entries: dict) -> None:
    assert not [word for word in entries if not re.fullmatch(r"[a-z]+(-[a-z]+)*", word)]
    assert not [word for word in entries if zipf_frequency(word, "en") < RAREST]


def test_entries_have_enough_texts(entries: dict) -> None:
    assert not [word for word, entry in entries.items() if set(entry) != {"sentences", "replaced_sentences"}]
    assert not [word for word, entry in entries.items() if len(entry["sentences"]) < 5]
    assert not [word for word, entry in entries.items() if len(entry["replaced_sentences"]) < 4]


def test_texts_have_six_to_twenty_words(entries: dict) -> None:
    assert not [f"{word}: {text}" for word, text in each_text(entries) if not 6 <= len(text.split()) <= 20]


def test_texts_are_plain(entries: dict) -> None:
    """A capital, ASCII, single spaces, no stop at the end."""
    pattern = r"[A-Z](\S| (?=\S))*[a-z]"
    assert not [f"{word}: {text}" for word, text in each_text(entries) if not re.fullmatch(pattern, text, re.ASCII)]
    assert not [f"{word}: {text}" for word, text in each_text(entries) if not text.isascii()]


def test_no_text_is_repeated(entries: dict) -> None:
    counts = Counter(text for _, text in each_text(entries))
    assert not [f"{word}: {text}" for word, text in each_text(entries) if counts[text] > 1]


def test_sentences_end_in_the_word_and_its_tokens(entries: dict) -> None:
    sentences = list(each_text(entries, "sentences"))
    assert not [f"{word}: {text}" for word, text in sentences if not text.endswith(" " + word)]
    tails = {word: ending(word) for word in entries}
    assert not [f"{word}: {text}" for word, text in sentences if token_ids(text)[-len(tails[word]) :] != tails[word]]


def test_sentences_hold_the_word_once(entries: dict) -> None:
    sentences = each_text(entries, "sentences")
    assert not [f"{word}: {text}" for word, text in sentences if len(re.findall(rf"(?i)\b{word}\b", text)) != 1]


def test_sentences_of_a_word_open_differently(entries: dict) -> None:
    for word, entry in entries.items():
        openings = [sentence.split()[0].lower() for sentence in entry["sentences"]]
        assert len(set(openings)) == len(openings), f"{word}: {openings}"


def test_sentences_of_a_word_share_no_long_word(entries: dict) -> None:
    for word, entry in entries.items():
        for one, other in combinations(entry["sentences"], 2):
            shared = long_words(one) & long_words(other)
            assert not shared, f"{word}: {shared} in {one!r} and {other!r}"


def test_perturbed_versions_differ_from_the_base_in_the_last_word(entries: dict) -> None:
    for word, entry in entries.items():
        *head, last = entry["sentences"][0].split(" ")
        assert last == word
        assert all(text.split(" ")[:-1] == head for text in entry["replaced_sentences"]), word
        replacements = [text.split(" ")[-1] for text in entry["replaced_sentences"]]
        assert word not in replacements and len(set(replacements)) == len(replacements), f"{word}: {replacements}"


def test_perturbed_versions_end_in_the_same_token(entries: dict) -> None:
    for word, text in each_text(entries, "replaced_sentences"):
        tail = ending(text.split()[-1])
        assert token_ids(text)[-len(tail) :] == tail, f"{word}: {text}"
        assert tail[-1] == ending(word)[-1], f"{word}: {text}"


def test_replacements_are_ordinary(entries: dict) -> None:
    pairs = list(each_replacement(entries))
    assert not [f"{word}: {other}" for word, other in pairs if not re.fullmatch("[a-z]+", other)]
    assert not [f"{word}: {other}" for word, other in pairs if zipf_frequency(other, "en") < RAREST]


def test_replacements_are_no_inflections_of_the_word(entries: dict) -> None:
    assert not [f"{word}: {other}" for word, other in each_replacement(entries) if stem(other) == stem(word)]

"""The words and sentences that the second experiment reads, with the real GPT-NeoX tokenizer."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from statistics import mean

import pytest
from make_words_list import TOKENIZER_FILE
from spylls.hunspell import Dictionary
from tokenizers import Tokenizer
from wordfreq import zipf_frequency

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = Tokenizer.from_file(str(TOKENIZER_FILE))
RAREST = 1.5  # the least Zipf frequency of an ordinary word: one in 30 million
FEWEST = {2: 100, 3: 100, 4: 85}  # entries by the word's number of tokens
MANNER = 0.03  # how far the share of a manner of sentence may differ between bases and other contexts

# Last tokens that are a suffix, or a suffix with the letter before it.
SUFFIXES = """
able ables ably age ages al als ally ial ially ials ical ically ance ances ancy ant ants aries ary ate ated ately ates
ating ation ations ator ators ed ened ened ered hed ied ished ised ized led ned red ted edly ely en ence ences ency ens
ent ents er ers eries ery es ess esses est ette ettes ful fully hood ian ians ible ibly ic ics ie ier iers ies iest ily
ing ings ingly ling ning ping ting ion ions ious iously ise ish ism isms ist istic istics ists ities ition itions ity
ive iveness ives ization ize izes izing less ler lers ly ully ement ements ment ments ner ners ness iness or ors ory
ous ously eous uous s ship some ters ter tion tions ty ties ual ure ution ward y
"""

IMPERATIVES = """
answer ask bake be bring bury chalk change check choose clip close compare count cover crack cut describe do don't
draw drink dust fasten find follow forgive fry give go hand hang hire hold imagine keep latch leave let lift listen
lock look make meet melt mist mow name never paddle park peel photograph pick pile play please point practice put read
remember rinse roll rub run save serve set sharpen shine show shut simmer sit slice slow smooth soak spend sprinkle
stack stand stay steer stick stir stop sweep take teach tell think throw tie tilt train try turn use wait warn wash
watch water wear whip wipe wrap
"""
QUESTIONS = "are can could did do does has have how is was were what when where which who why will would"
NO_QUESTIONS = r"(Do not|What (I|we|my|our|struck|surprised)|When [a-z' ]+,)"  # though they open as one

# A sentence about a picture or a text takes any word: as the manner of the bases alone it would mark them.
DEPICTION = r"""(?ix) \b (
    photo\w* | pictur\w* | draw | drawn | draws | drawing\w* | drew | paint\w* | slides? | film\w* | movies? | novels?
    | notic\w* | mention\w* | talk\w* | blog\w* | books? | poems? | statues? | museums? | sketch\w* | portraits?
    | stor(y|ies) | articles? | magazines? | chapters? | memoirs? | pages? | podcasts? | albums? | websites? | scenes?
    | authors? | lectur\w* | speech\w* | about (\ \w+){0,2}$
    ) \b"""


def token_ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def ending(word: str) -> list[int]:
    """The tokens of a word in running text."""
    return token_ids(" " + word)


def last_token(word: str) -> str:
    return TOKENIZER.decode(ending(word)[-1:])


def last_word(text: str) -> str:
    return text.rsplit(" ", 1)[1]


def before_last_word(text: str) -> str:
    return text.rsplit(" ", 1)[0]


def words_before_last(text: str) -> set[str]:
    return set(re.findall("[a-z']+", before_last_word(text).lower()))


def without_repeated_keys(pairs: list[tuple[str, object]]) -> dict:
    repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    assert not repeated, f"repeated: {repeated}"
    return dict(pairs)


def read(name: str) -> dict:
    return json.loads((ROOT / name).read_text(encoding="utf-8"), object_pairs_hook=without_repeated_keys)


@pytest.fixture(scope="module")
def entries() -> dict[str, dict[str, list[str]]]:
    return read("multitoken_words_contexts.json")


@pytest.fixture(scope="module")
def dictionary() -> Dictionary:
    return Dictionary.from_files("en_US")


def each_text(entries: dict, *kinds: str) -> Iterator[tuple[str, str]]:
    """Every text with the word to whose entry it belongs."""
    for word, entry in entries.items():
        for kind in kinds or ("sentences", "replaced_sentences"):
            for text in entry[kind]:
                yield word, text


def each_replacement(entries: dict) -> Iterator[tuple[str, str]]:
    for word, text in each_text(entries, "replaced_sentences"):
        yield word, last_word(text)


def bases(entries: dict) -> list[str]:
    return [entry["sentences"][0] for entry in entries.values()]


def other_contexts(entries: dict) -> list[str]:
    contexts = []
    for entry in entries.values():
        contexts += entry["sentences"][1:]
    return contexts


def stem(word: str) -> str:
    """The word without its endings, crudely: saxophonists and saxophone have one stem."""
    suffix = "(s|es|e|ed|ing|er|ly|ness|ment|ist|ism|istic|ic|al|y|i|um|ship)$"
    shorter = re.sub(suffix, "", word)
    while shorter != word and len(shorter) >= 4:
        word, shorter = shorter, re.sub(suffix, "", shorter)
    return word


def are_related(word: str, other: str) -> bool:
    return stem(word) == stem(other) or word[:6] == other[:6]


def is_question(sentence: str) -> bool:
    return sentence.split()[0].lower() in QUESTIONS.split() and not re.match(NO_QUESTIONS, sentence)


def is_imperative(sentence: str) -> bool:
    return sentence.split()[0].lower() in IMPERATIVES.split() and not is_question(sentence)


def is_existential(sentence: str) -> bool:
    return bool(re.match("There (is|are|was|were|has|have|used) ", sentence))


def is_first_person(sentence: str) -> bool:
    return bool(re.match("(I|We) ", sentence))


def is_depiction(sentence: str) -> bool:
    return bool(re.search(DEPICTION, before_last_word(sentence)))


# ------------------------------------------------------------------------------ the words


def test_enough_words_of_each_number_of_tokens(entries: dict) -> None:
    sizes = Counter(len(ending(word)) for word in entries)
    assert set(sizes) == set(FEWEST), sizes
    assert all(sizes[size] >= fewest for size, fewest in FEWEST.items()), sizes


def test_words_and_replacements_are_ordinary(entries: dict, dictionary: Dictionary) -> None:
    listed = read("words_list.json")
    for word in {*entries, *(other for _, other in each_replacement(entries))}:
        assert re.fullmatch("[a-z]+", word), word
        assert word in listed or (zipf_frequency(word, "en") >= RAREST and dictionary.lookup(word)), word


def test_no_related_entries(entries: dict) -> None:
    assert not [pair for pair in combinations(entries, 2) if are_related(*pair)]


def test_entries_end_in_different_pairs_of_tokens(entries: dict) -> None:
    counts = Counter(tuple(ending(word)[-2:]) for word in entries)
    assert not [word for word in entries if counts[tuple(ending(word)[-2:])] > 1]


def test_at_most_four_entries_end_in_a_token(entries: dict) -> None:
    counts = Counter(last_token(word) for word in entries)
    assert not [token for token, count in counts.items() if count > 4]


def test_at_most_a_third_of_the_entries_end_in_a_suffix(entries: dict) -> None:
    suffixed = [word for word in entries if last_token(word) in SUFFIXES.split()]
    assert 0 < len(suffixed) <= len(entries) / 3, len(suffixed)


# ------------------------------------------------------------------------------ the texts


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


def test_spelling_is_american(entries: dict, dictionary: Dictionary) -> None:
    words = set()
    for _, text in each_text(entries):
        words.update(re.findall("[A-Za-z]+(?:['-][A-Za-z]+)*", text))
    assert not [word for word in sorted(words) if not dictionary.lookup(word)]


def test_no_text_is_repeated(entries: dict) -> None:
    counts = Counter(text for _, text in each_text(entries))
    assert not [text for text, count in counts.items() if count > 1]


def test_sentences_end_in_the_word_and_its_tokens(entries: dict) -> None:
    for word, text in each_text(entries, "sentences"):
        tail = ending(word)
        assert last_word(text) == word, f"{word}: {text}"
        assert token_ids(text)[-len(tail) :] == tail, f"{word}: {text}"


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
            shared = {common for common in words_before_last(one) & words_before_last(other) if len(common) > 6}
            assert not shared, f"{word}: {shared} in {one!r} and {other!r}"


# ------------------------------------------------------------------------------ the replacements


def test_perturbed_versions_differ_from_the_base_in_the_last_word(entries: dict) -> None:
    for word, entry in entries.items():
        base = before_last_word(entry["sentences"][0])
        assert all(before_last_word(text) == base for text in entry["replaced_sentences"]), word
        replacements = [last_word(text) for text in entry["replaced_sentences"]]
        assert word not in replacements and len(set(replacements)) == len(replacements), f"{word}: {replacements}"


def test_perturbed_versions_end_in_as_many_tokens_and_the_same_last_one_alone(entries: dict) -> None:
    for word, text in each_text(entries, "replaced_sentences"):
        tail = ending(last_word(text))
        assert token_ids(text)[-len(tail) :] == tail, f"{word}: {text}"
        assert len(tail) == len(ending(word)), f"{word}: {text}"
        assert tail[-1] == ending(word)[-1], f"{word}: {text}"
        assert tail[-2] != ending(word)[-2], f"{word}: {text}"


def test_replacements_are_used_twice_at_most(entries: dict) -> None:
    counts = Counter(other for _, other in each_replacement(entries))
    assert not [other for other, count in counts.items() if count > 2]


def test_replacements_are_no_relatives_of_the_word(entries: dict) -> None:
    assert not [pair for pair in each_replacement(entries) if are_related(*pair)]


def test_no_two_words_replace_each_other(entries: dict) -> None:
    """Nor in another number: nihilists by pragmatists and pragmatist by nihilist."""
    pairs = {(stem(word), stem(other)) for word, other in each_replacement(entries)}
    assert not [(word, other) for word, other in pairs if (other, word) in pairs]


# ------------------------------------------------------------------------------ nothing marks the base


def length(sentence: str) -> int:
    """Tokens before the last word."""
    return len(token_ids(before_last_word(sentence)))


def test_bases_are_as_long_as_other_contexts(entries: dict) -> None:
    difference = mean(map(length, bases(entries))) - mean(map(length, other_contexts(entries)))
    assert abs(difference) <= 0.7, difference
    for word, entry in entries.items():
        base, *others = map(length, entry["sentences"])
        assert abs(base - mean(others)) <= 4, f"{word}: {base}, {others}"


@pytest.mark.parametrize("manner", [is_imperative, is_question, is_existential, is_first_person, is_depiction])
def test_bases_are_written_in_the_manner_of_other_contexts(entries: dict, manner: Callable[[str], bool]) -> None:
    in_bases = mean(map(manner, bases(entries)))
    in_others = mean(map(manner, other_contexts(entries)))
    assert in_others > 0.02 and abs(in_bases - in_others) <= MANNER, (in_bases, in_others)


def test_words_hardly_tell_the_base(entries: dict) -> None:
    """A naive Bayes classifier over the words before the last one, each entry judged by what the others teach."""
    counts = {True: Counter(), False: Counter()}
    for entry in entries.values():
        for place, sentence in enumerate(entry["sentences"]):
            counts[place == 0].update(words_before_last(sentence))
    scores = {True: [], False: []}
    for entry in entries.values():
        own = {True: Counter(), False: Counter()}
        for place, sentence in enumerate(entry["sentences"]):
            own[place == 0].update(words_before_last(sentence))
        for place, sentence in enumerate(entry["sentences"]):
            score = 0.0
            for word in words_before_last(sentence):
                in_bases = counts[True][word] - own[True][word] + 0.5
                in_others = counts[False][word] - own[False][word] + 2.0  # there are four times as many of them
                score += math.log(4 * in_bases / in_others)
            scores[place == 0].append(score)
    better = [base > other for base in scores[True] for other in scores[False]]
    assert mean(better) < 0.65  # area under the ROC curve; 0.5 is chance

"""The words and sentences that the second experiment reads, with the real GPT-NeoX tokenizer."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from statistics import mean

import pytest
from helpers import ALL_WORDS, CONTEXTS, ROOT, gpt_neox_tokenizer, token_ids
from spylls.hunspell import Dictionary
from wordfreq import zipf_frequency

DICTIONARY = Dictionary.from_files("en_US")
RAREST = 1.5  # the least Zipf frequency of an ordinary word: one in 30 million
FEWEST = {2: 114, 3: 109, 4: 90}  # entries by the word's number of tokens
MARGIN = 0.03  # how far a share may differ between bases and other contexts, or between places

# Last tokens that are a suffix, or a suffix with the letter before it.
SUFFIXES = """
able ables ably age ages al als ally ial ials ical ically ance ancy ant ants ary ate ated ately ates
ating ation ations ator ators ed ened ered hed ied ished ised ized led ned red ted edly ely en ence
ency ens ent ents er ers eries ery es ess esses est ette ettes ful fully hood ian ians ible ibly ic
ics ie ier iers ies iest ily ing ings ingly ling ning ping ting ion ions ious iously ise ish ism
isms ist istic istics ists ities ition itions ity ive ization ize izes izing less ler lers ly ully
ement ements ment ments ner ners ness or ors ory ous ously s ship some ters tion tions ty ties ual
ure y
"""

NO_NOUNS = """
beep blasphemous buzzed cantankerous catchy choppy chuckle contagious decorate desegregated
disheveled doodling drowsy earmarked ebullient excruciating flimsy fluently gamble gasp giggled
glitzy grudgingly gullible halve haphazardly homeward honk hygienic hyperventilating immeasurably
inaudible incessantly indecipherable indescribable inebriated insipid insulate insurmountable
interdepartmental irretrievably lackadaisical mumble murky noisily nostalgic obfuscate painstakingly
polysyllabic rambunctious refurbish rejuvenate resuscitated scribble scrumptious shipwrecked
shrugging somersaulted speechless squeamish startle strenuous stupendous thaw tiptoeing
uncorroborated uneventful ungrammatical unprofitable unstoppable untangle vehemently wobble
"""

IMPERATIVES = """
allow approach ask be bring call check choose clip compare count cut decide describe do don't follow
give go hand hang hold imagine keep latch leave let lift listen look name never notice open please
plug put raise remember remind ring rinse save set show simmer slice sort speak spend spread
sprinkle stack stay stop stretch suppose take teach tell throw tie try turn wait warn wash watch
whip
"""
QUESTIONS = """
are can could did do does has have how is isn't must shall was were what when where which who why
will would
"""
NO_QUESTIONS = r"""(?x) Do\ not\ | Where\ the\ | When\ (?!did|do|is|was|will|would)
    | What\ (I|we|my|our|she|the|came|finally|impressed|struck|surprised|with)\ """

# A sentence about a picture or a text takes any word: as the manner of bases alone it'd mark them.
DEPICTION = r"""(?ix) \b (
    photo\w* | pictur\w* | draw | drawn | draws | drawing\w* | drew | paint\w* | slides? | film\w*
    | movies? | novels? | notic\w* | mention\w* | talk\w* | blog\w* | books? | poems? | statues?
    | museums? | sketch\w* | portraits? | stor(y|ies) | articles? | magazines? | chapters? | pages?
    | albums? | websites? | scenes? | authors? | lectur\w* | speech\w* | about (\ \w+){0,2}$ ) \b"""

# So does one about what somebody feels or thinks.
FRAMES = r"""(?ix) \b (
    (fond | tired | afraid | proud | sick | ashamed | jealous | terrified | fear | thought)\ of
    | (dream(s|ed|ing)? | complain\w* | complaints | worried | fussy)\ (of|about)
    | (impressed | surprised)\ by | interest(ed)?\ in | laugh\w*\ at | ignor\w+ | hat(e|es|ed|red)
    | lov(e|es|ed) | dislik\w+ | admir\w+ | enjoy\w* | prefer\w* | know\w*\ nothing\ (about|of)
    | talk\w*\ (\w+\ ){0,5}about ) \b"""

# A modifier follows a determiner or a preposition and is none itself, nor one of these.
OPENERS = """
a about against all an and any at behind between both by each eight every five for four from half
her his in into its like my near nine no of on or our over six some ten than that the their these
this those three through twelve twenty two under with without your
"""
NO_MODIFIERS = """
another are as be been being but enough few fewer her him is it less many me more most much not one
ones only other others own quite rather several so such them to too us very was were you
"""


def last_word(text: str) -> str:
    return text.rsplit(" ", 1)[1]


def before_last_word(text: str) -> str:
    return text.rsplit(" ", 1)[0]


def words_before_last(text: str) -> set[str]:
    return set(re.findall("[a-z']+", before_last_word(text).lower()))


@pytest.fixture(scope="module")
def entries() -> dict[str, dict[str, list[str]]]:
    text = (ROOT / CONTEXTS).read_text(encoding="utf-8")
    entries = json.loads(text)
    assert json.dumps(entries, indent=1) + "\n" == text, "a word twice, or another layout"
    return entries


def each_text(entries: dict, *kinds: str) -> Iterator[tuple[str, str]]:
    """Every text with the word to whose entry it belongs."""
    for word, entry in entries.items():
        for kind in kinds or ("sentences", "replaced_sentences"):
            for text in entry[kind]:
                yield word, text


def each_replacement(entries: dict) -> Iterator[tuple[str, str]]:
    for word, text in each_text(entries, "replaced_sentences"):
        yield word, last_word(text)


def beginnings(entries: dict, *places: int) -> list[str]:
    """What stands before the last word in the sentences at these places; the bases' is 0."""
    return [before_last_word(entry["sentences"][at]) for entry in entries.values() for at in places]


def stem(word: str) -> str:
    """The word without its endings, crudely: saxophonists and saxophone have one stem."""
    suffix = "(s|es|e|ed|ing|er|ly|ness|ment|ist|ism|istic|ic|al|y|i|um|ship)$"
    shorter = re.sub(suffix, "", word)
    while shorter != word and len(shorter) >= 4:
        word, shorter = shorter, re.sub(suffix, "", shorter)
    return word


def are_related(word: str, other: str) -> bool:
    return stem(word) == stem(other) or word[:6] == other[:6]


def first_word(text: str) -> str:
    return text.split()[0].lower()


def is_question(text: str) -> bool:
    return first_word(text) in QUESTIONS.split() and not re.match(NO_QUESTIONS, text)


def is_order(text: str) -> bool:
    is_none = is_question(text) or re.match("Never (before|in) ", text)
    return not is_none and first_word(text) in IMPERATIVES.split()


def has_modifier(beginning: str) -> bool:
    """A rusty *colander*; not: a *colander*, so *drowsy*, my aunt's *colander*."""
    before, modifier = beginning.lower().split()[-2:]
    is_none = modifier in (OPENERS + NO_MODIFIERS).split() or re.search("'s?$|,$", modifier)
    return not is_none and before in OPENERS.split()


# Manners of what stands before the last word: whether a beginning is so, the least share of them
# at each of the five places, and how far shares may differ.
MANNERS = {
    "order": (is_order, 0.05, MARGIN),
    "question": (is_question, 0.05, MARGIN),
    "existential": (re.compile("There (is|are|was|were|has|have|used) ").match, 0.01, MARGIN),
    "first person": (re.compile("(I|We) ").match, 0.02, MARGIN),
    "depiction": (re.compile(DEPICTION).search, 0.02, MARGIN),
    "attitude frame": (re.compile(FRAMES).search, 0.02, 0.05),
    "modifier": (has_modifier, 0.15, 0.05),
}


# ------------------------------------------------------------------------------ the words


def test_enough_words_of_each_number_of_tokens_and_not_only_nouns(entries: dict) -> None:
    sizes = Counter(len(token_ids(word)) for word in entries)
    assert set(sizes) == set(FEWEST), sizes
    assert all(sizes[size] >= fewest for size, fewest in FEWEST.items()), sizes
    assert len(set(NO_NOUNS.split()) & set(entries)) >= 70


def test_words_and_replacements_are_ordinary(entries: dict) -> None:
    for word in {*entries, *(other for _, other in each_replacement(entries))}:
        assert re.fullmatch("[a-z]+", word) and zipf_frequency(word, "en") >= RAREST, word
        assert word in ALL_WORDS or DICTIONARY.lookup(word), word


def test_entries_are_no_relatives_and_end_in_different_tokens(entries: dict) -> None:
    """Each pair of last tokens once, a last token four times at most, few suffixes."""
    assert not [pair for pair in combinations(entries, 2) if are_related(*pair)]
    pairs = Counter(tuple(token_ids(word)[-2:]) for word in entries)
    assert not [pair for pair, count in pairs.items() if count > 1]
    tokens = Counter(gpt_neox_tokenizer().decode(token_ids(word)[-1:]) for word in entries)
    assert not [token for token, count in tokens.items() if count > 4]
    assert 0 < sum(tokens[suffix] for suffix in SUFFIXES.split()) <= len(entries) / 3


# ------------------------------------------------------------------------------ the texts


def test_texts_are_plain_and_american(entries: dict) -> None:
    """Six to twenty words, a capital, ASCII, single spaces, no stop at the end; none twice."""
    counts = Counter(text for _, text in each_text(entries))
    for text, count in counts.items():
        assert re.fullmatch(r"[A-Z](\S| (?=\S))*[a-z]", text, re.ASCII) and text.isascii(), text
        assert 6 <= len(text.split()) <= 20 and count == 1, text
    words = set(re.findall("[A-Za-z]+(?:['-][A-Za-z]+)*", " ".join(counts)))
    assert not [word for word in sorted(words) if not DICTIONARY.lookup(word)]


def test_sentences_hold_the_word_once_and_end_in_its_tokens(entries: dict) -> None:
    for word, text in each_text(entries, "sentences"):
        tail = token_ids(word)
        assert last_word(text) == word, f"{word}: {text}"
        assert token_ids(text, False)[-len(tail) :] == tail, f"{word}: {text}"
        assert len(re.findall(rf"(?i)\b{word}\b", text)) == 1, f"{word}: {text}"


def test_sentences_of_a_word_differ(entries: dict) -> None:
    """In their first words, and in all words of more than six letters."""
    for word, entry in entries.items():
        assert set(entry) == {"sentences", "replaced_sentences"} and len(entry["sentences"]) == 5
        for one, other in combinations(entry["sentences"], 2):
            assert first_word(one) != first_word(other), f"{word}: {one!r} and {other!r}"
            common = words_before_last(one) & words_before_last(other)
            assert all(len(each) <= 6 for each in common), f"{word}: {one!r} and {other!r}"


def test_everyday_words_occur(entries: dict) -> None:
    for everyday in ("computer", "internet", "email", "phone"):
        texts = [text for text in beginnings(entries, *range(5)) if f" {everyday}" in text]
        assert len(texts) >= 3, f"{everyday}: {texts}"


# ------------------------------------------------------------------------------ the replacements


def test_perturbed_versions_differ_from_the_base_in_the_last_word(entries: dict) -> None:
    for word, entry in entries.items():
        base = before_last_word(entry["sentences"][0])
        assert all(before_last_word(text) == base for text in entry["replaced_sentences"]), word
        others = [last_word(text) for text in entry["replaced_sentences"]]
        assert len({word, *others}) == 1 + len(others) >= 5, f"{word}: {others}"


def test_replacements_end_in_the_same_last_token_alone(entries: dict) -> None:
    for word, text in each_text(entries, "replaced_sentences"):
        own, tail = token_ids(word), token_ids(last_word(text))
        assert token_ids(text, False)[-len(tail) :] == tail, f"{word}: {text}"
        assert len(tail) == len(own) and tail[-1] == own[-1], f"{word}: {text}"
        assert tail[-2] != own[-2], f"{word}: {text}"


def test_replacements_are_not_much_rarer_than_the_word(entries: dict) -> None:
    for word, other in each_replacement(entries):
        assert zipf_frequency(other, "en") >= max(2, zipf_frequency(word, "en") - 1), (word, other)


def test_replacements_are_no_relatives_and_used_twice_at_most(entries: dict) -> None:
    """No two words replace each other, nor do pragmatists nihilists and a nihilist a pragmatist."""
    assert not [pair for pair in each_replacement(entries) if are_related(*pair)]
    counts = Counter(other for _, other in each_replacement(entries))
    assert not [other for other, count in counts.items() if count > 2]
    stems = {(stem(word), stem(other)) for word, other in each_replacement(entries)}
    assert not [(word, other) for word, other in stems if (other, word) in stems]


# ------------------------------------------------------------------------------ no mark of the base


def length(beginning: str) -> int:
    return len(token_ids(beginning, False))


def test_bases_are_as_long_as_other_contexts(entries: dict) -> None:
    in_others = mean(map(length, beginnings(entries, 1, 2, 3, 4)))
    assert abs(mean(map(length, beginnings(entries, 0))) - in_others) <= 0.7, in_others
    for word in entries:
        base, *others = map(length, beginnings({word: entries[word]}, *range(5)))
        assert abs(base - mean(others)) <= 4, f"{word}: {base}, {others}"


@pytest.mark.parametrize("manner", MANNERS)
def test_sentences_of_all_places_are_written_in_one_manner(entries: dict, manner: str) -> None:
    """Each place as all of them, and the bases, which are at place 0, as the others."""
    is_so, least, margin = MANNERS[manner]
    shares = [mean(bool(is_so(text)) for text in beginnings(entries, place)) for place in range(5)]
    assert min(shares) >= least, shares
    assert max(abs(share - mean(shares)) for share in shares) <= margin, shares
    assert abs(shares[0] - mean(shares[1:])) <= margin, shares


def test_no_first_word_rules_a_place(entries: dict) -> None:
    for place in range(5):
        openings = Counter(map(first_word, beginnings(entries, place)))
        assert max(openings.values()) <= len(entries) / 4, openings.most_common(3)


def test_words_hardly_tell_the_base(entries: dict) -> None:
    """Naive Bayes over the words before the last, each entry judged by what the others teach."""
    bags = [list(map(words_before_last, entry["sentences"])) for entry in entries.values()]
    in_bases = Counter(word for bag in bags for word in bag[0])
    in_all = Counter(word for bag in bags for words in bag for word in words)
    scores = {True: [], False: []}
    for bag in bags:
        own = Counter(word for words in bag for word in words)
        for place, words in enumerate(bag):
            score = 0.0
            for word in words:
                bases = in_bases[word] - (word in bag[0])
                others = in_all[word] - own[word] - bases  # four times as many sentences
                score += math.log(4 * (bases + 0.5) / (others + 2))
            scores[place == 0].append(score)
    better = [base > other for base in scores[True] for other in scores[False]]
    assert mean(better) < 0.6  # area under the ROC curve; 0.5 is chance

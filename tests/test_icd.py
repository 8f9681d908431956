"""ICD-10-CM codes as labels."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecg_jax.data.icd import CHAPTERS, ancestors, chapter, is_cardiac, propagate, shorten

CODES = st.from_regex(r"[A-Z][0-9][0-9A-Z][0-9A-Z]{0,4}", fullmatch=True)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("I4819", ["I48", "I481", "I4819"]),
        ("I48.19", ["I48", "I481", "I4819"]),
        ("I10", ["I10"]),
        ("W19XXXA", ["W19"]),  # placeholders up to the seventh character
        ("T500X5A", ["T50", "T500"]),  # the cut leaves one placeholder at the end
        ("S72001A", ["S72", "S720", "S7200"]),
        ("X58XXXA", ["X58"]),  # X as a letter of the category stays
        ("Y36X1", ["Y36", "Y36X1"]),  # Y36X is no code
        (" e785 ", ["E78", "E785"]),
        ("I4", []),
        ("", []),
        ("NoDx", []),  # as MIMIC-IV-ECG-ICD writes a code without a counterpart
        ("4280", []),  # ICD-9
    ],
)
def test_known_codes(code, expected):
    assert propagate([code]) == sorted(expected)


def test_fewer_characters():
    assert propagate(["I4819", "W19XXXA"], characters=4) == ["I48", "I481", "W19"]
    with pytest.raises(ValueError, match="at least 3"):
        shorten("I48", 2)


@given(st.lists(CODES, max_size=6), st.integers(3, 7))
def test_propagation(codes, characters):
    labels = propagate(codes, characters)
    assert labels == sorted(set(labels))
    assert propagate(labels, characters) == labels  # idempotent
    assert all(3 <= len(label) <= characters for label in labels)
    assert not any(label[3:].endswith("X") for label in labels)
    for label in labels:  # closed under ancestors
        assert set(ancestors(label)) <= set(labels)
    for code in codes:  # every prefix of every code is there
        for n in range(3, min(len(code), characters) + 1):
            assert shorten(code, n) in labels
    kept = {shorten(code, characters) for code in codes}
    for label in labels:  # and nothing else is
        assert any(code.startswith(label) for code in kept)


@given(st.lists(CODES, max_size=4), st.lists(CODES, max_size=4))
def test_propagation_of_a_union_is_the_union(some, others):
    assert propagate(some + others) == sorted({*propagate(some), *propagate(others)})


@given(CODES)
def test_a_code_and_its_ancestors_share_the_chapter(code):
    assert {chapter(a) for a in ancestors(shorten(code))} == {chapter(code)}
    assert is_cardiac(code) == ("I00" <= code[:3] <= "I99")


@pytest.mark.parametrize(
    ("code", "numeral"),
    [
        ("A000", "I"), ("C7A", "II"), ("D49", "II"), ("D50", "III"), ("D3A", "II"), ("H599", "VII"),
        ("H60", "VIII"), ("I10", "IX"), ("M1A", "XIII"), ("O9A2", "XV"), ("T88", "XIX"), ("V00", "XX"),
        ("X58", "XX"), ("Z3A", "XXI"), ("U071", "XXII"), ("E90", None), ("4280", None),
    ],
)  # fmt: skip
def test_chapters(code, numeral):
    found = chapter(code)
    assert (found.numeral if found else None) == numeral


def test_chapters_do_not_overlap():
    assert len(CHAPTERS) == 22
    ordered = sorted(CHAPTERS, key=lambda c: c.first)
    assert all(a.first <= a.last < b.first for a, b in itertools.pairwise(ordered))

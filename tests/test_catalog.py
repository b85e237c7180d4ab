"""The list of systems, the cards in the families' files, and the shipped data."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from regard import catalog
from regard.card import PROOFS, Card
from regard.data import read, sample_text

ROOT = Path(__file__).parents[1]
FOUND = catalog.cards()

CARD_TEXT = """
from regard.card import Card

CARD = Card(
    key="{key}",
    title="A title " "in two parts",
    arxiv="1706.03762",
    family="kernel",
    entry="math:sqrt",
    {more}
)
"""


def card(**more: str) -> Card:
    return Card("x", "X", "1706.03762", "kernel", "math:sqrt", **more)


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_the_list_is_complete() -> None:
    rows = catalog.systems()
    assert len(rows) == 178
    assert len({row.key for row in rows}) == 178
    assert all(row.key and row.family and row.title for row in rows)
    assert {"flashbias", "bytetransformer", "cab"} <= {row.key for row in rows}


def test_catalog_joins_list_and_cards() -> None:
    rows = catalog.catalog()
    assert [row.key for row in rows] == [row.key for row in catalog.systems()]
    assert {row.key for row in rows if row.card} == set(FOUND)
    assert all((row.state == "planned") == (row.card is None) for row in rows)


def test_filters() -> None:
    kernels = catalog.catalog(family="kernel")
    assert kernels and all(row.family == "kernel" for row in kernels)
    planned = catalog.catalog(state="planned")
    assert len(planned) == 178 - len(FOUND)
    with pytest.raises(ValueError, match=r"unknown family 'kernels', expected one of bench, diff"):
        catalog.catalog(family="kernels")
    with pytest.raises(ValueError, match=r"unknown state 'red', expected one of green, partial"):
        catalog.catalog(state="red")


def test_find_suggests() -> None:
    assert catalog.find("flashbias").title.startswith("FlashBias")
    with pytest.raises(ValueError, match=r"no system 'flashbais'; did you mean flashbias"):
        catalog.find("flashbais")
    with pytest.raises(ValueError, match="lists all"):
        catalog.find("qqqqqqqqqqqq")


def test_state_counts_proofs() -> None:
    assert card().state == "partial"
    assert card().missing == PROOFS
    assert card(definition="a", oracle="b", claim="c").missing == ("cost",)
    assert card(definition="a", oracle="b", claim="c", cost="d").state == "green"


def test_a_card_checks_itself() -> None:
    with pytest.raises(ValueError, match=r"Card 'x': entry must be 'module:name', got 'math.sqrt'"):
        Card("x", "X", "1706.03762", "kernel", "math.sqrt")
    with pytest.raises(ValueError, match=r"Card 'x': title must be a text, got ''"):
        Card("x", "", "1706.03762", "kernel", "math:sqrt")


def test_resolve_follows_attributes() -> None:
    import pathlib

    found = Card("x", "X", "1", "kernel", "pathlib:Path.cwd").resolve()
    assert found == pathlib.Path.cwd
    with pytest.raises(AttributeError):
        Card("x", "X", "1", "kernel", "pathlib:Nothing").resolve()


def test_cards_are_read_without_importing(tmp_path: Path) -> None:
    text = CARD_TEXT.format(key="one", more='cost="python -m x",')
    write(tmp_path, "sparse/deep/one.py", "raise RuntimeError('imported')\n" + text)
    write(tmp_path, "vision/other.py", "CARDINAL = 3\n")
    write(tmp_path, "core/not_a_family.py", CARD_TEXT.format(key="two", more=""))
    found = catalog.cards(tmp_path)
    assert list(found) == ["one"]
    assert found["one"].title == "A title in two parts"
    assert found["one"].missing == ("definition", "oracle", "claim")


def test_cards_accept_an_annotation(tmp_path: Path) -> None:
    text = CARD_TEXT.format(key="one", more="").replace("CARD =", "CARD: Card =")
    write(tmp_path, "sparse/one.py", text)
    assert list(catalog.cards(tmp_path)) == ["one"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("CARD = make()", "missing 5 required positional arguments"),
        ("CARD = 3", r"must be written as CARD = Card\(\.\.\.\)"),
        (CARD_TEXT.format(key="k", more="note=__name__,"), "must be literals"),
        (CARD_TEXT.format(key="k", more="proof='x',"), "unexpected keyword argument 'proof'"),
    ],
)
def test_a_wrong_card_is_named(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path, "sparse/one.py", text)
    with pytest.raises(ValueError, match=message) as error:
        catalog.cards(tmp_path)
    assert "one.py" in str(error.value)


def test_a_key_has_one_card(tmp_path: Path) -> None:
    for name in ("sparse/one.py", "vision/two.py"):
        write(tmp_path, name, CARD_TEXT.format(key="same", more=""))
    with pytest.raises(ValueError, match=r"two\.py: the key 'same' is already in .*one\.py"):
        catalog.cards(tmp_path)


def test_a_card_needs_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "cards", lambda: {"x": card()})
    with pytest.raises(ValueError, match="card 'x' has no row"):
        catalog.catalog()


@pytest.mark.parametrize("key", sorted(FOUND))
def test_every_card_of_the_package(key: str) -> None:
    entry, listed = FOUND[key], catalog.find(key)
    assert entry.resolve() is not None
    assert (entry.family, entry.title) == (listed.family, listed.title)
    assert re.fullmatch(r"\d{4}\.\d{4,5}", entry.arxiv)
    for proof in PROOFS:
        text = getattr(entry, proof)
        if text is not None:
            check_evidence(text)


def check_evidence(text: str) -> None:
    """A proof is a test that exists or a command whose module exists."""
    if text.startswith("tests/"):
        path, _, name = text.partition("::")
        source = (ROOT / path).read_text(encoding="utf-8")
        assert not name or f"def {name.split('[')[0].split('::')[-1]}(" in source, text
        return
    command = re.match(r"python -m ([\w.]+)", text)
    assert command, f"neither a test nor a command: {text}"
    module = ROOT / command[1].replace(".", "/")
    assert module.with_suffix(".py").exists() or (module / "__main__.py").exists(), text


def test_the_sample_is_the_poem_and_nothing_else() -> None:
    text = sample_text()
    assert text.startswith("Paradise Lost\n\nBook I\n\nOf Man's first disobedience")
    assert text.endswith("Through Eden took their solitary way.\n")
    # A token is at most a word, so that this many words are more than 60,000 tokens.
    assert len(text.split()) > 60_000
    assert text.isascii()
    assert not re.search(r"gutenberg|etext|[0-9$*<>\r]", text, re.IGNORECASE)
    books = re.findall(r"^Book (\w+)$", text, re.MULTILINE)
    assert " ".join(books) == "I II III IV V VI VII VIII IX X XI XII"


def test_the_sample_says_where_it_comes_from() -> None:
    note = read("sample.md")
    for word in ("Paradise Lost", "John Milton", "1667", "public domain", "brotli"):
        assert word in note

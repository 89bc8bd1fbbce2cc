"""Class names: any text, never a path."""

import unicodedata

import pytest

from fssdeploy.bank import Bank
from fssdeploy.errors import InputError


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "..",
        ".",
        "C:\\CON",
        "ё",
        "чашка, 茶碗",
        "👩‍🔧 mechanic",
        'it\'s "quoted"; DROP TABLE state; --',
        "%s {0} ?",
        " cup",
        "x" * 200,
        "🙂" * 200,
    ],
)
def test_hostile_names_are_only_names(bank, make_state, name, tmp_path):
    before = {path for path in tmp_path.rglob("*") if "states" not in path.parts}
    assert bank.put(name, make_state(1)) == 1
    assert bank.extend(name, make_state(2)) == 2
    with Bank.open(bank.directory) as again:
        assert again.names() == [name]
        assert [info.name for info in again.versions(name)] == [name, name]
        assert again.get(name).shots == 2
    outside = {path for path in tmp_path.rglob("*") if "states" not in path.parts}
    assert {path.name for path in outside - before} <= {"index.sqlite-wal", "index.sqlite-shm"}
    assert len(list((bank.directory / "states").iterdir())) == 2
    assert bank.remove(name) == 2


@pytest.mark.parametrize(
    "name",
    ["", " ", "\n", "a\nb", "a\0b", "\x7f", "\x85", "tab\t", "\ud800", "line\u2028break", "x" * 201, "e\u0301" * 201],
)
def test_names_that_are_refused(bank, make_state, name):
    calls = [
        lambda: bank.put(name, make_state()),
        lambda: bank.extend(name, make_state()),
        lambda: bank.get(name),
        lambda: bank.versions(name),
        lambda: bank.remove(name),
    ]
    for call in calls:
        with pytest.raises(InputError) as caught:
            call()
        assert caught.value.code == "class_name"
        caught.value.line().encode()  # can be printed
    assert bank.names() == []


def test_one_visible_name_is_one_class(bank, make_state):
    composed, decomposed = (unicodedata.normalize(form, "Käsé") for form in ("NFC", "NFD"))
    assert composed != decomposed
    assert bank.put(decomposed, make_state(1)) == 1
    assert bank.put(composed, make_state(2)) == 2
    assert bank.names() == [composed]
    assert bank.get(decomposed).meta == {"seed": 2}
    assert len(bank.versions(decomposed)) == 2


def test_length_counts_after_normalisation(bank, make_state):
    assert bank.put("e\u0301" * 200, make_state()) == 1
    assert bank.names() == ["é" * 200]

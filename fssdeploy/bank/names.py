"""What a class may be called, and the error for a class that a bank does not have."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Sequence

from fssdeploy.errors import InputError

LONGEST = 200  # characters, after normalisation
_SHOWN = 8

# Control characters, lone surrogates, line and paragraph separators. Format characters (Cf) stay allowed: emoji and
# several scripts need the joiners among them.
_REFUSED = {"Cc", "Cs", "Zl", "Zp"}


def class_name(text: str) -> str:
    """`text` in Unicode's composed form (NFC), so that one visible name is one class.

    Raises InputError ``class_name`` for a blank name, one of more than 200 characters, or one with control characters.
    """
    name = unicodedata.normalize("NFC", text)
    if not name.strip():
        raise InputError("class_name", "a class needs a name", "the one given is empty", "Give it a name.")
    if len(name) > LONGEST:
        raise InputError(
            "class_name",
            f"the class name beginning {name[:20]!r} is too long",
            f"it has {len(name)} characters, at most {LONGEST} are allowed",
            "Shorten it.",
        )
    if any(unicodedata.category(character) in _REFUSED for character in name):
        raise InputError(
            "class_name",
            f"the class name {ascii(name)} cannot be used",
            "it contains a control character or a line break",
            "Leave that character out.",
        )
    return name


def unknown_class(name: str, known: Sequence[str]) -> InputError:
    """The InputError ``class_unknown`` that lists the known names, those that look alike first."""
    if not known:
        return InputError("class_unknown", f"there is no class '{name}'", "the bank is empty", "Enrol it first.")
    close = difflib.get_close_matches(name, known, n=_SHOWN)
    shown = (close + [other for other in known if other not in close])[:_SHOWN]
    more = f" and {len(known) - len(shown)} more" if len(known) > len(shown) else ""
    return InputError(
        "class_unknown",
        f"there is no class '{name}'",
        f"the bank has {', '.join(repr(other) for other in shown)}{more}",
        "Use one of these names, or enrol it first.",
    )

"""Which pictures no training may see, by hashes of their names.

Four parts, the same for teacher, vision tokenizer and transformer:

- `name`: a twentieth of all things, with every skin tone and in every style. Nothing of them is ever seen.
- `combination`: a tenth of the combinations of role, gender and skin tone, in every style. Their parts are seen.
- `pair`: a tenth of the remaining pairs of name and style, of names that are seen in another style.
- everything else is seen in training.

A fifth of what is held out is for choosing settings (`dev`), the rest is for figures (`test`). Edits, analogies and
sequences whose target is held out are held out with it.
"""

import hashlib
from collections.abc import Iterable, Sequence

from .names import person_of

SEEN, PAIR, COMBINATION, NAME = "seen", "pair", "combination", "name"
SHARES = {NAME: 0.05, COMBINATION: 0.1, PAIR: 0.1}
DEV_SHARE = 0.2


def fraction(*words: str) -> float:
    """A number in [0, 1) that depends on the words alone."""
    digest = hashlib.sha256("\n".join(words).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def held_out(names: Sequence[str], styles: Sequence[str], twins: Iterable[Sequence[int]] = ()) -> list[str]:
    """The part of each picture: `"seen"`, `"pair"`, `"combination"` or `"name"`.

    Args:
        names, styles: of every picture of the world.
        twins: groups of indices of pictures that are equal to the pixel; a group that holds a seen picture is seen.
    """
    everything = set(names)
    whole = {name: _whole_name(name, everything) for name in everything}
    candidates: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        if whole[name] is None:
            candidates.setdefault(name, []).append(index)
    pairs: set[int] = set()
    for name, indices in candidates.items():
        drawn = {index: fraction(PAIR, name, styles[index]) for index in indices}
        chosen = [index for index in indices if drawn[index] < SHARES[PAIR]]
        if len(chosen) == len(indices) and chosen:  # the name must be seen in another style
            chosen.remove(max(chosen, key=drawn.get))
        pairs.update(chosen)
    parts = [whole[name] or (PAIR if index in pairs else SEEN) for index, name in enumerate(names)]
    for group in twins:
        if any(parts[index] == SEEN for index in group):
            for index in group:
                parts[index] = SEEN
    return parts


def _whole_name(name: str, names: set[str]) -> str | None:
    """The part of a name that is held out in every style, or None."""
    if fraction(NAME, name.partition(":")[0]) < SHARES[NAME]:
        return NAME
    person = person_of(name, names)
    if person is not None and person.tone and fraction(COMBINATION, *person) < SHARES[COMBINATION]:
        return COMBINATION
    return None


def is_dev(name: str, style: str) -> bool:
    """Whether a held-out picture, or a prompt for a seen one, is for choosing settings and not for figures."""
    return fraction("dev", name, style) < DEV_SHARE

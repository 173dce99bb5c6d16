"""Names of a table's rows: short, good for a folder, and never one for two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from featinv.errors import UserError


def distinct(rows: Mapping[str, str]) -> dict[str, str]:
    """What is compared -> the name of its row, as given.

    Raises:
        UserError: If two would be one row, of which the second would silently take the first one's place.
    """
    owners: dict[str, str] = {}
    for name, row in rows.items():
        if row in owners:
            raise UserError(f"{owners[row]} and {name} would both be the row {row!r}; leave one out or rename it.")
        owners[row] = name
    return dict(rows)


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Path or bundled name -> its last component, behind as many of those before it as tell it from the others.

    Raises:
        UserError: As `distinct`.
    """
    parts = {name: name.strip("/").split("/") for name in names}
    depths = range(1, max(map(len, parts.values()), default=0) + 1)
    ends = {name: ["-".join(words[-depth:]) for depth in depths] for name, words in parts.items()}

    def shortest(name: str) -> str:
        alone = (ends[name][k] for k in range(len(depths)) if sum(e[k] == ends[name][k] for e in ends.values()) == 1)
        return next(alone, ends[name][-1])

    return distinct({name: shortest(name) for name in parts})

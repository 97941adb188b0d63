"""What preparing rows found that a user should know: counted by each process, said once for all of them."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from poft_plugin.data.preparation import Rows
from poft_plugin.data.rows import RowError
from poft_plugin.scoring.board import Board
from poft_plugin.scoring.scorer import Scorer
from poft_plugin.scoring.shares import Share


@dataclass(frozen=True)
class Findings:
    """Of one scorer, in a share of the rows.

    Args:
        counts: the scorer's own, as `Scorer.tally` gives them.
        refused: rows that it cannot read and that are left out.
        first_refused: why, of the first one.
        long: rows that do not fit and that are dropped.
        total: rows of the run, for the line about those.
        longest: tokens of the longest.
        longest_row: names it.
    """

    counts: Mapping[str, int] = field(default_factory=dict)
    refused: int = 0
    first_refused: str = ""
    long: int = 0
    total: int = 0
    longest: int = 0
    longest_row: str = ""

    def dumps(self) -> str:
        """As text, for the notice board."""
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str) -> "Findings":
        """The inverse of `dumps`."""
        return cls(**json.loads(text))


def together(found: Sequence[Findings]) -> Findings:
    """The sum over shares.

    Examples:
        >>> together([Findings({"rows": 2}, long=1, longest=7), Findings({"rows": 3}, long=1, longest=9)]).longest
        9
    """
    counts: Counter[str] = Counter()
    for one in found:
        counts.update(one.counts)
    longest = max(found, key=lambda one: one.longest)
    return Findings(
        dict(counts),
        sum(one.refused for one in found),
        next((one.first_refused for one in found if one.refused), ""),
        sum(one.long for one in found),
        max(one.total for one in found),
        longest.longest,
        longest.longest_row,
    )


def lines(scorer: Scorer, found: Findings, of: str = "") -> list[str]:
    """What is said of the findings.

    Args:
        scorer: whose.
        found: the sum.
        of: which share of the rows they are about, where it is not all of them.
    """
    said = []
    if found.refused:
        said.append(
            f"{scorer.kind} {scorer.name!r}: {found.refused} rows that it cannot read; the first: {found.first_refused}"
        )
    if remark := scorer.remark(found.counts):
        said.append(remark)
    if found.long:
        said.append(f"{long_rows_line(scorer.name, scorer.kind, found)}: dropped")
    return [f"{line}{of}" for line in said]


def long_rows_line(name: str, kind: str, found: Findings) -> str:
    """How many rows do not fit, and the longest."""
    return (
        f"{kind} {name!r}: {found.long} of {found.total} rows are longer than its context, the longest "
        f"{found.longest_row} with {found.longest} tokens"
    )


def say(scorer: Scorer, found: Findings, share: Share, board: Board | None) -> None:
    """Says what was found in all shares, once; each process its own where they cannot reach each other.

    Args:
        scorer: whose rows.
        found: in this process's share.
        share: which one that is.
        board: of the launch.
    """
    if share.index is None:
        return
    of = "" if share.count == 1 else f" (share {share.index} of {share.count})"
    if board is not None and board.reaches and share.count > 1:
        board.post(share.index, found.dumps())
        if share.index:
            return
        texts = board.gather(share.count)
        found = together([Findings.loads(text) for text in texts] or [found])
        of = "" if len(texts) == share.count else f" (in {max(len(texts), 1)} of {share.count} shares)"
    for line in lines(scorer, found, of):
        print(line, flush=True)


def with_long_rows(found: Findings, rows: Rows, lengths: Mapping[str, int]) -> Findings:
    """Findings with the rows that a model cannot read.

    Args:
        found: without them.
        rows: the rows, for messages.
        lengths: tokens of the rows that do not fit, by key.
    """
    worst = max(lengths, key=lambda key: lengths[key])
    return replace(found, long=len(lengths), total=len(rows), longest=lengths[worst], longest_row=rows.where_key(worst))


def long_rows_error(name: str, found: Findings, *, what: str) -> RowError:
    """Rows that are longer than a model's context, and are not to be dropped.

    Args:
        name: the model.
        found: with such rows.
        what: what the model is to the user.
    """
    line = long_rows_line(name, what, found)
    return RowError(f"{line}. Set `on_long_row: drop` or `truncate` for it, or remove the rows")

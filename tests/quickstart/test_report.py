"""The quickstart's report reads what `axolotl poft export --rows` writes."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from poft_plugin.data.rows import Turn, dump_conversation
from quickstart.report import preference_scores
from quickstart.task import Row


@pytest.mark.parametrize("ends", [0, 1])
def test_scores_meet_their_rows_by_text(tmp_path: Path, ends: int) -> None:
    """Whether or not the policy is trained on the end of the turn; each row is scored by two references."""
    rows = [Row("a", "1 + 1?", "2"), Row("b", "2 + 2?", "5")]
    turns = [[Turn("user", row.prompt), Turn("assistant", row.answer, counted=True, ends=ends)] for row in rows]
    texts = [dump_conversation(conversation) for conversation in turns]
    columns = {"conversation": [*texts, *reversed(texts)], "reward": [-1.0, -3.0, -4.0, -2.0]}
    pq.write_table(pa.table(columns), tmp_path / "scores.parquet")
    assert preference_scores(tmp_path / "scores.parquet", rows) == [-1.5, -3.5]

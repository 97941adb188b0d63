"""Names of the columns that our preparation adds to the host's rows."""

ROW_KEY = "row_key"
"""Content key of the row, 32 hex digits."""

CONVERSATION = "conversation"
"""The row's turns as JSON; there until the scores are joined, then dropped."""

ROW_NUMBER = "row_number"
"""Position of the row in its raw data, for error messages only."""

SOURCE = "source"
"""The `datasets:` entry that the row came from, as `path` (and `name`, `split` where given)."""

GROUP = "group"
"""Value of the column that a filter works within, as text; present only where one is asked for."""

SEQUENCE_LENGTHS = "sequence_lengths"
"""Token counts of the sequences that lie end to end in a row; absent where a row is one sequence."""

ROW_INDEX = "row_index"
"""Position in the evaluation set, so that a row that the launcher repeats counts once."""

REFERENCE_LOGP = "reference_logp"
"""PoFT: mean over the references of the mean log-probability per response token, nats."""

TOKEN_COLUMNS = ("input_ids", "labels", "attention_mask", "position_ids", "token_type_ids", "length")
"""What the host's collator lays out."""

"""Names of the columns that our preparation adds to the host's rows."""

ROW_KEY = "row_key"
"""Content key of the row, 32 hex digits."""

CONVERSATION = "conversation"
"""The row's turns (or its ranked sample) as JSON; there until the scores are joined, then dropped."""

ROW_NUMBER = "row_number"
"""Position of the row in its raw data, for error messages only."""

SOURCE = "source"
"""The `datasets:` entry that the row came from, as `path` (and `name`, `split` where given)."""

DROPPABLE = "droppable"
"""Whether a row which cannot be used is to be left out, as its data set or the method's block says."""

LEFT_OUT = "left_out"
"""Which rows of the row's data set were left out when it was read: how many, of how many, numbers of the first ones."""

GROUP = "group"
"""Value of the column that a filter works within, as text; present only where one is asked for."""

SEQUENCE_LENGTHS = "sequence_lengths"
"""Token counts of the sequences that lie end to end in a row; absent where a row is one sequence."""

RANKED_INPUT_IDS = "ranked_input_ids"
"""A ranked row's sequences (prompt and response each), end to end, while the row is on its way through the host."""

RANKED_LABELS = "ranked_labels"
"""Their labels."""

ROW_INDEX = "row_index"
"""Position in the evaluation set, so that a row that the launcher repeats counts once."""

PART = "part"
"""Which response of a ranked row a row of its own is, in words."""

REFERENCE_LOGP = "reference_logp"
"""PoFT: mean over the references of the mean log-probability per response token, nats."""

SCORES = "scores"
"""A score for each response of a ranked row, the reward model's or the data's."""

RANKS = "ranks"
"""The rank of each response of a ranked row, 0 for the best; equal numbers are ties."""

ORDER = "order"
"""Positions of a ranked row's responses from best to worst, where that is not the order of the data."""

LEVEL = "level"
"""DEFT: the grade of a training row, A, B or C."""

REFERENCE_SUM_LOGPS = "reference_sum_logps"
"""DPO: log-probability of each response under the policy's start weights, summed over its labels, nats."""

TOKEN_COLUMNS = ("input_ids", "labels", "attention_mask", "position_ids", "token_type_ids", "length")
"""What the host's collator lays out."""

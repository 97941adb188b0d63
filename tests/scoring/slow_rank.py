"""A process of a launch that scores its share slowly: what the test of lost processes stops and kills.

    slow_rank.py SETTINGS.json RANK

It says so on standard output when the first batch is scored.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import tiny

from poft_plugin.config import PoftConfig
from poft_plugin.data.preparation import RunContext
from poft_plugin.preprocessors.reference_rewards import reference_rewards
from poft_plugin.scorers.causal_lm import CausalLMScorer
from poft_plugin.scoring import heartbeat
from scoring.support import as_rows, prepared

PAUSE = 0.3


def main(settings: Path, rank: int) -> None:
    heartbeat.BEAT_SECONDS = 0.1
    score = CausalLMScorer.score

    def slowly(self: Any, rows: Any) -> Any:
        scores = score(self, rows)
        print("scoring", flush=True)
        time.sleep(PAUSE)
        return scores

    CausalLMScorer.score = slowly  # type: ignore[method-assign]
    block = PoftConfig.model_validate(json.loads(settings.read_text()))
    prepared(reference_rewards, as_rows(tiny.chat_rows(100)), block, RunContext("score", rank, 2, rank, 2))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

"""Whatever people write wrongly ends in one message that names the place; nothing of ours ends in a raw error."""

from types import SimpleNamespace

import corpus
import pytest


@pytest.fixture(scope="module")
def endings(models: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> dict[corpus.Trial, tuple[str, str]]:
    """How every entry ends."""
    folder = tmp_path_factory.mktemp("corpus")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # some entries name folders that are made where the command runs
        return {trial: corpus.outcome(trial) for trial in corpus.trials(models, folder)}


def test_the_corpus_is_large(endings: dict[corpus.Trial, tuple[str, str]]) -> None:
    print(corpus.table(endings))
    assert len(endings) >= 800
    assert {trial.kind for trial in endings} == {"config", "row", "conversation", "file"}


@pytest.mark.parametrize("kind", ["config", "row", "conversation", "file"])
def test_every_entry_works_or_ends_in_one_message(endings: dict[corpus.Trial, tuple[str, str]], kind: str) -> None:
    mine = {trial.label: found for trial, found in endings.items() if trial.kind == kind}
    bad = {label: text for label, (ending, text) in mine.items() if ending in (corpus.UNNAMED, corpus.RAW)}
    assert bad == {}
    good = [ending for ending, _ in mine.values()]
    assert good.count(corpus.NAMED) > good.count(corpus.WORKS) > 0


def test_a_raw_error_is_seen() -> None:
    """The corpus can fail."""
    assert corpus.outcome(corpus.Trial("row", "broken", "x", lambda: [][0]))[0] == corpus.RAW
    assert corpus.outcome(corpus.Trial("row", "another's", "x", lambda: int("x")))[0] == corpus.UNNAMED

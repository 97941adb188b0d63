"""The quickstart's reward models: they learn from pairs, keep the body they begin with, and batch without effect."""

import math

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from quickstart import models, task
from quickstart.reward_model import fit_reward_model, make_reward_model, rewards

SHAPE = models.Shape(hidden=32, layers=1, heads=2)
RECIPE = models.Recipe(steps=40, batch_size=32, learning_rate=1e-2)


@pytest.fixture(scope="module")
def rows() -> dict[str, list[task.Row]]:
    return task.splits({"train": 300, "heldout": 60}, seed=3)


@pytest.fixture(scope="module")
def tokenizer(rows: dict[str, list[task.Row]]) -> PreTrainedTokenizerBase:
    return models.make_tokenizer(models.REFERENCE_A, rows["train"])


@pytest.fixture
def body(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    return models.make_model(tokenizer, SHAPE, seed=1).eval()


def marked(rows: list[task.Row]) -> list[tuple[task.Row, task.Row]]:
    """A preference that a model of one layer can learn in a second: an answer that ends with a z is worse."""
    return [(row, task.Row(row.id, row.prompt, f"{row.answer}z")) for row in rows]


def test_it_learns_which_answer_is_better(
    body: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, rows: dict[str, list[task.Row]]
) -> None:
    model = make_reward_model(body, seed=1)
    better, worse = (list(side) for side in zip(*marked(rows["heldout"]), strict=True))
    fit_reward_model(model, tokenizer, marked(rows["train"]), RECIPE, seed=1)
    assert not model.training
    right = [a > b for a, b in zip(rewards(model, tokenizer, better), rewards(model, tokenizer, worse), strict=True)]
    assert sum(right) >= 0.95 * len(right)


def test_it_begins_with_the_body_and_leaves_the_language_model_alone(
    body: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, rows: dict[str, list[task.Row]]
) -> None:
    before = {name: weight.clone() for name, weight in body.state_dict().items()}
    model = make_reward_model(body, seed=1)
    assert model.config.num_labels == 1
    assert model.score.weight.shape == (1, SHAPE.hidden)
    for name, weight in model.model.state_dict().items():
        assert torch.equal(weight, before[f"model.{name}"])
    recipe = models.Recipe(steps=2, batch_size=4, warmup=0.5)
    fit_reward_model(model, tokenizer, marked(rows["train"]), recipe, seed=1)
    assert all(torch.equal(weight, before[name]) for name, weight in body.state_dict().items())
    assert body.config.num_labels != 1


def test_the_loss_is_log_2_at_equal_rewards_and_falls(
    body: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, rows: dict[str, list[task.Row]]
) -> None:
    model = make_reward_model(body, seed=1)
    torch.nn.init.zeros_(model.score.weight)
    pairs = marked(rows["train"])[:8]
    losses = []
    for steps in (0, 2):
        fit_reward_model(model, tokenizer, pairs, models.Recipe(steps=steps, batch_size=8, warmup=0.5), seed=1)
        better, worse = (rewards(model, tokenizer, list(side)) for side in zip(*pairs, strict=True))
        losses.append(sum(math.log1p(math.exp(b - a)) for a, b in zip(better, worse, strict=True)) / len(pairs))
    assert losses[0] == pytest.approx(math.log(2))
    assert losses[1] < losses[0]


def test_rewards_do_not_depend_on_the_batch(
    body: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, rows: dict[str, list[task.Row]]
) -> None:
    model = make_reward_model(body, seed=1).eval()
    together = rewards(model, tokenizer, rows["heldout"])
    alone = [rewards(model, tokenizer, [row])[0] for row in rows["heldout"]]
    assert together == pytest.approx(alone, abs=1e-5)
    assert len({round(reward, 4) for reward in together}) > len(together) / 2

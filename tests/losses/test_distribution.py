"""DEFT's distribution reward from logits and from hidden states (Eq. 16, 17), and the head that gives both."""

import copy
import math
from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
from losses import test_head as heads
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import linear, pad
from torch.utils._python_dispatch import TorchDispatchMode

from poft_plugin.losses import LogitTransform, distribution_reward, distribution_scores
from poft_plugin.losses import distribution as room
from poft_plugin.losses import install_response_forward as install
from poft_plugin.losses.head import check_head
from poft_plugin.losses.logps import token_logps_with_direction

TOKENS, HIDDEN, VOCABULARY = 37, 24, 61
MASK = torch.tensor([[0, 1, 1, 0, 1, 1, 1], [1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]]).bool()


def discrepancy_of(tokens: int, seed: int = 9) -> Tensor:
    """The difference of two distributions in float64."""
    generator = torch.Generator().manual_seed(seed)
    better, worse = torch.rand(2, tokens, generator=generator, dtype=torch.float64) ** 4
    difference = better / better.sum() - worse / worse.sum()
    return difference - difference.mean()


def leaf(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Normal numbers that require a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def problem(dtype: torch.dtype, *, bias: bool = True, tokens: int = TOKENS) -> dict[str, Any]:
    """Hidden states and head in one precision, with a component that all tokens share: it has to cancel."""
    with torch.no_grad():
        weight = (leaf(VOCABULARY, HIDDEN, seed=1) + 2).to(dtype)
    return {
        "hidden": leaf(tokens, HIDDEN, dtype=dtype),
        "weight": weight.requires_grad_(),
        "discrepancy": discrepancy_of(VOCABULARY),
        "bias": leaf(VOCABULARY, dtype=dtype, seed=2) if bias else None,
    }


def values_and_gradients(function: Callable[..., Tensor], inputs: dict[str, Any], **settings: Any) -> list[Tensor]:
    """Scores, then gradients of hidden, weight and bias, each token weighted differently; in float64."""
    scores = function(**inputs, **settings)
    leaves = [inputs[name] for name in ("hidden", "weight", "bias") if inputs[name] is not None]
    weights = torch.linspace(-1, 2, len(scores), dtype=torch.float64)
    gradients = torch.autograd.grad((scores.double() * weights).sum(), leaves)
    assert [g.dtype for g in gradients] == [leaf.dtype for leaf in leaves]
    return [scores.detach().double(), *(g.double() for g in gradients)]


def plain_scores(hidden: Tensor, weight: Tensor, discrepancy: Tensor, bias: Tensor | None = None) -> Tensor:
    """The literal form in the inputs' own precision, as a user of transformers would write it."""
    logits = linear(hidden, weight, bias).float()
    return logits.log_softmax(-1) @ discrepancy.float()


def rms(error: Tensor) -> float:
    """Root of the mean square."""
    return error.square().mean().sqrt().item()


def test_reward_by_hand() -> None:
    """Logits (1, 3), (2, 0) against (-1/2, 1/2): 1 and -1; their mean is 0."""
    logits = torch.tensor([[[1.0, 3.0], [2.0, 0.0]]]).expand(3, 2, 2)
    mask = torch.tensor([[True, False], [False, True], [True, True]])
    assert distribution_reward(logits, mask, torch.tensor([-0.5, 0.5])).tolist() == [1.0, -1.0, 0.0]


def test_reward_equals_the_literal_form() -> None:
    """Values and gradients of Eq. 16 and 17 on a shifted view; what does not count may be nan, and nothing gives 0."""
    logits, discrepancy = leaf(3, 8, VOCABULARY), discrepancy_of(VOCABULARY)
    with torch.no_grad():
        logits[:, :-1][~MASK] = math.nan
    rewards, weights = distribution_reward(logits[:, :-1], MASK, discrepancy), torch.tensor([1.0, -3.0, 5.0])
    literal = [oracles.distribution_reward(row[:-1][mask], discrepancy) for row, mask in zip(logits, MASK, strict=True)]
    torch.testing.assert_close(rewards[:2], torch.stack(literal[:2]), rtol=1e-9, atol=0)
    assert rewards[2] == 0
    (ours,) = torch.autograd.grad((rewards * weights).sum(), logits)
    (exact,) = torch.autograd.grad((torch.stack(literal[:2]) * weights[:2]).sum(), logits)
    # an entry of the literal gradient is what is left of q_i - softmax_i * sum(q): relative to the largest
    torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9 * exact.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reward_of_rounded_logits_is_no_worse_than_the_literal_form(dtype: torch.dtype) -> None:
    """The same logits: the log-softmax in float32 against none."""
    logits, discrepancy = (3 * leaf(4, 50, VOCABULARY)).to(dtype), discrepancy_of(VOCABULARY)
    exact = (logits.double().log_softmax(-1) @ discrepancy).mean(-1)
    literal = logits.float().log_softmax(-1).mean(1) @ discrepancy.float()
    with torch.autocast("cpu", torch.bfloat16):
        ours = distribution_reward(logits, torch.ones(4, 50).bool(), discrepancy)
    assert ours.dtype == torch.float32
    assert 0 < rms(ours - exact) <= 1.25 * rms(literal - exact)


def test_reward_gradients_are_right() -> None:
    logits, discrepancy = leaf(*MASK.shape, 5), discrepancy_of(5)
    assert gradcheck(lambda z: distribution_reward(z, MASK, discrepancy), (logits,))


@pytest.mark.parametrize("shapes", [((3, 7), (3, 7), (5,)), ((3, 7, 5), (3, 6), (5,)), ((3, 7, 5), (3, 7), (1,))])
def test_reward_of_another_shape_is_refused(shapes: Any) -> None:
    logits, mask, discrepancy = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=r"logits \(.*mask \(.*discrepancy \(.*expected \(B, T, V\), \(B, T\) of"):
        distribution_reward(logits, mask.bool(), discrepancy)
    with pytest.raises(ValueError, match="of torch.float32"):
        distribution_reward(logits, mask, discrepancy)


def scores_of_head(hidden: Tensor, weight: Tensor, discrepancy: Tensor, bias: Any, **settings: Any) -> Tensor:
    """As the head takes them, together with log-probabilities."""
    targets = torch.arange(len(hidden)) % len(weight)
    constants = discrepancy.to(torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    _, direction = token_logps_with_direction(hidden, weight, targets, bias, constants, tile=(10, 25), **settings)
    return distribution_scores(hidden, weight, constants, bias, direction=direction, **settings)


FORMS = pytest.mark.parametrize("form", [distribution_scores, scores_of_head])


@pytest.mark.parametrize("wanted", [("hidden", "weight", "bias"), ("hidden",)])
def test_log_probabilities_and_scores_together(wanted: tuple[str, ...]) -> None:
    """One backward through both: the sum of what each gives by itself."""
    inputs = problem(torch.float64)
    targets = torch.arange(TOKENS) % VOCABULARY
    parts = inputs["hidden"], inputs["weight"], targets, inputs["bias"]
    logps, direction = token_logps_with_direction(*parts, inputs["discrepancy"], tile=(10, 25))
    scores = distribution_scores(**inputs, direction=direction)
    leaves = [inputs[name] for name in wanted]
    ours = torch.autograd.grad(2 * logps.sum() - 3 * scores.sum(), leaves)
    apart = 2 * oracles.token_logps(*parts).sum() - 3 * oracles.distribution_scores(**inputs).sum()
    for mine, truth in zip(ours, torch.autograd.grad(apart, leaves), strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-9, atol=1e-12 * truth.abs().max().item())


def test_scores_by_hand() -> None:
    """Logits of (1, 2) are 1, 2, 3 and, with the bias, 1, 2, 8; halved by the scale."""
    hidden, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    discrepancy, bias = torch.tensor([-0.25, -0.75, 1.0]), torch.tensor([0.0, 0.0, 5.0])
    assert distribution_scores(hidden, weight, discrepancy).tolist() == [-0.25 - 1.5 + 3]
    scores = distribution_scores(hidden, weight, discrepancy, bias, transform=LogitTransform(0.5))
    assert scores.tolist() == [(-0.25 - 1.5 + 8) / 2]


@pytest.mark.parametrize("scale", [1.0, 0.0625, 3.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [1, 5 * HIDDEN, room.CHUNK_ELEMENTS])
@FORMS
def test_scores_equal_the_literal_form(monkeypatch: Any, form: Any, chunk: int, bias: bool, scale: float) -> None:
    """Values and gradients, whatever the size of a chunk."""
    monkeypatch.setattr(room, "CHUNK_ELEMENTS", chunk)
    inputs = problem(torch.float64, bias=bias)
    ours = values_and_gradients(form, inputs, transform=LogitTransform(scale))
    exact = values_and_gradients(oracles.distribution_scores, inputs, after=oracles.transform(scale))
    for mine, truth in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-9, atol=1e-12 * truth.abs().max().item())


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@FORMS
def test_lower_precision_is_no_worse_than_the_plain_form(form: Any, dtype: torch.dtype, autocast: bool) -> None:
    """Against float64 on the same inputs, a quarter left for another order of summation. Autocast rounds nothing."""
    inputs = problem(dtype, tokens=150)
    wide = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    exact = values_and_gradients(oracles.distribution_scores, wide)
    outside = values_and_gradients(form, inputs)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, plain = values_and_gradients(form, inputs), values_and_gradients(plain_scores, inputs)
    torch.testing.assert_close(ours, outside, rtol=0, atol=0)
    for mine, theirs, truth in zip(ours, plain, exact, strict=True):
        assert 0 < rms(mine - truth) <= 1.25 * rms(theirs - truth)


@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias"])
def test_only_what_requires_a_gradient_gets_one(wanted: str) -> None:
    """A frozen head under LoRA, for one."""
    inputs, frozen = problem(torch.float64), problem(torch.float64)
    for name in {"hidden", "weight", "bias"} - {wanted}:
        frozen[name].requires_grad_(False)
    distribution_scores(**inputs).sum().backward()
    distribution_scores(**frozen).sum().backward()
    torch.testing.assert_close(frozen[wanted].grad, inputs[wanted].grad)
    assert all(frozen[name].grad is None for name in {"hidden", "weight", "bias"} - {wanted})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_tokens_the_head_gets_zero_gradients(dtype: torch.dtype) -> None:
    scores, *gradients = values_and_gradients(distribution_scores, problem(dtype, tokens=0))
    assert (scores.shape, distribution_scores(**problem(dtype)).dtype) == ((0,), torch.float32)
    assert [tuple(g.shape) for g in gradients] == [(0, HIDDEN), (VOCABULARY, HIDDEN), (VOCABULARY,)]
    assert not any(g.any() for g in gradients)


def test_gradients_are_right_twice() -> None:
    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return distribution_scores(hidden, weight, discrepancy_of(5), bias, transform=LogitTransform(0.5))

    leaves = (leaf(3, 4), leaf(5, 4, seed=1), leaf(5, seed=2))
    assert gradcheck(function, leaves) and gradgradcheck(function, leaves)


class Sizes(TorchDispatchMode):
    """Keeps the size of every tensor that an operation returns, forward and backward: the float32 ones, and all."""

    def __init__(self) -> None:
        super().__init__()
        self.float32, self.all = [0], [0]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **kwargs or {})
        if isinstance(result, Tensor):
            self.all.append(result.numel())
            self.float32.append(result.numel() if result.dtype == torch.float32 else 0)
        return result


def test_neither_logits_nor_a_wide_copy_of_the_weight_exist(monkeypatch: Any) -> None:
    monkeypatch.setattr(room, "CHUNK_ELEMENTS", 4 * HIDDEN)
    inputs = problem(torch.bfloat16)
    with Sizes() as sizes:
        distribution_scores(**inputs).sum().backward()
    assert max(sizes.float32) == 4 * HIDDEN
    assert max(sizes.all) == VOCABULARY * HIDDEN < TOKENS * VOCABULARY


def test_a_soft_cap_is_refused() -> None:
    with pytest.raises(ValueError, match="soft_cap: 30.0; the distribution reward .* only for logits without"):
        distribution_scores(**problem(torch.float32), transform=LogitTransform(soft_cap=30.0))


@pytest.mark.parametrize(
    "shapes", [((2, 3, 4), (5, 4), (5,)), ((3, 4), (5, 3), (5,)), ((3, 4), (5, 4), (4,)), ((3, 4), (0,), (5,))]
)
def test_shapes_that_do_not_fit_are_refused(shapes: Any) -> None:
    with pytest.raises(ValueError, match=r"hidden \(.*weight \(.*discrepancy \(.*expected \(N, D\), \(V, D\), \(V,\)"):
        distribution_scores(*(torch.zeros(shape) for shape in shapes))


DISCREPANCY = discrepancy_of(heads.VOCABULARY - 3)


def literal(model: Any) -> tuple[Tensor, Tensor]:
    """Log-probabilities and scores of each token but the first, from the model's own logits in one forward."""
    logits, counts = model(input_ids=heads.IDS, use_cache=False).logits, pad(DISCREPANCY, (0, 3))
    logps = [oracles.model_token_logps(row, tokens) for row, tokens in zip(logits, heads.IDS, strict=True)]
    scores = [oracles.distribution_reward(row[None], counts) for row in logits[:, :-1].flatten(0, 1)]
    return torch.cat(logps), torch.stack(scores)


def answered(model: Any) -> tuple[Tensor, Tensor]:
    """The same by the response forward."""
    positions = torch.arange(heads.IDS.numel()).view_as(heads.IDS)[:, :-1].flatten()
    targets = heads.IDS[:, 1:].flatten()
    logps, scores = model(input_ids=heads.IDS, response_positions=positions, response_targets=targets)
    return logps, scores


@pytest.mark.parametrize("name", ["llama", "llama-tied", "bias", "cohere", "granite"])
def test_a_model_gives_both_from_one_head_call(name: str) -> None:
    """Values, and gradients of every parameter; nothing is saved."""
    model, calls = heads.seeded(heads.FAMILIES[name][0]), []
    exact, parameters, names = literal(model), list(model.parameters()), set(model.state_dict())
    weights = torch.linspace(-1, 2, len(exact[0]), dtype=torch.float64)
    gradients = torch.autograd.grad(((exact[0] + exact[1]) * weights).sum(), parameters)
    parts = install(model, DISCREPANCY)
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    logps, scores = answered(model)
    assert calls == [1]
    torch.testing.assert_close((logps, scores), exact, rtol=1e-9, atol=1e-12)
    ours = torch.autograd.grad(((logps + scores) * weights).sum(), parameters)
    torch.testing.assert_close(ours, gradients, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(literal(model), exact, rtol=0, atol=0)
    check_head(model, parts.transform, heads.VOCABULARY, heads.CPU)
    assert set(model.state_dict()) == names


@pytest.mark.parametrize("first", [True, False])
def test_copies_answer_with_their_own_weights(first: bool) -> None:
    """PEFT copies a head that is to be saved; a deep copy of the model outlives it."""
    model, config = heads.llama(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    if first:
        install(model, DISCREPANCY)
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=False).eval()
    if not first:
        install(wrapped, DISCREPANCY)
    torch.nn.init.normal_(wrapped.get_base_model().lm_head.modules_to_save["default"].weight)
    twin = copy.deepcopy(wrapped)
    for answering in (wrapped, twin):
        torch.testing.assert_close(answered(answering), literal(answering))
        for parameter in answering.parameters():
            torch.nn.init.constant_(parameter, 0.5)


def test_the_discrepancy_keeps_its_precision_in_a_rounded_model() -> None:
    model = heads.llama().float()
    parts = install(model, DISCREPANCY)
    model.bfloat16()
    kept: Any = parts.head.discrepancy
    torch.testing.assert_close(kept, pad(DISCREPANCY, (0, 3)).float(), rtol=0, atol=0)
    check_head(model, parts.transform, heads.VOCABULARY, heads.CPU)


@pytest.mark.parametrize(
    ("kind", "tokens", "message"),
    [
        ("gemma2", 50, r"Gemma2ForCausalLM: it soft-caps its logits \(at 2.0\).*`omega: 0`"),
        ("llama", 54, r"LlamaForCausalLM: a discrepancy of shape \(54,\) for a head of 53 tokens.*`omega: 0`"),
    ],
)
def test_a_model_without_the_reward_is_refused(kind: str, tokens: int, message: str) -> None:
    model = heads.FAMILIES[kind][0]()
    with pytest.raises(ValueError, match=message):
        install(model, discrepancy_of(tokens))
    with pytest.raises(AssertionError, match="sum to 0"):
        install(heads.llama(), torch.ones(2))

"""The forward that stops at the response tokens, on every family of logit transforms that we know."""

import copy
import inspect
from collections.abc import Callable
from functools import wraps
from types import MethodType
from typing import Any

import oracles
import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32, extract_model_from_parallel
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from poft_plugin.losses import LogitTransform, head, install_response_forward, language_model
from poft_plugin.losses.head import check_head

VOCABULARY = 53
IDS = torch.tensor([[3, 9, 4, 1, 5, 51, 2, 6, 5], [2, 7, 1, 8, 2, 8, 1, 8, 2]])
CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32, "initializer_range": 0.5,
    "attn_implementation": "eager", "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip


class TripledLlama(LlamaForCausalLM):
    """Does something to its logits that no config key tells."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Three times the logits."""
        output = super().forward(*args, **kwargs)
        output.logits = 3 * output.logits
        return output


class BiasedLlama(LlamaForCausalLM):
    """A head with a bias, as Phi's."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=True)


def build(kind: str, **settings: Any) -> Any:
    """A tiny model of an architecture."""
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | settings))


FAMILIES: dict[str, tuple[Callable[[], Any], LogitTransform]] = {
    "llama": (lambda: build("llama"), LogitTransform()),
    "llama-tied": (lambda: build("llama", tie_word_embeddings=True), LogitTransform()),
    "bias": (lambda: BiasedLlama(LlamaConfig(**SIZES)), LogitTransform()),
    "gemma2": (lambda: build("gemma2", head_dim=8, final_logit_softcapping=2.0), LogitTransform(soft_cap=2.0)),
    "cohere": (lambda: build("cohere", logit_scale=0.25), LogitTransform(scale=0.25)),
    "granite": (lambda: build("granite", logits_scaling=8.0), LogitTransform(scale=1 / 8)),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[Any, LogitTransform]:
    """A tiny model of each family in float64, and its transform."""
    make, transform = FAMILIES[request.param]
    return seeded(make), transform


def seeded(make: Callable[[], Any]) -> Any:
    """A model in float64 whose logits are far from 0."""
    torch.manual_seed(0)
    model = make().double().eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_()
    return model


def llama(**settings: Any) -> Any:
    """The plain one."""
    return seeded(lambda: build("llama", **settings))


def with_lora(**settings: Any) -> Any:
    """A PEFT model whose adapter does something."""
    model = get_peft_model(llama(), LoraConfig(r=2, init_lora_weights=False, **settings), autocast_adapter_dtype=False)
    return model.eval()


def all_but_first(model: Any, ids: Tensor = IDS, **settings: Any) -> Tensor:
    """Token log-probabilities `(R, L - 1)` by the response forward."""
    positions = torch.arange(ids.numel()).view_as(ids)[:, :-1].flatten()
    logps: Tensor = model(
        input_ids=ids, response_positions=positions, response_targets=ids[:, 1:].flatten(), use_cache=False, **settings
    )
    return logps.view(len(ids), -1)


def by_own_logits(model: Any, ids: Tensor = IDS, **settings: Any) -> Tensor:
    """The same from the logits that the model itself gives."""
    logits = model(input_ids=ids, use_cache=False, **settings).logits
    return torch.stack([oracles.model_token_logps(row, tokens) for row, tokens in zip(logits, ids, strict=True)])


def test_finds_the_parts(family: tuple[Any, LogitTransform]) -> None:
    model, transform = family
    parts = language_model(model)
    assert parts.decoder is model.model
    assert parts.head is model.lm_head
    assert parts.transform == transform


def test_equals_the_models_own_logits(family: tuple[Any, LogitTransform]) -> None:
    """Values, and gradients of every parameter."""
    model, _ = family
    expected = by_own_logits(model)
    weights = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view_as(expected)
    gradients = torch.autograd.grad((expected * weights).sum(), list(model.parameters()))
    install_response_forward(model)
    logps = all_but_first(model)
    torch.testing.assert_close(logps, expected, rtol=1e-10, atol=1e-10)
    ours = torch.autograd.grad((logps * weights).sum(), list(model.parameters()))
    torch.testing.assert_close(ours, gradients, rtol=1e-9, atol=1e-10)
    check_head(model, language_model(model).transform, VOCABULARY, CPU)


def test_answers_at_the_asked_positions_only(family: tuple[Any, LogitTransform]) -> None:
    model, _ = family
    expected = by_own_logits(model)
    install_response_forward(model)
    length = IDS.shape[1]
    positions = torch.tensor([length + 6, 2, length + 1])
    logps = model(input_ids=IDS, response_positions=positions, response_targets=IDS.flatten()[positions + 1])
    torch.testing.assert_close(logps, torch.stack([expected[1, 6], expected[0, 2], expected[1, 1]]))


def test_ordinary_forward_and_generate_stay_as_they_were(family: tuple[Any, LogitTransform]) -> None:
    model, _ = family
    question, settings = IDS[:, :4], {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 2}
    mask = torch.ones_like(question)

    def answers() -> list[Tensor]:
        output = model(input_ids=IDS, labels=IDS)
        return [output.logits, output.loss, model.generate(question, attention_mask=mask, **settings)]

    before, signature = answers(), inspect.signature(model.forward)
    install_response_forward(model)
    all_but_first(model)
    assert inspect.signature(model.forward) == signature  # transformers looks at its names
    for now, then in zip(answers(), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0)


def test_the_decoder_gets_the_mask_and_the_positions() -> None:
    """Left padding with position ids changes nothing for the tokens."""
    model = llama(attn_implementation="sdpa")
    expected = by_own_logits(model)[:1]
    install_response_forward(model)
    padded = torch.cat([torch.full((1, 3), 2), IDS[:1]], dim=1)
    mask = torch.tensor([[0] * 3 + [1] * IDS.shape[1]])
    logps = all_but_first(model, padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    torch.testing.assert_close(logps[:, 3:], expected)


@pytest.mark.parametrize("discrepancy", [None, torch.tensor([0.5, -0.5])])
def test_no_response_tokens_still_run_the_head_once(discrepancy: Tensor | None) -> None:
    """A rank without response tokens calls what the others call, with zero gradients (ZeRO-3 gathers in step)."""
    model, calls, none = llama(), [], torch.zeros(0, dtype=torch.long)
    install_response_forward(model, discrepancy)
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    answer = model(input_ids=IDS, response_positions=none, response_targets=none)
    numbers = answer if discrepancy is None else torch.stack(answer)
    numbers.sum().backward()
    assert (numbers.shape, calls) == ((0,) if discrepancy is None else (2, 0), [1])
    assert all(p.grad is not None and (p.grad == 0).all() for p in model.parameters())


@pytest.mark.parametrize(
    "settings",
    [{"target_modules": ["q_proj", "v_proj"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}],
    ids=["lora", "saved-head"],
)
def test_works_below_peft(settings: dict[str, Any]) -> None:
    model = with_lora(**settings)
    if "modules_to_save" in settings:
        saved = model.get_base_model().lm_head.modules_to_save["default"]
        torch.nn.init.normal_(saved.weight)  # a head that training has moved
        assert language_model(model).head is saved
    expected, trained = by_own_logits(model), [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(expected.sum(), trained)
    install_response_forward(model)
    logps = all_but_first(model)
    torch.testing.assert_close(logps, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.autograd.grad(logps.sum(), trained), gradients, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(by_own_logits(model), expected, rtol=0, atol=0)
    check_head(model, LogitTransform(), VOCABULARY, CPU)


def test_works_below_a_wrapper_such_as_ddp() -> None:
    wrapped = nn.DataParallel(with_lora(target_modules=["q_proj"]))
    expected = by_own_logits(wrapped)
    install_response_forward(wrapped)
    torch.testing.assert_close(all_but_first(wrapped), expected)


def test_a_deep_copy_answers_with_its_own_weights(family: tuple[Any, LogitTransform]) -> None:
    model, _ = family
    install_response_forward(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    expected = by_own_logits(seeded(lambda: family[0].__class__(model.config)))
    torch.testing.assert_close(all_but_first(twin), expected)
    torch.testing.assert_close(by_own_logits(twin), expected)


def test_peft_may_come_after() -> None:
    """It copies a head that is to be saved, and training moves the copy."""
    model = llama()
    install_response_forward(model)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])).eval()
    saved = wrapped.get_base_model().lm_head.modules_to_save["default"]
    (gradient,) = torch.autograd.grad(all_but_first(wrapped).sum(), saved.weight)
    assert gradient.abs().max() > 0


def test_accelerate_wraps_and_unwraps_it_for_mixed_precision() -> None:
    """As `Accelerator.prepare_model` does."""
    model = llama().float()
    install_response_forward(model)
    expected = all_but_first(model)
    model._original_forward, below = model.forward, model.forward.__func__
    model.forward = MethodType(convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(below)), model)
    assert (all_but_first(model) - expected).abs().max() > 0  # products in bfloat16
    unwrapped = extract_model_from_parallel(model, keep_fp32_wrapper=False)
    torch.testing.assert_close(all_but_first(unwrapped), expected, rtol=0, atol=0)


def test_a_forward_that_was_replaced_before_is_kept() -> None:
    """Hooks of others set a plain function on the instance."""
    model, calls = llama(), []
    expected, forward = by_own_logits(model), model.forward

    @wraps(forward)
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append("model")
        return forward(*args, **kwargs)

    model.forward = counted
    install_response_forward(model)
    torch.testing.assert_close(by_own_logits(model), expected, rtol=0, atol=0)
    assert calls == ["model"]
    assert inspect.signature(model.forward) == inspect.signature(forward)


def test_a_head_wrapped_by_lora_is_refused() -> None:
    model = with_lora(target_modules=["q_proj", "lm_head"])
    with pytest.raises(
        ValueError, match=r"^LlamaForCausalLM: its output head 'lm_head' is a peft\.Linear.*without 'lm_head'"
    ):
        install_response_forward(model)


def test_check_refuses_an_unknown_transform() -> None:
    model = seeded(lambda: TripledLlama(LlamaConfig(**SIZES)))
    install_response_forward(model)
    with pytest.raises(ValueError, match=r"TripledLlama: .* its own logits by .* nats; .*cannot be used"):
        check_head(model, LogitTransform(), VOCABULARY, CPU)


@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite"])
def test_check_refuses_a_forgotten_transform(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "LogitTransform", lambda *_: LogitTransform())
    model = seeded(FAMILIES[name][0])
    install_response_forward(model)
    with pytest.raises(ValueError, match="cannot be used"):
        check_head(model, LogitTransform(), VOCABULARY, CPU)


def test_check_refuses_log_probabilities_that_are_not_numbers() -> None:
    model = llama()
    parts = install_response_forward(model)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="by nan nats"):
        check_head(model, parts.transform, VOCABULARY, CPU)


@pytest.mark.parametrize("name", FAMILIES)
def test_check_accepts_rounding_in_bfloat16(name: str) -> None:
    """Gemma 2 rounds its soft-capped logits to bfloat16; ours stay in float32."""
    model = seeded(FAMILIES[name][0]).bfloat16()
    check_head(model, install_response_forward(model).transform, VOCABULARY, CPU)


@pytest.mark.parametrize("training", [True, False])
def test_check_runs_without_dropout_and_leaves_the_mode_as_it_was(training: bool) -> None:
    model = llama(attention_dropout=0.5).train(training)
    check_head(model, install_response_forward(model).transform, VOCABULARY, CPU)
    assert model.training is training

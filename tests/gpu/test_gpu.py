"""What only a GPU shows: bfloat16, flash and flex attention, compiled models. Skipped, with a word on it, without one.

Everything but the last test needs torch and transformers alone, no Axolotl. `POFT_TEST_DEVICE=cpu` runs these tests on
a CPU as far as it goes, to try the tests themselves.
"""

import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from poft_plugin.config import DeftConfig, DpoKeys, PoftConfig, RankingConfig
from poft_plugin.data.collate import MethodCollator
from poft_plugin.hosts.sample_mean import SampleMeanTrainer
from poft_plugin.losses import install_response_forward, mean_logps, response_positions, token_logps
from poft_plugin.losses.logps import plain_token_logps
from poft_plugin.plugins import load_object, registry
from poft_plugin.trainers.step import Step, StepSetup

DEVICE = os.environ.get("POFT_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(), reason="this test needs a GPU: none is here"
    ),
]
FLASH = pytest.param(
    "flash_attention_2",
    marks=[
        pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash-attn is not installed"),
        pytest.mark.skipif(DEVICE == "cpu", reason="flash-attn needs a GPU"),
    ],
)
ATTENTION = ["sdpa", "flex_attention", FLASH]
LENGTHS = (37, 5, 64, 22)
METHODS = ("poft", "deft_dpo", "deft_pro", "deft_rrhf", "deft_sft", "pro", "rrhf")
BFLOAT16 = 2.0**-8
"""One rounding of a number in bfloat16, relative."""


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough heads for the kernels of flash and flex attention."""
    folder = tmp_path_factory.mktemp("gpu") / "policy"
    specials = ["<|bos|>", "<|im_end|>", "<|pad|>", "<|im_start|>"]
    tiny.bpe_tokenizer(folder, vocab_size=400, template=tiny.CHATML, specials=specials, eos="<|im_end|>")
    return tiny.llama(folder, vocab_size=400, seed=1, hidden=128)


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """Compiled code of one test is not another's."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def load(folder: Path, dtype: torch.dtype, attention: str = "sdpa") -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    return model.to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary", [512, 32_768])
def test_log_probabilities_are_no_worse_than_the_plain_form(dtype: torch.dtype, vocabulary: int) -> None:
    """Values and gradients against float64: our error is at most the plain form's, or two roundings."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 64, device=DEVICE), torch.randn(vocabulary, 64, device=DEVICE) / 8
    targets = torch.randint(0, vocabulary, (300,), device=DEVICE)

    def run(function: Any, kind: torch.dtype, **settings: Any) -> list[Tensor]:
        leaves = [tensor.to(dtype).to(kind, copy=True).requires_grad_() for tensor in (hidden, weight)]
        logps = function(*leaves, targets, **settings)
        logps.sum().backward()
        return [logps.detach().double(), *(leaf.grad.double() for leaf in leaves)]

    exact = run(plain_token_logps, torch.float64)
    rounding = torch.finfo(dtype).eps
    for true, plain, ours in zip(exact, run(plain_token_logps, dtype), run(token_logps, dtype), strict=True):
        budget = max(float((plain - true).norm()), rounding * float(true.norm()))
        assert float((ours - true).norm()) <= 2 * budget


def pack(device: str = DEVICE) -> tuple[Tensor, Tensor, Tensor]:
    """One row of packed sequences: ids, position ids, sequence numbers, `(1, L)`."""
    torch.manual_seed(1)
    ids = torch.randint(3, 400, (1, sum(LENGTHS)), device=device)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None].to(device)
    numbers = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))[None].to(device)
    return ids, positions, numbers


def mean_of(model: Any, ids: Tensor, numbers: Tensor, **inputs: Any) -> Tensor:
    """`(S,)` means over all tokens but the first of each sequence."""
    positions, targets, sequences = response_positions(ids, numbers)
    logps = model(ids, **inputs, use_cache=False, response_positions=positions, response_targets=targets)
    return mean_logps(logps.double(), sequences, int(numbers.max()) + 1)[0]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_pack_gives_what_separate_forwards_give(
    policy: Path, attention: str, dtype: torch.dtype, compiled: bool
) -> None:
    """Against float64 on separate rows; in bfloat16 no worse than separate rows in bfloat16 with plain attention."""
    if attention == "flash_attention_2" and dtype == torch.float32:
        pytest.skip("flash attention knows half precision only")
    ids, positions, numbers = pack()

    def separately(model: Any) -> Tensor:
        install_response_forward(model)
        parts = ids.split(LENGTHS, dim=1)
        with torch.no_grad():
            return torch.cat([mean_of(model, part, torch.zeros_like(part)) for part in parts])

    exact = separately(load(policy, torch.float64))
    plain = separately(load(policy, dtype))
    model = load(policy, dtype, attention)
    install_response_forward(model)
    whole = torch.compile(model) if compiled else model
    with torch.no_grad():
        found = mean_of(whole, ids, numbers, position_ids=positions)
    budget = max(float((plain - exact).abs().max()), torch.finfo(dtype).eps * float(exact.abs().max()))
    assert float((found - exact).abs().max()) <= 3 * budget


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_gradients_through_a_compiled_model(policy: Path, compiled: bool) -> None:
    """Every weight's gradient in float32 against float64."""
    ids, positions, numbers = pack()

    def gradients(dtype: torch.dtype, compile_it: bool) -> dict[str, Tensor]:
        model = load(policy, dtype)
        install_response_forward(model)
        used = torch.compile(model) if compile_it else model
        mean_of(used, ids, numbers, position_ids=positions).sum().backward()
        return {name: p.grad.double() for name, p in model.named_parameters()}

    expected = gradients(torch.float64, False)
    for name, gradient in gradients(torch.float32, compiled).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4 * float(expected[name].abs().max()))


@pytest.mark.parametrize("attention", ATTENTION)
def test_scores_do_not_depend_on_the_batch(policy: Path, tmp_path: Path, attention: str) -> None:
    """The scorer in bfloat16, one row at a time and many: near the float32 scores of a CPU, and of each other."""
    from scoring import support

    from poft_plugin.scoring.cache import ScoreCache
    from poft_plugin.scoring.run import batches_for

    cache = ScoreCache(tmp_path)
    rows = [(str(n), support.conversation(row)) for n, row in enumerate(tiny.chat_rows(12, seed=3))]

    def scores(device: str, batch_tokens: int, **settings: Any) -> dict[str, float]:
        scorer = support.scorer(policy, cache, **settings)
        prepared = [scorer.prepare(key, conversation, key) for key, conversation in rows]
        scorer.load(device)
        batches = batches_for(scorer, prepared, batch_tokens)
        found = {one.key: one.value for batch in batches for one in scorer.score(batch)}
        scorer.unload()
        return found

    exact = scores("cpu", 1, dtype="float32")
    for batch_tokens in (1, 4096):
        found = scores(DEVICE, batch_tokens, dtype="bfloat16", attn_implementation=attention)
        assert found == pytest.approx(exact, rel=16 * BFLOAT16)


def step_of(name: str) -> tuple[Any, Step]:
    """A method and its step with the settings that the tests take."""
    method = registry().methods[name]
    block: Any = {"poft": PoftConfig, "deft": DeftConfig if name.startswith("deft") else RankingConfig}[method.block]
    own = {"references": [{"model": "none"}]} if method.block == "poft" else {"sft_weight": 0.05}
    settings = block(**({**own, "omega": 0.01} if name.startswith("deft") else own))
    keys = DpoKeys() if method.keys else None
    loss = registry().losses[method.loss]

    def make(one: Any, base: Step | None) -> Step:
        step: Step = load_object(one.step)(StepSetup(settings, loss, keys, base))
        return step

    return method, make(method, make(method.base, None) if method.base else None)


def samples(name: str, tokenizer: Any) -> list[dict[str, Any]]:
    """Twelve rows as they come out of preparation: tokens, labels, and numbers for each sequence."""
    method = registry().methods[name]
    rows = []
    for number, row in enumerate(tiny.even_rows(12)["lists"]):
        answers = row["responses"][: 1 if method.block == "poft" else 2 if "dpo" in name else 3]
        prompt = tokenizer(row["prompt"])["input_ids"]
        responses = [tokenizer(answer)["input_ids"] for answer in answers]
        tokens = [token for response in responses for token in prompt + response]
        labels = [label for response in responses for label in [-100] * len(prompt) + response]
        numbers = {"reference_logp": -3.0 - number % 3, "ranks": [float(n) for n in range(len(responses))],
                   "reference_sum_logps": [-3.0 * len(response) for response in responses]}  # fmt: skip
        lengths = [len(prompt) + len(response) for response in responses]
        positions = [position for length in lengths for position in range(length)]
        rows.append({"input_ids": tokens, "labels": labels, "attention_mask": [1] * len(tokens), "row_index": number,
                     "position_ids": positions, "sequence_lengths": lengths, **numbers})  # fmt: skip
    return rows


class Packs(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Packs of rows, or rows."""

    def __init__(self, rows: Sequence[Any], size: int) -> None:
        self.items = [rows[start : start + size] for start in range(0, len(rows), size)] if size else list(rows)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


class Trained(SampleMeanTrainer):
    """The trainer without any host."""

    def __init__(self, model: Any, name: str, **kwargs: Any) -> None:
        method, step = step_of(name)
        discrepancy = torch.zeros(400, dtype=torch.float64)
        discrepancy[3:9], discrepancy[9:15] = 1 / 6, -1 / 6
        self.set_up(model, step=step, columns=method.columns, discrepancy=discrepancy if method.base else None)
        super().__init__(model=model, **kwargs)


def laid_end_to_end(packs: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Tensor]:
    """The tokens of packs, without padding."""
    names = ("input_ids", "labels", "position_ids")
    return {name: torch.tensor([[number for row in pack for number in row[name]] for pack in packs]) for name in names}


def padded(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """The tokens of rows, padded on the right."""
    longest = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {
        name: torch.tensor([[*row[name], *[value] * (longest - len(row[name]))] for row in rows])
        for name, value in fill.items()
    }


def train(
    policy: Path, folder: Path, name: str, *, packed: bool, attention: str, compiled: bool = False
) -> list[float]:
    """Three steps over all rows, on a GPU in bfloat16; their losses."""
    rows = samples(name, AutoTokenizer.from_pretrained(policy))
    args = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=1 if packed else 12, num_train_epochs=3, logging_steps=1,
        learning_rate=1e-3, lr_scheduler_type="constant", report_to=[], save_strategy="no", bf16=DEVICE == "cuda",
        use_cpu=DEVICE == "cpu", remove_unused_columns=False, torch_compile=compiled, disable_tqdm=True, seed=7,
    )  # fmt: skip
    collator = MethodCollator(laid_end_to_end if packed else padded, registry().methods[name].columns)
    data: Any = Packs(rows, 12 if packed else 0)
    model = load(policy, torch.float32, attention)
    trainer = Trained(model, name, args=args, train_dataset=data, data_collator=collator)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def unpacked(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Losses of each method's unpacked run with plain attention."""
    found: dict[str, list[float]] = {}

    def losses(name: str) -> list[float]:
        if name not in found:
            folder = tmp_path_factory.mktemp("unpacked")
            found[name] = train(policy, folder, name, packed=False, attention="sdpa")
        return found[name]

    return losses


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", METHODS)
def test_a_short_training_of_each_method(
    policy: Path, tmp_path: Path, name: str, attention: str, unpacked: Any
) -> None:
    """transformers' Trainer, packed: the loss falls, and is that of the unpacked run with plain attention."""
    if DEVICE == "cpu" and attention == "flex_attention":
        pytest.skip("flex attention has no backward on a CPU")
    losses = train(policy, tmp_path, name, packed=True, attention=attention)
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    assert losses == pytest.approx(unpacked(name), rel=0.05 if DEVICE == "cuda" else 1e-3)


@pytest.mark.parametrize("name", ["poft", "deft_pro"])
def test_a_short_compiled_training(policy: Path, tmp_path: Path, name: str, unpacked: Any) -> None:
    losses = train(policy, tmp_path, name, packed=True, attention="sdpa", compiled=True)
    assert losses == pytest.approx(unpacked(name), rel=0.05 if DEVICE == "cuda" else 1e-3)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("attention", ATTENTION)
def test_the_host_trains_on_a_gpu(
    policy: Path, models: SimpleNamespace, tmp_path: Path, attention: str, compiled: bool
) -> None:
    """`axolotl train` with bfloat16, packed: what was asked for is what ran."""
    pytest.importorskip("axolotl", reason="Axolotl is not installed")
    if DEVICE == "cpu":
        pytest.skip("the host trains in bfloat16 on a GPU only")
    import hosting

    tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.chat_rows(8, seed=5))
    config = tiny.write_config(
        tmp_path / "config.yml", base_model=str(policy), plugins=["poft_plugin.PoftPlugin", "hosting.RecorderPlugin"],
        rl="poft", poft={"references": [{"model": str(models.ref_a)}], "score_cache": str(tmp_path / "scores")},
        datasets=[{"path": str(tmp_path / "rows.jsonl"), "ds_type": "json", "type": "chat_template"}],
        bf16=True, attn_implementation=attention, torch_compile=compiled, sample_packing=True, sequence_len=512,
        num_epochs=3, output_dir=str(tmp_path / "out"), dataset_prepared_path=str(tmp_path / "prepared"),
    )  # fmt: skip
    recording = hosting.train(config)
    assert recording.trainer.args.bf16
    assert recording.trainer.model.config._attn_implementation == attention
    losses = [entry["loss"] for entry in recording.logs]
    assert losses[-1] < losses[0]

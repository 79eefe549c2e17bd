"""The choice of the next token against transformers' logits processors, draws against torch.multinomial.

Both sides do the same operations in fp32 in the same order, so everything here is equal to the bit: which tokens are
kept (with ties at every cut-off), their probabilities, and with the same seed the tokens drawn.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import tiny_llama
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minift.model.config import ModelConfig
from minift.model.sampling import (
    DEFAULTS,
    GREEDY,
    UNSUPPORTED,
    UNSUPPORTED_DRAWN,
    UNSUPPORTED_GREEDY,
    Chooser,
    Sampling,
    penalized,
    probabilities,
)

CPU = torch.device("cpu")


def processed(logits_bv: Tensor, sampling: Sampling, ids_bs: Tensor, pads_b: Tensor) -> Tensor:
    """Scores as transformers' generate computes them: its processors, in its order. `pads_b` counts left padding."""
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty, prompt_ignore_length=pads_b))
    if sampling.temperature not in (0, 1):
        processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.temperature and sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.temperature and sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    scores = processors(ids_bs, logits_bv.float())  # pyright: ignore[reportArgumentType]
    assert isinstance(scores, Tensor)
    return scores


def some_logits(batch: int, vocabulary: int, dtype: torch.dtype, step: float, seed: int = 0) -> Tensor:
    """Normal logits of standard deviation 3, rounded to multiples of `step` (0: not rounded)."""
    logits = 3 * torch.randn(batch, vocabulary, generator=torch.Generator().manual_seed(seed))
    return ((logits / step).round() * step if step else logits).to(dtype)


# --- probabilities ----------------------------------------------------------------------------------------------------

NO_TEXT = {"ids_bs": torch.zeros(3, 0, dtype=torch.long), "pads_b": torch.zeros(3, dtype=torch.long)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("step", [0, 0.5, 4])  # no ties in fp32, a few, most logits tied
@pytest.mark.parametrize("vocabulary", [1, 7, 384, 5000])
def test_probabilities_equal_transformers(vocabulary: int, step: float, dtype: torch.dtype):
    logits = some_logits(3, vocabulary, dtype, step)
    for temperature in (1e-6, 0.3, 1.0, 1.7):
        for top_k in (0, 1, 3, 50, 10_000):
            for top_p in (1e-4, 0.5, 0.9, 0.999, 1.0):
                sampling = Sampling(temperature, top_p, top_k=top_k)
                ours = probabilities(logits.float(), sampling)
                theirs = processed(logits, sampling, **NO_TEXT).softmax(-1)
                assert torch.equal(ours, theirs), sampling
                assert (ours > 0).any(-1).all()


def test_ties_at_the_cut_offs_are_kept_as_transformers_keeps_them():
    """In one distribution that can be checked by hand: 0.1 0.2 0.2 0.2 0.3, logits of one tie."""
    logits = torch.tensor([[0.1, 0.2, 0.2, 0.2, 0.3]]).log()

    def kept(**options: Any) -> list[int]:
        return probabilities(logits, Sampling(1.0, **options))[0].nonzero().flatten().tolist()

    assert kept(top_k=1) == [4]
    assert kept(top_k=2) == kept(top_k=3) == kept(top_k=4) == [1, 2, 3, 4]  # ties with the last one stay
    assert kept(top_k=5) == kept(top_k=0) == kept(top_k=9) == [0, 1, 2, 3, 4]
    assert kept(top_p=0.25) == [4]
    assert len(kept(top_p=0.45)) == 2 and len(kept(top_p=0.65)) == 3  # of ties, only as many as are needed
    assert kept(top_p=0.85) == [1, 2, 3, 4]
    assert kept(top_p=0.35, top_k=1) == [4]
    # top p counts what top k has left: 0.3 / 0.9 is below 0.35, 0.3 is below both.
    assert len(kept(top_p=0.33, top_k=4)) == 1 and len(kept(top_p=0.33)) == 2


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.lists(st.integers(-40, 40), min_size=2, max_size=30),
    st.sampled_from([0.25, 1.0, 2.0]),
    st.integers(0, 30),
    st.sampled_from([0.125, 0.25, 0.5, 0.75, 1.0]),
)
def test_probabilities_of_any_logits_equal_transformers(quarters: list[int], temperature: float, k: int, p: float):
    logits = torch.tensor([quarters]) / 4
    sampling = Sampling(temperature, p, top_k=k)
    theirs = processed(logits, sampling, torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    assert torch.equal(probabilities(logits, sampling), theirs.softmax(-1))


def test_the_logits_are_left_as_they_were():
    logits = some_logits(2, 50, torch.float32, 0)
    before = logits.clone()
    Chooser(Sampling(0.7, 0.5, 0, 5, 1.5), [[1], [2]], CPU)(logits)
    assert torch.equal(logits, before)


# --- repetition penalty and draws, step by step -----------------------------------------------------------------------

PROMPTS = [[5, 6, 7, 7, 5], [1], [9, 0, 3]]  # token 0 is also what the rows are padded with


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.7])
@pytest.mark.parametrize("cut", [(0.0, 1.0, 0), (0.8, 1.0, 0), (1.0, 0.8, 0), (1.3, 0.9, 5)], ids=str)
def test_chosen_tokens_equal_transformers(cut: tuple[float, float, int], penalty: float, dtype: torch.dtype):
    """Eight steps: what is chosen counts as text from then on, padding never does."""
    sampling = Sampling(*cut[:2], seed=3, top_k=cut[2], repetition_penalty=penalty)
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
    pads = torch.tensor([longest - len(prompt) for prompt in PROMPTS])
    choose, generator = Chooser(sampling, PROMPTS, CPU), torch.Generator().manual_seed(3)
    for step in range(8):
        logits = some_logits(3, 12, dtype, 0.5, seed=step)  # 12 tokens: most are soon in the text
        scores = processed(logits, sampling, ids, pads)
        if sampling.temperature == 0:
            theirs = scores.argmax(-1)
        else:
            theirs = torch.multinomial(scores.softmax(-1), 1, generator=generator).squeeze(1)
        assert torch.equal(choose(logits), theirs)
        ids = torch.cat([ids, theirs.unsqueeze(1)], dim=1)


def test_the_penalty_by_hand():
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0, 0.0]])
    seen = torch.tensor([[True, True, False, False, True]])
    assert penalized(logits, seen, 4.0).tolist() == [[0.5, -8.0, 2.0, -2.0, 0.0]]
    assert penalized(logits, seen, 0.5).tolist() == [[4.0, -1.0, 2.0, -2.0, 0.0]]


def test_padding_is_not_penalized():
    """Row 0 would be padded with token 0, which is its likeliest; in row 1 that token is in the prompt."""
    choose = Chooser(Sampling(repetition_penalty=2.0), [[3], [0, 3, 3]], CPU)
    logits = torch.tensor([[4.0, 3.0, 1.0, 0.0]]).expand(2, 4)
    assert choose(logits).tolist() == [0, 1]
    assert choose(logits).tolist() == [1, 0]  # all of them are in the text now: 2, 1.5, 1 and 2, 1.5, 1
    assert choose(logits).tolist() == [0, 0]


def test_a_row_of_the_penalty_is_its_own():
    choose = Chooser(Sampling(repetition_penalty=10.0), [[0], [1], [2]], CPU)
    assert choose(torch.tensor([[3.0, 2.0, 1.0]]).expand(3, 3)).tolist() == [1, 0, 0]


# --- validation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature must be 0"),
        ({"temperature": 1e-7}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"temperature": float("inf")}, "temperature must be 0"),
        ({"temperature": "1"}, "temperature must be 0 .* got '1'"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0"),
        ({"top_p": 1.1}, "top_p must be"),
        ({"top_p": float("nan")}, "top_p must be"),
        ({"top_p": None}, "top_p must be"),
        ({"top_k": -1}, "top_k must be 0 .* got -1"),
        ({"top_k": 5.0}, "top_k must be .* got 5.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a positive number, got 0"),
        ({"repetition_penalty": -1}, "repetition_penalty must be"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty must be"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty must be"),
        ({"repetition_penalty": [1.0]}, "repetition_penalty must be"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"seed": 2**64}, "seed must be"),
        ({"seed": 0.5}, "seed must be"),
    ],
    ids=str,
)
def test_bad_sampling_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
    with pytest.raises(ValueError, match=message):
        replace(GREEDY, **options)


@pytest.mark.parametrize("sampling", [Sampling(1e-6, 1e-9, 0, 1, 1e-3), Sampling(100.0, 1, 2**64 - 1, 10**9, 100.0)])
def test_the_ends_of_every_range_are_good(sampling: Sampling):
    logits = torch.tensor([[-1e4, 0.0, 1e4]])
    distribution = probabilities(logits, sampling)
    assert distribution.isfinite().all() and distribution.sum().item() == 1  # the other terms are 0 here
    assert Chooser(sampling, [[1]], CPU)(logits).tolist() == [2]


def test_greedy_is_the_default():
    assert Sampling() == GREEDY == Sampling(0.0, 1.0, 0, 0, 1.0)


# --- generation_config.json -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return ModelConfig.from_folder(Path(tiny_llama(tmp_path_factory.mktemp("sampling") / "tiny")))


def asking(config: ModelConfig, **generation: Any) -> ModelConfig:
    return replace(config, generation=generation)


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, Sampling(0.0, 1.0, 0, 50, 1.0)),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, Sampling(0.0, 0.9, 0, 50, 1.0)),
        ({"temperature": 0.6, "repetition_penalty": 1.1}, Sampling(0.0, 1.0, 0, 50, 1.1)),
        ({"do_sample": True}, Sampling(1.0, 1.0, 0, 50, 1.0)),
        ({"do_sample": True, "temperature": None, "top_k": None}, Sampling(1.0, 1.0, 0, 50, 1.0)),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, Sampling(0.6, 0.9, 0, 50, 1.0)),
        ({"do_sample": True, "temperature": 1, "top_k": 0, "top_p": 1}, Sampling(1.0, 1.0, 0, 0, 1.0)),
        ({"do_sample": True, "top_k": 20, "repetition_penalty": 1.05}, Sampling(1.0, 1.0, 0, 20, 1.05)),
        ({"_from_model_config": True, "eos_token_id": [1, 2], "max_length": 4096}, Sampling(0.0, 1.0, 0, 50, 1.0)),
    ],
    ids=str,
)
def test_sampling_of_a_generation_config(config: ModelConfig, generation: dict[str, Any], expected: Sampling):
    assert Sampling.of(asking(config, **generation)) == expected
    # The same from transformers: what it fills in for fields that the file leaves out.
    theirs = GenerationConfig(**generation)
    theirs.update(**GenerationConfig._get_default_generation_params(), defaults_only=True)
    temperature = theirs.temperature if theirs.do_sample else 0.0
    assert expected == Sampling(temperature, theirs.top_p, 0, theirs.top_k, theirs.repetition_penalty)


def test_one_field_can_be_overridden(config: ModelConfig):
    of = Sampling.of(asking(config, do_sample=True, temperature=0.6, top_p=0.9))
    assert replace(of, top_p=0.5, seed=7) == Sampling(0.6, 0.5, 7, 50, 1.0)
    greedy = Sampling.of(asking(config))
    # As transformers' generate(do_sample=True, temperature=0.8) on a checkpoint that says nothing: its top_k cuts.
    assert replace(greedy, temperature=0.8) == Sampling(0.8, 1.0, 0, 50, 1.0)


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"do_sample": True, "temperature": -1.0}, "temperature"),
        ({"do_sample": True, "top_p": 2}, "top_p"),
        ({"do_sample": True, "top_k": "50"}, "top_k"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
    ],
    ids=str,
)
def test_a_bad_value_in_the_file_is_named(config: ModelConfig, generation: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"^generation_config.json: {message} must be"):
        Sampling.of(asking(config, **generation))


# A value of each unsupported setting that is in force for the text below; 243 is the first token of the greedy answer.
PROMPT, FIRST = [5, 6, 7, 8, 243], 243
IN_FORCE: dict[str, Any] = {
    "num_beams": 4,
    "constraints": [1],
    "force_words_ids": [[7]],
    "dola_layers": "low",
    "encoder_repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1,
    "bad_words_ids": [[FIRST]],
    "sequence_bias": [[[FIRST], -10.0]],
    "suppress_tokens": [FIRST],
    "begin_suppress_tokens": [FIRST],
    "forced_bos_token_id": 0,
    "forced_eos_token_id": 0,
    "guidance_scale": 3.0,
    "watermarking_config": {"greenlist_ratio": 0.25, "bias": 9.0},
    "min_length": 30,
    "min_new_tokens": 9,
    "exponential_decay_length_penalty": [1, 5.0],
    "max_time": 0.0,
    "stop_strings": ["a"],
    "token_healing": True,
}
IN_FORCE_DRAWN: dict[str, Any] = {
    "min_p": 0.9, "top_h": 0.2, "typical_p": 0.2, "epsilon_cutoff": 0.02, "eta_cutoff": 0.5,
}  # fmt: skip
# Settings that leave the text as it is: they are about speed, memory, what else is returned, or beam search alone.
NOT_IN_FORCE: dict[str, Any] = {
    "remove_invalid_values": True, "renormalize_logits": True, "length_penalty": 2.0, "early_stopping": True,
    "num_beam_groups": 1, "diversity_penalty": 0.0, "use_cache": False, "cache_implementation": "static",
    "num_assistant_tokens": 3, "output_scores": True, "max_length": 3, "pad_token_id": 4, "bos_token_id": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path_factory.mktemp("sampling") / "theirs"))


def answer(theirs: Any, prompt: list[int] = PROMPT, end: int = 2, **settings: Any) -> list[int] | str:
    """transformers' answer on the tiny checkpoint, or why there is none."""
    torch.manual_seed(0)
    ids = torch.tensor([prompt])
    options = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "max_new_tokens": 12, "eos_token_id": end}
    try:
        return theirs.generate(ids, **options | settings)[0, len(prompt) :].tolist()
    except ValueError as error:  # of searches that transformers has moved out, or a tokenizer that is needed
        return str(error)


def refusal(config: ModelConfig, **generation: Any) -> str:
    with pytest.raises(ValueError, match="not supported") as refused:
        Sampling.of(asking(config, **generation))
    return str(refused.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*IN_FORCE, *IN_FORCE_DRAWN])
def test_a_setting_that_changes_the_text_is_refused(config: ModelConfig, theirs: Any, name: str):
    setting = {name: (IN_FORCE | IN_FORCE_DRAWN)[name]}
    # What is about the beginning of a text needs a short prompt, what is about its length an early end.
    where = {"forced_bos_token_id": {"prompt": [FIRST]}, "min_length": {"end": FIRST}, "min_new_tokens": {"end": FIRST}}
    options = where.get(name, {}) | ({"do_sample": True} if name in IN_FORCE_DRAWN else {})
    assert answer(theirs, **options, **setting) != answer(theirs, **options)
    message = refusal(config, **setting, do_sample=name in IN_FORCE_DRAWN)
    assert f"sets {name} to {setting[name]!r}" in message and "pass a Sampling" in message
    refusal(config, **setting, do_sample=True)
    if name in IN_FORCE_DRAWN:  # without do_sample it is not in force
        assert answer(theirs, **setting) == answer(theirs)
        assert Sampling.of(asking(config, **setting)) == Sampling.of(asking(config))


@pytest.mark.filterwarnings("ignore")
def test_contrastive_search_is_refused_where_it_would_be_done(config: ModelConfig, theirs: Any):
    assert "Contrastive Search" in answer(theirs, penalty_alpha=0.6)
    assert "penalty_alpha to 0.6" in refusal(config, penalty_alpha=0.6, top_k=4)
    assert answer(theirs, penalty_alpha=0.6, do_sample=True) == answer(theirs, do_sample=True)
    assert Sampling.of(asking(config, penalty_alpha=0.6, top_k=4, do_sample=True)).top_k == 4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("drawn", [False, True])
def test_a_setting_that_is_off_or_changes_nothing_is_accepted(config: ModelConfig, theirs: Any, drawn: bool):
    off = UNSUPPORTED | UNSUPPORTED_GREEDY | UNSUPPORTED_DRAWN
    expected = Sampling.of(asking(config, do_sample=drawn))
    for settings_ in (off, dict.fromkeys(off), NOT_IN_FORCE, {"suppress_tokens": [], "begin_suppress_tokens": []}):
        assert Sampling.of(asking(config, **settings_, do_sample=drawn)) == expected
    plain = answer(theirs, do_sample=drawn)
    for name, value in (NOT_IN_FORCE | off).items():
        assert answer(theirs, do_sample=drawn, **{name: value}) == plain, name


def test_every_setting_of_transformers_is_known_here():
    """A setting that a later transformers adds fails this test: then say above whether it changes the text."""
    assert IN_FORCE.keys() == UNSUPPORTED.keys() and IN_FORCE_DRAWN.keys() == UNSUPPORTED_DRAWN.keys()
    used = {*DEFAULTS, "do_sample", "eos_token_id", *UNSUPPORTED, *UNSUPPORTED_GREEDY, *UNSUPPORTED_DRAWN}
    # Lengths are the caller's; the rest is for encoder-decoders, drafts by a second model, output, memory and speed.
    others = {
        "max_new_tokens", "num_return_sequences", "decoder_start_token_id", "transformers_version", "is_assistant",
        "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_early_exit",
        "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "speculation_type", "use_mtp",
        "prompt_lookup_num_tokens", "max_matching_ngram_size", "output_attentions", "output_hidden_states",
        "output_logits", "return_dict_in_generate", "cache_config", "max_cache_len", "compile_config",
        "disable_compile", "continuous_batching_config", "prefill_chunk_size", "low_memory",
    }  # fmt: skip
    theirs = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert theirs <= used | others | NOT_IN_FORCE.keys()
    assert used <= theirs


def test_a_file_is_read_as_transformers_reads_it(tmp_path: Path):
    """The file as save_pretrained writes it, next to a checkpoint."""
    folder = Path(tiny_llama(tmp_path / "tiny"))
    asked = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "eos_token_id": [2, 7]}
    GenerationConfig(**asked).save_pretrained(folder)
    read = ModelConfig.from_folder(folder)
    assert read.generation == json.loads((folder / "generation_config.json").read_text())
    assert read.eos_token_ids == (2, 7)
    assert Sampling.of(read) == Sampling(0.6, 0.95, 0, 20, 1.0)
    (folder / "generation_config.json").unlink()
    assert Sampling.of(ModelConfig.from_folder(folder)) == Sampling(0.0, 1.0, 0, 50, 1.0)

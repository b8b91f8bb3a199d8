"""The beginning that prompts share runs once per draw, and nothing but rounding changes."""

import pytest
import torch
from conftest import build, write_jsonl
from test_backbone import make
from test_branch import CAUSAL_SETTINGS, FALCON, deep, wrapper_on
from transformers import AutoModelForCausalLM

import main
from modelwrappers.engine.prefix import FAMILIES, sharing_prefix
from utils.errors import UsageError

VARIANTS = {name: (name, deep(settings)) for name, settings in CAUSAL_SETTINGS.items()} | {
    "falcon, rotary": ("falcon", deep(FALCON)),
    "mistral, window": ("mistral", deep(CAUSAL_SETTINGS["mistral"]) | {"sliding_window": 20}),
    "gemma2, window": ("gemma2", deep(CAUSAL_SETTINGS["gemma2"]) | {"sliding_window": 20}),
}


def rows_with_a_beginning(wrapper, shared: int = 9) -> dict[str, torch.Tensor]:
    """Five prompts of different lengths, padded on the left, that begin alike."""
    generator = torch.Generator().manual_seed(3)
    beginning = torch.randint(3, 50, (shared,), generator=generator)
    width = shared + 7
    ids, mask = torch.zeros(5, width, dtype=torch.long), torch.zeros(5, width, dtype=torch.long)
    for row, own in enumerate((7, 1, 4, 7, 2)):
        rest = torch.randint(3, 50, (own,), generator=generator)
        rest[0] = 3 + row  # they share no more
        ids[row, width - shared - own :] = torch.cat([beginning, rest])
        mask[row, width - shared - own :] = 1
    return wrapper.model_inputs({"input_ids": ids, "attention_mask": mask})


def predicted(wrapper, batch, n_samples: int) -> torch.Tensor:
    with (
        torch.inference_mode(),
        wrapper.evaluation_draws(n_samples),
        sharing_prefix(wrapper, n_samples),
    ):
        logits = wrapper.forward_logits(batch, sample=n_samples > 0, n_samples=n_samples)
        found = wrapper.prefix
    predicted.tokens = len(found.tokens) if found is not None else 0
    predicted.kept = {} if found is None else found._kept
    return logits


def without_cache(wrapper, batch, n_samples: int) -> torch.Tensor:
    with torch.inference_mode(), wrapper.evaluation_draws(n_samples):
        return wrapper.forward_logits(batch, sample=n_samples > 0, n_samples=n_samples)


def test_every_family_is_tested_here():
    assert {model_type for model_type, _ in VARIANTS.values()} == FAMILIES


@pytest.mark.parametrize("layers", ["all", "last:2"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_with_a_cached_beginning_equal_those_without(variant, layers, tmp_path):
    model_type, settings = VARIANTS[variant]
    folder = make(model_type, settings, tmp_path, AutoModelForCausalLM)
    flags = ("--flipout-eval", "none", "--lora-layers", layers, "--eval-batch-size", "12")
    wrapper = wrapper_on(folder, "causallm", *flags)
    batch = rows_with_a_beginning(wrapper)
    for n_samples in (0, 1, 4):
        cached = predicted(wrapper, batch, n_samples)
        assert predicted.tokens == 9 and predicted.kept
        torch.testing.assert_close(
            cached, without_cache(wrapper, batch, n_samples), rtol=1e-4, atol=1e-5
        )
    # below the branch all draws have the same keys, above it each has its own
    first, second = (predicted.kept[draw] for draw in (0, 1))
    same = [torch.equal(a, b) for (_, a), (_, b) in zip(first, second, strict=True)]
    assert same[-1] is False and same[1] is (layers == "last:2")


def test_rows_beyond_a_sliding_window_go_without(tmp_path):
    settings = deep(CAUSAL_SETTINGS["mistral"]) | {"sliding_window": 16}
    folder = make("mistral", settings, tmp_path, AutoModelForCausalLM)
    wrapper = wrapper_on(folder, "causallm", "--flipout-eval", "none")
    batch = rows_with_a_beginning(wrapper)
    cached = predicted(wrapper, batch, 3)
    assert not predicted.kept
    torch.testing.assert_close(cached, without_cache(wrapper, batch, 3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_a_rotary_embedding_that_depends_on_the_length_goes_without(rope, tmp_path):
    parameters = {"rope_type": rope, "rope_theta": 10000.0, "factor": 4.0}
    if rope == "longrope":
        parameters |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
        parameters |= {"original_max_position_embeddings": 8}
    settings = deep(CAUSAL_SETTINGS["llama"]) | {"rope_parameters": parameters}
    folder = make("llama", settings, tmp_path, AutoModelForCausalLM)
    wrapper = wrapper_on(folder, "causallm", "--flipout-eval", "none")
    predicted(wrapper, rows_with_a_beginning(wrapper), 3)
    assert predicted.tokens == 0
    with pytest.raises(UsageError, match="rotary embedding depends on the length"):
        wrapper_on(folder, "causallm", "--flipout-eval", "none", "--prefix-cache", "on")


def test_a_methods_own_batch_logits_need_not_take_keys_and_values(tiny_llama, monkeypatch):
    wrapper = wrapper_on(tiny_llama, "causallm", "--flipout-eval", "none")
    own = type(wrapper).batch_logits
    monkeypatch.setattr(type(wrapper), "batch_logits", lambda self, batch: own(self, batch))
    predicted(wrapper, rows_with_a_beginning(wrapper), 3)
    assert predicted.tokens == 0


def test_rows_in_other_chunks_use_the_draws_that_are_kept(tiny_llama):
    """As when some rows are settled: more draws of fewer rows are in one forward."""
    flags = ("--flipout-eval", "none", "--eval-batch-size", "5")
    for layers in ("all", "last:1"):
        wrapper = wrapper_on(tiny_llama, "causallm", *flags, "--lora-layers", layers)
        batch = rows_with_a_beginning(wrapper)
        two = {key: value[:2] for key, value in batch.items()}
        with torch.inference_mode(), wrapper.evaluation_draws(8):
            plain = [torch.cat(list(wrapper.draw_logits(b, 8, first=0))) for b in (batch, two)]
            with sharing_prefix(wrapper, 8):
                cached = [
                    torch.cat(
                        [
                            *wrapper.draw_logits(b, first, first=0),
                            *wrapper.draw_logits(b, 8 - first, first=first),
                        ]
                    )
                    for b, first in ((batch, 3), (two, 4))
                ]
                assert set(wrapper.prefix._kept) == set(range(8))
        torch.testing.assert_close(cached, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flipout", ["example", "token"])
def test_nothing_is_shared_where_rows_have_weights_of_their_own(flipout, tiny_llama):
    wrapper = wrapper_on(tiny_llama, "causallm", "--flipout-eval", flipout)
    batch = rows_with_a_beginning(wrapper)
    predicted(wrapper, batch, 3)
    assert predicted.tokens == 0
    predicted(wrapper, batch, 0)  # the mean is one set of weights
    assert predicted.tokens == 9


def test_a_batch_that_shares_less_shortens_the_beginning(tiny_llama):
    wrapper = wrapper_on(tiny_llama, "causallm", "--flipout-eval", "none", "--prefix-cache", "on")
    long = rows_with_a_beginning(wrapper)
    short = {key: value.clone() for key, value in long.items()}
    short["input_ids"][2, -4 - 6] = 77  # in one row the fourth token of the beginning is another
    with torch.inference_mode(), wrapper.evaluation_draws(3):
        with sharing_prefix(wrapper, 3):
            found = []
            for batch in (long, short, long):
                logits = wrapper.forward_logits(batch, n_samples=3)
                found.append((len(wrapper.prefix.tokens), logits))
        plain = [wrapper.forward_logits(batch, n_samples=3) for batch in (long, short, long)]
    assert [number for number, _ in found] == [9, 3, 3]
    for (_, cached), logits in zip(found, plain, strict=True):
        torch.testing.assert_close(cached, logits, rtol=1e-4, atol=1e-5)


@pytest.fixture
def few_shot(causal_flags, tmp_path) -> list[str]:
    from conftest import topic_rows

    folder = tmp_path / "rows"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", topic_rows(40))
    write_jsonl(folder / "test.jsonl", topic_rows(23, seed=1))
    flags = [*causal_flags, "--num-shots", "3", "--max-train-steps", "6", "--eval-batch-size", "9"]
    flags[flags.index("--data-dir") + 1] = str(folder)
    return flags


@pytest.mark.parametrize(
    "method",
    [
        ["blob", "--flipout-eval", "none", "--bayes-eps", "0.3"],
        ["deepensemble", "--ensemble-n", "2"],
        ["mle"],
    ],
    ids=lambda method: method[0],
)
def test_few_shot_runs_predict_the_same_with_and_without_the_cache(method, few_shot):
    _, dataset, wrapper = build([*few_shot, "--modelwrapper", *method])
    wrapper.fit(dataset.train_dataloader)
    calls = []
    hook = wrapper.get_base_model().model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: calls.append(output.shape[:2].numel())
    )
    cached, tokens = wrapper.predict(dataset.test_dataloader), sum(calls)
    calls.clear()
    wrapper.args.__dict__["prefix_cache"] = "off"
    plain = wrapper.predict(dataset.test_dataloader)
    hook.remove()
    torch.testing.assert_close(cached.log_probs, plain.log_probs, rtol=1e-4, atol=1e-5)
    assert tokens < 0.7 * sum(calls)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--modelwrapper blob",
            r"--prefix-cache on and .* blob: --flipout-eval example gives each",
        ),
        ("--modelwrapper blob --flipout-eval token", "--flipout-eval token gives each row weights"),
        ("--modelwrapper mcdropout", "the draws of this method are other weights in every row"),
        ("--modelwrapper laplace --max-train-steps 1", "the Jacobians of a row"),
    ],
)
def test_a_cache_that_would_change_predictions_is_refused(flags, message):
    call = "--dataset-type mcdataset --dataset bbc_headlines --model m --prefix-cache on " + flags
    with pytest.raises(UsageError, match=message):
        main.parse_args(call.split())


def test_a_classifier_has_no_prompt_to_share():
    call = "--dataset-type bertds --dataset bbc_headlines --model m --modelwrapper mle"
    with pytest.raises(UsageError, match=r"--prefix-cache on keeps .*--dataset-type bertds"):
        main.parse_args([*call.split(), "--prefix-cache", "on"])


def test_an_architecture_that_is_not_known_is_refused_only_where_it_was_asked_for(tmp_path):
    gptj = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    folder = make("gptj", gptj | {"rotary_dim": 4}, tmp_path, AutoModelForCausalLM)
    flags = ("--target-modules", "q_proj", "--flipout-eval", "none", "--lora-layers", "all")
    assert wrapper_on(folder, "causallm", *flags) is not None
    with pytest.raises(UsageError, match=r"--prefix-cache on: the architecture 'gptj'"):
        wrapper_on(folder, "causallm", *flags, "--prefix-cache", "on")

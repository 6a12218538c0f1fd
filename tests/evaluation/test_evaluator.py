import copy
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from evaluation_rows import BOS, tiny_collator, tiny_rows
from tiny_lenses import LAYER, NUM_TEXT_TOKENS, disturb, tiny_lens
from tiny_models import random_tokens, tiny_model

from consistency_lens.data.activation_cache import ActivationRows
from consistency_lens.data.cache_building import build_activation_cache
from consistency_lens.data.corpus import corpus_from_rows, document_hash
from consistency_lens.evaluation import CONTROLS, EvaluationArguments, Evaluator, write_metrics
from consistency_lens.evaluation.evaluator import STATISTICS
from consistency_lens.evaluation.metrics import (
    cosine,
    fve,
    fve_nrm,
    kl_recovered,
    perplexity,
    text_nll,
    top1_agreement,
)
from consistency_lens.losses import kl_divergence
from consistency_lens.subject import Subject

# Some contexts are shorter than T.
LENGTHS = (12, 9, 3, 7, 12, 8, 4, 15, 11, 6)
TIMES = ("seconds", "samples_per_second")


@pytest.fixture(scope="module")
def lens():
    return disturb(tiny_lens())


@pytest.fixture(scope="module")
def rows(lens):
    return tiny_rows(lens.subject, *LENGTHS)


def evaluate(lens, rows, /, **arguments):
    arguments = EvaluationArguments(**({"disable_tqdm": True, "num_bootstrap": 50} | arguments))
    return Evaluator(lens, rows, tiny_collator(), arguments)()


def without_times(metrics):
    return {name: value for name, value in metrics.items() if name not in TIMES}


def flat(metrics):
    """The numbers of nested metrics, by path."""
    return {
        f"{name}.{key}": value
        for name, part in without_times(metrics).items()
        for key, value in (flat(part) if isinstance(part, dict) else {"": np.asarray(part)}).items()
    }


class TestResult:
    def test_has_the_keys_of_metrics_json(self, lens, rows):
        metrics = evaluate(lens, rows)
        assert set(metrics) == {
            "fve", "fve_nrm", "cosine", "kl", "kl_recovered", "top1_agreement", "text_perplexity",
            "true_text_perplexity", "perplexity_ratio", "distinct_2", "rows", "documents", "controls", "ci95",
            "seconds", "samples_per_second",
        }  # fmt: skip
        assert list(metrics["controls"]) == list(CONTROLS)
        assert all(set(of_name) == {"fve", "kl_recovered"} for of_name in metrics["controls"].values())
        assert (metrics["rows"], metrics["documents"]) == (10, 5)
        assert metrics[Evaluator.primary_metric] == metrics["fve"]

    def test_equals_the_plain_functions(self, lens, rows):
        metrics = evaluate(lens, rows)
        batch = tiny_collator()(rows)
        subject, activations = lens.subject, batch["activations"]
        decoded = lens.decode(activations)
        reconstruction = lens.encode(decoded.token_ids)
        context = subject.context(batch["input_ids"], batch["attention_mask"], batch["positions"][:, None])
        after = subject.replaced_logits_full(context, reconstruction[:, None])[:, 0]
        at_mean = subject.replaced_logits_full(context, lens.mean.expand_as(activations)[:, None])[:, 0]
        before = context.logits[:, 0]
        kl = kl_divergence(before, after)
        text = perplexity(text_nll(subject, decoded.token_ids))
        mask = batch["tail_mask"]
        tail = perplexity(text_nll(subject, batch["tail_ids"], mask), mask)
        expected = {
            "fve": fve(activations, reconstruction, lens.mean),
            "fve_nrm": fve_nrm(activations, reconstruction),
            "cosine": cosine(activations, reconstruction),
            "kl": kl.mean(),
            "kl_recovered": kl_recovered(kl, kl_divergence(before, at_mean)),
            "top1_agreement": top1_agreement(before, after),
            "text_perplexity": text,
            "true_text_perplexity": tail,
            "perplexity_ratio": text / tail,
        }
        assert {name: metrics[name] for name in expected} == pytest.approx(
            {name: float(value) for name, value in expected.items()}, rel=1e-4
        )

    def test_the_mean_explains_and_recovers_nothing(self, lens, rows):
        assert evaluate(lens, rows)["controls"]["mean"] == {"fve": 0, "kl_recovered": 0}

    def test_intervals_surround_a_resample_of_documents(self, lens, rows):
        metrics = evaluate(lens, rows, num_bootstrap=400)
        assert set(metrics["ci95"]) == set(STATISTICS)
        for name, (low, high) in metrics["ci95"].items():
            assert low <= metrics[name] <= high, name

    def test_does_not_depend_on_the_batch_size(self, lens, rows):
        whole, ones = (flat(evaluate(lens, rows, batch_size=size)) for size in (10, 3))
        assert whole.keys() == ones.keys()
        for name, value in whole.items():
            np.testing.assert_allclose(ones[name], value, rtol=1e-4, atol=1e-5, err_msg=name)

    def test_is_the_same_every_time_and_leaves_no_trace(self, lens, rows):
        lens.train()
        state = torch.random.get_rng_state()
        first = evaluate(lens, rows)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert lens.training
        lens.eval()
        assert without_times(first) == without_times(evaluate(lens, rows))


class TestChoices:
    def test_only_the_asked_controls_are_run(self, lens, rows):
        metrics = evaluate(lens, rows, controls=["context_tail"])
        assert list(metrics["controls"]) == ["context_tail"]
        assert metrics["kl_recovered"] == pytest.approx(evaluate(lens, rows)["kl_recovered"], rel=1e-5)

    def test_rows_are_a_random_choice_up_to_the_limit(self, lens, rows):
        first, again, other = (evaluate(lens, rows, rows=6, seed=seed) for seed in (0, 0, 1))
        assert first["rows"] == 6
        assert without_times(first) == without_times(again)
        assert first["fve"] != other["fve"]

    def test_runs_on_the_rows_of_a_cache(self, lens, tmp_path):
        random = np.random.default_rng(0)
        documents = [[BOS, *random.integers(3, 97, random.integers(8, 14)).tolist()] for _ in range(6)]
        corpus = corpus_from_rows({"input_ids": ids, "document": document_hash(ids)} for ids in documents)
        cache = build_activation_cache(
            lens.subject, corpus, tmp_path / "cache", tokenizer=lens.tokenizer, subject_name="tiny",
            dataset_name="random", positions_per_sequence=2, min_position=4, progress=False,
        )  # fmt: skip
        metrics = evaluate(lens, ActivationRows(cache))
        assert (metrics["rows"], metrics["documents"]) == (12, 6)


class TestOneTokenPass:
    @pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "bloom"])
    def test_several_replacements_at_one_position_do_not_see_each_other(self, family):
        subject = Subject(tiny_model(family), LAYER)
        input_ids, attention_mask = random_tokens(12, 9)
        positions = torch.tensor([[11], [6]])
        subject.check_one_token(12 + 3)
        context = subject.context(input_ids, attention_mask, positions)
        new = context.activations + torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
        together = subject.replaced_logits(context._replace(positions=positions.expand(-1, 3)), new)
        alone = [subject.replaced_logits_full(context, new[:, index, None]) for index in range(3)]
        torch.testing.assert_close(together, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-4)


class TestErrors:
    def test_nan_activation(self, lens, rows):
        rows = copy.deepcopy(rows)
        rows[4]["activation"][3] = float("nan")
        with pytest.raises(ValueError, match="activations of the cache hold NaN or infinity in 1 of 10 rows"):
            evaluate(lens, rows)

    def test_nan_weights(self, rows):
        lens = tiny_lens()
        lens.encoder.output_map.bias.data[0] = float("nan")
        with pytest.raises(ValueError, match="hold NaN or infinity"):
            evaluate(lens, rows)

    def test_no_rows(self, lens):
        with pytest.raises(ValueError, match="got no rows"):
            evaluate(lens, [])

    def test_a_collator_for_another_length(self, lens, rows):
        collator = replace(tiny_collator(), num_text_tokens=9)
        with pytest.raises(ValueError, match=f"num_text_tokens=9, the lens {NUM_TEXT_TOKENS}"):
            Evaluator(lens, rows, collator)

    @pytest.mark.parametrize("name", ["rows", "batch_size", "num_bootstrap"])
    def test_numbers_below_1(self, name):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            EvaluationArguments(**{name: 0})

    def test_unknown_control(self):
        with pytest.raises(ValueError, match="'median' is not a control"):
            EvaluationArguments(controls=["mean", "median"])

    def test_lens_without_tokenizer(self, rows):
        lens = tiny_lens()
        lens.tokenizer = None
        with pytest.raises(ValueError, match="tokenizer"):
            evaluate(lens, rows)


class TestWriteMetrics:
    def test_writes_the_metrics_and_the_resolved_arguments(self, tmp_path):
        path = tmp_path / "run" / "metrics.json"
        write_metrics(path, {"fve": 0.5, "ci95": {"fve": [0.4, 0.6]}}, asdict(EvaluationArguments(rows=7)))
        written = json.loads(path.read_text())
        assert (written["fve"], written["ci95"]["fve"], written["arguments"]["rows"]) == (0.5, [0.4, 0.6], 7)
        assert [file.name for file in path.parent.iterdir()] == ["metrics.json"]

    def test_a_number_that_json_does_not_know_leaves_the_old_file(self, tmp_path):
        path = tmp_path / "metrics.json"
        write_metrics(path, {"fve": 0.5}, {})
        with pytest.raises(ValueError, match="JSON"):
            write_metrics(path, {"fve": float("nan")}, {})
        assert json.loads(path.read_text())["fve"] == 0.5

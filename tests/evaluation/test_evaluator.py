import copy
import json
from dataclasses import asdict, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from evaluation_rows import BOS, tiny_collator, tiny_rows
from tiny_lenses import LAYER, NUM_TEXT_TOKENS, disturb, tiny_lens
from tiny_models import random_tokens, tiny_model
from transformers import HfArgumentParser

from consistency_lens.data.activation_source import ActivationRows
from consistency_lens.data.cache_building import build_activation_cache
from consistency_lens.data.corpus import corpus_from_rows, document_hash
from consistency_lens.evaluation import CHECKS, CONTROLS, EvaluationArguments, Evaluator, write_metrics
from consistency_lens.evaluation.arguments import FITTED
from consistency_lens.evaluation.evaluated import training_sample
from consistency_lens.evaluation.evaluator import STATISTICS
from consistency_lens.evaluation.metrics import (
    cosine,
    distinct_n,
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
TRAINING_LENGTHS = (12, 9, 7, 14) * 10
UNFITTED_CONTROLS = [name for name in CONTROLS if name not in FITTED]
# What the checks are asked to do, so that they take no time.
SHORT_CHECKS = {"fresh_encoder_steps": 3, "best_of": 2, "check_rows": 4}
TIMES = ("seconds", "samples_per_second")


@pytest.fixture(scope="module")
def lens():
    return disturb(tiny_lens())


@pytest.fixture(scope="module")
def rows(lens):
    return tiny_rows(lens.subject, *LENGTHS)


@pytest.fixture(scope="module")
def train_rows(lens):
    # of other documents than the rows above, which come first
    return tiny_rows(lens.subject, *LENGTHS, *TRAINING_LENGTHS)[len(LENGTHS) :]


def evaluate(lens, rows, /, train_rows=None, **arguments):
    arguments = EvaluationArguments(**({"disable_tqdm": True, "num_bootstrap": 50} | arguments))
    return Evaluator(lens, rows, tiny_collator(), arguments, train_rows)()


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
            "true_text_perplexity", "perplexity_ratio", "distinct_2", "true_distinct_2", "unused_token_share",
            "true_unused_token_share", "rows", "documents", "controls", "ci95", "seconds", "samples_per_second",
        }  # fmt: skip
        assert list(metrics["controls"]) == UNFITTED_CONTROLS
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
        mask = batch["tail_mask"]
        as_long = torch.arange(NUM_TEXT_TOKENS) < mask.sum(dim=1, keepdim=True)  # some tails are shorter than T
        text = perplexity(text_nll(subject, decoded.token_ids, as_long), as_long)
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

    def test_an_encoder_that_gives_back_the_activation_explains_and_recovers_all(self, rows, monkeypatch):
        lens = disturb(tiny_lens())
        activations = torch.tensor(np.stack([row["activation"] for row in rows]))
        order = torch.tensor([row["position"] for row in rows]).argsort(stable=True)
        # The texts are the numbers of the rows, which the encoder looks up.
        texts = order[:, None].expand(-1, NUM_TEXT_TOKENS)
        monkeypatch.setattr(lens, "decode_ids", lambda _: texts)
        monkeypatch.setattr(lens.encoder, "embed_ids", lambda ids: ids)
        monkeypatch.setattr(lens.encoder, "forward", lambda ids, mask=None: activations[ids[:, 0]])
        metrics = evaluate(lens, rows, controls=["mean", "shuffled"], batch_size=len(rows))
        ones = ("fve", "fve_nrm", "cosine", "kl_recovered", "top1_agreement")
        assert {name: metrics[name] for name in ones} == pytest.approx(dict.fromkeys(ones, 1), abs=1e-5)
        assert metrics["controls"]["shuffled"]["fve"] < 0

    def test_unused_tokens_are_counted_among_ordinary_ones(self, lens, rows):
        metrics = evaluate(lens, rows)
        ordinary = set(range(3, 97))
        tails = {token for row in rows for token in row["input_ids"][1:][-NUM_TEXT_TOKENS:]}
        assert metrics["true_unused_token_share"] == pytest.approx(len(ordinary - tails) / len(ordinary))
        texts = lens.decode_ids(tiny_collator()(rows)["activations"]).flatten().tolist()
        assert metrics["unused_token_share"] == pytest.approx(len(ordinary - set(texts)) / len(ordinary))

    def test_a_text_ends_before_the_stop_token(self, rows):
        plain = disturb(tiny_lens())
        activations = tiny_collator()(rows)["activations"]
        stop = int(plain.decode_ids(activations)[0, 2])
        lens = disturb(tiny_lens(stop_token_id=stop))
        ids = lens.decode_ids(activations)
        mask = lens.text_mask(ids)
        assert not mask.all()
        metrics = evaluate(lens, rows)
        # as many tokens of the text as there are of the tail, from its start
        tokens = torch.minimum(mask.sum(1), tiny_collator()(rows)["tail_mask"].sum(1))[:, None]
        scored = mask & (mask.cumsum(1) <= tokens)
        assert metrics["text_perplexity"] == pytest.approx(
            float(perplexity(text_nll(lens.subject, ids, scored), scored)), rel=1e-4
        )
        assert metrics["distinct_2"] == distinct_n(ids, 2, mask) != distinct_n(ids, 2)
        # true text is counted up to the same length, its end
        tails = [row["input_ids"][1:][-int(length) :] for row, length in zip(rows, mask.sum(1), strict=True)]
        bigrams = [pair for tail in tails for pair in pairwise(tail)]
        assert metrics["true_distinct_2"] == pytest.approx(len(set(bigrams)) / len(bigrams))
        used = {token for tail in tails for token in tail} & set(range(3, 97))
        assert metrics["true_unused_token_share"] == pytest.approx(1 - len(used) / 94)
        reconstruction = lens.encoder(lens.encoder.embed_ids(ids), mask).detach()
        assert metrics["fve"] == pytest.approx(float(fve(activations, reconstruction, lens.mean)), rel=1e-4)

    def test_intervals_surround_a_resample_of_documents(self, lens, rows):
        metrics = evaluate(lens, rows, num_bootstrap=400)
        controls = {
            f"controls.{name}.{metric}": of[metric]
            for name, of in metrics["controls"].items()
            for metric in ("fve", "kl_recovered")
        }
        assert set(metrics["ci95"]) == set(STATISTICS) | set(controls)
        for name, (low, high) in metrics["ci95"].items():
            assert low - 1e-9 <= (metrics | controls)[name] <= high + 1e-9, name

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


class TestTrainingRows:
    def test_bring_the_control_that_is_fitted_to_them(self, lens, rows, train_rows):
        metrics = evaluate(lens, rows, train_rows)
        assert list(metrics["controls"]) == list(CONTROLS)
        assert metrics["controls"]["residual_vq"]["fve"] > 0 and metrics["controls"]["residual_vq"]["bits"] > 0

    def test_change_nothing_else(self, lens, rows, train_rows):
        fitted, plain = evaluate(lens, rows, train_rows), evaluate(lens, rows)
        fitted["controls"].pop("residual_vq")
        for metric in ("fve", "kl_recovered"):
            fitted["ci95"].pop(f"controls.residual_vq.{metric}")
        fitted, plain = flat(fitted), flat(plain)
        assert fitted.keys() == plain.keys()
        for name, value in plain.items():
            np.testing.assert_allclose(fitted[name], value, rtol=1e-4, atol=1e-5, err_msg=name)

    def test_are_drawn_up_to_the_limit_in_order(self, train_rows):
        first, again, other = (training_sample(train_rows, tiny_collator(), 12, seed) for seed in (0, 0, 1))
        assert {name: len(tensor) for name, tensor in first.items()} == {
            "activations": 12, "tail_ids": 12, "tail_mask": 12
        }  # fmt: skip
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not torch.equal(first["activations"], other["activations"])
        whole = training_sample(train_rows, tiny_collator(), 1000, seed=0)
        expected = torch.tensor(np.stack([row["activation"] for row in train_rows]))
        assert torch.equal(whole["activations"], expected)

    def test_that_are_not_finite_are_an_error(self, lens, rows, train_rows):
        train_rows = copy.deepcopy(train_rows)
        train_rows[7]["activation"][0] = float("inf")
        with pytest.raises(ValueError, match="activations of the training rows hold NaN or infinity in 1 of 40 rows"):
            evaluate(lens, rows, train_rows)

    @pytest.mark.parametrize("train_rows", [None, []])
    @pytest.mark.parametrize("asked", [{"controls": ["mean", "residual_vq"]}, {"checks": ["linear_probe"]}])
    def test_that_are_missing_are_an_error_before_any_work(self, lens, rows, train_rows, asked):
        name = [*asked.values()][0][-1]
        with pytest.raises(ValueError, match=f"{name} is fitted to training rows, got none; pass `train_rows`"):
            Evaluator(lens, rows, tiny_collator(), EvaluationArguments(**asked), train_rows)


@pytest.fixture(scope="module")
def checked(lens, rows, train_rows):
    """The metrics with all checks."""
    return evaluate(lens, rows, train_rows, checks=list(CHECKS), **SHORT_CHECKS)


class TestChecks:
    def test_stand_beside_the_metrics_and_can_be_written(self, checked, tmp_path):
        assert all(isinstance(checked[name], dict) for name in CHECKS)
        assert len(checked["linear_probe"]["probe_accuracy"]) == NUM_TEXT_TOKENS
        readings = {"retokenised", "word_shuffle", "fresh_encoder", "fresh_encoder_on_true_text"}
        assert set(checked["private_code"]) == readings
        assert list(checked["best_of_n"]) == ["1", "2"]
        assert checked["ablation"]["rows"] == SHORT_CHECKS["check_rows"]
        write_metrics(tmp_path / "metrics.json", checked, {})

    def test_only_the_asked_ones_are_run(self, lens, rows):
        metrics = evaluate(lens, rows, checks=["ablation"], **SHORT_CHECKS)
        assert [name for name in CHECKS if name in metrics] == ["ablation"]

    def test_change_no_metric(self, lens, rows, train_rows, checked):
        checked, plain = flat(checked), flat(evaluate(lens, rows, train_rows))
        assert plain.keys() <= checked.keys()
        assert all(np.array_equal(checked[name], value) for name, value in plain.items())

    def test_do_not_depend_on_the_batch_size(self, lens, rows, train_rows, checked):
        other = evaluate(lens, rows, train_rows, checks=["linear_probe", "private_code"], batch_size=3, **SHORT_CHECKS)
        for check in ("linear_probe", "private_code"):
            whole, threes = flat(checked[check]), flat(other[check])
            for name, value in whole.items():
                np.testing.assert_allclose(threes[name], value, rtol=1e-3, atol=1e-4, err_msg=f"{check} {name}")

    def test_leave_no_trace(self, lens, rows, train_rows):
        state = torch.random.get_rng_state()
        before = copy.deepcopy(lens.state_dict())
        evaluate(lens, rows, train_rows, checks=list(CHECKS), **SHORT_CHECKS)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert all(torch.equal(tensor, before[name]) for name, tensor in lens.state_dict().items())

    def test_an_unknown_one_is_an_error(self):
        with pytest.raises(ValueError, match="checks: got the unknown name 'spelling'; choose from linear_probe"):
            EvaluationArguments(checks=["ablation", "spelling"])


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

    @pytest.mark.parametrize(
        "name",
        ["rows", "batch_size", "num_bootstrap", "training_rows", "best_of", "check_rows", "fresh_encoder_steps"],
    )
    def test_numbers_below_1(self, name):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            EvaluationArguments(**{name: 0})

    @pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
    def test_a_learning_rate_that_is_not_positive(self, rate):
        with pytest.raises(ValueError, match=f"fresh_encoder_learning_rate must be positive, got {rate}"):
            EvaluationArguments(fresh_encoder_learning_rate=rate)

    def test_unknown_control(self):
        with pytest.raises(ValueError, match="controls: got the unknown name 'median'"):
            EvaluationArguments(controls=["mean", "median"])

    def test_every_argument_has_a_help_that_can_be_shown(self):
        text = HfArgumentParser(EvaluationArguments).format_help()
        assert all(f"--{name}" in text for name in asdict(EvaluationArguments()))

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

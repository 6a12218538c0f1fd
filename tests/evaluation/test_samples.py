import json

import pytest
import torch
from evaluation_rows import tiny_collator, tiny_rows
from tiny_lenses import disturb, tiny_lens, tiny_tokenizer
from transformers import GenerationConfig

from consistency_lens.evaluation import collect_samples, write_samples
from consistency_lens.evaluation import samples as samples_module
from consistency_lens.evaluation.samples import (
    CONTINUATION_TOKENS,
    TrackedSamples,
    choose_rows,
    continuations,
    marked_context,
)

LENGTHS = (12, 9, 6, 7, 12, 8, 4, 15, 11, 6)


@pytest.fixture(scope="module")
def lens():
    return disturb(tiny_lens())


@pytest.fixture(scope="module")
def rows(lens):
    return tiny_rows(lens.subject, *LENGTHS)


class TestCollectSamples:
    def test_agree_with_explain(self, lens, rows):
        samples = collect_samples(lens, rows, tiny_collator())
        assert len(samples) == 5
        for sample in samples:
            text = sample.context.replace("«", "").replace("»", "")
            explanation = lens.explain(text, positions=[sample.position])[0]
            assert sample.context.endswith(f"«{explanation.token}»")
            assert sample.explanation == explanation.text
            assert (sample.fve, sample.kl) == pytest.approx((explanation.fve, explanation.kl), rel=1e-4)
            assert [token for token, _ in sample.top_after] == [token for token, _ in explanation.top_after]
            assert [token for token, _ in sample.top_before] == [token for token, _ in explanation.top_before]

    def test_the_true_tail_ends_the_context(self, lens, rows):
        for sample in collect_samples(lens, rows, tiny_collator()):
            plain = sample.context.replace("«", "").replace("»", "")
            assert plain.endswith(sample.true_tail)
            assert len(sample.true_tail.split()) == min(4, sample.position)

    def test_documents_differ_and_positions_rise(self, lens, rows):
        samples = collect_samples(lens, rows, tiny_collator(), count=3)
        assert len({sample.document for sample in samples}) == 3
        assert [sample.position for sample in samples] == sorted(sample.position for sample in samples)

    def test_a_seed_fixes_the_choice(self, lens, rows):
        first, again, other = (collect_samples(lens, rows, tiny_collator(), 3, seed) for seed in (0, 0, 2))
        assert first == again
        assert first != other

    @pytest.mark.parametrize("count", [0, -1])
    def test_no_samples_asked_for(self, lens, rows, count):
        with pytest.raises(ValueError, match=f"got 10 rows and count={count}"):
            collect_samples(lens, rows, tiny_collator(), count)

    def test_jsonl_holds_what_was_collected(self, lens, rows, tmp_path):
        samples = collect_samples(lens, rows, tiny_collator(), count=2)
        write_samples(tmp_path / "samples.jsonl", samples)
        lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
        assert [line["explanation"] for line in lines] == [sample.explanation for sample in samples]
        assert lines[0]["context"].endswith("»")


class TestTrackedSamples:
    def test_the_same_rows_are_read_with_the_lens_of_now(self, rows):
        lens = disturb(tiny_lens())
        tracked = TrackedSamples(lens, rows, tiny_collator())
        before = tracked.read()
        assert before == tracked.read() == collect_samples(lens, rows, tiny_collator())
        disturb(lens, scale=0.5)
        after = tracked.read()
        assert [sample.context for sample in after] == [sample.context for sample in before]
        assert [sample.fve for sample in after] != [sample.fve for sample in before]

    def test_batches_do_not_matter(self, lens, rows, monkeypatch):
        whole = collect_samples(lens, rows, tiny_collator())
        monkeypatch.setattr(samples_module, "BATCH", 2)
        split = collect_samples(lens, rows, tiny_collator())
        for one, other in zip(whole, split, strict=True):
            assert (one.context, one.continuation, one.explanation) == (
                other.context, other.continuation, other.explanation,
            )  # fmt: skip
            assert (one.fve, one.kl) == pytest.approx((other.fve, other.kl), rel=1e-4)

    def test_a_text_ends_at_the_stop_token(self, lens, rows):
        whole = collect_samples(lens, rows, tiny_collator())
        stop = whole[0].explanation.split()[2]
        stopping = disturb(tiny_lens(stop_token_id=lens.tokenizer.convert_tokens_to_ids(stop)))
        for sample, before in zip(collect_samples(stopping, rows, tiny_collator()), whole, strict=True):
            words = before.explanation.split()
            ended = words[: words.index(stop)] if stop in words else words
            assert sample.explanation.split() == (ended or [stop])  # a text is never empty
            text = sample.context.replace("«", "").replace("»", "")
            explanation = stopping.explain(text, positions=[sample.position])[0]
            assert sample.fve == pytest.approx(explanation.fve, rel=1e-4)
            assert len(ended) == len(words) or sample.fve != before.fve


class TestContinuations:
    @pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "bloom"])
    def test_are_the_greedy_ones_of_each_context_alone(self, family):
        lens = tiny_lens(family)
        rows = tiny_rows(lens.subject, 12, 9, 3)
        # settings that a published model may bring along
        lens.subject.model.generation_config = GenerationConfig(do_sample=True, repetition_penalty=1.5, num_beams=3)
        expected = [greedy(lens, row["input_ids"]) for row in rows]
        assert continuations(lens, tiny_collator()(rows)) == expected
        assert len(set(expected)) > 1 or family == "gemma3"  # the contexts are read

    def test_end_before_eos(self):
        lens = tiny_lens()
        rows = tiny_rows(lens.subject, 12, 9, 3)
        words = [text.split() for text in continuations(lens, tiny_collator()(rows))]
        assert [len(of_row) for of_row in words] == [CONTINUATION_TOKENS] * 3
        lens.tokenizer.eos_token = words[0][4]
        ended = continuations(lens, tiny_collator()(rows))[0].split()
        assert ended == words[0][: words[0].index(words[0][4])]

    def test_stay_within_the_positions_of_the_subject(self):
        lens = tiny_lens("gpt2", model={"max_position_embeddings": 14})
        rows = tiny_rows(lens.subject, 12, 9)
        assert [len(text.split()) for text in continuations(lens, tiny_collator()(rows))] == [2, 2]
        assert continuations(lens, tiny_collator()(tiny_rows(lens.subject, 14))) == [""]

    def test_draw_nothing(self, lens, rows):
        state = torch.random.get_rng_state()
        continuations(lens, tiny_collator()(rows))
        assert torch.equal(torch.random.get_rng_state(), state)


def greedy(lens, ids):
    """The continuation of one context by whole passes, a token at a time."""
    ids, start = list(ids), len(ids)
    for _ in range(CONTINUATION_TOKENS):
        token = int(lens.subject.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token == lens.tokenizer.eos_token_id:
            break
        ids.append(token)
    return lens.tokenizer.decode(ids[start:])


def test_positions_are_spread():
    rows = [{"document": index, "position": index} for index in range(100)]
    positions = [row["position"] for row in choose_rows(rows, 5, seed=0)]
    assert positions == sorted(positions)
    assert positions[0] < 15 and positions[-1] >= 85
    assert all(later - earlier > 8 for earlier, later in zip(positions, positions[1:], strict=False))


class TestMarkedContext:
    def test_marks_the_token_without_its_space(self):
        assert marked_context(tiny_tokenizer(), [1, 5, 6, 7, 8], position=3) == "w5 w6 «w7»"

    def test_only_the_bos_at_the_start_is_left_out(self):
        assert marked_context(tiny_tokenizer(), [1, 5, 2, 1], position=3) == "w5 </s> «<s>»"
        assert marked_context(tiny_tokenizer(), [1, 5], position=0) == "«<s>»"

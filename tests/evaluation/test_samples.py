import json

import pytest
from evaluation_rows import tiny_collator, tiny_rows
from tiny_lenses import disturb, tiny_lens, tiny_tokenizer

from consistency_lens.evaluation import collect_samples, write_samples
from consistency_lens.evaluation.samples import choose_rows, marked_context

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

"""Readings and records of tiny models, beside what a few lines of torch give."""

import csv
import dataclasses
import json
import math

import pytest
import torch
from tiny_lenses import tiny_tokenizer
from tiny_models import NUM_LAYERS, VOCAB_SIZE
from tiny_tuned_lenses import tiny_tuned_lens

from consistency_lens.tuned_lens import readings
from consistency_lens.tuned_lens.kpis import TEMPERATURES
from consistency_lens.tuned_lens.readings import NORM, TUNED, read_prompt
from consistency_lens.tuned_lens.records import (
    COLUMNS,
    file_names,
    read_records,
    record_files,
    records_of,
    token_texts,
)
from consistency_lens.tuned_lens.suite import Prompt, TokenisedPrompt, tokenise_suite

TEXT, ANSWER = "w5 w9 w11 w40 w7", "w23"


def tokens(text=TEXT, answer=ANSWER):
    (found,) = tokenise_suite([Prompt("p", text, answer)], tiny_tokenizer())
    return found


@pytest.fixture(scope="module")
def lens():
    return tiny_tuned_lens()


@pytest.fixture(scope="module")
def result(lens):
    return read_prompt(lens, tokens())


def close(found, expected, atol=1e-5):
    torch.testing.assert_close(found.double(), expected.double(), atol=atol, rtol=0)


@torch.no_grad()
def distributions(lens, decode):
    """log p of a lens at each layer and position in float64, (L, S, V), and its logits."""
    residuals = lens.residuals(torch.tensor([tokens().ids]))[:, 0]
    logits = torch.stack([decode(layer, residual) for layer, residual in enumerate(residuals)]).double()
    return logits.log_softmax(-1), logits


class TestReadings:
    @pytest.mark.parametrize("name", [NORM, TUNED])
    def test_are_entropies_and_kls_in_bits_both_ways(self, lens, result, name):
        log_p, _ = distributions(lens, lens.logit_lens if name == NORM else lens.logits)
        final = distributions(lens, lens.logit_lens)[0][-1]
        reading, bit = result.lenses[name], math.log(2)
        close(reading.entropy_bits, -(log_p.exp() * log_p).sum(-1) / bit)
        from_final = (final.exp() * (final - log_p)).sum(-1) / bit
        close(reading.kl_from_final_bits, from_final)
        close(reading.kl_to_final_bits, (log_p.exp() * (log_p - final)).sum(-1) / bit)
        close(result.teacher_entropy_bits, -(final.exp() * final).sum(-1) / bit)
        assert from_final[0].mean() > 0.1

    def test_units_by_hand(self):
        # P_final = (1/2, 1/2), P_layer = (1/4, 3/4)
        final, logits = torch.zeros(1, 2), torch.tensor([[0.25, 0.75]]).log()
        sheet = readings._Sheet(1, 1, 2, answer_id=0)
        sheet.fill(0, slice(0, 1), logits, final)
        reading = sheet.reading()
        assert reading.entropy_bits.item() == pytest.approx(2 - 0.75 * math.log2(3))  # 0.8113 bits
        assert reading.kl_from_final_bits.item() == pytest.approx(1 - 0.5 * math.log2(3))  # 0.2075 bits
        assert reading.kl_from_final_bits.item() * math.log(2) == pytest.approx(0.5 * math.log(4 / 3))  # 0.1438 nats
        assert reading.kl_to_final_bits.item() == pytest.approx(0.75 * math.log2(3) - 1)  # 0.1887 bits
        assert (reading.answer_rank.item(), reading.answer_probability.item()) == (2, pytest.approx(0.25))
        assert reading.top_ids.tolist() == [[[1, 0]]]
        assert reading.top_probabilities.flatten().tolist() == pytest.approx([0.75, 0.25])

    def test_the_cosine_is_of_centred_logits(self, lens, result):
        _, logits = distributions(lens, lens.logits)
        logits = logits - logits.mean(-1, keepdim=True)
        expected = torch.cosine_similarity(logits, logits[-1].expand_as(logits), dim=-1)
        close(result.lenses[TUNED].cos_to_final, expected)
        shifted = readings._cosine(torch.tensor([[1.0, 2, 3]]), torch.tensor([[101.0, 102, 103]]))
        assert shifted.item() == pytest.approx(1)

    def test_the_top_tokens_and_the_answer(self, lens, result):
        log_p, logits = distributions(lens, lens.logits)
        reading = result.lenses[TUNED]
        assert torch.equal(reading.top_ids, log_p.topk(20, dim=-1).indices)
        close(reading.top_probabilities, log_p.exp().topk(20, dim=-1).values)
        order = logits[:, -1].argsort(descending=True)
        assert reading.answer_rank.tolist() == ((order == 23).nonzero()[:, 1] + 1).tolist()
        close(reading.answer_probability, log_p[:, -1, 23].exp())

    def test_calibrated_and_raw_lenses_stand_beside(self, lens, result):
        final, norm = distributions(lens, lens.logit_lens)[0][-1], distributions(lens, lens.logit_lens)[0]
        log_q, _ = distributions(lens, lambda layer, h: lens.logit_lens(layer, h, calibrated=True))
        expected = (final.exp() * (final - log_q)).sum(-1) / math.log(2)
        close(result.calibrated_kl_bits, expected)
        assert (result.calibrated_kl_bits - result.lenses[NORM].kl_from_final_bits).abs()[:-1].min() > 1e-3
        raw, raw_logits = distributions(lens, lambda layer, h: lens.readout.logits(h))
        expected = (norm.exp() * (norm - raw)).sum(-1) / math.log(2)
        close(result.raw_kl_bits[NORM], expected, 1e-4)
        order = raw_logits[:, -1].argsort(descending=True)
        assert result.raw_rank.tolist() == ((order == 23).nonzero()[:, 1] + 1).tolist()

    def test_do_not_depend_on_how_many_positions_are_held_at_once(self, lens, result, monkeypatch):
        monkeypatch.setattr(readings, "CHUNK_LOGITS", 2 * VOCAB_SIZE + 1)
        held, decode = [], lens.readout.logits
        monkeypatch.setattr(lens.readout, "logits", lambda hidden: held.append(len(hidden)) or decode(hidden))
        chunked = read_prompt(lens, tokens())
        assert max(held) == 2 < len(tokens().ids)
        for name in (NORM, TUNED):
            for field in dataclasses.fields(readings.LensReading):
                expected = getattr(result.lenses[name], field.name)
                close(getattr(chunked.lenses[name], field.name), expected)
        close(chunked.last_layer_kl_bits, result.last_layer_kl_bits)
        close(chunked.raw_kl_bits[TUNED], result.raw_kl_bits[TUNED], 1e-4)

    def test_a_lens_that_is_not_finite_is_named(self):
        broken = tiny_tuned_lens()
        with torch.no_grad():
            next(broken.translators[1].parameters()).fill_(math.nan)
        with pytest.raises(ValueError, match="the tuned lens is not finite at layer 1 of prompt 'p'"):
            read_prompt(broken, tokens())
        assert list(read_prompt(broken, tokens(), with_tuned=False).lenses) == [NORM]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "phi", "opt", "bloom"])
def test_the_last_layer_is_the_model_itself_under_both_lenses(family):
    result = read_prompt(tiny_tuned_lens(family), tokens())
    for name in (NORM, TUNED):
        assert result.lenses[name].kl_from_final_bits[-1].abs().max() < 1e-6
        assert result.head_kl_bits[name].abs().max() < 1e-6
        assert result.lenses[name].cos_to_final[-1].min() > 1 - 1e-5
    best = result.last_layer_kl_bits.mean(0).argmin()
    assert TEMPERATURES[best] == 1 and result.last_layer_kl_bits[:, best].max() < 1e-6


def test_a_head_that_takes_another_width_has_no_raw_lens():
    result = read_prompt(tiny_tuned_lens("opt", word_embed_proj_dim=16, do_layer_norm_before=False), tokens())
    assert result.raw_kl_bits == {} and result.raw_rank is None


class TestRecords:
    def records(self, result, lens=TUNED):
        return list(records_of(result, lens, token_texts(tiny_tokenizer())))

    def test_are_one_a_layer_and_position(self, result):
        places = [(record.layer, record.position) for record in self.records(result)]
        assert places == [(layer, position) for layer in range(NUM_LAYERS) for position in range(len(tokens().ids))]

    def test_name_the_token_that_is_read_and_the_likeliest_next_ones(self, result):
        record = self.records(result)[2]
        assert (record.prompt_id, record.prompt, record.lens) == ("p", TEXT, "tuned")
        assert (record.position, record.token_id, record.token) == (2, 11, "w11") == (2, tokens().ids[2], "w11")
        ids = [token for token, _, _ in record.top20]
        assert len(ids) == 20 and record.top20[0][1] == tiny_tokenizer().decode([ids[0]])
        assert sum(probability for _, _, probability in record.top20) < 1

    def test_have_the_answer_at_the_last_position_and_milestones_everywhere(self, result):
        reading = dataclasses.replace(result.lenses[TUNED], answer_rank=torch.tensor([12, 4, 1]))
        records = self.records(dataclasses.replace(result, lenses={TUNED: reading}))
        assert {(r.first_rank_le_10, r.first_rank_le_5, r.first_rank_le_1) for r in records} == {(1, 1, 2)}
        assert {(r.answer, r.answer_id) for r in records} == {(ANSWER, 23)}
        last = [record for record in records if record.position == len(tokens().ids) - 1]
        assert [(record.answer_rank, record.is_answer) for record in last] == [(12, False), (4, False), (1, True)]
        assert all(record.answer_rank is record.is_answer is None for record in records if record not in last)

    def test_have_the_milestones_of_their_own_lens(self, result):
        ranks = {NORM: [30, 12, 4], TUNED: [8, 3, 1]}
        readings = {
            name: dataclasses.replace(result.lenses[name], answer_rank=torch.tensor(of)) for name, of in ranks.items()
        }
        both = dataclasses.replace(result, lenses=readings)
        milestones = {
            name: {(r.first_rank_le_10, r.first_rank_le_5, r.first_rank_le_1) for r in self.records(both, name)}
            for name in ranks
        }
        assert milestones == {NORM: {(2, 2, None)}, TUNED: {(0, 1, 2)}}

    def test_without_an_answer_have_none(self, lens):
        records = self.records(read_prompt(lens, tokens(answer=None)))
        names = ["answer", "answer_id", "answer_rank", "answer_probability", "is_answer", "first_rank_le_1"]
        assert all(getattr(record, name) is None for record in records for name in names)


class TestFiles:
    def written(self, folder, lens, *prompts):
        with record_files(folder, "run", (NORM, TUNED), tiny_tokenizer()) as write:
            results = [read_prompt(lens, prompt) for prompt in prompts]
            for result in results:
                write(result)
        return results

    def test_are_four_of_one_schema_and_read_back_as_they_were(self, lens, tmp_path):
        odd = TokenisedPrompt(Prompt('a,"b"\r\n', "w3\r\n\tw4 'é", "w6"), (3, 4), (6,))
        results = self.written(tmp_path, lens, tokens(), odd, tokens(answer=None))
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "run-pure-next-token-tuned.csv",
            "run-pure-next-token.csv",
            "run-records-tuned.csv",
            "run-records.csv",
        ]
        for name in (NORM, TUNED):
            every, pure = (read_records(tmp_path / file) for file in file_names("run", name))
            expected = [of for result in results for of in records_of(result, name, token_texts(tiny_tokenizer()))]
            assert len(every) == len(expected)
            for found, record in zip(every, expected, strict=True):
                for column in COLUMNS:
                    value, other = getattr(found, column), getattr(record, column)
                    assert type(value) is type(other)
                    if column == "top20":
                        assert [row[:2] for row in value] == [row[:2] for row in other]
                        assert [row[2] for row in value] == pytest.approx([row[2] for row in other])
                    else:
                        assert value == (pytest.approx(other, rel=1e-7) if isinstance(other, float) else other)
            lasts = {"p": len(tokens().ids) - 1, odd.prompt.id: 1}
            assert pure == [record for record in every if record.position == lasts[record.prompt_id]]

    def test_have_the_columns_of_the_schema(self, lens, tmp_path):
        self.written(tmp_path, lens, tokens())
        with open(tmp_path / "run-records.csv", newline="") as file:
            (header, first, *_) = csv.reader(file)
        assert (
            header
            == (
                "prompt_id prompt lens layer position token_id token entropy_bits teacher_entropy_bits top20 answer "
                "answer_id answer_rank answer_probability is_answer kl_from_final_bits kl_to_final_bits cos_to_final "
                "first_rank_le_10 first_rank_le_5 first_rank_le_1"
            ).split()
        )
        assert len(json.loads(first[header.index("top20")])) == 20

    def test_are_not_there_when_the_sweep_fails(self, lens, tmp_path):
        (tmp_path / "run-records.csv").write_text("old")
        with pytest.raises(RuntimeError), record_files(tmp_path, "run", (NORM,), tiny_tokenizer()) as write:
            write(read_prompt(lens, tokens()))
            raise RuntimeError
        assert (tmp_path / "run-records.csv").read_text() == "old"
        assert not (tmp_path / "run-pure-next-token.csv").exists()

    def test_that_are_others_are_errors(self, lens, tmp_path):
        with pytest.raises(ValueError, match="no file at .*none.csv"):
            read_records(tmp_path / "none.csv")
        (tmp_path / "other.csv").write_text("a,b\n1,2\n")
        with pytest.raises(ValueError, match=r"has other columns \(a, b\) than a sweep writes"):
            read_records(tmp_path / "other.csv")
        self.written(tmp_path, lens, tokens())
        text = (tmp_path / "run-records.csv").read_text()
        (tmp_path / "run-records.csv").write_text(text.replace(",norm,0,0,", ",norm,zero,0,", 1))
        with pytest.raises(ValueError, match="row 2 of .* is broken"):
            read_records(tmp_path / "run-records.csv")

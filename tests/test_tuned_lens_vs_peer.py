"""The script that compares fits of tuned lenses, by a tiny model and without the peer."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import NUM_LAYERS, tiny_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from consistency_lens.tuned_lens.modeling_tuned_lens import TunedLens

BENCHMARKS = Path(__file__).parent / "benchmarks"
LENGTH = 16


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import tuned_lens_vs_peer

    return tuned_lens_vs_peer


@pytest.fixture
def subject():
    return tiny_model("llama", max_position_embeddings=LENGTH)


@pytest.fixture
def tokenizer():
    words = {"<pad>": 0, "<s>": 1, "</s>": 2}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def test_both_sides_read_blocks_of_the_models_own_text(script, subject, tokenizer):
    train, held_out = script.token_blocks(subject, tokenizer, 20 * LENGTH, 3, progress=False)
    assert train.shape == (20, LENGTH) and held_out.shape == (3, LENGTH) and train.dtype == np.int32
    again = script.token_blocks(subject, tokenizer, 20 * LENGTH, 3, progress=False)
    assert np.array_equal(train, again[0]) and np.array_equal(held_out, again[1])
    assert train[0, 0] == tokenizer.bos_token_id


@torch.no_grad()
def test_the_kl_is_the_mean_over_layers_but_the_last_and_positions(script, subject):
    blocks = np.arange(5 * LENGTH, dtype=np.int32).reshape(5, LENGTH)
    lens = TunedLens.for_model(subject, learn_temperature=False)
    for translator in lens.translators:
        translator.c += torch.linspace(-1, 1, len(translator.c))
    output = subject(input_ids=torch.from_numpy(blocks).long(), output_hidden_states=True)
    final = output.logits.log_softmax(dim=-1)
    expected = []
    for layer in range(NUM_LAYERS - 1):
        hidden = subject.model.norm(output.hidden_states[layer + 1]) + lens.translators[layer].c
        read = subject.lm_head(hidden).log_softmax(dim=-1)
        expected.append((final.exp() * (final - read)).sum(dim=-1).mean().item())
    assert script.mean_kl(lens, blocks, rows=2) == pytest.approx(np.mean(expected), rel=1e-4)


def test_our_fit_reads_as_many_tokens_as_it_is_given(script, subject, tmp_path, monkeypatch):
    blocks = np.random.default_rng(0).integers(3, 97, (40, LENGTH)).astype(np.int32)
    rows = []
    read = TunedLens.block_outputs

    def counted(self, input_ids, layers, attention_mask=None):
        rows.extend(input_ids[:, :].tolist())
        return read(self, input_ids, layers, attention_mask)

    monkeypatch.setattr(TunedLens, "block_outputs", counted)
    settings = script.OurSettings(tokens=32 * LENGTH, ridge_tokens=8 * LENGTH)
    lens = script.fit_ours(subject, blocks, settings, tmp_path)
    assert sorted(rows) == sorted(blocks[:32].tolist())
    assert script.mean_kl(lens, blocks[32:]) < script.mean_kl(TunedLens.for_model(subject), blocks[32:])


class Canned:
    """A comparison whose fits are known beforehand."""

    def __init__(self, script, subject, quick_kl=0.4):
        self.script, self.model, self.description = script, subject, "tiny"
        self.length, self.tokens, self.quick_kl = LENGTH, 2**16, quick_kl
        self.peers = 0

    def peer(self, settings):
        self.peers += 1
        return self.fit(settings.tokens_per_step / 100, 60.0, 300)

    def ours(self, settings):
        if settings == self.script.equal_settings(self.tokens):
            return self.fit(0.25, 12.0, 100)
        return self.fit(self.quick_kl if settings.tokens >= 2**14 else 2.0, 3.0, 50)

    def fit(self, kl, seconds, memory):
        return self.script.Fit(seconds, {"rise_bytes": memory, "peak_bytes": 1000}, kl)


def write(script, comparison, folder, monkeypatch):
    monkeypatch.setattr("harness.RESULTS", folder)
    candidates = [script.PeerSettings(tokens, 1) for tokens in (100, 50, 200)]
    peer, first = script.best_of_peer(comparison, candidates)
    assert peer.tokens_per_step == 50
    script.write_results(comparison, peer, "_x", torch.device("cpu"), first)
    assert comparison.peers == len(candidates) + script.RUNS - 1  # its first fit is not made twice


def test_three_results_are_written(script, subject, tmp_path, monkeypatch, capsys):
    write(script, Canned(script, subject), tmp_path, monkeypatch)
    results = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    ratios = {name: result["ratio"] for name, result in results.items()}
    assert ratios == {"tuned_lens_time_to_peer_kl_x": 20, "tuned_lens_kl_equal_tokens_x": 2, "tuned_lens_memory_x": 3}
    assert "on 16384 tokens" in results["tuned_lens_time_to_peer_kl_x"]["what"]
    for result in results.values():
        assert "SGD, 50 tokens a step, lr_scale 1" in result["what"] and result["runs"] == script.RUNS


def test_a_time_without_the_peers_kl_is_not_written(script, subject, tmp_path, monkeypatch, capsys):
    write(script, Canned(script, subject, quick_kl=0.6), tmp_path, monkeypatch)
    assert "time: ours does not reach 0.5000 nats" in capsys.readouterr().out
    assert {path.stem for path in tmp_path.iterdir()} == {"tuned_lens_kl_equal_tokens_x", "tuned_lens_memory_x"}


def test_the_memory_of_a_fit_is_what_it_adds(script):
    before = script.FitMemory()
    block = np.ones(64 * 2**20, dtype=np.uint8)
    del block
    measured = before.as_dict()
    assert 60 * 2**20 < measured["rise_bytes"] < 80 * 2**20
    assert measured["peak_bytes"] == measured["before_bytes"] + measured["rise_bytes"]
    assert script.FitMemory().as_dict()["rise_bytes"] < 8 * 2**20

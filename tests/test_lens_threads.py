"""Threads that use one lens at once."""

import pytest
import torch
from at_once import at_once
from tiny_lenses import INJECTED, activations, disturb, keys, tiny_lens
from tiny_models import tiny_model

from consistency_lens import modeling_consistency_lens

TEXT_IDS = torch.tensor([[9, 10, 11, 12], [20, 21, 22, 23], [5, 6, 7, 8]])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
class TestThreads:
    @pytest.mark.parametrize("in_training", [False, True], ids=["evaluation", "training"])
    def test_several_get_what_one_gets(self, in_training):
        """Though each decoding hangs hooks on the decoder, and has it in evaluation mode for as long as it lasts."""
        lens = disturb(tiny_lens("llama", "full", **INJECTED))

        def work():
            decoded = lens.decode(activations(), keys=keys())
            in_chunks = lens.decode_ids(activations(5, seed=1), chunk_size=2)
            scores = lens(activations(), text_ids=TEXT_IDS).logits.detach()
            tensors = [decoded.token_ids, in_chunks, scores, lens.encode(decoded.texts), lens.encode(TEXT_IDS)]
            return tensors, str(lens.explain("w9 w10 w11"))

        tensors, explanation = work()
        if in_training:
            lens.train().gradient_checkpointing_enable()
        for found, words in sum(at_once(work, work, times=5), []):
            torch.testing.assert_close(found, tensors)
            assert words == explanation

    def test_one_subject_is_loaded_for_several(self, monkeypatch):
        lens, loaded = tiny_lens("llama", "full"), []
        lens._subject.clear()

        def load(*_arguments):
            loaded.append(tiny_model("llama"))
            return loaded[-1]

        monkeypatch.setattr(modeling_consistency_lens, "load_subject", load)
        subjects = sum(at_once(lambda: lens.subject, lambda: lens.subject, times=2), [])
        assert len(loaded) == 1 and all(subject is lens.subject for subject in subjects)

import pytest
import torch
from evaluation_rows import tiny_collator, tiny_rows
from tiny_lenses import NUM_TEXT_TOKENS, disturb, tiny_lens, tiny_tokenizer
from tiny_models import VOCAB_SIZE, WIDTH, tiny_model

from consistency_lens.evaluation.controls import CONTROLS, Controls, rows_of_other_documents
from consistency_lens.evaluation.residual_vq import ResidualQuantiser
from consistency_lens.modeling_consistency_lens import ConsistencyLensModel

# The third row's context is shorter than T, BOS aside.
LENGTHS = (12, 9, 3, 7, 12, 8)


@pytest.fixture(scope="module")
def lens():
    return disturb(tiny_lens())


@pytest.fixture(scope="module")
def batch(lens):
    return tiny_collator()(tiny_rows(lens.subject, *LENGTHS))


@pytest.fixture(scope="module")
def text_ids(lens, batch):
    return lens.decode_ids(batch["activations"])


@pytest.fixture(scope="module")
def quantiser(lens, batch):
    """One codebook of zero and two of the rows, in the lens's normalised space."""
    normalised = lens.encoder.normaliser.normalise(batch["activations"])
    return ResidualQuantiser([torch.stack([torch.zeros(WIDTH), normalised[1], normalised[4]])])


def reconstruct(lens, batch, text_ids, name, seed=0, quantiser=None):
    controls = Controls(lens, [name], batch["document"], seed, quantiser)
    return controls.reconstruct(batch, slice(0, len(LENGTHS)), text_ids)[name]


class TestShuffled:
    def test_is_never_a_row_of_the_own_document(self):
        documents = torch.tensor([7, 3, 7, 3, 5, 7, 5, 9, 7])
        for seed in range(50):
            partners = rows_of_other_documents(documents, torch.Generator().manual_seed(seed))
            assert (documents[partners] != documents).all()

    def test_every_row_of_every_other_document_may_come(self):
        documents = torch.tensor([7, 3, 7, 3, 5])
        seen = {
            tuple(rows_of_other_documents(documents, torch.Generator().manual_seed(seed)).tolist())
            for seed in range(200)
        }
        assert [set(partners) for partners in zip(*seen, strict=True)] == [
            {1, 3, 4}, {0, 2, 4}, {1, 3, 4}, {0, 2, 4}, {0, 1, 2, 3}
        ]  # fmt: skip

    def test_reads_the_text_of_the_other_row(self, lens, batch, text_ids):
        controls = Controls(lens, ["shuffled"], batch["document"])
        shuffled = controls.reconstruct(batch, slice(2, 4), text_ids)["shuffled"]
        torch.testing.assert_close(shuffled, lens.encode(text_ids[controls.partners[2:4]]))

    def test_a_text_ends_before_the_stop_token(self, batch, text_ids):
        lens = disturb(tiny_lens(stop_token_id=50))
        texts = text_ids.clone()
        texts[:, 2] = 50
        shuffled = Controls(lens, ["shuffled"], batch["document"])
        read = shuffled.reconstruct(batch, slice(0, 2), texts)["shuffled"]
        torch.testing.assert_close(read, lens.encoder(lens.encoder.embed_ids(texts[shuffled.partners[:2], :2])))

    def test_one_document_is_an_error(self, lens):
        with pytest.raises(ValueError, match="needs rows of two documents at least, got 3 rows of one"):
            Controls(lens, ["shuffled"], torch.tensor([4, 4, 4]))


class TestTexts:
    def test_context_tail_reads_the_last_tokens_of_the_context(self, lens, batch, text_ids):
        tails = reconstruct(lens, batch, text_ids, "context_tail")
        for row, length in enumerate(LENGTHS):
            context = batch["input_ids"][row, 1:length]  # without BOS
            torch.testing.assert_close(
                tails[row], lens.encode(context[None, -NUM_TEXT_TOKENS:])[0], rtol=1e-4, atol=1e-4
            )

    def test_current_token_only_reads_the_token_at_the_position(self, lens, batch, text_ids):
        current = batch["input_ids"].gather(1, batch["positions"][:, None])
        torch.testing.assert_close(reconstruct(lens, batch, text_ids, "current_token_only"), lens.encode(current))

    def test_empty_text_reads_no_token(self, lens, batch, text_ids):
        empty = reconstruct(lens, batch, text_ids, "empty_text")
        torch.testing.assert_close(empty, lens.encode([""]).expand(len(LENGTHS), -1))
        assert not torch.allclose(empty[0], lens.mean)

    def test_empty_text_without_any_prompt_reads_the_start_token(self, batch, text_ids):
        lens = ConsistencyLensModel.from_subject(
            tiny_model("llama"), tiny_tokenizer(bos=False), layer=1, num_text_tokens=NUM_TEXT_TOKENS
        )
        assert lens.config.encoder.prefix_ids == []
        empty = reconstruct(lens, batch, text_ids, "empty_text")
        torch.testing.assert_close(empty[:1], lens.encode(torch.tensor([[lens.subject.model.config.bos_token_id]])))

    def test_empty_text_before_a_prompt_reads_that_alone(self, batch, text_ids):
        lens = ConsistencyLensModel.from_subject(
            tiny_model("llama"), tiny_tokenizer(bos=False), layer=1, encoder_prompt="<text> w5",
            num_text_tokens=NUM_TEXT_TOKENS,
        )  # fmt: skip
        empty = reconstruct(lens, batch, text_ids, "empty_text")
        torch.testing.assert_close(empty[:1], lens.encode([""]))

    def test_random_tokens_are_ordinary_ones_and_all_of_them(self, lens):
        ids = Controls(lens, ["random_tokens"], torch.arange(400)).random_ids
        assert ids.shape == (400, NUM_TEXT_TOKENS)
        assert set(ids.flatten().tolist()) == set(range(3, VOCAB_SIZE))  # 0 to 2: pad, BOS, EOS

    def test_random_tokens_follow_the_seed(self, lens, batch, text_ids):
        first, again, other = (reconstruct(lens, batch, text_ids, "random_tokens", seed) for seed in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


class TestMeanAndUntrained:
    def test_mean_is_the_training_mean(self, lens, batch, text_ids):
        assert torch.equal(reconstruct(lens, batch, text_ids, "mean"), lens.mean.expand(len(LENGTHS), -1))

    @pytest.mark.parametrize("training", ["frozen", "full", "lora"])
    def test_untrained_is_the_lens_before_training(self, batch, text_ids, training):
        settings = {"training": training, "injection_layers": 1, "encoder_prompt": "w5 <text> w6"}
        trained, fresh = disturb(tiny_lens(**settings)), tiny_lens(**settings)
        expected = fresh.encode(fresh.decode_ids(batch["activations"]))
        untrained = reconstruct(trained, batch, text_ids, "untrained")
        torch.testing.assert_close(untrained, expected)
        assert not torch.allclose(untrained, trained.encode(trained.decode_ids(batch["activations"])))

    def test_untrained_copies_no_weights_and_draws_no_random_number(self, batch):
        lens = disturb(tiny_lens(training="full"))
        state = torch.random.get_rng_state()
        untrained = Controls(lens, ["untrained"], batch["document"]).untrained
        assert torch.equal(torch.random.get_rng_state(), state)
        table = lens.subject.stream.input_embedding.weight
        assert untrained.encoder.base.get_input_embeddings().weight.data_ptr() == table.data_ptr()


class TestResidualVQ:
    def test_is_the_quantised_activation_in_the_units_of_the_subject(self, lens, batch, text_ids, quantiser):
        quantised = reconstruct(lens, batch, text_ids, "residual_vq", quantiser=quantiser)
        torch.testing.assert_close(quantised[[1, 4]], batch["activations"][[1, 4]])
        errors = (quantised - batch["activations"]).norm(dim=1)
        assert (errors <= (lens.mean - batch["activations"]).norm(dim=1) + 1e-4).all()

    def test_needs_a_quantiser(self, lens, batch):
        with pytest.raises(ValueError, match="needs a quantiser, got None"):
            Controls(lens, ["residual_vq"], batch["document"])


def test_an_unknown_control_is_an_error(lens, batch):
    with pytest.raises(ValueError, match="controls: got the unknown name 'median'; choose from mean, shuffled"):
        Controls(lens, ["median"], batch["document"])


def test_all_controls_give_one_reconstruction_a_row(lens, batch, text_ids, quantiser):
    controls = Controls(lens, list(CONTROLS), batch["document"], quantiser=quantiser)
    reconstructions = controls.reconstruct(batch, slice(0, len(LENGTHS)), text_ids)
    assert list(reconstructions) == list(CONTROLS)
    assert all(of_name.shape == batch["activations"].shape for of_name in reconstructions.values())

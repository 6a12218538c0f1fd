"""Decoder, encoder and lens: generation, reading, gradients, shared weights, checkpointing."""

import pytest
import torch
from live_bytes import LiveBytes, peak_bytes
from tiny_lenses import (
    INJECTED,
    LAYER,
    PROMPTS,
    activations,
    disturb,
    gradients,
    keys,
    tiny_lens,
    tiny_tokenizer,
    trainable,
)
from tiny_models import FAMILIES, NUM_LAYERS, VOCAB_SIZE, WIDTH, tiny_model

from consistency_lens import ConsistencyLensModel
from consistency_lens.cached_passes import prompt_cache
from consistency_lens.lens_clone import embed_sampled
from consistency_lens.straight_through import fold_in, gumbel_noise
from consistency_lens.token_logits import TokenLogits

TAU = 0.7
CACHE_FAMILIES = ("llama", "gpt2", "gemma2", "gemma3", "gpt_neox")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
TEXT_IDS = torch.tensor([[9, 10, 11, 12], [20, 21, 22, 23], [5, 6, 7, 8]])


def loss_of(output) -> torch.Tensor:
    """A scalar that depends on every reconstruction and every logit of a pass."""
    return output.reconstruction.square().mean() + output.logits.float().log_softmax(-1)[..., 3:50].square().mean()


def soft_loss(lens: ConsistencyLensModel) -> torch.Tensor:
    return loss_of(lens(activations(), noise_keys=keys(), tau=TAU))


def forced_loss(lens: ConsistencyLensModel) -> torch.Tensor:
    return loss_of(lens(activations(), text_ids=TEXT_IDS))


PATHS = {"soft": soft_loss, "teacher_forced": forced_loss}


class TestSoftGeneration:
    @pytest.mark.parametrize("settings", [{}, PROMPTS, INJECTED], ids=["bare", "prompts", "injected"])
    @pytest.mark.parametrize("family", CACHE_FAMILIES)
    def test_cached_equals_uncached_in_tokens_logits_and_gradients(self, family, settings):
        # a window shorter than the prompt, where the family has one
        model = {"sliding_window": 3} if family.startswith("gemma") else {}
        lens = disturb(tiny_lens(family, "full", model, **settings))
        results = []
        for use_cache in (True, False):
            text = lens.decoder.generate_soft(activations(), keys(), 5, TAU, use_cache=use_cache)
            reconstruction = lens.encoder(lens.encoder.embed_text(text, keys(), TAU))
            loss = reconstruction.square().mean() + text.logits.log_softmax(-1)[..., 3:50].square().mean()
            results.append((text, gradients(loss, lens)))
        (cached, cached_gradients), (plain, plain_gradients) = results
        assert torch.equal(cached.token_ids, plain.token_ids)
        torch.testing.assert_close(cached.logits, plain.logits, **CLOSE)
        assert all(gradient is not None for gradient in plain_gradients.values())
        torch.testing.assert_close(cached_gradients, plain_gradients, **CLOSE)

    def test_noise_that_is_kept_changes_no_gradient(self):
        lens = disturb(tiny_lens("llama", "full", **PROMPTS))
        kept = gradients(soft_loss(lens), lens)
        with pytest.MonkeyPatch.context() as patch:
            lens.decoder.keeps_noise = False
            patch.setattr("consistency_lens.lens_decoder.room_for_noise", None)  # it is not even asked
            made_again = gradients(soft_loss(lens), lens)
        torch.testing.assert_close(kept, made_again, rtol=0, atol=0)

    def test_without_a_prefix_cached_equals_uncached(self):
        lens = tiny_lens()
        lens.decoder.config.prefix_ids = []
        lens.decoder.prefix_embeddings = None
        texts = [lens.decoder.generate_soft(activations(), keys(), 4, use_cache=cached) for cached in (True, False)]
        torch.testing.assert_close(texts[0].logits, texts[1].logits, **CLOSE)

    @pytest.mark.parametrize("family", CACHE_FAMILIES)
    def test_prefix_run_once_equals_a_run_for_each_row(self, family):
        decoder = tiny_lens(family, **PROMPTS).decoder
        prefix, _ = decoder.prompt()
        once, last = prompt_cache(decoder.base.get_decoder(), prefix, 3)
        output = decoder.base.get_decoder()(inputs_embeds=prefix.expand(3, -1, -1), use_cache=True)
        rows = output.past_key_values
        torch.testing.assert_close(last.expand(3, -1), output.last_hidden_state[:, -1], **CLOSE)
        assert len(once.layers) == NUM_LAYERS
        for layer, expected in zip(once.layers, rows.layers, strict=True):
            torch.testing.assert_close(layer.keys, expected.keys, **CLOSE)
            torch.testing.assert_close(layer.values, expected.values, **CLOSE)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_teacher_forcing_gives_the_logits_of_generation(self, family):
        lens = disturb(tiny_lens(family, **INJECTED))
        text = lens.decoder.generate_soft(activations(), keys(), 5)
        assert len(text.token_ids.unique()) > 3
        torch.testing.assert_close(lens.decoder(activations(), text.token_ids), text.logits, **CLOSE)

    @pytest.mark.parametrize("settings", [{}, INJECTED], ids=["bare", "injected"])
    def test_text_depends_on_the_activation(self, settings):
        lens = disturb(tiny_lens(**settings))
        ids = lens.decode(activations(8)).token_ids
        assert len(ids.unique(dim=0)) > 4

    def test_each_injection_layer_reaches_the_logits(self):
        lens = disturb(tiny_lens(**INJECTED))
        logits = lens.decoder(activations(), TEXT_IDS)
        for injection in lens.decoder.injections:
            with torch.no_grad():
                injection.bias.add_(1.0)
            changed = lens.decoder(activations(), TEXT_IDS)
            assert (changed - logits).abs().max() > 1e-3
            logits = changed

    def test_greedy_is_deterministic_and_the_argmax(self):
        lens = tiny_lens()
        text = lens.decoder.generate_soft(activations(), None, 4)
        assert torch.equal(text.token_ids, text.logits.argmax(-1))
        assert torch.equal(text.token_ids, lens.decode_ids(activations()))

    def test_keys_sample_and_other_keys_sample_otherwise(self):
        lens = tiny_lens()
        first, again, other = (lens.decode_ids(activations(), keys=keys(draw=draw)) for draw in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_a_row_is_independent_of_its_batch(self):
        lens = tiny_lens()
        batch = lens.decode_ids(activations(5), keys=keys(5))
        for row in range(5):
            alone = lens.decode_ids(activations(5)[row : row + 1], keys=keys(5)[row : row + 1])
            assert torch.equal(alone[0], batch[row])

    def test_tau_shapes_gradients_and_never_the_sample(self):
        lens = tiny_lens()
        outputs = [lens(activations(), noise_keys=keys(), tau=tau) for tau in (0.3, 2.0)]
        torch.testing.assert_close(outputs[0].reconstruction, outputs[1].reconstruction)
        projections = [gradients(out.reconstruction.sum(), lens)["decoder.projection.weight"] for out in outputs]
        assert not torch.allclose(*projections)

    def test_the_encoder_reads_the_gumbel_softmax_that_the_tokens_were_drawn_from(self):
        lens = tiny_lens("gemma3")
        text = lens.decoder.generate_soft(activations(), keys(), 3, TAU)
        logits = text.logits.detach().requires_grad_()
        step_keys = fold_in(keys()[:, None], torch.arange(3))
        noisy = logits + gumbel_noise(step_keys.flatten(), VOCAB_SIZE).view_as(logits)
        assert torch.equal(noisy.argmax(-1), text.token_ids)
        expected = (noisy / TAU).softmax(-1) @ lens.encoder.embed_ids(torch.arange(VOCAB_SIZE))
        soft = lens.encoder.embed_text(text._replace(predictions=TokenLogits(logits.flatten(0, 1))), keys(), TAU)
        weights = torch.linspace(-1, 1, soft.numel()).view_as(soft)
        (found,) = torch.autograd.grad((soft * weights).sum(), logits)
        torch.testing.assert_close(found, torch.autograd.grad((expected * weights).sum(), logits)[0], **CLOSE)

    @pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
    def test_soft_embeddings_are_scaled_as_the_embedding_layer_scales_them(self, family):
        lens = tiny_lens(family, "full")
        text = lens.decoder.generate_soft(activations(), keys(), 4)
        flat, logits = text.token_ids.flatten(), text.logits.flatten(0, 1)
        looked_up = lens.decoder.base.get_input_embeddings()(flat)
        torch.testing.assert_close(embed_sampled([lens.decoder], logits, flat, None, TAU)[0], looked_up)
        assert embed_sampled([lens.decoder], logits, flat, None, TAU)[0].requires_grad
        soft = lens.encoder.embed_text(text, keys(), TAU)
        torch.testing.assert_close(soft, lens.encoder.embed_ids(text.token_ids))

    def test_narrow_embeddings_are_widened_to_the_activation(self):
        decoder = tiny_lens("opt_350m").decoder
        widen, table = decoder.base.model.decoder.project_in, decoder.token_embedding.weight
        given = widen(torch.randn(400, table.shape[1]))  # what can be reached at all
        given *= WIDTH**0.5 / given.norm(dim=-1, keepdim=True)
        slots = decoder.slot_embedding(given * decoder.normaliser.rms + decoder.normaliser.mean)[:, 0]
        torch.testing.assert_close(torch.cosine_similarity(widen(slots), given), torch.ones(400))

    @pytest.mark.parametrize("family", ["llama", "gemma3", "opt_350m"])
    def test_a_mean_activation_enters_the_slot_with_the_norm_of_a_token_embedding(self, family):
        decoder = tiny_lens(family).decoder
        slots = decoder.slot_embedding(activations(400) * decoder.normaliser.rms / 1.5 + decoder.normaliser.mean)
        tokens = decoder.base.get_input_embeddings()(torch.arange(VOCAB_SIZE))
        torch.testing.assert_close(slots.norm(dim=-1).mean(), tokens.norm(dim=-1).mean(), rtol=0.05, atol=0)

    @pytest.mark.parametrize("length", [1, 7])
    def test_length_is_as_asked_for(self, length):
        decoded = tiny_lens().decode(activations(2), num_text_tokens=length)
        assert decoded.token_ids.shape == (2, length)
        assert len(decoded.texts[0].split()) == length

    @pytest.mark.parametrize("length", [0, -1])
    def test_length_below_one_is_refused(self, length):
        lens = tiny_lens()
        with pytest.raises(ValueError, match=f"num_text_tokens must be at least 1, got {length}"):
            lens.decode(activations(), num_text_tokens=length)
        with pytest.raises(ValueError, match=f"num_text_tokens must be at least 1, got {length}"):
            lens(activations(), num_text_tokens=length)


class TestGradients:
    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize("training", ["full", "frozen"])
    @pytest.mark.parametrize("family", ["llama", "gemma3"])
    def test_every_trainable_tensor_gets_a_gradient(self, family, training, path):
        lens = tiny_lens(family, training, **INJECTED)
        for name, gradient in gradients(PATHS[path](lens), lens).items():
            assert gradient is not None and gradient.abs().max() > 0, name

    @pytest.mark.parametrize("path", PATHS)
    def test_every_lora_matrix_gets_a_gradient(self, path):
        pytest.importorskip("peft")
        lens = tiny_lens("llama", "lora", **INJECTED)
        optimizer = torch.optim.AdamW(trainable(lens).values(), lr=1e-2)
        first = gradients(PATHS[path](lens), lens)
        # B starts at zero, so A has a gradient, of zero, until B has moved
        assert all(gradient is not None for gradient in first.values())
        assert all(gradient.abs().max() > 0 for name, gradient in first.items() if ".lora_A." not in name)
        assert any(".lora_A." in name for name in first)
        PATHS[path](lens).backward()
        optimizer.step()
        for name, gradient in gradients(PATHS[path](lens), lens).items():
            assert gradient.abs().max() > 0, name

    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize("training", ["full", "lora", "frozen"])
    def test_optimizer_steps_move_what_is_trained_and_nothing_else(self, training, path):
        pytest.importorskip("peft")
        lens = tiny_lens("llama", training, **INJECTED).train()
        subject = lens.subject.model
        assert not any(parameter.requires_grad for parameter in subject.parameters())
        before = {name: parameter.detach().clone() for name, parameter in lens.named_parameters()}
        subject_before = {name: tensor.clone() for name, tensor in subject.state_dict().items()}
        optimizer = torch.optim.AdamW(lens.parameters(), lr=1e-2, weight_decay=0.0)
        for _ in range(2 if training == "lora" else 1):
            optimizer.zero_grad()
            PATHS[path](lens).backward()
            optimizer.step()
        for name, parameter in lens.named_parameters():
            assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
        torch.testing.assert_close(subject.state_dict(), subject_before, rtol=0, atol=0)

    def test_encoder_may_read_another_text_than_the_one_scored(self):
        lens = tiny_lens()
        other = TEXT_IDS.flip(0)[:, :3]
        output = lens(activations(), text_ids=TEXT_IDS, encoder_text_ids=other)
        torch.testing.assert_close(output.reconstruction, lens.encode(other))
        torch.testing.assert_close(output.logits, lens.decoder(activations(), TEXT_IDS))

    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize("training", ["full", "frozen"])
    def test_bfloat16_autocast(self, training, path):
        lens = tiny_lens("llama", training, **INJECTED)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = PATHS[path](lens)
        found = gradients(loss, lens)
        assert all(gradient is not None and gradient.isfinite().all() for gradient in found.values())

    @pytest.mark.parametrize("path", PATHS)
    def test_bfloat16_weights(self, path):
        lens = tiny_lens("llama", "full", **INJECTED).to(torch.bfloat16)
        output = lens(activations(), noise_keys=keys()) if path == "soft" else lens(activations(), TEXT_IDS)
        assert output.reconstruction.dtype == torch.float32
        assert all(gradient is not None for gradient in gradients(loss_of(output), lens).values())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
class TestGradientCheckpointing:
    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize("training", ["lora", "full"])
    def test_gradients_are_those_without_checkpointing(self, training, path):
        pytest.importorskip("peft")
        lens = disturb(tiny_lens("llama", training, **INJECTED)).train()
        plain = gradients(PATHS[path](lens), lens)
        lens.gradient_checkpointing_enable()
        torch.testing.assert_close(gradients(PATHS[path](lens), lens), plain, **CLOSE)

    # some switch a cache off in the block, some in the model, some not at all
    @pytest.mark.parametrize("family", ["gpt2", "gemma3", "falcon", "bloom", "gptj", "gpt_neo", "opt"])
    @pytest.mark.parametrize("prompts", [PROMPTS, {}], ids=["prompts", "slots"])
    def test_every_family_keeps_its_context(self, family, prompts, caplog):
        lens = disturb(tiny_lens(family, "full", **prompts)).train()
        plain = gradients(PATHS["soft"](lens), lens)
        lens.gradient_checkpointing_enable()
        caplog.clear()
        torch.testing.assert_close(gradients(PATHS["soft"](lens), lens), plain, **CLOSE)
        assert "Setting" not in caplog.text  # `past_key_values=None`, as transformers says when it drops a cache

    @pytest.mark.parametrize("training", ["lora", "full"])
    def test_the_peak_of_memory_at_16_tokens_is_less_than_half(self, training):
        pytest.importorskip("peft")
        lens = tiny_lens("llama", training, **PROMPTS, num_text_tokens=16).train()
        lens.decoder.attends_in_place = False  # which saves a part of it too, on a CPU (`test_text_attention`)
        PATHS["soft"](lens).backward()  # makes the gradients, which stay
        plain = peak_bytes(lambda: PATHS["soft"](lens).backward(), lens)
        lens.gradient_checkpointing_enable()
        checkpointed = peak_bytes(lambda: PATHS["soft"](lens).backward(), lens)
        assert checkpointed < 0.5 * plain

    def test_what_is_kept_grows_with_the_tokens_and_not_with_their_square(self):
        lens = tiny_lens("llama", "full", **PROMPTS).train()
        lens.gradient_checkpointing_enable()
        kept = {}
        for length in (4, 16, 64):
            with LiveBytes(lens) as live:
                text = lens.decoder.generate_soft(activations(), keys(), length)
            kept[length] = live.now
            del text
        assert kept[64] - kept[16] < 4.5 * (kept[16] - kept[4])

    def test_text_depends_on_the_activation_in_train_mode(self):
        lens = disturb(tiny_lens("llama", "full", **PROMPTS))
        expected = lens.decode_ids(activations(8), keys=keys(8))
        assert len(expected.unique(dim=0)) > 4
        lens.train().gradient_checkpointing_enable()
        assert torch.equal(lens.decode_ids(activations(8), keys=keys(8)), expected)
        assert torch.equal(lens(activations(8), noise_keys=keys(8)).text_ids, expected)
        with torch.no_grad():
            assert torch.equal(lens(activations(8), noise_keys=keys(8)).text_ids, expected)

    def test_decoding_leaves_every_module_in_its_mode(self):
        lens = tiny_lens().train()
        lens.encoder.eval()
        lens.decoder.projection.eval()
        modes = {name: module.training for name, module in lens.named_modules()}
        lens.decode(activations())
        assert {name: module.training for name, module in lens.named_modules()} == modes


class TestSharedWeights:
    @pytest.mark.parametrize("training", ["lora", "frozen"])
    def test_clones_share_storage_with_the_subject(self, training):
        pytest.importorskip("peft")
        lens = tiny_lens("llama", training)
        own = {parameter.data_ptr() for parameter in lens.subject.model.parameters()}
        for clone in (lens.decoder, lens.encoder):
            base = {name: p for name, p in clone.base.named_parameters() if ".lora_" not in name}
            assert base and all(parameter.data_ptr() in own for parameter in base.values())

    def test_full_clones_share_nothing(self):
        lens = tiny_lens("llama", "full")
        storages = [
            {parameter.data_ptr() for parameter in model.parameters()}
            for model in (lens.subject.model, lens.decoder.base, lens.encoder.base)
        ]
        assert not (storages[0] & storages[1] or storages[0] & storages[2] or storages[1] & storages[2])

    def test_adapters_are_separate_over_the_same_base_tensors(self):
        pytest.importorskip("peft")
        lens = disturb(tiny_lens("llama", "lora"))
        decoder, encoder = (
            dict(clone.base.get_decoder().named_parameters()) for clone in (lens.decoder, lens.encoder)
        )
        shared = decoder.keys() & encoder.keys()
        assert any(".lora_" in name for name in shared) and any(".lora_" not in name for name in shared)
        for name in shared:
            assert (decoder[name] is encoder[name]) != (".lora_" in name), name
        assert not any(".lora_" in name for name, _ in lens.subject.model.named_parameters())

    def test_an_adapter_changes_only_its_own_tree(self):
        pytest.importorskip("peft")
        lens = tiny_lens("llama", "lora")
        ids = torch.tensor([[1, 9, 10, 11]])
        subject_logits, reconstruction = lens.subject.model(ids).logits, lens.encode("w9 w10")
        logits = lens.decoder(activations(), TEXT_IDS)
        disturb(lens.decoder, 0.5)
        assert not torch.allclose(lens.decoder(activations(), TEXT_IDS), logits, atol=1e-2)
        assert torch.equal(lens.subject.model(ids).logits, subject_logits)
        assert torch.equal(lens.encode("w9 w10"), reconstruction)

    @pytest.mark.parametrize("training", ["full", "frozen"])
    def test_moving_the_lens_moves_the_subject_and_keeps_the_sharing(self, training):
        lens = tiny_lens("llama", training).to(torch.float64)
        subject = dict(lens.subject.model.named_parameters())
        assert all(parameter.dtype == torch.float64 for parameter in subject.values())
        shared = {p is subject[name] for name, p in lens.decoder.base.named_parameters()}
        assert shared == {training == "frozen"}

    @pytest.mark.gpu
    def test_a_subject_on_a_gpu_gives_a_lens_on_it(self):
        subject = tiny_model("llama").cuda()
        lens = ConsistencyLensModel.from_subject(subject, tiny_tokenizer(), LAYER, training="full", **INJECTED)
        assert {tensor.device.type for tensor in (*lens.parameters(), *lens.buffers())} == {"cuda"}

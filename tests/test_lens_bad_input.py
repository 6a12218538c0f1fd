"""What a lens does not take, and what it says then."""

import pytest
import torch
from tiny_lenses import NUM_TEXT_TOKENS, PROMPTS, activations, tiny_lens
from tiny_models import NUM_LAYERS, WIDTH

TEXT_IDS = torch.tensor([[9, 10, 11, 12], [20, 21, 22, 23], [5, 6, 7, 8]])
NO_ROWS = torch.zeros(0, WIDTH)
LONG_PROMPTS = {**PROMPTS, "decoder_prompt": "w3 w4 w5 w6 w7 <embed> w8"}


class TestBadInput:
    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"layer": NUM_LAYERS}, rf"layer must lie in 0..{NUM_LAYERS - 1} .* got {NUM_LAYERS}"),
            ({"layer": -1}, "layer must lie in .* got -1"),
            ({"num_text_tokens": 0}, "num_text_tokens must be at least 1, got 0"),
            ({"training": "half"}, "training must be one of full, lora, frozen, got 'half'"),
            ({"decoder_prompt": "no slot"}, "must hold the slot <embed> exactly once, got 'no slot'"),
            ({"encoder_prompt": "<text> <text>"}, "must hold the slot <text> exactly once"),
            ({"injection_layers": NUM_LAYERS}, rf"injection_layers must lie in 0..{NUM_LAYERS - 1}, got {NUM_LAYERS}"),
            ({"injection_layers": -1}, "injection_layers must lie in .* got -1"),
            ({"output_layer": NUM_LAYERS + 1}, rf"output_layer must lie in -1..{NUM_LAYERS}, got {NUM_LAYERS + 1}"),
            ({"output_layer": -2}, "output_layer must lie in .* got -2"),
        ],
    )
    def test_is_a_one_line_error(self, arguments, message):
        with pytest.raises(ValueError, match=message) as error:
            tiny_lens(**arguments)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("shape", [(2, WIDTH + 1), (2, 3, WIDTH), (0, WIDTH)])
    def test_activations_of_another_shape_are_refused(self, shape):
        with pytest.raises(ValueError, match=rf"must be \(B, {WIDTH}\), got \({shape[0]}, "):
            tiny_lens().decode(torch.zeros(shape))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"activations": NO_ROWS}, "decode: got no activations; pass at least one"),
            ({"activations": NO_ROWS, "sample": True}, "decode: got no activations"),
            ({"activations": NO_ROWS, "text_ids": TEXT_IDS[:0]}, "decode: got no activations"),
            ({"text_ids": TEXT_IDS[:0]}, "encode: got no texts; pass at least one"),
        ],
    )
    @pytest.mark.parametrize("prompts", [{}, PROMPTS, LONG_PROMPTS], ids=["bare", "prompts", "long"])
    def test_a_batch_of_nothing_is_a_one_line_error(self, prompts, arguments, message):
        with pytest.raises(ValueError, match=message) as error:
            tiny_lens(**prompts)(**arguments)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [({}, "neither activations nor text_ids"), ({"activations": NO_ROWS}, "needs both activations")],
    )
    def test_a_call_without_what_it_reads_is_a_one_line_error(self, arguments, message):
        lens = tiny_lens()
        with pytest.raises(ValueError, match=message) as error:
            (lens.decoder if arguments else lens)(**arguments)
        assert "\n" not in str(error.value)

    def test_a_lens_without_tokenizer_says_how_to_set_it(self):
        lens = tiny_lens()
        lens.tokenizer = None
        assert lens.decode_ids(activations()).shape == (3, NUM_TEXT_TOKENS)
        with pytest.raises(ValueError, match="set lens.tokenizer"):
            lens.decode(activations())

"""Configurations: what they refuse, and that they come back from a file as they were."""

import json

import pytest
from transformers import AutoConfig

from consistency_lens import ConsistencyLensConfig, LensDecoderConfig, LensEncoderConfig

SHARED = {
    "base_model_name_or_path": "someone/subject",
    "base_model_revision": "0123abc",
    "base_config": {"model_type": "llama", "hidden_size": 32},
    "layer": 2,
    "num_text_tokens": 5,
}
CLONE = {
    **SHARED,
    "training": "lora",
    "lora": {"r": 4, "target_modules": ["q_proj"]},
    "prompt": "the words <embed>",
    "prefix_ids": [1, 5],
    "suffix_ids": [6],
    "trainable_prompt": False,
}


def fields(config, names) -> dict:
    return {name: getattr(config, name) for name in names}


@pytest.mark.parametrize(
    "config_class, own",
    [(LensDecoderConfig, {"injection_layers": 2}), (LensEncoderConfig, {"output_layer": -1})],
)
def test_a_clones_configuration_comes_back_from_its_folder(tmp_path, config_class, own):
    config_class(**CLONE, **own).save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is config_class
    assert fields(loaded, {**CLONE, **own}) == {**CLONE, **own}


def test_a_lens_configuration_comes_back_with_both_parts(tmp_path):
    decoder = LensDecoderConfig(**CLONE, injection_layers=1)
    encoder = LensEncoderConfig(**{**CLONE, "prefix_ids": [7]}, output_layer=0)
    ConsistencyLensConfig(decoder, encoder).save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is ConsistencyLensConfig
    assert fields(loaded.decoder, CLONE) == CLONE and loaded.decoder.injection_layers == 1
    assert loaded.encoder.prefix_ids == [7] and loaded.encoder.output_layer == 0
    assert fields(loaded, SHARED) == SHARED
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "consistency_lens"


@pytest.mark.parametrize("config_class", [LensDecoderConfig, LensEncoderConfig])
@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"training": "qlora"}, "training must be one of full, lora, frozen, got 'qlora'"),
        ({"layer": -1}, "layer must be 0 or more .* got -1"),
        ({"num_text_tokens": 0}, "num_text_tokens must be at least 1, got 0"),
    ],
)
def test_bad_values_are_one_line_errors(config_class, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        config_class(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, value",
    [
        ("base_model_name_or_path", "another/subject"),
        ("base_model_revision", "fff"),
        ("layer", 1),
        ("num_text_tokens", 6),
    ],
)
def test_two_halves_that_do_not_belong_together_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}: the decoder has .* and the encoder {value!r}"):
        ConsistencyLensConfig(LensDecoderConfig(**SHARED), LensEncoderConfig(**{**SHARED, name: value}))

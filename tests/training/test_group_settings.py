import pytest
import torch
from lens_runs import tiny_cache, tiny_lens
from test_arguments import arguments
from torch import nn

from consistency_lens.training.controlled_trainer import check_control
from consistency_lens.training.group_settings import GROUPS, group_values, of_group
from consistency_lens.training.parameter_groups import clip_groups, group_of, parameter_groups

LORA = {"training": "lora", "lora": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}}
PROMPTS = {"decoder_prompt": "w3 <embed> w5", "encoder_prompt": "w7 <text> w8", "injection_layers": 1}


@pytest.fixture(scope="module")
def lenses(tmp_path_factory):
    subject, tokenizer, cache = tiny_cache(tmp_path_factory.mktemp("cache"))
    return {
        clones["training"]: tiny_lens(subject, tokenizer, cache, **clones, **PROMPTS)
        for clones in ({"training": "full"}, LORA, {"training": "frozen"})
    }


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("decoder.base.model.layers.0.mlp.up_proj.weight", "decoder_base"),
        ("decoder.base.model.encoder.layers.0.weight", "decoder_base"),  # a subject's own words say nothing
        ("module.encoder.base.layers.0.q_proj.lora_A.lens.weight", "encoder_lora"),
        ("_orig_mod.module.decoder.injections.0.bias", "decoder_projections"),
        ("encoder.output_map.weight", "encoder_projections"),
        ("encoder.suffix_embeddings", "encoder_prompts"),
    ],
)
def test_a_parameter_belongs_to_one_group(name, group):
    assert group_of(name) == group


@pytest.mark.parametrize("clones", ["full", "lora", "frozen"])
def test_every_trained_parameter_is_in_the_group_of_its_name(lenses, tmp_path, clones):
    lens = lenses[clones]
    names = {id(parameter): name for name, parameter in lens.named_parameters()}
    groups = parameter_groups(lens, arguments(tmp_path, weight_decay=0.1))
    listed = [(names[id(parameter)], group["name"]) for group in groups for parameter in group["params"]]
    assert sorted(name for name, _ in listed) == sorted(n for n, p in lens.named_parameters() if p.requires_grad)
    assert all(group_of(name) == group for name, group in listed)
    kinds = {"full": {"base"}, "lora": {"lora"}, "frozen": set()}[clones] | {"projections", "prompts"}
    assert {group.partition("_")[2] for _, group in listed} == kinds
    # the rate that is logged as `learning_rate` is that of the decoder, where it is trained
    assert (
        groups[0]["name"] == {"full": "decoder_base", "lora": "decoder_lora", "frozen": "decoder_projections"}[clones]
    )
    assert [g["name"] for g in groups] == sorted((g["name"] for g in groups), key=GROUPS.index)


def settings_of(lens, args):
    """group -> (rate, decay of its matrices); the other parameters never decay."""
    groups = parameter_groups(lens, args)
    for group in groups:
        if any(parameter.ndim < 2 for parameter in group["params"]):
            assert group["weight_decay"] == 0
    matrices = [group for group in groups if group["params"][0].ndim >= 2]
    return {group["name"]: (group["lr"], group["weight_decay"]) for group in matrices}


def test_groups_have_the_rates_of_their_clone_unless_they_have_their_own(lenses, tmp_path):
    common = {"learning_rate": 1e-3, "encoder_learning_rate": 2e-3, "weight_decay": 0.1}
    assert settings_of(lenses["lora"], arguments(tmp_path, **common)) == {
        "decoder_lora": (1e-3, 0.1), "encoder_lora": (2e-3, 0.1), "decoder_projections": (1e-3, 0.0),
        "encoder_projections": (2e-3, 0.0), "decoder_prompts": (1e-3, 0.0), "encoder_prompts": (2e-3, 0.0),
    }  # fmt: skip
    own = {
        "projection_learning_rate": 3e-3, "group_learning_rates": {"prompts": 4e-3, "lora": 5e-3, "encoder_lora": 0.0},
        "group_weight_decay": ["encoder_lora 0.5", "decoder_projections 0.01"],
    }  # fmt: skip
    assert settings_of(lenses["lora"], arguments(tmp_path, **common, **own)) == {
        "decoder_lora": (5e-3, 0.1), "encoder_lora": (0.0, 0.5), "decoder_projections": (3e-3, 0.01),
        "encoder_projections": (3e-3, 0.0), "decoder_prompts": (4e-3, 0.0), "encoder_prompts": (4e-3, 0.0),
    }  # fmt: skip


def test_the_own_name_of_a_group_wins_over_its_kind():
    values = group_values("group_learning_rates", ["base 1", "encoder_base 2"])
    assert [of_group(values, group) for group in ("decoder_base", "encoder_base", "decoder_lora")] == [1, 2, None]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"group_learning_rates": ["prompt 1e-3"]},
            "no group is called 'prompt'; the groups are decoder_base, encoder_b",
        ),
        ({"group_learning_rates": ["prompts"]}, "each is '<group> <number>', such as 'prompts 1e-3', got 'prompts'"),
        ({"group_learning_rates": ["prompts 1e-3 2"]}, "each is '<group> <number>'"),
        ({"group_learning_rates": ["prompts high"]}, "each is '<group> <number>'"),
        ({"group_learning_rates": [""]}, "no group is called ''"),
        ({"group_weight_decay": {"lora": -0.1}}, "group_weight_decay: must be 0 or more, got 'lora -0.1'"),
        ({"group_max_grad_norm": ["base nan"]}, "must be 0 or more"),
        ({"group_learning_rates": ["lora 1", "lora 2"]}, "lora is set twice"),
        ({"unfreeze": ["lora"]}, "unfreeze: each is '<group> <when>"),
        ({"unfreeze": ["lora 5s hold 3s"]}, "unfreeze: each is '<group> <when>"),
        ({"unfreeze": ["lora soon"]}, "not a duration: 'soon'"),
        ({"unfreeze": ["clones 5s"]}, "unfreeze: no group is called 'clones'"),
        ({"unfreeze": ["lora 5s", "lora 6s"]}, "lora is named twice"),
        ({"ema_decay": 1.0}, "ema_decay must lie in 0..1, 1 left out"),
    ],
)
def test_mistakes_are_named(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        arguments(tmp_path, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"group_learning_rates": ["lora 1e-3"]},
            "this lens trains no lora; it trains decoder_base, encoder_base",
        ),
        ({"group_max_grad_norm": ["encoder_lora 1"]}, "group_max_grad_norm: this lens trains no encoder_lora"),
        ({"unfreeze": ["lora 5s"]}, "unfreeze: this lens trains no lora"),
        ({"unfreeze": ["base 5%", "projections 1s", "prompts 0.01e"]}, "unfreeze: nothing would train at first"),
        ({"unfreeze": ["base 5s"], "lr_scheduler_type": "greedy", "eval_strategy": "steps"}, "take another"),
    ],
)
def test_what_does_not_fit_the_lens_is_named(lenses, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        check_control(lenses["full"], arguments(tmp_path, **settings))


def test_a_start_at_once_is_no_standstill(lenses, tmp_path):
    check_control(lenses["full"], arguments(tmp_path, unfreeze=["base 5s", "projections 0s", "prompts 1s"]))


def test_a_group_that_would_never_train_is_found_before_the_data(tmp_path):
    args = arguments(tmp_path, unfreeze=["base 9s", "prompts 3e"], max_steps=10)
    args.check_stages()
    args.max_steps = 9
    with pytest.raises(ValueError, match="unfreeze: base would train from step 9 on, but the run has 9"):
        args.check_stages()


def grouped(*norms):
    """A group for each norm, of two parameters whose gradients have that norm together."""
    groups = []
    for name, norm in zip(("decoder_base", "encoder_base", "decoder_prompts"), norms, strict=True):
        parameters = [nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(2, 3))]
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, norm / 10**0.5)
        groups.append({"name": name, "params": parameters})
    return groups


def norms_of(groups):
    return [float(torch.cat([p.grad.flatten() for p in group["params"]]).norm()) for group in groups]


def test_each_group_is_clipped_by_itself_and_the_rest_together():
    groups = grouped(3.0, 6.0, 4.0)
    total = clip_groups(groups, {"encoder_base": 1.5}, rest=1.0)
    assert float(total) == pytest.approx((9 + 36 + 16) ** 0.5)
    assert norms_of(groups) == pytest.approx([0.6, 1.5, 0.8], rel=1e-5)


def test_no_limit_leaves_gradients_and_none_at_all_are_no_error():
    groups = grouped(3.0, 6.0, 4.0)
    groups[1]["params"][0].grad = None
    clip_groups(groups, {"prompts": 0.0, "base": 100.0}, rest=0.1)
    assert norms_of([groups[0], groups[2]]) == pytest.approx([3.0, 4.0])
    for parameter in groups[0]["params"] + groups[1]["params"] + groups[2]["params"]:
        parameter.grad = None
    assert float(clip_groups(groups, {"base": 1.0}, rest=1.0)) == 0

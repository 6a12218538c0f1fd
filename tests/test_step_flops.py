"""The useful FLOPs of a step, and what a step takes on paper, against a step that is really made."""

import dataclasses
from pathlib import Path

import pytest
import torch
from flop_count import flops

from consistency_lens.data.on_the_fly import read_activations
from consistency_lens.training.lm_reference import SubjectReference
from consistency_lens.training.objectives import Gumbel, PolicyGradient, Step, WarmStart

BENCHMARKS = Path(__file__).parent / "benchmarks"
# narrow, so that heads and attention are a good part of a step
SIZES = {
    "vocab_size": 601, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 4, "tie_word_embeddings": True, "max_position_embeddings": 64,
}  # fmt: skip
CLONES = pytest.mark.parametrize("clones", ["lora", "full", "frozen"])


@pytest.fixture(scope="module")
def on_paper():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import step_on_paper

        yield step_on_paper


@pytest.fixture(scope="module")
def step_flops(on_paper):
    import step_flops

    return step_flops


@pytest.fixture(scope="module")
def shape(on_paper):
    import gpu_shapes

    return dataclasses.replace(gpu_shapes.TINY, sizes=SIZES, batch=64, length=40, num_text_tokens=16, positions=8)


def make_lens(shape, clones):
    lens = shape.make_lens("cpu", clones)
    lens.subject.check_one_token(256)
    lens.decoder.attends_in_place = False  # its products are not matrix products
    return lens


def make_objective(name, lens, **settings):
    reference = settings.pop("reference", SubjectReference(lens.subject))
    if name == "warm_start":
        return WarmStart(own_share=0.25)
    if name == "gumbel":
        return Gumbel(lens.subject, reference, "reverse", needs_entropy=False, **settings)
    return PolicyGradient(reference, straight_through=True)


def made(lens, objective, batch, read=True):
    """FLOPs of a step, with or without reading its activations."""
    known = read_activations(lens.subject, batch, keep_context=objective.needs_kl)

    def step():
        given = read_activations(lens.subject, batch, keep_context=objective.needs_kl) if read else known
        terms = objective(lens, lens, given, Step(0, 0)).terms
        sum(term for name, term in terms.items() if name != "mse" or not objective.needs_kl).backward()

    return flops(step, with_attention=True)


def parts_of(step_flops, shape, lens, name, batch):
    return step_flops.useful_parts(lens, name, step_flops.Texts.of(batch, shape.num_text_tokens))


@CLONES
def test_what_a_token_takes_is_what_the_blocks_make(step_flops, shape, clones):
    lens = make_lens(shape, clones)
    base, batch, length = lens.decoder.base, 3, 20
    blocks, width = list(base.get_decoder().layers), SIZES["hidden_size"]
    embeddings = torch.randn(batch, length, width, dtype=base.dtype, requires_grad=True)
    outputs = []
    token = step_flops.through(blocks, width, length)  # the keys that a mask hides are multiplied, too

    def run():
        outputs.append(base.get_decoder()(inputs_embeds=embeddings).last_hidden_state)

    assert flops(run, with_attention=True) == batch * length * token.forward
    assert flops(lambda: outputs[0].sum().backward(), with_attention=True) == batch * length * token.backward


@CLONES
def test_parts_of_a_gumbel_step_make_their_useful_flops(on_paper, step_flops, shape, clones):
    lens = make_lens(shape, clones)
    batch = on_paper.make_batch(shape, lens)
    useful = parts_of(step_flops, shape, lens, "gumbel", batch)
    settings = ({}, {"reference": None}, {"reference": None, "needs_kl": False})
    whole, judged, texts = (
        made(lens, make_objective("gumbel", lens, **which), batch, read=False) for which in settings
    )
    assert useful["reference"] <= whole - judged <= 1.1 * useful["reference"]  # which also begins, as every text does
    # the logits of the original come with the context, and the pass that is judged also runs the blocks below
    originals = 2 * SIZES["hidden_size"] * SIZES["vocab_size"] * shape.batch
    blocks, behind = list(lens.subject.model.get_decoder().layers), shape.length / 2
    below = shape.batch * step_flops.through(blocks[: lens.subject.layer + 1], SIZES["hidden_size"], behind).forward
    assert judged - texts == pytest.approx(useful["judgement"] - originals + below, rel=0.1)
    of_texts = useful["decoder"] + useful["encoder"] + useful["straight_through"]
    assert of_texts <= texts <= 1.1 * of_texts


@CLONES
@pytest.mark.parametrize("name", ["warm_start", "gumbel", "policy_gradient"])
def test_a_step_makes_the_useful_flops_and_few_others(on_paper, step_flops, shape, name, clones):
    lens = make_lens(shape, clones)
    batch = on_paper.make_batch(shape, lens)
    useful = parts_of(step_flops, shape, lens, name, batch)
    count = made(lens, make_objective(name, lens), batch)
    # what is made twice, a drawn text that is scored then above all, does not count
    most = {"warm_start": 1.2, "gumbel": 1.1, "policy_gradient": 1.4}[name]
    assert sum(useful.values()) <= count <= most * sum(useful.values())


def test_a_step_on_paper_takes_what_a_real_one_takes(on_paper, shape):
    small = dataclasses.replace(shape, batch=16, num_text_tokens=4)
    lens = make_lens(small, "lora")
    with on_paper.as_on_a_gpu(lens):
        batch = on_paper.make_batch(small, lens)
        real = on_paper.counted([lens, lens.subject.model], lambda: on_paper.our_terms(lens, batch))
    paper, useful = on_paper.on_paper(small)
    assert paper.flops == real.flops and paper.bytes == real.bytes
    # attention of a CPU lays out its output in another way than fake tensors say
    assert paper.kernels == pytest.approx(real.kernels, rel=0.01)
    assert useful <= paper.flops <= 1.3 * useful  # passes that a GPU does not divide, for each starts many kernels


def test_the_plan_s_step_on_paper_takes_what_a_real_one_takes(on_paper, shape):
    small = dataclasses.replace(shape, sizes=SIZES | {"num_hidden_layers": 2}, batch=32, num_text_tokens=2)
    lens = make_lens(small, "lora")
    plan, batch = on_paper.make_plan(lens), on_paper.make_plans_batch(small, lens)
    real = on_paper.counted([plan], lambda: plan(batch))
    assert on_paper.plan_on_paper(small).flops == real.flops
    # contexts of one sequence are padded less, so a batch of them alone flatters the plan
    few = dataclasses.replace(small, batch=small.positions)
    assert 0.7 < on_paper.plan_on_paper(few).flops / few.batch / (real.flops / small.batch) <= 1


def test_ways_of_a_gpu_are_taken_back(on_paper, shape):
    lens = make_lens(shape, "lora")
    before = on_paper.cached_passes.PASS_COST_ON_CPU, on_paper.straight_through.CHUNK_ELEMENTS_ON_CPU
    with on_paper.as_on_a_gpu(lens):
        assert on_paper.cached_passes.cost_on(torch.device("cpu")) == on_paper.cached_passes.PASS_COST
    assert before == (on_paper.cached_passes.PASS_COST_ON_CPU, on_paper.straight_through.CHUNK_ELEMENTS_ON_CPU)

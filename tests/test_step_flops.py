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
SIZES = {
    "vocab_size": 301, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": True, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def on_paper():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import step_on_paper

        yield step_on_paper


@pytest.fixture(scope="module")
def shape(on_paper):
    import gpu_shapes

    return dataclasses.replace(gpu_shapes.TINY, sizes=SIZES, batch=32, length=40, num_text_tokens=8, positions=8)


def make_lens(shape, clones):
    lens = shape.make_lens("cpu", clones)
    lens.subject.check_one_token(256)
    lens.decoder.attends_in_place = False
    return lens


@pytest.mark.parametrize("clones", ["lora", "full", "frozen"])
@pytest.mark.parametrize("name", ["warm_start", "gumbel", "policy_gradient"])
def test_a_step_makes_the_useful_flops_and_few_others(on_paper, shape, name, clones):
    lens = make_lens(shape, clones)
    reference = SubjectReference(lens.subject)
    objective = {
        "warm_start": WarmStart(own_share=0.25),
        "gumbel": Gumbel(lens.subject, reference, "reverse", needs_entropy=False),
        "policy_gradient": PolicyGradient(reference, straight_through=True),
    }[name]
    batch = on_paper.make_batch(shape, lens)

    def step():
        read = read_activations(lens.subject, batch, keep_context=objective.needs_kl)
        torch.stack(list(objective(lens, lens, read, Step(0, 0)).terms.values())).sum().backward()

    made, useful = flops(step), on_paper.useful_flops(lens, name, on_paper.Texts.of(batch, shape.num_text_tokens))
    assert useful <= made <= 1.1 * useful


def test_a_step_on_paper_takes_what_a_real_one_takes(on_paper, shape):
    lens = make_lens(shape, "lora")
    with on_paper.as_on_a_gpu(lens):
        batch = on_paper.make_batch(shape, lens)
        real = on_paper.counted([lens, lens.subject.model], lambda: on_paper.our_terms(lens, batch))
    paper, useful = on_paper.on_paper(shape)
    assert paper.flops == real.flops and paper.bytes == real.bytes
    # attention of a CPU lays out its output in another way than fake tensors say
    assert paper.kernels == pytest.approx(real.kernels, rel=0.01)
    assert useful <= paper.flops <= 1.2 * useful  # passes that a GPU does not divide, for each starts many kernels


def test_the_plan_s_step_on_paper_takes_what_a_real_one_takes(on_paper, shape):
    small = dataclasses.replace(shape, sizes=SIZES | {"num_hidden_layers": 2}, num_text_tokens=2)
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

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_lenses import tiny_lens, tiny_tokenizer
from tiny_models import WIDTH, tiny_model
from tuned_fits import (
    ACCUMULATION,
    BATCH,
    RIDGE_BLOCKS,
    SEQ_LEN,
    STEPS,
    TRAIN_BLOCKS,
    artifact,
    run_fit,
    write_inputs,
)

from consistency_lens.checkpoints import trainer as checkpoints
from consistency_lens.tuned_lens import fit, token_blocks
from consistency_lens.tuned_lens.fit_arguments import TunedLensTrainingArguments
from consistency_lens.tuned_lens.fitter import TunedLensFitter
from consistency_lens.tuned_lens.modeling_tuned_lens import TunedLens
from consistency_lens.tuned_lens.trainer import TunedLensTrainer

PASSES = 2 * 10  # of two epochs


class Killed(BaseException):
    """What no code catches."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """The folder of a fit that was not disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "lens"
    run_fit(inputs, folder)
    return folder


def die_at(patch, owner, name, call):
    """Has a function fail like a killed process at its n-th call, from 1 on."""
    original, calls = getattr(owner, name), []

    def dies(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            raise Killed
        return original(*args, **kwargs)

    patch.setattr(owner, name, dies)


def kill_fit(inputs, folder, owner, name, call, **changes):
    with pytest.MonkeyPatch.context() as patch:
        die_at(patch, owner, name, call)
        with pytest.raises(Killed):
            run_fit(inputs, folder, **changes)


def counted(monkeypatch, owner, name):
    """The calls of a function from now on."""
    original, calls = getattr(owner, name), []
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: calls.append(name) or original(*args, **kwargs))
    return calls


def no_pickle(folder):
    return not [path for path in folder.rglob("*") if path.suffix in (".pt", ".pth", ".bin", ".pkl", ".pickle")]


def test_a_fit_is_an_artifact_that_does_better_than_the_norm_lens(whole, inputs):
    names = {"config.json", "model.safetensors", "provenance.json", "metrics.json", "fit.json", "tokenizer.json"}
    assert names | {"blocks", "tokenizer_config.json"} == {path.name for path in whole.iterdir()} and no_pickle(whole)
    metrics = json.loads((whole / "metrics.json").read_text())
    assert metrics["mean_kl"]["tuned"] < metrics["mean_kl"]["calibrated"] < metrics["mean_kl"]["norm"]
    lens = TunedLens.from_pretrained(whole, base_model=str(inputs / "subject"))
    assert lens.provenance["schedule"]["steps_done"] == STEPS and lens.num_layers == 3


def test_two_fits_with_the_same_arguments_give_the_same_bytes(inputs, whole, tmp_path):
    torch.manual_seed(5)
    run_fit(inputs, tmp_path / "lens")
    assert artifact(tmp_path / "lens") == artifact(whole)


# killed


@pytest.mark.parametrize(
    ("owner", "name", "call", "passes_left"),
    [
        (token_blocks.BlockWriter, "add", 20, PASSES),
        (TunedLensFitter, "update", 4, PASSES),
        (TunedLensTrainer, "_keep_start", 1, PASSES),
        (checkpoints, "write_manifest", 1, PASSES),
        (TunedLensTrainer, "compute_loss", 4, PASSES),
        (TunedLensTrainer, "compute_loss", 10, PASSES - 4 * ACCUMULATION),
        (checkpoints, "write_manifest", 3, PASSES - 4 * ACCUMULATION),
        (TunedLensTrainer, "compute_loss", 19, PASSES - 8 * ACCUMULATION),
        (fit, "write_json", 2, 0),
    ],
)
def test_a_killed_fit_ends_as_one_that_was_not(inputs, whole, tmp_path, monkeypatch, owner, name, call, passes_left):
    monkeypatch.setattr(fit, "KEEP_EVERY", 2)
    kill_fit(inputs, tmp_path / "lens", owner, name, call)
    assert not (tmp_path / "lens" / "provenance.json").exists() and no_pickle(tmp_path / "lens")
    passes = counted(monkeypatch, TunedLensTrainer, "compute_loss")
    run_fit(inputs, tmp_path / "lens")
    assert artifact(tmp_path / "lens") == artifact(whole)
    assert len(passes) == passes_left
    assert {path.name for path in (tmp_path / "lens").iterdir()} == {path.name for path in whole.iterdir()}


@pytest.mark.parametrize(
    "kind", [{"translator_optim": "muon"}, {"rank": "full", "preconditioner": "prism", "learn_temperature": False}]
)
def test_killed_fits_of_other_kinds(inputs, tmp_path, kind):
    run_fit(inputs, tmp_path / "whole", **kind, num_train_epochs=1)
    kill_fit(inputs, tmp_path / "lens", TunedLensTrainer, "compute_loss", 10, **kind, num_train_epochs=1)
    run_fit(inputs, tmp_path / "lens", **kind, num_train_epochs=1)
    assert artifact(tmp_path / "lens") == artifact(tmp_path / "whole")


@pytest.mark.parametrize("call", [13, 53])
def test_a_fit_killed_between_the_steps_of_a_pass(inputs, tmp_path, call):
    """Six steps a pass, of 8 blocks each; the last of 6, whose parts do not end where batches do."""
    kind = {"rows_per_step": 8, "num_train_epochs": 1, "eval_steps": 5, "save_steps": 5, "layers_per_step": "all"}
    run_fit(inputs, tmp_path / "whole", **kind)
    assert json.loads((tmp_path / "whole" / "provenance.json").read_text())["schedule"]["steps_per_pass"] == 6
    kill_fit(inputs, tmp_path / "lens", TunedLensTrainer, "compute_loss", call, **kind)
    run_fit(inputs, tmp_path / "lens", **kind)
    assert artifact(tmp_path / "lens") == artifact(tmp_path / "whole")


def test_the_closed_form_goes_on_where_it_was(inputs, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "KEEP_EVERY", 1)
    kill_fit(inputs, tmp_path / "lens", TunedLensFitter, "update", 4)
    updates = counted(monkeypatch, TunedLensFitter, "update")
    run_fit(inputs, tmp_path / "lens")
    assert len(updates) == 1 == -(-RIDGE_BLOCKS // BATCH) - 3
    assert artifact(tmp_path / "lens") == artifact(whole)


def test_a_checkpoint_makes_the_closed_form_needless(inputs, tmp_path, monkeypatch):
    kill_fit(inputs, tmp_path / "lens", TunedLensTrainer, "compute_loss", 1)
    updates = counted(monkeypatch, TunedLensFitter, "update")
    run_fit(inputs, tmp_path / "lens")
    assert not updates


def test_a_killed_fit_may_be_moved(inputs, tmp_path):
    steep = {"learning_rate": 3.0, "warmup_steps": 0.0, "num_train_epochs": 1, "early_stopping_patience": 0}
    run_fit(inputs, tmp_path / "whole", **steep)
    kill_fit(inputs, tmp_path / "lens", TunedLensTrainer, "compute_loss", 10, **steep)
    (tmp_path / "lens").rename(tmp_path / "moved")
    run_fit(inputs, tmp_path / "moved", **steep)
    assert artifact(tmp_path / "moved") == artifact(tmp_path / "whole")
    assert json.loads((tmp_path / "moved" / "provenance.json").read_text())["schedule"]["best_step"] == 0


STEEP = {"learning_rate": 3.0, "warmup_steps": 0.0, "eval_steps": 1, "save_steps": 1, "early_stopping_patience": 2}


@pytest.fixture(scope="module")
def diverged(inputs, tmp_path_factory):
    """A fit whose steps only made things worse, so that it ended early."""
    folder = tmp_path_factory.mktemp("diverged") / "lens"
    run_fit(inputs, folder, **STEEP)
    return folder


def test_a_start_that_no_step_made_better_is_kept(inputs, diverged, tmp_path):
    run_fit(inputs, tmp_path / "still", learning_rate=0.0, max_steps=1)
    assert artifact(diverged)["model.safetensors"] == artifact(tmp_path / "still")["model.safetensors"]
    provenance = json.loads((diverged / "provenance.json").read_text())
    assert (provenance["schedule"]["best_step"], provenance["schedule"]["steps_done"]) == (0, 2)
    assert provenance["tokens_consumed"]["training"] == 2 * ACCUMULATION * BATCH * SEQ_LEN


@pytest.mark.parametrize(("owner", "name", "call"), [(TunedLensTrainer, "compute_loss", 3), (fit, "write_json", 1)])
def test_early_stopping_and_the_best_outlast_a_kill(inputs, diverged, tmp_path, owner, name, call):
    kill_fit(inputs, tmp_path / "lens", owner, name, call, **STEEP)
    run_fit(inputs, tmp_path / "lens", **STEEP)
    assert artifact(tmp_path / "lens") == artifact(diverged)


# what is there already


def snapshot(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def fitted(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "fitted")


def test_a_fitted_lens_is_kept(inputs, fitted):
    before = snapshot(fitted)
    result = run_fit(inputs, fitted, rank="8", disable_tqdm=False)
    assert result.was_there and result.others == ["rank '4', now '8'"]
    assert result.metrics == json.loads((fitted / "metrics.json").read_text())
    assert snapshot(fitted) == before


def test_what_a_fit_was_killed_at_after_its_lens_was_whole_is_removed(inputs, fitted):
    (fitted / "checkpoint-4").mkdir()
    assert run_fit(inputs, fitted).was_there
    assert not (fitted / "checkpoint-4").exists()


def test_force_fits_anew(inputs, fitted):
    result = run_fit(inputs, fitted, force=True, rank="8", num_train_epochs=1)
    assert not result.was_there
    assert load_file(fitted / "model.safetensors")["translators.0.U"].shape == (WIDTH, 8)
    assert json.loads((fitted / "provenance.json").read_text())["capacity"] == {"rank_k": "8"}


def test_a_forced_fit_that_cannot_be_leaves_the_lens(inputs, fitted):
    before = snapshot(fitted)
    with pytest.raises(ValueError, match="rank"):
        run_fit(inputs, fitted, force=True, rank="1000")
    assert snapshot(fitted) == before


def test_the_lens_of_another_model_is_not_taken_for_this_ones(inputs, fitted, tmp_path):
    shutil.copytree(inputs / "subject", tmp_path / "other")
    with pytest.raises(ValueError, match="has the lens of '.*subject', not of '.*other'; take another, or"):
        run_fit(inputs, fitted, model=str(tmp_path / "other"))


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_with_something_else_is_refused(inputs, tmp_path, force):
    tiny_lens().save_pretrained(tmp_path / "lens")
    before = snapshot(tmp_path / "lens")
    with pytest.raises(ValueError, match="output_dir: .* holds a model of type 'consistency_lens'; take another"):
        run_fit(inputs, tmp_path / "lens", force=force)
    assert snapshot(tmp_path / "lens") == before


def test_an_unfinished_fit_of_other_settings_is_refused(inputs, tmp_path, monkeypatch):
    kill_fit(inputs, tmp_path / "lens", TunedLensTrainer, "compute_loss", 1)
    before = snapshot(tmp_path / "lens")
    for name, was, now in (("ridge", 0.01, 0.1), ("learning_rate", 0.001, 0.01)):
        with pytest.raises(ValueError, match=f"has an unfinished fit with {name} {was}, now {now}; .* pass --force"):
            run_fit(inputs, tmp_path / "lens", **{name: now})
    monkeypatch.setattr(TunedLensTrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match="has an unfinished fit with world_size 1, now 2"):
        run_fit(inputs, tmp_path / "lens")
    assert snapshot(tmp_path / "lens") == before


def test_an_unfinished_fit_goes_on_with_another_bar_and_log(inputs, whole, tmp_path):
    kill_fit(inputs, tmp_path / "lens", TunedLensTrainer, "compute_loss", 12)
    run_fit(inputs, tmp_path / "lens", disable_tqdm=False, logging_steps=3, dataloader_num_workers=0)
    assert artifact(tmp_path / "lens") == artifact(whole)


def test_an_unfinished_fit_of_other_text_or_weights_is_refused(inputs, tmp_path):
    own = shutil.copytree(inputs, tmp_path / "inputs")
    kill_fit(own, tmp_path / "lens", TunedLensTrainer, "compute_loss", 1)
    text = (own / "text.jsonl").read_text()
    (own / "text.jsonl").write_text(text.replace("w3", "w4"))
    with pytest.raises(ValueError, match="has an unfinished fit with dataset_content_hash '"):
        run_fit(own, tmp_path / "lens")
    with pytest.raises(ValueError, match="dataset_content_hash '"):  # still
        run_fit(own, tmp_path / "lens")
    (own / "text.jsonl").write_text(text)
    tiny_model("llama", seed=1).save_pretrained(own / "subject")
    with pytest.raises(ValueError, match="has an unfinished fit with weights_hash '"):
        run_fit(own, tmp_path / "lens")


def test_a_mistake_leaves_no_claim_on_the_folder(inputs, tmp_path):
    with pytest.raises(ValueError, match="rank"):
        run_fit(inputs, tmp_path / "lens", rank="1000")
    assert not (tmp_path / "lens").exists()
    with pytest.raises(ValueError, match="text_column"):
        run_fit(inputs, tmp_path / "lens", text_column="none")
    assert not run_fit(inputs, tmp_path / "lens", max_steps=1).was_there


# mistakes


def refused(inputs, tmp_path, message, **changes):
    with pytest.raises(ValueError, match=message) as caught:
        run_fit(inputs, tmp_path / "lens", **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": "33"}, "rank must lie in 1..32 .the width of the subject., or be full, got 33"),
        ({"tokens": 160, "ridge_tokens": 160}, "ridge_tokens: 160 take all 10 sequences .* lower it, or raise tokens"),
        ({"ridge_tokens": 31, "position_range": [0.0, 0.5]}, "ridge: 16 positions are too little .* 32 dimensions"),
        ({"position_range": [0.5, 0.51]}, r"position_range: \[0.5, 0.51\] of 16 tokens holds no position"),
        ({"seq_len": 200, "tokens": 832, "validation_tokens": 200}, "seq_len: got 200, beyond the model's context"),
        ({"device": "cuda:77"}, "device: got 'cuda:77', which is not to be had here; try cpu"),
        ({"device": "toaster"}, "device: got 'toaster', which is not to be had here; try cpu"),
        ({"device": "meta"}, "device: got 'meta', but the fit runs on 'cpu'"),
        ({"device": "cpu", "device_map": "auto"}, "device: got 'cpu' and device_map 'auto'; pass one of them"),
        ({"model": "no/such/folder/model"}, "model: cannot load 'no/such/folder/model'"),
    ],
)
def test_mistakes_are_told_before_any_text_is_read(inputs, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(fit, "read_token_blocks", None)
    refused(inputs, tmp_path, message, **changes)
    assert not (tmp_path / "lens").exists()


def test_text_that_leaves_no_step_is_told_before_the_closed_form(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "TunedLensFitter", None)
    much = {"tokens": 400 * SEQ_LEN, "ridge_tokens": 300 * SEQ_LEN}
    refused(inputs, tmp_path, "ridge_tokens: 4800 take all [0-9]+ sequences of text", **much)


def test_a_subject_without_a_head_is_refused(inputs, tmp_path):
    tiny_model("llama", tie_word_embeddings=False).model.save_pretrained(tmp_path / "subject")
    tiny_tokenizer().save_pretrained(tmp_path / "subject")
    refused(inputs, tmp_path, "model: .* was saved without its head, as LlamaModel", model=str(tmp_path / "subject"))


def test_a_subject_without_a_head_of_its_own_is_taken(inputs, tmp_path):
    tiny_model("gpt2").transformer.save_pretrained(tmp_path / "subject")
    tiny_tokenizer().save_pretrained(tmp_path / "subject")
    assert run_fit(inputs, tmp_path / "lens", model=str(tmp_path / "subject"), max_steps=1).metrics["positions"]


def test_a_subject_that_is_no_causal_lm_is_refused(inputs, tmp_path):
    (tmp_path / "subject").mkdir()
    (tmp_path / "subject" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    tiny_tokenizer().save_pretrained(tmp_path / "subject")
    refused(inputs, tmp_path, "model: cannot load .* with a causal LM", model=str(tmp_path / "subject"))


def test_ridge_tokens_0_starts_close_to_the_norm_lens(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(fit.TunedLensFitter, "solve", None)
    result = run_fit(inputs, tmp_path / "lens", ridge_tokens=0, max_steps=1, learning_rate=0.0)
    assert result.metrics["mean_kl"]["tuned"] == pytest.approx(result.metrics["mean_kl"]["norm"], rel=1e-2)
    assert result.metrics["tokens"] == {"ridge": 0, "training": BATCH * ACCUMULATION * SEQ_LEN, "validation": 64}
    # the fair baseline is there all the same
    assert result.metrics["mean_kl"]["calibrated"] < 0.999 * result.metrics["mean_kl"]["norm"]


def test_tokens_of_the_closed_form_are_not_trained_on(inputs, whole):
    metrics = json.loads((whole / "metrics.json").read_text())
    consumed = {"ridge": RIDGE_BLOCKS * SEQ_LEN, "training": 2 * TRAIN_BLOCKS * SEQ_LEN, "validation": 4 * SEQ_LEN}
    assert metrics["tokens"] == consumed

import hashlib
import json

import pytest
from tuned_fits import BATCH, RIDGE_BLOCKS, SEQ_LEN, STEPS, TRAIN_BLOCKS, run_fit, write_inputs

from consistency_lens.data.subject_loading import load_subject_and_tokenizer
from consistency_lens.fingerprints import tokenizer_hash, weights_hash

PLAN = {  # section 7, and what it holds
    "enabled": None, "model_id": None, "clean_model_name": None, "sha": None, "seed": None,
    "dataset": {"repo_id", "name", "split", "revision", "sample_description", "content_hash"},
    "budget": {"tokens", "seq_len", "positions_per_seq"},
    "batching": {"micro_batch_seqs", "grad_accum", "effective_batch_seqs"},
    "capacity": {"rank_k"},
    "optim": {"lr", "betas", "weight_decay", "schedule", "total_steps", "warmup_steps"},
    "regularizers": {"l2_smallness", "smooth_depth", "precond"},
    "preconditioner": {"type", "path"},
    "val_kl_bits@{25,50,75}%": None, "kpis": None, "acceptance": None,
}  # fmt: skip
BESIDE = {  # of section 13.2 and our own
    "model_commit": None, "tokenizer_commit": None, "weights_hash": None, "tokenizer_hash": None, "versions": None,
    "tokens_consumed": {"ridge", "training", "validation"},
    "schedule": {"layers_per_step", "positions_per_seq", "steps_done"},
    "translator": {"rank", "temperature", "parameters", "place"},
    "sha256": {"model.safetensors"},
}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def folder(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lens")
    run_fit(inputs, folder, preconditioner="whitening", warmup_steps=0.15, layers_per_step="2")
    return folder


@pytest.fixture(scope="module")
def block(folder):
    return json.loads((folder / "provenance.json").read_text())


def test_it_has_every_key_of_the_plan(block):
    for name, parts in (PLAN | BESIDE).items():
        assert name in block, name
        assert parts is None or parts <= block[name].keys(), name
    assert block["kpis"] is None and block["acceptance"] is None and block["enabled"] is True


def test_what_was_fitted(block, inputs):
    assert (block["model_id"], block["clean_model_name"]) == (str(inputs / "subject"), "subject")
    assert block["dataset"]["repo_id"] == str(inputs / "text.jsonl")
    assert block["dataset"]["sample_description"].endswith("packed to 16; positions=6 in [0,1] of context")
    subject = load_subject_and_tokenizer(str(inputs / "subject"))
    assert block["weights_hash"] == weights_hash(subject.model)
    assert block["tokenizer_hash"] == tokenizer_hash(subject.tokenizer)


def test_how_it_was_fitted(block):
    training = 2 * TRAIN_BLOCKS * SEQ_LEN
    ridge = RIDGE_BLOCKS * SEQ_LEN
    assert block["budget"] == {"tokens": ridge + training, "seq_len": SEQ_LEN, "positions_per_seq": 6}
    assert block["tokens_consumed"] == {"ridge": ridge, "training": training, "validation": 4 * SEQ_LEN}
    assert block["batching"] == {"micro_batch_seqs": BATCH, "grad_accum": 2, "effective_batch_seqs": 2 * BATCH}
    optim = block["optim"]
    assert (optim["total_steps"], optim["warmup_steps"], optim["schedule"]) == (STEPS, 2, "cosine_to_zero")
    assert (optim["lr"], optim["betas"], optim["weight_decay"]) == (1e-3, [0.9, 0.999], 0.0)
    assert block["regularizers"] == {"l2_smallness": 1e-4, "smooth_depth": 1e-4, "precond": "whitening"}
    assert block["preconditioner"] == {"type": "whitening", "path": None}
    # two layers, each with U, V (32, 4), c and a temperature
    assert block["translator"] == {"rank": 4, "temperature": True, "place": "after_norm", "parameters": 2 * (288 + 1)}
    schedule = block["schedule"]
    assert (schedule["layers_per_step"], schedule["steps_done"], schedule["head_dtype"]) == (2, STEPS, "float32")


def test_the_figures_and_the_checksum_are_of_the_lens(block, folder):
    metrics = json.loads((folder / "metrics.json").read_text())
    assert block["val_kl_bits@{25,50,75}%"] == metrics["val_kl_bits@{25,50,75}%"]
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert block["sha256"] == {"model.safetensors": digest}


def test_no_path_is_written_but_those_that_were_typed(inputs, folder):
    home = str(inputs)
    for file in (file for file in folder.glob("*.json") if file.name != "tokenizer.json"):
        text = file.read_text()
        for typed in (f"{home}/subject", f"{home}/text.jsonl"):
            text = text.replace(json.dumps(typed), "")
        assert home not in text and str(folder) not in text and '"/' not in text, file.name

"""Activation caches through their command: from a corpus folder or a text file, on one process or two."""

import json
import shutil
from types import SimpleNamespace

import pytest
from cache_runs import content, flags, text, write_subject
from tiny_lenses import tiny_tokenizer
from tiny_models import tiny_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from consistency_lens.cli.cache import CacheArguments, cache_activations, main
from consistency_lens.cli.describe import readable_size
from consistency_lens.cli.tokenize import main as tokenize
from consistency_lens.data import cache_folder
from consistency_lens.data.activation_cache import ActivationCache
from consistency_lens.data.cache_verification import verify_cache

TEXT = text()


@pytest.fixture(scope="module")
def subject_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "subject"
    write_subject(folder)
    (folder.parent / "stories.txt").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def text_file(subject_folder):
    return subject_folder.parent / "stories.txt"


@pytest.fixture(scope="module")
def corpus_folder(subject_folder, text_file):
    folder = subject_folder.parent / "corpus"
    arguments = {"dataset": text_file, "model": subject_folder, "output_dir": folder, "max_length": 16}
    assert tokenize([part for name, value in arguments.items() for part in (f"--{name}", str(value))]) == 0
    return folder


def test_a_corpus_gives_a_cache_of_each_split_and_layer(subject_folder, corpus_folder, text_file, tmp_path, capsys):
    capsys.readouterr()
    assert main(flags(subject_folder, corpus_folder, tmp_path, 0, 2)) == 0
    printed = capsys.readouterr().out.splitlines()
    documents = {}
    for split in ("train", "validation"):
        for layer in (0, 2):
            path = tmp_path / "stories" / "subject" / f"layer_{layer}" / split
            cache = ActivationCache.open(path, subject_name=str(subject_folder), layer=layer)
            assert all(check.passed for check in verify_cache(path, progress=False))
            documents[split] = set(cache.documents)
            size = readable_size(sum(file.stat().st_size for file in path.glob("*.arrow")))
            told = f"sequences, {size}; look at it with: consistency-lens describe --cache {path}"
            assert any(told in line and f"{len(cache):,} rows" in line for line in printed)
            assert cache.provenance["corpus"]["max_length"] == 16
            assert cache.provenance["corpus"]["long_documents"] == "cut"
            assert cache.provenance["dataset"] == str(text_file)
            assert cache.provenance["dataset_split"] == split
            arguments = json.loads((path / "arguments.json").read_text())
            assert arguments["layer"] == [0, 2] and arguments["model"] == str(subject_folder)
    assert len(printed) == 4
    assert documents["train"].isdisjoint(documents["validation"])
    assert len(documents["train"]) + len(documents["validation"]) == 30


def test_a_second_call_does_nothing(subject_folder, corpus_folder, tmp_path, capsys):
    arguments = flags(subject_folder, corpus_folder, tmp_path)
    assert main(arguments) == 0
    path = tmp_path / "stories" / "subject" / "layer_1"  # the middle block
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    assert before
    assert "nothing was done" not in capsys.readouterr().out
    assert main([*arguments, "--batch_size", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all("here already; nothing was done" in line for line in lines)
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == before


def test_a_text_file_gives_the_same_cache_as_its_corpus(subject_folder, corpus_folder, text_file, tmp_path):
    assert main(flags(subject_folder, corpus_folder, tmp_path / "corpus")) == 0
    assert main(flags(subject_folder, text_file, tmp_path / "text", max_length=16)) == 0
    corpus, text = content(tmp_path / "corpus"), content(tmp_path / "text")
    assert corpus.keys() == text.keys()
    assert {k: v for k, v in corpus.items() if "shard" in k} == {k: v for k, v in text.items() if "shard" in k}


def test_a_killed_build_goes_on_with_the_arguments_that_it_left(subject_folder, corpus_folder, tmp_path, monkeypatch):
    write_shard = cache_folder.CacheFolder.write_shard

    def dying(self, index, *arguments):
        if index == 1:
            raise KeyboardInterrupt
        write_shard(self, index, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cache_folder.CacheFolder, "write_shard", dying)
        main(flags(subject_folder, corpus_folder, tmp_path / "killed", 1))
    train = tmp_path / "killed" / "stories" / "subject" / "layer_1" / "train"
    told = cache_folder.how_to_finish(train)
    assert told.startswith("1 of ")
    command = told.split("consistency-lens cache ")[1].split()
    assert main(command) == 0
    assert main(flags(subject_folder, corpus_folder, tmp_path / "whole", 1)) == 0
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_one_split_may_be_asked_for(subject_folder, corpus_folder, tmp_path):
    assert main([*flags(subject_folder, corpus_folder, tmp_path, 1), "--split", "validation"]) == 0
    assert [path.name for path in tmp_path.glob("*/*/layer_1/*")] == ["validation"]


def test_dropped_and_skipped_rows_are_said(subject_folder, text_file, tmp_path, capsys):
    text = tmp_path / "texts.txt"
    text.write_text(f"{TEXT}\n<|endoftext|>\nw5 w6\n<|endoftext|>\nw7")
    settings = {"max_norm": 2, "validation_fraction": 0.2}
    assert main(flags(subject_folder, text, tmp_path / "out", 1, **settings)) == 0
    printed = capsys.readouterr().out
    skipped = [cache_of(path)["sequences"]["skipped_too_short"] for path in tmp_path.rglob("provenance.json")]
    assert sum(skipped) == 2
    assert "skipped as too short" in printed and "rows dropped by their norm" in printed


def cache_of(path):
    return json.loads(path.read_text())


def test_a_config_file_sets_and_a_flag_wins(subject_folder, corpus_folder, tmp_path):
    config = tmp_path / "cache.yaml"
    config.write_text(f"model: {subject_folder}\ndataset: {corpus_folder}\nlayer: [0, 1]\nmin_position: 4\n")
    arguments = ["--config", str(config), "--output_dir", str(tmp_path / "out"), "--layer", "2", "--device", "cpu"]
    assert main([*arguments, "--disable_tqdm"]) == 0
    assert {path.parts[-2] for path in (tmp_path / "out").glob("*/*/*/train")} == {"layer_2"}


# Mistakes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": 7}, "layer must lie in 0..2"),
        ({"dtype": "auto"}, "dtype must be one of"),
        ({"cache_dtype": "int8"}, "dtype must be 'float16' or 'float32', got 'int8'"),
        ({"quantization": "2bit"}, "quantization must be one of 8bit, 4bit"),
        ({"positions_per_sequence": 0}, "positions_per_sequence must be at least 1, got 0"),
        ({"min_position": 15}, "too short for min_position=15"),
        ({"max_norm": 1}, "max_norm is a multiple of the median norm"),
        ({"model": "no/such/folder"}, "cannot load 'no/such/folder'"),
        ({"model": ""}, "model: got none; pass it, e.g. --model gpt2"),
        ({"dataset": "nowhere"}, "dataset: nothing at 'nowhere'"),
        ({"split": "test"}, "split must be train or validation or both, got 'test'"),
        ({"device": "cuda:99"}, "device: got 'cuda:99'"),
        ({"device_map": "auto"}, "device: got 'cpu' and device_map 'auto'"),
        ({"blocks": "model.nothing"}, "blocks='model.nothing' names no module"),
        ({"dataset": "someone/stories"}, "tokenize made (of a data set on the Hub, too)"),
        ({"max_length": 8}, "is tokenised and split already; leave it out"),
        ({"validation_fraction": 0.2}, "validation_fraction: got 0.2, but"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(subject_folder, corpus_folder, tmp_path, capsys, changes, message):
    capsys.readouterr()
    assert main(flags(subject_folder, corpus_folder, tmp_path, **changes)) == 2
    lines = capsys.readouterr().err.rstrip().splitlines()
    assert lines[-1].startswith("error: ") and message in lines[-1]
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize(("name", "value"), [("device", "cuda:1"), ("device_map", "auto")])
def test_one_place_for_several_processes_is_a_mistake(subject_folder, corpus_folder, name, value):
    arguments = CacheArguments(model=str(subject_folder), dataset=str(corpus_folder), **{name: value})
    with pytest.raises(ValueError, match=f"{name}: got '{value}' with 8 processes; leave it out"):
        cache_activations(arguments, SimpleNamespace(num_processes=8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"layer": 7}, "layer must lie in 0..2 ("), ({"dataset": "."}, "no finished corpus"),
     ({"dtype": "auto"}, "dtype must be one of"), ({"model": "other"}, "was made with the tokenizer of")],
)  # fmt: skip
def test_what_needs_no_weights_is_checked_before_they_are_read(
    subject_folder, corpus_folder, tmp_path, capsys, monkeypatch, changes, message
):
    """The subjects here have none."""
    monkeypatch.chdir(tmp_path)
    for name, tokenizer in (("bare", tiny_tokenizer()), ("other", tiny_tokenizer(bos=False))):
        shutil.copytree(subject_folder, tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors"))
        tokenizer.save_pretrained(tmp_path / name)
    capsys.readouterr()
    assert main(flags(**{"subject_folder": "bare", "corpus": corpus_folder, "output_dir": "out"}, **changes)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and not (tmp_path / "out").exists()


def test_a_folder_that_is_no_corpus_is_a_mistake(subject_folder, tmp_path, capsys):
    assert main(flags(subject_folder, subject_folder, tmp_path)) == 2
    assert "no finished corpus" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "value"), [("validation_fraction", 1), ("max_length", 0)])
def test_wrong_arguments_of_a_text_are_mistakes(subject_folder, text_file, tmp_path, capsys, name, value):
    assert main(flags(subject_folder, text_file, tmp_path / "out", **{name: value})) == 2
    assert f"{name} must" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_an_empty_text_is_a_mistake(subject_folder, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n<|endoftext|>\n")
    assert main(flags(subject_folder, tmp_path / "empty.txt", tmp_path)) == 2
    assert "holds no text" in capsys.readouterr().err


def test_a_text_beyond_the_context_of_the_subject_is_a_mistake(subject_folder, tmp_path, capsys):
    (tmp_path / "long.txt").write_text(f"{TEXT}\n<|endoftext|>\n" + "w9 " * 200)
    assert main(flags(subject_folder, tmp_path / "long.txt", tmp_path)) == 2
    assert "beyond the subject's context of 128" in capsys.readouterr().err


def test_a_corpus_of_another_tokenizer_is_a_mistake(subject_folder, corpus_folder, tmp_path, capsys):
    other = tmp_path / "other"
    tiny_model("llama").save_pretrained(other)
    vocab = {f"v{n}": n for n in range(97)}
    core = Tokenizer(models.WordLevel(vocab, unk_token="v0"))
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="v2").save_pretrained(other)
    assert main(flags(other, corpus_folder, tmp_path / "out")) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"was made with the tokenizer of '{subject_folder}' (hash" in message
    assert f"tokenise again with --model {other}" in message
    assert not (tmp_path / "out").exists()


def test_a_subject_that_overflows_float16_is_a_mistake_that_names_the_way_out(text_file, tmp_path, capsys):
    folder = tmp_path / "wide"
    model = tiny_model("llama")
    model.model.layers[0].mlp.down_proj.weight.data *= 1e6
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    assert main(flags(folder, text_file, tmp_path / "out", 1, dtype="float16")) == 2
    assert "load it in float32 (--dtype float32)" in capsys.readouterr().err.splitlines()[-1]
    assert main(flags(folder, text_file, tmp_path / "float16", 1)) == 2
    assert "--cache_dtype float32" in capsys.readouterr().err.splitlines()[-1]
    assert main(flags(folder, text_file, tmp_path / "out", 1, cache_dtype="float32")) == 0


def test_weights_that_are_not_numbers_are_a_mistake_and_leave_no_cache(text_file, tmp_path, capsys):
    folder = tmp_path / "broken"
    model = tiny_model("llama")
    model.model.layers[0].mlp.down_proj.weight.data[3, 5] = float("nan")
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    assert main(flags(folder, text_file, tmp_path / "out", 1)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "activations of layer 1 are not finite (the first at position" in last and "check the subject's wei" in last
    assert not list((tmp_path / "out").rglob("provenance.json"))


def test_a_full_disk_is_exit_code_1_and_one_line(subject_folder, corpus_folder, tmp_path, capsys, monkeypatch):
    def full(*_arguments):
        raise OSError(28, "No space left on device")

    arguments = flags(subject_folder, corpus_folder, tmp_path / "cache")
    monkeypatch.setattr(cache_folder, "file_hash", full)
    assert main(arguments) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("failed: activation cache: cannot write to") and "No space left on device" in last
    monkeypatch.undo()
    assert main(arguments) == 0
    assert main(flags(subject_folder, corpus_folder, tmp_path / "other")) == 0
    assert content(tmp_path / "cache") == content(tmp_path / "other")

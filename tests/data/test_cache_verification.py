"""What `verify_cache` finds: every kind of damage, all of it, and a subject other than the one that was read."""

import json
import re

import numpy as np
import pyarrow as pa
import pytest
import torch
from cache_builds import ARGUMENTS, LAYER, make_corpus, make_subject, make_tokenizer

from consistency_lens.data.activation_cache import file_hash
from consistency_lens.data.cache_against_subject import load_weights, made_as, tolerance
from consistency_lens.data.cache_building import build_activation_cache, build_activation_caches
from consistency_lens.data.cache_verification import find_caches, verify_cache
from consistency_lens.data.subject_loading import LoadedSubject

CONTENT = ["provenance", "shards", "checksums", "rows", "columns", "finite values", "positions", "mean and rms"]
SUBJECT = ["weights", "tokenizer", "activations"]


@pytest.fixture(scope="module")
def subject():
    return make_subject()


@pytest.fixture
def cache(subject, tmp_path):
    """The folder of a cache of four shards."""
    return build(subject, tmp_path / "cache")


def build(subject, path, **changes):
    tokenizer = make_tokenizer()
    return build_activation_cache(subject, make_corpus(), path, tokenizer=tokenizer, **{**ARGUMENTS, **changes}).path


def weights_of(subject, tokenizer=None):
    return load_weights(LoadedSubject(subject.model, tokenizer or make_tokenizer(), None))


def verify(path, *arguments):
    return verify_cache(path, *arguments, progress=False)


def failures(path, *arguments):
    """Name -> detail of the checks that fail."""
    return {check.name: check.detail for check in verify(path, *arguments) if check.checked and not check.passed}


def unchecked(path, *arguments):
    """Name -> detail of the checks that cannot be made; none of them passes."""
    found = [check for check in verify(path, *arguments) if not check.checked]
    assert not any(check.passed for check in found)
    return {check.name: check.detail for check in found}


def change_provenance(path, **changes):
    file = path / "provenance.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rewrite(path, name, columns):
    """Rewrites a shard with other columns, and the provenance as though it had been built so."""
    with pa.memory_map(str(path / name)) as stream:
        table = pa.ipc.open_stream(stream).read_all()
    arrays = {column: table[column].combine_chunks() for column in table.column_names} | columns(table)
    with pa.ipc.new_stream(str(path / name), (changed := pa.table(arrays)).schema) as writer:
        writer.write_table(changed)
    shards = json.loads((path / "provenance.json").read_text())["shards"]
    for shard in shards:
        if shard["file"] == name:
            shard |= {"bytes": (path / name).stat().st_size, "sha256": file_hash(path / name)}
    change_provenance(path, shards=shards)


# A sound cache


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_sound_cache_passes_every_check(subject, tmp_path, dtype):
    path = build(subject, tmp_path / "cache", dtype=dtype)
    checks = verify(path, weights_of(subject))
    assert [check.name for check in checks] == CONTENT + SUBJECT
    assert all(check.passed for check in checks)
    assert [check.name for check in verify(path)] == CONTENT


def test_each_shard_is_read_in_small_blocks(subject, cache, monkeypatch):
    sizes = []
    monkeypatch.setattr("consistency_lens.data.cache_verification.BLOCK_ROWS", 5)
    real = np.isfinite
    monkeypatch.setattr(np, "isfinite", lambda values: (sizes.append(len(values)), real(values))[1])
    assert failures(cache) == {}
    assert max(sizes) == 5 and sum(sizes) == 72


# Damage


def test_a_flipped_byte_anywhere_names_its_shard(cache):
    generator = np.random.default_rng(0)
    shards = sorted(cache.glob("shard-*.arrow"))
    assert len(shards) == 4
    for shard in shards:
        content = shard.read_bytes()
        for place in [0, len(content) - 1, *generator.integers(0, len(content), 10).tolist()]:
            damaged = bytearray(content)
            damaged[place] ^= 1 << int(generator.integers(8))
            shard.write_bytes(damaged)
            found = failures(cache)
            assert found.keys() == {"checksums"}
            assert found["checksums"].startswith(f"{shard.name}: sha256") and "\n" not in found["checksums"]
        shard.write_bytes(content)
    assert failures(cache) == {}


def test_all_findings_are_listed(cache):
    (cache / "shard-00000.arrow").write_bytes(b"nothing")
    (cache / "shard-00002.arrow").unlink()
    (cache / "shard-00009.arrow").write_bytes(b"more")
    change_provenance(cache, rows=1000)
    found = failures(cache)
    assert found.keys() == {"shards", "checksums", "rows"}
    first, second = found["checksums"].splitlines()
    assert first.startswith("shard-00000.arrow: sha256") and "(7 bytes of" in first
    assert second == "shard-00002.arrow: missing"
    assert found["shards"].splitlines() == ["shard-00002.arrow: missing", "shard-00009.arrow: not in the provenance"]
    assert found["rows"].endswith("not 1,000")


def test_what_could_not_be_read_has_not_passed(subject, cache):
    """A shard is missing, another damaged: of the rest of the rows, and of no more, something can be said."""
    (cache / "shard-00002.arrow").unlink()
    (cache / "shard-00000.arrow").write_bytes(b"nothing")
    assert failures(cache).keys() == {"shards", "checksums"}
    found = unchecked(cache)
    assert found.pop("mean and rms") == "some shards cannot be read"
    assert found.keys() == {"rows", "columns", "finite values", "positions"}
    assert set(found.values()) == {"of 36 of 72 rows alone: the rest cannot be read"}
    assert [check.name for check in verify(cache)] == CONTENT
    for shard in cache.glob("shard-*.arrow"):
        shard.unlink()
    found = unchecked(cache, weights_of(subject))
    assert found["activations"] == "no rows can be read"
    assert found["rows"] == "of 0 of 72 rows alone: the rest cannot be read"


def test_a_shard_that_is_no_arrow_stream_though_its_checksum_fits_is_a_failure(cache):
    (cache / "shard-00001.arrow").write_bytes(b"nothing")
    shards = json.loads((cache / "provenance.json").read_text())["shards"]
    shards[1] |= {"bytes": 7, "sha256": file_hash(cache / "shard-00001.arrow")}
    change_provenance(cache, shards=shards)
    assert failures(cache)["columns"].startswith("shard-00001.arrow: no Arrow stream")
    assert unchecked(cache).keys() == {"rows", "finite values", "positions", "mean and rms"}


def test_the_bar_names_the_cache(cache, capsys):
    verify_cache(cache)
    verify_cache(cache, name="layer_3/train")
    bars = capsys.readouterr().err
    assert "verifying cache" in bars and "verifying layer_3/train" in bars


def test_values_that_are_not_finite_are_found_though_the_checksum_fits(cache):
    def spoiled(table):
        column = table["activation"].combine_chunks()
        values = column.flatten().to_numpy(zero_copy_only=False).copy()
        values[[40, 47, 90]] = np.nan, np.inf, np.nan  # rows 2 and 5
        return {"activation": pa.FixedSizeListArray.from_arrays(pa.array(values), column.type.list_size)}

    rewrite(cache, "shard-00001.arrow", spoiled)
    found = failures(cache)
    assert found["finite values"] == "shard-00001.arrow: 2 rows from row 2 with NaN or infinity"
    assert found.keys() == {"finite values", "mean and rms"}


def test_contexts_that_are_not_tokens_up_to_p_are_found(cache):
    def shifted(table):
        positions = table["position"].to_numpy().copy()
        positions[3] += 1
        positions[7] = 2
        return {"position": pa.array(positions)}

    rewrite(cache, "shard-00003.arrow", shifted)
    first, second = failures(cache)["positions"].splitlines()
    assert first == "shard-00003.arrow: 2 rows from row 3 whose context is not tokens 0..P"
    assert second == "shard-00003.arrow: row 7 before position 4"


def test_rows_that_are_missing_are_found(cache):
    shards = json.loads((cache / "provenance.json").read_text())["shards"]
    shards[1]["rows"] += 2
    change_provenance(cache, shards=shards)
    first, second = failures(cache)["rows"].splitlines()
    assert first == "shard-00001.arrow: 18 rows, not 20"
    assert second == "the shards have 74, not 72"


@pytest.mark.parametrize(
    ("changes", "detail"),
    [
        ({"width": 15}, "activation is fixed_size_list"),
        ({"dtype": "float16"}, "not fixed_size_list<.*: halffloat>"),
    ],
)
def test_columns_other_than_the_provenance_says_are_found(cache, changes, detail):
    change_provenance(cache, **changes)
    found = failures(cache)
    assert len(found["columns"].splitlines()) == 4
    assert re.search(detail, found["columns"])


def test_a_column_too_many_is_found(cache):
    rewrite(cache, "shard-00000.arrow", lambda table: {"text": pa.array(["x"] * len(table))})
    assert failures(cache)["columns"].startswith("shard-00000.arrow: activation, input_ids, position, document, text")


def test_moments_that_are_not_those_of_the_rows_are_found(cache):
    provenance = json.loads((cache / "provenance.json").read_text())
    mean = provenance["mean"]
    mean[3] += 1e-4
    change_provenance(cache, mean=mean, rms=provenance["rms"] * 1.001)
    first, second = failures(cache)["mean and rms"].splitlines()
    assert first.startswith("the mean is off by up to 0.0001")
    assert second.startswith("the rms is")
    change_provenance(cache, mean=mean[1:])
    assert "the mean has 15 dimensions, not 16" in failures(cache)["mean and rms"]


@pytest.mark.parametrize("content", ["{", '{"shards": [], "subject": "tiny"}'])
def test_a_provenance_that_cannot_be_used_is_a_finding(cache, content):
    (cache / "provenance.json").write_text(content)
    assert failures(cache).keys() == {"provenance"}


# The subject


def test_the_subject_of_the_cache_passes_and_another_does_not(subject, cache):
    assert failures(cache, weights_of(subject)) == {}
    other = make_subject()
    with torch.no_grad():
        other.model.model.layers[0].mlp.down_proj.weight[0] += 0.1
    found = failures(cache, weights_of(other))
    assert found.keys() == {"weights", "activations"}
    assert "24 of 24 rows differ" in failures(cache, weights_of(other), 24)["activations"]
    assert "of shard-00000.arrow" in found["activations"]


def test_a_cache_of_another_layer_is_found(subject, tmp_path):
    arguments = {name: value for name, value in ARGUMENTS.items()}
    paths = {layer: tmp_path / str(layer) for layer in range(3)}
    build_activation_caches(subject.stream, make_corpus(), paths, tokenizer=make_tokenizer(), **arguments)
    weights = weights_of(subject)
    for layer, path in paths.items():
        assert failures(path, weights) == {}
        change_provenance(path, layer=(layer + 1) % 3)
        assert failures(path, weights).keys() == {"activations"}
    change_provenance(paths[0], layer=3)
    assert failures(paths[0], weights)["activations"] == "width 16 and 3 blocks, not width 16 and a block 3"


def test_rows_that_are_all_a_little_off_are_found(subject, cache):
    """Each within what a single row may be off, but so is no rounding."""
    tokens = subject.stream.input_embedding.weight.data
    slightly = make_subject()
    slightly.stream.input_embedding.weight.data = tokens * (1 + 2e-4)
    found = failures(cache, weights_of(slightly))
    assert found["activations"].startswith("64 rows computed anew; relative error: median 0.0002")


def test_one_row_that_was_not_read_from_its_context_is_found(subject, cache):
    def swapped(table):
        tokens = table["input_ids"].to_pylist()
        tokens[4] = [29 - token for token in tokens[4]]
        return {"input_ids": pa.array(tokens, pa.list_(pa.int32()))}

    rewrite(cache, "shard-00002.arrow", swapped)
    found = failures(cache, weights_of(subject), 1000)
    assert found.keys() == {"activations"}
    assert found["activations"].startswith("1 of 72 rows differ")
    assert "the first is row 4 of shard-00002.arrow" in found["activations"]


def test_the_sample_is_spread_over_the_cache(subject, cache):
    checks = {check.name: check.detail for check in verify(cache, weights_of(subject), 5)}
    assert checks["activations"].startswith("5 rows computed anew")
    (cache / "shard-00003.arrow").unlink()
    assert failures(cache, weights_of(subject), 5).keys() == {"shards", "checksums"}


def test_another_tokenizer_is_found(subject, cache):
    assert failures(cache, weights_of(subject, make_tokenizer(29))).keys() == {"tokenizer"}


def test_tokens_beyond_the_vocabulary_are_found(subject, cache):
    small = make_subject()
    small.model.resize_token_embeddings(20)
    found = failures(cache, weights_of(small))
    assert "but the subject's vocabulary is 20" in found["activations"]


def test_a_subject_in_another_precision_is_compared_by_its_activations(subject, cache):
    half = make_subject()
    half.model.to(torch.bfloat16)
    checks = {check.name: check for check in verify(cache, weights_of(half))}
    assert checks["weights"].detail == "not compared: loaded in bfloat16, the cache was made in float32"
    assert checks["activations"].passed, checks["activations"].detail
    assert all(check.passed for check in checks.values())
    other = make_subject()
    torch.nn.init.normal_(other.model.model.layers[LAYER].mlp.down_proj.weight)
    other.model.to(torch.bfloat16)
    assert failures(cache, weights_of(other)).keys() == {"activations"}


def test_the_tolerance_follows_the_dtypes():
    assert tolerance("float32", ["float32"], 0) == pytest.approx(1e-4, rel=0.01)
    assert tolerance("float16", ["float32"], 30) == pytest.approx(2**-11 + 1e-4)
    assert tolerance("float16", ["bfloat16"], 8) == pytest.approx(2**-11 + 4 * 3 * 2**-8)
    assert tolerance("float32", ["float32", "float16"], 8) == pytest.approx(4 * 3 * 2**-11, rel=0.01)


def test_how_the_subject_was_loaded_is_read_from_the_provenance():
    assert made_as({}) == {"dtype": None, "quantization": None}
    loaded = {"dtype": "bfloat16", "quantization": {"load_in_8bit": False, "load_in_4bit": True}}
    assert made_as({"loaded_as": loaded}) == {"dtype": "bfloat16", "quantization": "4bit"}


# Folders


def test_caches_are_found_below_a_folder_and_other_artifacts_are_not(subject, cache, tmp_path):
    build(subject, tmp_path / "deep" / "er" / "train")
    (tmp_path / "lens").mkdir()
    (tmp_path / "lens" / "provenance.json").write_text('{"train_rows": 7}')
    assert find_caches(cache) == [cache]
    assert find_caches(tmp_path) == [cache, tmp_path / "deep" / "er" / "train"]
    (cache / "provenance.json").rename(cache / "building.json")
    assert find_caches(tmp_path) == [cache, tmp_path / "deep" / "er" / "train"]
    assert failures(cache).keys() == {"finished"}
    with pytest.raises(ValueError, match="an unfinished cache at"):
        find_caches(cache)
    with pytest.raises(ValueError, match="no cache at .*lens' or below it"):
        find_caches(tmp_path / "lens")
    with pytest.raises(ValueError, match="no folder at"):
        find_caches(tmp_path / "nowhere")

"""The card of a published cache: rendered from what was measured; what it cannot say is a mistake."""

import json

import pytest
import yaml
from published_caches import REPO, build_caches, built, files_of, layer, push

from consistency_lens.data.activation_cache import ActivationCache
from consistency_lens.public_names import public_name

__all__ = ["built", "layer"]


def test_the_card_is_rendered_from_what_was_measured(hub, layer):
    push(layer, license="apache-2.0", language=["en"])
    _, head, text = files_of(hub)["README.md"].content.decode().split("---\n", maxsplit=2)
    metadata = yaml.safe_load(head)
    assert (metadata["license"], metadata["language"]) == ("apache-2.0", ["en"])
    assert {"consistency-lens", "activations"} <= set(metadata["tags"])
    assert metadata["size_categories"] == ["n<1K"]
    paths = [{"split": split, "path": f"data/{split}-*.parquet"} for split in ("train", "validation")]
    assert metadata["configs"] == [{"config_name": "default", "data_files": paths}]
    train, validation = (ActivationCache.open(layer / split) for split in ("train", "validation"))
    counts = {split["name"]: split["num_examples"] for split in metadata["dataset_info"]["splits"]}
    assert counts == {"train": len(train), "validation": len(validation)}
    sizes = [len(blob.content) for name, blob in files_of(hub).items() if name.endswith(".parquet")]
    assert metadata["dataset_info"]["download_size"] == sum(sizes)
    for told in (train.provenance["weights_hash"], f"| train | {len(train):,} |", "`subject`", "min_position 4"):
        assert told in text
    for split, cache in (("train", train), ("validation", validation)):
        kept = cache.provenance["sequences"]["kept"]
        assert f"| sequences, {split} | {kept} kept, 0 skipped as too short |" in text
        assert f"\n- {split}: 0 rows\n" in text
    assert "this cache's own, made by document" in text and "\n0 rows of `validation` have" in text
    assert "a sequence is" not in text
    assert f"pull --repo {REPO} --split train" in text and "transformers " in text


def test_what_is_on_the_hub_is_linked_at_its_revision(hub, tmp_path):
    names = {"subject_name": "org/model", "subject_revision": "a" * 40}
    origin = {"dataset_name": "org/text", "dataset_revision": "b" * 40}
    facts = {
        "dataset_config": "en", "dataset_split": "test", "text_column": "story", "messages_column": None,
        "max_length": 512, "long_documents": "split", "packing": True,
    }  # fmt: skip
    push(build_caches(tmp_path, **names, **origin, corpus_facts=facts).layer, text=False)
    provenance = json.loads(files_of(hub)["provenance/train.json"].content)
    assert provenance["corpus"] == facts and provenance["local"] == ["tokenizer"]
    text = files_of(hub)["README.md"].content.decode()
    assert f"[org/model](https://huggingface.co/org/model), revision `{'a' * 40}`" in text
    assert f"[org/text](https://huggingface.co/datasets/org/text), revision `{'b' * 40}`" in text
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert metadata["source_datasets"] == ["org/text"] and "org/model" in metadata["tags"]
    assert "| read of the text | config en, split test, column story |" in text
    assert "| a sequence is | at most 512 tokens, longer documents split, packed |" in text
    assert "license" not in metadata and "none is stated" in text
    assert "text" not in [feature["name"] for feature in metadata["dataset_info"]["features"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"license": "Apache 2.0"}, "license: the Hub knows no 'Apache 2.0' .*; did you mean 'apache-2.0'?"),
        ({"license": "mine"}, "pass 'other' if it has none"),
        ({"language": ["en", "English"]}, "language: got 'English'; pass ISO 639 codes"),
        ({"language": ["en-US"]}, "language: got 'en-US'"),
    ],
)
def test_what_the_card_cannot_say_is_a_mistake_before_anything_is_done(hub, layer, arguments, message):
    with pytest.raises(ValueError, match=message):
        push(layer, **arguments)
    assert hub.requests == [] and not layer.with_name(".layer_1.push").exists()


def test_a_card_that_the_hub_does_not_take_is_a_mistake_in_its_words(hub, layer):
    hub.licenses = {"other"}
    with pytest.raises(ValueError, match='hub: .*"license" must be one of') as caught:
        push(layer, license="mit", language=["en", "deu", "code"])
    assert "\n" not in str(caught.value) and len(hub.dataset(REPO).commits) == 1


@pytest.mark.parametrize(
    ("name", "public"),
    [("gpt2", "gpt2"), ("org/model", "org/model"), ("/home/me/model", "model"), ("a/b/c.txt", "c.txt"),
     ("./model", "model"), ("~/model", "model")],
)  # fmt: skip
def test_of_paths_the_last_part_is_public(name, public):
    assert public_name(name) == public

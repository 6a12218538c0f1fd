"""Tuned lenses published on a Hub on loopback by the real client: what is uploaded, what is refused."""

import json
import re
import shutil
from datetime import UTC, datetime

import pytest
import yaml
from hub_http import Reply
from hub_server import TOKEN
from published_lenses import ACCEPTANCE, KPIS, LICENSE_TEXT, add_subject, fit_lens, save_subject
from publishing import COMMIT, FILES, NEXT, REPO, TAG, below, change, files_of, publish

from consistency_lens.hub_connection import HubError
from consistency_lens.public_names import without_paths
from consistency_lens.tuned_lens.index import read_index

# What is published


def test_a_release_is_a_tree_with_index_licences_and_cards_in_one_tagged_commit(hub, on_hub):
    published = publish(on_hub.path)
    files = files_of(hub)
    assert below(files, "tuned_lenses") == {f"org/tiny/{name}" for name in FILES}
    assert below(files, "LICENSES") == {"org/tiny/LICENSE"}
    assert set(files) - {".gitattributes"} == {
        "README.md", "INDEX.json", "LICENSES/org/tiny/LICENSE", *(f"tuned_lenses/org/tiny/{name}" for name in FILES)
    }  # fmt: skip
    repo = hub.dataset(REPO)
    assert repo.tags == {TAG: repo.head.oid} and len(repo.commits) == 2
    assert published == (f"{hub.url}/datasets/{REPO}", repo.head.oid, TAG, {"org/tiny": None}, None)
    assert not (on_hub.path.parent / ".lens.publish").exists()


def test_the_index_has_the_checksum_of_every_file_the_pins_and_the_gates(hub, on_hub):
    publish(on_hub.path)
    files, repo = files_of(hub), hub.dataset(REPO).head.files
    (entry,) = json.loads(files["INDEX.json"]).values()
    assert entry["path"] == "tuned_lenses/org/tiny"
    assert entry["sha256"] == {name: repo[f"tuned_lenses/org/tiny/{name}"].sha256 for name in FILES}
    assert entry["licenses"] == {"LICENSES/org/tiny/LICENSE": repo["LICENSES/org/tiny/LICENSE"].sha256}
    commit = hub.model("org/tiny").head.oid
    assert (entry["tl_version"], entry["model_commit"], entry["tokenizer_commit"]) == (TAG, commit, commit)
    assert (entry["acceptance"], entry["license"]) == (ACCEPTANCE, "apache-2.0")
    provenance = json.loads(files["tuned_lenses/org/tiny/provenance.json"])
    assert provenance["sha256"] == {k: v for k, v in entry["sha256"].items() if k != "provenance.json"}
    assert provenance["model_id"] == "org/tiny" and provenance["kpis"] == KPIS


def test_no_place_on_the_publishers_disk_and_no_token_is_in_what_is_uploaded(hub, lens, local, on_hub, tmp_path):
    publish(lens)
    publish(on_hub.path, NEXT)
    secrets = [str(tmp_path), str(local.path.parent), TOKEN]
    shown = [name for name, content in files_of(hub).items() for secret in secrets if secret.encode() in content]
    assert shown == []
    provenance = json.loads(files_of(hub)["tuned_lenses/local/subject/provenance.json"])
    assert provenance["model_id"] == "subject" and provenance["local"] == ["model_id", "dataset.repo_id"]
    assert provenance["dataset"]["repo_id"] == "texts.txt"
    assert provenance["dataset"]["sample_description"] == "documents of texts.txt, packed to 64"
    config = json.loads(files_of(hub)["tuned_lenses/local/subject/config.json"])
    assert config["base_model_name_or_path"] == "subject"


def test_of_what_the_model_wrote_itself_the_model_is_named(hub, lens, local):
    file = lens / "provenance.json"
    dataset = json.loads(file.read_text())["dataset"]
    corpus = {"dataset": "../x/texts.txt", "files": [str(local.subject / "config.json")]}
    change(lens, dataset=dataset | {"repo_id": f"samples of {local.subject}", "corpus": corpus})
    publish(lens)
    published = json.loads(files_of(hub)["tuned_lenses/local/subject/provenance.json"])["dataset"]
    assert published["repo_id"] == "samples of subject"
    assert published["corpus"] == {"dataset": "texts.txt", "files": ["config.json"]}


def test_a_model_that_was_in_a_folder_once_is_named_by_its_last_part(hub, lens):
    config = json.loads((lens / "config.json").read_text())
    (lens / "config.json").write_text(json.dumps(config | {"base_model_name_or_path": "runs/gone"}))
    change(lens, model_id="runs/gone", clean_model_name="gone")
    publish(lens)
    published = {name: content for name, content in files_of(hub).items() if not name.endswith(".safetensors")}
    assert json.loads(published["tuned_lenses/local/gone/provenance.json"])["model_id"] == "gone"
    assert not any(b"runs/gone" in content for content in published.values())


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("read from /home/me/data/texts.txt, packed", "read from texts.txt, packed"),
        ("~/models/x", "x"),
        ("clip(d//32,64,256)", "clip(d//32,64,256)"),
        ("https://huggingface.co/org/name", "https://huggingface.co/org/name"),
        ("HuggingFaceFW/fineweb-edu", "HuggingFaceFW/fineweb-edu"),
        ("runs/tiny and more", "tiny and more"),
        ("x / y", "x / y"),
    ],
)
def test_paths_are_cut_to_their_last_part_and_nothing_else_is(text, public):
    assert without_paths({"a": [text, 1, None]}, {"runs/tiny": "tiny"}) == {"a": [public, 1, None]}


def test_the_cards_say_what_was_recorded(hub, on_hub, lens):
    publish(on_hub.path)
    publish(lens, NEXT)
    files = {name: content.decode() for name, content in files_of(hub).items() if not name.endswith(".safetensors")}
    card, commit = files["tuned_lenses/org/tiny/README.md"], hub.model("org/tiny").head.oid
    weights = on_hub.path / "model.safetensors"
    numbers = 2 * (32 * 32 + 32)
    for wanted in (
        f"[org/tiny](https://huggingface.co/org/tiny), revision `{commit}`", f"| model commit | `{commit}` |",
        f"| release | {TAG} |", f"| parameters | {numbers:,} = 2 x (32² + 32) |",
        f"| size on disk | {weights.stat().st_size:,} bytes |", "| preconditioner (Prism/ZCA) | none |",
        "| median ΔKL at 50 % depth, bits | +0.420 | +0.400 to +0.440 |",
        "| layers by which rank ≤ 5 is earlier, median | not to be had |  |",
        "| gain in layers with the answer on top | +11.0% | +1.0% to +20.0% |",
        "| tokens | 512 (ridge), 64 (validation) |",
    ):  # fmt: skip
        assert wanted in card
    assert re.search(r"\| B \| .* \| \*\*not passed\*\* \|", card) and re.search(r"\| A \| .* \| passed \|", card)
    head, text = files["README.md"].split("---\n", maxsplit=2)[1:]
    assert yaml.safe_load(head)["license"] == "apache-2.0"
    assert (
        "([card](tuned_lenses/org/tiny/README.md)) | v2026.01.31 | passed | **not passed** | passed | passed |" in text
    )
    assert f"`local/subject` ([card](tuned_lenses/local/subject/README.md)) | {NEXT} |" in text
    assert "| local/subject | `texts.txt` | 512 (ridge), 64 (validation) | 8 of 64 | full | 7 | none | 316 |" in text
    assert "[org/tiny/LICENSE](LICENSES/org/tiny/LICENSE)" in text and "fits one model alone" in text
    assert "No evaluation prompts were put into the training text" in text
    assert "The model is local" in files["tuned_lenses/local/subject/README.md"] and "The model is local" not in card


def test_the_parameters_of_a_low_rank_are_those_of_its_factors(hub, lens):
    config = json.loads((lens / "config.json").read_text())
    (lens / "config.json").write_text(json.dumps(config | {"rank": 4}))
    change(lens, translator={"rank": 4, "temperature": False})
    publish(lens)
    files = files_of(hub)
    card = files["tuned_lenses/local/subject/README.md"].decode()
    assert "| parameters | 576 = 2 x (2·32·4 + 32) |" in card and "| 2 of 3 layers, rank 4 |" in card
    assert "Translators of the identity and a low rank, without a temperature" in files["README.md"].decode()


# Licences


def test_the_licence_text_is_the_models_own_and_the_notice_names_it(hub, on_hub, lens):
    publish(on_hub.path)
    publish(lens, NEXT)
    files = files_of(hub)
    for model, tag in (("org/tiny", TAG), ("local/subject", NEXT)):
        assert files[f"LICENSES/{model}/LICENSE"].decode() == LICENSE_TEXT
        notice = files[f"tuned_lenses/{model}/NOTICE"].decode()
        assert "Model licence: apache-2.0\n" in notice
        assert f"/datasets/{REPO}/blob/{tag}/LICENSES/{model}/LICENSE" in notice
        assert "Tokenizer: not included" in notice and "arXiv:2303.08112" in notice


def test_where_no_text_is_to_be_had_none_is_made_up(hub, tmp_path):
    folder = save_subject(tmp_path / "there", license="other\nlicense_name: tiny-terms\nlicense_link: https://x.org/t")
    (folder / "LICENSE").unlink()
    commit = add_subject(hub, "org/tiny", folder)
    publish(fit_lens(tmp_path / "of_hub", "org/tiny", commit).path)
    files = files_of(hub)
    assert below(files, "LICENSES") == set()
    notice = files["tuned_lenses/org/tiny/NOTICE"].decode()
    assert "Model licence: other (tiny-terms)\nNamed by the model's card at: https://x.org/t\n" in notice
    assert f"none was to be had where the model is; see its card: {hub.url}/org/tiny/blob/{commit}/README.md" in notice
    assert "none was to be had; see the model's own card" in files["README.md"].decode()


def test_passed_licences_go_before_and_need_nothing_of_the_models_repository(hub, tmp_path):
    (tmp_path / "TERMS.txt").write_text("terms")
    lens = fit_lens(tmp_path / "gone", "org/gone", COMMIT).path
    with pytest.raises(
        ValueError, match="license: that of 'org/gone' cannot be read .* pass license and license_files"
    ):
        publish(lens)
    publish(lens, license="mit", license_files=[tmp_path / "TERMS.txt"])
    assert files_of(hub)["LICENSES/org/gone/TERMS.txt"] == b"terms"
    assert json.loads(files_of(hub)["INDEX.json"])["org/gone"]["license"] == "mit"


def test_different_licences_stand_in_the_card_together(hub, on_hub, lens, tmp_path):
    (tmp_path / "TERMS.txt").write_text("terms")
    publish(on_hub.path)
    publish(lens, NEXT, license="mit", license_files=[tmp_path / "TERMS.txt"])
    head = files_of(hub)["README.md"].decode().split("---\n")[1]
    assert yaml.safe_load(head)["license"] == ["apache-2.0", "mit"]


# Releases


def test_two_models_in_one_repository_leave_each_other_alone(hub, on_hub, lens):
    publish(on_hub.path)
    before = files_of(hub)
    publish(lens, NEXT)
    files, repo = files_of(hub), hub.dataset(REPO)
    kept = [name for name in before if name.startswith(("tuned_lenses/org", "LICENSES/org"))]
    assert len(kept) == 7 and all(files[name] == before[name] for name in kept)
    index = read_index(files["INDEX.json"], REPO)
    assert {name: entry.tl_version for name, entry in index.items()} == {"local/subject": NEXT, "org/tiny": TAG}
    assert index["org/tiny"] == read_index(before["INDEX.json"], REPO)["org/tiny"]
    assert set(repo.tags) == {TAG, NEXT} and repo.tags[TAG] != repo.tags[NEXT]


def test_several_lenses_below_a_folder_are_one_release(hub, on_hub, local, tmp_path):
    shutil.copytree(on_hub.path, tmp_path / "all" / "one")
    shutil.copytree(local.path, tmp_path / "all" / "two")
    shutil.copytree(local.path, tmp_path / "all" / "two" / "checkpoint-1")
    with pytest.raises(ValueError, match="license: 2 lenses at .* have one each"):
        publish(tmp_path / "all", license="mit")
    assert publish(tmp_path / "all").models == {"org/tiny": None, "local/subject": None}
    assert len(hub.dataset(REPO).commits) == 2
    shutil.copytree(local.path, tmp_path / "all" / "three")
    with pytest.raises(ValueError, match="are both of local/subject; publish one"):
        publish(tmp_path / "all", NEXT)


def test_an_update_is_a_new_tag_and_the_old_release_stays(hub, lens):
    publish(lens)
    first = files_of(hub)
    (lens / "metrics.json").unlink()
    change(lens, seed=317)
    assert publish(lens, NEXT).models == {"local/subject": TAG}
    assert below(files_of(hub), "tuned_lenses/local/subject") == FILES - {"metrics.json"}
    repo = hub.dataset(REPO)
    assert {name: blob.content for name, blob in repo.at(TAG).files.items()} == first


def test_an_existing_tag_is_refused_with_nothing_uploaded(hub, lens):
    publish(lens)
    change(lens, seed=317)
    hub.requests.clear()
    with pytest.raises(ValueError, match=f"tag: '{REPO}' has {TAG} already, and a release never changes"):
        publish(lens)
    assert [asked for asked in hub.requests if asked[0] != "GET"] == []
    assert len(hub.dataset(REPO).commits) == 2


def test_a_release_that_was_cut_off_before_its_tag_can_be_finished(hub, lens):
    hub.faults["POST", "/tag/"] = Reply({"error": "down"}, 500)
    with pytest.raises(HubError):
        publish(lens)
    assert hub.dataset(REPO).tags == {}
    hub.faults.clear()
    publish(lens)
    assert hub.dataset(REPO).tags == {TAG: hub.dataset(REPO).head.oid}


def test_a_release_of_another_in_the_meantime_is_not_overwritten(hub, lens, monkeypatch):
    publish(lens)
    repo, real = hub.dataset(REPO), hub.preupload

    def meanwhile(*arguments):
        repo.commit("main", "of another", {**repo.head.files})
        return real(*arguments)

    monkeypatch.setitem(__import__("hub_server").ACTIONS, "preupload", lambda _hub, *rest: meanwhile(*rest))
    change(lens, seed=317)
    with pytest.raises(HubError, match="A commit has happened since"):
        publish(lens, NEXT)
    assert repo.head.title == "of another" and set(repo.tags) == {TAG}


def test_the_default_tag_is_today_in_utc(hub, lens):
    before = datetime.now(UTC)
    tag = publish(lens, None).tag
    assert tag in {of.strftime("v%Y.%m.%d") for of in (before, datetime.now(UTC))}


@pytest.mark.parametrize("tag", ["2026.01.31", "v2026.13.01", "v2026.1.31", "v1.0", "main"])
def test_other_tags_are_refused(hub, lens, tag):
    with pytest.raises(ValueError, match="tag: got .* pass a date as vYYYY.MM.DD"):
        publish(lens, tag)
    assert hub.requests == []


def test_a_dry_run_leaves_what_it_would_upload_and_makes_nothing(hub, lens):
    published = publish(lens, dry_run=True)
    assert published.commit is None and hub.repos == {}
    names = {str(file.relative_to(published.folder)) for file in published.folder.rglob("*") if file.is_file()}
    assert "INDEX.json" in names and below(names, "tuned_lenses/local/subject") == FILES
    publish(lens)
    uploaded = files_of(hub)
    assert names == set(uploaded) - {".gitattributes"}

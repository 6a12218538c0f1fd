"""The card of a lens: what was recorded is in it, what was not is said to be missing, and nothing breaks it."""

import json
import re

import pytest
from carded_lenses import DATASET, DATASET_COMMIT, EMISSIONS, LOG, METRICS_FILE, RUN, SAMPLE, save_config, write_files
from hub_rules import check_model_card
from markdown_it import MarkdownIt

from consistency_lens.evaluation.controls import CONTROLS
from consistency_lens.evaluation.report import METRICS
from consistency_lens.hub.lens_card import lens_card, write_lens_card
from consistency_lens.hub.upstream_license import UpstreamLicense

# what a context, a prompt or a path may hold
NASTY = "a|b `c` ``` <script>alert(1)</script> --- \n---\n# head | [x](http://evil) **b** _i_ &lt; $x$ \\ \x00 "
NASTY += "\u202e {{ 1 }}"
SHOWN = "a|b `c` ``` &lt;script&gt;alert(1)&lt;/script&gt; --- ⏎---⏎# head | [x](http://evil) **b** _i_ &amp;lt; $x$"


@pytest.fixture
def folder(tmp_path):
    return write_files(save_config(tmp_path / "lens"))


def card_and_head(folder, *place, **arguments):
    path = write_lens_card(folder, *place, **arguments)
    return path.read_text(encoding="utf-8"), check_model_card(path)


def sections(card):
    """Heading -> text below it."""
    parts = re.split(r"^##? (.*)\n", card.split("---\n", maxsplit=2)[2], flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def html(card):
    """A card without its head, as HTML."""
    return MarkdownIt("commonmark").enable("table").render(card.split("\n---\n", maxsplit=1)[1])


def test_the_head_is_what_the_hub_reads(folder):
    _, head = card_and_head(folder, "me/lens")
    assert head["library_name"] == "consistency-lens" and head["pipeline_tag"] == "feature-extraction"
    assert head["base_model"] == "org/model" and head["base_model_relation"] == "finetune"
    assert head["datasets"] == [DATASET] and head["license"] == "apache-2.0"
    assert {"consistency-lens", "interpretability"} <= set(head["tags"])
    (model,) = head["model-index"]
    (result,) = model["results"]
    assert model["name"] == "lens" and result["dataset"]["type"] == DATASET
    assert result["dataset"]["revision"] == DATASET_COMMIT
    values = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert {name: values[name] for name in METRICS} == {name: METRICS_FILE[name] for name in METRICS}
    for name, control in METRICS_FILE["controls"].items():
        assert values[f"controls.{name}.fve"] == control["fve"]
    fve = next(metric for metric in result["metrics"] if metric["type"] == "fve")
    assert fve["args"] == {"rows": 1024, "documents": 99, "ci95": [0.1, 0.15]}


def test_every_figure_of_the_files_stands_in_the_card(folder):
    card, _ = card_and_head(folder, "me/lens")
    for name, (label, decimals) in METRICS.items():
        assert f"| {label} | {METRICS_FILE[name]:.{decimals}f} |" in card
    for name, control in METRICS_FILE["controls"].items():
        assert re.search(rf"\| {name} .*\| {control['fve']:.3f} \| {control['kl_recovered']:.3f} \|", card)
    assert "| **the lens's words** | **0.125** (0.100 to 0.150) |" in card
    for text in (
        "[org/model](https://huggingface.co/org/model), revision `" + "b" * 40, "a" * 64, DATASET_COMMIT, "4,321",
        "| optimiser steps | 2,150 |", "| trained parameters | 12,345 |", "| training took | 5.0 minutes |",
        "| 1 | `warm_start`:", "| 60% of the steps | `cosine 1 -> 0.1` | `ce 1, mse 1` |", "`policy 1, lm 0.2, mse 1`",
        "| `layer` | `1` |", "| `dataset` | `texts.txt` |", "Words: <embed>", "torch 2.13.0", "c" * 40,
        "1,024 held-out rows of 99 documents", "| 1,000 | 0.300 | 0.400 |",
    ):  # fmt: skip
        assert text in card, text
    assert "/home" not in card and "not measured" not in sections(card)["Training"].replace("| emissions | not m", "")


def test_the_log_is_thinned_to_its_first_and_last_step_and_some_between(folder):
    card, _ = card_and_head(folder)
    steps = [int(step.replace(",", "")) for step in re.findall(r"^\| ([\d,]+) \| [12] \|", card, re.MULTILINE)]
    losses = [entry for entry in LOG if "loss" in entry]
    assert len(steps) == 12 < len(losses) and steps[0] == 50 and steps[-1] == 1000 and steps == sorted(set(steps))
    assert f"| 50 | 1 | {losses[0]['loss']:.4f} | {losses[0]['mse']:.4f} |" in card


def test_what_was_not_measured_is_said_and_never_left_empty(tmp_path):
    card, head = card_and_head(save_config(tmp_path / "bare"), "me/bare")
    text = sections(card)
    for label, _ in METRICS.values():
        assert f"| {label} | not measured |" in text["Figures"]
    for name in CONTROLS:
        assert re.search(rf"\| {name} .*\| not measured \| not measured \|", text["Figures"])
    assert "| emissions | not measured |" in text["Training"] and "Losses:\n\nNot recorded." in text["Training"]
    assert "What it says" not in text and "versions that were not recorded" in card
    assert not {"model-index", "datasets", "license", "co2_eq_emissions"} & head.keys()
    assert "None is stated here, for none is known of the base model" in text["Licence"]
    empty = re.findall(r"^\|.*\|\s*\|\s*$", text["Training"] + text["What it reads"], re.MULTILINE)
    assert set(empty) == {"| | |"}  # the heads of tables without one


def test_a_figure_that_is_missing_among_others_is_said(tmp_path):
    metrics = {"fve": None, "controls": {"shuffled": {"fve": 0.5}}}
    card, head = card_and_head(write_files(save_config(tmp_path / "lens"), metrics=metrics), "me/lens")
    assert "| FVE | not measured |" in card and "| current_token_only (the current token alone) | not measured" in card
    assert "how much was not measured here" in card
    types = {metric["type"] for metric in head["model-index"][0]["results"][0]["metrics"]}
    assert "fve" not in types and "kl" in types and "controls.shuffled.fve" in types


@pytest.mark.parametrize(("kind", "tag"), [("decoder", "text-generation"), ("encoder", "feature-extraction")])
def test_a_part_of_a_lens_has_a_card_of_its_own(tmp_path, kind, tag):
    card, head = card_and_head(write_files(save_config(tmp_path / kind, kind=kind, training="lora")), f"me/{kind}")
    assert head["pipeline_tag"] == tag and f"consistency-lens-{kind}" in head["tags"]
    assert head["base_model_relation"] == "adapter"
    assert f"The {kind} of a consistency lens for layer 1" in card and "lora clone, rank 2" in card
    assert card.count("| lora clone") == 1 and "without its own" in card


def test_text_that_models_and_people_wrote_breaks_nothing(tmp_path):
    sample = SAMPLE | {"context": f"{NASTY}«{NASTY}»", "explanation": NASTY, "top_before": [[NASTY, 0.5]]}
    run = {"non_default": {"decoder_prompt": NASTY, "dataset": NASTY}}
    provenance = {
        "cache": {"dataset": NASTY, "dataset_revision": None},
        "base_license": {"name": "other", "title": NASTY},
    }
    harmless = {"samples": [SAMPLE], "run": {"non_default": {"decoder_prompt": "x", "dataset": "y"}},
                "provenance": {"cache": {"dataset": "z", "dataset_revision": None}}}  # fmt: skip
    path = save_config(tmp_path / "lens", base=NASTY, commit=None)
    card, head = card_and_head(write_files(path, samples=[sample], run=run, provenance=provenance), "me/lens")
    other = lens_card(write_files(save_config(tmp_path / "tame", base="m", commit=None), **harmless), "me/lens")
    assert head["license_name"] == NASTY
    marks = [re.sub(r"<code>.*?</code>", "", html(text)) for text in (card, other)]
    for tag in ("h1", "h2", "table", "tr", "td", "th", "pre", "a", "strong", "em", "hr", "ul", "li", "b", "script"):
        counts = [len(re.findall(rf"<{tag}[ >]|<{tag}/?>", text)) for text in marks]
        assert counts[0] == counts[1], tag
    shown = re.sub(r"<[^>]*>", "", html(card))
    assert (
        "a|b `c` ``` &lt;script&gt;alert(1)&lt;/script&gt; --- ⏎---⏎# head | [x](http://evil) **b** _i_ &amp;lt;"
        in shown
    )
    assert "\x00" not in card and "\u202e" not in sections(card)["What it says"]


def test_a_long_context_is_shown_from_a_word_on_up_to_its_token(tmp_path):
    texts = ["word " * 99 + "«end»", "x" * 400 + "«y»", "«a» b «c»"]
    samples = [SAMPLE | {"context": text} for text in texts]
    card = lens_card(write_files(save_config(tmp_path / "lens"), samples=samples))
    assert re.search(r"^\| … word (word )+<b>«end»</b> \|", card, re.MULTILINE)
    assert re.search(r"^\| …x{157}<b>«y»</b> \|", card, re.MULTILINE)
    assert "| «a» b <b>«c»</b> | w4 w5 | 0.50 | 0.25 | `w6` 75% | `w7` 50% |" in card


def test_activations_that_were_read_on_the_fly_name_no_rule(tmp_path):
    data = {"positions": {"per_sequence": 8, "min_position": 1}}
    card = lens_card(write_files(save_config(tmp_path / "lens"), provenance={"cache": data}))
    assert "| positions | up to 8 of a sequence, min_position 1 |" in card


@pytest.mark.parametrize(("own", "shown"), [(3e-3, "0.003"), (0.0, "0"), (None, "0.002")])
def test_an_encoder_that_stands_still_has_a_rate_of_0(tmp_path, own, shown):
    training = RUN["training"] | {"encoder_learning_rate": own}
    card, _ = card_and_head(write_files(save_config(tmp_path / "lens"), run={"training": training}))
    assert f"decoder 0.002, encoder {shown}\n" in re.sub(r" *\|", "", sections(card)["Training"])


def test_emissions_of_codecarbon_are_summed_over_the_runs(folder):
    (folder / "emissions.csv").write_text(EMISSIONS)
    card, head = card_and_head(folder)
    assert "| emissions | 5 g of CO2 equivalents, 0.05 kWh, over 2 runs (codecarbon) |" in card
    co2 = head["co2_eq_emissions"]
    assert co2["emissions"] == pytest.approx(5.0) and co2["source"] == "codecarbon"
    assert co2["geographical_location"] == "Norway" and co2["hardware_used"] == "A CPU"


def test_the_licence_is_the_base_models_and_what_the_caller_says_goes_before(tmp_path, folder):
    given = UpstreamLicense("other", "tiny-terms", "TERMS.md", {})
    card, head = card_and_head(folder, license=given)
    assert (head["license"], head["license_name"]) == ("other", "tiny-terms")
    assert head["license_link"] == f"https://huggingface.co/org/model/blob/{'b' * 40}/TERMS.md"
    assert "`tiny-terms`" in sections(card)["Licence"] and head["license_link"] in sections(card)["Licence"]
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    local = write_files(
        save_config(tmp_path / "local", base=str(base), commit=None), provenance={"base_license": None}
    )
    card, head = card_and_head(local)
    assert (
        head["license"] == "mit" and "base_model" not in head and str(tmp_path) not in sections(card)["What it reads"]
    )
    (base / "README.md").write_text("---\nlicense: [mit\n---\n")
    assert "license" not in card_and_head(local)[1]


def test_a_published_lens_reads_the_licence_of_its_base_on_the_hub(hub, tmp_path):
    commit = hub.add_repo("model", "user/base", {"README.md": b"---\nlicense: mit\n---\n"}).head.oid
    path = save_config(tmp_path / "lens", base="user/base", commit=commit)
    write_files(path, provenance={"base_license": {"name": None}})
    before = len(hub.requests)
    assert "license" not in card_and_head(path)[1] and len(hub.requests) == before  # nothing was asked for
    assert card_and_head(path, "user/lens")[1]["license"] == "mit"


def test_the_examples_name_where_it_is(folder, tmp_path):
    card, _ = card_and_head(folder, "me/lenses", subfolder="layer 1", revision="v2026.01.31")
    assert 'from_pretrained("me/lenses", subfolder="layer 1", revision="v2026.01.31")' in card
    assert "trust_remote_code" not in card
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "a.B"}}))
    card, _ = card_and_head(folder, "me/lens")
    assert 'from_pretrained("me/lens", trust_remote_code=True)' in card
    local, _ = card_and_head(save_config(tmp_path / "local", base="/home/me/model", commit=None), "me/lens")
    assert 'from_pretrained("me/lens", base_model="path/of/model")' in local and "/home" not in local


def test_a_folder_that_holds_no_lens_is_a_mistake(tmp_path):
    with pytest.raises(ValueError, match="no config.json; pass the folder of a lens"):
        lens_card(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="a model of type 'llama'"):
        lens_card(tmp_path)
    save_config(tmp_path)
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(ValueError, match=r"metrics.json' is no JSON"):
        lens_card(tmp_path)

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from consistency_lens.evaluation import CHECKS, CONTROLS, Sample, metrics_markdown, metrics_table, samples_table
from consistency_lens.evaluation.report import CHECK_TABLES, samples_markdown
from consistency_lens.evaluation.text_length import PARTS

WIDTH = 150


@pytest.fixture
def metrics():
    names = (
        "fve", "fve_nrm", "cosine", "kl", "kl_recovered", "top1_agreement", "text_perplexity",
        "true_text_perplexity", "perplexity_ratio",
    )  # fmt: skip
    return {
        **{name: 0.25 for name in names},
        "fve": 0.4871,
        "text_perplexity": 12.345,
        "distinct_2": 0.9,
        "rows": 1024,
        "documents": 77,
        "controls": {name: {"fve": -0.321, "kl_recovered": 0.0} for name in CONTROLS},
        "ci95": {name: [0.1, 0.3] for name in names} | {"fve": [0.4512, 0.5233]},
        "seconds": 3.0,
        "samples_per_second": 341.3,
    }


def sample(**changes) -> Sample:
    values = {
        "document": 1,
        "position": 31,
        "context": "Once upon a time there was a very little girl named «Lily»",
        "explanation": " named Lily. She loved to play",
        "true_tail": "a very little girl named Lily",
        "continuation": ". She liked to sing",
        "fve": 0.4871,
        "kl": 1.234,
        "top_before": [(".", 0.41), (" and", 0.2), (" who", 0.1)],
        "top_after": [(".", 0.39), (",", 0.2), (" who", 0.1)],
    }
    return Sample(**(values | changes))


def rendered(table) -> str:
    stream = io.StringIO()
    Console(file=stream, width=WIDTH).print(table)
    return stream.getvalue()


class TestMetrics:
    def test_table_has_every_number_with_its_interval(self, metrics):
        text = rendered(metrics_table(metrics))
        assert "0.487" in text and "0.451 to 0.523" in text and "12.35" in text
        assert "1,024 held-out rows of 77 documents" in text

    def test_every_control_stands_beside_it(self, metrics):
        text = rendered(metrics_table(metrics))
        lines = text.splitlines()
        assert all(any(name in line and "-0.321" in line for line in lines) for name in CONTROLS)
        assert max(len(line) for line in lines) <= WIDTH and "…" not in text

    def test_markdown_has_the_same_rows(self, metrics):
        lines = metrics_markdown(metrics).splitlines()
        assert "| FVE | 0.487 | 0.451 to 0.523 |" in lines
        assert "| distinct bigrams | 0.900 |  |" in lines
        assert "| the lens's text | 0.487 | 0.250 |" in lines
        assert "| mean (no text, but the mean training activation) | -0.321 | 0.000 |" in lines

    def test_markdown_tables_are_even(self, metrics):
        tables = [block.splitlines() for block in metrics_markdown(metrics).split("\n\n")[:2]]
        assert all({line.count("|") for line in table} == {4} for table in tables)


def checked(metrics):
    """Metrics with the results of every check."""
    changes = {"target_logprob_change": 0.51, "own_top_logprob_change": -0.42, "target_rises": 0.83}
    words = {
        "count": 5000, "mean_drop": 0.11, "mean_kl_increase": 0.22, "mean_top_drop": 0.41, "top_share": 0.5,
        "drop_from_end": [0.33, 0.2], "count_from_end": [1000, 900],
        "greatest": [{"word": "[bold]|", "count": 10, "mean_drop": 0.44}],
    }  # fmt: skip
    return metrics | {
        "unused_token_share": 0.4,
        "true_unused_token_share": 0.3,
        "best_of_n": {"1": {"fve": 0.4, "kl_recovered": 0.5}, "2": {"fve": 0.45, "kl_recovered": 0.55}},
        "text_length": {"tokens": [1, 2]}
        | {part: {"fve": [0.1, 0.2 + shift], "kl_recovered": [0.3, 0.6]} for shift, part in enumerate(PARTS)},
        "private_code": {
            name: {"fve": 0.4, "kl_recovered": 0.5, "share_of_fve": share}
            for name, share in (("word_shuffle", 0.31), ("fresh_encoder", 0.72))
        },
        "linear_probe": {
            "probe_accuracy": [0.96, 0.5], "named_by_text": [0.9, 0.4], "named_by_shuffled_text": [0.2, 0.1],
            "rows": [1024, 1000],
        },
        "ablation": {
            "rows": 100, "retokenised": {"fve": 0.5}, "words": words,
            "sentences": {"count": 30, "mean_drop": 0.25, "mean_kl_increase": 0.1},
        },
        "steering": {
            "rows": 100, **changes,
            "controls": {"random_token": changes, "random_direction": changes | {"target_rises": 0.5}},
        },
    }  # fmt: skip


class TestChecks:
    def test_every_check_has_a_table(self):
        assert set(CHECK_TABLES) == set(CHECKS)

    def test_markdown_has_a_row_for_each_result(self, metrics):
        lines = metrics_markdown(checked(metrics)).splitlines()
        for line in (
            "| tokens unused | 0.400 |  |",
            "| 2 | 0.450 | 0.550 |",
            "| the lens's text, its own encoder | 0.487 | 0.250 | 1.000 |",
            "| the lens's text, an encoder that has read true text alone | 0.400 | 0.500 | 0.720 |",
            "| P - 1 | 0.500 | 0.400 | 0.100 | 1,000 |",
            "| 2 | 0.200 | 0.600 | 1.200 | 0.600 | 2.200 | 0.600 |",
            "| a word | 0.110 | 0.220 | 5,000 |",
            "| the word 1 before the last | 0.200 |  | 900 |",
            "| a sentence | 0.250 | 0.100 | 30 |",
            "| the last token exchanged for a donor's | 0.510 | -0.420 | 0.830 |",
            "| a random direction of that length | 0.510 | -0.420 | 0.500 |",
        ):
            assert line in lines

    def test_the_terminal_shows_the_same(self, metrics):
        text = rendered(metrics_table(checked(metrics)))
        assert max(len(line) for line in text.splitlines()) <= WIDTH and "…" not in text
        for words in ("best of n", "0.550", "its words in another order", "P - 1", "a sentence"):
            assert words in text

    def test_words_that_look_like_markup_are_shown_as_they_are(self, metrics):
        assert "“[bold]|”" in rendered(metrics_table(checked(metrics)))
        assert r"| “[bold]\|” | 0.440 |  | 10 |" in metrics_markdown(checked(metrics))

    def test_means_over_nothing_are_blank(self, metrics):
        of_single_words = checked(metrics)
        nothing = {"mean_drop": 0.0, "mean_kl_increase": 0.0, "count": 0}
        of_single_words["ablation"] |= {
            "sentences": nothing,
            "words": {**nothing, "mean_top_drop": 0.0, "drop_from_end": [], "count_from_end": [], "greatest": []},
        }
        lines = metrics_markdown(of_single_words).splitlines()
        for left_out in ("a word |  |  | 0", "the word of a text that counts most |  |  | ", "a sentence |  |  | 0"):
            assert f"| {left_out} |" in lines

    def test_nothing_stands_for_a_check_that_was_not_run(self, metrics):
        assert "another reader" not in metrics_markdown(metrics)
        assert metrics_markdown(metrics | {"best_of_n": {}}).count("| --- |") == 3

    def test_figures_of_before_the_checks_still_render(self):
        path = Path(__file__).parents[2] / "model_cards" / "tiny_stories" / "metrics.json"
        old = json.loads(path.read_text(encoding="utf-8"))
        assert f"| FVE | {old['fve']:.3f} |" in metrics_markdown(old)
        assert f"{old['fve']:.3f}" in rendered(metrics_table(old))


class TestSamples:
    def test_fits_the_terminal(self):
        text = rendered(samples_table([sample(), sample(explanation="word " * 40, context="word " * 200 + "«end»")]))
        assert max(len(line) for line in text.splitlines()) <= WIDTH
        assert "«Lily»" in text and "0.49" in text and "1.23" in text and "and 20%" in text
        assert "→ . She liked to sing" in text
        assert "«end»" in text

    def test_words_that_look_like_markup_or_break_lines_are_shown_as_they_are(self):
        text = rendered(samples_table([sample(explanation="[/bold]\nmore")]))
        assert "[/bold]⏎more" in text

    def test_markdown_has_whole_contexts_on_one_line(self):
        text = samples_markdown([sample(explanation="a | b\nc", context="word " * 50 + "«end»")])
        _, _, row = text.splitlines()
        assert r"| a \| b⏎c |" in row and "word " * 50 + "«end»" in row and "| . She liked to sing |" in row

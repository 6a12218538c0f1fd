import io

import pytest
from rich.console import Console

from consistency_lens.evaluation import CONTROLS, Sample, metrics_markdown, metrics_table, samples_table

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
        "controls": {name: {"fve": -0.321, "kl_recovered": 0.0} for name in [*CONTROLS, "residual_vq"]},
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
        assert all(any(name in line and "-0.321" in line for line in lines) for name in [*CONTROLS, "residual_vq"])
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


class TestSamples:
    def test_fits_the_terminal(self):
        text = rendered(samples_table([sample(), sample(explanation="word " * 40, context="word " * 200 + "«end»")]))
        assert max(len(line) for line in text.splitlines()) <= WIDTH
        assert "«Lily»" in text and "0.49" in text and "1.23" in text and "and 20%" in text
        assert "«end»" in text

    def test_words_that_look_like_markup_or_break_lines_are_shown_as_they_are(self):
        text = rendered(samples_table([sample(explanation="[/bold]\nmore")]))
        assert "[/bold]⏎more" in text

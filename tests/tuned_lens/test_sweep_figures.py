"""All figures of a sweep's files, and `tuned-lens plot`."""

import json
import sys

import pytest
from sweep_records import made_up, write_csv

from consistency_lens.cli.main import main
from consistency_lens.tuned_lens.plots import kl_figure
from consistency_lens.tuned_lens.sweep_figures import (
    calibrated_kl,
    file_name,
    find_sweep,
    possible_figures,
    read_run,
    read_sweep,
    write_figure,
)

FIGURES = ["cos", "delta-kl", "heatmap-prompt-0", "kl", "overview", "rank"]
SIGNATURES = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}


@pytest.fixture
def sweep(tmp_path):
    """The files of a small sweep with both lenses; returns its folder."""
    write_csv(tmp_path / "tiny-records.csv", made_up("norm", layers=3, tokens=3, prompts=2))
    write_csv(tmp_path / "tiny-records-tuned.csv", made_up("tuned", layers=3, tokens=3, prompts=2))
    layers = [{"calibrated_norm": {"kl_from_final_bits": kl}} for kl in (3, 2, 0)]
    run = {"name": "tiny", "model_id": "me/tiny-model", "lenses": ["norm", "tuned"], "layers": layers}
    (tmp_path / "tiny.json").write_text(json.dumps(run))
    return tmp_path


def plot(capsys, *flags):
    """Exit code, and what was printed, error or not."""
    code = main(["tuned-lens", "plot", *map(str, flags)])
    captured = capsys.readouterr()
    return code, captured.out if code == 0 else captured.err


def names(folder):
    return sorted(path.name for path in folder.iterdir())


class TestCommand:
    def test_writes_all_figures_and_says_where(self, sweep, capsys):
        code, shown = plot(capsys, "--records", sweep)
        assert code == 0
        files = [f"tiny-{name}.png" for name in FIGURES] + ["tiny-heatmap-prompt-0.html"]
        assert names(sweep / "plots") == sorted([*files, "tiny-plot-arguments.json"])
        assert sorted(shown.split()) == sorted(str(sweep / "plots" / name) for name in files)
        page = (sweep / "plots" / "tiny-heatmap-prompt-0.html").read_text(encoding="utf-8")
        assert "<title>me/tiny-model: prompt-0</title>" in page
        assert json.loads((sweep / "plots" / "tiny-plot-arguments.json").read_text())["records"] == str(sweep)

    def test_prefix_format_prompt_and_folder_and_no_tuned_twin(self, sweep, capsys):
        (sweep / "tiny-records-tuned.csv").unlink()
        flags = {"records": sweep / "tiny", "format": "pdf", "prompt": "prompt-1", "output_dir": sweep / "out"}
        code, shown = plot(capsys, *(part for name, value in flags.items() for part in (f"--{name}", value)))
        assert code == 0 and "the norm lens alone is drawn" in shown
        ends = ["kl.pdf", "cos.pdf", "rank.pdf", "overview.pdf", "heatmap-prompt-1.pdf", "heatmap-prompt-1.html"]
        assert names(sweep / "out") == sorted(f"tiny-{end}" for end in [*ends, "plot-arguments.json"])

    def test_a_folder_without_records(self, tmp_path, capsys):
        code, shown = plot(capsys, "--records", tmp_path)
        assert code == 2 and "no *-records.csv at" in shown and shown.count("\n") == 1

    def test_a_prefix_without_records(self, sweep, capsys):
        code, shown = plot(capsys, "--records", sweep / "other")
        assert code == 2 and "no *-records.csv at" in shown

    def test_a_folder_with_several_sweeps(self, sweep, capsys):
        write_csv(sweep / "second-records.csv", made_up("norm", layers=2, tokens=2, prompts=1))
        code, shown = plot(capsys, "--records", sweep)
        assert code == 2 and f"pass one of {sweep / 'second'}, {sweep / 'tiny'}" in shown

    def test_an_unknown_prompt_writes_nothing(self, sweep, capsys):
        code, shown = plot(capsys, "--records", sweep, "--prompt", "paris")
        assert code == 2 and "no records of 'paris'; there are 'prompt-0', 'prompt-1'" in shown
        assert not (sweep / "plots").exists()

    def test_no_records_are_said(self, capsys):
        code, shown = plot(capsys)
        assert code == 2 and "--records runs/gpt2" in shown

    def test_another_format(self, sweep, capsys, tmp_path):
        code, shown = plot(capsys, "--records", sweep, "--format", "gif")
        assert code == 2 and "gif" in shown
        (tmp_path / "plot.yaml").write_text(f"records: {sweep}\nformat: gif\n")
        code, shown = plot(capsys, "--config", tmp_path / "plot.yaml")
        assert code == 2 and "gif" in shown

    def test_matplotlib_is_named_where_it_is_missing(self, sweep, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        code, shown = plot(capsys, "--records", sweep)
        assert code == 2 and 'pip install "consistency-lens[plots]"' in shown


class TestFiles:
    def test_an_unknown_lens(self, sweep):
        write_csv(sweep / "tiny-records-tuned.csv", made_up("prism", layers=3, tokens=3, prompts=2))
        with pytest.raises(ValueError, match="the column 'lens' says 'prism', known are norm"):
            read_sweep(find_sweep(sweep))

    def test_records_of_the_tuned_lens_alone(self, sweep):
        (sweep / "tiny-records.csv").write_bytes((sweep / "tiny-records-tuned.csv").read_bytes())
        with pytest.raises(ValueError, match="has no rows of the norm lens"):
            read_sweep(find_sweep(sweep))

    def test_without_answers_there_is_no_figure_of_their_rank(self, sweep):
        lenses = {lens: made_up(lens, answers=False) for lens in ("norm", "tuned")}
        figures, notes = possible_figures(lenses, find_sweep(sweep))
        assert sorted(figures) == ["cos", "delta-kl", "kl", "overview"]
        assert notes == ["No prompt has an answer: there is no figure of its rank"]

    @pytest.mark.parametrize("format", SIGNATURES)
    def test_a_figure_that_is_drawn_twice_has_the_same_bytes(self, tmp_path, format):
        for name in ("a", "b"):
            write_figure(tmp_path / f"{name}.{format}", kl_figure({"norm": made_up("norm")}))
        first, second = ((tmp_path / f"{name}.{format}").read_bytes() for name in ("a", "b"))
        assert first == second and first.startswith(SIGNATURES[format])

    def test_the_calibrated_norm_lens_is_in_the_run_json(self, sweep):
        assert calibrated_kl(read_run(find_sweep(sweep))) == [3, 2, 0]
        assert calibrated_kl({"layers": [{"calibrated_norm": {"kl_from_final_bits": None}}]}) is None

    def test_a_sweep_without_a_run_json_is_drawn(self, sweep):
        (sweep / "tiny.json").unlink()
        assert read_run(find_sweep(sweep)) == {} and calibrated_kl({}) is None

    def test_a_prompts_id_as_a_files_name(self):
        assert file_name("../capital of/Côte d'Ivoire") == "..-capital-of-Côte-d-Ivoire"
        assert len(file_name("x" * 300)) == 80

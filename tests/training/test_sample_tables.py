import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lens_runs import tiny_trainer
from transformers import set_seed

from consistency_lens.evaluation.samples import collect_samples
from consistency_lens.training import sample_tables
from consistency_lens.training.sample_tables import CONSOLE_ROWS, SAMPLE_TABLES_FILE, SampleTables, drop_steps_after

STAGES = {"stages": ["warm_start 2s", "policy_gradient"]}


def trainer_with_tables(folder, every=2, count=5, **arguments):
    trainer = tiny_trainer(folder, **(STAGES | arguments))
    trainer.add_callback(SampleTables(trainer, trainer.eval_dataset, every, count))
    return trainer


def lines(folder):
    text = (folder / "run" / SAMPLE_TABLES_FILE).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_fixed_set_is_read_every_so_many_steps(tmp_path):
    trainer_with_tables(tmp_path, learning_rate=1e-2).train()
    rows = lines(tmp_path)
    assert [row["step"] for row in rows] == [2] * 5 + [4] * 5 + [6] * 5
    fixed = ("document", "position", "context", "true_tail", "continuation", "top_before")
    tables = [[{name: row[name] for name in fixed} for row in rows[start : start + 5]] for start in (0, 5, 10)]
    assert tables[0] == tables[1] == tables[2]
    assert len({row["document"] for row in rows}) == 5
    assert [row["fve"] for row in rows[:5]] != [row["fve"] for row in rows[10:]]  # the lens has changed


def test_the_last_table_is_what_the_lens_says_at_the_end(tmp_path):
    trainer = trainer_with_tables(tmp_path)
    trainer.train()
    samples = collect_samples(trainer.lens, trainer.eval_dataset, trainer.data_collator, 5, trainer.args.seed)
    last = lines(tmp_path)[-5:]
    assert [row["explanation"] for row in last] == [sample.explanation for sample in samples]
    assert [row["fve"] for row in last] == [sample.fve for sample in samples]


def test_training_does_not_notice(tmp_path):
    runs, states = [], []
    for trainer in (tiny_trainer(tmp_path / "plain", **STAGES), trainer_with_tables(tmp_path / "watched", every=1)):
        set_seed(0)
        trainer.lens.train()
        trainer.train()
        runs.append(losses(trainer))
        states.append((torch.random.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()))
        assert all(module.training for module in trainer.lens.modules())
    assert runs[0] == runs[1]
    assert states[0] == states[1]


def test_a_resumed_run_writes_each_step_once(tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 3}
    trainer_with_tables(tmp_path, **saved).train()
    whole = lines(tmp_path)
    with open(tmp_path / "run" / SAMPLE_TABLES_FILE, "ab") as file:
        file.write('{"step": 6, "context": "cut in the middle of ©'.encode()[:-1])
    resumed = trainer_with_tables(tmp_path, **saved)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert lines(tmp_path) == whole


def test_a_new_run_starts_with_an_empty_file(tmp_path):
    for _ in range(2):
        trainer_with_tables(tmp_path, max_steps=2, stages=["warm_start"]).train()
    assert [row["step"] for row in lines(tmp_path)] == [2] * 5


def test_other_line_breaks_in_a_text_do_not_end_a_line(tmp_path):
    path = tmp_path / "tables.jsonl"
    kept = [json.dumps({"step": step, "text": "a\u2028b\x85c"}, ensure_ascii=False) for step in (1, 2)]
    path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    drop_steps_after(path, 1)
    assert path.read_text(encoding="utf-8") == kept[0] + "\n"


class TestConsole:
    def test_a_few_rows_stand_where_the_progress_bar_is(self, tmp_path, capsys):
        trainer_with_tables(tmp_path, max_steps=2, count=8, disable_tqdm=False, stages=["warm_start"]).train()
        out = capsys.readouterr().out
        assert "step 2: held-out samples" in out
        assert out.count("«") == CONSOLE_ROWS - 2  # 4 of 8, evenly spaced

    def test_nothing_is_shown_without_one(self, tmp_path, capsys):
        trainer_with_tables(tmp_path, max_steps=2, stages=["warm_start"]).train()
        assert "held-out samples" not in capsys.readouterr().out


class TestLoggers:
    @pytest.mark.parametrize("name", ["wandb", "trackio"])
    def test_a_table_goes_to_those_that_are_on(self, tmp_path, monkeypatch, name):
        logged = []
        # the one way to make a table that both take
        table = lambda dataframe: dataframe  # noqa: E731
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(Table=table, log=logged.append))
        trainer = tiny_trainer(tmp_path)
        trainer.args.report_to = [name]
        callback = SampleTables(trainer, trainer.eval_dataset, every=2, count=3)
        callback.report(4, callback.read())
        (entry,) = logged
        assert entry["train/global_step"] == 4
        assert list(entry["samples"].columns) == list(sample_tables.SAMPLE_COLUMNS) and len(entry["samples"]) == 3
        assert entry["samples"]["context"].str.contains("«").all()

    def test_tensorboard_gets_markdown(self, tmp_path, monkeypatch):
        class Writer:
            def add_text(self, name, text, step):
                self.added = (name, text, step)

        class Callback:
            tb_writer = Writer()

        monkeypatch.setattr(sample_tables, "TensorBoardCallback", Callback)
        trainer = tiny_trainer(tmp_path)
        trainer.callback_handler.callbacks.append(Callback())
        callback = SampleTables(trainer, trainer.eval_dataset, every=2, count=3)
        callback.report(4, callback.read())
        name, text, step = Callback.tb_writer.added
        assert (name, step, len(text.splitlines())) == ("samples", 4, 5)


class TestWhereItStaysSilent:
    def test_a_lens_that_is_not_finite(self, tmp_path, caplog):
        trainer = trainer_with_tables(tmp_path, max_steps=2, stages=["warm_start"])
        with torch.no_grad():
            trainer.lens.encoder.output_map.bias[0] = float("nan")
        trainer.train()
        assert any("none at step 2" in record.message for record in caplog.records)
        assert not (tmp_path / "run" / SAMPLE_TABLES_FILE).exists()

    @pytest.mark.parametrize("settings", [{"every": 0}, {"every": 1, "count": 0}])
    def test_numbers_below_1(self, tmp_path, settings):
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            trainer = tiny_trainer(tmp_path)
            SampleTables(trainer, trainer.eval_dataset, **settings)


SCRIPT = """
import json, os, sys
from pathlib import Path
sys.path[:0] = sys.argv[2].split(":")
from lens_runs import tiny_trainer
from transformers import set_seed
from consistency_lens.evaluation import EvaluationArguments, Evaluator
from consistency_lens.training.evaluation_callback import EvaluateLens
from consistency_lens.training.sample_tables import SampleTables
folder, rank = Path(sys.argv[1]), os.environ["RANK"]
histories = []
for name in ("plain", "watched"):
    set_seed(0)
    trainer = tiny_trainer(
        folder / f"{name}{rank}", max_steps=4, per_device_train_batch_size=4, eval_strategy="steps", eval_steps=2,
        stages=["warm_start 2s", "policy_gradient"],
    )
    if name == "watched":
        trainer.add_callback(SampleTables(trainer, trainer.eval_dataset, 1, 3))
        arguments = EvaluationArguments(rows=8, controls=["mean", "shuffled"], disable_tqdm=True)
        evaluator = Evaluator(trainer.lens, trainer.eval_dataset, trainer.data_collator, arguments)
        trainer.add_callback(EvaluateLens(trainer, evaluator))
    trainer.train()
    histories.append(trainer.state.log_history)
(folder / f"{rank}.json").write_text(json.dumps(histories))
"""


@pytest.mark.slow
def test_two_processes_train_as_without_it_and_agree_on_the_figures(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    tests = Path(__file__).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(
        [*command, str(tmp_path), f"{tests}:{tests.parent}"],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (plain, watched), (_, watched_there) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for name in ("loss", "eval_loss"):
        values = [[entry[name] for entry in of if name in entry] for of in (plain, watched, watched_there)]
        assert values[0] == values[1] == values[2] and len(values[0]) > 1
    here, there = ([entry["eval_fve"] for entry in of if "eval_fve" in entry] for of in (watched, watched_there))
    assert here == there and len(here) == 2
    assert len(lines(tmp_path / "watched0")) == 4 * 3
    assert not (tmp_path / "watched1" / "run" / SAMPLE_TABLES_FILE).exists()

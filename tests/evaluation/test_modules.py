import configparser
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from consistency_lens.evaluation import metrics
from consistency_lens.evaluation.modules import NAMES, load_metric, module_path

evaluate = pytest.importorskip("evaluate")
ROOT = Path(__file__).parents[2]


def vectors(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class TestValues:
    def test_fve_is_that_of_the_evaluation(self):
        target, prediction, mean = vectors(0, 7, 5), vectors(1, 7, 5), vectors(2, 5)
        result = load_metric("fve").compute(references=target, predictions=prediction, mean=mean)
        assert result == {"fve": pytest.approx(metrics.fve(target, prediction, mean).item(), rel=1e-9)}

    def test_fve_of_the_identity_and_of_the_mean(self):
        target, mean, module = vectors(0, 7, 5), vectors(2, 5), load_metric("fve")
        assert module.compute(references=target, predictions=target, mean=mean) == {"fve": 1}
        assert module.compute(references=target, predictions=mean.expand(7, 5), mean=mean) == {"fve": 0}

    def test_batches_are_summed_before_they_are_divided(self):
        target, prediction, mean, module = vectors(0, 7, 5), vectors(1, 7, 5), vectors(2, 5), load_metric("fve")
        for rows in (slice(0, 2), slice(2, 7)):
            module.add_batch(references=target[rows], predictions=prediction[rows])
        assert module.compute(mean=mean)["fve"] == pytest.approx(
            metrics.fve(target, prediction, mean).item(), rel=1e-9
        )

    def test_kl_recovered(self):
        kl, kl_mean = vectors(0, 9).abs().double(), vectors(1, 9).abs().double()
        result = load_metric("kl_recovered").compute(predictions=kl, references=kl_mean)
        assert result == {"kl_recovered": pytest.approx(metrics.kl_recovered(kl, kl_mean).item(), rel=1e-9)}

    @pytest.mark.parametrize("n", [1, 2, 3, 9])
    def test_distinct_n(self, n):
        ids = torch.randint(4, (5, 6), generator=torch.Generator().manual_seed(0))
        assert load_metric("distinct_n").compute(predictions=ids, n=n) == {"distinct_n": metrics.distinct_n(ids, n)}

    def test_texts_of_several_lengths_are_refused(self):
        with pytest.raises(ValueError, match="of one length, got 1 to 2 tokens"):
            load_metric("distinct_n").compute(predictions=[[1, 2], [3]])


class TestLoading:
    @pytest.mark.parametrize("name", NAMES)
    def test_a_module_says_what_it_wants(self, name):
        module = evaluate.load(module_path(name))
        words = {"fve": "variance", "kl_recovered": "kl recovered", "distinct_n": "distinct"}[name]
        assert words in module.description.lower()
        assert "predictions" in module.inputs_description and module.features.keys() >= {"predictions"}

    def test_without_a_network_and_from_an_empty_cache(self, tmp_path):
        script = (
            "import json, socket\n"
            "def refuse(*arguments): raise OSError('no network')\n"
            "socket.socket.connect = refuse\n"
            "from consistency_lens.evaluation.modules import NAMES, load_metric\n"
            "print(json.dumps([load_metric(name).name for name in NAMES]))\n"
        )
        environment = {
            **os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path),
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert json.loads(done.stdout.splitlines()[-1]) == list(NAMES)

    def test_unknown_name(self):
        with pytest.raises(ValueError, match="'bleu' is not one; choose from distinct_n, fve, kl_recovered"):
            load_metric("bleu")


def test_every_module_is_part_of_the_installed_package():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    patterns = setup["options.package_data"]["consistency_lens"].split()
    installed = {path for pattern in patterns for path in (ROOT / "src" / "consistency_lens").glob(pattern)}
    scripts = {ROOT / "src/consistency_lens/evaluation/modules" / name / f"{name}.py" for name in NAMES}
    assert scripts <= installed

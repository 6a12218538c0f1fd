"""The progress bar of a fit."""

from typing import Any

from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments


class FitProgress(ProgressCallback):
    """The trainer's bar: the KL stands at its end, and a reading of held-out text has a line of its own."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is None or logs is None:
            return
        if "kl_bits" in logs:
            self.training_bar.set_postfix_str(f"KL {logs['kl_bits']:.3f} bits")
        if "eval_kl_bits" in logs:
            self.training_bar.write(told(state.global_step, logs))


def told(step: int, logs: dict[str, float]) -> str:
    """One line on a reading of held-out text."""
    at_depths = ", ".join(
        f"{value:.3f} at {name.rpartition('_')[2]} %"
        for name, value in logs.items()
        if name.startswith("eval_kl_bits_")
    )
    return f"step {step}, held out: KL {logs['eval_kl_bits']:.3f} bits ({at_depths})"

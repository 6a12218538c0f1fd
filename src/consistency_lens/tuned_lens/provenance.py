"""What `provenance.json` of a tuned lens says: how it was fitted, and what pins the lens to its model."""

from typing import Any

from ..hub.provenance import git_commit, package_versions
from .fit_arguments import FitArguments
from .held_out import HeldOutKL
from .lens_places import clean_name
from .trainer import TunedLensTrainer

# What decides the bytes of a lens.
PACKAGES = ("torch", "transformers", "datasets", "numpy", "safetensors")
RANK_RULE = "clip(d//32,64,256); 256 from d=4096"
DEPTH_KEY = "@{25,50,75}%"


def provenance_of(
    args: FitArguments,
    trainer: TunedLensTrainer,
    dataset: dict[str, Any],
    identity: dict[str, Any],
    ridge_tokens: int,
    held_out: HeldOutKL,
) -> dict[str, Any]:
    """The provenance of a lens that was fitted; KPIs and acceptance are filled in by the gates.

    Args:
        trainer: that took the KL steps.
        dataset: `TokenBlocks.description`.
        identity: `model_commit, tokenizer_commit, weights_hash, tokenizer_hash` of the subject.
        ridge_tokens: that the closed form has read.
        held_out: the figures of the whole evaluation.
    """
    training = trainer.args
    shares = ",".join(f"{share:g}" for share in training.position_range)
    where = f"positions={trainer.num_positions} in [{shares}] of context"
    return {
        "enabled": True,
        "model_id": args.model,
        "clean_model_name": clean_name(args.model),
        "sha": git_commit(),
        "seed": training.seed,
        **identity,
        "dataset": {**dataset, "sample_description": f"{dataset['sample_description']}; {where}"},
        "budget": {
            "tokens": ridge_tokens + trainer.tokens,
            "seq_len": dataset["seq_len"],
            "positions_per_seq": trainer.num_positions,
        },
        **lens_settings(args, trainer),
        **step_settings(trainer),
        "ridge": {"penalty": args.ridge, "tokens": ridge_tokens},
        "tokens_consumed": {
            "ridge": ridge_tokens,
            "training": trainer.tokens,
            "validation": dataset["tokens"]["validation"],
        },
        f"val_kl_bits{DEPTH_KEY}": held_out.metrics()[f"val_kl_bits{DEPTH_KEY}"],
        "kpis": None,
        "acceptance": None,
        "versions": package_versions(PACKAGES),
    }


def lens_settings(args: FitArguments, trainer: TunedLensTrainer) -> dict[str, Any]:
    """What the lens is, and what it was held to."""
    lens, training = trainer.lens, trainer.args
    return {
        "capacity": {"rank_k": RANK_RULE if args.rank == "auto" else args.rank},
        "translator": {
            "rank": lens.config.rank or "full",
            "temperature": lens.config.learn_temperature,
            "place": lens.config.translator_place,
            "parameters": sum(parameter.numel() for parameter in lens.parameters()),
        },
        "regularizers": {
            "l2_smallness": training.smallness,
            "smooth_depth": training.smoothness,
            "precond": args.preconditioner,
        },
        "preconditioner": {"type": args.preconditioner, "path": None},
    }


def step_settings(trainer: TunedLensTrainer) -> dict[str, Any]:
    """How the KL steps were taken."""
    training, state = trainer.args, trainer.state
    micro_batch = training.per_device_train_batch_size * training.world_size
    return {
        "batching": {
            "micro_batch_seqs": micro_batch,
            "grad_accum": training.gradient_accumulation_steps,
            "effective_batch_seqs": micro_batch * training.gradient_accumulation_steps,
        },
        "optim": {
            "name": training.translator_optim,
            "lr": training.learning_rate,
            "betas": [training.adam_beta1, training.adam_beta2],
            "weight_decay": training.weight_decay,
            "schedule": "cosine_to_zero" if training.lr_scheduler_type == "cosine" else training.lr_scheduler_type,
            "total_steps": state.max_steps,
            "warmup_steps": training.get_warmup_steps(state.max_steps),
            "early_stopping_patience": training.early_stopping_patience,
        },
        "schedule": {
            "layers_per_step": trainer.num_layers,
            "positions_per_seq": trainer.num_positions,
            "steps_per_pass": trainer.steps_per_pass,
            "steps_done": state.global_step,
            "best_step": state.best_global_step,
            "teacher_top_k": training.teacher_top_k,
            "head_dtype": str(trainer.head.weight.dtype).removeprefix("torch."),
        },
    }

"""A trainer that publishes what it trains: the artifact with its code and its card, and checkpoints if asked to."""

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from ..checkpoints.trainer import WholeCheckpointTrainer
from ..hub.lens_card import write_lens_card
from ..hub.staging_folder import StagingFolder, remove_left
from ..hub_connection import first_line
from ..hub_upload import commit_folder, create_repo, link_or_copy, stage_artifact
from ..modeling_consistency_lens import ConsistencyLensModel

logger = logging.getLogger(__name__)

LAST_CHECKPOINT = "last-checkpoint"
STAGING = ".push"
WITH_CHECKPOINTS = (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)


class PublishingTrainer(WholeCheckpointTrainer):
    """The part of `ConsistencyLensTrainer` that speaks to the Hub; `Trainer`'s own uploads the whole output folder.

    `push_to_hub` and the settings beside it (`hub_model_id, hub_strategy, hub_private_repo, hub_revision, hub_token,
    hub_always_push`) are as in `Trainer`. What goes up while the run trains goes up in the background, and if that
    fails, it is a warning.

    Attributes:
        lens: without wrapper.
    """

    lens: ConsistencyLensModel
    hub_model_id: Any
    push_in_progress: Any

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Makes the repository if it is not there; ValueError where the user can mend why it cannot be."""
        if not self.is_world_process_zero():
            return
        self.hub_model_id = make_repository(self.args, token, private)
        self.push_in_progress = None
        remove_left(self.staging_place)

    # --- while the run trains

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Does nothing yet: when `Trainer` calls this, the checkpoint is not whole."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.push_to_hub and self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            self.push_checkpoint(Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}")

    def push_checkpoint(self, checkpoint: Path) -> None:
        """Begins to upload the artifact of a checkpoint, and the checkpoint itself where `hub_strategy` says so.

        All goes in one commit. Without `hub_always_push` there is none while an earlier one is on its way.
        """
        before = self.push_in_progress
        if before is not None and not before.is_done() and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        name = None
        if self.args.hub_strategy in WITH_CHECKPOINTS:
            name = LAST_CHECKPOINT if self.args.hub_strategy == HubStrategy.CHECKPOINT else checkpoint.name
        message = f"Training in progress, step {self.state.global_step}"
        try:
            job = self.begin_upload(checkpoint, message, checkpoint_name=name)
        except (OSError, ValueError) as error:
            return tell_failure(error)
        job.add_done_callback(lambda job: tell_failure(job.exception()))
        if before is None or before.is_done():
            jobs: Any = [job]
            self.push_in_progress = PushInProgress(jobs)
        else:
            before.jobs.append(job)

    @property
    def staging_place(self) -> Path:
        """Where checkpoints are staged; other trainings may write to the same `output_dir`."""
        return Path(str(self.args.output_dir)).resolve() / STAGING

    @cached_property
    def uploads(self) -> ThreadPoolExecutor:
        """One thread for all uploads, so that an older checkpoint does not land on a newer one."""
        return ThreadPoolExecutor(1)

    def begin_upload(
        self,
        folder: Path,
        message: str,
        token: str | None = None,
        revision: str | None = None,
        checkpoint_name: str | None = None,
    ) -> Future[CommitInfo]:
        """Stages an artifact, and uploads it in the background; the process waits for it before it ends.

        Args:
            folder: of the artifact.
            checkpoint_name: folder in the repository for all that `folder` holds; None: the artifact alone.

        Raises:
            OSError, ValueError: if it cannot be staged.
        """
        staging = StagingFolder(self.staging_place)
        delete: list[str] = []
        try:
            stage_artifact(folder, staging.path, type(self.lens))
            if checkpoint_name is not None:
                stage_checkpoint(folder, staging.path / checkpoint_name)
                delete.append(f"{checkpoint_name}/*")  # what another one under that name had, and this one has not
            return self.uploads.submit(self.upload, staging, message, token, revision, delete)
        except BaseException:
            staging.remove()
            raise

    def upload(
        self, staging: StagingFolder, message: str, token: str | None, revision: str | None, delete: list[str]
    ) -> CommitInfo:
        """Uploads a staged folder and removes it."""
        token = token or self.args.hub_token
        revision = revision or self.args.hub_revision
        repo_id = str(self.hub_model_id)
        try:
            # of these very weights; written last, for transformers and PEFT have cards of their own
            write_lens_card(staging.path, repo_id, revision=revision)
            return commit_folder(
                staging.path, repo_id, commit_message=message, token=token, revision=revision, delete=delete
            )
        finally:
            staging.remove()

    # --- when it has trained

    def push_to_hub(  # type: ignore[override]
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Saves the lens to `output_dir` and uploads what there belongs to it; every process has to call it.

        Returns:
            The commit, or without `blocking` its future; None on other processes than the first.

        Raises:
            ValueError, HubError: as in `hub_upload.create_repo`.
        """
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        return self.push_output_dir(commit_message, blocking, token, revision)

    def push_output_dir(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """As `push_to_hub`, of what has been saved to `output_dir` already."""
        if not self.is_world_process_zero():
            return None
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._finish_current_push()
        folder = Path(str(self.args.output_dir))
        job = self.begin_upload(folder, commit_message or "End of training", token, revision)
        return job.result() if blocking else job

    def create_model_card(self, *_args: Any, **_kwargs: Any) -> None:
        """Does nothing: the card of a lens is written when it is measured, and anew when it is published."""


def make_repository(args: TrainingArguments, token: str | None = None, private: bool | None = None) -> str:
    """Makes the repository that a run publishes to, if it is not there; returns its whole id.

    Raises:
        ValueError, HubError: as in `hub_upload.create_repo`.
    """
    return create_repo(
        args.hub_model_id or Path(str(args.output_dir)).resolve().name,
        private=args.hub_private_repo if private is None else private,
        token=token or args.hub_token,
        revision=args.hub_revision,
    )


def stage_checkpoint(checkpoint: Path, staging: Path) -> None:
    """Lays out a whole checkpoint as it is, so that its manifest holds where it is pulled."""
    for file in checkpoint.rglob("*"):
        if file.is_file():
            target = staging / file.relative_to(checkpoint)
            target.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(file, target)


def tell_failure(error: BaseException | None) -> None:
    """Warns of a checkpoint that could not be uploaded."""
    if error is not None:
        logger.warning("not uploaded: %s; the next checkpoint, or the end of the training, will be", first_line(error))

"""Weights & Biases (WANDB_MODE=offline works without its server)."""

import uuid
from collections.abc import Mapping

from megatron.training.logs.loggers import PackageLogger


class Logger(PackageLogger):
    """A run of wandb; a resumed one is the same run, in which steps that were taken again stay as they were."""

    package = "wandb"

    def _begin(self) -> None:
        self._wandb_run = self._module.init(
            project=self._run.project,
            entity=self._run.entity,
            name=self._run.name,
            id=self._identity(uuid.uuid4().hex[:12]),
            resume="allow",
            dir=str(self._run.folder),
            config=self._settings(),
        )

    def _log(self, iteration: int, scalars: Mapping[str, float]) -> None:
        self._wandb_run.log(dict(scalars), step=iteration)

    def _close(self) -> None:
        self._wandb_run.finish()

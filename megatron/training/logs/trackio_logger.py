"""trackio, which keeps its runs on this machine."""

import time
from collections.abc import Mapping

from megatron.training.logs.loggers import PackageLogger


class Logger(PackageLogger):
    """A run of trackio, which it knows by its name; a resumed one is the same run."""

    package = "trackio"

    def _begin(self) -> None:
        name = self._identity(self._run.name or time.strftime("run-%Y%m%d-%H%M%S"))
        self._module.init(project=self._run.project, name=name, resume="allow", config=self._settings())

    def _log(self, iteration: int, scalars: Mapping[str, float]) -> None:
        self._module.log(dict(scalars), step=iteration)

    def _close(self) -> None:
        self._module.finish()

"""MLflow: on the server of MLFLOW_TRACKING_URI, or in a data base in the loggers' folder."""

from collections.abc import Mapping

from megatron.training.logs.loggers import PackageLogger


class Logger(PackageLogger):
    """A run of MLflow; a resumed one is the same run."""

    package = "mlflow"

    def _begin(self) -> None:
        module, run, folder = self._module, self._run, self._run.folder.absolute()
        if not module.is_tracking_uri_set():
            module.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
            if module.get_experiment_by_name(run.project) is None:
                module.create_experiment(run.project, artifact_location=(folder / "mlflow").as_uri())
        module.set_experiment(run.project)
        earlier = self._earlier()
        handle = module.start_run(run_id=earlier, run_name=None if earlier else run.name)
        if earlier is None:
            self._keep(handle.info.run_id)
        module.log_dict(self._settings(), "settings.json")

    def _log(self, iteration: int, scalars: Mapping[str, float]) -> None:
        self._module.log_metrics(dict(scalars), step=iteration, synchronous=False)

    def _close(self) -> None:
        self._module.flush_async_logging()
        self._module.end_run()

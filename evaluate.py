"""Evaluate a model: `python evaluate.py checkpoint=outputs/runs/mine evaluate=[loss,answers,choice]`; or compare
several: `python evaluate.py compare=[outputs/runs/a,outputs/runs/b]`. `--help` lists every choice."""

from collections.abc import Sequence

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from gpt.config import launch
from gpt.evaluation.settings import EvaluateConfig
from gpt.terminal.console import escape


def evaluate(cfg: EvaluateConfig, typed: Sequence[str] = ()) -> None:
    """Each kind of evaluation on each model: prints tables and writes results. With several models, compares them.
    `typed`: the overrides."""
    from gpt.evaluation import comparison, questions, record, running, subject
    from gpt.evaluation.task import Task
    from gpt.machine import device  # here, because torch takes seconds to load

    where = device.choose_device(cfg.device, cfg.threads)
    names = subject.names(cfg)
    found: dict[str, list[tuple[str, running.Result]]] = {kind: [] for kind in cfg.chosen}
    labels = comparison.labels(names)
    for name in names:
        model = subject.load(name, cfg, where)
        task = Task(model, questions.open_part(cfg, model, typed), cfg.batch_size, cfg.seed, where)
        with record.owned(model.folder), device.memory_errors():
            for kind, settings in cfg.chosen.items():
                result = running.evaluate(kind, settings, task, cfg)
                running.show(result)
                found[kind].append((labels[name], result))
    if cfg.compare:
        for kind, settings in cfg.chosen.items():
            compared = comparison.compare(kind, settings, found[kind], cfg.resamples, cfg.seed)
            comparison.show(compared)
            print(escape(str(comparison.write(compared, subject.ELSEWHERE / (cfg.name or "comparison")))))


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    evaluate(launch.load(cfg, EvaluateConfig), HydraConfig.get().overrides.task)


if __name__ == "__main__":
    launch.launch(main, "evaluate")

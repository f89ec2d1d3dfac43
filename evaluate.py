"""Evaluate a model: `python evaluate.py checkpoint=outputs/runs/mine evaluate=[loss,answers,choice]`; or compare
several: `python evaluate.py compare=[outputs/runs/a,outputs/runs/b]`. `--help` lists every choice."""

from collections.abc import Sequence  # noqa: I001, gpt before hydra: it refuses a Python that is too old
from functools import partial

from gpt.config import launch
from gpt.evaluation.settings import EvaluateConfig
from gpt.terminal.console import escape

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig


def evaluate(cfg: EvaluateConfig, typed: Sequence[str] = ()) -> None:
    """Each kind of evaluation on each model: prints tables and writes results. With several models, compares them.
    `typed`: the overrides."""
    from gpt.evaluation import labels, paired_comparison, questions, record, running, subject
    from gpt.evaluation.task import Task
    from gpt.machine import device  # here, because torch takes seconds to load

    where = device.choose_device(cfg.device, cfg.threads)
    names = subject.names(cfg)
    label_of = labels.labels(names)
    found: list[tuple[str, running.Result]] = []
    for name in names:
        model = subject.load(name, cfg, where)
        task = Task(model, partial(questions.open_part, cfg, model, typed), cfg.batch_size, cfg.seed, where)
        with record.owned(model.folder), device.memory_errors():
            for kind, settings in cfg.chosen.items():
                result = running.evaluate(kind, settings, task, cfg)
                running.show(result)
                found.append((label_of[name], result))
    for of in dict.fromkeys((result.path.parent, result.subject) for _, result in found):
        running.mirror([result for _, result in found if (result.path.parent, result.subject) == of], cfg)
    if cfg.checkpoints == "all":
        running.draw([result for _, result in found])
    if cfg.compare:
        for kind, settings in cfg.chosen.items():
            own = [(label, result) for label, result in found if result.kind == kind]
            compared = paired_comparison.compare(kind, settings, own, cfg.resamples, cfg.seed)
            paired_comparison.show(compared)
            print(escape(str(paired_comparison.write(compared, subject.ELSEWHERE / (cfg.name or "comparison")))))


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    evaluate(launch.load(cfg, EvaluateConfig), HydraConfig.get().overrides.task)


if __name__ == "__main__":
    launch.launch(main, "evaluate")

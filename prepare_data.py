"""Raw data -> cleaned, split and tokenized data on disk. `python prepare_data.py --help` shows what can be chosen."""

from gpt.config import launch  # noqa: I001, before hydra: it refuses a Python that is too old
from gpt.config.schema import PrepareConfig
from gpt.files import paths

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="conf", config_name="prepare_data")
def main(cfg: DictConfig) -> None:
    data = launch.load(cfg, PrepareConfig).data

    from gpt.data import data_card, preparation, sources
    from gpt.terminal import console  # after the configuration is known to be right: errors in it show at once

    is_typed = sources.path_is_typed(HydraConfig.get().overrides.task, run_dir=None)
    made = preparation.prepare(data, paths.PROJECT_ROOT, is_typed)
    print(data_card.summary(made.meta))
    print(console.escape(str(made.folder.parent)))


if __name__ == "__main__":
    launch.launch(main, "prepare_data")

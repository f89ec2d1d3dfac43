"""Raw data -> cleaned, split and tokenized data on disk. `python prepare_data.py --help` shows what can be chosen."""

import hydra
from omegaconf import DictConfig

from gpt.config import launch
from gpt.config.schema import PrepareConfig
from gpt.files import paths


@hydra.main(version_base="1.3", config_path="conf", config_name="prepare_data")
def main(cfg: DictConfig) -> None:
    data = launch.load(cfg, PrepareConfig).data

    from gpt.data import data_card, preparation, prepared
    from gpt.terminal import console  # after the configuration is known to be right: errors in it show at once

    directory = preparation.prepare(data, paths.PROJECT_ROOT)
    print(data_card.summary(prepared.read_meta(directory)))
    print(console.escape(str(directory)))


if __name__ == "__main__":
    launch.launch(main, "prepare_data")

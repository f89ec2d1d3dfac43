"""Raw data -> cleaned, split and tokenized data on disk. `python prepare_data.py --help` shows what can be chosen."""

import hydra
from omegaconf import DictConfig

from gpt import config
from gpt.schema import PrepareConfig


@hydra.main(version_base="1.3", config_path="conf", config_name="prepare_data")
def main(cfg: DictConfig) -> None:
    data = config.load(cfg, PrepareConfig).data

    from gpt import cards, console, corpus  # after the configuration is known to be right: errors in it show at once

    directory = corpus.prepare(data, config.PROJECT_ROOT)
    print(cards.summary(corpus.read_meta(directory)))
    print(console.escape(str(directory)))


if __name__ == "__main__":
    config.launch(main, "prepare_data")

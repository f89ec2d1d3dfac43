"""Train a GPT: `python train.py model=small data=medquad`. `python train.py --help` lists every choice."""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from gpt import config
from gpt.schema import TrainConfig, as_dict


def train(cfg: TrainConfig) -> float:
    """One run from start to end. Returns the best validation loss, which is what a sweep minimises."""
    import torch  # here, because it takes seconds: --help and a misspelt key shall not wait for it

    from gpt import checkpoint, console, corpus, device, figures, loop, model_card, optim, sampling, tokenizer, track
    from gpt.data import Split, TrainBatches, eval_batches
    from gpt.model import GPT

    run_dir = Path(cfg.out_dir)
    with console.log_to(run_dir / "train.log"):
        device.keep_memory()
        where = device.choose_device(cfg.device)
        dtype = device.choose_dtype(cfg.train.dtype, where)
        tokens = tokenizer.load(cfg.data.tokenizer)
        prepared = corpus.ensure(cfg.data, config.PROJECT_ROOT)
        train_split, val_split = (Split.open(prepared, name) for name in ("train", "val"))
        for split in (train_split, val_split):
            split.check_vocabulary(tokens.n_vocab)
        batches = TrainBatches(train_split, cfg.data, cfg.model.context_length, cfg.train, cfg.seed)
        val_batches = eval_batches(val_split, cfg.data, cfg.model.context_length, cfg.train)
        total_steps, budget = loop.count_steps(cfg.train, batches)
        optim.check_schedule(cfg.schedule, total_steps)

        torch.manual_seed(cfg.seed)
        model = GPT(cfg.model, tokens.n_vocab).to(where)
        optimizer = optim.build(model, cfg.optimizer)
        template = None if cfg.data.kind == "text" else cfg.data.template
        identity = checkpoint.Identity(cfg.model, tokens.n_vocab, tokens.name, template)
        settings = as_dict(cfg) | {"data_fingerprint": corpus.read_meta(prepared)["fingerprint"]}
        progress = checkpoint.resume(run_dir, cfg.resume, model, optimizer, identity, settings)
        config.save(cfg, run_dir / "config.yaml")
        if cfg.train.compile:
            for block in model.h:  # one block is compiled, the others reuse it
                block.compile()

        console.describe(
            model=f"{cfg.model.name}, {model.n_parameters():,} parameters, context {cfg.model.context_length}",
            data=f"{cfg.data.name}, {batches.describe()}",
            budget=f"{total_steps} steps ({budget}) of about {cfg.train.tokens_per_step:,} tokens",
            device=device.describe(where, dtype),
        )
        last_model = run_dir / "last_model.pt"
        if loop.is_finished(progress, cfg.train, total_steps):
            console.say(f"already at step {progress.step} of {total_steps}")
            if last_model.exists():  # else the run was killed at its very end: what is missing is made below
                console.say(str(run_dir))
                return progress.best

        events = loop.fit(
            model, optimizer, batches, val_batches, cfg.train, cfg.schedule, total_steps, progress, cfg.seed,
            where, dtype, torch.from_numpy(tokens.bytes_per_token()).to(where),
        )  # fmt: skip
        with (
            track.start(cfg, run_dir, progress.step) as log,
            console.ProgressBar(total_steps, progress.step) as bar,
        ):
            for event in events:
                log.metrics(event.row)
                bar.update(event.row)
                if event.sample_due:
                    samples = sampling.preview(model, tokens, cfg.data.prompts, template, cfg.sample, cfg.seed)
                    log.samples(event.row["step"], samples)
                    console.show_samples(samples)
                if event.checkpoint_due or log.stop_requested:
                    path = checkpoint.publish(
                        run_dir, model, optimizer, progress, identity, settings, cfg.train.keep_checkpoints
                    )
                    log.checkpoint(path, progress)
                if log.stop_requested:
                    console.say(f"stopped from the W&B dashboard after step {progress.step}")
                    break
            checkpoint.save_model(last_model, model, identity, progress.step)
            rows = track.read_rows(run_dir / "metrics.jsonl")
            figures.loss_curve(rows, run_dir / "loss.png", title=f"{cfg.model.name} on {cfg.data.name}")
            model_card.write(run_dir / "README.md", cfg, rows, model.n_parameters(), prepared)
            log.finish(last_model, progress)
        console.say(f"best val/loss {progress.best:.4f} at step {progress.best_step}; run directory:")
        console.say(str(run_dir))
        return progress.best


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float:
    return train(config.load(cfg, TrainConfig))


if __name__ == "__main__":
    config.launch(main, "train")

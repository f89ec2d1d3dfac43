"""Train a GPT: `python train.py model=small data=medquad`. `python train.py --help` lists every choice."""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from gpt.config import launch
from gpt.config.schema import TrainConfig, as_dict
from gpt.errors import Interrupted
from gpt.files import paths
from gpt.machine import cost


def train(cfg: TrainConfig) -> float | cost.Cost:
    """One run from start to end. Returns the best validation loss, which is what a sweep minimises."""
    if cfg.dry_run:
        return cost.of_run(cfg, paths.PROJECT_ROOT)  # which gpt/config/launch.py prints
    import torch  # here, because it takes seconds: --help and a misspelt key shall not wait for it

    from gpt import finetune, loop, optim, references, sampling, tokenizer
    from gpt.data import batching, preparation
    from gpt.files import directory
    from gpt.machine import compilation, device, memory
    from gpt.progress import is_finished
    from gpt.runs import checkpoint, interrupt, results, resume, saver, track
    from gpt.terminal import console
    from gpt.weights import loading

    run_dir = Path(cfg.out_dir)
    with directory.owned(run_dir), console.log_to(run_dir / "train.log"), device.memory_errors():
        found = resume.find(run_dir, cfg.resume)
        where, dtype, environment = device.choose(cfg.device, cfg.train, resume.environment(found))
        tokens = tokenizer.load(cfg.data.tokenizer)
        first = None if found else loading.find(cfg.init, cfg.model, tokens.name, paths.PROJECT_ROOT)
        rows_at_once = memory.micro_batch(cfg, tokens.n_vocab, where, dtype, resume.environment(found))
        environment["micro_batch"] = rows_at_once
        saver.check_space(run_dir, cfg, tokens.n_vocab)
        prepared = preparation.ensure(cfg.data, paths.PROJECT_ROOT)
        in_rows = memory.with_micro_batch(cfg, rows_at_once)
        batches, val_batches = batching.open_batches(prepared, in_rows, tokens.n_vocab)
        total_steps, budget = batching.count_steps(cfg.train, batches)
        optim.check_schedule(cfg.schedule, total_steps)
        asked = references.questions(cfg.data, cfg.sample.references, prepared)
        flops = cost.run_flops(cfg, tokens.n_vocab, total_steps)
        environment["compile"] = compilation.decide(cfg.train, resume.environment(found), where, dtype, flops)

        torch.manual_seed(cfg.seed)
        model = loading.build(cfg.model, tokens.n_vocab, first).to(where)
        model.gradient_checkpointing = cfg.train.gradient_checkpointing
        finetune.prepare(model, cfg.finetune, cfg.seed)
        optimizer = optim.build(model, cfg.optimizer, cfg.finetune)
        template = None if cfg.data.kind == "text" else cfg.data.template
        identity = checkpoint.Identity(cfg.model, tokens.n_vocab, tokens.name, template, cfg.lora)
        settings = as_dict(cfg) | {"total_steps": total_steps, "environment": environment}
        settings["weights"] = first.origin if first else resume.weights(found)
        settings["data"]["fingerprint"] = preparation.read_meta(prepared)["fingerprint"]
        progress = resume.restore(found, model, optimizer, identity, settings, cfg.allow_changed)
        launch.save(cfg, run_dir / "config.yaml")
        if environment["compile"]:
            compilation.compile_blocks(model, paths.PROJECT_ROOT / "outputs" / "compiled")

        console.describe(
            model=f"{cfg.model.name}, {finetune.describe(model, cfg.finetune)}, context {cfg.model.context_length}",
            data=f"{cfg.data.name}, {batches.describe()}",
            budget=f"{total_steps} steps ({budget}) of about {cfg.train.tokens_per_step:,} tokens",
            device=device.describe(where, environment),
        )
        last_model = run_dir / results.LAST_MODEL
        if is_finished(progress, cfg.train, total_steps):
            console.say(f"already at step {progress.step} of {total_steps}\n{run_dir}")
            if last_model.exists():  # else the run was killed at its very end: what is missing is made below
                return progress.best

        with (
            track.start(cfg, run_dir, progress.reported) as log,
            console.ProgressBar(total_steps, progress.step) as bar,
            saver.Saver(run_dir, model, optimizer, identity, settings, cfg.train.keep_checkpoints) as checkpoints,
            interrupt.deferred(lambda: log.stop_requested) as stop,
        ):
            for event in loop.fit(
                model, optimizer, batches, val_batches, cfg.train, cfg.schedule, total_steps, progress, cfg.seed,
                where, dtype, torch.from_numpy(tokens.bytes_per_token()).to(where), stop,
            ):  # fmt: skip
                samples = []
                if event.sample_due:
                    samples = sampling.preview(model, tokens, asked, template, cfg.sample, cfg.seed, stop)
                if stop():  # what has been begun here is given up, and done again when the run goes on
                    progress = event.unreported
                    checkpoints.save(progress)
                    break
                log.event(event.row, samples)
                bar.update(event.row)
                console.show_samples(samples)
                progress = event.progress
                if event.checkpoint_due and (path := checkpoints.save(progress)):
                    log.checkpoint(path, progress)
                if cfg.sweep.pauses_after(event.row):
                    break
            if stop.signal:
                saved = f"{checkpoints.newest()} is saved; to go on: {launch.resume_command(cfg)}"
                raise Interrupted(stop.signal, saved)
            if not is_finished(progress, cfg.train, total_steps):
                console.say(f"{'stopped from the W&B dashboard' if stop() else 'paused'} after step {progress.step}")
            checkpoints.save(progress, forgive=False)
            results.write(run_dir, cfg, model, identity, progress.step, prepared)
            log.finish(last_model, progress)
        console.say(f"best val/loss {progress.best:.4f} at step {progress.best_step}; run directory:\n{run_dir}")
        return progress.best


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float | cost.Cost:
    return train(launch.load(cfg, TrainConfig))


if __name__ == "__main__":
    launch.launch(main, "train")

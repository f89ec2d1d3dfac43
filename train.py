"""Trains a GPT: `python train.py model=small data=medquad`. `python train.py --help` lists every choice."""

from gpt.config import launch  # noqa: I001, before hydra: it refuses a Python that is too old
from gpt.config.schema import TrainConfig
from gpt.errors import Interrupted
from gpt.files.paths import PROJECT_ROOT
from gpt.machine import cost

import hydra
from omegaconf import DictConfig


def train(cfg: TrainConfig) -> float | cost.Cost:
    """One run from start to end. Returns the best validation loss, which is what a sweep minimises."""
    if cfg.dry_run:
        return cost.estimate(cfg, PROJECT_ROOT)  # which gpt/config/launch.py prints
    import torch  # here, because it takes seconds: --help and a misspelt key do not wait for it

    from gpt import finetune, loop, optim, prompts, sampling
    from gpt.machine import compilation, device
    from gpt.progress import describe_end, is_finished
    from gpt.runs import interrupt, results, run as runs, run_log  # isort: skip
    from gpt.terminal import console
    from gpt.weights import loading

    with runs.opened(cfg) as run:
        tokens, template, ranks = run.tokens, run.identity.template, run.ranks
        is_new, init = run.checkpoint is None, (cfg.init, cfg.model, tokens.name, PROJECT_ROOT)
        weights = ranks.in_turn(loading.find, *init) if is_new else None
        machine = run.choose_machine()
        batches = run.open_batches(machine)
        questions = prompts.questions(cfg.data, cfg.sample.references, batches.data.folder)
        machine = run.decide_compilation(machine, batches)
        torch.manual_seed(cfg.seed)
        model = loading.build(cfg.model, tokens.n_vocab, weights)
        model.gradient_checkpointing = cfg.train.gradient_checkpointing
        finetune.prepare(model, cfg.finetune, cfg.seed)
        model = ranks.place(model, machine.device, machine.dtype)
        optimizer = optim.build(model, cfg.optimizer, cfg.finetune, cfg.train.ema, machine.dtype)
        settings = run.settings(machine, batches, weights and weights.origin)
        progress = run.restore(model, optimizer, settings)
        ranks.first(launch.save, cfg, run.directory / "config.yaml")
        if machine.environment["compile"]:
            compilation.compile_blocks(model, compilation.CACHE)

        console.describe(
            model=f"{cfg.model.name}, {finetune.describe(model, cfg.finetune)}, context {cfg.model.context_length}",
            data=f"{cfg.data.name}, {batches.train.describe()}",
            budget=f"{batches.describe()} of about {cfg.train.tokens_per_step:,} tokens",
            device=device.describe(machine.device, machine.environment),
        )
        if is_finished(progress, cfg.train, batches.total_steps):
            console.say(describe_end(progress, cfg.train, batches.total_steps, batches.budget) + f"\n{run.directory}")
            if ranks.first(run_log.send_rest, cfg, run.directory, run.directory / results.LAST_MODEL, progress):
                return progress.best

        with (
            run_log.start(cfg, run.directory, progress.reported, ranks.is_first) as log,
            device.memory_errors(),  # here too, so that W&B gets the exit code of the process
            console.ProgressBar(batches.total_steps, progress.step) as bar,
            run.saver(model, optimizer, settings) as saves,
            interrupt.deferred(lambda: log.stop_requested, ranks) as stop,
        ):
            for event in loop.fit(model, optimizer, cfg.objective, batches, cfg, machine, progress, stop):
                samples = []
                if event.checkpoint_due:  # before what takes long
                    saves.save_first(event.unreported, event.best)
                if event.sample_due:
                    samples = ranks.with_model(sampling.preview, model, tokens, questions, template, cfg, stop.wish)
                if stop():  # what this event began is given up, and done again when the run goes on
                    progress = event.unreported
                    saves.save(progress)
                    break
                if not event.row:
                    continue
                log.event(event.row, samples)
                bar.update(event.row)
                console.show_samples(samples)
                progress = event.progress
                if event.checkpoint_due and (path := saves.save(progress)):
                    ranks.first(log.checkpoint, path, progress)
                if cfg.sweep.pauses_after(event.row):
                    break
            if stop.signal:
                raise Interrupted(stop.signal, f"{saves.newest()} is saved{launch.how_to_go_on(cfg)}")
            if not is_finished(progress, cfg.train, batches.total_steps):
                console.say(f"{'stopped from the W&B dashboard' if stop() else 'paused'} after step {progress.step}")
            saves.save(progress, forgive=False)
            ranks.first(lambda: log.finish(results.write(run, model, progress, batches.data.meta), progress))
        console.say(f"best val/loss {progress.best:.4f} at step {progress.best_step}; run directory:\n{run.directory}")
        return progress.best


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float | cost.Cost:
    return launch.evaluated(train, launch.load(cfg, TrainConfig))


if __name__ == "__main__":
    launch.launch(main, "train")

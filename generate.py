"""Generate text: `python generate.py checkpoint=outputs/runs/mine prompt="What are the symptoms of Glaucoma?"`; or hand
the model on, as a directory of Hugging Face: `python generate.py checkpoint=outputs/runs/mine export=my_model`."""

import sys  # noqa: I001, gpt before hydra: it refuses a Python that is too old
from pathlib import Path

from gpt.config import launch
from gpt.config.schema import GenerateConfig
from gpt.data import columns, rows, text_files
from gpt.errors import UserError
from gpt.files import paths
from gpt.prompts import format_prompt
from gpt.runs.model_card import DISCLAIMER
from gpt.terminal.console import escape

import hydra
from omegaconf import DictConfig


def generate(cfg: GenerateConfig) -> None:
    """Prints a heading, then for each prompt its samples. All of it is the same for the same checkpoint and seed.
    With `export`, writes the model instead, and prints where."""
    prompts = read_prompts(cfg) if cfg.export is None else []

    from gpt import sampling, tokenizer
    from gpt.machine import device
    from gpt.weights import export, loading  # here, because torch takes seconds to load

    where = device.choose_device(cfg.device, cfg.threads)
    loaded = loading.load(cfg.checkpoint, paths.PROJECT_ROOT, where, vars(cfg.model))
    tokens = tokenizer.load(loaded.tokenizer_name)
    if cfg.export is not None:
        directory = paths.absolute(cfg.export)
        export.write(loaded, directory)
        print(escape(str(directory)))
        return
    template = cfg.template or loaded.template
    if template is None and any(given for _, given in prompts):
        raise UserError(
            "an input needs a template, and this model was trained on plain text", str(loaded.path),
            "set template=alpaca, or put the input into the prompt",
        )  # fmt: skip
    settings = f"temperature {cfg.temperature}, top_k {cfg.top_k or 'off'}, top_p {cfg.top_p or 'off'}, seed {cfg.seed}"
    print(f"{escape(str(loaded.path))}: step {loaded.step}, template {template or 'none'}, {settings}")
    for instruction, given in prompts:
        print(f"\nprompt: {escape(instruction)}" + (f"\ninput: {escape(given)}" if given else ""))
        text = instruction if template is None else format_prompt(template, instruction, given)
        samples = sampling.generate(
            loaded.model, tokens.encode(text), max_new_tokens=cfg.max_new_tokens, eos=tokens.eos,
            temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p, num_samples=cfg.num_samples, seed=cfg.seed,
        )  # fmt: skip
        for number, ids in enumerate(samples, start=1):
            if cfg.num_samples > 1:
                print(f"\nsample {number} of {cfg.num_samples}:")
            print(escape(tokens.decode(ids), keep_newlines=True), flush=True)
    print(f"note: {DISCLAIMER}", file=sys.stderr)


def read_prompts(cfg: GenerateConfig) -> list[tuple[str, str]]:
    """(instruction, input) of every prompt. Raises UserError for none, for an empty one, and for an unusable file."""
    if (cfg.prompt is None) == (cfg.prompts is None):
        raise UserError("exactly one of prompt and prompts is needed", remedy='for example prompt="What is Asthma ?"')
    if cfg.prompt is not None:
        prompts, where = [(cfg.prompt, cfg.input)], "prompt"
    else:
        path = paths.absolute(cfg.prompts)
        if not path.is_file():
            raise UserError("no such file", str(path), paths.elsewhere(path) or "it takes a file of texts or of rows")
        prompts, where = prompts_in(path, cfg.input), str(path)
    if not prompts or not all(instruction.strip() for instruction, _ in prompts):
        raise UserError("the prompt is empty", where, "give at least one word")
    return prompts


def prompts_in(path: Path, given: str) -> list[tuple[str, str]]:
    """(instruction, input) of every row of a file in one of rows.FORMATS, or of every line of a text file; `given` is
    the input of those without."""
    if rows.format_of(path) is None:
        return [(line.strip(), given) for line in text_files.read_text(path).split("\n") if line.strip()]
    bad = rows.BadRows("error", setting=None)
    prompts = []
    for row in rows.read(path, bad, columns.Wanted("prompts")):
        try:
            names = columns.find(row.values, "prompts", {})
        except columns.NoColumn as error:
            bad.report(row.where, row.line, str(error), error.remedy)
        own = row.values.get(names.get("input", ""))
        prompts.append((row.values[names["instruction"]], given if own is None else own))
        if not all(isinstance(part, str) for part in prompts[-1]):
            bad.report(row.where, row.line, "instruction, and input where there is one, must be texts")
    return prompts


@hydra.main(version_base="1.3", config_path="conf", config_name="generate")
def main(cfg: DictConfig) -> None:
    generate(launch.load(cfg, GenerateConfig))


if __name__ == "__main__":
    launch.launch(main, "generate")

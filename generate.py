"""Generate text: `python generate.py checkpoint=outputs/runs/mine prompt="What are the symptoms of Glaucoma?"`; hold a
conversation: `python generate.py checkpoint=outputs/runs/mine`; or hand the model on, as a directory of Hugging Face:
`python generate.py checkpoint=outputs/runs/mine export=my_model`."""

from gpt.config import launch  # noqa: I001, gpt before hydra: it refuses a Python that is too old
from gpt.config.schema import GenerateConfig
from gpt.data import prompt_files
from gpt.errors import UserError
from gpt.files import paths
from gpt.generation import answer_file
from gpt.runs import model_card
from gpt.sweeps import named_runs
from gpt.terminal.answers import remark
from gpt.terminal.console import escape, wrapped

import hydra
from omegaconf import DictConfig


def generate(cfg: GenerateConfig) -> None:
    """Prints for each prompt its samples, to stdout, and what they are to stderr. All of it is the same for the same
    checkpoint and seed. Without prompts, a terminal opens a conversation. With `export`, writes the model instead, and
    prints where."""
    checkpoint = named_runs.resolve(cfg.checkpoint)
    is_conversation = prompt_files.are_typed(cfg) and cfg.output is None
    if is_conversation and cfg.num_samples > 1:
        raise UserError("a conversation has one answer to each turn", f"num_samples={cfg.num_samples}", "give a prompt")
    prompts = prompt_files.read(cfg) if cfg.export is None and not is_conversation else []
    if cfg.lookup is not None and cfg.batch_size != 1:
        raise UserError("lookup is for one text at a time", f"batch_size={cfg.batch_size}", "leave out one of them")
    if cfg.output is not None:
        answer_file.check(paths.absolute(cfg.output))

    from gpt.machine import device  # here, because torch takes seconds to load

    with device.memory_errors("", "lower batch_size, or take a smaller model or precision=int8"):
        write(cfg, checkpoint, prompts, is_conversation)


def write(cfg: GenerateConfig, checkpoint: str, prompts: list[tuple[str, str]], is_conversation: bool) -> None:
    """As `generate`, with what it has read."""
    from gpt import tokenizer
    from gpt.generation import batches, conversation, dialogue, packed_model, quantized_file, samples
    from gpt.machine import device
    from gpt.weights import export, hub_card

    where = device.choose_device(cfg.device, cfg.threads)
    wanted = cfg.precision if cfg.export is None else None
    loaded, precision = packed_model.load(checkpoint, paths.PROJECT_ROOT, where, vars(cfg.model), wanted)
    tokens = tokenizer.load(loaded.tokenizer_name)
    if cfg.export is not None:
        directory = paths.absolute(cfg.export)
        if cfg.precision in (None, "float32"):
            export.write(loaded, directory)
        else:
            quantized_file.write(loaded, cfg.precision, directory)
        print(escape(str(directory)))
        return
    template = cfg.template or loaded.template
    if template is None and any([is_conversation and cfg.input, *(given for _, given in prompts)]):
        raise UserError(
            "an input needs a template, and this model was trained on plain text", str(loaded.path),
            "set template=alpaca, or put the input into the prompt",
        )  # fmt: skip
    settings = f"temperature {cfg.temperature}, top_k {cfg.top_k or 'off'}, top_p {cfg.top_p or 'off'}, seed {cfg.seed}"
    remark(f"{escape(str(loaded.path))}: step {loaded.step}, template {template or 'none'}, {settings}, {precision}")
    notice = model_card.notice(hub_card.find_record(loaded.path).settings).strip()
    if is_conversation:
        if notice:
            remark(wrapped(f"note: {notice}"))
        dialogue.talk(conversation.Conversation(loaded.model, tokens, template, cfg))
        return
    if cfg.batch_size == 1 and cfg.output is None:
        samples.write(cfg, prompts, template, loaded.model, tokens)
    else:
        batches.write(cfg, prompts, template, loaded, precision, tokens)
    if notice:
        remark(f"note: {notice}")


@hydra.main(version_base="1.3", config_path="conf", config_name="generate")
def main(cfg: DictConfig) -> None:
    generate(launch.load(cfg, GenerateConfig))


if __name__ == "__main__":
    launch.launch(main, "generate")

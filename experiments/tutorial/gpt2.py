# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A GPT from text to answers
#
# This notebook builds and trains a small GPT-2 step by step with the functions of this project, and then does the
# same with its three commands. It is written for readers of *Build a Large Language Model (From Scratch)*: what you
# know from the book has the same name here wherever possible.
#
# It needs no network and no GPU, and takes about a minute on two cores. The model is so small, and trained for so
# short a time, that it learns the words of its texts but no sense. **What it writes about health is wrong and must
# not guide any decision.**
#
# | step | file of this project |
# |---|---|
# | 1 text to tokens | `gpt/tokenizer.py` |
# | 2 attention, 3 the block, 4 the model | `gpt/model.py`, `gpt/loss.py` |
# | 5 loaders for text and for instructions | `gpt/notebook.py`, `gpt/prompts.py` |
# | 6 MedQuAD becomes instructions | `gpt/data/rows.py`, `gpt/data/records.py` |
# | 7 training, 8 saving and loading | `gpt/notebook.py`, `gpt/runs/model_file.py` |
# | 9 generating | `gpt/sampling.py` |
# | 10 weights from elsewhere | `gpt/weights/` |
# | 11 fine-tuning on instructions | `gpt/notebook.py`, `gpt/lora.py` |
# | 12 scored answers: HelpSteer | `gpt/data/records.py` |
# | 13 the same with the commands | `prepare_data.py`, `train.py`, `generate.py` |

# %%
import json
import math
import shlex
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

try:
    import gpt
except ModuleNotFoundError:  # without `pip install -e .`, the project is a folder above this notebook
    above = [Path.cwd(), *Path.cwd().parents]
    sys.path[:0] = [str(folder) for folder in above if (folder / "gpt" / "model.py").exists()]
    import gpt

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Image, display
from torch.utils.data import DataLoader

from gpt import tokenizer

PROJECT = Path(gpt.__file__).resolve().parents[1]
WORK = Path(tempfile.mkdtemp(prefix="gpt2_tutorial_"))  # everything that this notebook writes
KEY_NUMBERS = {}  # printed at the end; a test compares them with the ones that are stored here
plt.rcParams |= {"figure.dpi": 80, "figure.constrained_layout.use": True}

# %% [markdown]
# ## 1 Text to tokens
#
# A model reads numbers. GPT-2's tokenizer knows 50,257 pieces of text, called tokens. A frequent word is one token, a
# rare word is several, and no text is unknown, because every single byte is a token too.

# %%
tokens = tokenizer.load("gpt2")
text = "Glaucoma damages the optic nerve."
ids = tokens.encode(text)
print(ids)
print([tokens.decode([token]) for token in ids])
assert tokens.decode(ids) == text

# %% [markdown]
# The last of the 50,257 tokens marks the end of a text. It has no letters. A text that contains `<|endoftext|>` is
# encoded as these letters, so that no data can end a text by accident or on purpose.

# %%
print("the end of a text is token", tokens.eos)
print(tokens.encode("<|endoftext|>"))
KEY_NUMBERS["tokens"] = len(ids)

# %% [markdown]
# ## 2 Attention
#
# We first choose the size of the model. `settings` takes what one would type after `python train.py`, and fills in
# the rest from the files in `conf/`. A misspelt name is an error that suggests the right one.

# %%
from gpt.notebook import settings

cfg = settings("model=tiny", "model.n_layer=2", "model.n_embd=64", "model.context_length=192")
asdict(cfg.model)

# %% [markdown]
# Each token becomes a vector of `n_embd` numbers. In attention every token compares its *query* with the *keys* of
# the tokens before it, and takes a weighted mean of their *values*. It is split into `n_head` heads, which do this
# independently of each other.
#
# Letters in the comments: `B` rows, `T` tokens of a row, `C` numbers of a vector, `H` heads, `D = C / H`.

# %%
from gpt.model import Attention

torch.manual_seed(cfg.seed)
attention = Attention(cfg.model, layer=0)
x = torch.randn(1, 6, cfg.model.n_embd)  # (B, T, C)


def weights_of(attention, x):
    """How much each token takes from each other one: (B, H, T, T), every row of the last two sums to 1."""
    B, T, C = x.shape
    q, k, _ = attention.c_attn(x).split(C, dim=-1)  # each (B, T, C)
    q, k = (t.view(B, T, attention.n_head, -1).transpose(1, 2) for t in (q, k))  # each (B, H, T, D)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (B, H, T, T)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1)


print(weights_of(attention, x)[0, 0].detach().numpy().round(2))

# %% [markdown]
# The upper right half is 0: no token sees the future. The project computes the same with one call of PyTorch, which
# is faster and never holds the whole matrix. We check that both agree.

# %%
with torch.no_grad():
    values = attention.c_attn(x).split(cfg.model.n_embd, dim=-1)[2]  # (B, T, C)
    values = values.view(1, 6, attention.n_head, -1).transpose(1, 2)  # (B, H, T, D)
    by_hand = attention.c_proj((weights_of(attention, x) @ values).transpose(1, 2).reshape(1, 6, -1))  # (B, T, C)
    difference = (by_hand - attention(x, mask=None, cache=None)).abs().max().item()
print("largest difference:", "below 1e-6" if difference < 1e-6 else difference)

# %% [markdown]
# The *mask* says who may look at whom. In the book there is one text in a row, and the mask is a triangle. This
# project also packs several short documents into one row, so that no computation is spent on padding. Then a token
# sees only its own document, and the result is the same as if each document had a row of its own.

# %%
from gpt.model import same_document

documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2]])  # (B, T): the document that each token belongs to
T = documents.shape[1]
masks = {
    "one document": same_document(torch.zeros_like(documents), T),
    "three documents": same_document(documents, T),
}
figure, axes = plt.subplots(1, 2, figsize=(7, 3.4))
for axis, (title, mask) in zip(axes, masks.items(), strict=True):
    axis.imshow(mask[0, 0], cmap="Blues", vmin=0, vmax=1.4)
    axis.set(title=title, xlabel="is seen: token", ylabel="sees: token")
    axis.set_xticks(range(0, 12, 2))
    axis.set_yticks(range(0, 12, 2))
figure.suptitle("Attention mask (blue: may be seen)")
plt.show()

# %% [markdown]
# ## 3 The block
#
# A block is attention followed by a small network, the MLP. Both read a normalised copy of the vectors and **add**
# their result to them. So a block changes its input and does not replace it, and gradients have a direct way back.

# %%
from gpt.model import Block

block = Block(cfg.model, layer=0)
print(block)
print("in", list(x.shape), "out", list(block(x, mask=None, cache=None).shape))

# %% [markdown]
# ## 4 The model
#
# `GPT` is two embeddings (what a token is, and where it is), the blocks, and a last normalisation. The head, which
# turns a vector into a score for each of the 50,257 tokens, is the embedding of the tokens itself. Read
# `gpt/model.py` from top to bottom.

# %%
from gpt.model import GPT

torch.manual_seed(cfg.seed)
model = GPT(cfg.model, tokens.n_vocab)
in_embeddings = model.wte.weight.numel() + model.wpe.weight.numel()
print(f"{model.n_parameters():,} parameters, {in_embeddings / model.n_parameters():.0%} of them in the embeddings")

batch = torch.tensor([ids])  # (B, T)
logits = model(batch)  # (B, T, V)
print("in", list(batch.shape), "out", list(logits.shape))
KEY_NUMBERS["parameters"] = model.n_parameters()

# %% [markdown]
# The targets are the inputs, one token later. The loss is the mean of `-ln p(target)`. A model that knows nothing
# gives every token the same probability, so its loss is `ln 50,257 = 10.82`.
#
# The project's loss never holds the logits of all positions at once, which for GPT-2's vocabulary would take most of
# the memory. Its result is that of the two lines in `reference`.

# %%
from gpt.loss import cross_entropy, reference

with torch.no_grad():
    hidden, targets = model.hidden(batch[:, :-1])[0], batch[0, 1:]  # (T, C), (T,)
    losses = cross_entropy(hidden, model.head, targets)  # (T,)
    torch.testing.assert_close(losses, reference(hidden, model.head, targets))
print(f"loss {losses.mean():.3f}, ln V {math.log(tokens.n_vocab):.3f}")
KEY_NUMBERS["loss of the random model"] = losses.mean().item()

# %% [markdown]
# ## 5 Loaders
#
# ### Running text
#
# `GPTDatasetV1` cuts a text into windows of `max_length` tokens; one window is enough for a step of so small a model.
# Our text is half of the 288 answers about health that come with this project, one after the other.

# %%
from gpt.data import rows
from gpt.notebook import GPTDatasetV1

answers = [row.values["answer"] for row in rows.read(PROJECT / "gpt" / "sample.csv", rows.BadRows("error"))]
text = "\n\n".join(answers[:144])
border = int(0.9 * len(text))
T = cfg.model.context_length
train_set = GPTDatasetV1(text[:border], tokens, max_length=T, stride=T)
val_set = GPTDatasetV1(text[border:], tokens, max_length=T, stride=T)

generator = torch.Generator().manual_seed(cfg.seed)  # of its own, so that nothing else changes the order
train_loader = DataLoader(train_set, batch_size=1, shuffle=True, drop_last=True, generator=generator)
val_loader = DataLoader(val_set, batch_size=2, generator=torch.Generator())
inputs, targets = next(iter(val_loader))
print(f"144 of {len(answers)} answers, {len(text):,} characters")
print(f"{len(train_set)} windows to train on, {len(val_set)} to validate with")
print("inputs ", repr(tokens.decode(inputs[0, :8].tolist())))
print("targets", repr(tokens.decode(targets[0, :8].tolist())))

# %% [markdown]
# ### Instructions
#
# An Alpaca row has an instruction, an input that may be empty, and an output. A template turns it into one text.

# %%
from gpt.prompts import format_prompt

examples = [
    {"instruction": "Name the capital of France.", "input": "", "output": "Paris."},
    {"instruction": "Sort these words.", "input": "pear, apple, fig", "output": "apple, fig, pear"},
]
print(format_prompt("alpaca", examples[1]["instruction"], examples[1]["input"]) + examples[1]["output"])

# %% [markdown]
# Rows of a batch must have the same length, so shorter ones are padded at their end. Padding is never a target: the
# loss skips positions whose target is `-100`. With `mask_prompt=True` it skips the prompt as well, and the model
# learns to answer, not to ask.

# %%
from gpt.data.batching import IGNORE
from gpt.notebook import create_dataloader_from_examples

figure, axes = plt.subplots(2, 1, figsize=(7, 2.6), sharex=True)
for axis, mask_prompt in zip(axes, (False, True), strict=True):
    loader = create_dataloader_from_examples(examples, tokens, shuffle=False, mask_prompt=mask_prompt)
    [(inputs, targets)] = loader
    axis.imshow(targets != IGNORE, cmap="Blues", vmin=0, vmax=1.4, aspect="auto", interpolation="none")
    axis.set(title=f"mask_prompt={mask_prompt}", ylabel="row", yticks=[0, 1])
axes[-1].set_xlabel("position")
figure.suptitle("Positions that count in the loss (blue)")
plt.show()

# %% [markdown]
# ## 6 MedQuAD becomes instructions
#
# MedQuAD has 16,412 questions and answers of the US National Institutes of Health. If you have put `medquad.csv` into
# the project's folder, this section uses it. Otherwise it uses the sample that comes with the project, which has the
# same columns.

# %%
has_medquad = (PROJECT / "medquad.csv").exists()
medquad = settings("data=medquad" if has_medquad else "data=sample")
path = Path(medquad.data.path)
first = next(rows.read(path, rows.BadRows("error")))
print(path.name)
for column, cell in first.values.items():
    print(f"  {column:<11} {cell[:90]}")

# %% [markdown]
# `clean` drops rows without a question or an answer, normalises white space and removes exact duplicates. It says how
# many rows are left after each step.

# %%
from gpt.data import records
from gpt.data.columns import Wanted

bad_rows = rows.BadRows(medquad.data.on_bad_row)
cleaned = records.Cleaned()
raw = rows.read(path, bad_rows, Wanted(medquad.data.kind))
alpaca = [
    {"instruction": record.instruction, "input": record.input, "output": record.output}
    for record in records.clean(raw, medquad.data, bad_rows, cleaned)
]
for step, count in cleaned.ladder:
    print(f"{count:>8,}  {step}" if isinstance(count, int) else f"{step:>8,}  {count}")

jsonl = WORK / "medquad_alpaca.jsonl"
jsonl.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in alpaca), encoding="utf-8")
print(json.dumps(alpaca[0])[:150], "...")
KEY_NUMBERS |= {"instructions from": path.name, "instructions": len(alpaca)}

# %% [markdown]
# How long are the examples in tokens? GPT-2 can see 1,024 of them. Our small model sees 192, which is enough for the
# sample.

# %%
from gpt.notebook import GPTDatasetExamples
from gpt.terminal import figures

lengths = [len(ids) + 1 for ids, _ in GPTDatasetExamples(alpaca, tokens)]  # 1 for the end of the text
figures.length_histogram(lengths, T, WORK / "token_lengths.png")
display(Image(WORK / "token_lengths.png", width=560))

# %% [markdown]
# **Which rows may be used for testing?** MedQuAD has several questions about each disease, and often the same words
# in their answers. A random split puts 18 % of the test questions into the training data as well. `prepare_data.py`
# therefore keeps all rows about one disease together; you will see its report in section 13.

# %% [markdown]
# ## 7 Training
#
# `train_model_simple` is the loop of the book: after every step of the optimizer that `eval_freq` divides, it
# computes the losses of a few training and validation batches, and after each epoch it prints a sample. The model
# learns the running text of section 5.

# %%
from gpt.notebook import train_model_simple

optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.1)
train_losses, val_losses, tokens_seen = train_model_simple(
    model, train_loader, val_loader, optimizer, "cpu",
    num_epochs=1, eval_freq=15, eval_iter=3, start_context="The symptoms of Asthma include", tokenizer=tokens,
)  # fmt: skip
KEY_NUMBERS["validation loss on text"] = val_losses[-1]

# %%
curve = zip(tokens_seen, train_losses, val_losses, strict=True)
curve = [{"tokens": seen, "train/loss": train, "val/loss": val} for seen, train, val in curve]
figures.loss_curve(curve, WORK / "loss.png", "2 blocks on 144 answers")
display(Image(WORK / "loss.png", width=560))

# %% [markdown]
# The loss is in nats per token. It has fallen from that of a model that knows nothing to what knowing the frequent
# words gives.
#
# The model has also learned where it is. The positional embedding is one vector for each of the 192 positions. Before
# training all of them are random; now neighbours are more similar to each other than to positions far away.


# %%
def similarity(vectors):
    """(192, C) -> (24, 24), the cosine of the angle between the means of each 8 vectors."""
    means = vectors.detach().view(-1, 8, vectors.shape[1]).mean(1)
    means = torch.nn.functional.normalize(means - means.mean(0), dim=1)
    return means @ means.T


torch.manual_seed(cfg.seed)
untrained = GPT(cfg.model, tokens.n_vocab)
figure, axes = plt.subplots(1, 2, figsize=(7.5, 3.4), sharey=True)
for axis, (title, network) in zip(axes, {"before training": untrained, "after training": model}.items(), strict=True):
    image = axis.imshow(similarity(network.wpe.weight), cmap="RdBu_r", vmin=-1, vmax=1, extent=(0, T, T, 0))
    axis.set(title=title, xlabel="position")
axes[0].set_ylabel("position")
figure.colorbar(image, ax=axes, label="cosine similarity")
figure.suptitle("Positional embedding, means of 8 positions")
plt.show()

# %% [markdown]
# And this is what the trained heads of the first block look at in a sentence of the validation text.

# %%
sentence = tokens.encode(text[border:])[:14]
with torch.no_grad():
    stream = model.wte(torch.tensor([sentence])) + model.wpe(torch.arange(len(sentence)))  # (1, T, C)
    weights = weights_of(model.h[0].attn, model.h[0].ln_1(stream))[0]  # (H, T, T)
words = [tokens.decode([token]).strip() or "\\n" for token in sentence]
figure, axes = plt.subplots(1, 2, figsize=(8.5, 4.4), sharey=True)
for head, axis in enumerate(axes):
    image = axis.imshow(weights[head], cmap="viridis", vmin=0, vmax=1)
    axis.set(title=f"head {head + 1}", xlabel="is seen")
    axis.set_xticks(range(len(words)), words, rotation=90)
axes[0].set_yticks(range(len(words)), words)
axes[0].set_ylabel("sees")
figure.colorbar(image, ax=axes, label="attention weight")
plt.show()

# %% [markdown]
# ## 8 Saving and loading
#
# `last_model.pt` has the weights and everything that is needed to use them: the size of the model, the tokenizer and
# the template. Loading it executes nothing, whoever has written the file.

# %%
from gpt.notebook import load_model
from gpt.runs.checkpoint import Identity
from gpt.runs.model_file import save_model

identity = Identity(cfg.model, tokens.n_vocab, tokens.name, template=None)  # a model of plain text has no template
save_model(WORK / "last_model.pt", model, identity, step=len(train_loader))

loaded = load_model(WORK / "last_model.pt")
same = all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.model.parameters(), strict=True))
print(f"{(WORK / 'last_model.pt').stat().st_size / 1e6:.1f} MB, step {loaded.step}, the same weights: {same}")

# %% [markdown]
# ## 9 Generating
#
# The model gives every token a probability. The simplest text takes the most probable token each time. It soon
# repeats itself.

# %%
from gpt.notebook import generate_text_simple, text_to_token_ids, token_ids_to_text

start = text_to_token_ids("The symptoms of", tokens)
print(token_ids_to_text(generate_text_simple(model, start, max_new_tokens=30, context_size=T), tokens))

# %% [markdown]
# Drawing from the probabilities gives more varied text. *Temperature* makes the distribution sharper (below 1) or
# flatter (above 1), and *top-k* allows only the `k` most probable tokens.

# %%
from gpt.sampling import probabilities

with torch.no_grad():
    next_logits = model(start)[0, -1]  # (V,)
top = next_logits.topk(8).indices
labels = [repr(tokens.decode([token])) for token in top.tolist()]
figure, axis = plt.subplots(figsize=(7, 3))
choices = {"temperature 0.5": (0.5, None), "temperature 1": (1.0, None), "temperature 1, top-k 4": (1.0, 4)}
for number, (name, (temperature, top_k)) in enumerate(choices.items()):
    p = probabilities(next_logits, temperature, top_k)[top]
    axis.bar([i + 0.27 * (number - 1) for i in range(8)], p, width=0.25, label=name)
axis.set_xticks(range(8), labels, rotation=20)
axis.set(ylabel="probability", title='What comes after "The symptoms of"?')
axis.legend()
plt.show()

# %%
from gpt.notebook import generate_text

for temperature, top_k in ((0.5, None), (1.0, 20), (1.5, None)):
    text_drawn = generate_text(
        model, tokens, "The symptoms of", max_new_tokens=25, temperature=temperature, top_k=top_k, seed=1
    )
    print(f"temperature {temperature}, top-k {top_k}:{text_drawn!r}\n")

# %% [markdown]
# The seed decides the draw: the same seed gives the same text. `generate_text` keeps the keys and values of earlier
# tokens, so each new token costs one token's work and not the whole row's.

# %% [markdown]
# ## 10 Weights from elsewhere
#
# `load_model` and `init.from=` read GPT-2's weights as OpenAI, transformers, nanoGPT and the book store them, and
# find out which it is by the names of the tensors. With a network, `load_model("gpt2")` gets OpenAI's. Here we write
# our own model in the book's layout, as `torch.save(model.state_dict(), "book.pth")` would there, and read it back.

# %%
from gpt.weights import tensor_names

book = {}
for theirs, ours in tensor_names.BOOK.items():
    for layer in range(cfg.model.n_layer if "N" in theirs else 1):
        tensor = model.state_dict().get(ours.replace("N", str(layer)), model.head.detach())  # a tied head is no tensor
        if "attn.c_attn" in ours:  # the book has three layers where OpenAI has one
            part = next(i for i, name in enumerate(("W_query", "W_key", "W_value")) if name in theirs)
            tensor = tensor.chunk(3)[part]
        book[theirs.replace("N", str(layer))] = tensor.clone()
torch.save(book, WORK / "book.pth")
print(len(book), "tensors:", ", ".join(list(book)[:6]), "...")

# %% [markdown]
# A file of bare weights does not say how many heads the model has, so we do.

# %%
foreign = load_model(WORK / "book.pth", n_head=cfg.model.n_head).model
with torch.no_grad():
    torch.testing.assert_close(foreign(batch), model(batch))
print("the same logits;", foreign.config.n_layer, "blocks,", foreign.config.n_head, "heads of each")

# %% [markdown]
# ## 11 Fine-tuning on instructions
#
# The model that has read running text now learns to answer. Only the answers count in the loss. The examples are none
# of the answers that the model has read in section 7: 80 to train on and 12 to validate with.

# %%
tune = {"max_length": T, "mask_prompt": True, "batch_size": 2, "seed": cfg.seed}
train_examples = create_dataloader_from_examples(alpaca[144:224], tokens, **tune)
val_examples = create_dataloader_from_examples(alpaca[240:252], tokens, **tune)
question = "What are the symptoms of Glaucoma ?"
prompt = format_prompt("alpaca", question)

optimizer = torch.optim.AdamW(foreign.parameters(), lr=1e-3, weight_decay=0.1)
_, tuned_losses, _ = train_model_simple(
    foreign, train_examples, val_examples, optimizer, "cpu",
    num_epochs=1, eval_freq=13, eval_iter=6, start_context=prompt, tokenizer=tokens,
)  # fmt: skip
KEY_NUMBERS["instructions: validation loss"] = tuned_losses[-1]

# %% [markdown]
# *LoRA* trains two thin matrices beside each chosen layer and leaves the rest as it is. They start without any
# effect.

# %%
from gpt import finetune

lora = settings("init.from=" + str(WORK / "book.pth"), "model.n_head=4", "finetune=lora").finetune
small = load_model(WORK / "book.pth", n_head=4).model
finetune.prepare(small, lora, seed=cfg.seed)
print(finetune.describe(small, lora))
print(small.h[0].attn)

# %% [markdown]
# ## 12 Scored answers: HelpSteer
#
# HelpSteer has up to four answers to each prompt, which people have scored from 0 to 4 on five attributes. The
# following rows have its columns, but **they are made up** for this notebook: no person has scored them.

# %%
ATTRIBUTES = records.ATTRIBUTES
made_up = [
    ("Why is the sky blue?", "Air scatters blue light more than red light.", 4, 4, 4, 2, 1),
    ("Why is the sky blue?", "Because of the sea.", 0, 0, 3, 0, 0),
    ("Why is the sky blue?", "There are many theories about colours, and they are all interesting.", 1, 2, 3, 1, 2),
    ("Write a haiku.", "Rain on the tin roof / the cat counts every drop / and falls asleep", 4, 4, 4, 2, 1),
    ("Write a haiku.", "A haiku is a short poem from Japan.", 1, 3, 4, 1, 1),
    ("What is 17 times 3?", "51", 4, 4, 4, 0, 0),
    ("What is 17 times 3?", "Let us see. Ten times 3 is 30, seven times 3 is 21, so it is 51.", 4, 4, 4, 1, 3),
    ("What is 17 times 3?", "It is 41.", 0, 0, 4, 0, 0),
]
helpsteer = WORK / "helpsteer_made_up.jsonl"
keys = ("prompt", "response", *ATTRIBUTES)
helpsteer.write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in made_up), encoding="utf-8")

scored = records.Cleaned()
data = settings("data=helpsteer", f"data.path={helpsteer}").data
for _ in records.clean(rows.read(helpsteer, bad_rows), data, bad_rows, scored):
    pass
for attribute, statistics in records.score_statistics(scored.scores).items():
    print(f"{attribute:<12} mean {statistics['mean']:.2f}  median {statistics['50%']:.1f}  std {statistics['std']:.2f}")

# %%
scores = torch.tensor([scored.scores[name] for name in ATTRIBUTES])  # (attributes, answers)
correlation = torch.corrcoef(scores)
figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.8), width_ratios=[1.3, 1])
axes[0].imshow(scores, cmap="viridis", vmin=0, vmax=4, aspect="auto")
axes[0].set(title="scores (made up)", xlabel="answer")
axes[0].set_xticks(range(len(made_up)), range(1, len(made_up) + 1))
axes[0].set_yticks(range(5), ATTRIBUTES)
axes[1].imshow(correlation, cmap="RdBu_r", vmin=-1, vmax=1)
axes[1].set(title="correlation of the attributes")
axes[1].set_xticks(range(5), ATTRIBUTES, rotation=40, ha="right")
axes[1].set_yticks([])
tables = (scores, ".0f", scores < 2.5), (correlation, ".1f", correlation.abs() > 0.7)
for axis, (table, form, is_dark) in zip(axes, tables, strict=True):
    for (i, j), value in np.ndenumerate(table.numpy()):
        axis.text(j, i, f"{value:{form}}", ha="center", va="center", color="white" if is_dark[i, j] else "black")
plt.show()

# %% [markdown]
# All answers are kept for training, good and bad; the scores are reported and not learned from. With real data:
# `data=helpsteer`.

# %% [markdown]
# ## 13 The same with the commands
#
# Everything above is one command each. `run` types it for you. In a terminal you would leave out the settings that
# are about folders: here they keep everything that is written in the notebook's temporary folder.


# %%
def run(script, *arguments):
    """Runs `python <script> <arguments>` in the notebook's temporary folder and prints what it says."""
    command = [sys.executable, PROJECT / script, *arguments]
    done = subprocess.run(command, cwd=WORK, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    print("$", shlex.join(["python", script, *arguments]))
    print(done.stdout.replace(f"{WORK.resolve()}/", "").replace(f"{PROJECT}/", ""))
    done.check_returncode()


run("prepare_data.py", "data.prepared_dir=data")

# %% [markdown]
# `train.py` trains, evaluates, saves checkpoints from which a run resumes exactly, draws the loss and prints samples.
# It also logs to Weights & Biases unless it is told not to, as here.

# %%
small = ["model.n_layer=2", "model.n_embd=64", "train.dtype=float32", "train.eval_tokens=1024"]
folders = ["data.prepared_dir=data", "wandb.mode=disabled"]
run("train.py", *small, "train.max_steps=30", "train.eval_every=15", "optimizer.lr=3e-3", *folders, "out_dir=mine")


# %%
def best_loss(folder):
    """The lowest validation loss of a run, from its metrics.jsonl."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return min(row["val/loss"] for row in map(json.loads, lines) if "val/loss" in row)


KEY_NUMBERS["train.py"] = best_loss(WORK / "mine")
print(sorted(path.name for path in (WORK / "mine").iterdir()))

# %%
run("generate.py", "checkpoint=mine", f"prompt={question}", "max_new_tokens=30", "temperature=0.5")

# %% [markdown]
# The same run is a model in the notebook, too. With the settings of the command the text is the same.

# %%
mine = load_model(WORK / "mine")
print(generate_text(mine.model, tokens, question, template=mine.template, max_new_tokens=30, temperature=0.5))

# %% [markdown]
# **A sweep** runs every combination of the values, here two learning rates at two context lengths. All jobs read
# equally many tokens and are scored on the same validation tokens, so their losses may be compared.

# %%
run(
    "train.py", "-m", "optimizer.lr=3e-3,1e-2", "model.context_length=64,128", *small, "train.max_tokens=2560",
    "train.sample_every=null", *folders, "hydra.sweep.dir=sweep",
)  # fmt: skip

# %%
display(Image(WORK / "sweep" / "heatmap.png", width=560))
losses = sorted(best_loss(file.parent) for file in WORK.glob("sweep/*/metrics.jsonl"))
KEY_NUMBERS |= {f"sweep, place {place}": loss for place, loss in enumerate(losses, start=1)}

# %% [markdown]
# So short a sweep, with one seed, tells little about learning rates: add `seed=1,2,3`, and the table has means,
# intervals and a test. `sweep/report.html` shows all of it in a browser, without a network.
#
# **Fine-tuning** starts from any weights, such as those in the book's layout, here with LoRA.

# %%
run(
    "train.py", "init.from=book.pth", "model.n_head=4", "finetune=lora", "optimizer.lr=5e-3", "train.max_steps=15",
    "train.tokens_per_step=256", "train.micro_batch=2", "train.sample_every=null",
    *small[2:], *folders, "out_dir=tuned",
)  # fmt: skip
KEY_NUMBERS["finetune=lora"] = best_loss(WORK / "tuned")

# %% [markdown]
# ## Where to go from here
#
# - Real data: put `medquad.csv` into the project's folder and run `python train.py model=mini data=medquad`.
# - Your own data: `data=alpaca data.path=mine.jsonl`, or `data=text data.path=novel.txt`.
# - GPT-2's own weights: `python train.py init.from=gpt2 data=medquad finetune=lora`.
# - The code: the README has the order in which to read it, from the raw file to the loss.
#
# The last cell prints the numbers that a test compares with those stored in this notebook, and removes what was
# written.

# %% tags=["key-numbers"]
import shutil

shutil.rmtree(WORK)
print(json.dumps(KEY_NUMBERS, indent=1))

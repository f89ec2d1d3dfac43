"""Random command lines with none to five faults: a valid configuration, or code 2 and one line.

The line names all wrong values and misspelt keys, or, where Hydra composes nothing, the first fault that it stops at.
"""

import random
import re
from dataclasses import dataclass, field

import pytest
from launcher import launcher

from gpt.terminal.console import escape

ANY_BAD = ["abc", "true", "[1]", "{a: 1}", "'3'", "", "nan", "inf", "-inf", "???", "${nope}", "${model.nope}", "\uff11"]
OF_GRAMMAR = ["9" * 5000, "\uff11", "cüda"]  # what Hydra's parser refuses by itself
COUNT = (["1", "7", "64", "1_000", "1e3"], ["0", "-1", "2.5", "1e30", "9" * 5000, "null", *ANY_BAD])
COUNT_OR_AUTO = (["1", "64", "auto"], ["0", "-1", "2.5", "null", "automatic", "Auto", *ANY_BAD])
COUNT_OR_NULL = (["3", "null"], ["0", "-7", "0.5", *ANY_BAD])
SEED = (["0", "12345"], ["-1", str(2**63), "1.5", "null", *ANY_BAD])
POSITIVE = (["1e-3", "0.5", "3"], ["0", "-1e-3", "null", *ANY_BAD])
POSITIVE_OR_NULL = (["0.5", "null"], ["0", "-1", *ANY_BAD])
NOT_NEGATIVE = (["0", "0.25"], ["-0.1", "null", *ANY_BAD])
BELOW_ONE = (["0", "0.25"], ["-0.1", "1", "1.5", "null", *ANY_BAD])
FRACTION = (["0", "0.25", "1"], ["-0.1", "1.01", "null", *ANY_BAD])
FLAG = (["true", "false"], ["1", "'true'", "maybe", "null", "[true]", "", "???"])
TYPED = ["abc", "'a b, c'", '"it\'s"', "'größer 日本'", "3", "true", "[a]", "a, (b)", "lr=1e-3", "'", "${x"]
TEXT = (TYPED, ["null", "", "???", "${nope}"])  # taken as typed
TEXT_OR_NULL = ([*TYPED, "null"], ["", "${nope}"])


def one_of(*names):
    return list(names), [names[0] + "x", "3", "null", "[a]", "", f"'{names[0]} '", "???", "cüda"]


AS_TYPED = ("model.name", "data.name", "data.path", "data.card.license", "wandb.project", "sweep.name")

# Written down once more, by hand: what each key takes and what it does not.
KEYS = {
    "train": {
        "model.name": TEXT, "model.n_layer": COUNT, "model.dropout": BELOW_ONE, "model.tie_weights": FLAG,
        "data.name": TEXT, "data.path": TEXT_OR_NULL, "data.max_tokens": COUNT_OR_NULL, "data.split_seed": SEED,
        "data.kind": (["qa", "helpsteer", "alpaca"], ["text", "qax", "null", "[a]", ""]),
        "data.mask": one_of("response", "all"),
        "data.batching": one_of("packed", "bucketed", "padded"), "data.tokenizer": one_of("gpt2", "bytes"),
        "data.overflow": one_of("split", "truncate", "drop"), "data.card.license": TEXT,
        "optimizer.lr": POSITIVE, "optimizer.weight_decay": NOT_NEGATIVE, "schedule.final": FRACTION,
        "train.micro_batch": COUNT_OR_AUTO, "dry_run": (["false", "False"], FLAG[1]),
        "train.grad_clip": POSITIVE_OR_NULL, "train.eval_every": COUNT,
        "train.eval_tokens": COUNT, "train.log_every": COUNT, "train.sample_every": COUNT_OR_NULL,
        "train.save_every": COUNT, "train.keep_checkpoints": COUNT, "train.patience": COUNT_OR_NULL,
        "train.one_batch": FLAG, "train.compile": FLAG, "train.dtype": one_of("auto", "float32", "bfloat16", "float16"),
        "sample.max_new_tokens": COUNT, "sample.temperature": NOT_NEGATIVE, "sample.top_k": COUNT_OR_NULL,
        "wandb.mode": one_of("disabled", "offline", "online", "auto"), "wandb.project": TEXT,
        "wandb.log_model": one_of("none", "best", "last", "all"),
        "sweep.name": (["null", "a-b.c", "3"], ["'a b'", "a,b", "../x", ""]),
        "seed": SEED, "device": one_of("cpu", "auto", "mps", "cuda", "cuda:3"), "resume": one_of("auto", "never"),
    },
    "generate": {
        "max_new_tokens": COUNT, "temperature": NOT_NEGATIVE, "top_k": COUNT_OR_NULL, "num_samples": COUNT,
        "seed": SEED, "device": one_of("cpu", "auto"), "top_p": (["null", "0.9", "1"], ["0", "1.5", *ANY_BAD]),
        "template": (["null", "plain"], ["plan", "3", ""]),
        "precision": (["null", "auto", "float32", "bfloat16", "int8", "int4"], ["int3", "8", ""]),
    },
    "prepare_data": {
        "data.name": TEXT, "data.path": TEXT_OR_NULL, "data.max_tokens": COUNT_OR_NULL, "data.split_seed": SEED,
        "data.template": one_of("alpaca", "plain"), "data.split": one_of("grouped", "random", "sequential"),
        "data.prompts": (["[a]", "['Why, really?']", "[]"], ["3", "abc", "null", "[3]", "['']"]),
    },
}  # fmt: skip
CHOICES = {
    "train": {
        "model": ["tiny", "mini", "small", "medium", "large", "xl"], "optimizer": ["adamw", "muon", "soap", "sgd"],
        "data": ["sample", "medquad", "helpsteer", "alpaca"],  # text has not all of these keys, nor has constant
        "schedule": ["cosine", "linear", "wsd"],
    },
    "generate": {},
    "prepare_data": {"data": ["sample", "medquad", "helpsteer", "alpaca"]},
}  # fmt: skip
FIXED = {
    "train": [],
    "generate": ["checkpoint=outputs/runs/mine", "prompt=What's up, doc (or ${nobody})?"],
    "prepare_data": [],
}
# Arguments of which each alone is fine, and the keys that must be named.
CONTRADICTIONS = [
    (["model.n_embd=64", "model.n_head=7"], ["model.n_embd", "model.n_head"]),
    (["model.context_length=2048", "train.tokens_per_step=1024"], ["model.context_length", "train.tokens_per_step"]),
    (["data.val_fraction=0.6", "data.test_fraction=0.5"], ["data.val_fraction", "data.test_fraction"]),
    (["data.val_fraction=0"], ["data.val_fraction"]),
    (["train.max_steps=50", "schedule.warmup=51"], ["schedule.warmup"]),
    (["schedule=wsd", "train.max_tokens=20480", "train.tokens_per_step=2048", "schedule.decay=11"], ["schedule.decay"]),
    (["train.max_tokens=null"], ["train.max_tokens"]),
]
BUDGET = ["train.max_steps", "train.max_tokens", "train.tokens_per_step", "model.context_length", "schedule.warmup"]
STRANGE = [  # arguments and what must be named of them
    ("model.n_layer", "model.n_layer"), ("=3", "=3"), ("seed=(", "seed=("), ("model=[", "model=["),
    ("optimizer.lr=3}", "optimizer.lr=3}"), ("modél.name=x", "modél.name=x"),
    ("train\u200b.seed=3", "train\u200b.seed=3"), ("\u202eseed=3", "\u202eseed=3"), ("train.=3", "train.=3"),
    ("foo/bar=1", "foo/bar"), ("hydra/nope=x", "hydra/nope"), ("hydra/launcher=basicc", "hydra/launcher"),
    ("hydra.run.dirr=x", "hydra.run.dirr"), ("hydra.mod=RUN", "hydra.mod"), ("~nowhere", "nowhere"),
    ("+extra=1", "extra"), ("++extra.more={a: 1}", "extra.more.a"), ("nothing@here=3", "nothing"),
    ("experiment=x", "experiment"),
    ("+hydra.callbacks.evil._target_=os.system", "hydra.callbacks.evil._target_"), ("debug=null", "debug=null"),
    ("sample=5", "sample"), ("wandb=[1]", "wandb"), ("data.card=x", "data.card"),
    ("hydra.verbose=null", "hydra.verbose"), ("experiments=typo", "experiments"), ("debug=quick", "debug=quick"),
    ("seed@x=3", "seed"),
]  # fmt: skip
KINDS = {"value", "leaf", "section", "prefix", "gone", "there", "sweep", "choice", "strange", "together"}
OF_HYDRA = {"gone", "there", "sweep", "choice", "strange"}  # it composes nothing, and names the first that it sees


@dataclass
class Case:
    """A command line, made from a number, so that it can be made again."""

    number: int
    script: str = "train"
    arguments: list[str] = field(default_factory=list)
    faults: list[tuple[str, str]] = field(default_factory=list)  # kind, what must be named
    meant: dict[str, str] = field(default_factory=dict)  # misspelt key: the right one
    fine: list[str] = field(default_factory=list)  # keys that must not be named


def misspelt(word, rng):
    """One letter left out, doubled, or swapped with its neighbour, until it is another word."""
    while True:
        i = rng.randrange(len(word))
        before, after = word[:i], word[i + 1 :]
        other = rng.choice([before + after, before + 2 * word[i] + after, before + after[:1] + word[i] + after[1:]])
        if other != word and re.fullmatch(r"[a-z]\w*", other):
            return other


def key_of(argument):
    """`seed=3` -> `seed`; of the choice of a file `schedule=`."""
    return argument.partition("=")[0] + "=" * argument.startswith("schedule=")


def make(number):
    rng = random.Random(number)
    case = Case(number, rng.choices(["train", "generate", "prepare_data"], [5, 2, 2])[0])
    keys, choices = KEYS[case.script], CHOICES[case.script]
    used = []  # keys that something has been done with

    def free(*names):
        return not any(a == b or a.startswith(f"{b}.") or b.startswith(f"{a}.") for a in names for b in used)

    def fault(kind, arguments, named, reserved):
        case.arguments += arguments
        case.faults += [(kind, name) for name in named]
        used.extend(reserved)

    wanted = rng.choice([0, 0, 1, 1, 2, 3, 4, 5])
    while len(case.faults) < wanted:
        key = rng.choice(list(keys))
        good, bad = keys[key]
        kind = rng.choice([*sorted(KINDS), *["value"] * 5])
        if kind == "value" and free(key):
            value = rng.choice(bad)
            seen_by = "strange" if value in OF_GRAMMAR else kind
            fault(seen_by, [f"{rng.choice(['', '', '', '++'])}{key}={value}"], [key], [key])
        elif kind in ("leaf", "section", "prefix"):
            parts = key.split(".")
            where = len(parts) - 1 if kind == "leaf" else 0
            wrong = ".".join(misspelt(part, rng) if i == where else part for i, part in enumerate(parts))
            if free(wrong, key) and wrong not in keys and wrong not in choices and "" not in parts:
                sign = rng.choice(["+", "++"]) if kind == "prefix" else ""
                fault(kind, [f"{sign}{wrong}={rng.choice(good[:4])}"], [wrong], [wrong, key])
                case.meant[wrong] = key
        elif kind == "gone" and free(key):
            fault(kind, [f"~{key}"], [key], [key])
        elif kind == "there" and free(key) and good[0] != "[a]" and "null" not in good:  # else Hydra takes it
            fault(kind, [f"+{key}={good[0]}"], [key], [key])
        elif kind == "sweep" and free(key) and key not in AS_TYPED:
            fault(kind, [f"{key}={good[0]},{good[1]}"], [key], [key])
        elif kind == "choice" and choices:
            group = rng.choice(list(choices))
            name = misspelt(rng.choice(choices[group]), rng)
            if free(f"{group}=") and name not in choices[group]:
                fault(kind, [f"{group}={name}"], [f"{group}={name}"], [f"{group}="])
        elif kind == "strange":
            argument, named = rng.choice(STRANGE)
            if named not in [name for _, name in case.faults] and free(named.partition("=")[0]):
                fault(kind, [argument], [named], [named.partition("=")[0]])
        elif kind == "together" and case.script == "train":
            arguments, named = rng.choice(CONTRADICTIONS)
            touched = [text if text == "schedule=" else text.rstrip("=") for text in map(key_of, arguments)]
            if free(*touched, *BUDGET):
                fault(kind, arguments, named, [*touched, *BUDGET])

    n = rng.choice([None, *range(12)])  # each file is chosen, but not each combination of them: that takes time
    for group, names in choices.items():
        if free(f"{group}=") and n is not None:
            case.arguments.append(f"{group}={names[n % len(names)]}")
    for key in rng.sample(list(keys), rng.randrange(6)):
        if free(key):
            case.arguments.append(f"{key}={rng.choice(keys[key][0])}")
            case.fine.append(key)
            used.append(key)
    rng.shuffle(case.arguments)
    return case


def is_named(name, line):
    """Whether `line` is about `name`: mentioning it as what somebody may have meant does not count."""
    about = re.sub(r", did you mean [^;]*\?", "", line)
    return re.search(rf"(?<![\w.]){re.escape(escape(name))}(?!\w)(?!\.[a-z])", about) is not None


def complaints(case, start):
    """What is wrong with how a command line was answered."""
    if not case.faults:
        if (start.code, start.stdout.strip(), start.stderr) != (0, "valid", ""):
            yield "a valid command line was not accepted"
    else:
        if start.code != 2 or start.stdout:
            yield f"code {start.code}"
        if not start.stderr.startswith("error: ") or start.stderr.count("\n") != 1 or "Traceback" in start.stderr:
            yield "not one line"
        if not OF_HYDRA & {kind for kind, _ in case.faults}:
            yield from (f"{name} is not named" for _, name in case.faults if not is_named(name, start.stderr))
        yield from (f"{key} is blamed" for key in case.fine if is_named(key, start.stderr))
    if start.imports:
        yield f"{start.imports} were imported"


@pytest.fixture(scope="module")
def starts():
    with launcher() as process:
        yield process


def check(starts, numbers, exact, out_dir, record_property):
    cases = [make(number) for number in numbers]
    failures, right, seconds = [], 0, []
    for script in KEYS:
        chosen = [case for case in cases if case.script == script]
        fixed = FIXED[script] + ([f"out_dir={out_dir}"] if script == "train" else [])
        answers = starts.start_all([[*fixed, *case.arguments] for case in chosen], script, exact=exact)
        for case, start in zip(chosen, answers, strict=True):
            wrong = "; ".join(complaints(case, start))
            if wrong:
                arguments = [text[:99] for text in case.arguments]
                failures.append(f"case {case.number}: {wrong}\n  {script}.py {arguments}\n  {start.stderr}")
            if not OF_HYDRA & {kind for kind, _ in case.faults}:
                right += sum(f"{wrong}, did you mean {meant}?" in start.stderr for wrong, meant in case.meant.items())
            seconds.append(start.seconds)
    assert not failures, f"{len(failures)} of {len(cases)}:\n" + "\n".join(failures[:8])
    valid = sum(not case.faults for case in cases)
    n_faults = sum(len(case.faults) for case in cases)
    n_misspelt = sum(len(case.meant) for case in cases if not OF_HYDRA & {kind for kind, _ in case.faults})
    assert right >= 0.9 * n_misspelt
    assert {kind for case in cases for kind, _ in case.faults} == KINDS
    record_property(
        "count",
        f"{len(cases)} command lines: {valid} valid and accepted, {len(cases) - valid} with {n_faults} faults refused "
        f"with code 2 and one line; {right} of {n_misspelt} misspelt keys with the right suggestion; slowest "
        f"{max(seconds):.2f} s",
    )


def test_every_fault_of_a_command_line_is_named_and_a_valid_one_is_accepted(starts, tmp_path, record_property):
    check(starts, range(70), False, tmp_path / "run", record_property)


@pytest.mark.exhaustive
@pytest.mark.parametrize("shard", range(8))
def test_every_fault_of_many_command_lines_is_named(shard, starts, tmp_path, record_property):
    first = 1000 + 250 * shard
    check(starts, range(first, first + 250), True, tmp_path / "run", record_property)

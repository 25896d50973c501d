"""The same on text (claim 9), and word selection, the language model's own observation (claim 10).

    python exp_nlp.py                              sentences of a small grammar, laptop scale
    python exp_nlp.py --text wordselect            which of the listed words is meant?
    python exp_nlp.py --conllu FILE.conllu         any Universal Dependencies treebank, any language
    python exp_nlp.py --tsv FILE.tsv               column `text`, every other column an attribute
    python exp_nlp.py --lr 5e-4 1e-3 2e-3          every arm also at its own best learning rate

A sequence is text_1 label_1 ... text_n label_n. Every text has several attributes (tense, kind of the subject ...); a sequence asks
for one of them and permutes its values to labels by one of m mappings, m = --difficulty. Arms:
  baseline   the plain target task
  warmup     the first --switch steps on one fixed mapping             mixture  --fraction of every batch on one fixed mapping
  weights    extra loss: read all attributes of the text just read     context  extra loss: read which attribute is asked
  norm       extra loss, no labels: mean square of the residual stream after each block
Word selection: a text lists one word of each category in random order, a sequence asks for one category, the label is that word.
"""

import argparse
import itertools
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from einops import rearrange

import probes
from model import GPT, Adam, Config, Linear, autocast, compile_blocks, pick_device
from tasks import Items, UsageError, mappings, parse_difficulty, sequence_numbers

ARMS = ("baseline", "warmup", "mixture", "weights", "context", "norm")
PAD, UNKNOWN, STOP, FIRST = range(4)  # every text ends in STOP, where its label is predicted; words are numbered from FIRST

SCALES = {  # defaults only: any flag overrides them
    "laptop": dict(arm=["baseline", "weights", "context"], difficulty=[4], lr=[2e-3], weight=1.0, switch=400, fraction=0.5, text="grammar",
                   texts=20_000, words=11, vocabulary=1000, steps=1000, batch=24, pairs=6,
                   n_layer=3, n_head=2, d_model=48, evaluations=50, probes=2),
    "paper": dict(arm=list(ARMS), difficulty=[20000], lr=[1e-4], weight=0.1, switch=3905, fraction=0.5, text="grammar", texts=20_000,
                  words=32, vocabulary=8000, steps=46860, batch=128, pairs=20,
                  n_layer=12, n_head=4, d_model=128, evaluations=240, probes=30),
}  # fmt: skip
FOUR = ["baseline", "weights", "context", "norm"]  # word selection has no mapping to ease
WORDSELECT = {"laptop": dict(arm=FOUR, difficulty=[1.0], d_model=32, evaluations=100, probes=5), "paper": dict(arm=FOUR, difficulty=[1.0])}


def arguments() -> argparse.Namespace:
    parser, exp = probes.script_parser(
        __file__, __doc__, SCALES | {f"{scale} --text wordselect": values for scale, values in WORDSELECT.items()}, images=False
    )
    exp.add_argument("--difficulty", type=parse_difficulty, nargs="+", help="mappings in play, one or several; inf = always fresh")
    exp.add_argument("--arm", choices=ARMS, nargs="+", help="strategies to compare (laptop: baseline weights context; paper: all)")
    exp.add_argument("--switch", type=int, help="warmup: steps on one mapping")
    exp.add_argument("--fraction", type=float, help="mixture: part of every batch on one mapping")
    exp.add_argument("--weight", type=float, help="of the weights and context losses")
    exp.add_argument("--norm-weight", type=float, default=0.01, help="of the norm loss (default 0.01)")
    exp.add_argument("--text", choices=("grammar", "wordselect"), help="made here (default grammar)")
    exp.add_argument("--conllu", nargs="+", help="treebank files instead; attributes from the annotation")
    exp.add_argument("--tsv", help="tab-separated file instead, with a header; column text, every other column an attribute")
    exp.add_argument("--ask", nargs="+", help="attributes that may be asked (grammar: tense sentiment; otherwise all)")
    exp.add_argument("--texts", type=int, help="how many the grammar or word selection makes")
    exp.add_argument("--words", type=int, help="texts are cut after this many words")
    exp.add_argument("--vocabulary", type=int, help="commonest words of the training part that are kept")
    exp.add_argument("--pairs", type=int, help="(text, label) pairs per sequence")
    exp.add_argument("--n-layer", type=int, help="blocks")
    exp.add_argument("--d-model", type=int, help="width")
    args = parser.parse_args()
    select = args.text == "wordselect"
    scale = SCALES[args.scale] | (WORDSELECT[args.scale] if select else {})
    arms = args.arm or scale["arm"]
    for given, source, unused in (
        (args.conllu or args.tsv, "your own texts", ("text", "texts")),
        (select, "--text wordselect", ("words", "vocabulary", "ask")),
        ("warmup" not in arms, "arms (--arm) other than warmup", ("switch",)),
        ("mixture" not in arms, "arms (--arm) other than mixture", ("fraction",)),
    ):
        for name in unused:
            if given and getattr(args, name) is not None:
                raise UsageError(f"--{name}: has no meaning with {source}; leave it out")
    probes.check(args, scale)
    if args.conllu and args.tsv:
        raise UsageError("--tsv: give either --conllu or --tsv")
    if select and (args.difficulty != [1] or set(args.arm) & {"warmup", "mixture"}):
        raise UsageError("--text wordselect: has no mappings; leave out --difficulty and the arms (--arm) warmup and mixture")
    if "warmup" in args.arm and not 0 <= args.switch < args.steps:
        raise UsageError(f"--switch {args.switch}: must lie inside the budget, 0 .. {args.steps - 1} (--steps)")
    if 1 in args.difficulty and set(args.arm) & {"warmup", "mixture"}:
        raise UsageError("--difficulty 1: is what the arms (--arm) warmup and mixture start from; give a harder target or leave them out")
    return args


def runs_of(args: argparse.Namespace) -> list[dict]:
    return [dict(arm=arm, difficulty=m, lr=lr, seed=s) for m in args.difficulty for arm in args.arm for lr in args.lr
            for s in range(args.seeds)]  # fmt: skip


def train(args: argparse.Namespace, runs: list[dict], checkpoint: str) -> dict:
    device, args.precision = pick_device(args.device, args.precision)
    world = texts(args, device)
    if world.n_asked == 1 and "context" in args.arm:
        raise UsageError("--ask: with one asked attribute the context loss has nothing to read; ask two or leave that arm out")
    about = {"attributes": dict(zip([world.names[f] for f in world.varying], world.value_sizes)), "bag_of_words": bag_of_words(world)}
    column = lambda key: [run[key] for run in runs]
    only = lambda arm, value: torch.tensor([value if run["arm"] == arm else 0 for run in runs], device=device)
    seed, target, easy = torch.tensor(column("seed"), device=device), mappings(column("difficulty"), device), mappings([1], device)
    switch, easy_rows = only("warmup", args.switch), only("mixture", round(args.fraction * args.batch))
    mixed = torch.arange(args.batch, device=device) < easy_rows[:, None]
    weights, context, norm = only("weights", args.weight), only("context", args.weight), only("norm", args.norm_weight)
    model = GPT(Config(**world.inputs, n_pair=args.pairs, n_layer=args.n_layer, n_head=args.n_head, d_model=args.d_model), column("seed"))
    model.extra = Linear(len(runs), args.d_model, world.n_value + world.n_asked)  # read-outs of the extra losses
    model.extra.initialise(column("seed"))
    model = model.to(device)
    optimizer = Adam(model, column("lr"))
    record = probes.Record(args, runs, world, model, optimizer, checkpoint)
    if not args.no_compile:
        compile_blocks(model)

    for step in record.training_steps():
        m = torch.where(mixed | (step < switch)[:, None], easy, target[:, None])  # (r, b): warm-up and mixture
        batch = world.sample(seed, m, sequence_numbers(seed, step, args.batch), args.pairs)
        with autocast(device, args.precision):
            logits, states = model(batch.x, batch.y, hidden=True)
            guess = model.extra(model.norm(rearrange(model.at_x(states[-1]), "r b n d -> r (b n) d")))
        value, asked = rearrange(guess, "r (b n) o -> r b n o", b=args.batch).split([world.n_value, world.n_asked], -1)
        loss = world.loss(logits, batch).mean((1, 2))  # (r,), one mean per run
        loss = loss + weights * world.value_loss(value, batch.values).mean((1, 2))
        loss = loss + context * world.asked_loss(asked, batch).mean((1, 2))
        loss = loss + norm * torch.stack([h.square().mean((1, 2, 3)) for h in states]).mean(0)
        loss.sum().backward()  # nothing crosses the run axis: the sum's gradient is each run's own
        optimizer.step()

    return record.metrics(device) | about


# ---------------------------------------------------------------------------------------------- a small grammar

KINDS = {
    "person": "doctor farmer teacher sailor painter baker singer driver lawyer soldier neighbour student".split(),
    "animal": "dog horse cow goat lion tiger rabbit eagle snake duck camel monkey".split(),
    "vehicle": "truck car train boat ship plane bike tractor wagon van tram sledge".split(),
    "plant": "tree shrub flower rose oak vine weed fern tulip palm willow cactus".split(),
}
VERBS = "follow cover block surround pull touch reach pass approach move miss chase save shove push turn".split()
ADJECTIVES = {
    "good": "lovely wonderful fine beautiful splendid charming pleasant excellent".split(),
    "bad": "ugly awful nasty terrible horrid dreadful shabby wretched".split(),
    "plain": "big small old tall grey green northern heavy".split(),
}
TENSES, NUMBERS = ("past", "present", "future", "perfect"), ("one", "many")
NEGATIVE, POSITIVE = ["not", "never"], ["always", "often", "surely", "just"]
FRONTS = ["today", "of course", "this time", "once again", "as usual", "in winter"]
PLACES = ["near the river", "behind the barn", "beside the road", "outside the village"]
ATTRIBUTES = dict(subject=tuple(KINDS), object=tuple(KINDS), tense=TENSES, number=NUMBERS, negation=("no", "yes"),
                  question=("no", "yes"), sentiment=tuple(ADJECTIVES))  # fmt: skip


def plural(noun: str) -> str:  # and the third person of a verb
    return noun + ("es" if noun.endswith(("s", "ch", "sh")) else "s")


def past(verb: str) -> str:  # and its participle
    return verb + ("d" if verb.endswith("e") else "ed")


def sentence(values: dict[str, str], pick) -> list[str]:
    """A sentence with these attributes (names and values of ATTRIBUTES); pick(list) chooses freely where they leave a choice.

    Subject and object draw on the same nouns, auxiliaries stand in statements too, and a front or the adjective shifts all
    positions: what a word says about an attribute depends on where it stands.
    """
    many, negative, question = values["number"] == "many", values["negation"] == "yes", values["question"] == "yes"
    described, adjective = pick(["subject", "object"]), pick(ADJECTIVES[values["sentiment"]])

    def phrase(role, plural_form):
        noun = pick(KINDS[values[role]])
        return [pick(["the", "our", "my", "your"]), *[adjective] * (described == role), plural(noun) if plural_form else noun]

    subject, object_ = phrase("subject", many), phrase("object", pick([False, True]))
    verb, adverb = pick(VERBS), pick(NEGATIVE if negative else POSITIVE)
    auxiliary, main, inflected = {
        "past": ("did", verb, past(verb)),
        "present": ("do" if many else "does", verb, verb if many else plural(verb)),
        "future": ("will", verb, None),
        "perfect": ("have" if many else "has", past(verb), None),
    }[values["tense"]]
    if question:
        middle = [auxiliary, *subject, adverb, main]
    elif inflected and adverb in ("never", "always", "often"):
        middle = [*subject, adverb, inflected]
    else:  # "did surely touch" is a statement as well
        middle = [*subject, auxiliary, adverb, main]
    front, place = pick([(True, False), (True, False), (False, True), (False, False)])
    return [*(pick(FRONTS).split() if front else []), *middle, *object_, *(pick(PLACES).split() if place else [])]


def grammar(count: int) -> tuple[list, dict, list]:
    """Different sentences with independent, uniform attributes: texts, {attribute: values}, document of each text."""
    rng = np.random.default_rng(0)
    pick = lambda options: options[rng.integers(len(options))]
    out = {}
    while len(out) < count:
        values = {name: pick(options) for name, options in ATTRIBUTES.items()}
        out[tuple(sentence(values, pick))] = values
    return list(out), {name: [values[name] for values in out.values()] for name in ATTRIBUTES}, list(range(count))


# ---------------------------------------------------------------------------------------------- real text


def read_lines(path: str, flag: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UsageError(f"{flag} {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{flag} {path}: is not UTF-8 text (byte {error.start}); convert it first") from None


def conllu(paths: list[str], cut: int) -> tuple[list, dict, list]:
    """Texts, attributes and documents of CoNLL-U files (universaldependencies.org/format.html).

    Multiword tokens (1-2) and empty nodes (1.1) are passed over. A document starts at `# newdoc`; where these mark fewer than 20,
    every 50 sentences are one. An attribute that a sentence does not have is "none". Length is that of the text as it is cut.
    """
    words, attributes, documents = [], {name: [] for name in ("verb", "subject", "genre", "length", "end", "number", "root")}, []
    for path in paths:
        rows, sentence_id, document = [], "", 0
        for at, line in enumerate([*read_lines(path, "--conllu"), ""], 1):
            if line.startswith("#"):
                key, _, value = line[1:].partition("=")
                sentence_id = value.strip() if key.strip() == "sent_id" else sentence_id
                document += key.split()[:1] == ["newdoc"]
            elif line.strip():
                row = line.split("\t")
                if len(row) != 10:
                    raise UsageError(f"--conllu {path}: line {at} has {len(row)} tab-separated columns, CoNLL-U has 10")
                if row[0].isdigit():
                    rows.append(row)
            elif rows:
                for name, value in annotation(rows, sentence_id).items():
                    attributes[name].append(value)
                words.append([row[1].lower() for row in rows])
                documents.append((path, document))
                rows, sentence_id = [], ""
    if not words:
        raise UsageError(f"--conllu {' '.join(paths)}: no sentence found")
    if len(set(documents)) < 20:
        documents = [i // 50 for i in range(len(words))]
    lengths = [min(cut, len(text)) for text in words]
    short, long = np.quantile(lengths, [1 / 3, 2 / 3])
    attributes["length"] = ["short" if n <= short else "long" if n > long else "middle" for n in lengths]
    return words, attributes, documents


def annotation(rows: list[list[str]], sentence_id: str) -> dict[str, str]:
    """What a sentence's annotation says: part of speech of the root, tense or mood of its finite verb, part of speech and
    number of its subject, final punctuation, genre (what stands before the first - in sent_id, where treebanks often put it)."""
    root = next((row for row in rows if row[6] == "0"), None)
    if root is None:
        return dict(root="none", verb="none", subject="none", number="none", end="none", genre="none")
    features = lambda row: dict(pair.split("=", 1) for pair in row[5].split("|") if "=" in pair)
    children = [row for row in rows if row[6] == root[0]]
    verbs = [root, *(row for row in children if row[7].split(":")[0] in ("aux", "cop"))]
    finite = next((features(row) for row in verbs if features(row).get("VerbForm") == "Fin"), {})
    subject = next((row for row in children if row[7].startswith(("nsubj", "csubj"))), None)
    return dict(
        root=root[3],
        verb=finite.get("Tense", finite.get("Mood", "modal" if finite else "none")),
        subject=subject[3] if subject else "none",
        number=features(subject).get("Number", "none") if subject else "none",
        end=rows[-1][1] if rows[-1][3] == "PUNCT" else "none",
        genre=sentence_id.split("-")[0] if "-" in sentence_id else "none",
    )


def tsv(path: str) -> tuple[list, dict, list]:
    """Texts and attributes of a tab-separated file with a header; each different text is a document of its own.

    No quoting: a tab always separates, a line end always ends. Rows without a text are passed over.
    """
    lines = read_lines(path, "--tsv")
    header = lines[0].split("\t") if lines else []
    if "text" not in header or len(set(header)) < max(2, len(header)):
        raise UsageError(f"--tsv {path}: the first line must name the columns: text, and one or more attributes, each once")
    rows = []
    for at, line in enumerate(lines[1:], 2):
        row = line.split("\t")
        if line.strip() and len(row) != len(header):
            raise UsageError(f"--tsv {path}: line {at} has {len(row)} columns, the header has {len(header)}")
        if line.strip() and row[header.index("text")].strip():
            rows.append(row)
    if not rows:
        raise UsageError(f"--tsv {path}: holds no texts")
    columns = dict(zip(header, zip(*rows)))
    words = [re.findall(r"\w+|[^\w\s]", text.lower()) for text in columns.pop("text")]
    return words, {name: list(values) for name, values in columns.items()}, [tuple(text) for text in words]


# ---------------------------------------------------------------------------------------------- texts as a world

CATEGORIES = {
    "animal": KINDS["animal"],
    "plant": KINDS["plant"],
    "colour": "red blue green yellow brown black white purple orange pink grey violet".split(),
    "verb": "run sing eat sleep write read swim laugh cook dance jump wait".split(),
    "country": "france japan brazil egypt canada kenya norway india chile poland peru ghana".split(),
}


class WordSelect(Items):
    """Texts that list one word of each category in any order; the label of a text is its word of the asked category."""

    def __post_init__(self):
        super().__post_init__()
        self.n_label = self.inputs["d_y"] = sum(self.sizes)

    def permutation(self, seed, mapping, asked) -> torch.Tensor:
        """A label is the word itself: there is nothing to map. -> (..., words of a category)"""
        return asked[..., None] * self.sizes[0] + torch.arange(self.sizes[0], device=asked.device)

    def references(self, seed: int, difficulty: float, n: int) -> dict:
        """Exact: any listed word before the first label, the right one ever after."""
        k = len(self.sizes)
        by_position = [1 / k] + [1.0] * (n - 1)
        return {"chance": 1 / k, "no_context_loss": math.log(k), "label_set_loss": math.log(k), "bayes_loss": math.log(k) / n,
                "bayes_accuracy": sum(by_position) / n, "bayes_accuracy_by_position": by_position}  # fmt: skip


def wordselect(device, count: int, pairs: int) -> WordSelect:
    rng = np.random.default_rng(0)
    k, size = len(CATEGORIES), min(map(len, CATEGORIES.values()))
    values = np.unique(rng.integers(size, size=(count, k)), axis=0)
    rng.shuffle(values)
    token = values + FIRST + size * np.arange(k)
    table = np.concatenate([rng.permuted(token, axis=1), np.full((len(token), 1), STOP)], 1)
    to, cut = lambda a: torch.as_tensor(a, device=device), round(0.8 * len(values))
    number = np.arange(len(values))
    if len(values) - cut < 4 * pairs:
        raise UsageError(f"--texts {count}: leaves {len(values) - cut} held-out texts, too few for --pairs {pairs}; give more")
    if probes.RANK == 0:
        print(f"word selection: {len(values)} texts of {k} words out of {k * size}; categories {', '.join(CATEGORIES)}")
    return WordSelect(tuple(CATEGORIES), (size,) * k, list(range(k)), to(values), to(table), to(number[:cut]), to(number[cut:]),
                      n_word=FIRST + k * size)  # fmt: skip


def texts(args: argparse.Namespace, device, least: float = 0.04) -> Items:
    """The text world of the flags; prints what was found. Raises UsageError, naming the flag, for what cannot be served.

    A value of less than `least` of the texts counts as "other". A fifth of the documents is held out, and of those every text that
    the model cannot tell from a training text is dropped. Texts are drawn with weights that make the values of every attribute
    equally frequent, in the training and in the held-out part.
    """
    flag = "--conllu" if args.conllu else "--tsv" if args.tsv else "--text"
    if args.text == "wordselect" and flag == "--text":
        return wordselect(device, args.texts, args.pairs)
    say = print if probes.RANK == 0 else lambda *_: None
    words, attributes, documents = conllu(args.conllu, args.words) if args.conllu else tsv(args.tsv) if args.tsv else grammar(args.texts)
    if set(args.ask or ()) - set(attributes):
        raise UsageError(f"--ask {' '.join(args.ask)}: the attributes found are {' '.join(attributes)}")
    words, names = [text[: args.words] for text in words], list(dict.fromkeys(documents))
    held_out = {names[i] for i in np.random.default_rng(0).permutation(len(names))[: max(1, round(0.2 * len(names)))]}
    test = np.array([document in held_out for document in documents])
    common = [word for word, _ in Counter(word for i in np.flatnonzero(~test) for word in words[i]).most_common(args.vocabulary)]
    index, longest = {word: i for i, word in enumerate(common, FIRST)}, max(map(len, words))
    table = np.array([[index.get(word, UNKNOWN) for word in text] + [PAD] * (longest - len(text)) + [STOP] for text in words])
    seen = set(map(tuple, table[~test].tolist()))
    good = np.array([not out or tuple(row) not in seen for row, out in zip(table.tolist(), test)])

    kept: dict[str, np.ndarray] = {}
    for name in dict.fromkeys([*(args.ask or ()), *attributes]):
        count = Counter(attributes[name])
        column = [value if count[value] >= least * len(words) else "other" for value in attributes[name]]
        count = Counter(column)
        usable = [value for value, k in count.most_common() if k >= least * len(words)]  # too few others: their texts are left out
        number = np.array([usable.index(value) if value in usable else -1 for value in column])
        trial = np.stack([*kept.values(), number], 1)
        fine = good & (trial >= 0).all(1)
        trouble = reason_against(trial[fine], test[fine], list(kept)) if len(usable) > 1 else "one value"
        if not trouble:
            kept[name], good = number, fine
            say(f"  {name}: " + ", ".join(f"{value} {count[value] / len(words):.0%}" for value in usable))
        elif name in (args.ask or ()):
            raise UsageError(f"--ask {name}: {trouble}; leave it out")
        else:
            say(f"  {name}: left out, {trouble}")
    if not kept:
        raise UsageError(f"{flag}: no attribute has two values of at least {least:.0%} of the texts each, in both parts; give more text")
    ask = args.ask or [name for name in ("tense", "sentiment") if flag == "--text" and name in kept] or list(kept)
    values, table, test = np.stack(list(kept.values()), 1)[good], table[good], test[good]
    parts = np.flatnonzero(~test), np.flatnonzero(test)
    if min(map(len, parts)) < 4 * args.pairs:
        raise UsageError(f"{flag}: {len(parts[0])} training and {len(parts[1])} held-out texts are too few for --pairs {args.pairs}")
    weight = np.zeros(len(values))
    for part in parts:
        weight[part] = balance(values[part])
    say(f"{len(table)} texts, {len(common)} words, at most {longest} a text; {len(parts[0])} for training, {len(parts[1])} held out")
    for i, j in itertools.combinations(range(len(kept)), 2):
        known = mutual_information(values[:, i], values[:, j], weight)
        if known > 0.02:
            say(f"  mutual information of {list(kept)[i]} and {list(kept)[j]}, balanced: {known:.2f} nats")
    to, sizes = lambda a: torch.as_tensor(a, device=device), tuple((values.max(0) + 1).tolist())
    return Items(tuple(kept), sizes, [list(kept).index(name) for name in ask], to(values), to(table), to(parts[0]), to(parts[1]),
                 weight=to(weight), n_word=FIRST + len(common))  # fmt: skip


def reason_against(values: np.ndarray, test: np.ndarray, names: list[str], enough: float = 0.2) -> str:
    """Why the last column of values (text, f) cannot join the others; empty if it can.

    It needs all values in both parts; when all attributes are balanced, at least `enough` of the texts must count (effective sample
    size), and it may not tell more than half of what there is to know about another attribute.
    """
    sizes = values.max(0) + 1 if len(values) else [1]
    if any(len(np.unique(column[part])) < size for part in (test, ~test) for column, size in zip(values.T, sizes)):
        return "a value is missing in the training or the held-out part"
    weight = balance(values)
    left = 1 / (weight**2).sum() / len(values)
    if left < enough:
        return f"balanced with the others only {left:.0%} of the texts would count"
    for name, column, size in zip(names, values.T, sizes):
        if mutual_information(column, values[:, -1], weight) > 0.5 * math.log(min(size, sizes[-1])):
            return f"it tells too much about {name}"
    return ""


def balance(values: np.ndarray, rounds: int = 100) -> np.ndarray:
    """Weights (text,), summing to 1, that give the values of every attribute equal shares (iterative proportional fitting)."""
    weight = np.full(len(values), 1 / len(values))
    for _ in range(rounds):
        for column, size in zip(values.T, values.max(0) + 1):
            weight = weight / (np.bincount(column, weight, size) * size)[column]
    return weight / weight.sum()


def mutual_information(a: np.ndarray, b: np.ndarray, weight: np.ndarray) -> float:
    """In nats, under the weights."""
    joint = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(joint, (a, b), weight / weight.sum())
    entropy = lambda p: torch.special.entr(torch.from_numpy(p)).sum().item()
    return max(0.0, entropy(joint.sum(0)) + entropy(joint.sum(1)) - entropy(joint))  # never -0.0 by rounding


def bag_of_words(world: Items) -> dict[str, float]:
    """Held-out accuracy of the best linear reader of word counts, per attribute: what needs no order."""
    generator = torch.Generator().manual_seed(0)
    part = [world.draw(count, held_out, generator) for count, held_out in ((8192, False), (2048, True))]
    count = lambda i: torch.zeros(1, len(i), world.n_word, device=i.device).scatter_(2, world.table[i][None], 1.0, reduce="add")
    value = lambda i: world.values[i][:, world.varying]
    score = probes.converged_probe(count(part[0]), value(part[0]), count(part[1]), value(part[1]), world.value_sizes)
    return {world.names[f]: round(v, 4) for f, v in zip(world.varying, score[0].tolist())}


# ---------------------------------------------------------------------------------------------- the picture


def plot(metrics: dict, path: Path) -> None:
    source = metrics["args"]["conllu"] or metrics["args"]["tsv"] or metrics["args"]["text"]
    select, last = metrics["args"]["text"] == "wordselect", metrics["runs"][-1]
    title = f"Text: {source if isinstance(source, str) else ' '.join(source)}"
    figure, f, colours = probes.draw_arms(metrics, title, target=not select)
    if select:  # the fall begins far above what no context allows: any word at all
        figure.axes[0].set_ylim(0, 1.05 * last["loss"][0])
    at_best = probes.at_best_rate(metrics, difficulty=last["difficulty"])
    block, names, place = last["headline_block"], list(metrics["attributes"]), np.arange(len(metrics["attributes"]))
    for i, (arm, colour) in enumerate(colours.items()):
        score = np.array([run["weights_score_by_factor"][-1][block] for run in at_best if run["arm"] == arm], float)  # (seed, attribute)
        f.plot(place + 0.7 * ((i + 0.5) / len(colours) - 0.5), score.T, "o", color=colour, ms=5, mfc="none")
    f.hlines([1 / metrics["attributes"][name] for name in names], place - 0.4, place + 0.4, color="black", ls="--", lw=1, label="chance")
    f.hlines([metrics["bag_of_words"][name] for name in names], place - 0.4, place + 0.4, color="black", lw=1, label="bag of words")
    f.set_xticks(place, names, rotation=20)
    f.legend(fontsize=8)
    f.set(title=f"(f) What block {block + 1} knows of a text at the end", ylabel="weights score by attribute", ylim=(0, 1.05))
    probes.save_figure(path, figure)


def main() -> None:
    probes.command(arguments, runs_of, train, plot)


if __name__ == "__main__":
    main()

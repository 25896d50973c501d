"""The same on text (claim 9), and word selection, the language model's own observation (claim 10).

    python exp_nlp.py                              sentences of a small grammar, laptop scale
    python exp_nlp.py --text oracle                a text lists its attributes' values: nothing to learn about texts
    python exp_nlp.py --text wordselect            a text lists words of several categories: which of them is meant?
    python exp_nlp.py --conllu FILE.conllu         any Universal Dependencies treebank, any language
    python exp_nlp.py --tsv FILE.tsv               column `text`, every other column an attribute; no quoting

A sequence text_1 label_1 ... text_n label_n asks for one attribute of the texts (tense, kind of the subject ...), whose
values it permutes to labels by one of m mappings. Arms: baseline; warmup: --switch steps on one fixed mapping; mixture:
--fraction of every batch on it; weights, context, alike, norm: the losses of exp_aux_loss.py.
"""

import math
import os
import re
import unicodedata
from collections import Counter, namedtuple
from itertools import product
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that wait sleep

import numpy as np
import torch

import probes
from model import GPT, Adam, Config, Linear, compile_blocks, pick_device
from tasks import Items, UsageError, mapping_counts, parse_difficulty, sequence_numbers

ARMS, FOUR = "baseline warmup mixture weights alike context norm".split(), "baseline weights alike context".split()
PAD, UNKNOWN, STOP, FIRST = range(4)  # every text ends in STOP, where its label is predicted; words from FIRST on
SCALES = {
    "laptop": dict(arm=FOUR[:3], difficulty=[4], lr=[2e-3], steps=1000, batch=24, pairs=6, n_layer=3, n_head=2,
                   d_model=48, evaluations=50, probes=2, weight=1.0, switch=400, words=11, vocabulary=1000),
    "paper": dict(arm=ARMS, difficulty=[20000], lr=[1e-4], steps=46860, batch=128, pairs=20, n_layer=12, n_head=4,
                  d_model=128, evaluations=240, probes=30, weight=0.1, switch=3905, words=32, vocabulary=8000),
}  # fmt: skip
SELECT = {"laptop": dict(SCALES["laptop"], arm=FOUR, difficulty=[1], d_model=32, evaluations=100, probes=5, fraction=0),
          "paper": dict(SCALES["paper"], arm=FOUR, difficulty=[1], fraction=0)}  # fmt: skip
KINDS = dict(person="doctor farmer teacher sailor painter baker singer driver lawyer soldier neighbour student".split(),
             animal="dog horse cow goat lion tiger rabbit eagle snake duck camel monkey".split(),
             vehicle="truck car train boat ship plane bike tractor wagon van tram sledge".split(),
             plant="tree shrub flower rose oak vine weed fern tulip palm willow cactus".split())  # fmt: skip
VERBS = "follow cover block surround pull touch reach pass approach move miss chase save shove push turn".split()
ADJECTIVES = dict(good="lovely wonderful fine beautiful splendid charming pleasant excellent".split(),
                  bad="ugly awful nasty terrible horrid dreadful shabby wretched".split(),
                  plain="big small old tall grey green northern heavy".split())  # fmt: skip
ATTRIBUTES = dict(subject=KINDS, object=KINDS, tense=["past", "present", "future", "perfect"], number=["one", "many"],
                  negation=["no", "yes"], question=["no", "yes"], sentiment=ADJECTIVES)  # fmt: skip
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3021-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
MARK = "".join(c for c in map(chr, range(0x300, 0x1F000)) if unicodedata.category(c)[0] == "M") + "\u200c\u200d"
WORD = rf"[^\W_{UNSPACED}](?:[^\W_{UNSPACED}]|[{MARK}])*|[^\s\0-\x1f\x7f-\x9f\u200b-\u200f\ufeff][{MARK}]*"
Word = namedtuple("Word", "id form lemma upos xpos feats head deprel deps misc")  # the columns of CoNLL-U


def parse_args():
    select = probes.early("--text", "") == "wordselect"
    parser = probes.flags(__doc__, SELECT if select else SCALES, images=False)
    add, source, between = parser.add_argument, parser.add_mutually_exclusive_group(), probes.between
    source.add_argument("--text", choices=("grammar", "oracle", "wordselect"), default="grammar", help="made here")
    source.add_argument("--conllu", nargs="+", default=[], help="treebank files; attributes from the annotation")
    source.add_argument("--tsv", help="tab-separated table with a header; column text, every other one an attribute")
    add("--arm", choices=[*FOUR, "norm"] if select else ARMS, nargs="+", help="strategies to compare")
    add("--weight", type=between(0, 1e5, float), help="of the weights and context losses")
    add("--texts", type=between(100, 1e6), default=20_000, help="how many the grammar or word selection makes")
    if not select:
        add("--difficulty", type=parse_difficulty, nargs="+", help="mappings in play, inf = always fresh")
        add("--switch", type=between(0, 1e8), help="warmup: steps on one mapping")
        add("--fraction", type=between(0, 1, float), default=0.5, help="mixture: part of every batch on one mapping")
        add("--ask", nargs="+", default=[], help="attributes (grammar: tense sentiment; otherwise all)")
        add("--words", type=between(1, 512), help="texts are cut after so many words")
        add("--vocabulary", type=between(1, 1e5), help="commonest words that are kept")
    args = probes.checked(parser)
    if "warmup" in args.arm and args.switch >= args.steps:
        parser.error(f"--switch {args.switch}: must lie inside the budget, 0 .. {args.steps - 1} (--steps)")
    if "mixture" in args.arm and not math.isclose(args.fraction * args.batch, round(args.fraction * args.batch)):
        parser.error(f"--fraction {args.fraction:g}: must be a whole number of the {args.batch} sequences of a --batch")
    return args


def main():
    args = parse_args()
    if args.replot:
        return probes.replot(args, plot)
    device, args.precision = pick_device(args.device, args.precision)
    runs = probes.share([dict(arm=arm, difficulty=m, lr=lr, seed=seed) for m in args.difficulty
                         for arm in args.arm for lr in args.lr for seed in args.seeds])  # fmt: skip
    world = wordselect(args, device) if args.text == "wordselect" else texts(args, device)
    if world.n_asked == 1 and "context" in args.arm:
        raise UsageError("--ask: one asked attribute leaves the context loss nothing to read; ask two or drop that arm")
    size = dict(weights=args.weight, context=args.weight, alike=1.0, norm=0.01, warmup=args.switch,
                mixture=round(args.fraction * args.batch))  # fmt: skip
    size = [[size[arm] if run["arm"] == arm else 0 for run in runs] for arm in size]
    weights, context, alike, norm, switch, rows = torch.tensor(size, device=device)  # (r,) each
    mixed = torch.arange(args.batch, device=device) < rows[:, None]  # (r, b): the first sequences of a batch are easy
    seeds = [run["seed"] for run in runs]
    seed, target = torch.tensor(seeds, device=device), mapping_counts([run["difficulty"] for run in runs], device)
    easy, bag = mapping_counts([1], device), bag_of_words(world)
    config = Config(**world.inputs, n_pair=args.pairs, n_layer=args.n_layer, n_head=args.n_head, d_model=args.d_model)
    model = GPT(config, seeds)
    model.extra = Linear(len(runs), args.d_model, world.n_value + world.n_asked)  # read-outs of the extra losses
    model.extra.initialise(seeds)
    model = model.to(device)
    optimizer = Adam(model, [run["lr"] for run in runs])
    record = probes.Record(args, runs, world, model, optimizer)
    if not args.no_compile:
        compile_blocks(model)

    for step in record.steps():  # in between it measures, prints and saves
        m = torch.where(mixed | (step < switch)[:, None], easy, target[:, None])  # (r, b): warm-up and mixture
        batch = world.sample(seed, m, sequence_numbers(seed, step, args.batch), args.pairs)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            logits, states = model(batch.x, batch.y, hidden=True)  # states: after each block, (r, b, tokens, d)
            at_x = model.at_x(states[-1]).flatten(1, 2)  # (r, b * n, d)
            guess = model.extra(model.norm(at_x)).unflatten(1, (args.batch, args.pairs))
        value, asked = guess.split([world.n_value, world.n_asked], -1)
        loss = world.loss(logits, batch).mean((1, 2))  # (r,), one mean per run
        loss = loss + weights * world.value_loss(value, batch.values).mean((1, 2))
        loss = loss + context * world.asked_loss(asked, batch).mean((1, 2))
        loss = loss + alike * probes.alike(at_x.float())
        loss = loss + norm * probes.mean_square(states)
        loss.sum().backward()  # nothing crosses the run axis: the sum's gradient is each run's own
        optimizer.step()

    title = "Text: " + (" ".join(args.conllu) or args.tsv or args.text)
    plot(record.finish(title=title, attributes=dict(zip(world.names, world.sizes)), bag_of_words=bag), args.out)


def grammar(args) -> tuple[list, dict, list]:  # different sentences; their attributes are independent and uniform
    rng, out = np.random.default_rng(0), {}
    pick = lambda options: list(options)[rng.integers(len(options))]
    add_s = lambda word: re.sub("(s|ch|sh)$", r"\1e", word) + "s"
    while len(out) < args.texts:
        values = {name: pick(options) for name, options in ATTRIBUTES.items()}
        many, question, tense = values["number"] == "many", values["question"] == "yes", values["tense"]
        described, adjective, phrases = pick(["subject", "object"]), pick(ADJECTIVES[values["sentiment"]]), []
        for role in ("subject", "object"):
            several = many if role == "subject" else pick([False, True])
            noun, article = pick(KINDS[values[role]]), pick(["the", "our", "my", "your"])
            phrases.append(f"{article} {adjective if role == described else ''} {add_s(noun) if several else noun}")
        verb, (subject, object_) = pick(VERBS), phrases
        adverb = pick(["not", "never"] if values["negation"] == "yes" else ["always", "often", "surely", "just"])
        past, present = verb + ("d" if verb.endswith("e") else "ed"), verb if many else add_s(verb)
        auxiliary = dict(past="did", present="do" if many else "does", future="will", perfect="have" if many else "has")
        first, main = auxiliary[tense], past if tense == "perfect" else verb  # the participle is as the past
        clause = f"{first} {subject} {adverb} {main}" if question else f"{subject} {first} {adverb} {main}"
        if tense in ("past", "present") and not question and adverb in ("never", "always", "often"):
            clause = f"{subject} {adverb} {past if tense == 'past' else present}"  # "did surely touch" is said as well
        front, end = pick([(True, False), (True, False), (False, True), (False, False)])
        time = pick(["today", "of course", "this time", "once again", "as usual", "in winter"]) if front else ""
        place = pick(["near the river", "behind the barn", "beside the road", "outside the village"]) if end else ""
        out[tuple(f"{time} {clause} {object_} {place}".split())] = values
    return list(out), {name: [values[name] for values in out.values()] for name in ATTRIBUTES}, list(range(len(out)))


def oracle(args) -> tuple[list, dict, list]:  # every combination of the grammar's attributes, a word for each value
    rows = list(product(*ATTRIBUTES.values()))
    texts = [[f"{name} {value}" for name, value in zip(ATTRIBUTES, row)] for row in rows]
    return texts, dict(zip(ATTRIBUTES, zip(*rows))), list(range(len(rows)))


class WordSelect(Items):  # the label of a text is its word of the asked category, whatever the mapping
    def permutation(self, seed, mapping, asked) -> torch.Tensor:
        return asked[..., None] * self.sizes[0] + torch.arange(self.sizes[0], device=asked.device)

    def references(self, seed: int, difficulty: float, n: int) -> dict:  # exact: any listed word, then the right one
        k, free = len(self.sizes), math.log(len(self.sizes))
        return dict(chance=1 / k, no_context_loss=free, bayes_loss=free / n, bayes_accuracy=1 - (1 - 1 / k) / n)


def wordselect(args, device, categories=("animal", "plant", "colour", "verb", "country"), size: int = 12) -> Items:
    rng, k = np.random.default_rng(0), len(categories)
    values = rng.permutation(np.unique(rng.integers(size, size=(args.texts, k)), axis=0))
    words = rng.permuted(values + FIRST + size * np.arange(k), axis=1)  # a number is all that is seen of a word
    parts = np.split(np.arange(len(values)), [round(0.8 * len(values))])
    probes.say(f"{len(values)} texts of a word for each of {', '.join(categories)}, {len(parts[1])} of them held out")
    tensors = [torch.as_tensor(a, device=device) for a in (values, np.insert(words, k, STOP, axis=1), *parts)]
    world = WordSelect(categories, (size,) * k, list(range(k)), *tensors, n_word=FIRST + k * size)
    world.n_label = k * size
    return world


def read_lines(path: str) -> list[str]:  # but for empty ones at the end
    if not Path(path).exists() or Path(path).is_dir():  # a pipe is no file, and can be read
        raise UsageError(f"--tsv or --conllu {path}: there is no such file")
    text = Path(path).read_bytes().decode("utf-8-sig", "surrogateescape").replace("\r\n", "\n").rstrip("\n")
    for at, line in enumerate(text.split("\n"), 1):
        if re.search("[\r\udc80-\udcff]", line):
            raise UsageError(f"{path}: line {at} holds a stray carriage return or what is not UTF-8; convert the file")
    return unicodedata.normalize("NFC", text).split("\n")


def conllu(args) -> tuple[list, dict, list]:  # the format: universaldependencies.org/format.html
    sentences, document = [], 0
    for path in args.conllu:
        words, genre, source, document = [], "", "", document + 1
        for at, line in enumerate([*read_lines(path), ""], 1):
            row, number = line.split("\t"), str(len(words) + 1)
            if line.startswith("#") and not words:
                if re.match(r"#\s*newdoc\b", line):
                    document, genre = document + 1, ""
                genre = (re.findall(r"^#\s*(?:newdoc |meta::)?genre\s*=\s*(.*\S)", line) or [genre])[0]
                source = (re.findall(r"^#\s*sent_id\s*=\s*([^-]*)-", line.lower()) or [source])[0]
            elif len(row) == 10 and "" not in row and re.fullmatch(rf"{number}|[0-9]+[-.][0-9]+", row[0]):
                words += [Word(*row)] if row[0] == number else []  # n-m and n.m are passed over
            elif line or not (words or sentences):
                raise UsageError(f"{path}: line {at} is not word {number} in 10 full columns, nor a sentence's end")
            elif len(words) > 1 and all(word.form == "_" for word in words):
                raise UsageError(f"{path}: line {at} ends a sentence whose text is withheld: every FORM is _")
            elif words:
                sentences.append(([word.form.lower() for word in words], annotation(words, genre), document, source))
                words, source = [], ""
    texts, facts, documents, sources = zip(*sentences)
    probes.say(f"{len(texts)} sentences, {sum(map(len, texts))} words, {len({*documents})} documents")
    attributes = {name: ["" if fact[name] == "_" else fact[name] for fact in facts] for name in facts[0]}
    lengths = np.minimum(attributes["length"], args.words)
    third = np.digitize(lengths, np.quantile(lengths, [1 / 3, 2 / 3]), right=True)
    attributes["length"] = np.array(["short", "middle", "long"])[third].tolist()
    if not any(attributes["genre"]) and len({*sources}) > 1 and not {"train", "dev", "test"} & {*sources}:
        attributes["genre"] = list(sources)  # many treebanks begin sent_id with it
    return list(texts), attributes, documents if len({*documents}) >= 20 else [i // 50 for i in range(len(texts))]


def annotation(words: list[Word], genre: str) -> dict:  # "" or _ = not annotated
    features = lambda word: dict(re.findall("([^=|]+)=([^|]+)", word.feats))
    root = next((word for word in words if word.head == "0"), Word(*[""] * 10))
    none, children = root.id and "none", [word for word in words if word.head == root.id]
    subject = next((w for w in children if w.deprel.startswith(("nsubj", "csubj"))), Word(*[none] * 10))
    verbs = map(features, [root, *(word for word in children if word.deprel.split(":")[0] in ("aux", "cop"))])
    finite = (f for f in verbs if f.get("VerbForm", "Fin") == "Fin" and {*f} & {"VerbForm", "Mood", "Tense"})
    verb = next((f.get("Tense", f.get("Mood", "Fin")) for f in finite), none)
    end = {"PUNCT": words[-1].form, "_": "_"}.get(words[-1].upos, "none")
    return dict(verb=verb, subject=subject.upos, genre=genre, length=len(words), end=end,
                number=features(subject).get("Number", none), root=root.upos)  # fmt: skip


def tsv(args) -> tuple[list, dict, list]:  # "" = an empty cell, or nan; each different text is a document of its own
    header, *rows = [[cell.strip() for cell in line.split("\t")] for line in read_lines(args.tsv)]
    for at, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise UsageError(f"--tsv {args.tsv}: line {at} has {len(row)} columns, the header has {len(header)}")
    rows = [dict(zip(header, row)) for row in rows]
    full = [row for row in rows if re.search(WORD, row.get("text", ""))]
    if not full or "" in header or len(set(header)) < max(2, len(header)):
        raise UsageError(f"--tsv {args.tsv}: line 1 must name the columns, text and attributes, each once; then texts")
    probes.say(f"{len(rows)} rows read, {len(rows) - len(full)} of them without a text; unspaced scripts by character")
    texts = [re.findall(WORD, row.pop("text").lower()) for row in full]
    return texts, {name: [re.sub("(?i)^nan$", "", row[name]) for row in full] for name in full[0]}, [*map(tuple, texts)]


def texts(args, device, pooled=" rarer values together") -> Items:  # weighted: all values equally frequent
    read = (args.conllu and conllu) or (args.tsv is not None and tsv) or (oracle if args.text == "oracle" else grammar)
    words, attributes, documents = read(args)  # of each text; attributes {name: values}, "" = none
    place = {document: i for i, document in enumerate(dict.fromkeys(documents))}
    held_out = np.random.default_rng(0).permutation(len(place))[: max(1, round(0.2 * len(place)))]
    test = np.isin([place[document] for document in documents], held_out)  # (text,) a fifth of all documents
    cut = [text[: args.words] for text in words]
    common = Counter(word for text, out in zip(cut, test) if not out for word in text).most_common(args.vocabulary)
    index, longest = {word: i for i, (word, _) in enumerate(common, FIRST)}, max(map(len, cut))
    table = np.array([[index.get(w, UNKNOWN) for w in text] + [PAD] * (longest - len(text)) + [STOP] for text in cut])
    seen = {row.tobytes() for row in table[~test]}  # by the model
    single = good = ~test | np.array([row.tobytes() not in seen for row in table])
    kept, said = {}, [f"{(~single).sum()} of {test.sum()} held-out texts are dropped as twins of training texts"]
    for name, column in (dict.fromkeys(args.ask, [""] * len(words)) | attributes).items():
        count = Counter(filter(None, column))
        column = [pooled if 0 < 25 * count[value] < count.total() else value for value in column]
        usable = [value for value, n in Counter(filter(None, column)).most_common() if 25 * n >= count.total()]
        number = np.array([usable.index(value) if value in usable else -1 for value in column])  # -1 = left out
        fine, but = good & (number >= 0), "".join(f" but {value}" for value in usable if value != pooled)
        missing = any(len({*zip(a[fine], test[fine])}) < 2 * (a.max() + 1) for a in (*kept.values(), number))
        twin = [k for k, a in kept.items() if len({*zip(a[fine], number[fine])}) <= max(a.max(), number.max()) + 1]
        values = np.stack([*kept.values(), number], 1)[fine]
        left = 1 / max(1e-9, (balance(values) ** 2).sum() * single.sum())  # effective sample size
        reasons = {"no text has it": not count, f"every value{but} is rarer than 4%": len(usable) < 2,
                   "a value is missing in a part": missing, f"together with {' '.join(twin)} it says nothing new": twin,
                   f"balanced with the others only {left:.0%} of the texts would count": left < 0.2}  # fmt: skip
        why = [reason for reason, true in reasons.items() if true]
        if not why:
            kept[name], good = number, fine
        found = f"left out, {why[0]}" if why else ", ".join(map(str.strip, usable))
        said.append(f"{name}: {found}; {(number < 0).sum()} texts have none of these")
    parts, long = [np.flatnonzero(good & part) for part in (~test, test)], sum(len(text) > args.words for text in words)
    counts = f"of {len(words)} texts {len(parts[0])} are left for training, {len(parts[1])} of {test.sum()} held out"
    unknown = (table == UNKNOWN).sum() / sum(map(len, cut))
    said.insert(0, f"{counts}, {(single & ~good).sum()} lack a value; {long} are cut; unknown words: {unknown:.1%}")
    if not kept or set(args.ask) - set(kept) or min(map(len, parts)) < 4 * args.pairs:
        raise UsageError(f"--ask, --pairs: ask otherwise or give more text, {4 * args.pairs} a part. {'. '.join(said)}")
    probes.say("\n  ".join(said))
    if 2 * len(parts[1]) < test.sum():
        probes.say("warning: most held-out texts are dropped; raise --words or --vocabulary, or give more varied text")
    asked = args.ask or [name for name in ("tense", "sentiment") if read in (grammar, oracle) and name in kept] or kept
    values, weight = np.stack(list(kept.values()), 1), np.zeros(len(words))
    weight[parts[0]], weight[parts[1]] = (balance(values[part]) for part in parts)
    sizes, asked = tuple((values.max(0) + 1).tolist()), [list(kept).index(name) for name in asked]
    values, table, train, test, weight = (torch.as_tensor(a, device=device) for a in (values, table, *parts, weight))
    return Items(tuple(kept), sizes, asked, values, table, train, test, weight=weight, n_word=FIRST + len(common))


def balance(values: np.ndarray) -> np.ndarray:  # weights (text,) that give all values of an attribute equal shares
    weight = np.ones(len(values)) / len(values)
    for column in [*values.T] * 100:
        weight = weight / (np.bincount(column, weight) * (column.max(initial=0) + 1))[column]
    return weight / weight.sum()


def bag_of_words(world: Items) -> dict[str, float]:  # held-out accuracy of the best linear reader of word counts
    parts, generator = [], torch.Generator().manual_seed(0)
    for item in (world.draw(8192, False, generator), world.draw(2048, True, generator)):
        count = torch.zeros(1, len(item), world.n_word, device=item.device)
        parts += [count.scatter_(2, world.table[item][None], 1.0, reduce="add"), world.values[item][None]]
    return dict(zip(world.names, probes.for_json(probes.converged_probe(*parts, world.sizes)[0].tolist())))


def plot(metrics: dict, out: str) -> None:
    figure, d, groups = probes.draw(metrics)
    figure.suptitle(probes.printable(metrics["title"]))
    block, names = metrics["block"], list(metrics["attributes"])
    for i, (colour, runs) in enumerate(zip(probes.COLOURS, groups.values())):
        score = np.array([run["weights_score_by_factor"][-1][block] for run in runs], float)  # (seed, attribute)
        d.plot(np.arange(len(names)) + 0.15 + 0.7 * (i + 0.5) / len(groups), score.T, "o", color=colour, mfc="none")
    d.stairs([1 / n for n in metrics["attributes"].values()], baseline=None, color="black", ls="--", label="chance")
    d.stairs(list(metrics["bag_of_words"].values()), baseline=None, color="black", label="bag of words")
    d.set_xticks(np.arange(len(names)) + 0.5, map(probes.printable, names), rotation=20)
    d.set(title=f"(d) What block {block + 1} knows of a text at the end", ylabel="weights score", ylim=(0, 1.05))
    d.legend(fontsize=8)
    figure.savefig(f"{out}/figure.png")


if __name__ == "__main__":
    probes.run(main)

"""Upcycle 5 of SmolLM2-135M's 30 layers, and train the mixture and the dense model alike.

    python examples/upcycle_smollm2.py FOLDER TEXT --out upcycled.jsonl --seeds 0,1,2

FOLDER holds a Llama of transformers, as safetensors or as one GGUF file (which needs `pip install gguf`). Every sixth
layer becomes 4 experts, two per token, that start as copies of its feed-forward block. Both models are trained on
the same random windows of the text, the mixture with `saturation` and `switch_aux`. Each line of the file is one
model of one seed: the loss on held-out text over the steps, the load of the least used expert, what two more experts
per layer change, and a continuation. What is in the file already is not trained again. Needs moe-engine[transformers].
"""

import argparse
import copy
import json
from pathlib import Path
from time import perf_counter

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_engine import Engine, Growth, upcycle

EXPERTS, TOP_K, LAYERS, GROWN = 4, 2, "every 6", 6
LEARNING_RATE, WARM_UP, HELD_OUT, EVERY = 1e-4, 20, 16, 100  # HELD_OUT: windows; EVERY: steps between two evaluations
PROMPT = "ANTIPHOLUS OF SYRACUSE:\n"


def loaded(folder):
    """(model in fp32, tokenizer)."""
    gguf = next(folder.glob("*.gguf"), None)
    named = {} if gguf is None else {"gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **named)
    return model, AutoTokenizer.from_pretrained(folder, **named)


def windows(ids, count, length, generator):
    """[count, length]: random places in a text."""
    start = torch.randint(len(ids) - length, (count,), generator=generator)
    return torch.stack([ids[at : at + length] for at in start.tolist()])


@torch.no_grad()
def held_out_loss(model, held):
    """The mean loss per token of windows [n, S]."""
    model.eval()
    losses = [float(model(input_ids=x, labels=x).loss) for x in held.split(4)]
    model.train()
    return sum(losses) / len(losses)


def train(model, engine, ids, held, options, seed):
    """The held-out loss by step; engine: None for the dense model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP))
    generator, curve = torch.Generator().manual_seed(seed), {0: held_out_loss(model, held)}
    model.train()
    for step in range(1, options.steps + 1):
        x = windows(ids, options.batch, options.length, generator)
        optimizer.zero_grad()
        loss = model(input_ids=x, labels=x).loss
        (loss if engine is None else loss + engine.aux_loss()).backward()
        if engine is not None:
            engine.after_backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warm.step()
        if engine is not None:
            engine.after_step()
        if step % EVERY == 0 or step == options.steps:
            curve[step] = held_out_loss(model, held)
    optimizer.zero_grad()
    return curve, optimizer


def least_loads(model, engine, held):
    """By layer, the load of its least used expert on held-out text, relative to an equal share."""
    engine.metrics("eval")  # from here on
    held_out_loss(model, held)
    return {name: float(one["load"].min() * len(one["load"])) for name, one in engine.metrics("eval").items()}


def grown(model, engine, optimizer, held):
    """The held-out loss after each layer got two more experts, children of the two most used ones."""
    engine.metrics("eval")
    held_out_loss(model, held)
    loads = {name: one["load"] for name, one in engine.metrics("eval").items()}
    for layer in engine.layers:
        parents = tuple(loads[layer.name].topk(GROWN - EXPERTS).indices.tolist())
        engine.grow(Growth(layer.name, parents, why="most used"), optimizer)
    return held_out_loss(model, held)


def continuation(model, tokenizer):
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    model.eval()
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


def run(dense, tokenizer, way, seed, options):
    """One model of one seed, as a line of the file."""
    begun, model = perf_counter(), copy.deepcopy(dense)
    ids = torch.tensor(tokenizer(options.text.read_text("utf-8"), verbose=False)["input_ids"])
    cut = len(ids) * 9 // 10
    held = windows(ids[cut:], HELD_OUT, options.length, torch.Generator().manual_seed(999))
    torch.manual_seed(seed)
    found, engine = {"way": way, "seed": seed}, None
    if way == "mixture":
        engine = Engine("saturation,switch_aux,split", seed=seed)
        found["dense_loss"] = held_out_loss(model, held)
        done = upcycle(engine, model, experts=EXPERTS, top_k=TOP_K, layers=LAYERS)
        found |= {"layers": done.layers, "change": done.change}
    curve, optimizer = train(model, engine, ids[:cut], held, options, seed)
    found["loss"] = curve
    if engine is not None:
        found["least_load"] = least_loads(model, engine, held)
    found["text"] = continuation(model, tokenizer)
    if engine is not None:
        found["grown_loss"] = grown(model, engine, optimizer, held)
        found["experts"] = [layer.spec.experts for layer in engine.layers]
    found |= {"steps": options.steps, "tokens": options.batch * options.length}
    return {**found, "seconds": round(perf_counter() - begun)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the dense model")
    parser.add_argument("text", type=Path, help="a text file")
    parser.add_argument("--out", type=Path, default=Path("upcycled.jsonl"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=64, help="tokens of a window")
    options = parser.parse_args()
    lines = options.out.read_text("utf-8").splitlines() if options.out.exists() else []
    done = {(one["way"], one["seed"]) for one in map(json.loads, lines)}
    dense, tokenizer = loaded(options.folder)
    for seed in map(int, options.seeds.split(",")):
        for way in ("dense", "mixture"):
            if (way, seed) not in done:
                found = json.dumps(run(dense, tokenizer, way, seed, options))
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(found + "\n")
                print(found, flush=True)


if __name__ == "__main__":
    main()

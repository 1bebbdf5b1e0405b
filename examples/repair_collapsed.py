"""Repair the mixture of a transformers model that its own loss left with dead experts.

    python examples/repair_collapsed.py TEXT --out repaired.json --seeds 0,1,2,3,4

Trains a small character-level Mixtral (4 layers, 8 experts, 2 per token) with transformers' own auxiliary loss, adopts
it, and trains on with each of several plugins, or with none; needs moe-engine[transformers]. After each phase: the
validation loss, and the number of dead experts by `health`, over the same held-out text. A seed that is in the file
already is not trained again.
"""

import argparse
import copy
import json
from pathlib import Path

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from moe_engine import Engine, adopt

LENGTH, BATCH, STEPS, LEARNING_RATE = 64, 16, 500, 1e-3
WAYS = {"its own loss": None, "no loss": "", "saturation": "saturation", "loss_free": "loss_free"}
WAYS |= {"switch_aux": "switch_aux"}


def batches(ids, seed, count):
    """`count` batches [B, S] of random places in a text."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        start = torch.randint(len(ids) - LENGTH, (BATCH,), generator=generator)
        yield torch.stack([ids[at : at + LENGTH] for at in start.tolist()])


def new_model(vocab, seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 4, "num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 64}
    return MixtralForCausalLM(MixtralConfig(vocab_size=vocab, output_router_logits=True, **sizes))


def train(model, engine, ids, seed):
    """STEPS steps; engine: None trains with whatever loss the model has itself."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    model.train()
    for x in batches(ids, seed, STEPS):
        optimizer.zero_grad()
        loss = model(x, labels=x).loss
        if engine is not None:
            (loss + engine.aux_loss()).backward()
            engine.after_backward()
        else:
            loss.backward()
        optimizer.step()
        if engine is not None:
            engine.after_step()


@torch.no_grad()
def measured(model, engine, ids):
    """The validation loss and the dead experts of each layer of an adopted model; an expert with less than a tenth of
    its share is dead."""
    model.eval()
    engine.metrics("eval")  # from here on
    losses = [float(model(x, labels=x).loss) for x in batches(ids, 999, 40)]
    dead = [int((metrics["load"] * 8 < 0.1).sum()) for metrics in engine.metrics("eval").values()]
    return {"loss": sum(losses) / len(losses), "dead": dead}


def adopted(model, plugins=""):
    """(a copy of a model that an engine decides in, the engine)."""
    engine = Engine(plugins)
    return adopt(engine, copy.deepcopy(model)), engine


def run(seed, ids, held_out, vocab):
    model = new_model(vocab, seed)
    train(model, None, ids, seed)
    found = {"before": measured(*adopted(model), held_out)}
    for way, plugins in WAYS.items():
        if plugins is None:
            tried = copy.deepcopy(model)
            train(tried, None, ids, seed + 1000)
            found[way] = measured(*adopted(tried), held_out)
        else:
            tried, engine = adopted(model, plugins)
            train(tried, engine, ids, seed + 1000)
            found[way] = measured(tried, engine, held_out)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, help="a text file")
    parser.add_argument("--out", type=Path, default=Path("repaired.json"))
    parser.add_argument("--seeds", default="0,1,2,3,4")
    options = parser.parse_args()
    text = options.text.read_text("utf-8")
    letters = sorted(set(text))
    ids = torch.tensor([letters.index(letter) for letter in text])
    cut = len(ids) * 9 // 10
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    for seed in options.seeds.split(","):
        if seed not in found:
            found[seed] = run(int(seed), ids[:cut], ids[cut:], len(letters))
            options.out.write_text(json.dumps(found, indent=1) + "\n")
            print(seed, found[seed], flush=True)


if __name__ == "__main__":
    main()

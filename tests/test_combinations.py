"""Published and other sensible mixes of plugins train: twenty steps each on a toy layer."""

import pytest
import safetensors.torch
import torch

from moe_engine import Engine, UsageError, adam

# refused mixes, by plugin
BALANCING = ("switch_aux", "gshard", "importance_cv2", "sequence_aux", "global_aux", "gate_variance", "loss_free")
REFUSED = {
    **{router: (*BALANCING, "load_cv2", "saturation") for router in ("expert_choice", "sinkhorn")},
    "hash": (*BALANCING, "load_cv2", "saturation", "z_loss", "entropy", "mutual_information", "confidence"),
    "soft": (*BALANCING, "z_loss", "output_similarity", "churn", "router_saturation", "co_activation"),
    "relu": ("switch_aux", "z_loss", "loss_free", "quantile", "load_cv2"),
    "threshold": ("sequence_aux", "quantile"),
    "top_p": ("sequence_aux", "quantile"),
    "topk": ("load_cv2",),
    "quantile": ("switch_aux", "global_aux", "loss_free"),
}
REMARKED = {  # plugin that remarks -> (the other one, settings)
    "loss_free": ("switch_aux", []),
    "mutual_information": ("entropy", []),
    "importance_cv2": ("gate_variance", ["importance_cv2.of=probs"]),
    "router_diversity": ("clone", []),
}

GROW = ["schedule.every=8"]
COMBINATIONS = {  # name -> (plugins, settings, spec); DENSE: the file of a dense network
    "Switch, ST-MoE": (
        "topk,switch_aux,z_loss",
        ["switch_aux.weight=0.01", "z_loss.weight=0.001"],
        {"top_k": 1, "capacity": 1.25},
    ),
    "GShard": ("topk,gshard", ["topk.renorm=true", "gshard.weight=0.01"], {"capacity": 2.0}),
    "Mixtral": ("topk,switch_aux", ["topk.renorm=true", "switch_aux.weight=0.01"], {}),
    "OLMoE": (
        "topk,switch_aux,z_loss",
        ["topk.renorm=false", "switch_aux.weight=0.01", "z_loss.weight=0.001"],
        {"experts": 16, "top_k": 8},
    ),
    "DeepSeek-V3": (
        "sigmoid_topk,loss_free,sequence_aux",
        ["sigmoid_topk.groups=4", "sigmoid_topk.groups_kept=2", "loss_free.rate=0.001", "sequence_aux.weight=0.0001"],
        {"top_k": 4, "shared": 1},
    ),
    "quantile balancing": ("topk,quantile", [], {}),
    "Qwen": ("topk,global_aux", [], {}),
    "Shazeer": ("noisy_topk,importance_cv2,load_cv2", [], {"top_k": 4}),
    "Shazeer, two levels": ("hierarchical,importance_cv2", ["hierarchical.groups_kept=2"], {"top_k": 4}),
    "ReMoE": ("relu,dead_replace", [], {}),
    "Harder Tasks": ("top_p,switch_aux,entropy", ["entropy.form=token_min"], {}),
    "DynMoE": ("threshold,router_diversity,novelty", [], {}),
    "ModuleFormer": ("topk,mutual_information", [], {}),
    "hash layer": ("hash", [], {"vocab": 16}),
    "expert choice": ("expert_choice", [], {}),
    "soft MoE": ("soft", [], {}),
    "relu grows by halves": ("relu,split,schedule", GROW, {}),
    "along the data's first direction": ("topk,pca_split,schedule", GROW, {}),
    "by pairs of opposite noise": ("topk,split,schedule", GROW, {}),
    "expert upcycling": ("topk,loss_free,clone,schedule", [*GROW, "loss_free.rate=0.03"], {}),
    "sparse upcycling": ("topk,upcycle", ["topk.renorm=true", "upcycle.file=DENSE"], {}),
}


def batch(seed):
    """Tokens [16, 4, 8] with ids, and targets: one of four linear maps of each token, by quadrant."""
    x = torch.randn(16, 4, 8, generator=torch.Generator().manual_seed(seed))
    maps = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(99)) / 8**0.5
    which = (x[..., 0] > 0).long() + 2 * (x[..., 1] > 0).long()
    ids = which + 4 * (x[..., 2] > 0).long() + 8 * (x[..., 3] > 0).long()
    return x, ids, torch.einsum("bsd,bsde->bse", x, maps[which])


def task_loss(layer, seed):
    x, ids, target = batch(seed)
    return (layer(x, ids=ids) - target).square().mean()


def held_out(layer):
    layer.eval()
    with torch.no_grad():
        loss = task_loss(layer, 1000)
    layer.train()
    return loss


@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_combination_trains(name, tmp_path):
    plugins, settings, spec = COMBINATIONS[name]
    dense = {"w_in": torch.randn(16, 8) / 8**0.5, "w_out": torch.randn(8, 16) / 4}
    safetensors.torch.save_file(dense, tmp_path / "dense")
    settings = [setting.replace("DENSE", str(tmp_path / "dense")) for setting in settings]
    engine = Engine(plugins, settings, **{"experts": 8, "top_k": 2, **spec})
    layer = engine.moe(8, 16, name="moe")
    optimizer = adam(layer, lr=0.01)
    before = float(held_out(layer))
    engine.metrics("eval")
    for step in range(20):
        loss = task_loss(layer, step)
        (loss + engine.aux_loss()).backward()
        engine.after_backward()
        optimizer.step()
        engine.after_step()
        optimizer.zero_grad()
        for growth in engine.due(loss.detach()):
            engine.grow(growth, optimizer, probe=lambda: task_loss(layer.eval(), 1000))
            layer.train()
    assert float(held_out(layer)) < 0.95 * before
    assert all(value.isfinite().all() for value in layer.state_dict().values())
    assert all(value.isfinite() for value in engine.last_terms().values())
    if "schedule" in plugins:
        assert layer.spec.experts == 10
    measured = engine.metrics("eval")["moe"]
    assert sum(measured.get("load", measured.get("mass")).tolist()) == pytest.approx(1)


@pytest.mark.parametrize("name", REFUSED)
def test_a_mix_that_makes_no_sense_is_refused_by_both_names(name):
    for other in REFUSED[name]:
        with pytest.raises(UsageError, match=f"(?s)(?=.*{name})(?=.*{other})"):
            Engine([name, other], experts=8, vocab=16).moe(8, 16)


@pytest.mark.parametrize("name", REMARKED)
def test_a_mix_that_counts_twice_or_pulls_two_ways_is_remarked_on_by_both_names(name):
    other, settings = REMARKED[name]
    engine = Engine([name, other], settings, experts=8)
    engine.moe(8, 16)
    assert name in engine.plugins.remarks[name].why
    assert other in engine.plugins.remarks[name].why
    quiet = Engine([name], experts=8)
    quiet.moe(8, 16)
    assert quiet.plugins.remarks == {}

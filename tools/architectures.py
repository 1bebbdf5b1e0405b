"""Try every architecture of transformers with experts on a tiny random model, and write docs/architectures.md.

python tools/architectures.py          the page as measured, on stdout
python tools/architectures.py --write  into docs/architectures.md
"""

import os
import sys
import tempfile
import textwrap
import warnings
from pathlib import Path

import attrs
import torch
import transformers

from moe_engine import Engine, watch
from moe_engine.pretrained.families import blocks_of
from moe_engine.registry.discovery import find
from moe_engine.testing import checks, results, tiny_model
from moe_engine.testing.tiny_models import EXPERTS

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"

# the classes, by what their names begin with; the rest is "ForCausalLM" unless it is written out
CAUSAL = """Afmoe AXK1 AXK2 BailingHybrid Beam Cohere2Moe Dbrx DeepseekV2 DeepseekV3 DeepseekV32 DeepseekV4 Dots1
Dots3Note Ernie4_5_Moe ExaoneMoe FlexOlmo Flint Gemma4 Glm4Moe Glm4MoeLite GlmMoeDsa GptOss GraniteMoe GraniteMoeSWA
GraniteMoeHybrid GraniteMoeShared HunYuanMoEV1 HYV3 HYV4 Inkling Inkling2 Inkling2Loop Jamba JetMoe KimiLinear Kolibri1
Laguna LaraMini Lfm2Moe Llama4 LongcatFlash Mellum MiMoV2Flash MiniMax MiniMaxM2 MiniMaxM3VL Mistral4 Mixtral NemotronH
Olmoe Phimoe Qwen2Moe Qwen3Moe Qwen3_5Moe Qwen3Next Qwen4Exp SolarOpen Zaya"""
OTHERS = """AriaTextForCausalLM DeepseekOcr2TextModel DiffusionGemmaEncoderTextModel Ernie4_5_VLMoeTextModel
Glm4vMoeTextModel Glm5NextTextModel HYV4VLTextModel MistralLarge4TextModel MuseSparkTextModel
NllbMoeForConditionalGeneration OpenAIPrivacyFilterModel Qwen3OmniMoeThinkerTextModel Qwen3VLMoeTextModel
Step3p7TextModel SwitchTransformersForConditionalGeneration UnlimitedOcrTextModel VitPoseBackbone"""
ARCHITECTURES = sorted([*(f"{name}ForCausalLM" for name in CAUSAL.split()), *OTHERS.split()], key=str.lower)
SETTINGS = {"DbrxForCausalLM": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0}}


@attrs.frozen
class Row:
    """What was found: model type, family, layers that were read, and why not all of it is "yes"."""

    kind: str
    family: str
    read: str
    changed: str
    why: str = ""


def tried(name: str) -> Row:
    """One architecture, by the name of its class."""
    try:
        model = tiny_model(name, **SETTINGS.get(name, {}))
    except Exception as error:
        return Row(name, "", "not tried", "", f"no tiny model: {shortened(error)}")
    kind = model.config.model_type
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}
    try:
        with torch.no_grad():
            model(**given)
    except Exception as error:
        return Row(kind, "", "not tried", "", f"its tiny model does not run: {shortened(error)}")
    try:
        family = blocks_of(model)[0].family.name
        read = read_alike(model, given)
    except Exception as error:
        return Row(kind, "", "no", "", shortened(error))
    return Row(kind, family, read, changed(family, kind))


@torch.no_grad()
def read_alike(model, given) -> str:
    """Watch a forward, and compare with what transformers itself records."""
    own_choices: dict[str, torch.Tensor] = {}

    def remember(block):
        def hook(module, args, kwargs):
            whole = [one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)]
            chosen = [one for one in whole if one.dim() == 2 and not one.is_floating_point()]
            if len(chosen) == 1 and chosen[0].shape[1] < EXPERTS:  # not a mask of all experts
                own_choices[block.name] = chosen[0].flatten().sort().values

        return block.experts.register_forward_pre_hook(hook, with_kwargs=True)

    handles = [remember(block) for block in blocks_of(model)]
    with watch(Engine(), model, record=True) as watcher:
        answer = model(
            **given, **({"output_router_logits": True} if hasattr(model.config, "output_router_logits") else {})
        )
    for handle in handles:
        handle.remove()
    recorded = [one.reshape(-1, one.shape[-1]).float() for one in found_logits(answer)]
    layers = watcher.trace.layers
    assert layers and len(layers) == len(blocks_of(model)), "not every block was seen"
    for layer in layers:
        (forward,) = layer.forwards
        logits = forward.logits["expert"]
        assert not recorded or any(torch.equal(one, logits) for one in recorded if one.shape == logits.shape), (
            layer.name
        )
        own = own_choices.get(layer.name)
        same = own is None or len(own) != len(forward.expert) or torch.equal(own.long(), forward.expert.sort().values)
        assert same, layer.name
    return (
        "yes" if recorded and own_choices else "yes, choices" if own_choices else "yes, logits" if recorded else "yes"
    )


def found_logits(answer):
    for name in ("router_logits", "encoder_router_logits", "decoder_router_logits"):
        for one in getattr(answer, name, None) or ():
            yield from [one] if isinstance(one, torch.Tensor) else [part for part in one if torch.is_tensor(part)][:1]


def changed(family: str, kind: str) -> str:
    """Adopted, grown by one, exported and loaded again: by the claims of the kit."""
    name = kind.replace("-", "_")
    if name not in find() or family != name:
        return "reads only"
    found = {result.claim.name: result for result in results(checks(name))}
    failed = [claim for claim, result in found.items() if result.outcome == "FAILED"]
    if failed:
        return f"fails {failed}"
    if found["adopting_changes_no_logit"].outcome == "skipped":
        return "reads only"
    return "yes" if found["exported_model_loads_equal"].why is None else "yes, but not exported after growth"


def shortened(error: Exception) -> str:
    told = str(error).strip().splitlines()
    return (
        textwrap.shorten(f"{type(error).__name__}: {told[0]}", 100, placeholder=" …") if told else type(error).__name__
    )


def page(rows: list[Row], version: str = transformers.__version__) -> str:
    """The page, in Markdown."""
    runs = [row for row in rows if row.read != "not tried"]
    read = [row for row in runs if row.read.startswith("yes")]
    adopted = [row for row in rows if row.changed.startswith("yes")]
    lines = [
        "# Architectures",
        "",
        f"The {len(rows)} architectures of transformers {version} with experts, each tried on a tiny "
        "random model by `tools/architectures.py`. "
        f"Of the {len(runs)} whose tiny model runs, {len(read)} are read; {len(adopted)} are adopted, grown, exported.",
        "",
        "*Read*: `watch` finds every block; its logits are those that transformers itself records, its choices those "
        "that the experts are given, bit for bit (where only one of the two is told, that one is named). *Changed*: "
        "`adopt` changes no logit, copies included; grown by one expert, names and layout stay; what `export` wrote "
        "loads with equal logits (the kit's claims about families).",
        "",
        "| model type | family | read | changed |",
        "|---|---|---|---|",
        *(f"| `{row.kind}` | `{row.family}` | {row.read} | {row.changed} |" for row in rows if not row.why),
        "",
        "## Not read",
        "",
        "| class or model type | read | why |",
        "|---|---|---|",
        *(f"| `{row.kind}` | {row.read} | {row.why} |" for row in rows if row.why),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        rows = [tried(name) for name in sys.argv[1:] if not name.startswith("-")] or [
            tried(name) for name in ARCHITECTURES
        ]
    text = page(rows)
    if "--write" in sys.argv:
        PAGE.write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()

"""Tiny transformers models with random weights, and what attnlens must say of each. Skips without transformers."""

import warnings
from dataclasses import dataclass, field

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its imports warn about optional packages, by version
    transformers = pytest.importorskip(
        "transformers", reason="transformers is the oracle of these tests: pip install it"
    )
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

IMAGE = {"image_size": 8, "patch_size": 4}
SIZES = {"hidden_size": 33, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 17}
TEXT = {"vocab_size": 19, "max_position_embeddings": 23}
VISION_TOWER = {"hidden_size": 22, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 17}
GROUPED = {
    "hidden_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 17,
    "vocab_size": 19,
    "max_position_embeddings": 23,
}
TOWERS = {"text_config": {**SIZES, **TEXT, "projection_size": 22}, "vision_config": {**VISION_TOWER, **IMAGE}}
WITHOUT_HEAD_DIM = {**{name: size for name, size in GROUPED.items() if name != "head_dim"}, "hidden_size": 24}


@dataclass(frozen=True)
class Case:
    """A tiny model: its class and configuration in transformers, and the flags attnlens must raise."""

    model: str
    config: str
    sizes: dict
    flags: set = field(default_factory=set)
    map_is_product: bool = True
    """Whether the attention map is softmax(scale * q k^T) of the heads read: no relative terms, q/k norms, softcap."""


VIT = {**SIZES, **IMAGE}
DINO = {**VIT, "mlp_ratio": 2}
RELATIVE = {"use_relative_position_bias": True}
ROPE = {"rope", "causal"}
CASES = {
    "vit": Case("ViTModel", "ViTConfig", VIT, {"qk_bias"}),
    "vit with a prefix": Case("ViTForImageClassification", "ViTConfig", VIT, {"qk_bias"}),
    "vit without biases": Case("ViTModel", "ViTConfig", {**VIT, "qkv_bias": False}),
    "deit": Case("DeiTModel", "DeiTConfig", VIT, {"qk_bias"}),
    "vit_mae": Case("ViTMAEModel", "ViTMAEConfig", {**VIT, "mask_ratio": 0.0}, {"qk_bias"}),
    "vit_msn": Case("ViTMSNModel", "ViTMSNConfig", VIT, {"qk_bias"}),
    "ijepa": Case("IJepaModel", "IJepaConfig", VIT, {"qk_bias"}),
    "dinov2": Case("Dinov2Model", "Dinov2Config", DINO, {"qk_bias"}),
    "dinov2_with_registers": Case("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", DINO, {"qk_bias"}),
    "dinov3": Case("DINOv3ViTModel", "DINOv3ViTConfig", {**VIT, "hidden_size": 36}, {"rope", "qk_bias"}, False),
    "beit": Case("BeitModel", "BeitConfig", {**VIT, "vocab_size": 11}, {"qk_bias"}),
    "beit, relative": Case("BeitModel", "BeitConfig", {**VIT, **RELATIVE}, {"qk_bias", "rel_pos_bias"}, False),
    "data2vec": Case("Data2VecVisionModel", "Data2VecVisionConfig", VIT, {"qk_bias"}),
    "clip": Case("CLIPModel", "CLIPConfig", {**TOWERS, "projection_dim": 7}, {"qk_bias"}),
    "clip vision": Case("CLIPVisionModel", "CLIPVisionConfig", VIT, {"qk_bias"}),
    "clip text": Case("CLIPTextModelWithProjection", "CLIPTextConfig", {**SIZES, **TEXT}, {"qk_bias", "causal"}),
    "siglip": Case("SiglipModel", "SiglipConfig", TOWERS, {"qk_bias"}),
    "siglip vision": Case("SiglipVisionModel", "SiglipVisionConfig", VIT, {"qk_bias"}),
    "siglip text": Case("SiglipTextModel", "SiglipTextConfig", {**SIZES, **TEXT}, {"qk_bias"}),
    "siglip2": Case(
        "Siglip2Model",
        "Siglip2Config",
        {**TOWERS, "vision_config": {**VISION_TOWER, "num_patches": 4, "patch_size": 4}},
        {"qk_bias"},
    ),
    "siglip2 text": Case("Siglip2TextModel", "Siglip2TextConfig", {**SIZES, **TEXT}, {"qk_bias"}),
    "siglip2 vision": Case(
        "Siglip2VisionModel", "Siglip2VisionConfig", {**SIZES, "num_patches": 4, "patch_size": 4}, {"qk_bias"}
    ),
    "bert": Case("BertModel", "BertConfig", {**SIZES, **TEXT}, {"qk_bias", "post_norm"}),
    "bert with a prefix": Case("BertForMaskedLM", "BertConfig", {**SIZES, **TEXT}, {"qk_bias", "post_norm"}),
    "roberta": Case("RobertaModel", "RobertaConfig", {**SIZES, **TEXT}, {"qk_bias", "post_norm"}),
    "xlm-roberta": Case("XLMRobertaModel", "XLMRobertaConfig", {**SIZES, **TEXT}, {"qk_bias", "post_norm"}),
    "camembert": Case("CamembertModel", "CamembertConfig", {**SIZES, **TEXT}, {"qk_bias", "post_norm"}),
    "data2vec text": Case("Data2VecTextModel", "Data2VecTextConfig", {**SIZES, **TEXT}, {"qk_bias", "post_norm"}),
    "electra": Case("ElectraModel", "ElectraConfig", {**SIZES, **TEXT, "embedding_size": 33}, {"qk_bias", "post_norm"}),
    "electra, projected": Case(
        "ElectraModel", "ElectraConfig", {**SIZES, **TEXT, "embedding_size": 13}, {"qk_bias", "post_norm"}
    ),
    "distilbert": Case(
        "DistilBertModel",
        "DistilBertConfig",
        {"dim": 33, "n_layers": 3, "n_heads": 3, "hidden_dim": 17, **TEXT},
        {"qk_bias", "post_norm"},
    ),
    "mpnet": Case("MPNetModel", "MPNetConfig", {**SIZES, **TEXT}, {"qk_bias", "post_norm", "rel_pos_bias"}, False),
    "gpt2": Case(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 33, "n_layer": 3, "n_head": 3, "vocab_size": 19, "n_positions": 23, "n_inner": 17},
        {"qk_bias", "causal"},
    ),
    "gpt2, scaled by layer": Case(
        "GPT2Model",
        "GPT2Config",
        {"n_embd": 33, "n_layer": 3, "n_head": 3, "vocab_size": 19, "n_positions": 23}
        | {"scale_attn_by_inverse_layer_idx": True},
        {"qk_bias", "causal"},
    ),
    "llama": Case("LlamaForCausalLM", "LlamaConfig", GROUPED, ROPE),
    "llama with biases": Case("LlamaModel", "LlamaConfig", {**GROUPED, "attention_bias": True}, ROPE | {"qk_bias"}),
    "llama without head_dim": Case("LlamaModel", "LlamaConfig", {**GROUPED, "hidden_size": 24, "head_dim": None}, ROPE),
    "mistral": Case("MistralForCausalLM", "MistralConfig", GROUPED, ROPE),
    "mixtral": Case("MixtralModel", "MixtralConfig", {**GROUPED, "num_local_experts": 2}, ROPE),
    "qwen2": Case("Qwen2ForCausalLM", "Qwen2Config", WITHOUT_HEAD_DIM, ROPE | {"qk_bias"}),
    "qwen3": Case("Qwen3ForCausalLM", "Qwen3Config", GROUPED, ROPE | {"q_norm", "k_norm"}, False),
    "qwen3_moe": Case(
        "Qwen3MoeModel",
        "Qwen3MoeConfig",
        {**GROUPED, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 5},
        ROPE | {"q_norm", "k_norm"},
        False,
    ),
    "gemma": Case("GemmaForCausalLM", "GemmaConfig", {**GROUPED, "num_key_value_heads": 1}, ROPE),
    "gemma2": Case("Gemma2ForCausalLM", "Gemma2Config", GROUPED, ROPE | {"norm_after", "softcap"}, False),
    "gemma2 without softcap": Case(
        "Gemma2Model",
        "Gemma2Config",
        {**GROUPED, "attn_logit_softcapping": None, "query_pre_attn_scalar": 29},
        ROPE | {"norm_after"},
    ),
    "gemma3": Case("Gemma3ForCausalLM", "Gemma3TextConfig", GROUPED, ROPE | {"norm_after", "q_norm", "k_norm"}, False),
}


def build(case, seed=0):
    """Build a double-precision model whose every parameter is random, norms and biases included."""
    torch.manual_seed(seed)
    model = getattr(transformers, case.model)(
        getattr(transformers, case.config)(**case.sizes, attn_implementation="eager")
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    if hasattr(model.config, "num_experts_per_tok"):  # mixtures otherwise multiply in single precision
        model.set_experts_implementation("eager")
    return model.double().eval()

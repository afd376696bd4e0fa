"""Families beyond the first ones: every projection, norm and map against the model's own forward pass."""

import inspect

import numpy as np
import pytest
import torch

import attnlens
from attnlens.heads import expand_groups
from attnlens.layouts import read_heads
from attnlens.models.live import open_live
from attnlens.models.open import open_model
from attnlens.models.transformers import known_model_types
from tests.transformers_models import CASES, SIZES, TEXT, Case, build, transformers

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

SIDES = {
    "d_model": 33,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 17,
    "decoder_ffn_dim": 17,
    "vocab_size": 19,
    "max_position_embeddings": 23,
    "pad_token_id": 1,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
T5 = {"d_model": 33, "d_kv": 7, "num_heads": 3, "d_ff": 17, "num_layers": 2, "num_decoder_layers": 3, "vocab_size": 19}
WAVE = {**SIZES, "conv_dim": (5, 5), "conv_kernel": (3, 3), "conv_stride": (2, 2), "vocab_size": 19}
WAVE |= {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 3}
NEOX = {**SIZES, **TEXT, "hidden_size": 36}
GPT = {"n_embd": 36, "n_head": 3, "n_layer": 3, "vocab_size": 19, "n_positions": 23, "rotary_dim": 4}
FALCON = {**SIZES, **TEXT, "hidden_size": 48, "num_attention_heads": 6}
FALCON_GROUPED = {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}
JEPA = {**SIZES, "hidden_size": 36, "crop_size": 8, "patch_size": 4, "frames_per_clip": 2, "tubelet_size": 2}
JEPA |= {"pred_hidden_size": 24, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 2, "pred_num_mask_tokens": 2}
SPEECH = {**SIDES, "num_mel_bins": 5, "max_source_positions": 9, "max_target_positions": 23}
WHISPER = {"d_model": 36} | {
    name: size for name, size in SPEECH.items() if name not in ("d_model", "max_position_embeddings")
}
UNISPEECH = {**WAVE, "num_codevectors_per_group": 4, "codevector_dim": 6, "proj_codevector_dim": 6}
SPEECH_TO_TEXT = {**SPEECH, "d_model": 36, "input_feat_per_channel": 5, "conv_channels": 6, "conv_kernel_sizes": (3, 3)}
GROUPED_MOE = {**SIZES, **TEXT, "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
CROSS = {"causal", "cross", "qk_bias"}

FAMILIES = {
    "t5": Case("T5Model", "T5Config", T5, {"causal", "cross", "rel_pos_bias"}, False),
    "t5 encoder": Case("T5EncoderModel", "T5Config", T5, {"rel_pos_bias"}, False),
    "mt5, gated": Case(
        "MT5ForConditionalGeneration",
        "MT5Config",
        {**T5, "feed_forward_proj": "gated-gelu"},
        {"causal", "cross", "rel_pos_bias"},
        False,
    ),
    "whisper": Case("WhisperModel", "WhisperConfig", WHISPER, CROSS),
    "bart": Case("BartModel", "BartConfig", SIDES, CROSS | {"post_norm"}),
    "bart with a head": Case("BartForConditionalGeneration", "BartConfig", SIDES, CROSS | {"post_norm"}),
    "plbart": Case("PLBartModel", "PLBartConfig", SIDES, CROSS | {"post_norm"}),
    "marian": Case("MarianModel", "MarianConfig", SIDES, CROSS | {"post_norm"}),
    "mbart": Case("MBartModel", "MBartConfig", SIDES, CROSS),
    "pegasus": Case("PegasusModel", "PegasusConfig", SIDES, CROSS),
    "m2m_100": Case("M2M100Model", "M2M100Config", SIDES, CROSS),
    "blenderbot": Case("BlenderbotModel", "BlenderbotConfig", SIDES, CROSS),
    "wav2vec2": Case("Wav2Vec2Model", "Wav2Vec2Config", WAVE, {"qk_bias", "post_norm"}),
    "wav2vec2, stable": Case("Wav2Vec2ForCTC", "Wav2Vec2Config", {**WAVE, "do_stable_layer_norm": True}, {"qk_bias"}),
    "unispeech": Case("UniSpeechModel", "UniSpeechConfig", UNISPEECH, {"qk_bias", "post_norm"}),
    "unispeech-sat, stable": Case(
        "UniSpeechSatModel", "UniSpeechSatConfig", {**UNISPEECH, "do_stable_layer_norm": True}, {"qk_bias"}
    ),
    "speech_to_text": Case("Speech2TextModel", "Speech2TextConfig", SPEECH_TO_TEXT, CROSS),
    "hubert": Case("HubertModel", "HubertConfig", WAVE, {"qk_bias", "post_norm"}),
    "gpt_neox": Case("GPTNeoXForCausalLM", "GPTNeoXConfig", NEOX, {"rope", "causal", "parallel_mlp", "qk_bias"}),
    "gpt_neox, in sequence": Case(
        "GPTNeoXModel",
        "GPTNeoXConfig",
        {**NEOX, "use_parallel_residual": False, "attention_bias": False},
        {"rope", "causal"},
    ),
    "gptj": Case("GPTJModel", "GPTJConfig", GPT, {"rope", "causal", "parallel_mlp"}),
    "codegen": Case(
        "CodeGenModel",
        "CodeGenConfig",
        {**GPT, "n_embd": 48, "n_head": 8, "n_layer": 2},
        {"rope", "causal", "parallel_mlp"},
    ),
    "gpt_bigcode, one key head": Case(
        "GPTBigCodeForCausalLM", "GPTBigCodeConfig", {**GPT, "n_layer": 2}, {"causal", "qk_bias"}
    ),
    "gpt_bigcode, a key head each, unscaled": Case(
        "GPTBigCodeModel",
        "GPTBigCodeConfig",
        {**GPT, "n_layer": 2, "multi_query": False, "scale_attn_weights": False},
        {"causal", "qk_bias"},
    ),
    "gpt_neo": Case(
        "GPTNeoModel",
        "GPTNeoConfig",
        {"hidden_size": 33, "num_heads": 3, "num_layers": 2, "attention_types": [[["global", "local"], 1]], **TEXT},
        {"causal"},
    ),
    "bloom": Case(
        "BloomModel",
        "BloomConfig",
        {"hidden_size": 33, "n_head": 3, "n_layer": 3, "vocab_size": 19},
        {"causal", "rel_pos_bias", "qk_bias"},
        False,
    ),
    "falcon, one key head": Case(
        "FalconForCausalLM", "FalconConfig", {**FALCON, "bias": True}, {"rope", "causal", "parallel_mlp", "qk_bias"}
    ),
    "falcon, a key head each": Case(
        "FalconModel",
        "FalconConfig",
        {**FALCON, "multi_query": False, "alibi": True, "parallel_attn": False},
        {"causal", "rel_pos_bias"},
        False,
    ),
    "falcon, grouped": Case("FalconModel", "FalconConfig", FALCON_GROUPED, {"rope", "causal", "parallel_mlp"}),
    "falcon, grouped, one norm": Case(
        "FalconModel",
        "FalconConfig",
        {**FALCON_GROUPED, "num_ln_in_parallel_attn": 1},
        {"rope", "causal", "parallel_mlp"},
    ),
    "phi": Case("PhiForCausalLM", "PhiConfig", NEOX, {"rope", "causal", "parallel_mlp", "qk_bias"}),
    "phi, q and k normed": Case(
        "PhiModel",
        "PhiConfig",
        {**NEOX, "qk_layernorm": True},
        {"rope", "causal", "parallel_mlp", "qk_bias", "q_norm", "k_norm"},
        False,
    ),
    "phi3, grouped": Case(
        "Phi3Model",
        "Phi3Config",
        {**SIZES, **TEXT, "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0},
        {"rope", "causal"},
    ),
    "modernbert": Case("ModernBertModel", "ModernBertConfig", {**NEOX, "pad_token_id": 0}, {"rope"}),
    "qwen2_moe": Case(
        "Qwen2MoeModel",
        "Qwen2MoeConfig",
        {**GROUPED_MOE, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 5}
        | {"shared_expert_intermediate_size": 5},
        {"rope", "causal", "qk_bias"},
    ),
    "starcoder2": Case("Starcoder2Model", "Starcoder2Config", GROUPED_MOE, {"rope", "causal", "qk_bias"}),
    "audio spectrogram": Case(
        "ASTModel",
        "ASTConfig",
        {**SIZES, "patch_size": 4, "num_mel_bins": 8, "max_length": 8, "frequency_stride": 4, "time_stride": 4},
        {"qk_bias"},
    ),
    "opt": Case("OPTModel", "OPTConfig", {**SIZES, **TEXT, "ffn_dim": 17}, {"causal", "qk_bias"}),
    "opt, post-norm": Case(
        "OPTModel",
        "OPTConfig",
        {**SIZES, **TEXT, "ffn_dim": 17, "do_layer_norm_before": False},
        {"causal", "qk_bias", "post_norm"},
    ),
    "vjepa2": Case("VJEPA2Model", "VJEPA2Config", JEPA, {"rope", "qk_bias"}, False),
}


def inputs(model):
    """Make the inputs a model asks for by name."""
    torch.manual_seed(1)
    wanted, found = inspect.signature(model.forward).parameters, {}
    numbers = torch.randint(3, 19, (2, 7))
    makers = {
        "input_ids": lambda: numbers,
        "decoder_input_ids": lambda: torch.randint(3, 19, (2, 5)),
        "input_features": lambda: torch.randn(
            *((2, 18, 5) if "Speech2Text" in type(model).__name__ else (2, 5, 18)), dtype=torch.float64
        ),
        "input_values": lambda: torch.randn(*((2, 8, 8) if "AST" in type(model).__name__ else (2, 50))).double(),
        "pixel_values_videos": lambda: torch.randn(2, 2, 3, 8, 8, dtype=torch.float64),
        "position_ids": lambda: torch.zeros(2, 7, dtype=torch.long),  # no rotation: the map is that of the product
    }
    for name, make in makers.items():
        if name in wanted and (
            name != "position_ids" or hasattr(model.config, "rope_parameters") or "rotary_dim" in dir(model.config)
        ):
            found[name] = make()
    return found


class Seen:
    """What each linear layer read and gave, by the tensor's name, each norm's output, and each attention's map."""

    def __init__(self, model):
        self.linear, self.norms, self.maps, handles = {}, [], {}, []
        for name, module in model.named_modules():
            if "Norm" in type(module).__name__ and not list(module.children()):
                handles.append(module.register_forward_hook(lambda m, _args, output: self.norms.append((m, output))))
            elif getattr(getattr(module, "weight", None), "ndim", 0) == 2:
                handles.append(module.register_forward_hook(self.keep(name, module)))
            if "Attention" in type(module).__name__:
                handles.append(module.register_forward_hook(self.keep_map(name)))
        with torch.no_grad():
            model(**inputs(model), output_attentions=True)
        for handle in handles:
            handle.remove()

    def keep(self, name, module):
        def hook(_module, args, output):
            self.linear.setdefault(id(module.weight), (args[0], output, name))

        return hook

    def keep_map(self, name):
        def hook(_module, _args, output):
            maps = (
                [
                    x
                    for x in output
                    if getattr(x, "ndim", 0) == 4 and torch.allclose(x.sum(-1), torch.ones(1, dtype=x.dtype))
                ]
                if isinstance(output, tuple)
                else []
            )
            if maps:
                self.maps.setdefault(name, maps[0])

        return hook

    def map_of(self, name):
        """Return the map of the innermost attention module that a projection stands in."""
        inside = [path for path in self.maps if name.startswith(f"{path}.")]
        return self.maps[max(inside, key=len)].numpy()


def close(actual, expected, tolerance=1e-9):
    np.testing.assert_allclose(actual, np.asarray(expected), rtol=tolerance, atol=tolerance)


def softmax(scores):
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    return scores / scores.sum(-1, keepdims=True)


def check(spec, heads, weights, seen, map_is_product):
    """Hold one layer against what went through its projections."""
    passed = {role: seen.linear[id(weights._sources[slot.tensor])] for role, slot in spec.slots().items()}
    x = {role: value[0].numpy().reshape(2, -1, value[0].shape[-1]) for role, value in passed.items()}
    attention = seen.map_of(passed["o"][2])
    one = {
        role: np.einsum("bti,hik->bhtk", x[role], weight) + (0.0 if bias is None else bias[:, None])
        for role, weight, bias in (
            ("q", heads.W_Q, heads.b_Q),
            ("k", heads.W_K, heads.b_K),
            ("v", heads.W_V, heads.b_V),
        )
    }
    for role, slot in spec.slots().items():
        if role != "o" and spec.q.tensor != spec.k.tensor:
            given = passed[role][1].numpy().reshape(2, -1, slot.heads, slot.width).swapaxes(1, 2)
            close(one[role], given)
    k, v = (np.stack([expand_groups(part, heads.num_heads) for part in one[role]]) for role in "kv")
    if map_is_product:
        scores = heads.scale * np.einsum("bhsk,bhtk->bhst", one["q"], k)
        if "causal" in heads.leaves_out:
            scores = np.where(np.tri(scores.shape[-1], dtype=bool), scores, -np.inf)
        close(attention, softmax(scores), 1e-5)
    mixed = np.einsum("bhst,bhtk->bshk", attention, v)
    close(x["o"], mixed.reshape(*mixed.shape[:2], -1), 1e-5)
    out = np.einsum("bshk,hko->bso", x["o"].reshape(mixed.shape), heads.W_O) + (0.0 if heads.b_O is None else heads.b_O)
    close(passed["o"][1].numpy().reshape(out.shape), out)
    for role in "qkv":
        check_norm(heads.input_norm(role), passed[role][0], seen.norms)


def check_norm(norm, x, norms):
    """The gain is that of the norm whose output is the input: x = g * n + b with n normalised."""
    source = [
        module for module, output in norms if output.numel() == x.numel() and torch.equal(output.reshape(x.shape), x)
    ]
    if not source:
        assert norm.gain is None
        return
    bias = getattr(source[-1], "bias", None)
    n = (x if bias is None else x - bias.detach()).numpy() / norm.gain
    if norm.centres:
        close(n.mean(-1), np.zeros(n.shape[:-1]))
    close((n**2).mean(-1), np.ones(n.shape[:-1]), 1e-3)  # the norm's eps, and RMSNorms in float32


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_is_what_the_forward_pass_applies_live_and_saved(name, tmp_path):
    case = FAMILIES[name]
    model = build(case)
    seen, (architecture, weights) = Seen(model), open_live(model)
    assert architecture.refused == ()
    flags = set()
    for layer, spec in architecture.indexed():
        heads = read_heads(spec, weights, layer)
        check(spec, heads, weights, seen, case.map_is_product)
        flags |= set(spec.leaves_out)
    assert flags == case.flags
    model.save_pretrained(tmp_path)
    saved = open_model(tmp_path, None)
    assert [spec.path for spec in saved.architecture.specs] == [spec.path for spec in architecture.specs]
    for spec, other in zip(saved.architecture.specs, architecture.specs, strict=True):
        found, expected = read_heads(spec, saved.checkpoint).arrays(), read_heads(other, weights).arrays()
        assert found.keys() == expected.keys()
        for key, array in expected.items():
            np.testing.assert_array_equal(found[key], array, err_msg=key)


def test_every_model_type_that_is_read_has_an_oracle():
    tested = {getattr(transformers, case.config).model_type for case in (*CASES.values(), *FAMILIES.values())}
    own_tests = {"wavlm"}
    assert known_model_types() == tested | own_tests


def test_cross_attention_reads_the_encoders_last_norm_and_the_sides_are_told_apart(tmp_path):
    model = build(FAMILIES["t5"])
    model.save_pretrained(tmp_path)
    architecture = open_model(tmp_path, None).architecture
    paths = [spec.path for spec in architecture.specs]
    assert paths[:2] == [f"encoder.block.{layer}.layer.0.SelfAttention" for layer in range(2)]
    assert paths[2:] == [
        f"decoder.block.{layer}.layer.{place}.{name}"
        for layer in range(3)
        for place, name in enumerate(("SelfAttention", "EncDecAttention"))
    ]
    for spec in architecture.specs:
        cross = "EncDec" in spec.path
        assert ("cross" in spec.leaves_out) == cross
        assert (spec.norm_of("k").weight == "encoder.final_layer_norm.weight") == cross
        assert spec.scale == 1.0


def test_wavlm_is_read_as_its_attention_applies_it():
    model = build(Case("WavLMModel", "WavLMConfig", WAVE))
    torch.nn.init.zeros_(model.encoder.layers[0].attention.rel_attn_embed.weight)  # the map is that of the product
    seen = []
    for layer in model.encoder.layers:
        layer.attention.register_forward_hook(
            lambda _module, args, kwargs, output: seen.append(
                ((*args, *kwargs.values())[0].numpy(), output[0].numpy())
            ),
            with_kwargs=True,
        )
    with torch.no_grad():
        model(**inputs(model))
    architecture, weights = open_live(model)
    assert {flag for spec in architecture.specs for flag in spec.leaves_out} == {"qk_bias", "post_norm", "rel_pos_bias"}
    for (layer, spec), (x, out) in zip(architecture.indexed(), seen, strict=True):
        heads = read_heads(spec, weights, layer)
        q, k, v = (
            np.einsum("bti,hik->bhtk", x, weight) + bias[:, None]
            for weight, bias in ((heads.W_Q, heads.b_Q), (heads.W_K, heads.b_K), (heads.W_V, heads.b_V))
        )
        attention = softmax(heads.scale * np.einsum("bhsk,bhtk->bhst", q, k))
        close(out, np.einsum("bhst,bhtk,hko->bso", attention, v, heads.W_O) + heads.b_O)
        before = model.encoder.layers[layer - 1].final_layer_norm if layer else model.encoder.layer_norm
        np.testing.assert_array_equal(heads.norm_gain, before.weight.detach())


def test_which_layer_stands_in_which_stack_is_said_and_cross_attention_composes_by_its_queries_alone():
    model = build(FAMILIES["bart"])
    assert attnlens.inspect(model).stacks() == {
        "encoder.layers.*.self_attn": [0, 1],
        "decoder.layers.*.self_attn": [2, 4, 6],
        "decoder.layers.*.encoder_attn": [3, 5, 7],
    }
    pairs = set(attnlens.compose(model).scores)
    assert {("q", 2, 3), ("k", 3, 4), ("v", 3, 6), ("q", 0, 1)} <= pairs
    assert not any(kind in "kv" and later in (3, 5, 7) for kind, _, later in pairs)
    assert not any(first < 2 <= later for _, first, later in pairs)

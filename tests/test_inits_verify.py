"""`verify-init`: what an initialiser made passes, each known mistake is caught by name, the exit code says so."""

import json
import math

import pytest
import timm
import torch
from safetensors import safe_open

from attnlens.checkpoints import open_checkpoint
from attnlens.errors import UsageError
from attnlens.fit.fit_params import fit_params
from attnlens.inits import init_, init_file, verify_init
from attnlens.inits.file import save_weights
from attnlens.models.open import EMBEDDED
from tests.test_inits_names import NAMES, SMALL, options, vit

WIDTH = {"embed_dim": 96, "num_heads": 3, "depth": 2}
RECIPE = ("transposed OV", "noise 1/d", "double square root", "sign", "cloned heads", "unscaled noise")


def drawn(size, alpha, beta, generator, mistake):
    noise = torch.randn(size, size, generator=generator, dtype=torch.float64)
    scale = {"noise 1/d": 1 / size, "unscaled noise": 1.0}.get(mistake, 1 / math.sqrt(size))
    return alpha * noise * scale + beta * torch.eye(size, dtype=torch.float64)


def by_hand(mistake=None, seed=0, **more):
    """Build a ViT and initialise it as public code does, with one of its mistakes: shares nothing with attnlens."""
    model, generator = vit(**{**WIDTH, **more}), torch.Generator().manual_seed(seed)
    for block in model.blocks:
        attn, d = block.attn, block.attn.qkv.in_features
        width = d // attn.num_heads
        query, key, head_draw = [], [], None
        for _ in range(attn.num_heads):
            if head_draw is None or mistake != "cloned heads":
                head_draw = drawn(d, 0.7, 0.7, generator, mistake)
            left, roots, right = factors(head_draw, mistake)
            query.append((left[:, :width] * roots[:width]).T)
            key.append((right[:, :width] * roots[:width]).T)
        beta = 0.4 if mistake == "sign" else -0.4
        left, roots, right = factors(drawn(d, 0.4, beta, generator, mistake), mistake)
        W_V, W_O = left * roots, (right * roots).T
        stored = (W_V, W_O) if mistake == "transposed OV" else (W_V.T, W_O.T)
        with torch.no_grad():
            attn.qkv.weight.copy_(torch.cat([*query, *key, stored[0]]))
            attn.proj.weight.copy_(stored[1])
    return model


def factors(A, mistake):
    U, S, Vh = torch.linalg.svd(A)
    return U, S**0.25 if mistake == "double square root" else S**0.5, Vh.T


def test_a_correct_implementation_passes_without_a_seed():
    for seed in range(4):
        report = verify_init(by_hand(seed=seed), init="mimetic")
        assert report.passed, [check.problem for check in report.checks if not check.passed]
        assert (report.whole, len(report.checks)) == (False, 10)  # with the biases of two layers


@pytest.mark.parametrize("mistake", RECIPE)
def test_each_planted_mistake_is_caught_by_its_name(mistake):
    report = verify_init(by_hand(mistake), init="mimetic")
    assert not report.passed
    assert list(report.mistakes) == [mistake]
    found = {(check.circuit, check.layer) for check in report.mistakes[mistake]}
    if mistake == "cloned heads":
        assert found == {("qk", 0), ("qk", 1)}
        assert len(report.mistakes[mistake]) == 4
    else:
        assert {("ov", 0), ("ov", 1)} <= found


@pytest.mark.parametrize("mistake", RECIPE)
def test_mistakes_are_told_by_whole_matrices_too(mistake):
    """Our own draw spoilt in each way: with the seed known every spoilt product fails, under the same name."""
    model = vit(**WIDTH)
    init_(model, "mimetic", seed=3)
    assert verify_init(model, init="mimetic", seed=3).passed
    spoil(model, mistake)
    report = verify_init(model, init="mimetic", seed=3)
    assert mistake in report.mistakes
    assert all(math.isfinite(check.matrix_error) for check in report.mistakes[mistake])


def spoil(model, mistake):
    with torch.no_grad():
        for block in model.blocks:
            qkv, proj, d = block.attn.qkv.weight, block.attn.proj.weight, 96
            value, output = qkv[2 * d :].double().T.clone(), proj.double().T.clone()
            A = value @ output
            noise = A + 0.4 * torch.eye(d, dtype=torch.float64)
            scale = {"noise 1/d": 1 / math.sqrt(d), "unscaled noise": math.sqrt(d)}.get(mistake)
            if mistake == "cloned heads":
                for rows in (qkv[:d], qkv[d : 2 * d]):
                    rows[32:64] = rows[:32]
            elif mistake == "transposed OV":
                qkv[2 * d :], proj[:] = value, output
            else:
                if mistake == "sign":
                    A = noise + 0.4 * torch.eye(d, dtype=torch.float64)
                elif scale:
                    A = noise * scale - 0.4 * torch.eye(d, dtype=torch.float64)
                left, roots, right = factors(A, mistake)
                qkv[2 * d :], proj[:] = (left * roots).T, right * roots


def test_the_first_head_of_every_layer_cloned_is_caught():
    model = by_hand()
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight[:192] = model.blocks[0].attn.qkv.weight[:192]
    report = verify_init(model, init="mimetic")
    assert list(report.mistakes) == ["reused noise"]
    assert [(c.layer, c.head) for c in report.mistakes["reused noise"]] == [(1, 0), (1, 1), (1, 2)]


def test_one_value_matrix_transposed_alone_is_caught():
    model = by_hand()
    with torch.no_grad():
        rows = model.blocks[1].attn.qkv.weight[192:]
        rows[:] = rows.T.clone()
    report = verify_init(model, init="mimetic")
    assert [check.layer for check in report.mistakes["transposed OV"]] == [1]


@pytest.mark.parametrize("name", NAMES)
def test_what_an_initialiser_made_passes_with_and_without_its_seed(name):
    given, model = options(name), vit()
    init_(model, name, seed=6, **given)
    assert verify_init(model, init=name, seed=6, **given).passed
    assert verify_init(model, init=name, **given).passed
    if name not in ("default", "impulse", "weight-selection", "transfer-attention"):
        other = verify_init(model, init=name, seed=7, **given)
        assert not other.passed
        assert not other.mistakes
        assert any("another draw" in check.problem for check in other.checks)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "default"])
def test_a_network_that_was_not_initialised_fails(name):
    assert not verify_init(vit(), init=name, seed=0, **options(name)).passed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_types_are_compared_at_their_own_rounding(dtype):
    model = vit()
    init_(model, "mimetic", seed=1)
    model.to(dtype)
    report = verify_init(model, init="mimetic", seed=1)
    assert report.passed
    assert max(check.matrix_error for check in report.checks) > 1e-5


def test_a_bias_that_should_be_zero_is_noticed():
    model = vit()
    init_(model, "mimetic", seed=1)
    torch.nn.init.constant_(model.blocks[1].attn.qkv.bias, 0.1)
    failed = [check for check in verify_init(model, init="mimetic", seed=1).checks if not check.passed]
    assert [(check.layer, check.circuit) for check in failed] == [(1, "bias")]


def test_effective_products_with_a_channel_that_cannot_be_set():
    model = vit(init_values=0.1)
    with torch.no_grad():
        model.blocks[0].ls1.gamma[5] = 0.0
    report = init_(model, "mimetic", seed=2, fold="effective")
    assert any("left at zero" in note for note in report.notes)
    assert verify_init(model, init="mimetic", seed=2, fold="effective").passed
    assert verify_init(model, init="mimetic", fold="effective").passed


def test_the_commands_write_and_check_a_file_that_timm_loads_strictly(run, tmp_path):
    source = vit(3)
    init_(source, "mimetic")
    fit_params(source).save(tmp_path / "params.json")
    arguments = [item for name, value in SMALL.items() for item in ("--model-arg", f"{name}={value}")]
    made = run("init", "vit_tiny_patch16_224", "--init", "fitted", "--params", "params.json", "--seed", 4,
               "--output", "model.safetensors", *arguments)  # fmt: skip
    assert made.code == 0, made.err
    assert "QK: mean alpha" in made.out
    path = tmp_path / "model.safetensors"
    loaded = timm.create_model("vit_tiny_patch16_224", checkpoint_path=path, **SMALL)
    metadata = safe_open(path, "pt").metadata()
    record = json.loads(metadata["attnlens"])
    assert (record["init"], record["seed"], record["params"]["file"]) == ("fitted", 4, "params.json")
    assert record["command"].startswith("attnlens init vit_tiny_patch16_224")
    assert len(record["params"]["sha256"]) == 64
    assert set(open_checkpoint(path)) == set(loaded.state_dict())

    checked = run("verify-init", "model.safetensors")  # architecture, seed, options: from the file
    assert checked.code == 0, checked.out + checked.err
    assert "passed: 18 of 18 checks" in checked.out

    with torch.no_grad():
        loaded.blocks[2].attn.proj.weight.mul_(1.001)
    save_weights(loaded, tmp_path / "spoilt.safetensors", metadata)
    failed = run("verify-init", "vit_tiny_patch16_224", "--checkpoint", "spoilt.safetensors", "--json")
    assert failed.code == 1  # the file's shapes are not the plain architecture's

    spoilt = run("verify-init", "spoilt.safetensors", "--json")
    assert spoilt.code == 1
    report = json.loads(spoilt.out)
    assert [(c["layer"], c["circuit"]) for c in report["checks"] if c["problem"]] == [(2, "ov")]

    (tmp_path / "params.json").write_text((tmp_path / "params.json").read_text() + "\n")
    changed = run("verify-init", "model.safetensors")
    assert changed.code == 2
    assert "of another content" in changed.err


def test_the_commands_work_without_a_model(run):
    made = run("init", "--seed", 1, "--output", "model.safetensors")
    assert made.code == 0, made.err
    assert run("verify-init", "model.safetensors").code == 0
    asked = run("verify-init")
    assert asked.code == 2
    assert "verify-init needs a network to look at" in asked.err
    trained = run("verify-init", EMBEDDED, "--init", "mimetic")
    assert trained.code == 1
    assert "FAILED: 0 of 30 checks" in trained.out
    assert trained.err.count("Traceback") == 0


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("init", "--init", "mimetik"), 2, "did you mean mimetic"),
        (("init", "no_such_vit"), 1, "timm has no architecture named 'no_such_vit'"),
        (("init", "--option", "alpha_qk"), 2, "give name=value"),
        (("init", "--params", "p.json", "--init", "mimetic"), 2, "--params goes with --init fitted"),
        (("verify-init", str(EMBEDDED), "--init", "fitted"), 2, "needs the option 'params'"),
    ],
)
def test_wrong_usage_is_told_in_one_line(run, tmp_path, arguments, code, text):
    result = run(*arguments)
    assert (result.code, len(result.err.strip().splitlines())) == (code, 1)
    assert text in result.err
    assert not list(tmp_path.iterdir())


def test_a_file_made_from_an_object_asks_for_it_again(tmp_path):
    source = vit(3)
    path = tmp_path / "model.safetensors"
    init_file("vit_tiny_patch16_224", path, init="transfer-attention", model_args=SMALL, teacher=source)
    with pytest.raises(UsageError, match="pass that option again"):
        verify_init(path)
    assert verify_init(path, teacher=source).passed

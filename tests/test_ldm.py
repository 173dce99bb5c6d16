"""Checkpoints of the published code: names, sizes, outputs, refusals."""

import itertools
import pickle
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_controlnet_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

import featinv
from featinv.backbones import FeatureSpec
from featinv.conditioning.encoders import PublishedEncoder
from featinv.diffusion.first_stage import Finish, FirstStage
from featinv.diffusion.guidance import ClassifierFreeGuidance
from featinv.diffusion.ldm import export_config, export_ldm, read_ldm
from featinv.diffusion.ldm_config import read_settings
from featinv.diffusion.ldm_text import clip_tower, prompt_embeddings, token_ids
from featinv.diffusion.prior import PROMPT, DiffusionPrior, load_prior
from featinv.diffusion.samplers import SAMPLERS, sample
from featinv.errors import UserError
from featinv.inverters.diffusion import DiffusionInverter
from featinv.inverters.ldm import export_inverter, import_ldm, parity

PARITY = Path(__file__).resolve().parents[2] / "shared" / "parity"


def _prior(channels=(32, 64), attention=(True, False), layers=1, heads=4, depth=1, vae=(32, 32), linear=False):
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=[f"{'CrossAttn' if has else ''}DownBlock2D" for has in attention],
        up_block_types=[f"{'CrossAttn' if has else ''}UpBlock2D" for has in reversed(attention)],
        block_out_channels=channels,
        layers_per_block=layers,
        cross_attention_dim=24,
        attention_head_dim=heads,
        transformer_layers_per_block=depth,
        use_linear_projection=linear,
    )
    autoencoder = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * len(vae),
        up_block_types=["UpDecoderBlock2D"] * len(vae),
        block_out_channels=vae,
        layers_per_block=layers,
        scaling_factor=0.3,
    )
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    text = {"prompt": torch.randn(1, 77, 24), "null": torch.randn(1, 77, 24)}
    return DiffusionPrior(FirstStage(autoencoder), unet, scheduler, text, 8 * 2 ** (len(vae) - 1))


def _inverter(prior, channels=12, hidden=32):
    encoder = PublishedEncoder(FeatureSpec(channels, 3, 3, "final"), prior.latent_shape, 32, hidden)
    inverter = DiffusionInverter(prior, encoder, ClassifierFreeGuidance(1.75, ["text"]), "ddim_leading", 4, gated=False)
    with torch.no_grad():
        for parameter in inverter.trainable_parameters():
            parameter.normal_(std=0.05)
    return inverter.eval()


def _yaml(path):
    return path.with_suffix(".yaml")


def _write(path, state, prior, half=False):
    torch.save({"state_dict": {k: v.half() if half else v for k, v in state.items()}}, path)
    _yaml(path).write_text(OmegaConf.to_yaml(OmegaConf.create(export_config(prior))))
    return path


@pytest.mark.skipif(not PARITY.is_dir(), reason="the parity fixture is not part of the repository")
def test_every_output_of_the_original_implementation_is_reproduced() -> None:
    expected = load_file(PARITY / "expected.safetensors")
    inverter = featinv.import_ldm(PARITY / "controlldm.ckpt", PARITY / "config.yaml")
    differences = parity(inverter, expected)
    inputs = {"images", "features", "noisy_latents", "timesteps", "encoder_hidden_states"}
    assert set(differences) == set(expected) - inputs - {"negative_encoder_hidden_states"}
    assert max(differences.values()) < 1e-4, differences


SIZES = [
    {},
    {"channels": (32, 64, 96), "attention": (False, True, True), "layers": 2, "heads": 8, "vae": (32, 64, 64)},
    {"channels": (32, 32), "attention": (True, True), "depth": 2, "heads": (2, 8), "linear": True, "vae": (64,)},
]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_other_sizes_survive_the_way_out_and_back(tmp_path, sizes, suffix) -> None:
    inverter = _inverter(_prior(**sizes), channels=5, hidden=16)
    path = _write(tmp_path / "a.ckpt", export_inverter(inverter), inverter.prior)
    if suffix == ".safetensors":
        path = tmp_path / "a.safetensors"
        save_file(export_inverter(inverter), path)
    again = import_ldm(path)
    noisy, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    conditions = inverter.conditions(torch.randn(2, 5, 3, 3))
    with torch.no_grad():
        assert torch.equal(again.unet(noisy, timesteps, conditions), inverter.unet(noisy, timesteps, conditions))
        images = torch.rand(1, 3, inverter.size, inverter.size)
        assert torch.equal(again.prior.first_stage.encode(images), inverter.prior.first_stage.encode(images))
    assert again.size == inverter.size and again.prior.latent_shape == (4, 8, 8)
    kept = {k: v for k, v in inverter.trainable_state().items() if k != "null_embedding"}
    assert all(torch.equal(v, again.trainable_state()[k]) for k, v in kept.items())


def test_names_agree_with_diffusers_own_conversion() -> None:
    prior = _prior(**SIZES[1])
    inverter = _inverter(prior)
    state = export_ldm(prior, inverter.branch)
    unet = convert_ldm_unet_checkpoint(dict(state), dict(prior.unet.config))
    assert {k: v.shape for k, v in unet.items()} == {k: v.shape for k, v in prior.unet.state_dict().items()}
    assert all(torch.equal(v, prior.unet.state_dict()[k]) for k, v in unet.items())
    vae = convert_ldm_vae_checkpoint(dict(state), dict(prior.first_stage.vae.config))
    assert all(torch.equal(v.flatten(), prior.first_stage.vae.state_dict()[k].flatten()) for k, v in vae.items())
    # Theirs wants the picture ControlNet's hint block, which ours does not have.
    hint = {
        f"control_model.input_hint_block.{n}.{kind}": torch.zeros(1)
        for n in range(0, 15, 2)
        for kind in ("weight", "bias")
    }
    branch = convert_controlnet_checkpoint(state | hint, dict(inverter.branch.config))
    ours = inverter.branch.state_dict()
    assert set(ours) == {k for k in branch if "cond_embedding" not in k}
    assert all(torch.equal(branch[k], v) for k, v in ours.items())


def test_a_checkpoint_without_a_branch_is_a_prior_and_an_untrained_inverter(tmp_path, caplog) -> None:
    prior = _prior()
    path = _write(tmp_path / "prior.ckpt", export_ldm(prior), prior, half=True)
    again = load_prior(path)
    assert torch.equal(again.unet.conv_in.weight, prior.unet.conv_in.weight.half().float())
    assert not again.text["prompt"].any() and "no CLIP text encoder" in caplog.text
    inverter = import_ldm(path)
    noisy, conditions = torch.randn(1, 4, 8, 8), inverter.conditions(torch.randn(1, 1024, 9, 9))
    alone = inverter.unet(noisy, torch.tensor(5), conditions.without(["branch"]))
    assert torch.equal(inverter.unet(noisy, torch.tensor(5), conditions), alone) and "no branch" in caplog.text


def test_a_prior_goes_to_diffusers_folders_and_back(tmp_path) -> None:
    prior = _prior()
    load_prior(_write(tmp_path / "a.ckpt", export_ldm(prior), prior)).save_pretrained(tmp_path / "folder")
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "folder", subfolder="unet")
    vae = AutoencoderKL.from_pretrained(tmp_path / "folder", subfolder="vae")
    assert all(torch.equal(v, unet.state_dict()[k]) for k, v in prior.unet.state_dict().items())
    assert all(torch.equal(v, vae.state_dict()[k]) for k, v in prior.first_stage.vae.state_dict().items())
    exported = export_ldm(load_prior(tmp_path / "folder"))
    assert all(torch.equal(v, exported[k]) for k, v in export_ldm(prior).items())


def test_the_yaml_of_the_original_code_is_understood(tmp_path) -> None:
    prior = _prior(channels=(32, 64), heads=(2, 4))
    path = _write(tmp_path / "a.ckpt", export_ldm(prior), prior)
    unet = {"params": {"num_head_channels": 16, "context_dim": 24, "num_heads": -1}}
    params = {"linear_start": 0.00085, "linear_end": 0.012, "image_size": 8, "scale_factor": 0.3, "unet_config": unet}
    OmegaConf.save(OmegaConf.create({"model": {"params": {**params, "parameterization": "v"}}}), tmp_path / "b.yaml")
    again = load_prior(path, tmp_path / "b.yaml")
    assert again.unet.config.attention_head_dim == [2, 4] and again.scheduler.config.prediction_type == "v_prediction"
    assert torch.allclose(again.scheduler.betas, prior.scheduler.betas) and again.size == prior.size
    params["unet_config"]["params"]["context_dim"] = 768
    OmegaConf.save(OmegaConf.create({"model": {"params": params}}), tmp_path / "b.yaml")
    with pytest.raises(UserError, match="768"):
        load_prior(path, tmp_path / "b.yaml")


@pytest.mark.parametrize("schedule", [{}, {"schedule": {"prediction_type": "v_prediction", "beta_end": None}}])
def test_a_short_yaml_that_leaves_the_schedule_out_means_stable_diffusions(tmp_path, schedule) -> None:
    prior = _prior()
    state = {k: v for k, v in export_ldm(prior).items() if k != "betas"}
    path = _write(tmp_path / "a.ckpt", state, prior)
    OmegaConf.save(
        OmegaConf.create({"unet": {"num_attention_heads": 4, "sample_size": 8}, **schedule}), tmp_path / "b.yaml"
    )
    again = load_prior(path, tmp_path / "b.yaml").scheduler
    assert torch.equal(again.alphas_cumprod, prior.scheduler.alphas_cumprod)
    assert again.config.prediction_type == ("v_prediction" if schedule else "epsilon")


def test_the_checkpoints_own_betas_win(tmp_path) -> None:
    prior = _prior()
    path = _write(tmp_path / "a.ckpt", export_ldm(prior) | {"betas": torch.linspace(0.001, 0.02, 500)}, prior)
    again = load_prior(path)
    assert again.scheduler.config.num_train_timesteps == 500
    assert torch.allclose(again.scheduler.betas, torch.linspace(0.001, 0.02, 500))


@pytest.mark.parametrize("told", ["by the betas", "by the YAML", "by CompVis' YAML"])
def test_a_zero_snr_checkpoint_draws_what_its_network_says(tmp_path, told) -> None:
    """Of a single picture x0 the exact velocity is known at every timestep, and every sampler must end there."""
    prior, stable = _prior(heads=4), {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    zero = DDPMScheduler(**stable, rescale_betas_zero_snr=True)
    state = {k: v for k, v in export_ldm(prior).items() if k != "betas"}
    schedule = {"prediction_type": "v_prediction"} | ({"rescale_betas_zero_snr": True} if "YAML" in told else {})
    path = _write(tmp_path / "a.ckpt", state | ({} if "YAML" in told else {"betas": zero.betas}), prior)
    OmegaConf.save(OmegaConf.create({"schedule": schedule, "unet": {"num_heads": 4, "sample_size": 8}}), _yaml(path))
    if told == "by CompVis' YAML":
        text = OmegaConf.load(_compvis_yaml(_yaml(path)))
        text.model.params |= {"parameterization": "v", "rescale_betas_zero_snr": True}
        OmegaConf.save(text, _yaml(path))
    scheduler = load_prior(path).scheduler
    assert (
        torch.allclose(scheduler.alphas_cumprod, zero.alphas_cumprod, atol=1e-6) and scheduler.alphas_cumprod[-1] == 0
    )
    x0, noise, alphas = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), zero.alphas_cumprod

    def velocity(x, t):
        a, s = alphas[round(float(t))].sqrt(), (1 - alphas[round(float(t))]).sqrt()
        return a * (x - a * x0) / s - s * x0

    for sampler, steps in itertools.product(SAMPLERS, (1, 2, 10)):
        drawn = sample(velocity, noise, scheduler, sampler, steps)
        # The LDM code's timesteps start below pure noise, which one or two steps do not make up for.
        assert drawn.isfinite().all() and (sampler == "ddim_leading" or torch.allclose(drawn, x0, atol=2e-2)), sampler


def test_zero_snr_goes_out_and_back_and_is_no_schedule_for_epsilon(tmp_path) -> None:
    prior = _prior()
    prior.scheduler = DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    path = _write(tmp_path / "a.ckpt", export_ldm(prior), prior)
    assert load_prior(path).scheduler.config.rescale_betas_zero_snr
    text = OmegaConf.load(_yaml(path))
    text.schedule.prediction_type = "epsilon"
    OmegaConf.save(text, _yaml(path))
    with pytest.raises(UserError, match="set prediction_type: v_prediction"):
        import_ldm(path)


def test_leading_ddim_is_the_formula_of_the_original_code() -> None:
    """x0 = (x - sqrt(1 - a) e) / sqrt(a), next = sqrt(a') x0 + sqrt(1 - a') e at timesteps 1 + k T / steps."""
    prior, noise = _prior(), torch.randn(1, 4, 8, 8)
    alphas = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    seen, x = [], noise.double()

    def model(x, t):
        seen.append(int(t))
        return torch.sin(x * (1 + t / 500))

    found = sample(model, noise, prior.scheduler, "ddim_leading", 5)
    assert seen == [801, 601, 401, 201, 1]
    for t, before in zip([801, 601, 401, 201, 1], [601, 401, 201, 1, 0], strict=True):
        a, b, e = alphas[t], alphas[before], model(x, torch.tensor(t))
        x = b.sqrt() * (x - (1 - a).sqrt() * e) / a.sqrt() + (1 - b).sqrt() * e
    assert torch.allclose(found.double(), x, atol=1e-4)


def _clip_state(width=64, words=49408):
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=1,
        hidden_act="quick_gelu",
    )
    tower = CLIPTextModel(config).eval()
    names = {k.removeprefix("text_model."): v for k, v in tower.state_dict().items()}
    return tower, {f"transformer.text_model.{k}": v for k, v in names.items()}


def test_prompts_are_embedded_by_the_checkpoints_text_encoder() -> None:
    tower, state = _clip_state()
    ids = token_ids()
    # 49406 starts a text, 49407 ends and fills it; "a" is 320 in CLIP's vocabulary.
    assert ids[0, :2].tolist() == [49406, 320] and ids[1].tolist() == [49406] + [49407] * 76 and len(PROMPT) > 20
    found = prompt_embeddings(state, 64)
    with torch.no_grad():
        assert torch.allclose(found["prompt"], tower(ids[:1]).last_hidden_state, atol=1e-5)
    assert not prompt_embeddings({}, 64)["null"].any()
    broken = {k.removeprefix("transformer.text_model."): v for k, v in state.items() if "fc2" not in k}
    with pytest.raises(UserError, match="text encoder"):
        clip_tower(broken)


class _Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("pwned"),))


def test_a_malicious_pickle_is_refused_and_does_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = export_ldm(_prior())
    torch.save({"state_dict": state, "callbacks": _Malicious()}, "a.ckpt")
    (tmp_path / "b.ckpt").write_bytes(pickle.dumps({"state_dict": _Malicious()}))
    for name in ("a.ckpt", "b.ckpt"):
        with pytest.raises(UserError, match="never unpickled"):
            load_prior(tmp_path / name)
        with pytest.raises(UserError, match="never unpickled"):
            import_ldm(tmp_path / name)
    assert not Path("pwned").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncated", "damaged"),
        ("no unet", "no latent-diffusion checkpoint"),
        ("no first stage", "no first stage"),
        ("lacking", "lacks"),
        ("surplus", "does not have"),
        ("shape", "shape"),
        ("hint", "convolutions"),
    ],
)
def test_a_damaged_checkpoint_is_named(tmp_path, damage, message) -> None:
    inverter = _inverter(_prior())
    state, unet = export_inverter(inverter), "model.diffusion_model."
    if damage == "no unet":
        state = {k: v for k, v in state.items() if not k.startswith(unet)}
    elif damage == "no first stage":
        state = {k: v for k, v in state.items() if not k.startswith("first_stage_model.")}
    elif damage == "lacking":
        del state[unet + "time_embed.0.weight"]
    elif damage == "surplus":
        state[unet + "label_emb.0.weight"] = torch.zeros(3)
    elif damage == "shape":
        state[unet + "out.0.weight"] = torch.zeros(7)
    elif damage == "hint":
        state["control_model.input_hint_block.block.7.weight"] = torch.zeros(3, 3, 3, 3)
    path = _write(tmp_path / "a.ckpt", state, inverter.prior)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match=message):
        import_ldm(path)


def test_the_tool_converts_a_branch_for_sampling_and_back(tmp_path, monkeypatch) -> None:
    from tools import convert_checkpoint

    config = featinv.config.load_config  # the reference experiment, at a tiny size
    backbone = {"target": "featinv.backbones.timm_backbone.TimmBackbone"}
    backbone |= {"params": {"name": "resnet10t", "pretrained": False, "input_size": 96}}

    def tiny(name, overrides):
        found = config(name, [])
        found.backbone = backbone
        return found

    monkeypatch.setattr(convert_checkpoint, "load_config", tiny)
    inverter = _inverter(_prior(), channels=512)
    source = _write(tmp_path / "a.ckpt", export_inverter(inverter), inverter.prior)
    text = OmegaConf.load(source.with_suffix(".yaml"))
    text.control, text.schedule.ddim_steps = {"feature_size": 3}, 4
    OmegaConf.save(text, source.with_suffix(".yaml"))
    convert_checkpoint.to_folders(source, None, "any", tmp_path / "run", half=False)
    trained = featinv.inverters.build.load_trained(tmp_path / "run")
    assert trained.load_backbone().spec.channels == 512
    features = torch.randn(1, 512, 3, 3)
    drawn = trained.inverter.invert(features, seeds=[3])
    assert torch.allclose(drawn, import_ldm(source).invert(features, seeds=[3]), atol=1e-4)
    convert_checkpoint.to_ldm(tmp_path / "run", tmp_path / "back.safetensors", half=False)
    again = read_ldm(tmp_path / "back.safetensors")
    assert all(torch.equal(v, again.state[k]) for k, v in export_inverter(inverter).items())
    assert again.settings.steps == 4 and again.settings.guidance_scale == 1.75


def test_a_checkpoint_that_is_not_there_is_named(tmp_path, monkeypatch, capsys) -> None:
    from tools import convert_checkpoint

    monkeypatch.setattr("sys.argv", ["convert", str(tmp_path / "missing.ckpt"), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="2"):
        convert_checkpoint.main()
    assert f"there is no file {tmp_path / 'missing.ckpt'}" in capsys.readouterr().err


def test_parts_that_the_ldm_code_does_not_know_are_refused() -> None:
    inverter = _inverter(_prior())
    inverter.lift = torch.nn.Identity()  # whatever it is
    with pytest.raises(UserError, match="lift"):
        export_inverter(inverter)
    inverter.lift = None
    inverter.prior.first_stage.finish = Finish(8, 1)
    for export, given in ((export_ldm, inverter.prior), (export_inverter, inverter)):
        with pytest.raises(UserError, match="first stage finishes what it decodes"):
            export(given)
    inverter.prior.first_stage.finish = None
    inverter.prior.first_stage.vae.register_to_config(shift_factor=0.1)
    with pytest.raises(UserError, match="shifts its latents"):
        export_ldm(inverter.prior)
    light = DiffusionInverter(_prior(), inverter.encoder, gated=False, branch="light")
    with pytest.raises(UserError, match="published hint encoder and branch"):
        export_inverter(light)


def _compvis_yaml(path, unet=None, ddconfig=None, **sections):
    """The YAML of `_prior()` as the LDM code writes it, with changes."""
    sizes = {"model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1, "context_dim": 24, "num_heads": 4}
    stage = {"ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "z_channels": 4, "in_channels": 3, "out_ch": 3}
    params = {
        "linear_start": 0.00085,
        "linear_end": 0.012,
        "image_size": 8,
        "unet_config": {"params": {**sizes, "in_channels": 4, "out_channels": 4, **(unet or {})}},
        "first_stage_config": {"params": {"embed_dim": 4, "ddconfig": {**stage, **(ddconfig or {})}}},
    }
    OmegaConf.save(OmegaConf.create({"model": {"params": params}, **sections}), path)
    return path


@pytest.mark.parametrize(
    ("unet", "ddconfig", "message"),
    [
        ({"model_channels": 320}, {}, r"says 320 for the UNet's model_channels, the checkpoint has 32\."),
        ({"channel_mult": [1, 2, 4, 4]}, {}, r"the UNet's channel_mult, the checkpoint has \[1, 2\]"),
        ({"num_res_blocks": 2}, {}, "the UNet's num_res_blocks"),
        ({"num_res_blocks": [1, 2]}, {}, "the UNet's num_res_blocks"),
        ({"in_channels": 9}, {}, "the UNet's in_channels"),
        ({}, {"ch": 128}, "the first stage's ch,"),
        ({}, {"ch_mult": [1, 2, 4, 4]}, "the first stage's ch_mult"),
        ({}, {"num_res_blocks": 2}, "the first stage's num_res_blocks"),
        ({}, {"z_channels": 3}, "the first stage's z_channels"),
    ],
)
def test_another_models_compvis_yaml_is_refused(tmp_path, unet, ddconfig, message) -> None:
    prior = _prior()
    path = _write(tmp_path / "a.ckpt", export_ldm(prior), prior)
    load_prior(path, _compvis_yaml(tmp_path / "own.yaml", {"num_res_blocks": [1, 1]}))
    with pytest.raises(UserError, match=message):
        load_prior(path, _compvis_yaml(tmp_path / "other.yaml", unet, ddconfig))


def test_either_yaml_states_the_features_size_and_is_held_to_their_channels(tmp_path) -> None:
    inverter = _inverter(_prior(heads=8), channels=5)
    path = _write(tmp_path / "a.ckpt", export_inverter(inverter), inverter.prior)
    control = {"feature_size": [7, 5], "feature_channels": 5}
    OmegaConf.save(OmegaConf.create({"control": control}), tmp_path / "short.yaml")
    long = _compvis_yaml(tmp_path / "long.yaml", control=control)
    for config in (tmp_path / "short.yaml", long):
        spec = import_ldm(path, config).encoder.spec
        assert (spec.channels, spec.height, spec.width) == (5, 7, 5)
    with pytest.raises(UserError, match="says 6 for the branch's feature_channels, the checkpoint has 5"):
        import_ldm(path, _compvis_yaml(tmp_path / "other.yaml", control={"feature_channels": 6}))


@pytest.mark.parametrize(
    ("text", "message"),
    [("prior: scenes64", "none of the sections"), ("[1, 2]", "none of the sections"), ("control: 7", "a mapping")],
)
def test_a_yaml_that_describes_no_model_is_refused(tmp_path, text, message) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_settings(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vae: {scale_factor: 0.13}", r"a\.yaml: vae\.scale_factor is unknown: did you mean scaling_factor"),
        (
            "schedule: {prediction_typ: v_prediction}",
            "schedule.prediction_typ is unknown: did you mean prediction_type",
        ),
        ("unet: {num_attention_head: 4}", "unet.num_attention_head is unknown: did you mean num_attention_heads"),
        ("text: {heads: 4}", "text.heads is unknown: valid: num_attention_heads"),
        ("control: {feature_sise: 9}", "control.feature_sise is unknown: did you mean feature_size"),
        ("unet: {sample_size: 8}\nsampling: {steps: 5}", "sampling is unknown"),
        ("model: {params: {scale_facter: 0.13}}", r"model\.params\.scale_facter is unknown: did you mean scale_factor"),
        (
            "model: {params: {scaling_factor: 0.13}}",
            "model.params.scaling_factor is unknown: did you mean scale_factor",
        ),
        ("model: {params: {prediction_type: v_prediction}}", "model.params.prediction_type is unknown: .*parameteri"),
        ("model: {params: {parameterization: velocity}}", "parameterization is 'velocity': "),
        (
            "model: {params: {unet_config: {params: {num_head: 4}}}}",
            "unet_config.params.num_head is unknown: .*num_heads",
        ),
        ("model: {params: {}}\ncontrol: {feature_sise: 9}", "control.feature_sise is unknown"),
        (
            "model: {params: {}}\nschedule: {ddim_steps: 9}",
            "beside model only the section control is read, not schedule",
        ),
    ],
)
def test_a_key_that_would_not_be_read_is_named(tmp_path, text, message) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_settings(tmp_path / "a.yaml")


# Keys of v1-inference.yaml, v2-inference-v.yaml, cldm_v15.yaml and of latent diffusion's training configurations, which
# change nothing here; values are theirs where one is read.
PUBLISHED = """
model:
  base_learning_rate: 1.0e-4
  target: cldm.cldm.ControlLDM
  params:
    {linear_start: 0.00085, linear_end: 0.0120, num_timesteps_cond: 1, log_every_t: 200, timesteps: 1000,
     first_stage_key: jpg, cond_stage_key: txt, control_key: hint, image_size: 64, channels: 4,
     cond_stage_trainable: false, conditioning_key: crossattn, monitor: val/loss_simple_ema, scale_factor: 0.18215,
     use_ema: false, only_mid_control: false, parameterization: v, scale_by_std: false, ckpt_path: null,
     ignore_keys: [], load_only_unet: false, loss_type: l2, beta_schedule: linear, v_posterior: 0.0,
     l_simple_weight: 1.0, original_elbo_weight: 0.0, given_betas: null, cosine_s: 8e-3, clip_denoised: false,
     learn_logvar: false, logvar_init: 0.0, use_positional_encodings: false, concat_mode: true, sd_locked: true,
     cond_stage_forward: null, make_it_fit: false, ucg_training: null, reset_ema: false, finetune_keys: null,
     scheduler_config: {target: ldm.lr_scheduler.LambdaLinearScheduler, params: {warm_up_steps: [10000]}},
     control_stage_config: {target: cldm.cldm.ControlNet, params: {hint_channels: 3, num_heads: 8}},
     first_stage_config: {target: ldm.models.autoencoder.AutoencoderKL, params: {embed_dim: 4, monitor: val/rec_loss,
       ddconfig: {double_z: true, z_channels: 4, resolution: 256, in_channels: 3, out_ch: 3, ch: 128,
                  ch_mult: [1, 2, 4, 4], num_res_blocks: 2, attn_resolutions: [], dropout: 0.0},
       lossconfig: {target: torch.nn.Identity}}},
     cond_stage_config: {target: ldm.modules.encoders.modules.FrozenCLIPEmbedder, params: {freeze: true}},
     unet_config: {target: cldm.cldm.ControlledUnetModel, params: {image_size: 32, in_channels: 4, out_channels: 4,
       model_channels: 320, attention_resolutions: [4, 2, 1], num_res_blocks: 2, channel_mult: [1, 2, 4, 4],
       num_head_channels: 64, num_heads: -1, num_heads_upsample: -1, use_spatial_transformer: true,
       use_linear_in_transformer: true, transformer_depth: 1, context_dim: 768, use_checkpoint: true, legacy: false,
       dropout: 0, conv_resample: true, dims: 2, num_classes: null, use_fp16: true, use_scale_shift_norm: false,
       resblock_updown: false, use_new_attention_order: false, n_embed: null, disable_self_attentions: null,
       num_attention_blocks: null, disable_middle_self_attn: false, adm_in_channels: null,
       spatial_transformer_attn_type: softmax}}}
data: {target: main.DataModuleFromConfig, params: {batch_size: 4, num_workers: 4, wrap: false}}
lightning: {callbacks: {image_logger: {target: main.ImageLogger}}, trainer: {benchmark: true}}
"""


def test_keys_of_published_yamls_go_on_being_accepted(tmp_path) -> None:
    (tmp_path / "a.yaml").write_text(PUBLISHED)
    found = read_settings(tmp_path / "a.yaml")
    assert (found.head_channels, found.sample_size, found.scaling_factor) == (64, 64, 0.18215)
    assert found.schedule["prediction_type"] == "v_prediction" and found.schedule["beta_schedule"] == "scaled_linear"
    page = (Path(__file__).parents[1] / "docs" / "checkpoints.md").read_text()
    (tmp_path / "b.yaml").write_text(page.partition("```yaml\n")[2].partition("```")[0])
    assert read_settings(tmp_path / "b.yaml").steps == 50


def test_the_tilde_is_the_home_folder_wherever_a_checkpoint_is_named(tmp_path, monkeypatch) -> None:
    from tools import convert_checkpoint

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    prior = _prior()
    _write(tmp_path / "a.ckpt", export_ldm(prior), prior)
    monkeypatch.setattr("sys.argv", ["convert", "~/a.ckpt", "--config=~/a.yaml", "--out=~/folder"])
    convert_checkpoint.main()
    for name in ("~/a.ckpt", "~/folder"):
        assert torch.equal(load_prior(name).unet.conv_in.weight, prior.unet.conv_in.weight)
    assert import_ldm("~/a.ckpt", "~/a.yaml").size == prior.size and not Path("~").exists()

"""What a base does with its networks is what a stock pipeline does."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fewstep import sd15
from fewstep.backbone import Backbone, adapters_off, random_backbone
from fewstep.backbone.threads import in_parts, lone_threads, whole_batches
from fewstep.lora import attach, trainable_parameters

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def test_embeddings_are_the_stock_pipelines(tiny: Backbone) -> None:
    prompts = ["a photo of a cat", "", "a red house by the sea " * 30]
    stock = torch.cat([tiny.pipeline().encode_prompt(prompt, "cpu", 1, False)[0] for prompt in prompts])
    embeddings = tiny.embed(prompts)
    assert embeddings.dtype == torch.float32 and embeddings.shape == (3, 77, 32)
    torch.testing.assert_close(embeddings, stock, rtol=1e-5, atol=1e-5)
    assert not embeddings.requires_grad


def test_tokens_beyond_the_context_are_counted() -> None:
    tiny = random_backbone("tiny")
    assert tiny.token_overflow(["a photo of a cat", "cat " * 75, "cat " * 76, "cat " * 100]) == [0, 0, 1, 25]
    assert tiny.unread(["a photo of a cat", "cat " * 75, "cat " * 75 + "a red house", "cat " * 74 + "night sky"]) == [
        "", "", "a red house", "sky",
    ]  # fmt: skip


def test_the_tokenizer_has_clips_ids() -> None:
    tokenizer = sd15.tokenizer()
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert len(tokenizer) == 49408 and tokenizer.model_max_length == 77
    assert tokenizer.convert_tokens_to_ids(["!", "<|startoftext|>", "<|endoftext|>"]) == [0, 49406, 49407]
    assert tokenizer("A photo  of a CAT").input_ids == tokenizer("a photo of a cat").input_ids
    assert tokenizer.pad_token_id == 49407
    assert 49407 not in tokenizer("日本語 café 🚀 don't 1999!").input_ids[1:-1]  # every byte has a token


def test_pictures_and_latents(tiny: Backbone) -> None:
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    posterior = tiny.vae.encode(pixels).latent_dist
    torch.testing.assert_close(tiny.encode(pixels, noise), (posterior.mean + posterior.std * noise) * 0.18215)
    torch.testing.assert_close(tiny.encode(pixels), posterior.mode() * 0.18215)
    assert tiny.encode(pixels).shape[1:] == tiny.latent_shape() == (4, 8, 8)
    assert tiny.latent_shape(128) == (4, 16, 16)
    latents = torch.randn(1, 4, 8, 8) * 5
    decoded = tiny.decode(latents)
    stock = tiny.vae.decode(latents / 0.18215).sample / 2 + 0.5
    torch.testing.assert_close(decoded, stock.clamp(0, 1))
    assert decoded.dtype == torch.float32 and float(decoded.min()) >= 0 and float(decoded.max()) <= 1


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("dtype", ["no", "bf16"])
def test_a_part_a_thread_gives_what_the_whole_batch_gives(
    threads: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = random_backbone("tiny", seed=5, dtype=dtype)
    parameters = attach(base.unet, 2, 4, TARGETS, seed=0)
    for parameter in parameters:
        torch.nn.init.normal_(parameter.data, std=0.1)
    x_t, cond, t = torch.randn(13, 4, 8, 8), torch.randn(13, 77, 32), torch.arange(0, 650, 50)
    seen: list[int] = []
    base.unet.register_forward_pre_hook(lambda _unet, inputs: seen.append(len(inputs[0])))
    with torch.no_grad():
        one_thread = [base.denoiser()(x_t, t, cond), base.denoiser(adapter=False)(x_t, t, cond), base.decode(x_t)]
        assert seen == [13, 13]
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        several = [base.denoiser()(x_t, t, cond), base.denoiser(adapter=False)(x_t, t, cond), base.decode(x_t)]
    assert len(seen) == 2 + 2 * threads and sum(seen) == 52
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == "no" else {"rtol": 0.05, "atol": 0.05}
    for mine, theirs in zip(several, one_thread, strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_student_learns_in_parts_what_it_learns_from_the_whole(
    checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = random_backbone("tiny", seed=5)
    parameters = attach(base.unet, 2, 4, TARGETS, seed=0)
    for parameter in parameters:
        torch.nn.init.normal_(parameter.data, std=0.1)
    unused = torch.nn.Parameter(torch.zeros(1))
    base.unet.register_parameter("unused", unused)
    if checkpointing:
        base.unet.enable_gradient_checkpointing()
    x_t, cond, t = torch.randn(13, 4, 8, 8), torch.randn(13, 77, 32), torch.arange(0, 650, 50)
    seen: list[int] = []
    base.unet.register_forward_pre_hook(lambda _unet, inputs: seen.append(len(inputs[0])))

    def learnt() -> list[torch.Tensor]:
        output = base.denoiser()(x_t, t, cond)
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).square().mean().backward()
        found = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
        base.unet.zero_grad()
        return [output.detach(), *found]

    together = learnt()
    assert seen == [13] and len(together) == 1 + len(parameters)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    in_three = learnt()
    assert seen[1:] in ([5, 4, 4], [4, 5, 4], [4, 4, 5]) and unused.grad is None
    for mine, theirs in zip(in_three, together, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)
    again = learnt()  # threads end in any order: it must not show
    assert all(torch.equal(*pair) for pair in zip(in_three, again, strict=True))
    with whole_batches():
        learnt()
    assert seen[-1] == 13
    inputs = x_t.requires_grad_()
    base.denoiser()(inputs, t, cond).sum().backward()  # who asks for the input's gradient gets it
    assert seen[-1] == 13 and inputs.grad is not None


def test_a_thread_that_fails_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(x: torch.Tensor) -> torch.Tensor:
        raise ArithmeticError(f"{len(x)} samples")

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with torch.no_grad(), pytest.raises(ArithmeticError, match="4 samples"):
        in_parts(fails, (torch.zeros(8, 1),))


def test_lone_threads_take_nobody_elses_threads() -> None:
    def threads(_: int) -> int:
        return torch.get_num_threads()

    torch.set_num_threads(3)
    with lone_threads(2) as alone, ThreadPoolExecutor(1) as later:
        assert set(alone.map(threads, range(8))) == {1}
        assert torch.get_num_threads() == 3 and later.submit(threads, 0).result() == 3
        assert set(alone.map(threads, range(8))) == {1}


def test_the_denoiser_is_the_unet(tiny: Backbone) -> None:
    x_t, cond, t = torch.randn(3, 4, 8, 8), torch.randn(3, 77, 32), torch.tensor([999, 259, 0])
    output = tiny.denoiser()(x_t, t, cond)
    torch.testing.assert_close(output, tiny.unet(x_t, t, encoder_hidden_states=cond).sample, rtol=0, atol=0)
    one_by_one = torch.cat([tiny.denoiser()(x_t[i : i + 1], t[i : i + 1], cond[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(output, one_by_one, rtol=1e-4, atol=1e-5)


def test_everything_is_frozen_and_evaluates(tiny: Backbone) -> None:
    for network in (tiny.unet, tiny.vae, tiny.text_encoder):
        assert not network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())


def test_the_pipeline_draws_with_the_same_modules(tiny: Backbone) -> None:
    pipeline = tiny.pipeline()
    assert pipeline.unet is tiny.unet and pipeline.vae is tiny.vae
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline("a cat", num_inference_steps=2, height=64, width=64, output_type="np").images
    assert pictures.shape == (1, 64, 64, 3)


def test_half_precision_keeps_coefficients_adapter_and_outputs_in_fp32() -> None:
    exact, half = random_backbone(seed=5), random_backbone(seed=5, dtype="bf16")
    parameters = attach(half.unet, 4, 32, TARGETS, seed=1)
    assert half.dtype == torch.bfloat16
    assert {p.dtype for p in half.unet.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in parameters} == {torch.float32}
    assert half.schedule.alphas_cumprod.dtype == torch.float32
    x_t, t = torch.randn(2, 4, 8, 8), torch.tensor([999, 259])
    output = half.denoiser()(x_t, t, half.embed(["a", "b"]))
    reference = exact.denoiser()(x_t, t, exact.embed(["a", "b"]))
    assert output.dtype == torch.float32
    assert 0 < float((output - reference).detach().std() / reference.std()) < 0.05
    assert half.decode(half.encode(torch.zeros(1, 3, 64, 64))).dtype == torch.float32
    output.square().mean().backward()
    gradients = [parameter.grad for parameter in parameters]
    assert all(gradient is not None and gradient.dtype == torch.float32 for gradient in gradients)
    assert sum(float(gradient.abs().sum()) for gradient in gradients if gradient is not None) > 0


def _student() -> tuple[Backbone, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    backbone = random_backbone(seed=5)
    parameters = attach(backbone.unet, 4, 32, TARGETS, seed=1)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.05
    return backbone, (torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 77, 32))


def test_the_teacher_is_the_base_without_its_adapter(tiny: Backbone) -> None:
    backbone, inputs = _student()
    base = tiny.denoiser()(*inputs)
    assert torch.equal(backbone.denoiser(adapter=False)(*inputs), base)
    assert not torch.equal(backbone.denoiser()(*inputs), base)
    trained = trainable_parameters(backbone.unet)
    assert trained > 0
    with adapters_off(backbone.unet):
        assert torch.equal(backbone.denoiser()(*inputs), base)
        assert torch.equal(backbone.denoiser(adapter=False)(*inputs), base)
        assert torch.equal(backbone.denoiser()(*inputs), base), "an inner use switched them on again"
    assert not torch.equal(backbone.denoiser()(*inputs), base)
    assert trainable_parameters(backbone.unet) == trained


def test_the_teacher_in_half_precision_is_the_stock_unet_in_it() -> None:
    backbone = random_backbone(seed=5, dtype="bf16")
    x_t, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([500, 20]), torch.randn(2, 77, 32)
    with torch.no_grad():
        stock = backbone.unet(x_t.bfloat16(), t, encoder_hidden_states=cond.bfloat16()).sample
        casts = list[bool]()
        backbone.unet.register_forward_pre_hook(lambda *_: casts.append(torch.is_autocast_enabled("cpu")))
        assert torch.equal(backbone.denoiser(adapter=False)(x_t, t, cond), stock.float())
        assert torch.equal(backbone.denoiser()(x_t, t, cond), stock.float()), "so does one that is fused"
        attach(backbone.unet, 4, 32, TARGETS, seed=1)
        backbone.denoiser()(x_t, t, cond)
    assert casts == [False, False, True], "norms go through fp32 under autocast; an adapter in fp32 needs it"


def test_switching_restores_after_errors_and_keeps_frozen_adapters_frozen() -> None:
    backbone, inputs = _student()
    student = backbone.denoiser()(*inputs)
    with pytest.raises(ZeroDivisionError), adapters_off(backbone.unet):
        _ = 1 / 0
    assert torch.equal(backbone.denoiser()(*inputs), student)
    backbone.unet.requires_grad_(False)
    backbone.denoiser(adapter=False)(*inputs)
    assert trainable_parameters(backbone.unet) == 0


def test_a_teacher_call_between_forward_and_backward_loses_no_gradient() -> None:
    backbone, inputs = _student()
    parameters = [parameter for parameter in backbone.unet.parameters() if parameter.requires_grad]
    backbone.denoiser()(*inputs).square().mean().backward()
    expected = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    assert len(expected) == len(parameters)
    backbone.unet.zero_grad()
    loss = backbone.denoiser()(*inputs).square().mean()
    with torch.no_grad():
        backbone.denoiser(adapter=False)(*inputs)
    loss.backward()
    assert all(torch.equal(parameter.grad, grad) for parameter, grad in zip(parameters, expected, strict=True))


def test_without_an_adapter_there_is_nothing_to_switch(tiny: Backbone) -> None:
    with adapters_off(tiny.unet):
        pass
    x_t, t, cond = torch.randn(1, 4, 8, 8), torch.tensor([1]), torch.randn(1, 77, 32)
    assert torch.equal(tiny.denoiser(adapter=False)(x_t, t, cond), tiny.denoiser()(x_t, t, cond))


def test_stable_diffusions_own_architecture() -> None:
    """Shapes and counts, without memory for the weights."""
    backbone = random_backbone("sd15", device="meta")
    assert sum(parameter.numel() for parameter in backbone.unet.parameters()) == 859_520_964
    assert sum(parameter.numel() for parameter in backbone.vae.parameters()) == 83_653_863
    assert sum(parameter.numel() for parameter in backbone.text_encoder.parameters()) == 123_060_480
    assert backbone.latent_shape() == (4, 64, 64) and backbone.resolution == 512
    assert (backbone.guidance_scale, backbone.teacher_steps, backbone.abilities) == (7.5, 50, None)
    assert backbone.schedule.prediction_type == "epsilon"
    assert float(backbone.schedule.alphas_cumprod[0]) == pytest.approx(0.99915, abs=1e-5)


def test_random_weights_follow_the_seed_and_leave_the_callers_state_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first, second, other = random_backbone(seed=5), random_backbone(seed=5), random_backbone(seed=6)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first.unet.conv_in.weight, second.unet.conv_in.weight)
    assert not torch.equal(first.unet.conv_in.weight, other.unet.conv_in.weight)
    assert first.fingerprint == second.fingerprint != other.fingerprint

